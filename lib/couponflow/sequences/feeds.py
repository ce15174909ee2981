"""Raw feeds: find a delivery, refuse drift before any write, read it with positions, clean and publish it.

A delivery is ``<root>/raw/<feed>/ingest_date=D/*`` with files ``.jsonl``, ``.csv`` or ``.parquet``. Every row
keeps (``source_file``, ``row_number``): the file's name and the position in it, from 0. The position comes
from reading each file whole inside one task, so it never depends on splits or partitions; a file must
therefore fit a worker's memory (keep deliveries below a few hundred MB a file).
User ids become pseudonyms while a file is read: raw ids reach neither a Spark plan nor a shuffle. Records of
erased people are counted there and go no further.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import reduce
from operator import or_
from typing import Any

import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.lake import (
    contracts,
    declarations,
    literals,
    python_tasks,
    schemas,
    secret_store,
    storage,
    tables,
)
from couponflow.lake.erased import Erased
from couponflow.mappings import FeedMapping, FeedsConfig
from couponflow.sections import EventsConfig
from couponflow.sequences import records
from couponflow.sequences.records import PseudonymKey, RawFile

MIN_KEY_BYTES = 16
_TASKS_PER_CORE = 4
_BATCH_ROWS = 20_000
#: Raw bytes that one task de-duplicates, and the most tasks (so files per date) for one day's delivery.
_TASK_BYTES = 16 << 20
_MAX_SPREAD = 64


@dataclass(frozen=True)
class Delivery:
    """Files of one feed and range, oldest day first, and the undeclared columns seen in them."""

    feed: str
    files: tuple[RawFile, ...]
    new_columns: tuple[str, ...] = ()
    mapping: FeedMapping = records.AS_DECLARED


def load_key(config: EventsConfig) -> PseudonymKey | None:
    """Read the pseudonym key named by the config, or None where pseudonyms are switched off.

    Raises:
        ConfigError: the variable is unset, there is no such secret, or its text is too short to be a key.
        InfraError: the secret cannot be read.
    """
    if not config.pseudonymise:
        return None
    if config.key_secret:
        place, secret = f"secret {config.key_secret}", secret_store.read(config.key_secret)
    else:
        place = f"environment variable {config.key_variable}"
        secret = os.environ.get(config.key_variable, "").encode()
    if len(secret) < MIN_KEY_BYTES:
        raise ConfigError(
            f"{place} holds no pseudonym key of at least {MIN_KEY_BYTES} characters; set it, name a secret "
            "in events.key_secret, or set events.pseudonymise = false for public data"
        )
    return PseudonymKey(config.key_version, secret)


def find_delivery(
    root_uri: str,
    feed: str,
    dates: DateRange,
    closed_days: tuple[date, ...],
    mapping: FeedMapping = records.AS_DECLARED,
) -> Delivery:
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
        sizes = storage.list_sizes(folder)
        names = sorted(name for name in sizes if not name.startswith((".", "_")))
        spread = min(_MAX_SPREAD, 1 + sum(sizes[name] for name in names) // _TASK_BYTES)
        files += [RawFile(day, storage.join(folder, name), name, spread) for name in names]
        if not names and contracts.FEEDS[feed].daily and day not in closed_days:
            missing.append(day)
    if missing:
        raise DataError(
            f"feed {feed} has no delivery for {', '.join(map(str, missing[:5]))} ({len(missing)} days "
            f"missing in {dates}); land raw/{feed}/ingest_date={missing[0]}, "
            "or list closed days in lake.closed_days"
        )
    for file in files:
        if file.kind not in contracts.KINDS:
            raise DataError(f"{file.uri}: unknown kind of file; deliver one of {', '.join(contracts.KINDS)}")
    with ThreadPoolExecutor(8) as pool:
        undeclared = set().union(*pool.map(lambda file: records.check_drift(feed, file, mapping), files))
    return Delivery(feed, tuple(files), tuple(sorted(undeclared)), mapping)


def find_other_deliveries(
    root_uri: str, dates: DateRange, closed_days: tuple[date, ...], mappings: FeedsConfig
) -> list[Delivery]:
    """Find the deliveries of every feed but ``events``, so that drift in one stops before any is written."""
    names = [name for name in contracts.FEEDS if name != "events"]
    return [find_delivery(root_uri, name, dates, closed_days, mappings.of(name)) for name in names]


def read_raw(
    spark: SparkSession,
    delivery: Delivery,
    key: PseudonymKey | None = None,
    erased: Erased = records.NOBODY,
) -> DataFrame:
    """Read a delivery: one row per delivered record, nothing dropped.

    Grain: one delivered record. Key: (``ingest_date``, ``source_file``, ``row_number``).
    Columns: those of ``contracts.FEEDS`` in their declared types, and ``records.ORIGIN``: the key,
        ``_corrupt`` (the record is no JSON object, or a field has another type; that field is null),
        ``_erased`` (a person on the do-not-ingest list; all fields are null). An unreadable time is null and
        not corrupt. Times without an offset are UTC.
    Cost: each file is read once, by one task; lazy, so every action reads again unless persisted.
    """
    columns = (*contracts.FEEDS[delivery.feed].columns, *records.ORIGIN)
    schema = tables.struct_type(columns)
    if not delivery.files:
        return literals.frame(spark, [], schema)
    tasks = min(len(delivery.files), _TASKS_PER_CORE * spark.sparkContext.defaultParallelism)
    read = _reader(delivery, key, erased)
    return python_tasks.map_in_arrow(spark.range(0, len(delivery.files), 1, tasks), read, schema)


def _reader(
    delivery: Delivery, key: PseudonymKey | None, erased: Erased
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                file = delivery.files[number]
                content = storage.read_bytes(file.uri)
                table = records.parse_file(file, content, delivery.feed, key, delivery.mapping, erased)
                yield from table.to_batches(max_chunksize=_BATCH_ROWS)

    return read


# --- cleaning ----------------------------------------------------------------------------------------


#: Why a row is refused. Not ``reason``: the consent feed delivers a column of that name.
REFUSAL = "_refusal"


@dataclass(frozen=True)
class Cleaned:
    """A classified delivery: every raw row once.

    ``classified`` has ``REFUSAL`` (null = not refused), ``is_duplicate``, ``is_exact`` (a duplicate that
    equals the row that stays) and ``_erased``.
    """

    feed: str
    table: str
    classified: DataFrame

    @property
    def kept(self) -> DataFrame:
        """The valid rows, one per key, with every column."""
        return self.classified.where(_is_valid() & ~F.col("is_duplicate"))

    @property
    def rows(self) -> DataFrame:
        """The valid rows, one per key, in the columns of the table."""
        return self.kept.select(*schemas.TABLES[self.table].column_names)

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


def with_refusal(
    frame: DataFrame, feed: str, conditions: dict[str, Column], rules: list[tuple[str, Column]] | None = None
) -> DataFrame:
    """Add ``REFUSAL``: the first reason of the feed's contract whose condition holds, else null.

    A null condition does not hold; ``rules`` of the config come after the first reason. Erased rows are not
    refused.

    Raises:
        ValueError: the conditions are not those of the contract, which is a bug.
    """
    declared = contracts.FEEDS[feed].reasons
    if set(declared) != set(conditions):
        raise ValueError(
            f"feed {feed}: reasons {sorted(set(declared) ^ set(conditions))} are on one side only"
        )
    first, *others = [(name, conditions[name]) for name in declared]
    checks = [first, *(rules or []), *others]
    reason = F.coalesce(*[F.when(condition, F.lit(name)) for name, condition in checks])
    return frame.withColumn(REFUSAL, F.when(~F.col("_erased"), reason))


def _is_valid() -> Column:
    return F.col(REFUSAL).isNull() & ~F.col("_erased")


def spread(raw: DataFrame, key: tuple[str, ...]) -> DataFrame:
    """Bring the rows of one key and ingest date together, a large day's over several tasks.

    Adds ``_bucket``, a function of the key and of the bytes of its day's delivery, so that a small day is one
    task, and one file per date, and a large one is not.
    """
    bucket = F.pmod(F.hash(*key), F.col("_spread"))
    return raw.withColumn("_bucket", bucket).repartition("ingest_date", "_bucket")


def with_duplicates(frame: DataFrame, feed: str, key: tuple[str, ...], latest: tuple[str, ...]) -> DataFrame:
    """Add ``is_duplicate``: a valid row that is not the last of its key inside its ingest date.

    Order: ``latest``, then (``source_file``, ``row_number``); total, so the winner never depends on
    partitions. Refused and erased rows are no duplicates and hide none.
    Adds ``is_exact``: a duplicate that equals the row that stays in every delivered column but
        ``ingest_time``, which a second attempt stamps anew. The others conflict.
    Cost: one sort after ``spread``; no other shuffle.
    """
    newest = [F.col(name).desc() for name in (*latest, "source_file", "row_number")]
    copies = Window.partitionBy("ingest_date", "_bucket", _is_valid(), *key).orderBy(*newest)
    content = F.struct(*[_comparable(c) for c in contracts.FEEDS[feed].columns if c.name != "ingest_time"])
    is_copy = F.row_number().over(copies) > 1
    return (
        frame.withColumn("is_duplicate", _is_valid() & is_copy)
        .withColumn("is_exact", F.first(content).over(copies).eqNullSafe(content))
        .withColumn("is_exact", F.col("is_duplicate") & F.col("is_exact"))
    )


def _comparable(column: declarations.Column) -> Column:
    value = F.col(column.name)  # Spark compares no maps
    return F.array_sort(F.map_entries(value)).alias(column.name) if column.type.startswith("map") else value


def is_endless(*names: str) -> Column:
    """Whether a number is NaN or infinite; false where all are null."""
    ends = [F.isnan(name) | (F.abs(name) == float("inf")) for name in names]
    return reduce(or_, [F.coalesce(end, F.lit(False)) for end in ends], F.lit(False))


def is_skewed(*names: str) -> Column:
    """Whether a time lies where only a broken clock, or a wrong unit of time, can have put it."""
    years = [F.year(name).between(contracts.FIRST_YEAR, contracts.LAST_YEAR) for name in names]
    return reduce(or_, [F.coalesce(~year, F.lit(False)) for year in years], F.lit(False))


def _conditions(feed: str) -> dict[str, Column]:
    """Each reason of a feed that is not ``events``, with its condition."""
    columns = contracts.FEEDS[feed].columns
    conditions: dict[str, Column] = {}
    lost_times = []
    for column in columns:
        value = F.col(column.name)
        if column.nullable:
            continue
        if column.type in ("timestamp", "date"):
            lost_times.append(value.isNull())
        else:
            empty = value == "" if column.type == "string" else F.lit(False)
            conditions[f"missing_{column.name}"] = value.isNull() | empty
    amounts = [column.name for column in columns if column.type == "double"]
    if feed == "campaigns":
        lost_times.append(F.col("end_date") < F.col("start_date"))
    if feed == "consents":
        conditions["unknown_state"] = ~F.col("state").isin(*contracts.CONSENT_STATES)
    if feed == "orders":
        conditions["unknown_state"] = ~F.col("order_status").isin(*contracts.ORDER_STATES)
        is_ended = F.col("order_status").isin("cancelled", "returned")
        lost_times.append(F.coalesce(is_ended, F.lit(False)) & F.col("status_time").isNull())
    if feed == "costs":
        conditions["unknown_type"] = ~F.col("cost_type").isin(*contracts.COST_TYPES)
        conditions["negative_cost"] = (F.col("cost_amount") < 0) | is_endless("cost_amount")
        amounts.remove("cost_amount")
    if lost_times:
        conditions["bad_time"] = reduce(or_, [F.coalesce(lost, F.lit(False)) for lost in lost_times])
    times = [column.name for column in columns if column.type == "timestamp"]
    if times:
        conditions["clock_skew"] = is_skewed(*times)
    return conditions | {contracts.MALFORMED: F.col("_corrupt") | is_endless(*amounts)}


#: Of several deliveries of one key, what makes one the last: the order's newest status, or the consent's
#: newest change, where a denial comes after a grant of the same time. Null comes first.
_LATEST = {"orders": ("status_time",), "consents": ("updated_time", "is_denied")}


def clean_feed(raw: DataFrame, feed: str, time_zone: str) -> Cleaned:
    """Validate and de-duplicate one feed that is not ``events``.

    Grain: one raw record, see ``Cleaned``. Key of the result: the table's natural key inside one ingest
        date; of its copies the latest by ``_LATEST``, then by (``source_file``, ``row_number``) stays.
    Adds: ``send_date`` (business day of ``delivered_time``) or ``snapshot_date`` (the ingest date).
    Reasons: those of ``contracts``; a cancelled or returned order without ``status_time``, and a campaign
        that ends before it starts, are ``bad_time``; an amount that is no finite number is malformed.
    Cost: one shuffle by ingest date and key, one sort.
    """
    key = schemas.TABLES[feed].key
    own = tuple(name for name in key if name != "snapshot_date")
    frame = with_refusal(spread(raw, own), feed, _conditions(feed))
    if feed == "sends":
        local = F.from_utc_timestamp("delivered_time", time_zone)
        frame = frame.withColumn("send_date", F.to_date(local))
    if "snapshot_date" in schemas.TABLES[feed].column_names:
        frame = frame.withColumn("snapshot_date", F.col("ingest_date"))
    if feed == "consents":
        frame = frame.withColumn("is_denied", F.col("state") != "granted")
    return Cleaned(feed, feed, with_duplicates(frame, feed, own, _LATEST.get(feed, ())))


def publish(
    cleaned: Cleaned,
    root_uri: str,
    dates: DateRange,
    run_id: str,
    more: Callable[[Cleaned], dict[str, DataFrame]] = lambda cleaned: {},
) -> dict[str, int]:
    """Replace a range of the feed's table and of its quarantine; returns the counts.

    The delivery is parsed once: classified rows are persisted for all passes and released. ``more`` names
    further tables that are a function of the same rows.
    Counts: ``raw_rows``, the table's name, ``duplicates`` (``duplicates_exact`` and
    ``duplicates_conflicting``), ``erased``, ``quarantine``, ``quarantine_<reason>``, and the further tables.

    Raises:
        DataError: rows in are not rows written + duplicates + quarantined + erased.
    """
    classified = cleaned.classified.persist(StorageLevel.MEMORY_AND_DISK)
    try:
        groups = classified.groupBy(REFUSAL, "is_duplicate", "is_exact", "_erased").count().collect()
        refused: dict[str, int] = {}
        for group in groups:
            if group[REFUSAL] is not None:
                refused[group[REFUSAL]] = refused.get(group[REFUSAL], 0) + int(group["count"])
        exact = sum(int(g["count"]) for g in groups if g["is_exact"])
        duplicates = sum(int(g["count"]) for g in groups if g["is_duplicate"])
        erased = sum(int(g["count"]) for g in groups if g["_erased"])
        raw_rows = sum(int(g["count"]) for g in groups)
        written = tables.overwrite(cleaned.rows, root_uri, cleaned.table, dates, run_id)
        quarantined = _replace_quarantine(cleaned, sum(refused.values()), root_uri, dates, run_id)
        further = {
            table: _replace_unless_empty(frame, root_uri, table, dates, run_id)
            for table, frame in more(cleaned).items()
        }
    finally:
        classified.unpersist()
    if raw_rows != written + duplicates + quarantined + erased:
        raise DataError(
            f"feed {cleaned.feed}, range {dates}: {raw_rows} rows in are not {written} written + "
            f"{duplicates} duplicates + {quarantined} quarantined + {erased} erased; the delivery changed "
            "meanwhile, run again"
        )
    counts = {
        "raw_rows": raw_rows,
        cleaned.table: written,
        "duplicates": duplicates,
        "duplicates_exact": exact,
        "duplicates_conflicting": duplicates - exact,
        "erased": erased,
        "quarantine": quarantined,
    }
    return counts | {f"quarantine_{reason}": refused[reason] for reason in sorted(refused)} | further


def _replace_quarantine(cleaned: Cleaned, size: int, root_uri: str, dates: DateRange, run_id: str) -> int:
    """Write the refused rows; nothing is written where there are none and the range holds none."""
    spark = cleaned.classified.sparkSession
    if size == 0 and tables.exists(spark, root_uri, "quarantine"):
        old = tables.read(spark, root_uri, "quarantine", dates).where(F.col("feed") == cleaned.feed)
        if not old.take(1):
            return 0
    frame = cleaned.quarantine.repartition("ingest_date")
    return tables.overwrite(frame, root_uri, "quarantine", dates, run_id, feed=cleaned.feed)


def _replace_unless_empty(frame: DataFrame, root_uri: str, table: str, dates: DateRange, run_id: str) -> int:
    """Write a range of a further table; nothing where there are no rows and the range holds none."""
    spark = frame.sparkSession
    if not frame.take(1):
        is_held = tables.exists(spark, root_uri, table) and tables.read(spark, root_uri, table, dates).take(1)
        if not is_held:
            return 0
    return tables.overwrite(frame, root_uri, table, dates, run_id)


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
