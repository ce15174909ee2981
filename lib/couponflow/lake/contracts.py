"""The data contract of the raw feeds: what each delivers, in which types and units, and why a row is refused.

Plain Python, and the one declaration of all of it: ``couponflow check --contract`` prints it, the config's
column mapping is checked against it, and cleaning takes the names and the order of its reasons from it.
"""

from dataclasses import dataclass
from typing import Any

from couponflow.lake.declarations import Column
from couponflow.lake.schemas import EVENT_COLUMNS, TABLES

#: Kinds of file, by extension; local or on ``gs://``.
KINDS = {
    "jsonl": "JSON Lines: one object per line, UTF-8",
    "json": "JSON Lines too",
    "csv": "CSV: one header, UTF-8; an empty cell is null; maps and lists as JSON",
    "parquet": "Parquet: real types; text times are ISO-8601 with an offset",
}
#: Units of times that are delivered as numbers; ``iso`` is ISO-8601 text, UTC where no offset is given.
TIME_UNITS = ("iso", "s", "ms")

#: What happens when a delivery is not as declared.
DRIFT_RULES = {
    "a new column": "accepted, ignored and named in the run record",
    "a missing column": "the run stops (exit 3) before any write; unknown values are delivered as null",
    "a column of another type": "the run stops (exit 3) before any write; one such value is a bad row",
    "columns in another order": "accepted",
    "no record that can be read": "the run stops (exit 3) before any write",
    "a missing day of a daily feed": "the run stops (exit 3) unless lake.closed_days names it",
    "an empty file": "accepted: no rows",
}

ORDER_STATES = ("placed", "cancelled", "returned")
CONSENT_STATES = ("granted", "denied")
COST_TYPES = ("mail", "redemption", "creative", "other")
FIRST_YEAR, LAST_YEAR = 2000, 2098  # outside: 1970 and 2099 clocks, milliseconds read as seconds

MALFORMED = "malformed_record"
_MEANINGS = {
    MALFORMED: "no record, a field of another type, a text above 10,000 characters, bytes that are no "
    "UTF-8, or an amount that is no finite number",
    "missing_user": "user_id and visitor_id are both empty",
    "unknown_event_type": "event_type is none of the declared ones",
    "bad_time": "a needed time or date is absent or unreadable, or an end lies before its start",
    "clock_skew": f"a time lies outside {FIRST_YEAR} to {LAST_YEAR}",
    "future_event": "more than an hour after its ingest_time, or after the day that follows its ingest date",
    "too_late": "delivered more than lake.lateness_days after its business day",
    "missing_item": "view, favourite, cart or purchase without item_id or category_id",
    "negative_price": "price is negative or no finite number",
    "negative_quantity": "quantity is negative",
    "unknown_state": "state, or order_status, is none of the declared ones",
    "unknown_type": "cost_type is none of the declared ones",
    "negative_cost": "cost_amount is negative or no finite number",
}


@dataclass(frozen=True)
class Feed:
    """One raw feed, landed as ``raw/<name>/ingest_date=D/*``.

    ``columns`` are the delivered fields with their types; an array or map keeps its declared inner types.
    ``daily`` feeds must deliver every day that is not closed; others deliver when something changed.
    ``reasons`` is the closed list of why a row goes to quarantine, the first that holds; the events feed adds
    ``events.quarantine_rules`` of the config after the first.
    ``example`` is one valid record as JSON.
    """

    name: str
    daily: bool
    columns: tuple[Column, ...]
    reasons: tuple[str, ...]
    example: dict[str, Any]

    @property
    def cadence(self) -> str:
        """When it delivers, in words."""
        return "every day that is not closed" if self.daily else "when something changed"

    def column(self, name: str) -> Column | None:
        """The declared column of that name."""
        return next((column for column in self.columns if column.name == name), None)

    def describe(self) -> dict[str, Any]:
        """Everything a sender needs, ready for JSON."""
        return {
            "feed": self.name,
            "place": f"raw/{self.name}/ingest_date=YYYY-MM-DD/*",
            "cadence": self.cadence,
            "kinds": KINDS,
            "time_units": list(TIME_UNITS),
            "columns": [
                {
                    "name": column.name,
                    "type": column.type,
                    "nullable": column.nullable,
                    "meaning": column.comment,
                    "example": self.example[column.name],
                }
                for column in self.columns
            ],
            "reasons": {name: meaning(name) for name in self.reasons},
            "drift": DRIFT_RULES,
        }


def meaning(reason: str) -> str:
    """A reason of the closed lists in words."""
    return _MEANINGS.get(reason) or f"{reason.removeprefix('missing_')} is absent or empty"


def _delivered(table: str, without: tuple[str, ...]) -> tuple[Column, ...]:
    """Those of the table, but a user is delivered as the sender names it."""
    user = Column("user_id", "string", "user; stored as a pseudonym", nullable=False)
    columns = [column for column in TABLES[table].columns if column.name not in without]
    return tuple(user if column.name == "user_id" else column for column in columns)


