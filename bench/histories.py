"""Histories against what is usual and against what Spark itself needs; scaling, memory and skew.

The job of both sides: read the eight columns of ``bench.data`` from Parquet, drop what happened or was
delivered at or after the cut-off, drop copies of an event, and give each user the last 100 events as item,
category, shop, event type and age in minutes, oldest first. Sessions are another stage's job here, so the
rival's lag and running sum are left out, which makes the rival faster. Copies come at one time, and ours
drops them in passing; a delivery at another time is settled at the read door, before both sides. Before
anything is timed, both sides' contents are compared. The output goes nowhere (``noop``).

Runs as a program for the claim that needs a heap of its own: ``python -m bench.histories 1g``.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from bench import cpu, data
from bench.run import Action, Claim, Direction, in_turns, median_ratio
from couponflow.lake import layouts, session, tables
from couponflow.sections import EventsConfig, SparkConfig
from couponflow.sequences import histories, robots, sessions

if TYPE_CHECKING:
    import pyarrow as pa

CLAIMS = (
    "history_vs_naive_spark",
    "history_fast_vs_naive_spark",
    "history_vs_spark_floor",
    "history_fast_vs_spark_floor",
    "history_scaling",
    "history_1g",
    "skew_50k_user",
    "skew_1m_user",
)
NUM_EVENTS, LENGTH, RUNS = 5_000_000, 100, 3
WHALE = 1_000_000
_IDS = [f"{name}_index" for name in layouts.HISTORY_FIELDS[:-1]]
_NAIVE = "dropDuplicates, row_number, collect_list"
_FLOOR = "repartition and sortWithinPartitions by user and time, nothing else"


def read(spark: SparkSession, size: data.Size) -> tuple[DataFrame, DataFrame]:
    """Events and population (every user at the end of the data) of a size, both from Parquet."""
    folder = data.events(size)
    users = folder.with_name(f"{folder.name}-users")
    events = spark.read.parquet(str(folder))
    if not (users / "_SUCCESS").exists():
        as_of, as_of_date = F.lit(data.END).alias("as_of"), F.to_date(F.lit(data.END)).alias("as_of_date")
        asked = events.select("user_id").distinct().select("user_id", as_of, as_of_date)
        asked.write.mode("overwrite").parquet(str(users))
    return events, spark.read.parquet(str(users))


def naive(events: DataFrame) -> DataFrame:
    """What most Spark code does: filter, de-duplicate, rank, collect and sort a list per user."""
    as_of = F.lit(data.END)
    newest = Window.partitionBy("user_id").orderBy(F.desc("event_time"), F.desc("event_id"))
    return (
        events.where((F.col("event_time") < as_of) & (F.col("ingest_time") < as_of))
        .dropDuplicates(["event_id"])
        .withColumn("place", F.row_number().over(newest))
        .where(F.col("place") <= LENGTH)
        .groupBy("user_id")
        .agg(F.sort_array(F.collect_list(F.struct("event_time", "event_id", *_IDS))).alias("events"))
        .select(
            "user_id",
            *[F.col(f"events.{name}").alias(name) for name in _IDS],
            F.transform("events", lambda e: _age(as_of, e["event_time"])).alias("age_minutes"),
        )
    )


def _age(as_of: Column, time_: Column) -> Column:
    micros = F.unix_micros(as_of) - F.unix_micros(time_)
    return F.floor(micros / F.lit(60_000_000)).cast("int")


def floor(events: DataFrame) -> DataFrame:
    """What any method by user and time has to do."""
    return events.repartition("user_id").sortWithinPartitions("user_id", "event_time", "event_id")


def as_rows(naive_lists: DataFrame) -> DataFrame:
    """The rival's lists as one list of numbers per user, event by event."""
    zipped = F.arrays_zip(*[F.col(name) for name in [*_IDS, "age_minutes"]])
    each = F.transform(zipped, lambda e: F.array(*[e[name] for name in [*_IDS, "age_minutes"]]))
    return naive_lists.select("user_id", F.flatten(each).alias("numbers"))


