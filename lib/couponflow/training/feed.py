"""Examples of ONE pinned snapshot as batches, every row counted, per shard and epoch.

Training opens exactly the files of a dataset's manifest, never a folder. Importing this module brings neither
torch nor Petastorm.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from couponflow.errors import ConfigError, CouponflowError, DataError
from couponflow.training import manifests, reader
from couponflow.training.workers import Pending, Workers

if TYPE_CHECKING:
    from couponflow.models.batch import Batch

log = logging.getLogger("couponflow")

#: What every reader needs, and all that evaluation reads.
WIDE_COLUMNS = ("split", "vocabulary_version", "wide", "label", "example_id")
ALL_COLUMNS = (*manifests.COLUMNS, "example_id", "user_id", "target_id")
#: What the back-test reads: aggregates, whose they are and when they were known.
DATED_COLUMNS = (*WIDE_COLUMNS, "user_id", "target_id", "as_of", "mature_time")
_TIMES = ("as_of", "mature_time")
#: A long pass says how far it is.
_PROGRESS_SECONDS = 30.0
#: What tells a row from others, and how many places an error names.
_CONTENT = ("history", "target", "wide")
_NAMED = 3


class Example(NamedTuple):
    """One row as stored; what was not asked for is empty. Times are UTC microseconds since 1970."""

    wide: bytes
    label: float
    history: bytes = b""
    negatives: bytes = b""
    target: bytes = b""
    example_id: str = ""
    user_id: str = ""
    target_id: str = ""
    as_of: int = 0
    mature_time: int = 0


class Feed:
    """One split as epochs of batches, sharded over ranks by row group.

    Every rank yields the same number of batches per epoch, the maximum over ranks; a rank that has run out
    yields batches of zero rows. Every row is yielded once per epoch by exactly one rank.
    """

    def __init__(
        self,
        dataset: manifests.Dataset,
        split: str,
        workers: Workers,
        batch_size: int,
        shuffle_rows: int = 0,
        seed: int = 0,
    ) -> None:
        """Open a split.

        ``batch_size``: rows per step over all ranks; ``shuffle_rows``: buffer per rank, 0 keeps file order.

        Raises:
            ConfigError, DataError: as ``check``; ConfigError when a step has fewer rows than ranks.
        """
        if batch_size < workers.size:
            raise ConfigError(
                f"training.batch_size = {batch_size} is below one row per rank ({workers.size}); raise it"
            )
        manifests.check(dataset, split, workers.size)
        self._dataset, self._split, self._workers = dataset, split, workers
        self._rows_per_step = batch_size // workers.size
        self._shuffle_rows, self._seed = shuffle_rows, seed
        self.rows = dataset.rows(split)
        self._held: list[Example] = []

    def epoch(self, number: int = 0) -> Iterator["Batch"]:
        """The batches of one epoch; shuffling depends on seed, number and rank.

        Collective: all ranks iterate to the end.

        Raises:
            DataError: a file cannot be read, its ids are not of the manifest's vocabulary, or the rows of a
                shard differ from the manifest; on all ranks.
        """
        uris = list(self._dataset.files[self._split])
        seed = self._seed + number if self._shuffle_rows else None
        shard = reader.Shard(uris, manifests.COLUMNS, self._workers.rank, self._workers.size, seed)
        rows = self._examples(shard, number)
        num_read, reported = 0, time.monotonic()
        coming = self._read(rows)
        while True:
            held, made, agreed = coming
            num_read += len(held)
            step_rows, failed = agreed()
            if isinstance(made, CouponflowError):
                raise made
            if failed:
                raise DataError(f"split {self._split}: another rank cannot read its rows; see its message")
            if not step_rows:
                break
            if not self._workers.rank and time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info("%s: %d of at most %d rows read", self._split, num_read, self.rows)
            coming = self._read(rows)  # while a step is trained, the ranks agree on the next one
            self._held = held
            yield made
        counted = np.zeros(1 + self._workers.size)
        counted[[0, 1 + self._workers.rank]] = num_read, shard.num_rows
        in_split, *by_shard = self._workers.allreduce_sum(counted).astype(int).tolist()
        where = f"epoch {number}"
        _check_shards(self._dataset, f"split {self._split}", uris, by_shard, where)
        _check_count(self._dataset, f"split {self._split}", self.rows, in_split, where)

    def locate(self, places: Sequence[int] = ()) -> str:
        """File and row group of rows of the batch handed out last, all of it when none is named.

        Rows are found by their bytes: two equal ones are both named. Reads this rank's files again.
        """
        return self._where([self._held[place] for place in places] or self._held)

    def _where(self, rows: Sequence[Example]) -> str:
        wanted = {(row.history, row.target, row.wide) for row in rows}
        found: list[str] = []
        for uri, number, columns in reader.groups(list(self._dataset.files[self._split]), _CONTENT):
            self._workers.beat("locate")
            hits = [n for n, row in enumerate(zip(*columns, strict=True)) if row in wanted]
            if hits:
                found.append(f"{_rows_text(hits)} of row group {number} of {uri}")
        more = f" and of {len(found) - _NAMED} more row groups" if len(found) > _NAMED else ""
        return ", ".join(found[:_NAMED]) + more or "rows that the files no longer hold"

    def _read(self, rows: Iterator[Example]) -> "tuple[list[Example], Batch | CouponflowError, Pending]":
        """The rows of a step, the batch they make or why they make none, and what all ranks have of it."""
        held: list[Example] = []
        made: Batch | CouponflowError
        try:
            held.extend(islice(rows, self._rows_per_step))
            made = self._decode(held)
        except CouponflowError as error:
            made = error  # raised once the other ranks know
        failed = isinstance(made, CouponflowError)
        return held, made, self._workers.start_sum("step", [len(held), failed])

    def _decode(self, rows: list[Example]) -> "Batch":
        from couponflow.models import batch

        if not rows:
            return batch.empty_batch(len(self._dataset.wide_features))
        try:
            made = decode(rows)
        except DataError as error:
            raise DataError(f"split {self._split}: {error}; the batch is {self._where(rows)}") from error
        if beyond := batch.beyond_vocabulary(made, self._dataset.vocabulary_sizes):
            raise DataError(
                f"split {self._split}: {beyond[0]} id {beyond[1]} is beyond vocabulary "
                f"{self._dataset.vocabulary_version}; run build_examples again"
            )
        return made

    def _examples(self, shard: reader.Shard, number: int) -> Iterator[Example]:
        rows = _read(self._dataset, shard, manifests.COLUMNS, self._split)
        if not self._shuffle_rows:
            return rows
        generator = np.random.default_rng([self._seed, number, self._workers.rank])
        return shuffled(rows, self._shuffle_rows, generator)


def _rows_text(rows: Sequence[int]) -> str:
    named = ", ".join(map(str, rows[:_NAMED])) + (", ..." if len(rows) > _NAMED else "")
    return f"row{'s' if len(rows) > 1 else ''} {named}"


def read_all(dataset: manifests.Dataset, split: str, columns: Sequence[str] = ALL_COLUMNS) -> list[Example]:
    """Every row of a split, ordered by ``example_id``; for one process.

    ``columns``: ``ALL_COLUMNS``, or ``WIDE_COLUMNS`` where histories would only fill the memory.

    Raises:
        DataError: as ``check``, or rows that differ from the manifest or its vocabulary.
    """
    manifests.check(dataset, split, columns=columns)
    rows = _read_whole(dataset, list(dataset.files[split]), columns, split)
    _check_count(dataset, f"split {split}", dataset.rows(split), len(rows), "one pass")
    return rows


def read_dated(dataset: manifests.Dataset, columns: Sequence[str] = DATED_COLUMNS) -> list[Example]:
    """Every row of all splits with its times and aggregates, ordered by ``example_id``; for one process.

    ``columns``: ``DATED_COLUMNS``, or more of them where a network is to score the rows.

    Raises:
        DataError: as ``check``, or rows that differ from the manifest or its vocabulary.
    """
    uris = sorted({uri for named in dataset.files.values() for uri in named})
    manifests.check_files(dataset, uris, columns)
    rows = _read_whole(dataset, uris, columns)
    _check_count(dataset, "all splits", sum(map(dataset.rows, dataset.files)), len(rows), "one pass")
    return rows


def _read_whole(
    dataset: manifests.Dataset, uris: Sequence[str], columns: Sequence[str], split: str | None = None
) -> list[Example]:
    shard = reader.Shard(uris, columns)
    rows = sorted(_read(dataset, shard, columns, split), key=lambda row: row.example_id)
    what = f"split {split}" if split else "all splits"
    _check_shards(dataset, what, uris, [shard.num_rows], "one pass")
    return rows


def _check_shards(
    dataset: manifests.Dataset, what: str, uris: Sequence[str], found: Sequence[int], where: str
) -> None:
    """Rows of the row groups of each shard, as read and as the manifest has them."""
    for rank, (expected, read) in enumerate(zip(dataset.shard_rows(uris, len(found)), found, strict=True)):
        _check_count(dataset, f"{what}, shard {rank} of {len(found)}", expected, read, where)


def _check_count(dataset: manifests.Dataset, what: str, expected: int, found: int, where: str) -> None:
    if found != expected:
        raise DataError(
            f"{what} of {manifests.TABLE} version {dataset.table_version}, {where}: expected {expected} "
            f"rows, read {found}; the files do not match the manifest, run build_examples again"
        )


def decode(rows: Sequence[Example]) -> "Batch":
    """The rows as one batch, by the one decoder of training and scoring."""
    from couponflow.models import batch

    return batch.decode(
        [row.history for row in rows],
        [row.target for row in rows],
        [row.wide for row in rows],
        negatives=[row.negatives for row in rows],
        label=[row.label for row in rows],
    )


def aggregates(rows: Sequence[Example]) -> NDArray[Any]:
    """The wide part of the rows, float32 [N,F] in the order of the manifest's ``wide_features``."""
    from couponflow.models import batch

    return batch.decode_wide([row.wide for row in rows])


