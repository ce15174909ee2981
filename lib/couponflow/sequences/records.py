"""Delivered files as Arrow tables: JSON Lines, CSV, Parquet; positions, broken records, pseudonyms, drift.

A sender's own column names and unit of time come from a ``FeedMapping``; what leaves this module has the
declared names and types. Erased people end here: of their records only the positions are left.
No Spark here: the functions run inside Spark's Python workers and in unit tests without a JVM.
"""

import codecs
import csv
import hashlib
import hmac
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from couponflow.errors import DataError
from couponflow.lake import contracts, declarations, storage
from couponflow.lake.erased import Erased
from couponflow.mappings import FeedMapping
from couponflow.sequences.coercion import (
    MAX_TEXT,
    arrow_schema,
    arrow_type,
    coerce,
    coerce_column,
    is_retyped_column,
    moments,
)

SAMPLE_BYTES = 65_536  # of each file's head, for the drift check
SAMPLE_RECORDS = 20
#: Columns that name a person; they become pseudonyms, and erased ones are dropped.
PERSONAL = ("user_id", "visitor_id")
#: Stored before the id of a visitor whom no user is known for.
VISITOR = "visitor:"
AS_DECLARED = FeedMapping()
NOBODY = Erased("")

#: What a record carries besides the feed's own columns.
ORIGIN = (
    declarations.Column("ingest_date", "date", "business day of the delivery"),
    declarations.Column("source_file", "string", "file name inside the feed's day"),
    declarations.Column("row_number", "bigint", "position in that file, from 0"),
    declarations.Column("_corrupt", "boolean", "the record or one of its fields could not be read"),
    declarations.Column("_erased", "boolean", "of an erased person: every other field is null"),
    declarations.Column("_spread", "int", "tasks over which the delivery of its day is spread"),
)


@dataclass(frozen=True)
class RawFile:
    """One delivered file; ``spread`` = tasks over which the delivery of its day is spread."""

    ingest_date: date
    uri: str
    name: str
    spread: int = 1

    @property
    def kind(self) -> str:
        """File extension."""
        return self.name.rpartition(".")[2].lower()


@dataclass(frozen=True)
class PseudonymKey:
    """Key of the user pseudonyms; never shown."""

    version: str
    secret: bytes = field(repr=False)


def pseudonym(user_id: str, key: PseudonymKey | None) -> str:
    """HMAC-SHA256 of one user id in hex; the id itself without a key."""
    return user_id if key is None else hmac.new(key.secret, user_id.encode(), hashlib.sha256).hexdigest()


def _pseudonymise(values: pa.Array, key: PseudonymKey) -> pa.Array:
    """Hash each distinct id once; null and empty ids stay, so that validation still finds them."""
    coded = values.dictionary_encode()
    names = [name and pseudonym(name, key) for name in coded.dictionary.to_pylist()]
    return pc.take(pa.array(names, pa.string()), coded.indices)


def check_drift(feed: str, file: RawFile, mapping: FeedMapping = AS_DECLARED) -> set[str]:
    """Compare a sample of one file with the declared columns; returns the undeclared ones.

    Raises:
        DataError: no record can be read, no sampled record carries a declared column (unknown values are
            delivered as null), or every sampled value of a column has another type.
    """
    declared = contracts.FEEDS[feed].columns
    samples: list[dict[str, Any]] = []
    types: dict[str, pa.DataType] = {}
    complete = b""
    if file.kind == "parquet":
        found = _parquet_table(file, storage.read_bytes(file.uri)).schema
        types = dict(zip(found.names, found.types, strict=True))
        samples = [dict.fromkeys(types)]
    else:
        head = storage.read_head(file.uri, SAMPLE_BYTES)
        complete = head if len(head) < SAMPLE_BYTES else head[: head.rfind(b"\n") + 1]
        for record in _records(file.kind, complete.removeprefix(codecs.BOM_UTF8)):
            if isinstance(record, dict):
                samples.append(record)
            if len(samples) == SAMPLE_RECORDS:
                break
    if not samples and complete.strip():
        raise DataError(
            f"feed {feed}, file {file.uri}: expected {file.kind} records, found none that can be read; "
            "ask the sender for the file again"
        )
    if not samples:
        return set()
    seen = set().union(*samples)
    for column in declared:
        name = mapping.delivered(column.name)
        shown = name if name == column.name else f"{name} (our {column.name})"
        if name not in seen:
            raise DataError(
                f"feed {feed}, file {file.uri}: column {shown}: expected {column.type}, found no such "
                "column; ask the sender for it, with null where a value is unknown"
            )
        values = [v for v in (sample.get(name) for sample in samples) if v is not None]
        if name in types:
            other = (
                types[name] if is_retyped_column(types[name], arrow_type(column), mapping.time_unit) else ""
            )
        else:
            is_other = [_is_retyped(v, arrow_type(column), file.kind, mapping.time_unit) for v in values]
            other = _kind_of(values[0]) if values and all(is_other) else ""
        if other:
            unit = f" as {mapping.time_unit}" if column.type == "timestamp" else ""
            raise DataError(
                f"feed {feed}, file {file.uri}: column {shown}: expected {column.type}{unit}, found {other}; "
                "ask the sender for the agreed type, or correct the feed's declaration"
            )
    return seen - {mapping.delivered(column.name) for column in declared}


