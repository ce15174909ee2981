"""Segments and sessions against plain-Python oracles; order-free range runs."""

import random
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import oracles
from builders import make_event, make_frame, test_config
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import tables
from couponflow.sequences import sessions
from jobs import sessionize

GAP = 30
ZONE = ZoneInfo("America/New_York")
MIDNIGHT = datetime(2024, 3, 10, tzinfo=ZONE).astimezone(UTC)  # a day of 23 hours follows
STEPS = [
    timedelta(0),
    timedelta(seconds=20),
    timedelta(minutes=29, seconds=59),
    timedelta(minutes=30),
    timedelta(minutes=30, microseconds=1),
    timedelta(minutes=31),
    timedelta(hours=4),
    timedelta(hours=11),
]


def random_times(case: int, midnight: datetime = MIDNIGHT) -> list[datetime]:
    rng = random.Random(case)
    size = rng.choice([0, 1, 2, 5, 12, 25])
    time = midnight + timedelta(hours=rng.choice([-30, -2, -1])) + timedelta(minutes=rng.randrange(60))
    times = []
    for _ in range(size):
        times.append(time)
        time += rng.choice(STEPS)
    if rng.random() < 0.5:  # end one run exactly at, and start one exactly after, midnight
        times += [midnight - timedelta(minutes=10), midnight, midnight + timedelta(minutes=30)]
    return times


def day_of(time: datetime, zone: ZoneInfo = ZONE) -> date:
    return time.astimezone(zone).date()


CHAIN = [  # near(2) and near(3): 2 joins 1, so 3 stays apart; an event in between would let 3 join 2
    MIDNIGHT - timedelta(minutes=5),
    MIDNIGHT + timedelta(minutes=5),
    *[MIDNIGHT + timedelta(minutes=m) for m in range(30, 23 * 60, 25)],
    MIDNIGHT + timedelta(hours=23, minutes=5),
]
CHAIN_WITH_A_BREAK = [
    time for time in CHAIN if not timedelta(hours=9) < time - MIDNIGHT < timedelta(hours=12)
]


def test_segments_and_sessions_equal_the_oracles(spark: SparkSession) -> None:
    cases = {f"case{n:03d}": random_times(n) for n in range(250)}
    cases |= {"chain": CHAIN, "break": CHAIN_WITH_A_BREAK}
    plain = [(user, day_of(time), time) for user, times in cases.items() for time in times]
    events = [
        make_event(user, n, event_id=f"{n}", event_time=time, event_date=day, event_type="view")
        for n, (user, day, time) in enumerate(plain)
    ]
    random.Random(1).shuffle(events)
    built = sessions.build_segments(make_frame(spark, "events", events).repartition(3), GAP)
    joined = sessions.stitch(built, GAP)
    found_segments = {
        (r["user_id"], r["event_date"], _utc(r["segment_start"]), _utc(r["segment_end"]), r["num_events"])
        for r in built.collect()
    }
    wanted = {(s.user, s.day, s.start, s.end, s.size) for s in oracles.segments(plain, GAP)}
    assert found_segments == wanted
    rows = joined.collect()
    found = {
        (
            r["user_id"],
            r["session_date"],
            _utc(r["session_start"]),
            _utc(r["session_end"]),
            r["num_events"],
            r["num_segments"],
        )
        for r in rows
    }
    wanted_sessions = oracles.sessions(plain, GAP)
    wrong = sorted({str(row[0]) for row in found ^ wanted_sessions})
    assert not wrong, f"{len(wrong)} wrong users, first {wrong[0]}: {cases[wrong[0]]}"
    assert len({r["session_id"] for r in rows}) == len(rows)
    assert [r["num_segments"] for r in rows if r["user_id"] == "chain"].count(2) == 1
    assert max(r["session_end"] - r["session_start"] for r in rows) < timedelta(hours=48)
    assert {r["duration_seconds"] for r in rows if r["user_id"] == "chain"} == {
        int((CHAIN[-2] - CHAIN[0]).total_seconds()),
        0,
    }


