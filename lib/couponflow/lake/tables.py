"""The only door to Delta: reads at a version, writes of one explicit range.

A write replaces its range and nothing else (``replaceWhere`` on literals), so that readers see the old or
the new rows of a range and never a mix, and a rerun with no rows empties the range.
"""

import logging
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from functools import cache, wraps
from types import MappingProxyType
from typing import Any

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from couponflow.dates import DateRange
from couponflow.errors import CommitConflictError, ConfigError, ConflictError, DataError, InfraError
from couponflow.lake import (
    declarations,
    failures,
    faults,
    literals,
    metering,
    python_tasks,
    retries,
    schemas,
    storage,
)

log = logging.getLogger("couponflow")

_JobBody = Callable[[SparkSession, Any], None]
_MAX_RUNS, _PAUSE_SECONDS = 3, 1.0
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_.:-]{1,128}", re.ASCII)
VERSION_PROPERTY = "couponflow.schema_version"
_STAND_INS: ContextVar[Mapping[str, DataFrame]] = ContextVar("stand_ins", default=MappingProxyType({}))
_USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"


@dataclass(frozen=True)
class Layout:
    """How a table was laid out: by code of which schema version (0: none is noted), with which columns."""

    version: int
    columns: tuple[str, ...]


def struct_type(columns: tuple[declarations.Column, ...]) -> T.StructType:
    """Spark types of declared columns, comments included."""
    fields = []
    for column in columns:
        kind = _spark_type(column.type)
        fields.append(T.StructField(column.name, kind, True, {"comment": column.comment}))
    return T.StructType(fields)


@cache
def _spark_type(text: str) -> T.DataType:
    return T._parse_datatype_string(text)  # asks the JVM


def table_uri(root_uri: str, table: str) -> str:
    """Where a declared table lies."""
    return storage.spark_uri(storage.join(root_uri, "tables", _declared(table).name))


def sql_name(root_uri: str, table: str) -> str:
    """The table as SQL names it.

    Raises:
        ConfigError: its path cannot stand in SQL.
    """
    uri = table_uri(root_uri, table)
    if "`" in uri:
        raise ConfigError(f"lake.root_uri {root_uri!r}: a path with a backtick cannot be named in SQL")
    return f"delta.`{uri}`"


def layout(spark: SparkSession, root_uri: str, table: str) -> Layout | None:
    """How a table of any schema version is laid out now; None where there is none."""
    uri = table_uri(root_uri, table)
    if not _is_created(spark, table, uri):
        return None
    columns = spark.read.format("delta").load(uri).columns
    version = _property(spark, uri, VERSION_PROPERTY)
    return Layout(int(version) if version.isdecimal() else 0, tuple(columns))


def read(
    spark: SparkSession, root_uri: str, table: str, dates: DateRange | None = None, version: int | None = None
) -> DataFrame:
    """Read the rows of a range (or all) of a table's snapshot.

    Raises:
        DataError: the table does not exist, has another schema version, or the version is gone.
        InfraError: the object store refused the read.
    """
    declared = _declared(table)
    if table in _STAND_INS.get():
        frame = _STAND_INS.get()[table].select(*declared.column_names)
        return frame if dates is None else frame.where(in_range(_date_column(declared), dates))
    uri = table_uri(root_uri, table)
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    try:
        frame = reader.load(uri)
        _check_schema_version(spark, declared, uri)
    except failures.SPARK_ERRORS as error:
        raise failures.read_error(error, table, uri) from error
    missing = [name for name in declared.column_names if name not in frame.columns]
    if missing:
        raise DataError(f"table {table} at {uri} lacks column {missing[0]}; other code wrote it, rebuild it")
    frame = frame.select(*declared.column_names)
    return frame if dates is None else frame.where(in_range(_date_column(declared), dates))


@contextmanager
def stand_ins(frames: Mapping[str, DataFrame]) -> Iterator[None]:
    """Let ``read`` answer with these frames instead of the tables of their names, in this thread only.

    For what-if runs such as the leak audit: nothing is written, and the readers are those of every job.
    """
    token = _STAND_INS.set(frames)
    try:
        yield
    finally:
        _STAND_INS.reset(token)