def _is_retyped(value: Any, kind: pa.DataType, file_kind: str, time_unit: str) -> bool:
    if pa.types.is_temporal(kind) and isinstance(value, str) and time_unit == "iso":
        return False  # an unreadable time is one bad row, which quarantine names
    try:
        coerce(value, kind, file_kind == "csv", time_unit)
    except (ValueError, TypeError, OverflowError):
        # A text too long, or not UTF-8, is a bad row and no other type.
        return not (pa.types.is_string(kind) and isinstance(value, str))
    return False


def _kind_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), type(value).__name__)


def parse_file(
    file: RawFile,
    content: bytes,
    feed: str,
    key: PseudonymKey | None = None,
    mapping: FeedMapping = AS_DECLARED,
    erased: Erased = NOBODY,
) -> pa.Table:
    """All records of one file: the feed's declared columns, then ``ORIGIN``.

    A record that is no JSON object (or a CSV row with another number of cells than the header), or has a
    field of another type, is kept with that field null and ``_corrupt`` true; an unreadable time is null and
    not corrupt; times without an offset are UTC. A byte order mark is skipped. Of a repeated JSON key the
    last value counts. A blank line, and a Parquet row without any value, is no record and keeps its position.
    A record of an erased user, or of an erased visitor while nobody is logged in, keeps its position alone.
    """
    declared = contracts.FEEDS[feed].columns
    content = content if file.kind == "parquet" else content.removeprefix(codecs.BOM_UTF8)
    numbers: list[int] | None = None
    if file.kind == "parquet":
        delivered, numbers = _without_blank_rows(_parquet_table(file, content))
        table, corrupt = _from_parquet(delivered, declared, mapping)
    else:
        quick = _well_formed(content, declared, mapping) if file.kind in ("jsonl", "json") else None
        if quick is None:
            table, numbers, corrupt = _record_by_record(file.kind, content, declared, mapping)
        else:
            table, corrupt = quick, None
    size = table.num_rows
    arrays = {name: table.column(name) for name in table.schema.names}
    if key is not None:
        for name in PERSONAL:
            if name in arrays:
                arrays[name] = _pseudonymise(table.column(name).combine_chunks(), key)
    is_erased = _erased_rows(arrays, erased)
    if is_erased is not None:
        kept = pc.if_else(is_erased, pa.scalar(None, pa.int64()), pa.array(range(size), pa.int64()))
        arrays = {name: pc.take(column, kept) for name, column in arrays.items()}
    arrays["ingest_date"] = pa.array([file.ingest_date] * size, pa.date32())
    arrays["source_file"] = pa.array([file.name] * size, pa.string())
    arrays["row_number"] = pa.array(range(size) if numbers is None else numbers, pa.int64())
    arrays["_corrupt"] = pa.array([False] * size if corrupt is None else corrupt, pa.bool_())
    arrays["_erased"] = pa.array([False] * size, pa.bool_()) if is_erased is None else is_erased
    arrays["_spread"] = pa.array([file.spread] * size, pa.int32())
    schema = arrow_schema((*declared, *ORIGIN))
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _erased_rows(arrays: dict[str, Any], erased: Erased) -> pa.Array | None:
    """Which rows name an erased person; None where there is none. Each distinct id is looked up once."""
    if not erased.hashes:
        return None
    if "user_id" not in arrays:
        return None
    rows = _listed(arrays["user_id"], erased)
    if "visitor_id" in arrays:
        # A member on the device of somebody who was erased is another person.
        user, visitor = _flat(arrays["user_id"]), _listed(arrays["visitor_id"], erased, VISITOR)
        is_anonymous = pc.or_kleene(pc.is_null(user), pc.equal(user, ""))
        rows = pc.or_(rows, pc.and_(visitor, is_anonymous))
        rows = pc.or_(rows, _listed(arrays["visitor_id"], erased))
    return rows if pc.any(rows).as_py() else None