#: Local midnights: before a day of 23 hours, before one of 25 hours, and where there is no summer time.
MIDNIGHTS = {
    zone: [datetime(2024, month, day, tzinfo=ZoneInfo(zone)).astimezone(UTC) for month, day in days]
    for zone, days in {"America/New_York": [(3, 10), (11, 3)], "Asia/Tokyo": [(3, 10)]}.items()
}
TYPES = ("view", "view", "search", "favourite", "cart", "purchase", "mail_open", "mail_click")
COUNTED = {
    "num_views": ("view",),
    "num_searches": ("search",),
    "num_favourites": ("favourite",),
    "num_carts": ("cart",),
    "num_purchases": ("purchase",),
    "num_mail_events": ("mail_open", "mail_click"),
}


def random_events(user: str, times: list[datetime], zone: str) -> list[dict[str, Any]]:
    rng = random.Random(user)
    return [
        make_event(
            user,
            event_id=f"{user}-{n}",
            event_time=time,
            event_date=day_of(time, ZoneInfo(zone)),
            event_type=rng.choice(TYPES),
            price=rng.choice([0.1, 0.2, 3.335, None]),
            device=rng.choice(["phone", "desktop", None]),
            channel=rng.choice(["site", "app", None]),
        )
        for n, time in enumerate(times)
    ]