def read_or_empty(spark: SparkSession, root_uri: str, table: str) -> DataFrame:
    """Read all rows of a table that may not exist yet, such as the ledger before the first campaign."""
    if table not in _STAND_INS.get() and not exists(spark, root_uri, table):
        return literals.frame(spark, [], struct_type(_declared(table).columns))
    return read(spark, root_uri, table)


def in_range(column: str, dates: DateRange) -> Any:
    """Condition ``start <= column < end``."""
    return (F.col(column) >= F.lit(dates.start)) & (F.col(column) < F.lit(dates.end))


def overwrite(
    frame: DataFrame,
    root_uri: str,
    table: str,
    dates: DateRange | None = None,
    run_id: str = "",
    rows_per_file: int | None = None,
    **equals: str,
) -> int:
    """Replace the rows of one range (and of equal key values) by ``frame``; returns the rows written.

    Grain, key and types are those of ``schemas``; rows outside the range are refused by Delta.
    ``rows_per_file`` bounds a file's rows: one row group per file, for Petastorm.

    Raises:
        DataError: a column is missing, has another type, or is null where the declaration forbids it.
            Or the table has another schema version.
        CommitConflictError: another run changed the same range meanwhile; see ``retried``.
        InfraError: the write failed.
    """
    declared = _declared(table)
    uri = table_uri(root_uri, table)
    condition = predicate(declared, dates, equals)
    shaped = _conform(frame, declared)
    day = dates.start if dates else None
    faults.check(root_uri, str(frame.sparkSession.sparkContext.master))
    faults.fire(root_uri, table, "before_write", day)
    if faults.is_set(table, "during_write", day):
        shaped = python_tasks.map_in_arrow(shaped, faults.passing(root_uri), shaped.schema)
    metering.charge(shaped)
    _create_if_absent(frame.sparkSession, declared, uri)
    mark = f"{run_id} {uuid.uuid4().hex[:8]}"
    writer = (
        shaped.write.format("delta")
        .mode("overwrite")
        .option("replaceWhere", condition)
        .option("userMetadata", mark)
    )
    if rows_per_file is not None:
        writer = writer.option("maxRecordsPerFile", rows_per_file)
    written = retries.repeated(
        lambda: writer.save(uri),
        lambda: _rows_committed(frame.sparkSession, uri, mark),
        table,
        dates or equals,
    )
    if written is not None:
        return written
    faults.fire(root_uri, table, "after_commit", day)
    return _rows_committed(frame.sparkSession, uri, mark) or 0


def take_out(
    keys: DataFrame, root_uri: str, table: str, run_id: str = "", replacement: str | None = None
) -> int:
    """Delete the rows that agree with a row of ``keys`` in all its columns; returns how many.

    With ``replacement``, the name of one column of ``keys``, rows are kept and take that text for their
    ``user_id``. By MERGE: its log entry compares columns, where DELETE would write the values into the log.

    Raises:
        DataError: the table would keep the rows in its files (deletion vectors), or has another schema.
        ConflictError, InfraError: as ``overwrite``.
    """
    spark, uri = keys.sparkSession, table_uri(root_uri, table)
    _check_schema_version(spark, _declared(table), uri)
    if _property(spark, uri, "delta.enableDeletionVectors") != "false":
        raise DataError(
            f"table {table} at {uri}: expected delta.enableDeletionVectors = false, under which a rewrite "
            "removes rows; set it and run REORG TABLE ... APPLY (PURGE)"
        )
    mark = f"{run_id} {uuid.uuid4().hex[:8]}"
    same = " AND ".join(f"kept.{name} = gone.{name}" for name in keys.columns if name != replacement)
    merge = DeltaTable.forPath(spark, uri).alias("kept").merge(keys.alias("gone"), same)
    if replacement is None:
        merge, metric = merge.whenMatchedDelete(), "numTargetRowsDeleted"
    else:
        new_id: dict[str, str | Column] = {"user_id": F.col(f"gone.{replacement}")}
        merge, metric = merge.whenMatchedUpdate(set=new_id), "numTargetRowsUpdated"
    spark.conf.set(_USER_METADATA, mark)
    try:
        changed = retries.repeated(
            merge.execute, lambda: _rows_committed(spark, uri, mark, metric), table, "all of it"
        )
    finally:
        spark.conf.unset(_USER_METADATA)
    if changed is not None:
        return changed
    return _rows_committed(spark, uri, mark, metric) or 0


