"""Erasure in the raw deliveries: the records of a person become blank, every other byte stays.

Blank, not gone: (``source_file``, ``row_number``) of the other records, by which quarantine names them and
ties are decided, must not shift. A blank line, and in Parquet a row without any value, is no record.
What identifies the person inside other people's records, or in broken ones, is replaced by ``erased``.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from couponflow.errors import ConfigError, DataError
from couponflow.lake import contracts, python_tasks, storage
from couponflow.lake.erased import Erased
from couponflow.lake.needles import Needles
from couponflow.mappings import FeedsConfig
from couponflow.sequences import records
from couponflow.sequences.records import VISITOR, PseudonymKey, RawFile

_TASKS_PER_CORE = 4
_NUM_WRITERS = 8
_SCAN = "number bigint, positions array<bigint>, has_text boolean, visitors array<string>"


@dataclass(frozen=True)
class Reader:
    """How deliveries are read: as the jobs read them."""

    key: PseudonymKey | None
    feeds: FeedsConfig = field(default_factory=FeedsConfig)

    def parse(self, feed: str, file: RawFile, content: bytes) -> pa.Table:
        """All records of one file; erased people's too."""
        return records.parse_file(file, content, feed, self.key, self.feeds.of(feed))


@dataclass(frozen=True)
class Affected:
    """One raw file that holds something of a person."""

    feed: str
    file: RawFile
    positions: tuple[int, ...]
    has_text: bool


@dataclass(frozen=True)
class Scan:
    """What a pass over all raw files found: files to rewrite, and visitors seen beside the person."""

    affected: tuple[Affected, ...]
    visitors: frozenset[str]

    @property
    def rows(self) -> dict[str, int]:
        """Records per feed."""
        counts: dict[str, int] = {}
        for found in self.affected:
            counts[f"raw {found.feed}"] = counts.get(f"raw {found.feed}", 0) + len(found.positions)
        return counts

    @property
    def refused_positions(self) -> list[tuple[str, date, str, int]]:
        """Every record as quarantine would name it."""
        return [(a.feed, a.file.ingest_date, a.file.name, p) for a in self.affected for p in a.positions]


def raw_files(root_uri: str) -> list[tuple[str, RawFile]]:
    """Every delivered file of the declared feeds, with its feed, oldest day first."""
    found = []
    for feed in contracts.FEEDS:
        folder = storage.join(root_uri, "raw", feed)
        for name in storage.list_names(folder):
            if name.startswith("ingest_date="):
                day = date.fromisoformat(name.partition("=")[2])
                place = storage.join(folder, name)
                files = [file for file in storage.list_names(place) if not file.startswith((".", "_"))]
                found += [(feed, RawFile(day, storage.join(place, file), file)) for file in files]
    return found


def check_names(files: Iterable[tuple[str, RawFile]], needles: Needles) -> None:
    """Refuse to go on where a file is named after the person: its name stands in quarantine and in reports.

    Raises:
        DataError: naming feed and day, not the file.
    """
    for feed, file in files:
        if needles.in_bytes(file.name.encode()):
            raise DataError(
                f"feed {feed}, day {file.ingest_date}: a raw file is named after this person; rename it, "
                f"clean {file.ingest_date} again, then erase again"
            )


def scan(
    spark: SparkSession,
    files: list[tuple[str, RawFile]],
    erased: Erased,
    person: str,
    needles: Needles,
    reader: Reader,
) -> Scan:
    """Find the records of erased people, and texts that name the one asked for, in all raw files.

    ``person`` is the user's pseudonym. Cost: every raw file is read and parsed once, in parallel.
    """
    if not files:
        return Scan((), frozenset())
    tasks = min(len(files), _TASKS_PER_CORE * spark.sparkContext.defaultParallelism)
    look = _scanner(files, erased, person, needles, reader)
    found = python_tasks.map_in_arrow(spark.range(0, len(files), 1, tasks), look, _SCAN)
    rows = found.orderBy("number").collect()
    affected = [
        Affected(feed, file, tuple(row["positions"]), bool(row["has_text"]))
        for row in rows
        for feed, file in [files[row["number"]]]
        if row["positions"] or row["has_text"]
    ]
    return Scan(tuple(affected), frozenset(visitor for row in rows for visitor in row["visitors"]))


