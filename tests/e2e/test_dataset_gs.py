"""A dataset under gs://, read by two shards through the legacy adapter, against a real object server."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_server import make_bucket
from store_proxy import Fault, running

from couponflow.errors import DataError, InfraError
from couponflow.lake import layouts, storage
from couponflow.training import feed, manifests, reader
from couponflow.training.workers import Workers

SIZES = {"item": 50, "category": 20, "shop": 8, "event_type": 9}


def upload(uri: str, first: int, size: int, rows_per_group: int) -> None:
    rows = [
        {
            "example_id": f"e{number:04}",
            "user_id": f"u{number}",
            "target_id": "c",
            "split": "train",
            "vocabulary_version": "v1",
            "label": number % 2,
            "history": np.array([[1, 2, 3, 4, 60]] * (number % 3), "<i4").tobytes(),
            "negatives": np.array([[1, 2]] * (number % 3), "<i4").tobytes(),
            "target": np.array([[0, 2, 0]], "<i4").tobytes(),
            "wide": np.full(len(layouts.WIDE_FEATURES), number, "<f4").tobytes(),
        }
        for number in range(first, first + size)
    ]
    table = pa.Table.from_pylist(rows)
    place = table.schema.get_field_index("label")
    stream = io.BytesIO()
    pq.write_table(
        table.set_column(place, "label", table["label"].cast("int32")), stream, row_group_size=rows_per_group
    )
    storage.create(uri, stream.getvalue(), "r")


class Rank(Workers):
    """One of two ranks read one after the other: the other's counts are those of the manifest."""

    def __init__(self, rank: int, others: np.ndarray) -> None:
        self.rank, self.size, self._others = rank, 2, others
        self.counted: np.ndarray | None = None

    def allreduce_sum(self, values: object) -> np.ndarray:
        own = np.atleast_1d(np.asarray(values, np.float64))
        if own.size == 3:
            self.counted = own
            return own + self._others
        return own


def test_two_shards_of_a_remote_dataset_read_every_row_once(bucket: str) -> None:
    root = f"{bucket}/lake"
    sizes = {f"{root}/tables/training_examples/part-{n}.parquet": size for n, size in enumerate((70, 45, 64))}
    first = 0
    for uri, size in sizes.items():
        upload(uri, first, size, 25)
        first += size
    upload(f"{root}/tables/training_examples/orphan.parquet", 900, 10, 10)  # of no snapshot
    dataset = manifests.Dataset(7, "v1", SIZES, layouts.WIDE_FEATURES, {"train": sizes})
    manifests.write(root, dataset, "run-1")
    loaded = manifests.load(root)
    assert list(loaded.row_groups.values()) == [(25, 25, 20), (25, 20), (25, 25, 14)]
    expected = loaded.shard_rows(list(sizes), 2)
    assert (sum(expected), expected) == (179, [90, 89])
    seen: list[int] = []
    for rank in range(2):
        others = np.array([expected[1 - rank], *(n * (place != rank) for place, n in enumerate(expected))])
        workers = Rank(rank, others)
        steps = list(feed.Feed(loaded, "train", workers, 32, shuffle_rows=40, seed=1).epoch(rank))
        numbers = [int(number) for step in steps for number in step.wide[:, 0].tolist()]
        assert workers.counted is not None
        assert workers.counted.tolist()[1 + rank] == len(numbers) == expected[rank]
        seen += numbers
    assert sorted(seen) == list(range(179))
    short = replace(loaded, row_groups=loaded.row_groups | {next(iter(sizes)): (25, 25, 21)})
    with pytest.raises(DataError, match=r"part-0.parquet has row groups of \[25, 25, 20\] rows"):
        manifests.check(short, "train")
    storage._blob(list(sizes)[1]).delete()
    reader._gcs().invalidate_cache()
    with pytest.raises(DataError, match=r"part-1.parquet .* does not exist"):
        manifests.check(loaded, "train")


def test_a_store_that_fails_is_no_damaged_file(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal names bucket and role, for a footer and in the middle of a shard; 503 is asked again."""
    with running(server) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        uri = f"{make_bucket()}/lake/part.parquet"
        upload(uri, 0, 40, 20)
        role = rf"roles/storage\.objectUser on bucket {uri.split('/')[2]}"
        for read in (
            lambda: reader.read_footer(uri),
            lambda: list(reader.Shard([uri], feed.WIDE_COLUMNS)),
        ):
            reader._gcs().invalidate_cache()
            proxy.faults = [Fault("^GET", 403, 10**6)]
            with pytest.raises(InfraError, match=role):
                read()
            reader._gcs().invalidate_cache()
            proxy.faults = [Fault("^GET", 503, 2)]
            read()
        assert sum(len(group["label"]) for group in reader.Shard([uri], feed.WIDE_COLUMNS)) == 40
