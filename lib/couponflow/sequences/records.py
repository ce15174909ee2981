"""Delivered files as Arrow tables: JSON Lines, CSV, Parquet; positions, broken records, pseudonyms, drift.

No Spark here: the functions run inside Spark's Python workers and in unit tests without a JVM.
"""

import codecs
import csv
import hashlib
import hmac
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from couponflow.errors import DataError
from couponflow.lake import contracts, schemas, storage

KINDS = ("jsonl", "json", "csv", "parquet")
SAMPLE_BYTES = 65_536  # of each file's head, for the drift check
SAMPLE_RECORDS = 20
MAX_TEXT = 10_000  # characters; a longer text is a broken record, not a name

#: What a record carries besides the feed's own columns.
ORIGIN = (
    schemas.Column("ingest_date", "date", "business day of the delivery"),
    schemas.Column("source_file", "string", "file name inside the feed's day"),
    schemas.Column("row_number", "bigint", "position in that file, from 0"),
    schemas.Column("_corrupt", "boolean", "the record or one of its fields could not be read"),
)

_ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "double": pa.float64(),
    "bigint": pa.int64(),
    "int": pa.int32(),
    "boolean": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
    "date": pa.date32(),
    "map<string,string>": pa.map_(pa.string(), pa.string()),
    schemas.COUPON_TYPE: pa.list_(
        pa.struct(
            [
                ("coupon_id", pa.string()),
                ("category_id", pa.string()),
                ("item_ids", pa.list_(pa.string())),
            ]
        )
    ),
}


def arrow_schema(columns: tuple[schemas.Column, ...]) -> pa.Schema:
    """Arrow types of declared columns."""
    return pa.schema([(column.name, _ARROW_TYPES[column.type]) for column in columns])


@dataclass(frozen=True)
class RawFile:
    """One delivered file."""

    ingest_date: date
    uri: str
    name: str

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


def check_drift(feed: str, file: RawFile) -> set[str]:
    """Compare a sample of one file with the declared columns; returns the undeclared ones.

    Raises:
        DataError: no record can be read, no sampled record carries a declared column (unknown values are
            delivered as null), or every sampled value of a column has another type.
    """
    declared = contracts.FEEDS[feed].columns
    if file.kind == "parquet":
        table = _parquet_table(file, storage.read_bytes(file.uri))
        _cast(file, table, arrow_schema(declared))
        samples: list[dict[str, Any]] = [dict.fromkeys(table.schema.names)]
        complete = b""
    else:
        head = storage.read_head(file.uri, SAMPLE_BYTES)
        complete = head if len(head) < SAMPLE_BYTES else head[: head.rfind(b"\n") + 1]
        samples = []
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
        if column.name not in seen:
            raise DataError(
                f"feed {feed}, file {file.uri}: column {column.name}: expected {column.type}, found no such "
                "column; ask the sender for it, with null where a value is unknown"
            )
        values = [v for v in (sample.get(column.name) for sample in samples) if v is not None]
        if values and all(_is_retyped(value, _ARROW_TYPES[column.type], file.kind) for value in values):
            raise DataError(
                f"feed {feed}, file {file.uri}: column {column.name}: expected {column.type}, "
                f"found {_kind_of(values[0])}; "
                "ask the sender for the agreed type, or correct the feed's declaration"
            )
    return seen - {column.name for column in declared}


def _is_retyped(value: Any, kind: pa.DataType, file_kind: str) -> bool:
    if pa.types.is_temporal(kind) and isinstance(value, str):
        return False  # an unreadable time is one bad row, which quarantine names
    try:
        _coerce(value, kind, is_text=file_kind == "csv")
    except (ValueError, TypeError, OverflowError):
        return True
    return False


def _kind_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), type(value).__name__)