def _scanner(
    files: list[tuple[str, RawFile]],
    erased: Erased,
    person: str,
    needles: Needles,
    reader: Reader,
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def look(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                feed, file = files[number]
                content = storage.read_bytes(file.uri)
                positions: list[int] = []
                visitors: list[str] = []
                if "user_id" in _names(feed):
                    table = reader.parse(feed, file, content)
                    positions, visitors = _hits(table, erased, person)
                has_text = _holds_text(file, content, needles)
                if positions or visitors or has_text:
                    row = [[number], [positions], [has_text], [visitors]]
                    kinds = (pa.int64(), pa.list_(pa.int64()), pa.bool_(), pa.list_(pa.string()))
                    arrays = [pa.array(v, k) for v, k in zip(row, kinds, strict=True)]
                    names = ["number", "positions", "has_text", "visitors"]
                    yield pa.RecordBatch.from_arrays(arrays, names=names)

    return look


def _names(feed: str) -> set[str]:
    return {column.name for column in contracts.FEEDS[feed].columns}


def _hits(table: pa.Table, erased: Erased, person: str) -> tuple[list[int], list[str]]:
    """Positions of erased people's records, and the visitors of the person's own."""
    user = table.column("user_id").combine_chunks()
    if "visitor_id" not in table.column_names:
        return pc.filter(table.column("row_number"), _is_in(user, erased)).to_pylist(), []
    visitor = table.column("visitor_id").combine_chunks()
    is_anonymous = pc.or_kleene(pc.is_null(user), pc.equal(user, ""))
    pseudo = pc.binary_join_element_wise(VISITOR, visitor, "", null_handling="emit_null")
    gone = _is_in(pc.if_else(is_anonymous, pseudo, user), erased)
    own = pc.filter(visitor, pc.fill_null(pc.equal(user, person), False)).drop_null().unique()
    return pc.filter(table.column("row_number"), gone).to_pylist(), [name for name in own.to_pylist() if name]


def _is_in(ids: pa.Array, erased: Erased) -> pa.Array:
    """Whether each id was erased; each distinct one is hashed once."""
    coded = ids.dictionary_encode()
    gone = [name is not None and erased.contains(name) for name in coded.dictionary.to_pylist()]
    return pc.fill_null(pc.take(pa.array(gone, pa.bool_()), coded.indices), False)


def _holds_text(file: RawFile, content: bytes, needles: Needles) -> bool:
    if file.kind != "parquet":
        return needles.in_bytes(content)
    return any(_texts_with(column, needles) for column in _read_parquet(file, content).columns)


def rewrite(found: Affected, erased: Erased, person: str, needles: Needles, reader: Reader) -> None:
    """Write one raw file without the person's records; everything else in it must read as before.

    Raises:
        DataError: another record would change; nothing is written.
        ConflictError: the file changed meanwhile.
    """
    content = storage.read_bytes(found.file.uri)
    cleaned = blanked(found.file, content, found.positions, needles)
    if "user_id" in _names(found.feed):
        before = reader.parse(found.feed, found.file, content)
        after = reader.parse(found.feed, found.file, cleaned)
        gone = pc.is_in(before.column("row_number"), pa.array(found.positions, pa.int64()))
        kept = before.filter(pc.invert(gone)).select(["row_number", "user_id"])
        if not kept.equals(after.select(["row_number", "user_id"])) or _hits(after, erased, person)[0]:
            raise DataError(
                f"feed {found.feed}, {found.file.uri}: its other records would not read as before; "
                "nothing is written, repair the file by hand"
            )
    if cleaned != content:
        storage.replace(found.file.uri, cleaned, content)


def rewrite_all(
    affected: Iterable[Affected], erased: Erased, person: str, needles: Needles, reader: Reader
) -> None:
    """``rewrite`` each file, some at once."""
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        for _ in pool.map(lambda found: rewrite(found, erased, person, needles, reader), affected):
            pass


def digests(affected: Iterable[Affected]) -> list[str]:
    """SHA-256 of the files as they are now, some read at once."""
    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        return list(pool.map(lambda a: storage.sha256(storage.read_bytes(a.file.uri)), affected))


def blanked(file: RawFile, content: bytes, positions: Iterable[int], needles: Needles) -> bytes:
    """The file with the records at these positions blank, and the ids gone from what is left of it."""
    if file.kind == "parquet":
        return _blanked_parquet(file, content, set(positions), needles)
    if file.kind == "csv":
        return needles.redacted(_blanked_csv(content, positions))
    if file.kind not in contracts.KINDS:
        raise ConfigError(f"{file.uri}: unknown kind of file; remove it from the delivery")
    lines = content.split(b"\n")
    for position in positions:
        lines[position] = b""
    return needles.redacted(b"\n".join(lines))


def _blanked_csv(content: bytes, positions: Iterable[int]) -> bytes:
    """A record over several lines becomes one blank line: a position is a record."""
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    text = content.removeprefix(mark).decode("utf-8", errors="surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    spans = _csv_spans(lines)
    for position in positions:
        first, end = spans[position]
        lines[first:end] = ["\n", *[""] * (end - first - 1)]
    return mark + "".join(lines).encode("utf-8", errors="surrogateescape")


def _csv_spans(lines: list[str]) -> list[tuple[int, int]]:
    """Lines ``[first, end)`` of each position, counted as ``records`` counts them."""
    reader = csv.reader(lines, strict=True)
    spans: list[tuple[int, int]] = []
    has_header = False
    while True:
        before = reader.line_num
        try:
            next(reader)
        except StopIteration:
            return spans
        except csv.Error:
            spans += [(line, line + 1) for line in range(before, max(before + 1, reader.line_num))]
            continue
        if has_header:
            spans.append((before, reader.line_num))
        has_header = True


def _blanked_parquet(file: RawFile, content: bytes, positions: set[int], needles: Needles) -> bytes:
    table = _read_parquet(file, content)
    kept = pa.array([None if row in positions else row for row in range(table.num_rows)], pa.int64())
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = pc.take(table.column(name), kept)  # a null index gives null, in any type
        for text in _texts_with(column, needles):
            clean = needles.redacted(text.encode()).decode()
            column = pc.if_else(pc.equal(column, text), pa.scalar(clean, column.type), column)
        columns[name] = column
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def _texts_with(column: Any, needles: Needles) -> list[str]:
    """Distinct texts of a column that hold an id; nested ones are not looked into."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return []
    values = [value for value in column.unique().to_pylist() if value is not None]
    return [value for value in values if needles.in_bytes(value.encode())]


def _read_parquet(file: RawFile, content: bytes) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.uri}: not readable as Parquet, so nobody can be erased from it; "
            "remove the file from the delivery, then erase again"
        ) from error
