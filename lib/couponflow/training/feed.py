"""The only door to Petastorm: examples of ONE pinned snapshot as batches, every row counted.

A dataset is a manifest object: the files of one version of ``training_examples`` with the rows of each split
in them, written by the job that builds the examples. Training opens exactly those files, never a folder.
Importing this module brings neither torch nor Petastorm, so that the Spark side may write manifests.
"""

import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlparse

import numpy as np
from numpy.typing import NDArray

from couponflow.errors import ConfigError, CouponflowError, DataError
from couponflow.lake import layouts, schemas, storage
from couponflow.training.launch import Workers

if TYPE_CHECKING:
    from couponflow.models.batch import Batch

log = logging.getLogger("couponflow")

TABLE = "training_examples"
#: What every reader needs, what a network is trained on, and all that evaluation reads.
WIDE_COLUMNS = ("split", "vocabulary_version", "wide", "label", "example_id")
COLUMNS = ("split", "vocabulary_version", "history", "negatives", "target", "wide", "label")
ALL_COLUMNS = (*COLUMNS, "example_id", "user_id", "target_id")
_ARROW_TYPES = {"string": "string", "binary": "binary", "int": "int32"}
#: Petastorm unpickles this metadata key: a dataset that carries it is refused unread.
_UNISCHEMA = b"unischema"
#: One reading thread: two deliver row groups in an order that differs from run to run.
_WORKERS = 1
#: A long pass says how far it is, or the launcher would take it for hung.
_PROGRESS_SECONDS = 30.0


@dataclass(frozen=True)
class Dataset:
    """Files of one table version: ``files`` maps a split to {file URI: rows of the split in it}."""

    table_version: int
    vocabulary_version: str
    vocabulary_sizes: dict[str, int]
    wide_features: tuple[str, ...]
    files: dict[str, dict[str, int]]

    def rows(self, split: str) -> int:
        """Rows of a split over all files."""
        return sum(self.files.get(split, {}).values())


class Example(NamedTuple):
    """One row as stored; what was not asked for is empty."""

    wide: bytes
    label: float
    history: bytes = b""
    negatives: bytes = b""
    target: bytes = b""
    example_id: str = ""
    user_id: str = ""
    target_id: str = ""


def write_manifest(
    root_uri: str,
    table_version: int,
    files: Mapping[str, Mapping[str, int]],
    vocabulary_version: str,
    vocabulary_sizes: Mapping[str, int],
    run_id: str,
) -> str:
    """Publish what training may read; returns the URI of the versioned manifest.

    ``files``: split -> {file URI: rows of the split in that file}, of the snapshot ``table_version``.
    ``vocabulary_sizes``: rows of each embedding (largest index + 1) for item, category, shop, event_type.
    Writes ``datasets/training_examples-v<version>.json`` once, then moves the pointer
    ``datasets/training_examples.json``.
    """
    dataset = Dataset(
        table_version,
        vocabulary_version,
        dict(vocabulary_sizes),
        layouts.WIDE_FEATURES,
        {split: dict(sorted(named.items())) for split, named in sorted(files.items())},
    )
    content = json.dumps({"table": TABLE, **asdict(dataset)}, indent=1, sort_keys=True).encode()
    uri = storage.join(root_uri, "datasets", f"{TABLE}-v{table_version}.json")
    storage.create(uri, content, run_id)
    pointer = storage.join(root_uri, "datasets", f"{TABLE}.json")
    held = storage.read_bytes(pointer) if storage.exists(pointer) else None
    storage.replace(pointer, content, held)
    return uri


