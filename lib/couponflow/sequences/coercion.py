"""Delivered values in their declared types: single values, and whole columns of a Parquet file.

A value of another type is an error of its row, a column of another type an error of its file. Text above
``MAX_TEXT`` characters and bytes that are no UTF-8 are no texts. No Spark here.
"""

import json
import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from couponflow.lake import declarations, schemas

MAX_TEXT = 10_000  # characters; a longer text is a broken record, not a name
_PER_SECOND = {"s": 1, "ms": 1_000}
#: Times delivered as numbers are cut to these years: far outside 2000..2098, so a wrong unit becomes
#: ``clock_skew`` instead of an overflow in whatever converts them later.
_FIRST_SECOND, _LAST_SECOND = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (1900, 2200))

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


def arrow_type(column: declarations.Column) -> pa.DataType:
    """Arrow type of a declared column."""
    return _ARROW_TYPES[column.type]


def arrow_schema(columns: tuple[declarations.Column, ...]) -> pa.Schema:
    """Arrow types of declared columns."""
    return pa.schema([(column.name, arrow_type(column)) for column in columns])


def coerce(value: Any, kind: pa.DataType, is_text: bool = False, time_unit: str = "iso") -> Any:
    """One delivered value in its declared type; ``is_text`` for a CSV cell.

    Raises:
        ValueError, TypeError, OverflowError: it has another type.
    """
    if value is None:
        return None
    if pa.types.is_timestamp(kind):
        return _moment(value, is_text, time_unit)
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
        return [coerce(item, kind.value_type) for item in value]
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if pa.types.is_map(kind):
        return [(name, coerce(item, kind.item_type)) for name, item in sorted(value.items())]
    return {f.name: coerce(value.get(f.name), f.type) for f in kind}


def _moment(value: Any, is_text: bool, time_unit: str) -> Any:
    if isinstance(value, datetime):  # a Parquet value that was cast one by one
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    if time_unit == "iso":
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    number = json.loads(value) if is_text else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError("not a number")
    return int(_micros(np.array([float(number)]), time_unit)[0])


def _micros(numbers: Any, time_unit: str) -> Any:
    """Microseconds since 1970 of finite numbers, cut to the years that a date can hold everywhere."""
    per_second = _PER_SECOND[time_unit]
    cut = np.clip(numbers, _FIRST_SECOND * per_second, _LAST_SECOND * per_second)
    return np.rint(cut * (1_000_000 // per_second)).astype(np.int64)


def moments(numbers: pa.Array, time_unit: str) -> pa.Array:
    """Times of a column delivered as numbers; what is null or not finite is null."""
    values = numbers.cast(pa.float64()).to_numpy(zero_copy_only=False)
    known = np.isfinite(values)
    micros = _micros(np.where(known, values, 0.0), time_unit)
    return pa.array(micros, pa.int64(), mask=~known).cast(pa.timestamp("us", "UTC"))


# --- whole columns -----------------------------------------------------------------------------------


def is_retyped_column(found: pa.DataType, kind: pa.DataType, time_unit: str = "iso") -> bool:
    """Whether a Parquet column of type ``found`` is drift where ``kind`` is declared."""
    found = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_null(found):
        return False
    return not any(test(found) for test in _accepted(kind, time_unit))


def _is_text(found: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(found) for test in tests)


def _is_number(found: pa.DataType) -> bool:
    return any(test(found) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal))


def _accepted(kind: pa.DataType, time_unit: str) -> tuple[Callable[[pa.DataType], bool], ...]:
    if pa.types.is_string(kind):
        return (_is_text,)
    if pa.types.is_timestamp(kind):
        return (pa.types.is_timestamp, _is_text if time_unit == "iso" else _is_number)
    if pa.types.is_date(kind):
        return (pa.types.is_date, _is_text)
    if pa.types.is_boolean(kind):
        return (pa.types.is_boolean,)
    return (pa.types.is_nested,) if pa.types.is_nested(kind) else (_is_number,)


def coerce_column(values: pa.ChunkedArray, kind: pa.DataType, time_unit: str) -> tuple[pa.Array, Any]:
    """One Parquet column in its declared type, and which rows hold a value of another type (now null).

    An unreadable time is null and not counted, as in ``records.parse_file``.
    """
    found = values.combine_chunks()
    if pa.types.is_dictionary(found.type):
        found = found.cast(found.type.value_type)
    if pa.types.is_timestamp(kind) and _is_number(found.type):
        return moments(found, time_unit), np.zeros(len(found), dtype=bool)
    if _is_text(found.type):
        found, is_bad = _texts(found)
        if pa.types.is_string(kind):
            return found, is_bad
        return _one_by_one(found, kind)  # times as text
    try:
        options = pc.CastOptions(target_type=kind, allow_time_truncate=True)
        return found.cast(options=options), np.zeros(len(found), dtype=bool)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return _one_by_one(found, kind)


def _texts(found: pa.Array) -> tuple[pa.Array, Any]:
    """Texts, with those null that are no UTF-8 or too long."""
    raw = found.cast(pa.large_binary())
    try:
        texts = raw.cast(pa.string())
    except pa.ArrowInvalid:
        texts = pa.array([_decoded(value) for value in raw.to_pylist()], pa.string())
    is_long = pc.greater(pc.utf8_length(texts), MAX_TEXT)
    texts = pc.if_else(is_long, pa.scalar(None, pa.string()), texts)
    is_lost = pc.and_(pc.is_null(texts), pc.is_valid(found))
    return texts, is_lost.to_numpy(zero_copy_only=False)


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _one_by_one(found: pa.Array, kind: pa.DataType) -> tuple[pa.Array, Any]:
    values, is_bad = [], np.zeros(len(found), dtype=bool)
    for place, value in enumerate(found.to_pylist()):
        try:
            values.append(coerce(value, kind))
        except (ValueError, TypeError, OverflowError):
            values.append(None)
            is_bad[place] = not pa.types.is_temporal(kind)
    return pa.array(values, kind), is_bad
