"""The only door to Petastorm: the row groups of named files, dealt to shards, one after the other.

Row group number n, counted over the files in the given order, belongs to shard n mod shards. Files are opened
by name only: a folder would bring replaced rows back. Nothing here knows splits or manifests.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from numpy.typing import NDArray

from couponflow.errors import ConfigError, CouponflowError, DataError, InfraError
from couponflow.lake import storage

#: One reading thread: two deliver row groups in an order that differs from run to run.
_WORKERS = 1
_POOL = "thread"  # a process of a pool may die unnoticed, and the read would never end
_QUEUE_GROUPS = 8  # row groups read ahead
#: Petastorm unpickles this metadata key: a dataset that carries it is refused unread.
_UNISCHEMA = b"unischema"


class Shard:
    """One shard's row groups of a list of files, read once."""

    def __init__(
        self,
        uris: Sequence[str],
        columns: Sequence[str],
        rank: int = 0,
        size: int = 1,
        seed: int | None = None,
    ) -> None:
        """``seed`` puts the row groups in random order; which shard they belong to does not depend on it.

        Raises:
            ConfigError: the rank lies outside the shards, whose rows would be lost without a word.
        """
        if not 0 <= rank < size:
            raise ConfigError(
                f"shard {rank} of {size}: expected a number from 0 to {size - 1}; check the launch"
            )
        self._uris, self._columns = list(uris), list(columns)
        self._rank, self._size, self._seed = rank, size, seed
        #: Rows that Petastorm has delivered so far.
        self.num_rows = 0

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        """The columns of one row group after the other.

        Raises:
            DataError: a file is damaged (named), or a column is dropped.
            ConfigError: fewer row groups than shards.
            InfraError: the object store refused the read.
        """
        import pyarrow as pa

        urls = [_petastorm_url(uri) for uri in self._uris]
        with warnings.catch_warnings(), _store_answers(urls[0]):
            # Petastorm 0.12 stands on pyarrow's legacy dataset, deprecated there; the pin is deliberate.
            warnings.filterwarnings("ignore", category=FutureWarning, module="petastorm|pyarrow|couponflow")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="petastorm")
            # It notes that "target" no longer matches "target_id", which is what we want.
            warnings.filterwarnings(
                "ignore", message="schema_fields behavior has changed", module="petastorm"
            )
            from petastorm import make_batch_reader
            from petastorm.errors import NoDataAvailableError

            try:
                with make_batch_reader(
                    urls if len(urls) > 1 else urls[0],
                    schema_fields=self._columns,
                    reader_pool_type=_POOL,
                    workers_count=_WORKERS,
                    results_queue_size=_QUEUE_GROUPS,
                    shuffle_row_groups=self._seed is not None,
                    seed=self._seed,
                    num_epochs=1,
                    cur_shard=self._rank,
                    shard_count=self._size,
                    filesystem=_petastorm_filesystem(urls[0]),
                ) as reader:
                    if missing := ", ".join(sorted(set(self._columns) - set(reader.schema.fields))):
                        raise DataError(
                            f"Petastorm drops columns {missing} of {urls[0]}; run build_examples again"
                        )
                    for group in reader:
                        values = {name: getattr(group, name) for name in self._columns}
                        self.num_rows += len(values[self._columns[0]])
                        yield values
            except NoDataAvailableError as error:
                raise ConfigError(
                    f"{urls[0]} and {len(urls) - 1} others have fewer row groups than {self._size} ranks; "
                    "lower training.num_ranks"
                ) from error
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{self._damaged()} cannot be read ({error}); restore it or rebuild it"
                ) from error

    def _damaged(self) -> str:
        """The first file whose data cannot be decoded; Petastorm does not name it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for uri in self._uris:
            try:
                with _store_answers(uri), open_file(uri) as source:
                    pq.read_table(source, columns=self._columns, use_threads=False)
            except (OSError, pa.ArrowException):
                return uri
        return "a file of " + self._uris[0]


def read_footer(uri: str) -> Any:
    """The Parquet footer of a file.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it is no readable Parquet file, or carries metadata that Petastorm would unpickle.
        InfraError: the object store refused the read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _store_answers(uri), open_file(uri) as source:
            footer = pq.read_metadata(source)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{uri} is no readable Parquet file ({error}); restore or rebuild it") from error
    if any(_UNISCHEMA in key for key in footer.metadata or {}):
        raise DataError(f"{uri} carries pickled Petastorm metadata, which is never read; rewrite the file")
    return footer


def row_groups(footer: Any) -> tuple[int, ...]:
    """Rows of each row group, in the file's order."""
    return tuple(footer.row_group(number).num_rows for number in range(footer.num_row_groups))


def groups(uris: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, int, list[list[Any]]]]:
    """Every row group of named files with its number and its columns; without Petastorm, for finding rows."""
    import pyarrow.parquet as pq

    for uri in uris:
        with open_file(uri) as source:
            file = pq.ParquetFile(source)
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=list(columns), use_threads=False)
                yield uri, number, [table[name].to_pylist() for name in columns]


def refuse_pickled_metadata(folder: str) -> None:
    """Refuse a folder whose common metadata Petastorm would unpickle.

    Raises:
        DataError: naming the file.
    """
    import pyarrow.parquet as pq

    uri = f"{folder}/_common_metadata"
    there = _gcs().exists(uri) if storage.is_remote(uri) else _local_path(uri).is_file()
    if not there:
        return
    with open_file(uri) as source:
        metadata = pq.read_metadata(source).metadata or {}
    if any(_UNISCHEMA in key for key in metadata):
        raise DataError(f"{uri} carries pickled Petastorm metadata, which is never read; delete that file")


def open_file(uri: str) -> Any:
    """A file object of a local path, a ``file://`` URI or a ``gs://`` object."""
    return _gcs().open(uri, "rb") if storage.is_remote(uri) else _local_path(uri).open("rb")


@contextmanager
def _store_answers(uri: str) -> Iterator[None]:
    """What the object store answered gcsfs, which has words and classes of its own, as our error."""
    try:
        yield
    except CouponflowError:
        raise
    except Exception as error:
        if storage.is_remote(uri) and (ours := _store_error(error, uri)):
            raise ours from error
        raise


def _store_error(error: Exception, uri: str) -> InfraError | None:
    """None where the file itself is to blame."""
    code, family = getattr(error, "code", None), type(error).__module__.partition(".")[0]
    if str(error).startswith("Forbidden:") or str(code) in ("401", "403"):
        return storage.denied(uri, uri.removeprefix("gs://").partition("/")[0])
    if family in ("gcsfs", "aiohttp", "requests", "google") or isinstance(error, TimeoutError):
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return InfraError(f"{uri}: the object store failed ({reason}); check the network, then try again")
    return None


def _local_path(uri: str) -> Path:
    return Path(unquote(urlparse(uri).path)) if uri.startswith("file:") else Path(uri)


def _petastorm_url(uri: str) -> str:
    return uri if storage.is_remote(uri) else "file://" + str(_local_path(uri).absolute())


def _gcs() -> Any:
    from gcsfs.core import GCSFileSystem  # the plain one: the package's own asks every bucket for its type

    # The library reads the switch itself but would still look for credentials.
    return GCSFileSystem(token="anon" if storage.emulator() else None)


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
