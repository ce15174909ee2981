"""The door to Petastorm, on tiny Parquet files; two ranks run as two threads around a barrier."""

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from numpy.typing import ArrayLike

from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import layouts
from couponflow.training import feed, manifests, reader
from couponflow.training.workers import Workers

T0 = datetime(2024, 1, 1, tzinfo=UTC)
SIZES = {"item": 50, "category": 20, "shop": 8, "event_type": 9}


def make_example(number: int, split: str = "train", length: int = 2) -> dict[str, object]:
    """A row whose first aggregate is its number."""
    wide = np.r_[number, np.random.default_rng(number).normal(size=len(layouts.WIDE_FEATURES) - 1)]
    generator = np.random.default_rng([number, 1])
    history = np.c_[generator.integers(1, 8, (length, 4)), np.arange(length, 0, -1) * 1440]
    return {
        "example_id": f"c{number % 3}:u{number}:2024-01-10",
        "user_id": f"u{number}",
        "target_id": f"c{number % 3}",
        "split": split,
        "vocabulary_version": "v1",
        "as_of": T0 + timedelta(days=number),
        "mature_time": T0 + timedelta(days=number + 10),
        "label": number % 2,
        "history": history.astype("<i4").tobytes(),
        "negatives": generator.integers(1, 8, (length, 2)).astype("<i4").tobytes(),
        "target": np.array([[number % 7 + 1, 2, 3]], "<i4").tobytes(),
        "wide": wide.astype("<f4").tobytes(),
    }


def dataset_of(files: dict[str, dict[str, int]], vocabulary: str = "v1", **over: object) -> manifests.Dataset:
    """A dataset of these files as table version 3, its row groups read off the footers."""
    uris = {uri for named in files.values() for uri in named}
    groups = {uri: reader.row_groups(reader.read_footer(uri)) for uri in uris}
    base = manifests.Dataset(3, vocabulary, SIZES, layouts.WIDE_FEATURES, files, groups)
    return replace(base, **over)


def write_file(folder: Path, name: str, rows: list[dict[str, object]], rows_per_group: int = 100) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    index = table.schema.get_field_index("label")
    table = table.set_column(index, "label", table["label"].cast(pa.int32()))
    pq.write_table(table, folder / name, row_group_size=rows_per_group)
    return (folder / name).absolute().as_uri()


def make_dataset(folder: Path, sizes: tuple[int, ...], valid: int = 1) -> manifests.Dataset:
    """One file per size, numbered on; ``valid`` rows of each file are of split valid."""
    files: dict[str, dict[str, int]] = {"train": {}, "valid": {}}
    number = 0
    for place, size in enumerate(sizes):
        rows = [make_example(number + n, "train" if n >= valid else "valid", n % 4) for n in range(size)]
        uri = write_file(folder, f"part-{place}.parquet", rows)
        files["train"][uri] = size - min(valid, size)
        files["valid"][uri] = min(valid, size)
        number += size
    return dataset_of(files)


class Thread(Workers):
    """A rank of a group of threads."""

    def __init__(
        self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, np.ndarray]
    ) -> None:
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def allreduce_sum(self, values: ArrayLike) -> np.ndarray:
        self._board[self.rank] = np.atleast_1d(np.asarray(values, np.float64))
        self._barrier.wait(timeout=20)
        total = np.sum([self._board[rank] for rank in range(self.size)], axis=0)
        self._barrier.wait(timeout=20)
        return total


