"""The data contract of the raw feeds: what each delivers, in which types and units. Plain Python."""

from dataclasses import dataclass

from couponflow.lake.schemas import EVENT_COLUMNS, TABLES, Column


@dataclass(frozen=True)
class Feed:
    """One raw feed, landed as ``raw/<name>/ingest_date=D/*.jsonl``; times are ISO-8601 UTC text.

    ``table`` is where its clean rows go; ``columns`` are the delivered fields with their types.
    ``daily`` feeds must deliver every day that is not closed; others deliver when something changed.
    """

    name: str
    daily: bool
    columns: tuple[Column, ...]


def _delivered(table: str, without: tuple[str, ...]) -> tuple[Column, ...]:
    return tuple(column for column in TABLES[table].columns if column.name not in without)


def _event_columns() -> tuple[Column, ...]:
    """Those of the table, but a user may be unknown; the user agent instead of what is derived from it."""
    as_delivered = {
        "user_id": Column("user_id", "string", "user; null while nobody is logged in"),
        "visitor_id": Column("visitor_id", "string", "cookie id; needed where user_id is null"),
        "is_automated": Column("user_agent", "string", "user agent of the client"),
    }
    return tuple(as_delivered.get(column.name, column) for column in EVENT_COLUMNS)


FEEDS: dict[str, Feed] = {
    feed.name: feed
    for feed in (
        Feed("events", True, _event_columns()),
        Feed("orders", True, _delivered("orders", ("ingest_date",))),
        Feed("redemptions", False, _delivered("redemptions", ("ingest_date",))),
        Feed("sends", False, _delivered("sends", ("send_date", "ingest_date"))),
        Feed("campaigns", False, _delivered("campaigns", ("ingest_date",))),
        Feed("consents", False, _delivered("consents", ("snapshot_date",))),
        Feed("users", False, _delivered("users", ("snapshot_date",))),
        Feed("catalogue", False, _delivered("catalogue", ("snapshot_date",))),
        Feed("costs", False, _delivered("costs", ("ingest_date",))),
    )
}