def described(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a session from its events."""
    ordered = sorted(events, key=lambda e: (e["event_time"], e["event_id"]))
    bought = [e for e in events if e["event_type"] == "purchase"]
    return {name: len([e for e in events if e["event_type"] in types]) for name, types in COUNTED.items()} | {
        "spend_amount": round(sum(e["price"] or 0.0 for e in bought), 6),
        "is_converted": bool(bought),
        "device": ordered[0]["device"],
        "channel": ordered[0]["channel"],
        "first_event_type": ordered[0]["event_type"],
        "last_event_type": ordered[-1]["event_type"],
    }


def test_session_columns_equal_the_oracle_in_all_zones(spark: SparkSession) -> None:
    by_user = {
        f"{zone}|{number}|{case}": random_events(
            f"{zone}|{number}|{case}", random_times(case, midnight), zone
        )
        for zone, midnights in MIDNIGHTS.items()
        for number, midnight in enumerate(midnights)
        for case in range(80)
    }
    by_user["visitor:7"] = random_events("visitor:7", random_times(11), "America/New_York")
    everything = [event for events in by_user.values() for event in events]
    random.Random(2).shuffle(everything)
    segments = sessions.build_segments(make_frame(spark, "events", everything).repartition(3), GAP)
    names = tuple(described(by_user["visitor:7"]))
    found = {
        (row["user_id"], _utc(row["session_start"])): {name: row[name] for name in names}
        for row in sessions.stitch(segments, GAP).collect()
    }
    wanted = {
        (user, start): described([e for e in by_user[str(user)] if start <= e["event_time"] <= end])
        for user, _, start, end, _, _ in oracles.sessions(
            [(e["user_id"], e["event_date"], e["event_time"]) for e in everything], GAP
        )
    }
    assert found == wanted
    assert any(user == "visitor:7" for user, _ in found)
    assert {row["is_converted"] for row in found.values()} == {True, False}


def test_sessions_equal_sparks_session_window_where_one_midnight_is_crossed(spark: SparkSession) -> None:
    everything = []
    for zone, midnights in MIDNIGHTS.items():
        for number, midnight in enumerate(midnights):
            for case in range(60):
                times = random_times(case, midnight)
                near = [time for time in times if abs(time - midnight) < timedelta(hours=22)]
                everything += random_events(f"{zone}|{number}|{case}", near, zone)
    frame = make_frame(spark, "events", everything).repartition(3)
    ours = sessions.stitch(sessions.build_segments(frame, GAP), GAP)
    window = F.session_window("event_time", f"{GAP} minutes")  # joins the exact tie, as ours
    theirs = frame.groupBy("user_id", window).agg(
        F.min("event_time").alias("session_start"),
        F.max("event_time").alias("session_end"),
        F.count(F.lit(1)).alias("num_events"),
    )
    columns = ("user_id", "session_start", "session_end", "num_events")
    assert sorted(map(tuple, ours.select(*columns).collect())) == sorted(
        map(tuple, theirs.select(*columns).collect())
    )
    assert ours.where("num_segments = 2").count() > 20


def test_sessions_at_the_borders_of_days_and_of_summer_time(spark: SparkSession) -> None:
    new_york, tokyo = "America/New_York", "Asia/Tokyo"
    cases = {  # local times, and the sizes of the sessions they make
        "midnight": (tokyo, [(3, 9, 23, 59, 59, 0), (3, 10, 0, 0, 0, 0)], [2]),
        "midnight of a short day": (new_york, [(3, 9, 23, 59, 59, 0), (3, 10, 0, 0, 0, 0)], [2]),
        "the lost hour is no silence": (new_york, [(3, 10, 1, 59, 59, 0), (3, 10, 3, 0, 0, 0)], [2]),
        "the hour that comes twice is one": (new_york, [(11, 3, 1, 30, 0, 0), (11, 3, 1, 30, 0, 1)], [1, 1]),
        "an exact tie over midnight": (tokyo, [(3, 9, 23, 45, 0, 0), (3, 10, 0, 15, 0, 0)], [2]),
        "a second more": (tokyo, [(3, 9, 23, 45, 0, 0), (3, 10, 0, 15, 1, 0)], [1, 1]),
    }
    events = []
    for case, (zone, times, _) in cases.items():
        for n, (month, day, hour, minute, second, fold) in enumerate(times):
            local = datetime(2024, month, day, hour, minute, second, tzinfo=ZoneInfo(zone), fold=fold)
            instant = local.astimezone(UTC)
            events.append(make_event(case, event_id=str(n), event_time=instant, event_date=local.date()))
    segments = sessions.build_segments(make_frame(spark, "events", events), GAP)
    found: dict[str, list[int]] = {}
    for row in sessions.stitch(segments, GAP).collect():
        found.setdefault(row["user_id"], []).append(row["num_events"])
    assert found == {case: sizes for case, (_, _, sizes) in cases.items()}


def _utc(time: datetime) -> datetime:
    """Collected timestamps are naive in the process's zone; compare instants."""
    return time.astimezone(UTC)


def test_a_gap_of_exactly_the_limit_stays_inside_and_ties_share_a_segment(spark: SparkSession) -> None:
    events = [
        make_event(minute=m, event_id=f"{m}{i}") for m, i in [(0, "a"), (30, "a"), (30, "b"), (61, "a")]
    ]
    found = sessions.assign_segments(make_frame(spark, "events", events), GAP)
    starts = {
        row["event_id"]: row["m"]
        for row in found.select(
            "event_id", (F.unix_seconds("segment_start") % 86_400 / 60).alias("m")
        ).collect()
    }
    assert starts == {"0a": 0, "30a": 0, "30b": 0, "61a": 61}


def test_a_range_run_equals_its_day_runs_in_any_order(
    spark: SparkSession, config: Config, tmp_path: Path
) -> None:
    minutes = [-3, 4, 700, 1430, 1450, 2870, 2885, 2890, 4310]
    events = [
        make_event(user, minute + shift, event_type="view", device=f"d{minute}")
        for user, shift in (("u1", 0), ("u2", 7), ("u3", -20))
        for minute in minutes
        if (user, minute) != ("u2", 700)
    ]
    frame = make_frame(spark, "events", events)
    dates = DateRange.parse("2024-01-09:2024-01-12")
    tables.overwrite(frame, config.lake.root_uri, "events", dates)
    tables.overwrite(make_frame(spark, "user_days", []), config.lake.root_uri, "user_days", dates)
    other = test_config(tmp_path / "other")
    shutil.copytree(Path(config.lake.root_uri) / "tables", Path(other.lake.root_uri) / "tables")
    _sessionize(spark, config, dates)
    days = list(dates.days())
    for n in (3, 1, 0, 2):
        _sessionize(spark, other, DateRange.day(days[n]))
    for table in ("session_segments", "sessions"):
        whole = tables.read(spark, config.lake.root_uri, table)
        by_day = tables.read(spark, other.lake.root_uri, table)
        assert tables.content_hash(by_day) == tables.content_hash(whole), table
    assert tables.read(spark, config.lake.root_uri, "sessions").where("num_segments = 2").count() > 3


def _sessionize(spark: SparkSession, config: Config, dates: DateRange) -> None:
    with record_run("sessionize", config, dates) as job:
        sessionize.run(spark, job)