def run_ranks(size: int, work) -> list[object]:
    """What ``work(workers)`` returns, or raises, on each rank."""
    barrier, board, results = threading.Barrier(size), {}, [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(Thread(rank, size, barrier, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def numbers(batches: Iterator) -> list[list[int]]:
    return [batch.wide[:, 0].int().tolist() for batch in batches]


def flat(steps: list[list[int]]) -> list[int]:
    return [number for step in steps for number in step]


def test_every_row_of_the_split_once_and_as_stored(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, (5, 3, 6), valid=2)
    found = feed.Feed(dataset, "train", Workers(), 4)
    batches = list(found.epoch())
    assert [b.size for b in batches] == [4, 4]
    rows = sorted(flat(numbers(batches)))
    assert rows == [2, 3, 4, 7, 10, 11, 12, 13]
    examples = {number: make_example(number, length=0) for number in rows}
    for batch in batches:
        for place, number in enumerate(batch.wide[:, 0].int().tolist()):
            assert batch.label[place] == number % 2
            assert np.float32(batch.wide[place]).tobytes() == examples[number]["wide"]
    assert sorted(flat(numbers(feed.Feed(dataset, "valid", Workers(), 100).epoch()))) == [0, 1, 5, 6, 8, 9]


def test_equal_steps_and_conservation_with_uneven_shards(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, (10, 2, 9, 2, 7), valid=1)

    def work(workers: Workers) -> list[list[int]]:
        return numbers(feed.Feed(dataset, "train", workers, 6, shuffle_rows=50, seed=1).epoch(2))

    left, right = run_ranks(2, work)
    assert len(left) == len(right) == 8  # 23 rows in shards of 9+8+6 and 1+1
    assert [len(step) for step in right] == [2, 0, 0, 0, 0, 0, 0, 0]
    expected = Counter(n for n in range(30) if n not in (0, 10, 12, 21, 23))
    assert Counter(flat(left + right)) == expected


def test_a_rank_without_any_row_of_the_split_yields_fillers(tmp_path: Path) -> None:
    first = write_file(tmp_path, "a.parquet", [make_example(n) for n in range(5)])
    second = write_file(tmp_path, "b.parquet", [make_example(n, "valid") for n in range(5, 8)])
    dataset = dataset_of({"train": {first: 5, second: 0}, "valid": {second: 3}})
    left, right = run_ranks(2, lambda workers: numbers(feed.Feed(dataset, "train", workers, 4).epoch()))
    assert [len(step) for step in left] == [2, 2, 1]
    assert right == [[], [], []]


def test_shuffling_repeats_by_seed_and_epoch(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, (8, 8, 8, 8), valid=0)

    def order(seed: int, number: int) -> list[list[int]]:
        return numbers(feed.Feed(dataset, "train", Workers(), 8, shuffle_rows=10, seed=seed).epoch(number))

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, n)) for seed, n in ((1, 0), (1, 1), (2, 0), (3, 5))}) == 4
    assert sorted(flat(order(1, 0))) == list(range(32))


@pytest.mark.parametrize("said", [3, 5])
def test_rows_of_a_split_that_differ_from_the_manifest_stop_all_ranks(tmp_path: Path, said: int) -> None:
    first = write_file(tmp_path, "a.parquet", [make_example(n, "train" if n else "valid") for n in range(5)])
    second = write_file(tmp_path, "b.parquet", [make_example(n) for n in range(5, 8)])
    dataset = dataset_of({"train": {first: said, second: 3}, "valid": {first: 5 - said}})
    found = run_ranks(2, lambda workers: list(feed.Feed(dataset, "train", workers, 4).epoch(6)))
    assert all(isinstance(error, DataError) for error in found), found
    assert f"split train of training_examples version 3, epoch 6: expected {said + 3} rows, read 7" in str(
        found[0]
    )
    with pytest.raises(DataError, match=f"expected {said + 3} rows, read 7"):
        feed.read_all(dataset, "train")


