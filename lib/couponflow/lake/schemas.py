"""Every table as a plain-Python declaration: grain, key, partition, columns with units.

No Spark here: ``tables`` turns a declaration into Spark types and checks every write against it.
"""

from dataclasses import dataclass, field

from couponflow.lake import layouts

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Column:
    """One column: Spark SQL type, what it means with its unit, and whether null is allowed."""

    name: str
    type: str
    comment: str
    nullable: bool = True


@dataclass(frozen=True)
class Table:
    """One Delta table. ``date_column`` is what ``--dates`` replaces; None means the table is a whole."""

    name: str
    grain: str
    key: tuple[str, ...]
    date_column: str | None
    partition: tuple[str, ...]
    columns: tuple[Column, ...]
    statistics: tuple[str, ...] = field(default=())

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names in declared order."""
        return tuple(column.name for column in self.columns)


def _required(name: str, type_: str, comment: str) -> Column:
    return Column(name, type_, comment, nullable=False)


_USER = _required("user_id", "string", "pseudonymous user id")
_AS_OF = _required("as_of", "timestamp", "cut-off instant: local midnight of as_of_date, UTC")
_AS_OF_DATE = _required("as_of_date", "date", "business day of as_of")
_INGEST_DATE = _required("ingest_date", "date", "business day of the delivery")
_HISTORY = _required(
    "history", "binary", "int32 LE [length, item category shop event_type age_minutes], oldest first"
)
_LENGTH = _required("length", "int", "events in history")

COUPON_TYPE = "array<struct<coupon_id:string,category_id:string,item_ids:array<string>>>"

#: What a session and each of its day segments say alike; all of it adds up over segments.
_SESSION_COLUMNS = (
    _required("num_events", "bigint", "events"),
    _required("num_views", "bigint", "view events"),
    _required("num_searches", "bigint", "search events"),
    _required("num_favourites", "bigint", "favourite events"),
    _required("num_carts", "bigint", "cart events"),
    _required("num_purchases", "bigint", "purchase events: lines"),
    _required("num_mail_events", "bigint", "mail_open and mail_click events"),
    _required("spend_amount", "double", "money of its purchases, configured currency"),
    Column("device", "string", "device of the first event"),
    Column("channel", "string", "channel of the first event"),
    _required("first_event_type", "string", "type of the first event"),
    _required("last_event_type", "string", "type of the last event"),
)

EVENT_COLUMNS = (
    _required("event_id", "string", "id from content; its order carries no meaning"),
    _required("user_id", "string", "pseudonymous user id; visitor:<visitor_id> while nobody is logged in"),
    Column("visitor_id", "string", "pseudonymous cookie id"),
    _required("event_type", "string", "one of " + ", ".join(layouts.EVENT_TYPES)),
    _required("event_time", "timestamp", "when it happened, UTC"),
    _required("ingest_time", "timestamp", "when it was delivered, UTC"),
    Column("item_id", "string", "item; null for search and mail events"),
    Column("category_id", "string", "category of the item"),
    Column("shop_id", "string", "shop or department"),
    Column("order_id", "string", "order that a purchase belongs to"),
    Column("price", "double", "money paid for the line, configured currency"),
    Column("quantity", "bigint", "units"),
    Column("discount_amount", "double", "shop discount, configured currency"),
    Column("coupon_amount", "double", "coupon discount, configured currency"),
    Column("coupon_match_amount", "double", "coupon match by the shop, configured currency"),
    Column("device", "string", "device class"),
    Column("channel", "string", "site, app, store or mail"),
    Column("is_automated", "boolean", "the user agent matches events.bot_agents"),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "events",
            "delivered valid event",
            ("event_id", "ingest_date"),
            "ingest_date",
            ("event_date", "ingest_date"),
            (*EVENT_COLUMNS, _required("event_date", "date", "business day of event_time"), _INGEST_DATE),
            ("event_time",),
        ),
        Table(
            "quarantine",
            "refused record",
            ("feed", "ingest_date", "source_file", "row_number"),
            "ingest_date",
            ("feed", "ingest_date"),
            (
                _required("feed", "string", "feed that delivered it"),
                _INGEST_DATE,
                _required("source_file", "string", "file name inside the feed's day"),
                _required("row_number", "bigint", "line inside that file, from 0"),
                _required("reason", "string", "reason from the closed list, or a rule of the config"),
                Column("redacted", "string", "names of the fields delivered; no values"),
            ),
        ),
        Table(
            "user_days",
            "user on an event_date",
            ("user_id", "event_date"),
            "event_date",
            ("event_date",),
            (
                _USER,
                _required("event_date", "date", "business day"),
                _required("num_events", "bigint", "events of the user on that day"),
                _required("num_purchases", "bigint", "purchases among them"),
                _required("num_mail_clicks", "bigint", "mail clicks among them"),
                Column("exclusion_reason", "string", "bot, scanner or staff; null = kept"),
            ),
        ),
        Table(
            "session_segments",
            "run of one user inside one event_date",
            ("user_id", "segment_start"),
            "event_date",
            ("event_date",),
            (
                _USER,
                _required("event_date", "date", "business day"),
                _required("segment_start", "timestamp", "first event, UTC"),
                _required("segment_end", "timestamp", "last event, UTC"),
                *_SESSION_COLUMNS,
            ),
        ),
        Table(
            "sessions",
            "session",
            ("session_id",),
            "session_date",
            ("session_date",),
            (
                _required("session_id", "string", "hash of user_id and session_start"),
                _USER,
                _required("session_date", "date", "business day of its start"),
                _required("session_start", "timestamp", "first event, UTC"),
                _required("session_end", "timestamp", "last event, UTC"),
                _required("duration_seconds", "bigint", "seconds from first to last event"),
                _required("num_segments", "bigint", "day segments joined"),
                *_SESSION_COLUMNS,
                _required("is_converted", "boolean", "whether it holds a purchase"),
            ),
        ),
        Table(
            "orders",
            "order",
            ("order_id",),
            "ingest_date",
            ("ingest_date",),
            (
                _required("order_id", "string", "order"),
                _USER,
                _required("order_time", "timestamp", "when it was placed, UTC"),
                _required("total_amount", "double", "money paid, configured currency"),
                Column("shop_id", "string", "store"),
                Column("order_status", "string", "placed, cancelled or returned; null = placed"),
                Column("status_time", "timestamp", "when it was cancelled or returned, UTC"),
                _INGEST_DATE,
            ),
        ),
        Table(
            "redemptions",
            "redemption of a coupon",
            ("redemption_id",),
            "ingest_date",
            ("ingest_date",),
            (
                _required("redemption_id", "string", "redemption"),
                _USER,
                _required("campaign_id", "string", "campaign of the coupon"),
                _required("coupon_id", "string", "coupon"),
                _required(
                    "redemption_time",
                    "timestamp",
                    "when it was redeemed, UTC; local midnight where only a day is known",
                ),
                _INGEST_DATE,
            ),
        ),
        Table(
            "sends",
            "mail delivered to a user for a campaign",
            ("send_id",),
            # A campaign older than the data is delivered on the first ingest date, so send_date cannot be
            # the range of a write; readers by send_date filter that column.
            "ingest_date",
            ("ingest_date",),
            (
                _required("send_id", "string", "send"),
                _required("campaign_id", "string", "campaign"),
                _USER,
                Column("coupon_id", "string", "coupon in the mail; null = pooled"),
                _required("delivered_time", "timestamp", "when it was delivered, UTC"),
                Column("propensity", "double", "probability with which this user was chosen; null = unknown"),
                _required("send_date", "date", "business day of delivered_time"),
                _INGEST_DATE,
            ),
        ),
        Table(
            "campaigns",
            "campaign",
            ("campaign_id",),
            "ingest_date",
            ("ingest_date",),
            (
                _required("campaign_id", "string", "campaign"),
                _required("campaign_type", "string", "type"),
                _required("start_date", "date", "first business day"),
                _required("end_date", "date", "last business day, inclusive"),
                _required("coupons", COUPON_TYPE, "coupons with their category and items: the target set"),
                _INGEST_DATE,
            ),
        ),
        Table(
            "consents",
            "user, channel and purpose in one snapshot",
            ("snapshot_date", "user_id", "channel", "purpose"),
            "snapshot_date",
            ("snapshot_date",),
            (
                _USER,
                _required("channel", "string", "mail, push, ..."),
                _required("purpose", "string", "marketing, transactional, ..."),
                _required("state", "string", "granted or denied"),
                _required("updated_time", "timestamp", "last change, UTC"),
                Column("reason", "string", "unsubscribe, bounce, complaint, legal ..."),
                _required("source", "string", "system of record, or 'constructed'"),
                _required("snapshot_date", "date", "business day of the snapshot"),
            ),
        ),
        Table(
            "users",
            "user in one snapshot of the user master",
            ("snapshot_date", "user_id"),
            "snapshot_date",
            ("snapshot_date",),
            (
                _USER,
                _required("has_attributes", "boolean", "whether optional attributes are known"),
                Column("attributes", "map<string,string>", "optional attributes, as delivered"),
                _required("snapshot_date", "date", "business day of the snapshot"),
            ),
        ),
        Table(
            "catalogue",
            "item in one snapshot of the catalogue",
            ("snapshot_date", "item_id"),
            "snapshot_date",
            ("snapshot_date",),
            (
                _required("item_id", "string", "item"),
                Column("category_id", "string", "category"),
                Column("shop_id", "string", "shop or department"),
                Column("item_type", "string", "type inside the category"),
                Column("brand", "string", "brand"),
                _required("snapshot_date", "date", "business day of the snapshot"),
            ),
        ),
        Table(
            "costs",
            "cost of a campaign on a day, by kind",
            ("campaign_id", "cost_date", "cost_type"),
            "ingest_date",
            ("ingest_date",),
            (
                _required("campaign_id", "string", "campaign"),
                _required("cost_date", "date", "business day on which the cost arose"),
                _required("cost_type", "string", "mail, redemption, creative or other"),
                _required("cost_amount", "double", "money, configured currency"),
                _INGEST_DATE,
            ),
        ),
        Table(
            "identity_links",
            "visitor first seen with a user on an ingest date",
            ("visitor_id", "user_id", "ingest_date"),
            "ingest_date",
            ("ingest_date",),
            (
                _required("visitor_id", "string", "pseudonymous cookie id"),
                _USER,
                _required("linked_time", "timestamp", "earliest ingest_time of an event naming both, UTC"),
                _INGEST_DATE,
            ),
        ),
        Table(
            "conversions",
            "send that converted",
            ("send_id",),
            "send_date",
            ("send_date",),
            (
                _required("send_id", "string", "send"),
                _required("campaign_id", "string", "campaign"),
                _USER,
                _required("converted_time", "timestamp", "first conversion in the window, UTC"),
                _required("num_conversions", "bigint", "conversions in the window"),
                _required("send_date", "date", "business day of the send"),
            ),
        ),
        Table(
            "vocabularies",
            "value of a field in one vocabulary version",
            ("version", "field", "value"),
            None,
            ("version",),
            (
                _required("version", "string", "vocabulary version"),
                _required("field", "string", "one of " + ", ".join(layouts.VOCABULARY_FIELDS)),
                _required("value", "string", "value; <PAD>, <OOV> and <BUCKET n> included"),
                _required("index", "int", "0 PAD, 1 OOV, then hash buckets, then real values"),
                _required(
                    "num_events", "bigint", "events that carried the value in the range it was built from"
                ),
            ),
        ),
        Table(
            "histories",
            "user at an as_of",
            ("user_id", "as_of"),
            "as_of_date",
            ("as_of_date",),
            (
                _USER,
                _AS_OF,
                _AS_OF_DATE,
                _LENGTH,
                _HISTORY,
                _required("vocabulary_version", "string", "ids are of this version"),
            ),
        ),
        Table(
            "history_states",
            "event among the last of its user before the start of state_date",
            ("state_date", "user_id", "event_time", "event_id", "ingest_time"),
            "state_date",
            ("state_date",),
            (
                _required("state_date", "date", "business day at whose start the state was known"),
                _USER,
                _required("event_id", "string", "event"),
                _required("event_time", "timestamp", "when it happened, UTC"),
                _required("ingest_time", "timestamp", "when it could be known, UTC"),
                _required("event_date", "date", "business day of event_time"),
                *[_required(f"{name}_index", "int", f"{name} index") for name in layouts.VOCABULARY_FIELDS],
                _required("vocabulary_version", "string", "ids are of this version"),
                _required("fingerprint", "string", "of all else that the state was made from"),
            ),
        ),
        Table(
            "training_examples",
            "user, target and as_of with a mature label",
            ("example_id",),
            "as_of_date",
            (),
            (
                _required("example_id", "string", "campaign:user:as_of_date"),
                _USER,
                _required("target_id", "string", "campaign whose target it is"),
                _AS_OF,
                _AS_OF_DATE,
                _required("split", "string", "train, train_late, valid, embargo or test"),
                _required("label", "int", "1 = converted in the label window"),
                _required("label_end", "timestamp", "exclusive end of the label window, UTC"),
                _required("mature_time", "timestamp", "from when on the label is final, UTC"),
                _required("sampling_rate", "double", "probability with which a row of its label was kept"),
                _LENGTH,
                _HISTORY,
                _required("negatives", "binary", "int32 LE [length, item category], aligned with history"),
                _required("target", "binary", "int32 LE [members, item category shop]"),
                _required("wide", "binary", "float32 LE [features], layouts.WIDE_FEATURES"),
                _required("vocabulary_version", "string", "ids are of this version"),
            ),
            ("as_of_date", "split"),
        ),
        Table(
            "scoring_examples",
            "user at an as_of with all targets",
            ("user_id", "as_of"),
            "as_of_date",
            ("as_of_date",),
            (
                _USER,
                _AS_OF,
                _AS_OF_DATE,
                _LENGTH,
                _HISTORY,
                _required("target_ids", "array<string>", "campaigns to score"),
                _required("target_sizes", "array<int>", "members per target"),
                _required("targets", "binary", "int32 LE [sum of target_sizes, item category shop]"),
                _required("wide", "binary", "float32 LE [targets, features], layouts.WIDE_FEATURES"),
                _required("vocabulary_version", "string", "ids are of this version"),
            ),
        ),
        Table(
            "predictions",
            "campaign, user and target under one model version",
            ("campaign_id", "run_date", "user_id", "target_id", "model_version"),
            "run_date",
            ("campaign_id", "run_date"),
            (
                _required("campaign_id", "string", "campaign"),
                _required("run_date", "date", "business day of the run"),
                _USER,
                _required("target_id", "string", "target"),
                _required("model_version", "string", "bundle"),
                _required("score", "double", "sigmoid of the raw logit"),
                _required("conversion_probability", "double", "calibrated P(conversion given send)"),
                _required("is_cold_start", "boolean", "no event before as_of"),
            ),
        ),
        Table(
            "assignments",
            "user of a campaign version: the ledger",
            ("campaign_id", "version", "user_id"),
            None,
            ("campaign_id", "version"),
            (
                _required("campaign_id", "string", "campaign"),
                _required("version", "string", "campaign version"),
                _USER,
                _required("run_date", "date", "business day of the decision"),
                _required("would_select", "boolean", "chosen by the selection before control is withheld"),
                _required("arm", "string", "treat, control, holdout or none"),
                _required("propensity", "double", "probability of the taken arm given would_select"),
                _required("reason", "string", "selected, or why not; closed list"),
                _required("conversion_probability", "double", "calibrated probability the choice used"),
                _required("run_id", "string", "run that wrote it"),
                Column("exposure_time", "timestamp", "when the mail went out, UTC; null until known"),
            ),
        ),
        Table(
            "audience",
            "mailed user of a campaign version",
            ("campaign_id", "version", "user_id"),
            None,
            ("campaign_id", "version"),
            (
                _required("campaign_id", "string", "campaign"),
                _required("version", "string", "campaign version"),
                _USER,
                Column("coupon_id", "string", "coupon; null = pooled"),
                _required("conversion_probability", "double", "calibrated probability"),
                _required(
                    "expected_value_amount", "double", "expected profit of the mail, configured currency"
                ),
                _required("rank", "bigint", "order of choice, from 1"),
            ),
        ),
        Table(
            "verdicts",
            "check of a table on a day",
            ("run_date", "table_name", "check_name"),
            "run_date",
            ("run_date",),
            (
                _required("run_date", "date", "business day of the run"),
                _required("table_name", "string", "table"),
                _required("check_name", "string", "freshness or row_count"),
                _required("verdict", "string", "ok, stale, missing or empty"),
                _required("observed", "string", "what was found"),
                _required("expected", "string", "what would be ok"),
            ),
        ),
    )
}
