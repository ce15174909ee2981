"""Tables that older code has laid out, brought to the schema of this code.

Each version so far since the second has added columns that may be null, so that no row is rewritten: a
migration changes a table's metadata only. Rows of older code hold null there, which every reader of such a
column understands. Schema versions are of a lake as a whole: every table carries the newest that it was
brought to, whether or not it has changed.
"""

from dataclasses import dataclass

from pyspark.sql import SparkSession

from couponflow.errors import ConfigError, DataError
from couponflow.lake import declarations, failures, schemas, tables

#: The columns that a schema version brought, by table.
ADDED: dict[int, dict[str, tuple[str, ...]]] = {
    3: {"sends": ("mail_type",)},
    4: {"assignments": ("coupon_id",)},
}
#: What tables before it lack is not noted here: they are refused.
OLDEST = min(ADDED) - 1


@dataclass(frozen=True)
class Migration:
    """What a table of an older version lacks; ``columns`` may be none."""

    table: str
    version: int
    columns: tuple[declarations.Column, ...]


def planned(spark: SparkSession, root_uri: str) -> list[Migration]:
    """Every table of the lake that older code has laid out, in declared order.

    Raises:
        DataError: a table is too old, of newer code, or lacks other columns than those that its later
            versions brought. Then nothing should be migrated.
    """
    found = []
    for name in schemas.TABLES:
        state = tables.layout(spark, root_uri, name)
        if state is not None and state.version != schemas.SCHEMA_VERSION:
            found.append(_migration(name, state))
    return found


def apply(spark: SparkSession, root_uri: str, migration: Migration) -> None:
    """Bring one table to this code's schema version. Safe to repeat after any interruption.

    Columns come first and the version last, each in one commit: until the last one the code before it reads
    and writes the table as ever, and this code refuses it. No data file changes.

    Raises:
        ConflictError: another run has changed the table meanwhile.
        InfraError: the commit failed.
    """
    place = tables.sql_name(root_uri, migration.table)
    columns = ", ".join(f"{c.name} {c.type} COMMENT '{_quoted(c.comment)}'" for c in migration.columns)
    property_ = f"'{tables.VERSION_PROPERTY}' = '{schemas.SCHEMA_VERSION}'"
    try:
        if columns:
            spark.sql(f"ALTER TABLE {place} ADD COLUMNS ({columns})")
        spark.sql(f"ALTER TABLE {place} SET TBLPROPERTIES ({property_})")
    except Exception as error:
        raise failures.write_error(error, migration.table, "its schema") from error


def _migration(name: str, state: tables.Layout) -> Migration:
    if not OLDEST <= state.version < schemas.SCHEMA_VERSION:
        raise DataError(
            f"table {name} has schema version {state.version}; only {OLDEST} to "
            f"{schemas.SCHEMA_VERSION - 1} can be brought to {schemas.SCHEMA_VERSION}; use the code that "
            "wrote it, or build a new lake.root_uri"
        )
    later = range(state.version + 1, schemas.SCHEMA_VERSION + 1)
    expected = {column for one in later for column in ADDED.get(one, {}).get(name, ())}
    missing = [column for column in schemas.TABLES[name].columns if column.name not in state.columns]
    for column in missing:
        if column.name not in expected:
            raise DataError(
                f"table {name} of schema version {state.version} lacks column {column.name}, which every "
                "version had; restore the table, or rebuild it"
            )
    return Migration(name, state.version, tuple(missing))


def _quoted(text: str) -> str:
    if "'" in text or "\\" in text:
        raise ConfigError(f"comment {text!r} cannot stand in SQL; write it without quotes")
    return text