def exists(spark: SparkSession, root_uri: str, table: str) -> bool:
    """Whether the table has been created; starts no Spark job.

    Raises:
        InfraError: the object store refused the look.
    """
    return _is_created(spark, table, table_uri(root_uri, table))


def _is_created(spark: SparkSession, table: str, uri: str) -> bool:
    try:
        return bool(DeltaTable.isDeltaTable(spark, uri))
    except failures.SPARK_ERRORS as error:
        raise failures.read_error(error, table, uri) from error


def version(spark: SparkSession, root_uri: str, table: str) -> int | None:
    """The newest version of a table, or None where it does not exist."""
    uri = table_uri(root_uri, table)
    if not _is_created(spark, table, uri):
        return None
    return int(DeltaTable.forPath(spark, uri).history(1).select("version").collect()[0][0])


def snapshot_files(frame: DataFrame) -> dict[str, int]:
    """Files of a frame read by ``read``, each with the rows that the frame's filters keep in it.

    What Petastorm may open: never a directory listing, which would bring replaced rows back.
    """
    rows = frame.groupBy(F.input_file_name().alias("file")).count().collect()
    return {row["file"]: int(row["count"]) for row in sorted(rows, key=lambda row: str(row["file"]))}


def content_hash(frame: DataFrame) -> str:
    """Order-free hash of a frame's rows: equal contents give equal text whatever the files."""
    columns = [
        F.to_json(F.col(name)) if isinstance(frame.schema[name].dataType, T.MapType) else F.col(name)
        for name in sorted(frame.columns)
    ]
    row_hash = F.xxhash64(*columns).cast("decimal(20,0)")
    total = frame.agg(F.count(F.lit(1)).alias("n"), F.sum(row_hash).alias("s")).collect()[0]
    return storage.sha256(f"{total['n']}|{total['s']}".encode())[:16]


def retried(run: _JobBody) -> _JobBody:
    """Let a job's ``run`` repeat its whole read-compute-write when a commit has lost its race.

    A lost race means that what the job read may be old: so nothing but all of it is repeated, at most
    ``_MAX_RUNS`` times, after a random pause. The record's fact ``lost_races`` counts.

    Raises:
        ConflictError: the last attempt lost too.
    """

    @wraps(run)
    def repeat(spark: SparkSession, job: Any) -> None:
        for attempt in range(1, _MAX_RUNS + 1):
            try:
                return run(spark, job)
            except CommitConflictError as error:
                job.facts["lost_races"] = attempt
                if attempt == _MAX_RUNS:
                    raise ConflictError(f"{error} (lost {attempt} races in a row)") from error
                log.warning("%s; attempt %d of %d follows", error, attempt + 1, _MAX_RUNS)
                time.sleep(random.uniform(0, _PAUSE_SECONDS * 2**attempt))
        return None

    return repeat


def _declared(table: str) -> declarations.Table:
    try:
        return schemas.TABLES[table]
    except KeyError as error:
        raise ConfigError(f"unknown table {table!r}; one of {', '.join(sorted(schemas.TABLES))}") from error


def _date_column(declared: declarations.Table) -> str:
    if declared.date_column is None:
        raise ConfigError(f"table {declared.name} has no date column; read it without dates")
    return declared.date_column


def predicate(declared: declarations.Table, dates: DateRange | None, equals: dict[str, str]) -> str:
    """The SQL condition that names a range, the one place where it is written.

    Raises:
        ConfigError: a value that could end the literal, or neither dates nor values.
    """
    parts = []
    if dates is not None:
        column = _date_column(declared)
        parts += [f"{column} >= DATE '{_iso(dates.start)}'", f"{column} < DATE '{_iso(dates.end)}'"]
    for name, value in sorted(equals.items()):
        if name not in declared.column_names or not _SAFE_VALUE.fullmatch(value):
            raise ConfigError(
                f"table {declared.name}: {name} = {value!r} cannot name a range; use letters, digits, _.:-"
            )
        parts.append(f"{name} = '{value}'")
    if not parts:
        raise ConfigError(f"table {declared.name}: a write needs a date range or a key value")
    return " AND ".join(parts)


def _iso(day: date) -> str:
    return day.isoformat()


