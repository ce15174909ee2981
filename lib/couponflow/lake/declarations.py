"""What a declaration of a table consists of: columns, some of them shared, and the table that they make."""

from dataclasses import dataclass, field


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


def required(name: str, type_: str, comment: str) -> Column:
    """A column that is never null."""
    return Column(name, type_, comment, nullable=False)


#: Columns that several tables share.
USER = required("user_id", "string", "pseudonymous user id")
AS_OF = required("as_of", "timestamp", "cut-off instant: local midnight of as_of_date, UTC")
AS_OF_DATE = required("as_of_date", "date", "business day of as_of")
INGEST_DATE = required("ingest_date", "date", "business day of the delivery")
HISTORY = required(
    "history", "binary", "int32 LE [length, item category shop event_type age_minutes], oldest first"
)
LENGTH = required("length", "int", "events in history")

#: What a session and each of its day segments say alike; all of it adds up over segments.
SESSION_COLUMNS = (
    required("num_events", "bigint", "events"),
    required("num_views", "bigint", "view events"),
    required("num_searches", "bigint", "search events"),
    required("num_favourites", "bigint", "favourite events"),
    required("num_carts", "bigint", "cart events"),
    required("num_purchases", "bigint", "purchase events: lines"),
    required("num_mail_events", "bigint", "mail_open and mail_click events"),
    required("spend_amount", "double", "money of its purchases, configured currency"),
    Column("device", "string", "device of the first event"),
    Column("channel", "string", "channel of the first event"),
    required("first_event_type", "string", "type of the first event"),
    required("last_event_type", "string", "type of the last event"),
)
