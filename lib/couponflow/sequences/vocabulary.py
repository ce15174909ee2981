"""Vocabularies: which index stands for which item, category, shop and event type.

A version is a pure function of its parent, the stated range of event dates, the smallest count and the events
that were known when the range ended; its name is a hash of its contents. Index 0 is padding and is never
issued, 1 stands for every value without an index. Items may have hash buckets: they lie at the fixed places
2 .. n + 1, before all real values, so that an extension never moves them.

The pointer ``vocabularies/current.json`` names the version that ``build_examples`` uses by default;
``vocabularies/<version>.json`` keeps what each version was built from.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts, literals, storage, tables
from couponflow.sections import VocabularyConfig
from couponflow.sequences import events

PAD_VALUE, OOV_VALUE, BUCKET_VALUE = "<PAD>", "<OOV>", "<BUCKET "
#: Vocabulary field -> column of events that holds its values.
COLUMNS = {"item": "item_id", "category": "category_id", "shop": "shop_id", "event_type": "event_type"}
#: The field whose rare values may share buckets, and those whose OOV share is limited.
BUCKETED = "item"
LIMITED = ("item", "category", "shop")
CURRENT = "current"


@dataclass(frozen=True)
class Current:
    """A published version: what it was built from, and the version it extends ('' = none)."""

    version: str
    dates: str
    fingerprint: str
    parent: str = ""


def read_known(spark: SparkSession, root_uri: str, dates: DateRange) -> DataFrame:
    """Events of a range as they were known when its last day ended; a later delivery changes no version.

    Raises:
        DataError: a table is missing.
    """
    return events.read_events(spark, root_uri, dates).where(F.col("ingest_date") < F.lit(dates.end))


def count_values(frame: DataFrame) -> DataFrame:
    """Count the events that carry each value of each field.

    Grain: one row per (field, value), ``num_events`` > 0; nulls count nowhere.
    Cost: one shuffle of distinct values.
    """
    values = [
        F.struct(F.lit(field).alias("field"), F.col(column).alias("value"))
        for field, column in COLUMNS.items()
    ]
    return (
        frame.select(F.explode(F.array(*values)).alias("pair"))
        .select("pair.field", "pair.value")
        .where(F.col("value").isNotNull())
        .groupBy("field", "value")
        .agg(F.count(F.lit(1)).alias("num_events"))
    )


def build(
    counts: DataFrame,
    min_count: int,
    dates: DateRange,
    hash_buckets: int = 0,
    parent: DataFrame | None = None,
) -> DataFrame:
    """Build one version from the value counts of a range of event dates.

    Grain: one row per (field, value) of table ``vocabularies``; all rows carry the same version.
    Rule: items with at least ``min_count`` events, and every category and shop, get indices in sorted order
        from the first free one; event types keep the fixed order of ``layouts.EVENT_TYPES``, seen or not.
        With a ``parent`` (the rows of a version) its values keep their indices and the others follow.
    Counts: ``num_events`` are events of this range. Those of ``<OOV>`` and of a bucket are the events whose
        value has no index of its own.
    Nulls: a missing value has no row; ``encode`` gives it OOV.
    Cost: reads ``counts`` twice (for the name and for the rows): cache it. The new values of one field are
        sorted together.

    Raises:
        ConfigError: the parent has another number of buckets; ids of items would move.
    """
    spark = counts.sparkSession
    held = _reserved(spark, hash_buckets)
    if parent is not None:
        if (found := num_buckets(parent)) != hash_buckets:
            raise ConfigError(
                f"vocabulary.hash_buckets = {hash_buckets}: expected {found} as in the version to extend; "
                "set it so, or set vocabulary.extend=false to build a new one"
            )
        held = parent.select("field", "value", "index")
    first = held.groupBy("field").agg((F.max("index") + 1).alias("first_free"))
    marked = (
        counts.join(held, ["field", "value"], "full")
        .withColumn("num_events", F.coalesce("num_events", F.lit(0)))
        .withColumn("is_reserved", _is_reserved())
    )
    enough = F.when(F.col("field") == BUCKETED, F.col("num_events") >= min_count)
    enough = enough.when(F.col("field") == "event_type", False).otherwise(True)
    is_new = F.col("index").isNull() & enough
    by_value = Window.partitionBy("field").orderBy("value")
    kept = marked.where(F.col("index").isNotNull() & ~F.col("is_reserved"))
    new = (
        marked.where(is_new & ~F.col("is_reserved"))
        .join(F.broadcast(first), "field")
        .withColumn("index", F.row_number().over(by_value) + F.col("first_free") - 1)
    )
    # A delivered value that looks like a reserved one has no index of its own either.
    lost = (
        marked.where((F.col("index").isNull() & ~enough) | F.col("is_reserved"))
        .withColumn("index", _shared_index(F.col("value"), F.col("field") == BUCKETED, hash_buckets))
        .groupBy("field", "index")
        .agg(F.sum("num_events").alias("num_events"))
    )
    reserved = (
        _reserved(spark, hash_buckets)
        .where(_is_reserved())
        .join(F.broadcast(lost), ["field", "index"], "left")
        .withColumn("num_events", F.coalesce("num_events", F.lit(0).cast("bigint")))
    )
    names = ["field", "value", "index", "num_events"]
    rows = kept.select(*names).unionByName(new.select(*names)).unionByName(reserved.select(*names))
    contents = tables.content_hash(rows.select("field", "value", "index"))
    origin = f"{version_of(parent)}|" if parent is not None else ""
    name = "v" + storage.sha256(f"{origin}{dates}|{min_count}|{contents}".encode())[:12]
    return rows.select(F.lit(name).alias("version"), *names)


def _reserved(spark: SparkSession, hash_buckets: int) -> DataFrame:
    """What every version holds before any event is read: PAD, OOV, buckets and the event types."""
    rows = [
        (field, value, index)
        for field in layouts.VOCABULARY_FIELDS
        for value, index in ((PAD_VALUE, layouts.PAD), (OOV_VALUE, layouts.OOV))
    ]
    rows += [(BUCKETED, f"{BUCKET_VALUE}{n}>", layouts.FIRST_INDEX + n) for n in range(hash_buckets)]
    rows += [("event_type", name, n) for n, name in enumerate(layouts.EVENT_TYPES, layouts.FIRST_INDEX)]
    return literals.frame(spark, rows, "field string, value string, index int")


def _is_reserved() -> Column:
    return F.col("value").isin(PAD_VALUE, OOV_VALUE) | F.col("value").startswith(BUCKET_VALUE)


def _shared_index(value: Column, has_buckets: Column, hash_buckets: int) -> Column:
    """The index of a value without one of its own: its bucket (xxhash64, seed 42), else OOV; null is OOV."""
    if not hash_buckets:
        return F.lit(layouts.OOV)
    bucket = F.pmod(F.xxhash64(value), F.lit(hash_buckets)).cast("int") + layouts.FIRST_INDEX
    return F.when(has_buckets & value.isNotNull(), bucket).otherwise(layouts.OOV)


def num_buckets(vocabulary: DataFrame) -> int:
    """Hash buckets of a version; a small job."""
    is_bucket = (F.col("field") == BUCKETED) & F.col("value").startswith(BUCKET_VALUE)
    return vocabulary.where(is_bucket).count()


def version_of(vocabulary: DataFrame) -> str:
    """The version that the rows of ``build`` carry."""
    row = vocabulary.select("version").first()
    assert row is not None, "a vocabulary holds at least PAD and OOV"
    return str(row["version"])


def oov_shares(vocabulary: DataFrame) -> dict[str, float]:
    """Share of the events of the range, per field, whose value is OOV; values in buckets are not."""
    rows = (
        vocabulary.groupBy("field")
        .agg(
            F.sum("num_events").alias("all"),
            F.sum(F.when(F.col("index") == layouts.OOV, F.col("num_events"))).alias("lost"),
        )
        .collect()
    )
    return {row["field"]: row["lost"] / row["all"] if row["all"] else 0.0 for row in rows}


def encoded_oov_shares(encoded: DataFrame) -> dict[str, float]:
    """Share of the values that encoded events name, per field, that are OOV; 0 where none names one."""
    is_oov = [
        F.avg(
            F.when(F.col(column).isNotNull(), (F.col(f"{field}_index") == layouts.OOV).cast("double"))
        ).alias(field)
        for field, column in COLUMNS.items()
    ]
    row = encoded.agg(*is_oov).collect()[0].asDict()
    return {field: float(share or 0.0) for field, share in row.items()}


def check_oov_shares(shares: dict[str, float], max_share: float, version: str) -> None:
    """Refuse a vocabulary that no longer fits the events.

    Raises:
        DataError: naming the field with the largest share above the limit.
    """
    worst = max(LIMITED, key=lambda field: shares.get(field, 0.0))
    if shares.get(worst, 0.0) > max_share:
        raise DataError(
            f"vocabulary {version}, field {worst}: {shares[worst]:.1%} of the values read are OOV, expected "
            f"at most vocabulary.max_oov_share = {max_share:.1%}; run build_vocabulary over newer dates, or "
            "lower vocabulary.min_count, or set vocabulary.hash_buckets"
        )


def sizes(vocabulary: DataFrame) -> dict[str, int]:
    """Rows an embedding of each field needs: the largest index + 1."""
    rows = vocabulary.groupBy("field").agg((F.max("index") + 1).alias("size")).collect()
    return {row["field"]: int(row["size"]) for row in rows}


@contextmanager
def making(
    spark: SparkSession, root_uri: str, dates: DateRange, config: VocabularyConfig
) -> Iterator[tuple[DataFrame, str]]:
    """Lend the rows of a range's version, whose counts are cached, and its parent ('' = none).

    Rule: with ``vocabulary.extend`` the parent is the newest published version of the current lineage whose
        range had ended when this one begins, so that a rerun extends what the first run extended.

    Raises:
        DataError: no event of the range (or, without a parent, no item with ``min_count`` events).
        ConfigError: the range lies before the lineage's end but is none of its ranges.
    """
    parent = parent_of(root_uri, dates) if config.extend else ""
    before = load(spark, root_uri, parent) if parent else None
    counts = count_values(read_known(spark, root_uri, dates)).persist()
    try:
        is_item = (F.col("field") == BUCKETED) & (F.col("num_events") >= config.min_count)
        if counts.where(F.lit(True) if parent else is_item).isEmpty():
            what = "event of that range" if parent else f"item of {config.min_count} events"
            raise DataError(
                f"vocabulary of {dates}: no {what} was found; run clean_events for these dates first"
            )
        yield build(counts, config.min_count, dates, config.hash_buckets, before), parent
    finally:
        counts.unpersist()


def parent_of(root_uri: str, dates: DateRange) -> str:
    """The version that a version of these dates extends; '' where it is the first of its lineage.

    Raises:
        ConfigError: versions exist and none of them lets this range follow.
    """
    lineage = list(_lineage(root_uri))
    for made in lineage:
        if DateRange.parse(made.dates).end <= dates.start:
            return made.version
    if not lineage or lineage[-1].dates == str(dates):
        return ""
    raise ConfigError(
        f"vocabulary range {dates}: expected one that starts after {lineage[0].dates}, the range of version "
        f"{lineage[0].version}; give later --dates, or set vocabulary.extend=false to build a new version"
    )


def _lineage(root_uri: str) -> Iterator[Current]:
    """The current version, its parent, and so on."""
    made = current(root_uri) if storage.exists(_uri(root_uri, CURRENT)) else None
    while made is not None:
        yield made
        made = described(root_uri, made.parent) if made.parent else None


def publish(root_uri: str, made: Current, run_id: str = "", extends: bool = False) -> None:
    """Describe a version and point the lake at it.

    ``extends``: leave the pointer where it is when the current version has grown out of this one; a rerun of
    an older range must not take newer ids away.

    Raises:
        ConflictError: another run moved the pointer at the same time.
    """
    content = json.dumps(asdict(made), sort_keys=True).encode()
    uri = _uri(root_uri, CURRENT)
    before = storage.read_bytes(uri) if storage.exists(uri) else None
    if not storage.exists(own := _uri(root_uri, made.version)):
        storage.create(own, content, run_id)
    older = [ancestor.version for ancestor in _lineage(root_uri)][1:] if extends else []
    if made.version not in older:
        storage.replace(uri, content, before)


def current(root_uri: str) -> Current:
    """The version in use.

    Raises:
        DataError: none was published yet.
    """
    if not storage.exists(_uri(root_uri, CURRENT)):
        raise DataError(
            f"no vocabulary at {_uri(root_uri, CURRENT)}; "
            "run build_vocabulary over the event dates it may see"
        )
    return described(root_uri, CURRENT)


def described(root_uri: str, version: str) -> Current:
    """What a version was built from.

    Raises:
        DataError: it was never published.
    """
    return Current(**json.loads(storage.read_bytes(_uri(root_uri, version))))


def resolve(root_uri: str, name: str) -> str:
    """The version that ``examples.vocabulary_version`` names.

    Raises:
        DataError: it says 'current' and none was published.
    """
    return current(root_uri).version if name == CURRENT else name


def load(spark: SparkSession, root_uri: str, version: str) -> DataFrame:
    """The rows of one version.

    Raises:
        DataError: the table does not hold that version.
    """
    rows = tables.read(spark, root_uri, "vocabularies").where(F.col("version") == version)
    if rows.isEmpty():
        raise DataError(f"table vocabularies has no version {version}; run build_vocabulary again")
    return rows


def encode(frame: DataFrame, vocabulary: DataFrame, fields: tuple[str, ...] = tuple(COLUMNS)) -> DataFrame:
    """Add the int column ``<field>_index`` of each field.

    Grain: as given; no row is added or dropped.
    Rule: a value without an index of its own gives its bucket where the version has buckets, else 1 (OOV);
        null gives 1.
    Cost: no shuffle of ``frame``; each field's map is broadcast, and a small job counts the buckets. Do this
        before any shuffle: ints sort and travel faster than strings.
    """
    for field in fields:
        column = COLUMNS[field]
        buckets = num_buckets(vocabulary) if field == BUCKETED else 0
        mapping = vocabulary.where(
            (F.col("field") == field) & (F.col("index") >= layouts.FIRST_INDEX) & ~_is_reserved()
        ).select(F.col("value").alias(column), F.col("index").alias(f"{field}_index"))
        shared = _shared_index(F.col(column), F.lit(True), buckets)
        frame = frame.join(F.broadcast(mapping), column, "left").withColumn(
            f"{field}_index", F.coalesce(f"{field}_index", shared)
        )
    return frame


def _uri(root_uri: str, name: str) -> str:
    return storage.join(root_uri, "vocabularies", f"{name}.json")