def load_manifest(root_uri: str, table_version: int | None = None) -> Dataset:
    """The newest manifest, or that of one table version.

    Raises:
        DataError: there is none, it is damaged, or its aggregates are those of other code.
    """
    name = TABLE if table_version is None else f"{TABLE}-v{table_version}"
    uri = storage.join(root_uri, "datasets", f"{name}.json")
    try:
        tree = json.loads(storage.read_bytes(uri))
        dataset = Dataset(
            int(tree["table_version"]),
            str(tree["vocabulary_version"]),
            {str(key): int(size) for key, size in tree["vocabulary_sizes"].items()},
            tuple(tree["wide_features"]),
            {split: {str(u): int(n) for u, n in named.items()} for split, named in tree["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{uri} is no dataset manifest ({error!r}); run build_examples again") from error
    if dataset.wide_features != layouts.WIDE_FEATURES:
        raise DataError(
            f"{uri} lists {len(dataset.wide_features)} aggregates that differ from the "
            f"{len(layouts.WIDE_FEATURES)} of this code; run build_examples again"
        )
    return dataset


def check(dataset: Dataset, split: str, num_ranks: int = 1, columns: Sequence[str] = COLUMNS) -> None:
    """Open every footer of a split before anything is read.

    Raises:
        DataError: no rows, a file that is missing or damaged, fewer rows than the manifest, a column that is
            missing or of another type, or pickled metadata.
        ConfigError: fewer row groups than ranks.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = dataset.files.get(split, {})
    if not dataset.rows(split):
        raise DataError(
            f"{TABLE} version {dataset.table_version} has no rows of split {split}; "
            "widen the dates of build_examples"
        )
    declared = {column.name: column.type for column in schemas.TABLES[TABLE].columns}
    num_groups = 0
    for uri, rows in files.items():
        try:
            with _open(uri) as source:
                footer = pq.read_metadata(source)
        except FileNotFoundError as error:
            raise DataError(
                f"{uri} of {TABLE} version {dataset.table_version} does not exist (vacuumed?); "
                "run build_examples again"
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{uri} is no readable Parquet file ({error}); restore or rebuild it") from error
        if any(_UNISCHEMA in key for key in footer.metadata or {}):
            raise DataError(
                f"{uri} carries pickled Petastorm metadata, which is never read; rewrite the file"
            )
        if footer.num_rows < rows:
            raise DataError(f"{uri} holds {footer.num_rows} rows, the manifest says {rows}; rebuild it")
        found = {field.name: str(field.type) for field in footer.schema.to_arrow_schema()}
        for name in columns:
            wanted = _ARROW_TYPES[declared[name]]
            if found.get(name) != wanted:
                raise DataError(
                    f"column {name} of {uri}: expected {wanted}, found {found.get(name, 'nothing')}; "
                    "run build_examples again"
                )
        num_groups += footer.num_row_groups
    for folder in sorted({uri.rpartition("/")[0] for uri in files}):
        _refuse_pickled_metadata(folder)
    if num_groups < num_ranks:
        raise ConfigError(
            f"split {split} of {TABLE} version {dataset.table_version} has {num_groups} row groups, need >= "
            f"{num_ranks} for {num_ranks} ranks; lower training.num_ranks or rebuild with fewer rows per file"
        )


class Feed:
    """One split as epochs of batches, sharded over ranks by row group.

    Every rank yields the same number of batches per epoch, the maximum over ranks; a rank that has run out
    yields batches of zero rows. Every row is yielded once per epoch by exactly one rank.
    """

    def __init__(
        self,
        dataset: Dataset,
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
        check(dataset, split, workers.size)
        self._dataset, self._split, self._workers = dataset, split, workers
        self._rows_per_step = batch_size // workers.size
        self._shuffle_rows, self._seed = shuffle_rows, seed
        self.rows = dataset.rows(split)

    def epoch(self, number: int = 0) -> Iterator["Batch"]:
        """The batches of one epoch; shuffling depends on seed, number and rank.

        Collective: all ranks iterate to the end.

        Raises:
            DataError: a file cannot be read, its ids are not of the manifest's vocabulary, or the rows of all
                ranks differ from the manifest; on all ranks.
        """
        from couponflow.models import batch

        rows = self._examples(number)
        num_read, reported = 0, time.monotonic()
        while True:
            held: list[Example] = []
            failure: CouponflowError | None = None
            made: Batch | None = None
            try:
                held = [row for _, row in zip(range(self._rows_per_step), rows, strict=False)]
                made = decode(held) if held else batch.empty_batch(len(self._dataset.wide_features))
                if beyond := batch.beyond_vocabulary(made, self._dataset.vocabulary_sizes):
                    raise DataError(
                        f"split {self._split}: {beyond[0]} id {beyond[1]} is beyond vocabulary "
                        f"{self._dataset.vocabulary_version}; run build_examples again"
                    )
            except CouponflowError as error:
                failure = error  # raised below, after the other ranks know
            num_read += len(held)
            step_rows, failed = self._workers.allreduce_sum([len(held), failure is not None])
            if failure is not None:
                raise failure
            if failed:
                raise DataError(f"split {self._split}: another rank cannot read its rows; see its message")
            if not step_rows or made is None:
                break
            if not self._workers.rank and time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info("%s: %d of at most %d rows read", self._split, num_read, self.rows)
            yield made
        total = int(self._workers.allreduce_sum(num_read)[0])
        if total != self.rows:
            raise _miscounted(self._dataset, self._split, total)

    def _examples(self, number: int) -> Iterator[Example]:
        shard = (self._workers.rank, self._workers.size)
        seed = self._seed + number if self._shuffle_rows else None
        rows = _read(self._dataset, self._split, COLUMNS, shard, seed)
        if not self._shuffle_rows:
            return rows
        generator = np.random.default_rng([self._seed, number, self._workers.rank])
        return shuffled(rows, self._shuffle_rows, generator)


def read_all(dataset: Dataset, split: str, columns: Sequence[str] = ALL_COLUMNS) -> list[Example]:
    """Every row of a split, ordered by ``example_id``; for one process.

    ``columns``: ``ALL_COLUMNS``, or ``WIDE_COLUMNS`` where histories would only fill the memory.

    Raises:
        DataError: as ``check``, or rows that differ from the manifest or its vocabulary.
    """
    check(dataset, split, columns=columns)
    rows = sorted(_read(dataset, split, columns, shard=(0, 1), seed=None), key=lambda row: row.example_id)
    if len(rows) != dataset.rows(split):
        raise _miscounted(dataset, split, len(rows))
    return rows


def _miscounted(dataset: Dataset, split: str, found: int) -> DataError:
    return DataError(
        f"split {split} of {TABLE} version {dataset.table_version}: expected {dataset.rows(split)} rows, "
        f"read {found}; the files do not match the manifest, run build_examples again"
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
    dataset: Dataset, split: str, columns: Sequence[str], shard: tuple[int, int], seed: int | None
) -> Iterator[Example]:
    """Rows of one shard (rank, ranks) by Petastorm; row groups in random order when a seed is given."""
    import pyarrow as pa

    urls = [_petastorm_url(uri) for uri in dataset.files[split]]
    rank, size = shard
    with warnings.catch_warnings():
        # Petastorm 0.12 stands on pyarrow's legacy dataset, deprecated there; the pin is deliberate.
        warnings.filterwarnings("ignore", category=FutureWarning, module="petastorm|pyarrow|couponflow")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="petastorm")
        # It notes that "target" no longer matches "target_id", which is what we want.
        warnings.filterwarnings("ignore", message="schema_fields behavior has changed", module="petastorm")
        from petastorm import make_batch_reader
        from petastorm.errors import NoDataAvailableError

        try:
            with make_batch_reader(
                urls if len(urls) > 1 else urls[0],
                schema_fields=list(columns),
                reader_pool_type="thread",
                workers_count=_WORKERS,
                shuffle_row_groups=seed is not None,
                seed=seed,
                num_epochs=1,
                cur_shard=rank,
                shard_count=size,
                filesystem=_petastorm_filesystem(urls[0]),
            ) as reader:
                if missing := ", ".join(sorted(set(columns) - set(reader.schema.fields))):
                    raise DataError(
                        f"Petastorm drops columns {missing} of {urls[0]}; run build_examples again"
                    )
                for group in reader:
                    yield from _rows_of(group, dataset, split, columns)
        except NoDataAvailableError as error:
            raise ConfigError(
                f"split {split}: fewer row groups than {size} ranks; lower training.num_ranks"
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{_damaged(dataset.files[split])} cannot be read ({error}); restore it or rebuild it"
            ) from error


def _rows_of(group: Any, dataset: Dataset, split: str, columns: Sequence[str]) -> Iterator[Example]:
    """The rows of one row group that belong to the split; ids of another vocabulary mean other things."""
    values: dict[str, NDArray[Any]] = {name: getattr(group, name) for name in columns}
    values["label"] = values["label"].astype(float)
    names = [name for name in columns if name in Example._fields]
    for place in np.flatnonzero(values["split"] == split):
        if (found := values["vocabulary_version"][place]) != dataset.vocabulary_version:
            raise DataError(
                f"{TABLE} version {dataset.table_version} mixes vocabularies {found} and "
                f"{dataset.vocabulary_version}; run build_examples for all its dates with one"
            )
        yield Example(**{name: values[name][place] for name in names})


def _damaged(files: Mapping[str, int]) -> str:
    """The first file whose data cannot be decoded; Petastorm does not name it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for uri in files:
        try:
            with _open(uri) as source:
                pq.read_table(source, columns=list(COLUMNS), use_threads=False)
        except (OSError, pa.ArrowException):
            return uri
    return "a file of " + next(iter(files))


def _local_path(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path)) if uri.startswith("file:") else Path(uri)


def _petastorm_url(uri: str) -> str:
    return uri if storage.is_remote(uri) else "file://" + str(_local_path(uri).absolute())


def _open(uri: str) -> Any:
    return _gcs().open(uri, "rb") if storage.is_remote(uri) else _local_path(uri).open("rb")


def _refuse_pickled_metadata(folder: str) -> None:
    import pyarrow.parquet as pq

    uri = f"{folder}/_common_metadata"
    there = _gcs().exists(uri) if storage.is_remote(uri) else _local_path(uri).is_file()
    if not there:
        return
    with _open(uri) as source:
        metadata = pq.read_metadata(source).metadata or {}
    if any(_UNISCHEMA in key for key in metadata):
        raise DataError(f"{uri} carries pickled Petastorm metadata, which is never read; delete that file")


def _gcs() -> Any:
    import gcsfs

    return gcsfs.GCSFileSystem()


def _petastorm_filesystem(url: str) -> Any:
    """None for local files; for ``gs://`` the legacy adapter that pyarrow's old dataset code accepts."""
    if not storage.is_remote(url):
        return None
    from pyarrow.filesystem import DaskFileSystem

    class LegacyGcs(DaskFileSystem):  # type: ignore[misc]  # pyarrow 14 has no types
        def isdir(self, path: str) -> Any:
            return self.fs.isdir(path)

        def isfile(self, path: str) -> Any:
            return self.fs.isfile(path)

        def walk(self, path: str) -> Iterator[tuple[str, set[str], set[str]]]:
            for root, folders, files in self.fs.walk(path):
                yield root, set(folders), set(files)

    return LegacyGcs(_gcs())
