"""Histories of one cut-off: packed by one sort against the usual window and collect_list in Spark SQL."""

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from bench.run import Claim, ratio
from couponflow.lake import layouts, tables
from couponflow.sections import SparkConfig
from couponflow.sequences import histories

NUM_EVENTS, NUM_USERS, LENGTH, RUNS = 1_000_000, 20_000, 100, 3
_INDICES = [f"{name}_index" for name in layouts.HISTORY_FIELDS[:-1]]


def make_events(spark: SparkSession) -> DataFrame:
    """Events of users with heavy-tailed activity over 90 days, known at once; cached."""
    uniform = (F.abs(F.xxhash64("id", F.lit(1))) % 1_000_000) / 1_000_000
    seconds = F.abs(F.xxhash64("id", F.lit(2))) % (90 * 86_400)
    time = F.timestamp_seconds(F.lit(1_704_067_200) + seconds)
    events = spark.range(NUM_EVENTS).select(
        F.format_string("u%06d", F.floor(uniform * uniform * NUM_USERS)).alias("user_id"),
        F.hex(F.xxhash64("id")).alias("event_id"),
        time.alias("event_time"),
        time.alias("ingest_time"),
        *[
            (F.abs(F.xxhash64("id", F.lit(n + 3))) % 5_000 + 2).cast("int").alias(c)
            for n, c in enumerate(_INDICES)
        ],
    )
    return events.repartition(4).cache()


def usual(events: DataFrame, population: DataFrame, length: int) -> DataFrame:
    """What most Spark code does: filter, de-duplicate, rank, collect and sort a list per user."""
    newest = Window.partitionBy("user_id", "as_of").orderBy(F.desc("event_time"), F.desc("event_id"))
    row = F.struct("event_time", "event_id", *_INDICES)
    return (
        events.dropDuplicates(["event_id"])
        .join(F.broadcast(population), "user_id")
        .where((F.col("event_time") < F.col("as_of")) & (F.col("ingest_time") < F.col("as_of")))
        .withColumn("place", F.row_number().over(newest))
        .where(F.col("place") <= length)
        .groupBy("user_id", "as_of")
        .agg(F.sort_array(F.collect_list(row)).alias("history"))
        .select("user_id", "as_of", *[F.col(f"history.{name}").alias(name) for name in _INDICES])
    )


def measure() -> list[Claim]:
    """Both methods on the same cached events; the output goes nowhere."""
    spark = tables.spark_session(SparkConfig(), "bench")
    events = make_events(spark)
    as_of = F.timestamp_seconds(F.lit(1_704_067_200 + 80 * 86_400)).alias("as_of")
    population = (
        events.select("user_id").distinct().select("user_id", as_of, F.to_date(as_of).alias("as_of_date"))
    )
    population = population.cache()
    population.count()

    def run(build: "object") -> None:
        frame = (
            usual(events, population, LENGTH)
            if build is usual
            else histories.build(events, population, LENGTH)
        )
        frame.write.format("noop").mode("overwrite").save()

    value = ratio(lambda: run(usual), lambda: run(histories.build), RUNS)
    events.unpersist()
    population.unpersist()
    return [
        Claim(
            "histories: packed by one sort", value, "x faster", 1.5, RUNS, "window, row_number, collect_list"
        )
    ]
