"""Rows of the synthetic shop as plain columns: one array per column, numbers only.

A table of a shard has a few thousand rows, where a data frame would cost more than the arithmetic.
"""

from collections.abc import Sequence

import numpy as np

from couponflow.lake.layouts import EVENT_TYPES
from couponflow.sources.landing import Array

#: One array per column, all of one length.
Rows = dict[str, Array]

VIEW, SEARCH, FAVOURITE, CART, PURCHASE, MAIL_OPEN, MAIL_CLICK = (
    EVENT_TYPES.index(name)
    for name in ("view", "search", "favourite", "cart", "purchase", "mail_open", "mail_click")
)
#: What a delivered event line is; exactly one kind per line.
KINDS = (
    "clean",
    "bot",
    "scanner",
    "skew_hour",
    "late_inside",
    "retry_next_day",
    "stale_copy",
    "duplicate",
    "retry_same_day",
    "double_load",
    "late_beyond",
    "malformed_record",
    "malformed_user",
    "malformed_event_type",
    "malformed_price",
    "malformed_time",
    "malformed_category",
    "skew_past",
    "skew_future",
    "skew_seconds",
    "skew_millis",
)
CODES = {name: code for code, name in enumerate(KINDS)}
CLEAN, BOT, SCANNER = CODES["clean"], CODES["bot"], CODES["scanner"]
#: Kinds of valid events; of dropped copies in the same ingest date; all others are refused.
IS_VALID = np.array([code <= CODES["stale_copy"] for code in range(len(KINDS))])
IS_COPY = np.array([CODES["duplicate"] <= code <= CODES["double_load"] for code in range(len(KINDS))])

HOUR_SECONDS, DAY_SECONDS = 3_600, 86_400

#: Columns of an event and what stands for "none": ``owner`` is the number of the user who did it, times are
#: UTC seconds, ``agent`` and ``kind`` are codes.
_ABSENT: dict[str, float] = {
    "owner": -1,
    "type": -1,
    "time": 0,
    "ingest": 0,
    "item": -1,
    "device": 0,
    "order": -1,
    "price": np.nan,
    "quantity": -1,
    "discount": np.nan,
    "coupon": np.nan,
    "agent": -1,
    "kind": 0,
}


def size(rows: Rows) -> int:
    """Number of rows."""
    return len(next(iter(rows.values())))


def events(**columns: Array | float) -> Rows:
    """Event rows from what is known of them; one value is shared by all rows, the rest is absent."""
    assert set(columns) <= set(_ABSENT), sorted(set(columns) - set(_ABSENT))
    length = len(np.atleast_1d(columns["time"]))
    rows: Rows = {}
    for name, absent in _ABSENT.items():
        kind = np.float64 if absent != absent else np.int64
        rows[name] = np.broadcast_to(np.asarray(columns.get(name, absent), dtype=kind), length).copy()
    return rows


def take(rows: Rows, index: Array) -> Rows:
    """The rows at these positions, or those where a mask holds."""
    return {name: column[index] for name, column in rows.items()}


def concat(parts: Sequence[Rows]) -> Rows:
    """Rows of one kind, below each other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