def batches(rows: Sequence[Example], size: int = 1024) -> Iterator["Batch"]:
    """The rows in order, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield decode(rows[start : start + size])


def shuffled(rows: Iterator[Example], capacity: int, generator: np.random.Generator) -> Iterator[Example]:
    """The same rows in random order, holding at most ``capacity``; a full buffer gives out a random one."""
    held: list[Example] = []
    for row in rows:
        if len(held) < capacity:
            held.append(row)
            continue
        place = int(generator.integers(capacity))
        yield held[place]
        held[place] = row
    yield from (held[place] for place in generator.permutation(len(held)))


def _read(
    dataset: manifests.Dataset, shard: reader.Shard, columns: Sequence[str], split: str | None = None
) -> Iterator[Example]:
    """The rows of a shard that belong to the split; ids of another vocabulary mean other things."""
    names = [name for name in columns if name in Example._fields]
    for values in shard:
        values["label"] = values["label"].astype(float)
        for name in set(_TIMES) & set(columns):
            values[name] = values[name].astype("datetime64[us]").astype(np.int64)
        for place in _places(values["split"], split):
            if (found := values["vocabulary_version"][place]) != dataset.vocabulary_version:
                raise DataError(
                    f"{manifests.TABLE} version {dataset.table_version} mixes vocabularies {found} and "
                    f"{dataset.vocabulary_version}; run build_examples for all its dates with one"
                )
            yield Example(**{name: values[name][place] for name in names})


def _places(splits: NDArray[Any], split: str | None) -> NDArray[np.intp]:
    return np.arange(len(splits)) if split is None else np.flatnonzero(splits == split)
