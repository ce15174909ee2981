"""One more ingest day after 33 are in, against cleaning and sessionizing all 34.

Raw JSON Lines of the events of ``bench.data`` that were delivered in its first 34 days. The full pass runs
``clean_events`` and ``sessionize`` over all of them into an empty lake; the one day runs ``clean_events`` for
the last ingest day and ``sessionize`` for the event dates that its delivery may touch, on the filled lake.
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
from pyspark.sql import SparkSession

from bench import data
from bench.run import Claim
from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import layouts, tables
from couponflow.pipeline import load_job
from couponflow.sections import SparkConfig
from couponflow.sequences import events as event_stage

CLAIMS = ("one_day_vs_full",)
NUM_EVENTS, DAYS, RUNS = 5_000_000, 34, 3
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
        yield (
            f'{{"event_id":"{event}","user_id":"{user}","event_type":"{layouts.EVENT_TYPES[kind - 2]}",'
            f'"event_time":"{at}","ingest_time":"{known}","item_id":"i{item}","category_id":"c{category}",'
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


def _emptied(root: Path) -> None:
    for name in ("tables", "runs"):
        shutil.rmtree(root / name, ignore_errors=True)


def measure(names: tuple[str, ...], num_events: int = NUM_EVENTS) -> list[Claim]:
    """Full passes and one-day passes in turns; filling 33 days and a first one-day pass are the warm-up."""
    root = make_raw(num_events)
    config = load_config(None, (f"lake.root_uri='{root}'", "events.pseudonymise=false"))
    spark = tables.spark_session(SparkConfig(), "bench")
    held = root.with_name(f"{root.name}-33-days")
    shutil.rmtree(held, ignore_errors=True)
    _emptied(root)
    _pass(spark, config, DateRange(FIRST, ALL.last))
    shutil.copytree(root / "tables", held)
    _pass(spark, config, LAST)
    ratios = []
    for _ in range(RUNS):
        _emptied(root)
        full = _pass(spark, config, ALL)
        expected = tables.content_hash(tables.read(spark, str(root), "sessions"))
        _emptied(root)
        shutil.copytree(held, root / "tables")
        ratios.append(_pass(spark, config, LAST) / full)
        found = tables.content_hash(tables.read(spark, str(root), "sessions"))
        assert found == expected, "33 days and one more give other sessions than 34 days"
    _emptied(root)
    shutil.rmtree(held)
    value = statistics.median(ratios)
    rival = f"the full pass over {DAYS} days"
    return [Claim(names[0], value, "x its time", 0.1, RUNS, rival, "at_most")]
