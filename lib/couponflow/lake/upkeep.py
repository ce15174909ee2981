"""Upkeep of the tables: small files joined, files of replaced versions removed. No row changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from pyspark.sql import SparkSession

from couponflow.errors import ConfigError, InfraError
from couponflow.lake import failures, schemas, tables

#: Its files are its row groups, which training shares out by rank; the manifest names them.
LAID_OUT = ("training_examples",)
#: An age below which a running job may still read what VACUUM removes.
MIN_RETENTION_HOURS = 168

_SETTINGS = (
    "spark.databricks.delta.retentionDurationCheck.enabled",
    "spark.databricks.delta.vacuum.logging.enabled",
)


def check_retention(hours: int, allow_short: bool) -> None:
    """Refuse to remove what a reader of the last seven days may have open.

    Raises:
        ConfigError: the retention is shorter, and nobody has said that no job runs.
    """
    if hours < MIN_RETENTION_HOURS and not allow_short:
        raise ConfigError(
            f"maintenance.retention_hours = {hours}: expected at least {MIN_RETENTION_HOURS}, as a running "
            "job may hold older versions; raise it, or stop every job and set "
            "maintenance.allow_short_retention = true"
        )


def files(spark: SparkSession, root_uri: str, table: str) -> list[str]:
    """Files of the newest snapshot."""
    return sorted(spark.read.format("delta").load(tables.table_uri(root_uri, table)).inputFiles())


def crowded_partitions(
    spark: SparkSession, root_uri: str, table: str, max_files: int
) -> list[tuple[dict[str, str], int]]:
    """Partitions ({} = a table without) that hold more files than that, with their number, in order."""
    declared = schemas.TABLES[table]
    if table in LAID_OUT:
        return []
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for uri in files(spark, root_uri, table):
        folders = uri.split("/")[-1 - len(declared.partition) : -1]
        pairs = [folder.partition("=") for folder in folders]
        key = tuple((name, unquote(unquote(value))) for name, _, value in pairs)
        counts[key] = counts.get(key, 0) + 1
    return [(dict(key), number) for key, number in sorted(counts.items()) if number > max_files]


def compact(spark: SparkSession, root_uri: str, table: str, partition: dict[str, str]) -> int:
    """Join the small files of one partition; returns how many files there are less.

    Raises:
        ConflictError: another run has changed the partition meanwhile.
        InfraError: the write failed.
    """
    where = f" WHERE {tables.predicate(schemas.TABLES[table], None, partition)}" if partition else ""
    try:
        done = (
            spark.sql(f"OPTIMIZE {tables.sql_name(root_uri, table)}{where}").select("metrics.*").collect()[0]
        )
    except Exception as error:
        raise failures.write_error(error, table, partition) from error
    return int(done["numFilesRemoved"]) - int(done["numFilesAdded"])


def stale_files(spark: SparkSession, root_uri: str, table: str, hours: int) -> list[str]:
    """What ``vacuum`` would remove: files that no version of the last ``hours`` hours names."""
    return _vacuum(spark, root_uri, table, hours, " DRY RUN")


def vacuum(spark: SparkSession, root_uri: str, table: str, hours: int) -> None:
    """Remove the stale files; versions that are older than that cannot be read any more.

    Delta's own lower bound is off here: ``check_retention`` is the one that asks.

    Raises:
        InfraError: the store refused it.
    """
    _vacuum(spark, root_uri, table, hours)


def _vacuum(spark: SparkSession, root_uri: str, table: str, hours: int, mode: str = "") -> list[str]:
    with _settings_off(spark):
        try:
            rows = spark.sql(
                f"VACUUM {tables.sql_name(root_uri, table)} RETAIN {int(hours)} HOURS{mode}"
            ).collect()
        except failures.SPARK_ERRORS as error:
            raise failures.store_error(error, f"table {table}") or InfraError(
                f"table {table}: VACUUM failed ({failures.first_line(error)}); check access and run again"
            ) from error
    return sorted(str(row[0]) for row in rows)


@contextmanager
def _settings_off(spark: SparkSession) -> Iterator[None]:
    """A retention below seven days is not refused, and the log takes no entry of its own."""
    try:
        for name in _SETTINGS:
            spark.conf.set(name, "false")
        yield
    finally:
        for name in _SETTINGS:
            spark.conf.unset(name)