def _event_columns() -> tuple[Column, ...]:
    """Those of the table, but a user may be unknown; the user agent instead of what is derived from it."""
    as_delivered = {
        "event_id": Column("event_id", "string", "unique id; a retry repeats it", nullable=False),
        "user_id": Column("user_id", "string", "user; null while nobody is logged in; stored as a pseudonym"),
        "visitor_id": Column(
            "visitor_id", "string", "cookie id; needed where user_id is null; stored as a pseudonym"
        ),
        "is_automated": Column("user_agent", "string", "user agent of the client"),
    }
    return tuple(as_delivered.get(column.name, column) for column in EVENT_COLUMNS)


_EVENT_REASONS = (
    MALFORMED,
    "missing_user",
    "missing_event_id",
    "unknown_event_type",
    "bad_time",
    "clock_skew",
    "future_event",
    "too_late",
    "missing_item",
    "negative_price",
    "negative_quantity",
)

#: A value of each column that is valid in every feed that delivers it.
_EXAMPLES: dict[str, Any] = {
    "event_id": "e-20240110-000017",
    "user_id": "customer-4711",
    "visitor_id": "cookie-9f3a",
    "event_type": "view",
    "event_time": "2024-01-10T18:03:20.125Z",
    "ingest_time": "2024-01-10T18:03:22Z",
    "item_id": "item-0815",
    "category_id": "shoes",
    "shop_id": "shop-12",
    "order_id": "order-77001",
    "price": 39.9,
    "quantity": 1,
    "discount_amount": 4.0,
    "coupon_amount": 0.0,
    "coupon_match_amount": 0.0,
    "device": "phone",
    "channel": "app",
    "user_agent": "Mozilla/5.0 (Linux; Android 14) Mobile",
    "order_time": "2024-01-10T18:05:00Z",
    "total_amount": 39.9,
    "order_status": "returned",
    "status_time": "2024-01-12T09:30:00Z",
    "redemption_id": "redemption-5",
    "campaign_id": "18",
    "coupon_id": "coupon-3",
    "redemption_time": "2024-01-12T17:45:10Z",
    "send_id": "send-100200",
    "delivered_time": "2024-01-10T08:00:05Z",
    "propensity": 0.5,
    "mail_type": "marketing",
    "campaign_type": "Type A",
    "start_date": "2024-01-10",
    "end_date": "2024-01-24",
    "coupons": [{"coupon_id": "coupon-3", "category_id": "shoes", "item_ids": ["item-0815", "item-0816"]}],
    "purpose": "marketing",
    "state": "granted",
    "updated_time": "2024-01-09T12:00:00Z",
    "reason": "preference centre",
    "source": "crm",
    "has_attributes": True,
    "attributes": {"age": "35-44", "household": "2"},
    "item_type": "running shoes",
    "brand": "own brand",
    "cost_date": "2024-01-10",
    "cost_type": "mail",
    "cost_amount": 12.5,
}
_EXAMPLES_OF = {"consents": {"channel": "mail"}}


def _feed(name: str, daily: bool, without: tuple[str, ...], *more: str) -> Feed:
    """A feed whose reasons follow from its columns; ``more`` are those that do not."""
    columns = _delivered(name, without)
    needed = [column for column in columns if not column.nullable]
    times = [column.type for column in needed if column.type in ("timestamp", "date")]
    missing = [f"missing_{column.name}" for column in needed if column.type not in ("timestamp", "date")]
    # A date far away is no broken clock: campaigns without an end are delivered with one in 2099 or 9999.
    missing += ["bad_time"] * bool(times) + ["clock_skew"] * ("timestamp" in times)
    return Feed(name, daily, columns, (MALFORMED, *missing, *more), _example(name, columns))


def _example(name: str, columns: tuple[Column, ...]) -> dict[str, Any]:
    values = _EXAMPLES | _EXAMPLES_OF.get(name, {})
    return {column.name: values[column.name] for column in columns}


FEEDS: dict[str, Feed] = {
    feed.name: feed
    for feed in (
        Feed("events", True, _event_columns(), _EVENT_REASONS, _example("events", _event_columns())),
        _feed("orders", True, ("ingest_date",), "unknown_state"),
        _feed("redemptions", False, ("ingest_date",)),
        _feed("sends", False, ("send_date", "ingest_date")),
        _feed("campaigns", False, ("ingest_date",)),
        _feed("consents", False, ("snapshot_date",), "unknown_state"),
        _feed("users", False, ("snapshot_date",)),
        _feed("catalogue", False, ("snapshot_date",)),
        _feed("costs", False, ("ingest_date",), "unknown_type", "negative_cost"),
    )
}


def check_mapping(feed: str, columns: dict[str, str]) -> str | None:
    """What is wrong with a mapping of declared to delivered names, or None."""
    declared = [column.name for column in FEEDS[feed].columns]
    unknown = [name for name in columns if name not in declared]
    if unknown:
        return f"feed {feed} has no column {unknown[0]}; its columns are {', '.join(declared)}"
    delivered = [columns.get(name, name) for name in declared]
    twice = sorted({name for name in delivered if delivered.count(name) > 1})
    if twice:
        return f"feed {feed}: two columns are delivered as {twice[0]}; map each to a name of its own"
    return None
