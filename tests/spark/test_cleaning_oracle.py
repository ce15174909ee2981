"""clean_events and the exclusion rules against a plain-Python cleaner: many random cases in one Spark job."""

import json
import random
from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import cleaning_oracle as oracle
import pytest
from builders import make_event, make_frame, test_config
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import contracts, erased, tables
from couponflow.sections import EventsConfig, QuarantineRule
from couponflow.sequences import events, feeds, robots
from jobs import clean_events

ZONE, LATENESS = "America/New_York", 2
DAYS = [date(2024, 3, 9), date(2024, 3, 10), date(2024, 3, 11)]  # a day of 23 hours in the middle
CASES, ROWS = 300, 12
PLACES = dict[tuple[date, str, int], dict[str, Any]]


def draw_row(rng: random.Random, case: int, day: date) -> dict[str, Any]:
    """A delivered row: mostly valid, so that copies meet; each field is wrong now and then."""
    pick = rng.choice
    hour = pick([0, 3, 4, 5, 12, 23])
    when = datetime.combine(day, datetime.min.time(), UTC) + timedelta(hours=hour, minutes=pick([0, 30, 59]))
    row: dict[str, Any] = {
        "event_id": f"{case}:{pick('abc')}",
        "user_id": pick([f"u{case}", f"w{case}", f"u{case}"]),
        "visitor_id": pick([None, f"v{case}", ""]),
        "event_type": pick(["view", "purchase", "search"]),
        "event_time": when.isoformat(),
        "ingest_time": (when + timedelta(minutes=pick([0, 1, 1, 600]))).isoformat(),
        "item_id": "i1",
        "category_id": "c1",
        "shop_id": "s1",
        "order_id": None,
        "price": pick([1.0, 1.0, 2.0, None]),
        "quantity": pick([1, 1, 7]),
        "discount_amount": 0.0,
        "coupon_amount": None,
        "coupon_match_amount": None,
        "device": pick(["web", "web", "app"]),
        "channel": None,
        "user_agent": pick([None, "Mozilla/5.0", "GoogleBOT/2.1"]),
    }
    wrong: dict[str, list[Any]] = {
        "event_id": [None, ""],
        "user_id": [None, "", "gone"],
        "visitor_id": ["gone-cookie", f"x{case}"],
        "event_type": [None, "teleport", "mail_click"],
        "event_time": ["soon", None, "1970-01-01T00:00:00Z", "2099-06-01T00:00:00Z", "2024-03-10T07:30:00"],
        "ingest_time": ["", "1999-01-01T00:00:00Z"],
        "item_id": [None, ""],
        "price": [-1.0, float("nan"), float("inf"), "dear"],
        "quantity": [-3, "two"],
        "coupon_amount": [float("-inf")],
        "shop_id": ["TILL"],
    }
    if rng.random() < 0.1:
        row["event_time"] = (when + timedelta(days=pick([-4, -3, -2, -1, 1, 2]))).isoformat()
    for name in rng.sample(sorted(wrong), 2):
        if rng.random() < 0.25:
            row[name] = pick(wrong[name])
    return row