@pytest.mark.parametrize("change", ["lost", "twice"])
def test_a_shard_that_reads_other_rows_than_its_row_groups_is_named_on_all_ranks(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that ends early, or repeats a row group, raises nothing by itself."""
    dataset = make_dataset(tmp_path, (4, 5, 6, 7), valid=0)
    whole = reader.Shard.__iter__

    def broken(shard: reader.Shard) -> Iterator[dict[str, np.ndarray]]:
        groups = list(whole(shard))
        if shard._rank == 1:
            groups = groups[:-1] if change == "lost" else [*groups, groups[0]]
            shard.num_rows = sum(len(group["label"]) for group in groups)
        yield from groups

    monkeypatch.setattr(reader.Shard, "__iter__", broken)
    found = run_ranks(2, lambda workers: list(feed.Feed(dataset, "train", workers, 4).epoch(2)))
    read = 5 if change == "lost" else 17
    for error in found:
        assert isinstance(error, DataError)
        expected = "split train, shard 1 of 2 of training_examples version 3, epoch 2: expected 12 rows, "
        assert str(error).startswith(f"{expected}read {read};")


def test_shards_and_their_rows_follow_from_the_manifest(tmp_path: Path) -> None:
    rows = [make_example(n, "train" if n % 5 else "valid") for n in range(23)]
    first = write_file(tmp_path, "a.parquet", rows[:13], rows_per_group=4)  # 4 4 4 1
    second = write_file(tmp_path, "b.parquet", rows[13:], rows_per_group=3)  # 3 3 3 1
    valid = {first: 3, second: 2}
    dataset = dataset_of({"train": {first: 10, second: 8}, "valid": valid})
    for size in range(1, 9):
        shards = [reader.Shard([first, second], ["label"], rank, size) for rank in range(size)]
        read = [sum(len(group["label"]) for group in shard) for shard in shards]
        assert read == dataset.shard_rows([first, second], size) == [shard.num_rows for shard in shards]
        assert sum(read) == 23


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_outside_the_group_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ConfigError, match=f"shard {rank} of {size}"):
        reader.Shard(["a"], ["label"], rank, size)


@pytest.mark.parametrize("pool", ["thread", "dummy"])
@pytest.mark.parametrize("workers", [1, 2, 10])
def test_a_hundred_reads_lose_and_repeat_nothing(
    tmp_path: Path, pool: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 9: rows equal the manifest each time, shards are disjoint, whatever the reader's threads."""
    monkeypatch.setattr(reader, "_WORKERS", workers)
    monkeypatch.setattr(reader, "_POOL", pool)
    rows = [make_example(number) for number in range(75)]
    uris = [write_file(tmp_path, f"{n}.parquet", rows[25 * n : 25 * n + 25], 5) for n in range(3)]
    dataset = dataset_of({"train": dict.fromkeys(uris, 25)})
    for number in range(17):  # times 6 cases
        shards = [reader.Shard(uris, ["example_id"], rank, 2, seed=number) for rank in range(2)]
        read = [[name for group in shard for name in group["example_id"]] for shard in shards]
        assert [len(names) for names in read] == dataset.shard_rows(uris, 2) == [40, 35]
        assert len({*read[0], *read[1]}) == 75


def test_damaged_data_stops_all_ranks_and_names_the_file(tmp_path: Path) -> None:
    good = write_file(tmp_path, "a.parquet", [make_example(n) for n in range(300)])
    bad = write_file(tmp_path, "b.parquet", [make_example(n) for n in range(300)])
    path = tmp_path / "b.parquet"
    content = bytearray(path.read_bytes())
    content[4:4000] = bytes(3996)
    path.write_bytes(content)
    dataset = dataset_of({"train": {good: 300, bad: 300}})
    left, right = run_ranks(2, lambda workers: list(feed.Feed(dataset, "train", workers, 64).epoch()))
    assert isinstance(left, DataError)
    assert isinstance(right, DataError)
    assert "another rank" in str(left)
    assert bad in str(right)


def test_rows_of_a_batch_are_named_by_file_and_row_group(tmp_path: Path) -> None:
    first = write_file(tmp_path, "a.parquet", [make_example(n) for n in range(10)], rows_per_group=4)
    second = write_file(tmp_path, "b.parquet", [make_example(n) for n in range(10, 16)], rows_per_group=3)
    dataset = dataset_of({"train": {first: 10, second: 6}})

    def work(workers: Workers) -> list[tuple[list[int], str, str]]:
        opened = feed.Feed(dataset, "train", workers, 6, shuffle_rows=20, seed=4)
        return [
            (batch.wide[:, 0].int().tolist(), opened.locate([batch.size - 1]), opened.locate())
            for batch in opened.epoch(1)
            if batch.size
        ]

    def place(number: int) -> tuple[str, int, int]:
        return (
            (first, number // 4, number % 4)
            if number < 10
            else (second, (number - 10) // 3, (number - 10) % 3)
        )

    steps = [step for rank in run_ranks(2, work) for step in rank]
    assert sorted(flat([held for held, *_ in steps])) == list(range(16))
    for held, last, whole in steps:
        uri, group, row = place(held[-1])
        assert last == f"row {row} of row group {group} of {uri}"
        groups = {place(number)[:2] for number in held}
        for uri, group in groups:
            assert f"of row group {group} of {uri}" in whole


def test_rows_that_cannot_be_decoded_are_named(tmp_path: Path) -> None:
    rows = [make_example(n) for n in range(6)]
    rows[4]["wide"] = np.full(len(layouts.WIDE_FEATURES), np.nan, "<f4").tobytes()
    uri = write_file(tmp_path, "a.parquet", rows, rows_per_group=2)
    dataset = dataset_of({"train": {uri: 6}})
    with pytest.raises(
        DataError, match=rf"split train: .* not finite.*; the batch is .* of row group 2 of {uri}"
    ):
        list(feed.Feed(dataset, "train", Workers(), 2).epoch())


def test_missing_file_is_named_before_anything_is_read(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, (4, 4))
    (tmp_path / "part-1.parquet").unlink()
    with pytest.raises(DataError, match=r"part-1.parquet .* does not exist"):
        feed.Feed(dataset, "train", Workers(), 4)


@pytest.mark.parametrize("content", [b"", b"PAR1 not parquet"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    dataset = make_dataset(tmp_path, (4, 4))
    (tmp_path / "part-0.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"part-0.parquet is no readable Parquet file"):
        manifests.check(dataset, "train")


def test_more_ranks_than_row_groups(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, (4, 4, 4))
    manifests.check(dataset, "train", num_ranks=3)
    with pytest.raises(ConfigError, match="has 3 row groups, need >= 4 for 4 ranks"):
        manifests.check(dataset, "train", num_ranks=4)


def test_fewer_rows_per_step_than_ranks(tmp_path: Path) -> None:
    workers = Workers()
    workers.size = 3
    with pytest.raises(ConfigError, match="batch_size = 2"):
        feed.Feed(make_dataset(tmp_path, (4, 4, 4)), "train", workers, 2)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("label", "1", "expected int32, found string"), ("history", None, "expected binary, found nothing")],
)
def test_drifted_columns_are_named(tmp_path: Path, column: str, value: object, message: str) -> None:
    rows = [make_example(n) for n in range(3)]
    table = pa.Table.from_pylist(rows).drop([column])
    if value is not None:
        table = table.append_column(column, pa.array([value] * 3))
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = dataset_of({"train": {(tmp_path / "x.parquet").as_uri(): 3}})
    with pytest.raises(DataError, match=f"column .*x.parquet: {message}"):
        manifests.check(dataset, "train", columns=(column,))


def test_rows_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    """A rebuild of some dates leaves the others as they were; their ids name other things."""
    old = write_file(tmp_path, "a.parquet", [make_example(n) for n in range(4)])
    new = write_file(tmp_path, "b.parquet", [make_example(4) | {"vocabulary_version": "v2"}])
    dataset = dataset_of({"train": {old: 4, new: 1}}, "v2")
    with pytest.raises(DataError, match="version 3 mixes vocabularies v1 and v2; run build_examples for all"):
        list(feed.Feed(dataset, "train", Workers(), 8).epoch())
    with pytest.raises(DataError, match="mixes vocabularies"):
        feed.read_all(dataset, "train", feed.WIDE_COLUMNS)


@pytest.mark.parametrize("field", ["item", "category", "shop", "event_type"])
def test_ids_beyond_the_vocabulary_stop_before_the_network_sees_them(tmp_path: Path, field: str) -> None:
    dataset = make_dataset(tmp_path, (30,))
    short = replace(dataset, vocabulary_sizes=SIZES | {field: 3})
    with pytest.raises(DataError, match=rf"split train: {field} id \d is beyond vocabulary v1"):
        list(feed.Feed(short, "train", Workers(), 100).epoch())


def test_aggregates_alone_leave_histories_unread(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, (5, 6), valid=1)
    whole, part = (
        feed.read_all(dataset, "train", columns) for columns in (feed.ALL_COLUMNS, feed.WIDE_COLUMNS)
    )
    assert [(row.wide, row.label, row.example_id) for row in part] == [
        (row.wide, row.label, row.example_id) for row in whole
    ]
    assert {row.history + row.negatives + row.target for row in part} == {b""}
    assert [batch.size for batch in feed.batches(part, 5)] == [5, 4]


def test_a_long_pass_says_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for hours sees that it goes on."""
    monkeypatch.setattr(feed, "_PROGRESS_SECONDS", -1.0)
    monkeypatch.setattr(logging.getLogger("couponflow"), "propagate", True)
    dataset = make_dataset(tmp_path, (9, 4), valid=0)
    with caplog.at_level(logging.INFO, "couponflow"):
        run_ranks(2, lambda workers: list(feed.Feed(dataset, "train", workers, 6).epoch()))
    assert [text.split(" of ")[0] for text in caplog.messages] == ["train: 3", "train: 6", "train: 9"]


def test_remote_files_are_read_through_the_legacy_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bucket(MemoryFileSystem):
        """An object store in memory, under the names that gcsfs uses."""

        protocol = ("gs",)
        store: ClassVar[dict[str, object]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("gs://").strip("/")

    bucket = Bucket(skip_instance_cache=True)
    monkeypatch.setattr(reader, "_gcs", lambda: bucket)
    local, remote = make_dataset(tmp_path, (5, 3, 6), valid=2), {}
    for split, named in local.files.items():
        remote[split] = {f"gs://bucket/lake/{Path(uri).name}": rows for uri, rows in named.items()}
    for path in tmp_path.iterdir():
        bucket.pipe_file(f"gs://bucket/lake/{path.name}", path.read_bytes())
    dataset = dataset_of(remote)
    assert feed.read_all(dataset, "train") == feed.read_all(local, "train")
    bucket.rm("gs://bucket/lake/part-1.parquet")
    with pytest.raises(DataError, match=r"gs://bucket/lake/part-1.parquet .* does not exist"):
        manifests.check(dataset, "train")


@pytest.mark.parametrize("where", ["_common_metadata", "part-0.parquet"])
def test_pickled_metadata_is_refused(tmp_path: Path, where: str) -> None:
    dataset = make_dataset(tmp_path, (4,))
    table = pq.read_table(tmp_path / "part-0.parquet")
    marked = table.replace_schema_metadata({b"dataset-toolkit.unischema.v1": b"cos\nsystem\n(S'true'\ntR."})
    assert dataset.rows("train") == 3
    if where == "_common_metadata":
        pq.write_metadata(marked.schema, tmp_path / where)
    else:
        pq.write_table(marked, tmp_path / where)
    with pytest.raises(DataError, match=f"{where} carries pickled Petastorm metadata"):
        manifests.check(dataset, "train")


def test_no_rows_of_a_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows of split test"):
        manifests.check(make_dataset(tmp_path, (4,)), "test")


def test_read_all_is_ordered_by_example_and_carries_ids(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, (5, 6), valid=1)
    rows = feed.read_all(dataset, "train")
    ids = [row.example_id for row in rows]
    assert ids == sorted(f"c{n % 3}:u{n}:2024-01-10" for n in range(11) if n not in (0, 5))
    assert all(row.user_id == row.example_id.split(":")[1] for row in rows)
    assert sum(batch.size for batch in feed.batches(rows, 4)) == 9


def test_manifest_round_trip_pointer_and_immutability(tmp_path: Path) -> None:
    root = str(tmp_path / "lake")
    made = make_dataset(tmp_path / "files", (4, 3))
    fold = {"cutoff": "2024-01-01", "start": "2024-01-01T00:00:00+00:00", "end": "", "train_rows": 3}
    dataset = replace(made, row_groups={}, sampling_rate=0.25, folds=(fold,))
    uri = manifests.write(root, dataset, "run-1")
    assert uri.endswith("datasets/training_examples-v3.json")
    assert manifests.write(root, dataset, "run-2") == uri  # a rerun writes the same
    with pytest.raises(ConflictError, match="other content"):
        manifests.write(root, replace(dataset, vocabulary_version="v2"), "run-3")
    manifests.write(root, replace(dataset, table_version=5), "run-4")
    assert manifests.load(root).table_version == 5
    old = manifests.load(root, 3)
    assert old == replace(dataset, row_groups=made.row_groups)
    assert sorted(old.row_groups.values()) == [(3,), (4,)]
    assert old.rows("train") == 5


def test_rows_that_delta_has_only_marked_as_deleted_are_refused(tmp_path: Path) -> None:
    """Petastorm would read them: the snapshot has fewer rows than the file."""
    dataset = make_dataset(tmp_path, (4, 6))
    uri = next(iter(dataset.files["train"]))
    fewer = dataset.files | {"train": dataset.files["train"] | {uri: 2}}
    marked = replace(dataset, files=fewer)
    with pytest.raises(
        DataError, match=r"part-0.parquet holds 4 rows, .* version 3 3 of them: .* deletion vec"
    ):
        manifests.write(str(tmp_path), replace(marked, row_groups={}), "r")
    with pytest.raises(DataError, match="deletion vectors"):
        manifests.check(marked, "train")
    with pytest.raises(DataError, match="deletion vectors"):
        feed.read_dated(marked)


def test_a_file_whose_row_groups_changed_is_refused(tmp_path: Path) -> None:
    uri = write_file(tmp_path, "a.parquet", [make_example(n) for n in range(6)], 3)
    dataset = dataset_of({"train": {uri: 6}})
    write_file(tmp_path, "a.parquet", [make_example(n) for n in range(6)], 4)
    with pytest.raises(DataError, match=r"row groups of \[4, 2\] rows, the manifest says \[3, 3\]"):
        manifests.check(dataset, "train")


def test_orphans_beside_the_files_are_not_read(tmp_path: Path) -> None:
    """Fault 19: what a broken write left in the folder belongs to no snapshot."""
    dataset = make_dataset(tmp_path, (5, 4), valid=0)
    write_file(tmp_path, "part-9-orphan.parquet", [make_example(n) for n in range(100, 120)])
    (tmp_path / "_temporary").mkdir()
    write_file(tmp_path / "_temporary", "x.parquet", [make_example(n) for n in range(200, 203)])
    (tmp_path / "part-8.parquet").write_bytes(b"PAR1 half a file")
    assert sorted(flat(numbers(feed.Feed(dataset, "train", Workers(), 4).epoch()))) == list(range(9))


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_half_written_manifest_is_refused(tmp_path: Path, damage: str) -> None:
    manifests.write(str(tmp_path), make_dataset(tmp_path / "files", (4,)), "r")
    for path in (tmp_path / "datasets").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(DataError, match="is no dataset manifest"):
        manifests.load(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_of_our_own_table_is_named(tmp_path: Path, damage: str) -> None:
    """Fault 12: pyarrow names no file."""
    dataset = make_dataset(tmp_path, (300, 300), valid=0)
    path = tmp_path / "part-1.parquet"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        group = pq.read_metadata(path).row_group(0)
        columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
        start = columns["wide"].data_page_offset
        content[start : start + 24] = bytes(byte ^ 0xFF for byte in content[start : start + 24])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part-1\.parquet"):
        list(feed.Feed(dataset, "train", Workers(), 64).epoch())


def test_missing_damaged_and_foreign_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        manifests.load(str(tmp_path))
    path = tmp_path / "datasets" / "training_examples.json"
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(DataError, match="is no dataset manifest"):
        manifests.load(str(tmp_path))
    manifests.write(str(tmp_path / "b"), manifests.Dataset(1, "v", SIZES, layouts.WIDE_FEATURES, {}), "r")
    tree = json.loads((tmp_path / "b/datasets/training_examples.json").read_text())
    path.write_text(json.dumps(tree | {"wide_features": ["spend"]}))
    with pytest.raises(DataError, match="lists 1 aggregates that differ"):
        manifests.load(str(tmp_path))