def parse_file(file: RawFile, content: bytes, feed: str, key: PseudonymKey | None = None) -> pa.Table:
    """All records of one file: the feed's declared columns, then ``ORIGIN``.

    A record that is no JSON object (or a CSV row with another number of cells than the header), or has a
    field of another type, is kept with that field null and ``_corrupt`` true; an unreadable time is null and
    not corrupt; times without an offset are UTC. A byte order mark is skipped. Of a repeated JSON key the
    last value counts.
    """
    body = arrow_schema(contracts.FEEDS[feed].columns)
    content = content if file.kind == "parquet" else content.removeprefix(codecs.BOM_UTF8)
    corrupt: list[bool] | None = None
    numbers: list[int] | None = None
    if file.kind == "parquet":
        table = _cast(file, _parquet_table(file, content), body)
    else:
        quick = _well_formed(content, body) if file.kind in ("jsonl", "json") else None
        if quick is None:
            table, numbers, corrupt = _record_by_record(file.kind, content, body)
        else:
            table = quick
    size = table.num_rows
    arrays = {name: table.column(name) for name in table.schema.names}
    if key is not None and "user_id" in arrays:
        arrays["user_id"] = _pseudonymise(table.column("user_id").combine_chunks(), key)
    arrays["ingest_date"] = pa.array([file.ingest_date] * size, pa.date32())
    arrays["source_file"] = pa.array([file.name] * size, pa.string())
    arrays["row_number"] = pa.array(range(size) if numbers is None else numbers, pa.int64())
    arrays["_corrupt"] = pa.array([False] * size if corrupt is None else corrupt, pa.bool_())
    schema = arrow_schema((*contracts.FEEDS[feed].columns, *ORIGIN))
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _well_formed(content: bytes, body: pa.Schema) -> pa.Table | None:
    """The fast path: a file in which every line is one object of the declared types, else None."""
    if any(pa.types.is_nested(f.type) or pa.types.is_date(f.type) for f in body):
        return None  # Arrow's JSON reader knows neither maps nor dates
    num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
    if not content or content.startswith(b"null") or b"\nnull" in content:
        return None
    try:
        table = pa_json.read_json(
            io.BytesIO(content),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=pa_json.ParseOptions(explicit_schema=body, unexpected_field_behavior="ignore"),
        )
        table.validate(full=True)  # bad UTF-8
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError):
        return None
    if table.num_rows != num_lines:
        return None  # blank lines, or two records in a line: positions would be wrong
    for name in body.names:
        if pa.types.is_string(body.field(name).type):
            longest = pc.max(pc.binary_length(table.column(name))).as_py()
            if longest is not None and longest > MAX_TEXT:
                return None
    return table


def _record_by_record(kind: str, content: bytes, body: pa.Schema) -> tuple[pa.Table, list[int], list[bool]]:
    """The patient path: a bad record is flagged, and the others of its file are kept."""
    values: dict[str, list[Any]] = {name: [] for name in body.names}
    numbers: list[int] = []
    corrupt: list[bool] = []
    for number, record in enumerate(_records(kind, content)):
        if record is _BLANK:
            continue
        is_corrupt = not isinstance(record, dict)
        for column in body:
            value = record.get(column.name) if isinstance(record, dict) else None
            try:
                value = _coerce(value, column.type, is_text=kind == "csv")
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


def _coerce(value: Any, kind: pa.DataType, is_text: bool = False) -> Any:
    """One delivered value in its declared type.

    Raises:
        ValueError, TypeError, OverflowError: it has another type.
    """
    if value is None:
        return None
    if pa.types.is_timestamp(kind):
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    if pa.types.is_date(kind):
        return date.fromisoformat(value)
    if pa.types.is_string(kind):
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise ValueError("not a text")
        value.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
        return value
    if is_text:
        value = json.loads(value)
    if pa.types.is_nested(kind):
        return _coerce_nested(value, kind)
    if pa.types.is_boolean(kind) != isinstance(value, bool):
        raise ValueError("not of the declared type")
    if pa.types.is_boolean(kind):
        return value
    if not isinstance(value, int | float):
        raise ValueError("not a number")
    if pa.types.is_floating(kind):
        return float(value)
    if not math.isfinite(value) or int(value) != value or not -(2**63) <= value < 2**63:
        raise ValueError("not a whole number")
    return int(value)


def _coerce_nested(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        if not isinstance(value, list):
            raise ValueError("not a list")
        return [_coerce(item, kind.value_type) for item in value]
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if pa.types.is_map(kind):
        return [(name, _coerce(item, kind.item_type)) for name, item in sorted(value.items())]
    return {f.name: _coerce(value.get(f.name), f.type) for f in kind}


def _parquet_table(file: RawFile, content: bytes) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        raise DataError(f"{file.uri}: not readable as Parquet ({cause}); deliver the file again") from error


def _cast(file: RawFile, table: pa.Table, body: pa.Schema) -> pa.Table:
    """The declared columns in their declared types; an absent one is null."""
    columns = []
    for wanted in body:
        if wanted.name not in table.schema.names:
            columns.append(pa.nulls(table.num_rows, wanted.type))
            continue
        found = table.column(wanted.name)
        try:
            columns.append(found.cast(wanted.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"{file.uri}: column {wanted.name}: expected {wanted.type}, found {found.type}; "
                "ask the sender for the agreed type, or correct the feed's declaration"
            ) from error
    return pa.table(columns, schema=body)