def unpacked(packed: DataFrame) -> DataFrame:
    """Our packed bytes as one list of numbers per user with events."""

    def lists(batches: "Iterable[pa.RecordBatch]") -> "Iterable[pa.RecordBatch]":
        import numpy as np
        import pyarrow as pa

        for batch in batches:
            raw = batch.column("history").to_pylist()
            offsets = np.cumsum([0, *[len(value) // 4 for value in raw]]).astype(np.int32)
            numbers = pa.array(np.frombuffer(b"".join(raw), dtype="<i4"))
            values = pa.ListArray.from_arrays(pa.array(offsets), numbers)
            yield pa.RecordBatch.from_arrays([batch.column("user_id"), values], ["user_id", "numbers"])

    kept = packed.where(F.col("length") > 0).select("user_id", "history")
    return kept.mapInArrow(lists, "user_id string, numbers array<int>")


def _discard(frame: DataFrame) -> None:
    frame.write.format("noop").mode("overwrite").save()


def _method(events: DataFrame, population: DataFrame, method: str) -> Action:
    return lambda: _discard(histories.build(events, population, LENGTH, method))


def check_equal(events: DataFrame, population: DataFrame) -> None:
    """Refuse to time sides that do not give the same content."""
    expected = tables.content_hash(as_rows(naive(events)))
    for method in ("window", "numpy"):
        found = tables.content_hash(unpacked(histories.build(events, population, LENGTH, method)))
        assert found == expected, f"method {method} and the naive way differ in content"


def against_rivals(spark: SparkSession, names: tuple[str, ...], num_events: int) -> list[Claim]:
    """The four ratios out of the same rounds; only the sides that are asked for run."""
    events, population = read(spark, data.Size(num_events))
    check_equal(events, population)
    plan: dict[str, tuple[str, str, float, Direction, str]] = {
        "history_vs_naive_spark": ("naive", "window", 2.0, "at_least", _NAIVE),
        "history_fast_vs_naive_spark": ("naive", "numpy", 2.5, "at_least", _NAIVE),
        "history_vs_spark_floor": ("window", "floor", 2.5, "at_most", _FLOOR),
        "history_fast_vs_spark_floor": ("numpy", "floor", 1.8, "at_most", _FLOOR),
    }
    actions: dict[str, Action] = {
        "naive": lambda: _discard(naive(events)),
        "floor": lambda: _discard(floor(events)),
        "window": _method(events, population, "window"),
        "numpy": _method(events, population, "numpy"),
    }
    needed = {side for name in names for side in plan[name][:2]}
    rounds = in_turns({side: action for side, action in actions.items() if side in needed}, RUNS)
    claims = []
    for name in names:
        above, below, bound, direction, rival = plan[name]
        unit = "x faster" if direction == "at_least" else "x its time"
        value = median_ratio(rounds, above, below)
        claims.append(Claim(name, value, unit, bound, RUNS, rival, direction))
    return claims


def scaling(spark: SparkSession, num_events: int) -> Claim:
    """CPU seconds of four times the events over those of the events, of the process tree."""
    small, large = (_method(*read(spark, data.Size(n)), "window") for n in (num_events, 4 * num_events))
    rounds = in_turns({"small": small, "large": large}, RUNS, cpu.seconds)
    value = median_ratio(rounds, "large", "small")
    return Claim("history_scaling", value, "x CPU seconds", 5.5, RUNS, "a quarter of the events", "at_most")


def in_1g(num_events: int) -> Claim:
    """Whether the default method passes in a heap of 1 GB, in a process of its own."""
    command = [sys.executable, "-m", "bench.histories", "1g", str(num_events)]
    passed = subprocess.run(command, cwd=data.FOLDER.parents[1], capture_output=True).returncode == 0
    return Claim("history_1g", float(passed), "passes", 1.0, 1, "driver heap of 1 GB")


def _pass_in_1g(num_events: int) -> None:
    spark = session.start(SparkConfig(driver_memory="1g"), "bench 1g")
    jvm = spark._jvm
    assert jvm is not None
    heap = jvm.java.lang.Runtime.getRuntime().maxMemory()
    assert heap <= 2**30, f"the heap is {heap} bytes"
    events, population = read(spark, data.Size(num_events))
    found = histories.build(events, population, LENGTH)
    sums = found.agg(F.count(F.lit(1)), F.sum("length")).collect()[0]
    assert sums[0] == population.count(), "a user is lost"
    assert sums[1] > 0


def skew_50k(spark: SparkSession) -> Claim:
    """Seconds of user days, segments and histories of 200,000 events, a quarter of them of one user."""
    events, population = read(spark, data.Size(200_000))
    kinds = F.array(*[F.lit(kind) for kind in layouts.EVENT_TYPES])
    day = F.to_date("event_time")
    full = events.dropDuplicates(["event_id"]).select(
        "*",
        F.element_at(kinds, F.col("event_type_index") - 1).alias("event_type"),
        day.alias("event_date"),
        F.to_date("ingest_time").alias("ingest_date"),
        F.col("item_index").cast("string").alias("item_id"),
        F.col("category_index").cast("string").alias("category_id"),
        F.lit(1.5).alias("price"),
        F.lit("phone").alias("device"),
        F.lit("site").alias("channel"),
        F.lit(False).alias("is_automated"),
    )

    def run() -> None:
        _discard(robots.build_user_days(full, "UTC", EventsConfig()))
        _discard(sessions.build_segments(full, 30))
        _discard(histories.build(events, population, LENGTH))

    seconds = statistics.median(round_["all"] for round_ in in_turns({"all": run}, RUNS))
    return Claim("skew_50k_user", seconds, "s", 10.0, RUNS, "user days, segments and histories", "at_most")


def skew_1m(spark: SparkSession, num_events: int, whale: int) -> Claim:
    """Time with one huge user more over time without."""
    without = _method(*read(spark, data.Size(num_events)), "window")
    with_whale = _method(*read(spark, data.Size(num_events, whale)), "window")
    rounds = in_turns({"without": without, "with": with_whale}, RUNS)
    value = median_ratio(rounds, "with", "without")
    return Claim("skew_1m_user", value, "x its time", 1.3, RUNS, "the set without the user", "at_most")


def measure(names: tuple[str, ...], num_events: int = NUM_EVENTS) -> list[Claim]:
    """The claims asked for; one Spark session for all but the one with a heap of its own."""
    data.events(data.Size(num_events))
    claims = [in_1g(num_events)] if "history_1g" in names else []
    spark = session.start(SparkConfig(), "bench")
    if ratios := tuple(name for name in CLAIMS[:4] if name in names):
        claims += against_rivals(spark, ratios, num_events)
    single: dict[str, Callable[[], Claim]] = {
        "history_scaling": lambda: scaling(spark, num_events),
        "skew_50k_user": lambda: skew_50k(spark),
        "skew_1m_user": lambda: skew_1m(spark, num_events, WHALE * num_events // NUM_EVENTS),
    }
    return claims + [action() for name, action in single.items() if name in names]


if __name__ == "__main__":
    _pass_in_1g(int(sys.argv[2]))