def _conform(frame: DataFrame, declared: declarations.Table) -> DataFrame:
    expected = struct_type(declared.columns)
    for column, wanted in zip(declared.columns, expected.fields, strict=True):
        if column.name not in frame.columns:
            raise DataError(
                f"column {column.name} of table {declared.name} is not among the rows to write; fix its job"
            )
        found = frame.schema[column.name].dataType
        if found.simpleString() != wanted.dataType.simpleString():
            raise DataError(
                f"column {column.name} of table {declared.name}: expected {wanted.dataType.simpleString()}, "
                f"found {found.simpleString()}; cast it in the job that builds it"
            )
    checked = [
        F.when(F.col(c.name).isNull(), F.raise_error(F.lit(f"null in {declared.name}.{c.name}")))
        .otherwise(F.col(c.name))
        .alias(c.name)
        if not c.nullable
        else F.col(c.name)
        for c in declared.columns
    ]
    return frame.select(*checked)


def _check_schema_version(spark: SparkSession, declared: declarations.Table, uri: str) -> None:
    """Refuse a table that older or newer code has laid out, or whose log cannot be read.

    Off the snapshot that the read has just loaded: ``detail()`` says the same after seconds of Spark jobs.
    """
    try:
        version = _property(spark, uri, VERSION_PROPERTY)
    except failures.SPARK_ERRORS as error:
        raise failures.read_error(error, declared.name, uri) from error
    if version != str(schemas.SCHEMA_VERSION):
        raise DataError(
            f"table {declared.name} at {uri} has schema version {version}, this code knows "
            f"{schemas.SCHEMA_VERSION}; run `couponflow maintain --migrate` if it is older, else use the "
            "code that wrote it"
        )


def _property(spark: SparkSession, uri: str, name: str) -> str:
    """A property of the snapshot that this process has loaded last; "none" where it is not set."""
    jvm: Any = spark._jvm
    log = jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, uri)
    found = log.unsafeVolatileSnapshot().metadata().configuration().get(name)
    return str(found.get()) if found.isDefined() else "none"


def _create_if_absent(spark: SparkSession, declared: declarations.Table, uri: str) -> None:
    if _is_created(spark, declared.name, uri):
        _check_schema_version(spark, declared, uri)
        return
    # Statistics only where they skip files: min/max of user ids would keep a person's id in the log.
    statistics = [*([declared.date_column] if declared.date_column else []), *declared.statistics]
    builder = (
        DeltaTable.createIfNotExists(spark)
        .location(uri)
        .addColumns(struct_type(declared.columns))
        .comment(f"One row per {declared.grain}; key {', '.join(declared.key)}")
        .property("delta.enableDeletionVectors", "false")  # Petastorm would read deleted rows
        .property(
            "delta.dataSkippingStatsColumns",
            ",".join(dict.fromkeys(s for s in statistics if s not in declared.partition)),
        )
        .property(VERSION_PROPERTY, str(schemas.SCHEMA_VERSION))
    )
    if declared.partition:
        builder = builder.partitionedBy(*declared.partition)
    # Where it is there in spite of an error, another run has created it at the same moment.
    retries.repeated(
        builder.execute, lambda: _is_created(spark, declared.name, uri) or None, declared.name, "creation"
    )


def _rows_committed(spark: SparkSession, uri: str, mark: str, metric: str = "numOutputRows") -> int | None:
    """Rows of our own commit, which other writers' commits may have followed; None where there is none.

    Delta makes no commit when there is nothing to remove and nothing to add: then no row was written.
    """
    try:
        history = (
            DeltaTable.forPath(spark, uri).history(20).select("userMetadata", "operationMetrics").collect()
        )
    except failures.SPARK_ERRORS as error:
        where = f"table at {uri}"
        ours = failures.store_error(error, where) or failures.damage(error, where)
        reason = failures.first_line(error)
        raise ours or InfraError(
            f"{where}: cannot tell whether the write was committed ({reason}); run again"
        ) from error
    marked = [row["operationMetrics"] for row in history if row["userMetadata"] == mark]
    if not marked:
        return None
    metering.wrote(int(marked[0].get("numOutputBytes") or marked[0].get("numTargetBytesAdded") or 0))
    return int(marked[0].get(metric, 0))
