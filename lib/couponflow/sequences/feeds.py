"""Raw feeds: find a delivery, refuse drift before any write, read it with positions, clean and publish it.

A delivery is ``<root>/raw/<feed>/ingest_date=D/*`` with files ``.jsonl``, ``.csv`` or ``.parquet``. Every row
keeps (``source_file``, ``row_number``): the file's name and the position in it, from 0. The position comes
from reading each file whole inside one task, so it never depends on splits or partitions; a file must
therefore fit a worker's memory (keep deliveries below a few hundred MB a file).
User ids become pseudonyms while a file is read: raw ids reach neither a Spark plan nor a shuffle.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.lake import contracts, schemas, storage, tables
from couponflow.sections import EventsConfig
from couponflow.sequences import records
from couponflow.sequences.records import PseudonymKey, RawFile

MIN_KEY_BYTES = 16
CONSENT_STATES = ("granted", "denied")
_TASKS_PER_CORE = 4
_BATCH_ROWS = 20_000


@dataclass(frozen=True)
class Delivery:
    """Files of one feed and range, oldest day first, and the undeclared columns seen in them."""

    feed: str
    files: tuple[RawFile, ...]
    new_columns: tuple[str, ...] = ()


def load_key(config: EventsConfig) -> PseudonymKey | None:
    """Read the pseudonym key named by the config, or None where pseudonyms are switched off.

    Raises:
        ConfigError: the variable is unset, or its text is too short to be a key.
    """
    if not config.pseudonymise:
        return None
    secret = os.environ.get(config.key_variable, "").encode()
    if len(secret) < MIN_KEY_BYTES:
        raise ConfigError(
            f"environment variable {config.key_variable} holds no pseudonym key of at least {MIN_KEY_BYTES} "
            "characters; set it from the secret store, or set events.pseudonymise = false for public data"
        )
    return PseudonymKey(config.key_version, secret)


def find_delivery(root_uri: str, feed: str, dates: DateRange, closed_days: tuple[date, ...]) -> Delivery:
    """List the files of a range and check a sample of each against the declared columns.

    A daily feed must have at least one file (it may be empty) on every day that is not closed; other
    feeds deliver when something changed. Columns that are not declared are accepted and named. A required
    column that no sampled record of a file carries, or a column of which every sampled value has another
    type, is drift. Cost: one listing per day, the first 64 KB per file; Parquet files are read whole.

    Raises:
        DataError: a day is missing, a file is of an unknown kind, or a column is missing or retyped.
    """
    files: list[RawFile] = []
    missing: list[date] = []
    for day in dates.days():
        folder = storage.join(root_uri, "raw", feed, f"ingest_date={day}")
        names = [name for name in storage.list_names(folder) if not name.startswith((".", "_"))]
        files += [RawFile(day, storage.join(folder, name), name) for name in names]
        if not names and contracts.FEEDS[feed].daily and day not in closed_days:
            missing.append(day)
    if missing:
        raise DataError(
            f"feed {feed} has no delivery for {', '.join(map(str, missing[:5]))} ({len(missing)} days "
            f"missing in {dates}); land raw/{feed}/ingest_date={missing[0]}, "
            "or list closed days in lake.closed_days"
        )
    for file in files:
        if file.kind not in records.KINDS:
            raise DataError(f"{file.uri}: unknown kind of file; deliver one of {', '.join(records.KINDS)}")
    with ThreadPoolExecutor(8) as pool:
        undeclared = set().union(*pool.map(lambda file: records.check_drift(feed, file), files))
    return Delivery(feed, tuple(files), tuple(sorted(undeclared)))


def find_other_deliveries(root_uri: str, dates: DateRange, closed_days: tuple[date, ...]) -> list[Delivery]:
    """Find the deliveries of every feed but ``events``, so that drift in one stops before any is written."""
    names = [name for name in contracts.FEEDS if name != "events"]
    return [find_delivery(root_uri, name, dates, closed_days) for name in names]


def read_raw(spark: SparkSession, delivery: Delivery, key: PseudonymKey | None = None) -> DataFrame:
    """Read a delivery: one row per delivered record, nothing dropped.

    Grain: one delivered record. Key: (``ingest_date``, ``source_file``, ``row_number``).
    Columns: those of ``contracts.FEEDS`` in their declared types, ``ingest_date``, ``source_file``,
        ``row_number``, and ``_corrupt``: the record is no JSON object, or a field has another type (that
        field is null). An unreadable time is null and not corrupt. Times without an offset are UTC.
    Cost: each file is read once, by one task; lazy, so every action reads again unless persisted.
    """
    columns = (*contracts.FEEDS[delivery.feed].columns, *records.ORIGIN)
    schema = tables.struct_type(columns)
    if not delivery.files:
        return spark.createDataFrame([], schema)
    tasks = min(len(delivery.files), _TASKS_PER_CORE * spark.sparkContext.defaultParallelism)
    read = _reader(delivery.files, delivery.feed, key)
    return spark.range(0, len(delivery.files), 1, tasks).mapInArrow(read, schema)


def _reader(
    files: tuple[RawFile, ...], feed: str, key: PseudonymKey | None
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                content = storage.read_bytes(files[number].uri)
                table = records.parse_file(files[number], content, feed, key)
                yield from table.to_batches(max_chunksize=_BATCH_ROWS)

    return read


# --- cleaning ----------------------------------------------------------------------------------------


#: Why a row is refused. Not ``reason``: the consent feed delivers a column of that name.
REFUSAL = "_refusal"


@dataclass(frozen=True)
class Cleaned:
    """A classified delivery: every raw row once, with ``REFUSAL`` (null = valid) and ``is_duplicate``."""

    feed: str
    table: str
    classified: DataFrame

    @property
    def rows(self) -> DataFrame:
        """The valid rows, one per key, in the columns of the table."""
        kept = self.classified.where(F.col(REFUSAL).isNull() & ~F.col("is_duplicate"))
        return kept.select(*schemas.TABLES[self.table].column_names)

    @property
    def quarantine(self) -> DataFrame:
        """The refused rows as the ``quarantine`` table holds them: no delivered value."""
        names = [column.name for column in contracts.FEEDS[self.feed].columns]
        delivered = F.concat_ws(",", *[F.when(F.col(n).isNotNull(), F.lit(n)) for n in names])
        return self.classified.where(F.col(REFUSAL).isNotNull()).select(
            F.lit(self.feed).alias("feed"),
            "ingest_date",
            "source_file",
            "row_number",
            F.col(REFUSAL).alias("reason"),
            delivered.alias("redacted"),
        )


def first_reason(checks: list[tuple[str, Column]]) -> Column:
    """The name of the first condition that holds, else null; a null condition does not hold."""
    return F.coalesce(*[F.when(condition, F.lit(name)) for name, condition in checks])


def with_duplicates(frame: DataFrame, key: tuple[str, ...], latest: tuple[str, ...]) -> DataFrame:
    """Add ``is_duplicate``: a valid row that is not the last of its key inside its ingest date.

    Order: ``latest``, then (``source_file``, ``row_number``); total, so the winner never depends on
    partitions. Refused rows are no duplicates and hide none.
    Cost: one sort; no shuffle when the rows are already partitioned by ``ingest_date``.
    """
    newest = [F.col(name).desc() for name in (*latest, "source_file", "row_number")]
    copies = Window.partitionBy("ingest_date", F.col(REFUSAL).isNull(), *key).orderBy(*newest)
    return frame.withColumn("is_duplicate", F.col(REFUSAL).isNull() & (F.row_number().over(copies) > 1))


def clean_feed(raw: DataFrame, feed: str, time_zone: str) -> Cleaned:
    """Validate and de-duplicate one feed that is not ``events``.

    Grain: one raw record, see ``Cleaned``. Key of the result: the table's natural key inside one ingest
        date; exact and conflicting copies are duplicates, the last (``source_file``, ``row_number``) stays.
    Adds: ``send_date`` (business day of ``delivered_time``) or ``snapshot_date`` (the ingest date).
    Reasons, the first that holds: malformed_record, missing_<column>, bad_time (a required time that is
        absent or unreadable, or a campaign that ends before it starts), unknown_state.
    Cost: one shuffle by ingest date, one sort.
    """
    declared = contracts.FEEDS[feed]
    checks = [("malformed_record", F.col("_corrupt"))]
    for column in declared.columns:
        if column.nullable:
            continue
        value = F.col(column.name)
        if column.type in ("timestamp", "date"):
            checks.append(("bad_time", value.isNull()))
        else:
            empty = value == "" if column.type == "string" else F.lit(False)
            checks.append((f"missing_{column.name}", value.isNull() | empty))
    if feed == "campaigns":
        checks.append(("bad_time", F.col("end_date") < F.col("start_date")))
    if feed == "consents":
        checks.append(("unknown_state", ~F.col("state").isin(*CONSENT_STATES)))
    frame = raw.repartition("ingest_date").withColumn(REFUSAL, first_reason(checks))
    if feed == "sends":
        local = F.from_utc_timestamp("delivered_time", time_zone)
        frame = frame.withColumn("send_date", F.to_date(local))
    key = schemas.TABLES[feed].key
    if "snapshot_date" in schemas.TABLES[feed].column_names:
        frame = frame.withColumn("snapshot_date", F.col("ingest_date"))
    own = tuple(name for name in key if name != "snapshot_date")
    # Of two consents the later change holds, and a denial before a grant of the same time.
    latest = ("updated_time", "is_denied") if feed == "consents" else ()
    if feed == "consents":
        frame = frame.withColumn("is_denied", F.col("state") != "granted")
    return Cleaned(feed, feed, with_duplicates(frame, own, latest))


def publish(cleaned: Cleaned, root_uri: str, dates: DateRange, run_id: str) -> dict[str, int]:
    """Replace a range of the feed's table and of its quarantine; returns the counts.

    The delivery is parsed once: classified rows are persisted for the three passes and released.
    Counts: ``raw_rows``, the table's name, ``duplicates``, ``quarantine``, ``quarantine_<reason>``.

    Raises:
        DataError: rows in are not rows written + duplicates + quarantined.
    """
    classified = cleaned.classified.persist(StorageLevel.MEMORY_AND_DISK)
    try:
        groups = classified.groupBy(REFUSAL, "is_duplicate").count().collect()
        refused = {str(g[REFUSAL]): int(g["count"]) for g in groups if g[REFUSAL] is not None}
        duplicates = sum(int(g["count"]) for g in groups if g["is_duplicate"])
        raw_rows = sum(int(g["count"]) for g in groups)
        written = tables.overwrite(cleaned.rows, root_uri, cleaned.table, dates, run_id)
        quarantined = _replace_quarantine(cleaned, sum(refused.values()), root_uri, dates, run_id)
    finally:
        classified.unpersist()
    if raw_rows != written + duplicates + quarantined:
        raise DataError(
            f"feed {cleaned.feed}, range {dates}: {raw_rows} rows in are not {written} written + "
            f"{duplicates} duplicates + {quarantined} quarantined; the delivery changed meanwhile, run again"
        )
    counts = {
        "raw_rows": raw_rows,
        cleaned.table: written,
        "duplicates": duplicates,
        "quarantine": quarantined,
    }
    return counts | {f"quarantine_{reason}": number for reason, number in sorted(refused.items())}


def _replace_quarantine(cleaned: Cleaned, size: int, root_uri: str, dates: DateRange, run_id: str) -> int:
    """Write the refused rows; nothing is written where there are none and the range holds none."""
    spark = cleaned.classified.sparkSession
    if size == 0 and tables.version(spark, root_uri, "quarantine") is not None:
        old = tables.read(spark, root_uri, "quarantine", dates).where(F.col("feed") == cleaned.feed)
        if not old.take(1):
            return 0
    frame = cleaned.quarantine.repartition("ingest_date")
    return tables.overwrite(frame, root_uri, "quarantine", dates, run_id, feed=cleaned.feed)


def delivery_facts(delivery: Delivery, key: PseudonymKey | None) -> dict[str, Any]:
    """What the run record keeps of a delivery."""
    return {
        "num_files": len(delivery.files),
        "new_columns": list(delivery.new_columns),
        "pseudonym_key_version": key.version if key else "off",
    }


def with_feed_name(counts: dict[str, int], feed: str) -> dict[str, int]:
    """Counts of one of several feeds: ``orders`` stays, the others become ``orders_duplicates`` and so on."""
    return {name if name == feed else f"{feed}_{name}": number for name, number in counts.items()}
