"""One more ingest day after 33 are in, against cleaning and sessionizing all 34.

Raw JSON Lines of the events of ``bench.data`` that were delivered in its first 34 days. The full pass runs
``clean_events`` and ``sessionize`` over all of them into an empty lake; the one day runs ``clean_events`` for
the last ingest day and ``sessionize`` for the event dates that its delivery may touch, on the filled lake,
whose tables are then taken back.
Afterwards both lakes must hold the same sessions. Value: seconds of the one day over those of the full pass.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from bench import data
from bench.run import Claim
from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import layouts, schemas, session, tables
from couponflow.pipeline import load_job
from couponflow.sections import SparkConfig
from couponflow.sequences import events as event_stage

CLAIMS = ("one_day_vs_full",)
DAYS, RUNS = 34, 3
#: So many over all days of ``bench.data`` that 5 million are delivered in the first 34.
NUM_EVENTS = 5_000_000 * data.DAYS // DAYS
FIRST = data.START.date()
ALL = DateRange(FIRST, FIRST + timedelta(days=DAYS))
LAST = DateRange.day(ALL.last)


def make_raw(num_events: int) -> Path:
    """A lake root with the raw events of 34 ingest days; made once."""
    source = data.events(data.Size(num_events))
    root = source.with_name(f"{source.name}-raw-{DAYS}")
    if (root / "_SUCCESS").exists():
        return root
    rows = pads.dataset(source, format="parquet", exclude_invalid_files=True)
    for day in ALL.days():
        folder = root / "raw" / "events" / f"ingest_date={day}"
        folder.mkdir(parents=True, exist_ok=True)
        start = datetime(day.year, day.month, day.day, tzinfo=UTC)
        known = pc.field("ingest_time")
        times = [pa.scalar(t, pa.timestamp("us", tz="UTC")) for t in (start, start + timedelta(days=1))]
        table = rows.to_table(filter=(known >= times[0]) & (known < times[1]))
        with (folder / "events.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(_lines(table))
    (root / "_SUCCESS").touch()
    return root


def _lines(table: pa.Table) -> Iterator[str]:
    times = [
        pc.strftime(table.column(name), format="%Y-%m-%dT%H:%M:%SZ").to_pylist()
        for name in ("event_time", "ingest_time")
    ]
    names = ("user_id", "event_id", "item_index", "category_index", "shop_index", "event_type_index")
    columns = [table.column(name).to_pylist() for name in names]
    for user, event, item, category, shop, kind, at, known in zip(*columns, *times, strict=True):
        event_type = layouts.EVENT_TYPES[kind - 2]
        yield (
            f'{{"event_id":"{event}","user_id":"{user}","visitor_id":null,"event_type":"{event_type}",'
            f'"user_agent":null,"event_time":"{at}","ingest_time":"{known}","item_id":"i{item}","category_id":"c{category}",'
            f'"shop_id":"s{shop}","order_id":null,"price":1.5,"quantity":1,"discount_amount":0.0,'
            f'"coupon_amount":0.0,"coupon_match_amount":0.0,"device":"phone","channel":"site"}}\n'
        )


def _run(spark: SparkSession, config: Config, job: str, dates: DateRange) -> None:
    with record_run(job, config, dates) as run:
        load_job(job).run(spark, run)


def _pass(spark: SparkSession, config: Config, dates: DateRange) -> float:
    """Seconds for a range of ingest dates and the event dates that it touches."""
    start = time.perf_counter()
    _run(spark, config, "clean_events", dates)
    touched = event_stage.touched_dates(dates, config.lake.lateness_days)
    within = DateRange(max(touched.start, ALL.start), min(touched.end, ALL.end))
    _run(spark, config, "sessionize", within)
    return time.perf_counter() - start


def _lake(root: Path, name: str) -> Config:
    """A lake without tables that takes its deliveries from ``root``."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "raw").symlink_to(root / "raw")
    return load_config(None, (f"lake.root_uri='{folder}'", "events.pseudonymise=false"))


def _versions(spark: SparkSession, config: Config) -> dict[str, int]:
    root_uri = config.lake.root_uri
    found = {name: tables.version(spark, root_uri, name) for name in schemas.TABLES}
    return {name: number for name, number in found.items() if number is not None}


def _go_back(spark: SparkSession, config: Config, versions: dict[str, int]) -> None:
    """Make the tables what they were; a process that has just written them still knows their logs."""
    for name, number in versions.items():
        DeltaTable.forPath(spark, tables.table_uri(config.lake.root_uri, name)).restoreToVersion(number)


def measure(names: tuple[str, ...], num_events: int = NUM_EVENTS) -> list[Claim]:
    """Full passes and one-day passes in turns; filling 33 days and a first one-day pass are the warm-up."""
    root = make_raw(num_events)
    spark = session.start(SparkConfig(), "bench")
    daily = _lake(root, "daily")
    _pass(spark, daily, DateRange(FIRST, ALL.last))
    filled = _versions(spark, daily)
    _pass(spark, daily, LAST)
    ratios = []
    for _ in range(RUNS):
        whole = _lake(root, "whole")
        full = _pass(spark, whole, ALL)
        _go_back(spark, daily, filled)
        ratios.append(_pass(spark, daily, LAST) / full)
        expected, found = (
            tables.content_hash(tables.read(spark, config.lake.root_uri, "sessions"))
            for config in (whole, daily)
        )
        assert found == expected, "33 days and one more give other sessions than 34 days"
    for name in ("daily", "whole"):
        shutil.rmtree(root / name)
    value = statistics.median(ratios)
    rival = f"the full pass over {DAYS} days"
    return [Claim(names[0], value, "x its time", 0.1, RUNS, rival, "at_most")]
