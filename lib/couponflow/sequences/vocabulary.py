"""Vocabularies: which index stands for which item, category, shop and event type.

A version is a pure function of the stated range of event dates, the smallest count and the events; its name
is a hash of its contents. Index 0 is padding and is never issued, 1 stands for every value without an index.
The pointer ``vocabularies/current.json`` names the version that ``build_examples`` uses.
"""

import json
from dataclasses import asdict, dataclass

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.errors import DataError
from couponflow.lake import layouts, storage, tables

PAD_VALUE, OOV_VALUE = "<PAD>", "<OOV>"
#: Vocabulary field -> column of events that holds its values.
COLUMNS = {"item": "item_id", "category": "category_id", "shop": "shop_id", "event_type": "event_type"}


@dataclass(frozen=True)
class Current:
    """What the pointer says: the version in use, and what it was built from."""

    version: str
    dates: str
    fingerprint: str


def count_values(events: DataFrame) -> DataFrame:
    """Count the events that carry each value of each field.

    Grain: one row per (field, value), ``num_events`` > 0; nulls count nowhere.
    Cost: one shuffle of distinct values.
    """
    values = [
        F.struct(F.lit(field).alias("field"), F.col(column).alias("value"))
        for field, column in COLUMNS.items()
    ]
    return (
        events.select(F.explode(F.array(*values)).alias("pair"))
        .select("pair.field", "pair.value")
        .where(F.col("value").isNotNull())
        .groupBy("field", "value")
        .agg(F.count(F.lit(1)).alias("num_events"))
    )


def build(counts: DataFrame, min_count: int, dates: DateRange) -> DataFrame:
    """Build one version from the value counts of a range of event dates.

    Grain: one row per (field, value) of table ``vocabularies``; all rows carry the same version.
    Rule: items with at least ``min_count`` events, and every category and shop, get indices from 2 in
        sorted order; event types keep the fixed order of ``layouts.EVENT_TYPES``, seen or not.
    Counts: ``num_events`` of ``<OOV>`` are the events whose value got no index.
    Nulls: a missing value has no row; ``encode`` gives it OOV.
    Cost: reads ``counts`` twice (for the name and for the rows): cache it. The values of one field are
        sorted together.
    """
    spark = counts.sparkSession
    fixed = spark.createDataFrame(
        [("event_type", name, index) for index, name in enumerate(layouts.EVENT_TYPES, layouts.FIRST_INDEX)],
        "field string, value string, fixed_index int",
    )
    enough = F.when(F.col("field") == "item", F.col("num_events") >= min_count).otherwise(True)
    is_reserved = F.col("value").isin(PAD_VALUE, OOV_VALUE)
    has_index = F.when(F.col("field") == "event_type", F.col("fixed_index").isNotNull()).otherwise(
        enough & ~is_reserved
    )
    marked = (
        counts.join(F.broadcast(fixed), ["field", "value"], "full")
        .withColumn("num_events", F.coalesce("num_events", F.lit(0)))
        .withColumn("has_index", has_index)
    )
    by_value = Window.partitionBy("field").orderBy("value")
    kept = marked.where("has_index").select(
        "field",
        "value",
        F.coalesce("fixed_index", F.row_number().over(by_value) + F.lit(layouts.FIRST_INDEX - 1)).alias(
            "index"
        ),
        "num_events",
    )
    lost = marked.where(~F.col("has_index")).groupBy("field").agg(F.sum("num_events").alias("num_events"))
    reserved = spark.createDataFrame(
        [
            (field, value, index)
            for field in layouts.VOCABULARY_FIELDS
            for value, index in ((PAD_VALUE, layouts.PAD), (OOV_VALUE, layouts.OOV))
        ],
        "field string, value string, index int",
    )
    known_losses = reserved.join(F.broadcast(lost), "field", "left").select(
        "field",
        "value",
        "index",
        F.when(F.col("index") == layouts.OOV, F.coalesce("num_events", F.lit(0)))
        .otherwise(0)
        .cast("bigint")
        .alias("num_events"),
    )
    rows = kept.unionByName(known_losses)
    contents = tables.content_hash(rows.select("field", "value", "index"))
    name = "v" + storage.sha256(f"{dates}|{min_count}|{contents}".encode())[:12]
    return rows.select(F.lit(name).alias("version"), "field", "value", "index", "num_events")


def version_of(vocabulary: DataFrame) -> str:
    """The version that the rows of ``build`` carry."""
    row = vocabulary.select("version").first()
    assert row is not None, "a vocabulary holds at least PAD and OOV"
    return str(row["version"])


def oov_shares(vocabulary: DataFrame) -> dict[str, float]:
    """Share of the events of the range, per field, whose value got no index."""
    rows = (
        vocabulary.groupBy("field")
        .agg(
            F.sum("num_events").alias("all"),
            F.sum(F.when(F.col("index") == layouts.OOV, F.col("num_events"))).alias("lost"),
        )
        .collect()
    )
    return {row["field"]: row["lost"] / row["all"] if row["all"] else 0.0 for row in rows}


def sizes(vocabulary: DataFrame) -> dict[str, int]:
    """Rows an embedding of each field needs: the largest index + 1."""
    rows = vocabulary.groupBy("field").agg((F.max("index") + 1).alias("size")).collect()
    return {row["field"]: int(row["size"]) for row in rows}


def publish(root_uri: str, current: Current) -> None:
    """Point the lake at a version.

    Raises:
        ConflictError: another run moved the pointer at the same time.
    """
    uri = _pointer(root_uri)
    before = storage.read_bytes(uri) if storage.exists(uri) else None
    storage.replace(uri, json.dumps(asdict(current), sort_keys=True).encode(), before)


def current(root_uri: str) -> Current:
    """The version in use.

    Raises:
        DataError: none was published yet.
    """
    uri = _pointer(root_uri)
    if not storage.exists(uri):
        raise DataError(f"no vocabulary at {uri}; run build_vocabulary over the event dates it may see")
    return Current(**json.loads(storage.read_bytes(uri)))


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
    """Add the int column ``<field>_index`` of each field; a value without an index, and null, gives 1 (OOV).

    Grain: as given; no row is added or dropped.
    Cost: no shuffle of ``frame``; each field's map is broadcast. Do this before any shuffle: ints sort and
        travel faster than strings.
    """
    for field in fields:
        column = COLUMNS[field]
        mapping = vocabulary.where(
            (F.col("field") == field) & (F.col("index") >= layouts.FIRST_INDEX)  # PAD and OOV are no values
        ).select(F.col("value").alias(column), F.col("index").alias(f"{field}_index"))
        frame = frame.join(F.broadcast(mapping), column, "left").withColumn(
            f"{field}_index", F.coalesce(f"{field}_index", F.lit(layouts.OOV))
        )
    return frame


def _pointer(root_uri: str) -> str:
    return storage.join(root_uri, "vocabularies", "current.json")
