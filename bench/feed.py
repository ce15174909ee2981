"""The training feed against plain pyarrow.

Both sides read the same files of ``training_examples`` and give batches of the same rows, padded to the
batch's longest history: the feed through Petastorm with all its checks, the rival through pyarrow row groups
and a loop that pads. Before anything is timed the first batches are compared. Value: feed rows per second
over the rival's.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench import data
from bench.run import Claim, in_turns, median_ratio
from couponflow.lake import layouts
from couponflow.sequences import packing
from couponflow.training import feed, manifests, reader
from couponflow.training.workers import Workers

CLAIMS = ("feed_vs_pyarrow",)
#: Each file holds whole batches, so that both sides cut the rows alike.
ROWS, FILES, LENGTH, BATCH, RUNS = 49_152, 4, 100, 512, 3
_SIZES = {"item": 50_002, "category": 302, "shop": 42, "event_type": 9}
Tensors = dict[str, torch.Tensor]


def make_files(rows: int) -> manifests.Dataset:
    """Examples as ``build_examples`` stores them; geometric history lengths, mean a third of the cap."""
    folder = data.FOLDER / f"examples-{rows}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number in range(FILES):
        path = folder / f"part-{number}.parquet"
        if not path.exists():
            table = _examples(np.random.default_rng(number), rows // FILES)
            pq.write_table(table, path, row_group_size=20_000)
        files[path.absolute().as_uri()] = rows // FILES
    groups = {uri: reader.row_groups(reader.read_footer(uri)) for uri in files}
    return manifests.Dataset(0, "v0", _SIZES, layouts.WIDE_FEATURES, {"train": files}, row_groups=groups)


def _examples(generator: np.random.Generator, rows: int) -> pa.Table:
    sizes = generator.geometric(3 / LENGTH, rows).clip(0, LENGTH).astype(np.int64)
    ranges = (*_SIZES.values(), 100_000)

    def matrix(count: int, highest: tuple[int, ...]) -> packing.Int32:
        columns = [generator.integers(2, size, count) for size in highest]
        stacked: packing.Int32 = np.stack(columns, axis=1).astype("<i4")
        return stacked

    total, one = int(sizes.sum()), np.ones(rows, dtype=np.int64)
    wide = generator.random((rows, len(layouts.WIDE_FEATURES))).astype("<f4")
    return pa.table(
        {
            "split": pa.array(["train"] * rows),
            "vocabulary_version": pa.array(["v0"] * rows),
            "history": packing.pack(matrix(total, ranges), sizes),
            "negatives": packing.pack(matrix(total, ranges[:2]), sizes),
            "target": packing.pack(matrix(rows, ranges[:3]), one),
            "wide": packing.pack(wide, one),
            "label": pa.array(generator.integers(0, 2, rows), pa.int32()),
        }
    )


def plain(dataset: manifests.Dataset, size: int) -> Iterator[Tensors]:
    """Row groups of the files, cut into batches, each padded to its longest history."""
    columns = ["history", "negatives", "target", "wide", "label"]
    for uri in dataset.files["train"]:
        file = pq.ParquetFile(uri.removeprefix("file://"))
        for group in range(file.num_row_groups):
            held = {name: column.to_pylist() for name, column in _columns(file, group, columns)}
            for first in range(0, len(held["label"]), size):
                yield _padded({name: values[first : first + size] for name, values in held.items()})


def _columns(file: pq.ParquetFile, group: int, names: list[str]) -> list[tuple[str, pa.ChunkedArray]]:
    table = file.read_row_group(group, columns=names)
    return [(name, table.column(name)) for name in names]


def _padded(rows: dict[str, list[bytes]]) -> Tensors:
    lengths = [len(value) // (4 * len(layouts.HISTORY_FIELDS)) for value in rows["history"]]
    tensors = {"length": torch.tensor(lengths), "label": torch.tensor(rows["label"], dtype=torch.float32)}
    for name, fields in (("history", 5), ("negatives", 2), ("target", 3)):
        longest = max(len(value) // (4 * fields) for value in rows[name])
        padded = np.zeros((len(lengths), longest, fields), dtype=np.int64)
        for place, value in enumerate(rows[name]):
            steps = np.frombuffer(value, dtype="<i4").reshape(-1, fields)
            padded[place, : len(steps)] = steps
        tensors[name] = torch.from_numpy(padded)
    wide = np.frombuffer(b"".join(rows["wide"]), "<f4").reshape(len(lengths), -1)
    tensors["wide"] = torch.from_numpy(wide.copy())
    return tensors


def check_equal(dataset: manifests.Dataset) -> None:
    """Refuse to time sides whose batches differ."""
    theirs = plain(dataset, BATCH)
    for number, ours in enumerate(feed.Feed(dataset, "train", Workers(), BATCH).epoch()):
        expected = next(theirs)
        assert torch.equal(ours.hist_item, expected["history"][:, :, 0])
        assert torch.equal(ours.neg_category, expected["negatives"][:, :, 1])
        assert torch.equal(ours.wide, expected["wide"])
        assert torch.equal(ours.label, expected["label"])
        if number == 20:
            return


def measure(names: tuple[str, ...], rows: int = ROWS) -> list[Claim]:
    """One epoch of one rank each, in file order, files in the page cache."""
    torch.set_num_threads(1)
    dataset = make_files(rows)
    check_equal(dataset)

    def ours() -> None:
        seen = sum(len(batch.label) for batch in feed.Feed(dataset, "train", Workers(), BATCH).epoch())
        assert seen == rows

    def rival() -> None:
        assert sum(len(batch["label"]) for batch in plain(dataset, BATCH)) == rows

    rounds = in_turns({"ours": ours, "rival": rival}, RUNS)
    value = median_ratio(rounds, "rival", "ours")
    rival_name = "pyarrow row groups, padded row by row"
    return [Claim(names[0], value, "x its rows/s", 0.7, RUNS, rival_name)]