def deliver(root: str, seed: int) -> PLACES:
    rng = random.Random(seed)
    files: dict[tuple[date, str], list[dict[str, Any]]] = {
        (day, name): [] for day in DAYS for name in ("a.jsonl", "b.jsonl")
    }
    for case in range(CASES):
        rows = [draw_row(rng, case, DAYS[1]) for _ in range(ROWS // 2)]
        rows += [dict(rng.choice(rows)) for _ in range(ROWS // 2)]  # copies, some with another stamp
        for row in rows:
            if rng.random() < 0.3 and oracle.to_time(row["ingest_time"]):
                row["ingest_time"] = (
                    datetime.fromisoformat(row["ingest_time"]) + timedelta(seconds=1)
                ).isoformat()
            files[rng.choice(DAYS), rng.choice(["a.jsonl", "b.jsonl"])].append(row)
    placed = {}
    for (day, name), rows in files.items():
        rng.shuffle(rows)
        path = Path(root) / "raw" / "events" / f"ingest_date={day}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        placed |= {(day, name, number): row for number, row in enumerate(rows)}
    return placed


def test_random_deliveries_are_cleaned_as_by_hand(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_TASK_BYTES", 50_000)  # so that one day is several tasks
    config = test_config(tmp_path, f"lake.time_zone='{ZONE}'", f"lake.lateness_days={LATENESS}")
    rule = QuarantineRule(reason="till_line", where="shop_id = 'TILL'")
    settings = config.events.model_copy(update={"quarantine_rules": (rule,), "max_quantity": 5})
    config = config.model_copy(update={"events": settings})
    root = config.lake.root_uri
    placed = deliver(root, 11)
    erased.add(root, ["gone", "gone-cookie"])
    wanted = oracle.clean(placed, {"gone", "gone-cookie"}, ZONE, LATENESS)
    dates = DateRange(DAYS[0], DAYS[-1] + timedelta(days=1))
    with record_run("clean_events", config, dates) as job:
        clean_events.run(spark, job)

    refused = tables.read(spark, root, "quarantine").collect()
    assert {(r["ingest_date"], r["source_file"], r["row_number"]): r["reason"] for r in refused} == (
        wanted.refused
    )
    assert {r["reason"] for r in refused} >= set(contracts.FEEDS["events"].reasons) - {"missing_event_id"}
    rows = job.rows
    assert (rows["duplicates_exact"], rows["duplicates_conflicting"]) == (wanted.exact, wanted.conflicting)
    assert min(wanted.exact, wanted.conflicting, wanted.erased, len(wanted.links)) > 20
    assert (rows["duplicates"], rows["erased"]) == (wanted.exact + wanted.conflicting, wanted.erased)
    assert rows["raw_rows"] == len(placed)
    assert {name.removeprefix("quarantine_"): n for name, n in rows.items() if "quarantine_" in name} == (
        oracle.count_reasons(wanted.refused)
    )
    stored = {(r["ingest_date"], r["event_id"]): r for r in tables.read(spark, root, "events").collect()}
    assert set(stored) == set(wanted.winners)
    for name, place in wanted.winners.items():
        row, found = placed[place], stored[name]
        assert found["user_id"] == (row["user_id"] or f"visitor:{row['visitor_id']}"), place
        assert found["is_automated"] == ("bot" in (row["user_agent"] or "").lower()), place
        assert found["quantity"] == (1 if row["quantity"] and row["quantity"] > 5 else row["quantity"]), place
        assert (found["price"], found["device"]) == (row["price"], row["device"]), place
        assert found["ingest_time"].replace(tzinfo=UTC) == oracle.to_time(row["ingest_time"]), place
    links = {
        (r["visitor_id"], r["user_id"], r["ingest_date"]): r["linked_time"].replace(tzinfo=UTC)
        for r in tables.read(spark, root, "identity_links").collect()
    }
    assert links == wanted.links
    files = tables.read(spark, root, "events").select(F.input_file_name()).distinct().count()
    num_partitions = len({(r["event_date"], r["ingest_date"]) for r in stored.values()})
    assert num_partitions < files <= 4 * num_partitions  # spread, and bounded by the shuffle


RULES: dict[str, Any] = {
    "bot_min_events": 5,
    "bot_max_events": 9,
    "bot_gap_seconds": 1.0,
    "bot_max_items": 2,
    "bot_max_categories": 3,
    "bot_agent_share": 0.5,
    "scanner_min_clicks": 3,
    "scanner_burst_seconds": 10.0,
    "scanner_click_seconds": 1.0,
}
OFF = {"bot_max_events": 0, "bot_gap_seconds": 0.0, "bot_max_items": 0, "bot_max_categories": 0}
OFF |= {"bot_agent_share": 1.0, "scanner_min_clicks": 0, "scanner_click_seconds": 0.0}


def draw_day(rng: random.Random, user: str) -> list[dict[str, Any]]:
    """One user's day of 1 to 14 events, in one of the rhythms that the rules tell apart."""
    pick, rows, second = rng.choice, [], 0.0
    kinds = pick(
        [["view"], ["view", "purchase"], ["mail_open", "mail_click"], ["search", "view", "mail_click"]]
    )
    steps = pick([[0.5, 1.0], [1.0, 1.000001, 40.0], [0.0, 3.0, 10.0], [30.0, 60.0]])
    items, categories = pick([(1, 1), (2, 1), (3, 2), (9, 6)])
    is_agent = pick([0.0, 0.0, 0.5, 0.6])
    for n in range(rng.randint(1, 14)):
        kind = pick(kinds)
        second += pick(steps)
        bare = kind == "search" or kind.startswith("mail")
        rows.append(
            make_event(
                user,
                600 + second / 60,
                event_id=f"{user}-{n}",
                event_type=kind,
                item_id=None if bare else f"i{rng.randrange(items)}",
                category_id=None if bare else f"c{rng.randrange(categories)}",
                is_automated=rng.random() < is_agent,
            )
        )
        if rng.random() < 0.1:
            late = pick(
                [{"ingest_date": date(2024, 1, 11)}, {"ingest_time": datetime(2024, 1, 11, 5, tzinfo=UTC)}]
            )
            rows[-1] |= late
    return rows


@pytest.mark.parametrize("off", [[], list(OFF)[::2], list(OFF)[1::2], list(OFF)], ids=["on", "a", "b", "off"])
def test_random_days_are_flagged_as_by_hand(spark: SparkSession, off: list[str]) -> None:
    rng = random.Random(5)
    rules = RULES | {name: OFF[name] for name in off} | {"staff_user_ids": ("u3", "u4")}
    days = {f"u{n}": draw_day(rng, f"u{n}") for n in range(600)}
    wanted = {user: oracle.exclusion(rows, ZONE, rules) for user, rows in days.items()}
    if not off:
        counts = Counter(wanted.values())
        assert min(counts["bot"], counts["scanner"], counts[None]) > 15, counts
    frame = make_frame(spark, "events", [row for rows in days.values() for row in rows])
    settings = EventsConfig(pseudonymise=False, **rules)
    found = robots.build_user_days(frame, ZONE, settings, robots.staff_ids(settings, None)).collect()
    assert {row["user_id"]: row["exclusion_reason"] for row in found} == wanted
    assert {row["user_id"]: row["num_mail_clicks"] for row in found} == {
        user: sum(row["event_type"] == "mail_click" for row in rows) for user, rows in days.items()
    }


def test_each_rule_finds_somebody_whom_no_other_finds() -> None:
    rng = random.Random(5)
    rules = RULES | {"staff_user_ids": ()}
    days = [draw_day(rng, f"u{n}") for n in range(600)]
    all_on = [oracle.exclusion(rows, ZONE, rules) for rows in days]
    for name in OFF:
        fewer = [oracle.exclusion(rows, ZONE, rules | {name: OFF[name]}) for rows in days]
        assert fewer != all_on, name


def test_the_read_door_leaves_out_what_the_reason_says(spark: SparkSession, root_uri: str) -> None:
    kinds = ("view", "purchase", "mail_open", "mail_click")
    rows = [
        make_event(user, n, event_id=f"{user}{n}", event_type=kind)
        for user in ("staff", "bot", "scanner", "shopper")
        for n, kind in enumerate(kinds)
    ]
    dates = DateRange.day(date(2024, 1, 10))
    tables.overwrite(make_frame(spark, "events", rows), root_uri, "events", dates)

    def door(reasons: dict[str, str | None]) -> dict[str, set[str]]:
        shown = [
            {"user_id": user, "event_date": date(2024, 1, 10), "num_events": 4, "num_purchases": 1}
            | {"num_mail_clicks": 1, "exclusion_reason": reason}
            for user, reason in reasons.items()
        ]
        tables.overwrite(make_frame(spark, "user_days", shown), root_uri, "user_days", dates)
        kept: dict[str, set[str]] = defaultdict(set)
        for row in events.read_events(spark, root_uri, dates).collect():
            kept[row["user_id"]].add(row["event_type"])
        return dict(kept)

    reasons = {"staff": "staff", "bot": "bot", "scanner": "scanner", "shopper": None}
    wanted = {"staff": {"purchase"}, "bot": {"purchase"}, "scanner": {"view", "purchase"}}
    wanted["shopper"] = set(kinds)
    assert door(reasons) == wanted
    summary = robots.summary(spark, root_uri, dates)
    assert (summary["bot"]["user_days"], summary["bot"]["events"]) == (1, 4)
    assert summary["scanner_click_share"] == 0.25
    assert not [text for reason in robots.REASONS for text in summary[reason]["largest"] if reason in text]
    assert door(dict.fromkeys(reasons)) == {key: set(kinds) for key in reasons}


def test_above_its_bound_the_read_door_asks_for_no_broadcast(
    spark: SparkSession, root_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [make_event(f"u{n}", n, event_type="view") for n in range(6)]
    dates = DateRange.day(date(2024, 1, 10))
    tables.overwrite(make_frame(spark, "events", rows), root_uri, "events", dates)
    settings = EventsConfig(staff_user_ids=("u1", "u2", "u3"))
    days = robots.build_user_days(make_frame(spark, "events", rows), "UTC", settings, settings.staff_user_ids)
    tables.overwrite(days, root_uri, "user_days", dates)

    def plan(bound: int) -> tuple[bool, list[str]]:
        monkeypatch.setattr(events, "MAX_BROADCAST_ROWS", bound)
        frame = events.read_events(spark, root_uri, dates)
        text: str = frame._jdf.queryExecution().logical().toString()
        return "strategy=broadcast" in text, sorted(row["user_id"] for row in frame.collect())

    assert "collect_list" not in days._jdf.queryExecution().toString()  # a user-day of millions must fit
    assert plan(3) == (True, ["u0", "u4", "u5"])
    assert plan(2) == (False, ["u0", "u4", "u5"])