def _flat(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _listed(ids: Any, erased: Erased, prefix: str = "") -> pa.Array:
    coded = _flat(ids).dictionary_encode()
    known = [value is not None and erased.contains(prefix + value) for value in coded.dictionary.to_pylist()]
    return pc.fill_null(pc.take(pa.array(known, pa.bool_()), coded.indices), False)


def _wire_type(kind: pa.DataType, time_unit: str) -> pa.DataType:
    return pa.float64() if pa.types.is_timestamp(kind) and time_unit != "iso" else kind


def _well_formed(
    content: bytes, declared: tuple[declarations.Column, ...], mapping: FeedMapping
) -> pa.Table | None:
    """The fast path: a file in which every line is one object of the declared types, else None."""
    body = arrow_schema(declared)
    if any(pa.types.is_nested(f.type) or pa.types.is_date(f.type) for f in body):
        return None  # Arrow's JSON reader knows neither maps nor dates
    num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
    if not content or content.startswith(b"null") or b"\nnull" in content:
        return None
    wire = pa.schema([(mapping.delivered(f.name), _wire_type(f.type, mapping.time_unit)) for f in body])
    try:
        table = pa_json.read_json(
            io.BytesIO(content),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=wire, unexpected_field_behavior="ignore"),
        )
        table.validate(full=True)  # bad UTF-8
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError):
        return None
    if table.num_rows != num_lines:
        return None  # blank lines, or two records in a line: positions would be wrong
    columns = []
    for wanted, delivered in zip(body, wire, strict=True):
        column = table.column(delivered.name).combine_chunks()
        if pa.types.is_string(wanted.type):
            longest = pc.max(pc.binary_length(column)).as_py()
            if longest is not None and longest > MAX_TEXT:
                return None
        columns.append(column if delivered.type == wanted.type else moments(column, mapping.time_unit))
    return pa.table(columns, schema=body)


def _record_by_record(
    kind: str, content: bytes, declared: tuple[declarations.Column, ...], mapping: FeedMapping
) -> tuple[pa.Table, list[int], list[bool]]:
    """The patient path: a bad record is flagged, and the others of its file are kept."""
    body = arrow_schema(declared)
    values: dict[str, list[Any]] = {name: [] for name in body.names}
    numbers: list[int] = []
    corrupt: list[bool] = []
    for number, record in enumerate(_records(kind, content)):
        if record is _BLANK:
            continue
        is_corrupt = not isinstance(record, dict)
        for column in body:
            value = record.get(mapping.delivered(column.name)) if isinstance(record, dict) else None
            try:
                value = coerce(value, column.type, kind == "csv", mapping.time_unit)
            except (ValueError, TypeError, OverflowError):
                value = None
                is_corrupt |= not pa.types.is_temporal(column.type)
            values[column.name].append(value)
        numbers.append(number)
        corrupt.append(is_corrupt)
    arrays = [pa.array(values[f.name], f.type) for f in body]
    return pa.table(arrays, schema=body), numbers, corrupt


_BLANK = object()


def _records(kind: str, content: bytes) -> Iterator[Any]:
    """Each line's record; ``_BLANK`` for an empty line, None for what is no record."""
    if kind == "csv":
        yield from _csv_records(content)
        return
    for line in content.split(b"\n"):
        if not line.strip():
            yield _BLANK
            continue
        try:
            yield json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            yield None


def _csv_records(content: bytes) -> Iterator[Any]:
    """Each row by its header; None for what is no row: once per line that an open quote swallows."""
    # Escaped bytes that are no UTF-8 fail as texts, so that two ids never become one by replacement.
    lines = io.StringIO(content.decode("utf-8", errors="surrogateescape"), newline="")
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        before = reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield from [None] * max(1, reader.line_num - before)
            continue
        if header is None:
            header = row
        elif row:
            is_whole = len(row) == len(header) == len(set(header))
            yield {name: cell or None for name, cell in zip(header, row, strict=True)} if is_whole else None
        else:
            yield _BLANK


def _parquet_table(file: RawFile, content: bytes) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(content))
        if len(set(table.schema.names)) < len(table.schema.names):
            raise pa.ArrowInvalid("two columns have one name")
        return table
    except (pa.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        raise DataError(f"{file.uri}: not readable as Parquet ({cause}); deliver the file again") from error


def _without_blank_rows(table: pa.Table) -> tuple[pa.Table, list[int] | None]:
    """The rows with a value in any column, and their positions; None if that is all of them."""
    if not table.num_columns or any(column.null_count == 0 for column in table.columns):
        return table, None
    is_blank = reduce(pc.and_, [pc.is_null(column) for column in table.columns])
    is_record = pc.invert(is_blank)
    return table.filter(is_record), pc.indices_nonzero(is_record).to_pylist()


def _from_parquet(
    table: pa.Table, declared: tuple[declarations.Column, ...], mapping: FeedMapping
) -> tuple[pa.Table, Any]:
    """The declared columns in their declared types (an absent one is null), and which rows are corrupt."""
    columns, corrupt = [], None
    for column in declared:
        kind, name = arrow_type(column), mapping.delivered(column.name)
        if name not in table.schema.names:
            columns.append(pa.nulls(table.num_rows, kind))
            continue
        values, is_bad = coerce_column(table.column(name), kind, mapping.time_unit)
        columns.append(values)
        corrupt = is_bad if corrupt is None else corrupt | is_bad
    return pa.table(columns, schema=arrow_schema(declared)), corrupt
