"""The synthetic shop as it is landed: determinism, parts, every feed, dirt told again from the text alone."""

import json
import tracemalloc
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import oracles
import pytest
from builders import test_config

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError, ConflictError
from couponflow.lake import contracts, layouts
from couponflow.sources import synthetic, synthetic_truth
from couponflow.sources.synthetic_feeds import NEW_COLUMN
from couponflow.sources.synthetic_rows import KINDS
from couponflow.sources.synthetic_world import draw_world

ZONE = ZoneInfo("America/New_York")
FIRST, LAST = date(2024, 2, 1), date(2024, 3, 16)  # 45 days over a change to summer time
NUM_USERS = 260
COPIES = {"duplicate", "double_load", "retry_same_day", "retry_next_day"}
REFUSED = {name for name in KINDS if name.startswith(("malformed", "skew_"))} - {"skew_hour"} | {
    "late_beyond"
}


def _config(folder: Path, *overrides: str, num_users: int = NUM_USERS, last: date = LAST) -> Config:
    return test_config(
        folder,
        "lake.time_zone='America/New_York'",
        f"source.num_users={num_users}",
        "world.rate=0.6",
        "world.recency=1.0",
        f"run.first_date='{FIRST}'",
        f"run.last_date='{last}'",
        "run.run_date='2024-03-02'",
        *overrides,
    )


Row = dict[str, Any]


class Shop:
    """A landed shop: ``feeds`` and event ``lines`` by ingest date, ``truth`` by table."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows = synthetic.land(config)
        base = Path(config.lake.root_uri)
        self.feeds: dict[str, dict[str, list[Row]]] = {}
        self.lines: dict[str, list[tuple[str, Row | None]]] = {}
        for path in sorted((base / "raw").glob("*/*/*.jsonl")):
            day, feed = path.parent.name.removeprefix("ingest_date="), path.parent.parent.name
            rows = [_parse(line) for line in path.read_text().splitlines()]
            self.feeds.setdefault(feed, {}).setdefault(day, []).extend(row for row in rows if row)
            if feed == "events":
                self.lines.setdefault(day, []).extend((path.name, row) for row in rows)
        self.truth: dict[str, list[Row]] = {}
        for path in sorted((base / "truth").glob("*/*.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self.truth.setdefault(path.parent.name, []).extend(rows)

    @cached_property
    def kinds(self) -> dict[tuple[str, str], list[Row]]:
        """Every event line by (ingest date, kind), told from the landed text and the roles of users."""
        found: dict[tuple[str, str], list[Row]] = {}
        seen: set[str] = set()
        for day, lines in self.lines.items():
            today: dict[str, list[Row]] = {}
            for _, row in lines:
                kind = self._kind(row, today, seen, date.fromisoformat(day))
                found.setdefault((day, kind), []).append(row or {})
            seen |= set(today)
        return found

    def _kind(self, row: Row | None, today: dict[str, list[Row]], seen: set[str], day: date) -> str:
        defect = _defect(row)
        if defect or row is None:
            return defect
        age = (day - _local(row["event_time"]).date()).days
        if age > self.config.lake.lateness_days:
            return "late_beyond"
        earlier = today.setdefault(row["event_id"], [])
        earlier.append(row)
        if len(earlier) > 1:
            hour = _local(row["ingest_time"]).replace(minute=0, second=0)
            if hour == self.double_hour:
                return "double_load"
            return "duplicate" if row in earlier[:-1] else "retry_same_day"
        if row["event_id"] in seen:
            return "retry_next_day"
        return self._own_kind(row, age)

    def _own_kind(self, row: Row, age: int) -> str:
        user = self.users.get(row["user_id"], {})
        delay = _time(row["ingest_time"]) - _time(row["event_time"])
        is_mail = row["event_type"].startswith("mail")
        if user.get("is_bot") or user.get("is_crawler"):
            return "bot"
        if user.get("is_scanner") and is_mail and delay == timedelta(seconds=1):
            return "scanner"
        if age > 0:
            return "late_inside"
        is_site = not is_mail and row["event_type"] != "purchase"
        return "skew_hour" if user.get("clock_seconds") and is_site else "clean"

    @cached_property
    def users(self) -> dict[str | None, Row]:
        return {row["user_id"]: row for row in self.truth["users"]}

    @cached_property
    def double_hour(self) -> datetime:
        (row,) = [row for row in self.truth["incidents"] if row["kind"] == "double_hour"]
        return datetime.fromisoformat(row["first_date"]).replace(hour=row["hour"], tzinfo=ZONE)

    @cached_property
    def first_deliveries(self) -> list[Row]:
        """Valid events, each id once: its first ingest date and, of one date, the last delivery."""
        found: dict[str, tuple[str, Row]] = {}
        for (day, kind), rows in self.kinds.items():
            for row in rows if kind not in REFUSED else []:
                key = (day, row["ingest_time"])
                held = found.get(row["event_id"])
                if held is None or (day, held[1]["ingest_time"]) < (held[0], key[1]):
                    found[row["event_id"]] = (day, row)
        return [row for _, row in found.values()]

    def of(self, *kinds: str) -> list[Row]:
        return [row for (_, kind), rows in self.kinds.items() if kind in kinds for row in rows]

    def all(self, feed: str) -> list[Row]:
        return [row for day in self.feeds[feed].values() for row in day]


def _parse(line: str) -> Row | None:
    try:
        row: Row = json.loads(line)
    except ValueError:
        return None
    return row


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _local(text: str) -> datetime:
    return _time(text).astimezone(ZONE)


def _defect(row: Row | None) -> str:
    if row is None:
        return "malformed_record"
    if row["user_id"] is None and row["visitor_id"] is None:
        return "malformed_user"
    if row["event_type"] not in layouts.EVENT_TYPES:
        return "malformed_event_type"
    if row["event_time"] == "yesterday":
        return "malformed_time"
    if row["event_time"].partition("-")[0] not in ("2024", "1970", "2099"):
        return "skew_millis"
    if row["event_time"] < "2000":
        return "skew_past" if row["event_time"] < "1970-01-01T00:01" else "skew_seconds"
    if row["event_time"] > "2090":
        return "skew_future"
    if row["event_type"] in ("view", "favourite", "cart", "purchase") and row["item_id"] is None:
        return "malformed_category"
    return "malformed_price" if row["price"] is not None and row["price"] < 0 else ""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(_config(tmp_path_factory.mktemp("shop"), "world.drift_day=30", "world.skew_share=0.02"))


def test_dirt_equals_the_truth_per_day_and_kind(shop: Shop) -> None:
    found = {key: len(rows) for key, rows in shop.kinds.items()}
    told = {(row["ingest_date"], row["kind"]): row["rows"] for row in shop.truth["dirt"]}
    assert found == told
    totals: Counter[str] = Counter()
    for (_, kind), rows in told.items():
        totals[kind] += rows
    counted = {name.removeprefix("dirt_"): n for name, n in shop.rows.items() if name.startswith("dirt_")}
    assert {kind: n for kind, n in counted.items() if n} == totals
    assert set(totals) == set(KINDS) - {"stale_copy"}  # each kind occurs; that one is an incident's


def test_each_dirty_line_is_named_with_its_place(shop: Shop) -> None:
    named = Counter((row["ingest_date"], row["kind"]) for row in shop.truth["lines"])
    dirty = {key: len(rows) for key, rows in shop.kinds.items() if key[1] != "clean"}
    assert named == dirty
    for row in shop.truth["lines"]:
        file, line = shop.lines[row["ingest_date"]][row["row_number"]]
        assert file == row["source_file"]
        assert line is None or line["event_id"] == row["event_id"]


def test_amounts_of_dirt_are_those_asked_for(shop: Shop) -> None:
    kinds = {name: shop.rows[f"dirt_{name}"] for name in KINDS}
    originals = sum(kinds[name] for name in ("clean", "skew_hour", "late_inside", "late_beyond"))
    events = originals + kinds["bot"] + kinds["scanner"]
    assert 0.007 < kinds["duplicate"] / events < 0.013
    assert 0.0030 < (kinds["retry_same_day"] + kinds["retry_next_day"]) / events < 0.007
    assert 0.012 < kinds["late_inside"] / originals < 0.028
    assert 0.0002 < kinds["late_beyond"] / originals < 0.002
    malformed = sum(number for name, number in kinds.items() if name.startswith("malformed"))
    assert 0.0015 < malformed / events < 0.0045


def test_lines_are_conserved_and_ids_unique_without_copies(shop: Shop) -> None:
    assert sum(map(len, shop.lines.values())) == shop.rows["events"]
    assert shop.rows["events"] == sum(row["rows"] for row in shop.truth["dirt"])
    doubled = {row["event_id"] for row in shop.of("double_load")}
    ids = [
        row["event_id"]
        for (_, kind), rows in shop.kinds.items()
        for row in rows
        if kind not in COPIES | {"malformed_record"} and row["event_id"] not in doubled
    ]
    repeated = Counter(ids)
    refused_twice = {row["event_id"] for kind in REFUSED for row in shop.of(kind) if row}
    assert {event_id for event_id, n in repeated.items() if n > 1} <= refused_twice
    first = shop.feeds["events"][str(FIRST)][0]
    assert list(first) == [column.name for column in contracts.FEEDS["events"].columns]


def test_a_new_column_comes_from_its_day_on(shop: Shop) -> None:
    days = sorted(day for day, rows in shop.feeds["events"].items() if any(NEW_COLUMN in r for r in rows))
    assert days == [str(FIRST + timedelta(days=n)) for n in range(30, 45)]
    assert all(NEW_COLUMN in row for day in days for row in shop.feeds["events"][day])


def test_every_feed_is_landed_and_daily_feeds_every_day(shop: Shop) -> None:
    assert set(shop.feeds) == set(contracts.FEEDS)
    days = [str(FIRST + timedelta(days=n)) for n in range(45)]
    for name, feed in contracts.FEEDS.items():
        if feed.daily:
            assert list(shop.feeds[name]) == days
        required = [column.name for column in feed.columns if not column.nullable]
        if name != "events":  # the only dirty feed
            assert all(row[column] is not None for row in shop.all(name) for column in required), name
            assert len(shop.all(name)) == shop.rows[name]
    clean = shop.of("clean")
    assert {row["event_type"] for row in clean} == set(layouts.EVENT_TYPES)
    catalogue = {row["item_id"]: (row["category_id"], row["shop_id"]) for row in shop.all("catalogue")}
    assert all(
        catalogue[row["item_id"]] == (row["category_id"], row["shop_id"]) for row in clean if row["item_id"]
    )


def _files(config: Config) -> dict[str, bytes]:
    base = Path(config.lake.root_uri)
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*.jsonl")}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def land(name: str, *overrides: str) -> dict[str, bytes]:
        config = _config(tmp_path / name, *overrides, num_users=30, last=FIRST + timedelta(days=19))
        synthetic.land(config)
        return _files(config)

    first = land("a")
    assert land("b") == first
    assert land("a") == first  # landed twice
    assert first["raw/events/ingest_date=2024-02-05/part-0000.jsonl"] != b""
    assert land("c", "source.seed=1") != first
    with pytest.raises(ConflictError, match=r"new lake\.root_uri"):
        land("a", "source.seed=1")


def test_a_part_and_a_day_alone_are_those_of_the_whole_world(tmp_path: Path) -> None:
    def config(name: str) -> Config:
        return _config(
            tmp_path / name, "world.group_shards=1", num_users=230, last=FIRST + timedelta(days=13)
        )

    synthetic.land(config("all"))
    whole = _files(config("all"))
    assert sum("/part-0002" in name for name in whole) > 30
    synthetic.land(config("part"), parts=[1])
    part = _files(config("part"))
    shared = ("raw/campaigns", "raw/catalogue")
    own = {name: text for name, text in whole.items() if name.startswith(shared) or "part-0001" in name}
    assert part == own
    day = FIRST + timedelta(days=4)  # a campaign starts, and people are late
    synthetic.land(config("day"), days=DateRange.day(day))
    found = _files(config("day"))
    assert found == {
        name: text for name, text in whole.items() if f"ingest_date={day}/" in name and "costs" not in name
    }
    assert len(found) >= 9
    for number in range(3):  # piece by piece is the whole, but for what needs all of it
        synthetic.land(config("pieces"), parts=[number])
    missing = {name for name in whole if name not in _files(config("pieces"))}
    assert {name.split("/")[1] for name in missing} == {"costs", "incidents"}
    synthetic.land(config("pieces"))
    assert _files(config("pieces")) == whole
    with pytest.raises(ConfigError, match="parts 0 to 2"):
        synthetic.land(config("none"), parts=[3])


def test_memory_does_not_grow_with_the_number_of_groups(tmp_path: Path) -> None:
    def peak(num_users: int) -> int:
        config = _config(
            tmp_path / str(num_users),
            "world.group_shards=1",
            "world.bot_share=0",
            num_users=num_users,
            last=FIRST + timedelta(days=13),
        )
        tracemalloc.start()
        synthetic.land(config)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(300) < 1.5 * peak(100)


def test_a_user_does_not_depend_on_the_number_of_users(tmp_path: Path, shop: Shop) -> None:
    small = Shop(_config(tmp_path, "world.drift_day=30", "world.skew_share=0.02", num_users=220))
    for feed in ("events", "sends", "orders", "redemptions"):
        chosen = [
            {json.dumps(row) for row in rows if row["user_id"] is not None and row["user_id"] < "u000220"}
            for rows in (shop.all(feed), small.all(feed))
        ]
        assert chosen[0] == chosen[1], feed
        assert chosen[0]


def test_visits_are_in_the_evening_and_some_run_over_midnight(shop: Shop) -> None:
    visits = [row for row in shop.of("clean") if row["channel"] != "mail" and row["user_id"]]
    hours = sorted(_local(row["event_time"]).hour for row in visits)
    assert 17 <= hours[len(hours) // 2] <= 22
    by_user: dict[str, list[datetime]] = {}
    for row in visits:
        by_user.setdefault(row["user_id"], []).append(_local(row["event_time"]))
    crossings = 0
    for times in by_user.values():
        times.sort()
        crossings += sum(b - a <= timedelta(minutes=30) and a.date() < b.date() for a, b in pairwise(times))
    assert crossings >= 5
    sizes = sorted(map(len, by_user.values()))
    assert sizes[-1] > 10 * sizes[len(sizes) // 2]  # a heavy user
    edges = {_time(row["event_time"]) for row in visits if row["user_id"] == "u000019"}
    change = datetime(2024, 3, 10, 7, tzinfo=UTC)  # 02:00 becomes 03:00
    assert {change - timedelta(minutes=1), change, change + timedelta(minutes=1)} <= edges


def test_machines_and_heavy_users_behave_as_told(shop: Shop) -> None:
    roles = {
        role: {user for user, row in shop.users.items() if row[f"is_{role}"]}
        for role in ("bot", "crawler", "heavy", "scanner", "staff")
    }
    assert roles["bot"] == {"u000007", "u000207"}
    assert roles["crawler"] == {"u000113"}
    assert roles["heavy"] == {"u000011"}
    rows = shop.of("bot")
    assert {row["user_id"] for row in rows} == roles["bot"] | roles["crawler"]
    assert {row["event_type"] for row in rows} == {"view"}
    agents = {row["user_agent"] for row in rows if row["user_id"] in roles["crawler"]}
    assert all("bot" in agent.lower() or "python" in agent for agent in agents)
    for bot in roles["bot"]:
        times = sorted({_time(row["event_time"]) for row in rows if row["user_id"] == bot})
        gaps = Counter(b - a for a, b in pairwise(times))
        assert gaps[timedelta(seconds=1)] > 0.99 * len(times) > 1_000
    buyers = {row["user_id"] for row in shop.all("orders")}
    assert not (roles["bot"] | roles["crawler"]) & buyers
    assert roles["heavy"] <= buyers
    scans: dict[tuple[str, str], list[str]] = {}
    for row in shop.of("scanner"):
        scans.setdefault((row["user_id"], row["event_time"][:10]), []).append(row["event_type"])
    assert {user for user, _ in scans} == roles["scanner"]
    assert all(types.count("mail_click") == 4 for types in scans.values())


def test_visitors_become_users_and_the_first_link_holds(shop: Shop) -> None:
    named = [row for row in shop.first_deliveries if row["visitor_id"]]
    anonymous = [row for row in named if row["user_id"] is None]
    assert len(anonymous) > 100
    assert {row["event_type"] for row in anonymous} <= {"view", "search", "favourite", "cart"}
    first: dict[str, tuple[str, str, str]] = {}
    for (day, kind), rows in shop.kinds.items():
        for row in rows if kind not in REFUSED else []:
            if row["visitor_id"] and row["user_id"]:
                link = (day, row["ingest_time"], row["user_id"])
                first[row["visitor_id"]] = min(first.get(row["visitor_id"], link), link)
    told = {r["visitor_id"]: (r["ingest_date"], r["linked_time"], r["user_id"]) for r in shop.truth["links"]}
    assert told == first
    users: dict[str, set[str]] = {}
    for row in named:
        if row["user_id"]:
            users.setdefault(row["visitor_id"], set()).add(row["user_id"])
    assert max(map(len, users.values())) == 2  # some browsers are shared
    assert {row["visitor_id"] for row in anonymous} - set(told)  # some never log in


def test_exclusions_and_sessions_equal_the_plain_rules(shop: Shop) -> None:
    def name(row: Row) -> str:
        return row["user_id"] or f"visitor:{row['visitor_id']}"

    scanned = {(name(row), _local(row["event_time"]).date()) for row in shop.of("scanner")}
    reasons: dict[tuple[str, str], str] = {}
    kept = []
    for row in shop.first_deliveries:
        user, day = shop.users.get(row["user_id"], {}), _local(row["event_time"]).date()
        is_machine = user.get("is_bot") or user.get("is_crawler")
        is_scan = (name(row), day) in scanned
        reason = "staff" if user.get("is_staff") else "bot" if is_machine else "scanner" if is_scan else ""
        if reason:
            reasons[name(row), str(day)] = reason
        is_mail = row["event_type"].startswith("mail")
        if row["event_type"] == "purchase" or not reason or (reason == "scanner" and not is_mail):
            kept.append((name(row), day, _time(row["event_time"]), row["event_id"]))
    told = {(row["user_id"], row["event_date"]): row["reason"] for row in shop.truth["exclusions"]}
    assert told == reasons
    assert set(told.values()) == {"staff", "bot", "scanner"}
    sessions = oracles.sessions([event[:3] for event in kept], 30)
    expected = Counter(
        {
            synthetic_truth.session_id(user, int(start.timestamp())): size
            for user, _, start, _, size, _ in sessions
        }
    )
    assert Counter(row["session_id"] for row in shop.truth["sessions"]) == expected
    assert {row["event_id"] for row in shop.truth["sessions"]} == {event[3] for event in kept}
    assert max(parts for *_, parts in sessions) == 2


def test_orders_add_up_their_purchases(shop: Shop) -> None:
    lines: dict[str, list[Row]] = {}
    for row in shop.of("clean"):
        if row["event_type"] == "purchase":
            lines.setdefault(row["order_id"], []).append(row)
    orders = {row["order_id"]: row for row in shop.all("orders") if row["order_status"] is None}
    assert set(lines) <= set(orders)
    (lost,) = [row for row in shop.truth["incidents"] if row["kind"] == "lost_hour"]
    hour = (lost["first_date"], lost["hour"])
    for order_id in set(orders) - set(lines):
        time = _local(orders[order_id]["order_time"])
        assert (str(time.date()), (time + timedelta(seconds=10)).hour) in (hour, (hour[0], hour[1]))
    assert len(orders) - len(lines) >= 1
    for order_id, rows in lines.items():
        order = orders[order_id]
        assert order["total_amount"] == pytest.approx(sum(row["price"] for row in rows))
        assert {(row["user_id"], row["event_time"]) for row in rows} == {
            (order["user_id"], order["order_time"])
        }


def test_some_orders_are_cancelled_or_taken_back_on_a_later_day(shop: Shop) -> None:
    placed = {
        row["order_id"]: date.fromisoformat(day)
        for day, rows in shop.feeds["orders"].items()
        for row in rows
        if row["order_status"] is None
    }
    seen: Counter[str] = Counter()
    for day, rows in shop.feeds["orders"].items():
        for row in rows:
            if row["order_status"] is None:
                assert row["status_time"] is None
                continue
            seen[row["order_status"]] += 1
            waited = (date.fromisoformat(day) - placed[row["order_id"]]).days
            assert waited == 1 if row["order_status"] == "cancelled" else 2 <= waited < 14
            assert str(_local(row["status_time"]).date()) == day
    assert 0.01 < seen["cancelled"] / len(placed) < 0.035
    assert 0.02 < seen["returned"] / len(placed) < 0.07


def test_costs_add_up_mails_and_redeemed_coupons(shop: Shop) -> None:
    costs = {(r["campaign_id"], r["cost_date"], r["cost_type"]): r["cost_amount"] for r in shop.all("costs")}
    assert len(costs) == len(shop.all("costs"))
    mails = Counter(row["campaign_id"] for row in shop.all("sends"))
    for campaign in shop.all("campaigns"):
        key = (campaign["campaign_id"], campaign["start_date"], "mail")
        assert costs[key] == pytest.approx(0.05 * mails[campaign["campaign_id"]])
    bought = {
        (r["user_id"], r["event_time"]): r["coupon_amount"] for r in shop.all("events") if r["coupon_amount"]
    }
    saved: Counter[tuple[str, str]] = Counter()
    for row in shop.all("redemptions"):
        day = str(_local(row["redemption_time"]).date())
        saved[row["campaign_id"], day] += bought.get((row["user_id"], row["redemption_time"]), float("nan"))
    for (campaign_id, day), amount in saved.items():
        if amount == amount:  # a purchase of the lost hour is on no line
            assert costs[campaign_id, day, "redemption"] == pytest.approx(amount)


def test_mail_goes_to_a_random_share_of_the_consenting_and_redemptions_follow(shop: Shop) -> None:
    campaigns = {row["campaign_id"]: row for row in shop.all("campaigns")}
    assert [row["start_date"] for row in campaigns.values()] == ["2024-02-11", "2024-02-21", "2024-03-02"]
    sends = {(row["campaign_id"], row["user_id"]): row for row in shop.all("sends")}
    granted = {
        day: {row["user_id"] for row in rows if row["state"] == "granted"}
        for day, rows in shop.feeds["consents"].items()
    }
    assert list(granted) == ["2024-02-11", "2024-02-21", "2024-03-02"]
    for campaign_id, user_id in sends:
        assert user_id in granted[campaigns[campaign_id]["start_date"]]
    share = len(sends) / sum(map(len, granted.values()))
    assert 0.75 < share < 0.85
    assert {row["propensity"] for row in sends.values()} == {0.8}
    denied = [row for row in shop.all("consents") if row["state"] == "denied"]
    assert {row["reason"] for row in denied} == {"unsubscribe", "bounce"}
    assert 0.01 < len(denied) / len(shop.all("consents")) < 0.12
    bought = {
        (row["user_id"], row["event_time"]): row
        for row in shop.all("events")
        if row["event_type"] == "purchase" and row["coupon_amount"]
    }
    matched = 0
    for row in shop.all("redemptions"):
        campaign = campaigns[row["campaign_id"]]
        sent = sends[row["campaign_id"], row["user_id"]]
        assert _time(sent["delivered_time"]) < _time(row["redemption_time"])
        day = str(_local(row["redemption_time"]).date())
        assert campaign["start_date"] <= day <= campaign["end_date"]
        coupon = next(c for c in campaign["coupons"] if c["coupon_id"] == row["coupon_id"])
        line = bought.get((row["user_id"], row["redemption_time"]))  # none in the lost hour
        assert line is None or line["item_id"] in coupon["item_ids"]
        matched += line is not None
    assert matched > 0.9 * len(shop.all("redemptions"))


def test_truth_tells_both_chances_of_each_candidate(shop: Shop) -> None:
    truth = {row["send_id"]: row for row in shop.truth["candidates"]}
    assert {send_id for send_id, row in truth.items() if row["is_treated"]} == {
        row["send_id"] for row in shop.all("sends")
    }
    redeemed = {f"{row['campaign_id']}:{row['user_id']}" for row in shop.all("redemptions")}
    assert redeemed == {s for s, row in truth.items() if row["is_treated"] and row["is_converted"]}
    for is_treated, name in ((True, "p1"), (False, "p0")):
        rows = [row for row in truth.values() if row["is_treated"] == is_treated]
        expected = sum(row[name] for row in rows)
        variance = sum(row[name] * (1 - row[name]) for row in rows)
        assert abs(sum(row["is_converted"] for row in rows) - expected) < 4 * variance**0.5
    hits = [row["p1"] for row in truth.values() if row["is_converted"] and row["is_treated"]]
    misses = [row["p1"] for row in truth.values() if not row["is_converted"] and row["is_treated"]]
    wins = sum((hit > miss) + 0.5 * (hit == miss) for hit in hits for miss in misses)
    assert wins / (len(hits) * len(misses)) > 0.7  # there is something to learn
    assert all(row["tau"] == row["p1"] - row["p0"] for row in truth.values())


def test_past_events_in_the_campaigns_categories_predict_redemption(shop: Shop) -> None:
    """The signal is in the landed feeds, not only in the truth."""
    campaigns = {row["campaign_id"]: row for row in shop.all("campaigns")}
    redeemed = {(row["campaign_id"], row["user_id"]) for row in shop.all("redemptions")}
    past: dict[tuple[str, str], list[str]] = {}
    for row in shop.of("clean", "late_inside", "skew_hour"):
        key = (row["user_id"], row["category_id"])
        past.setdefault(key, []).append(str(_local(row["event_time"]).date()))
    scored = []
    for send in shop.all("sends"):
        campaign = campaigns[send["campaign_id"]]
        days = [
            day
            for category in {coupon["category_id"] for coupon in campaign["coupons"]}
            for day in past.get((send["user_id"], category), [])
            if day < campaign["start_date"]
        ]
        scored.append((len(days), (send["campaign_id"], send["user_id"]) in redeemed))
    hits = [count for count, is_hit in scored if is_hit]
    misses = [count for count, is_hit in scored if not is_hit]
    wins = sum((hit > miss) + 0.5 * (hit == miss) for hit in hits for miss in misses)
    assert wins / (len(hits) * len(misses)) > 0.65


def test_the_documented_split_fits_the_default_world(tmp_path: Path) -> None:
    config = test_config(tmp_path, "run.first_date='2024-01-01'", "run.last_date='2024-02-29'")
    world = draw_world(config)
    starts = [str(world.days[campaign.start]) for campaign in world.campaigns]
    assert starts == ["2024-01-11", "2024-01-21", "2024-01-31", "2024-02-10", "2024-02-20"]
    for campaign in world.campaigns:
        assert 2 <= len(campaign.categories) <= 3
        assert 2 <= len(campaign.coupons) <= 4
        assert {coupon.category for coupon in campaign.coupons} == set(campaign.categories)
    assert [campaign.type for campaign in world.campaigns][:3] == ["Type A", "Type B", "Type C"]


def test_campaigns_at_once_share_their_day_and_their_users(tmp_path: Path) -> None:
    one, two = (
        Shop(_config(tmp_path / str(n), f"world.campaigns_at_once={n}", num_users=100)) for n in (1, 2)
    )

    def listed(shop: Shop, feed: str) -> list[Row]:
        return [row for rows in shop.feeds[feed].values() for row in rows]

    campaigns = {row["campaign_id"]: row for row in listed(two, "campaigns")}
    assert len(campaigns) == 2 * len(listed(one, "campaigns"))
    starts = [campaigns[str(n + 1)]["start_date"] for n in range(len(campaigns))]
    assert starts[::2] == starts[1::2] == sorted(set(starts))
    assert starts[::2] == sorted(row["start_date"] for row in listed(one, "campaigns"))
    by_campaign: dict[str, list[Row]] = {name: [] for name in campaigns}
    for row in two.truth["candidates"]:
        by_campaign[row["campaign_id"]].append(row)
    for first, second in zip(list(by_campaign)[::2], list(by_campaign)[1::2], strict=True):
        left, right = by_campaign[first], by_campaign[second]
        users = [row["user_id"] for row in left]
        assert users == [row["user_id"] for row in right]
        assert len(set(users)) == len(users) > 50
        assert [row["is_treated"] for row in left] != [row["is_treated"] for row in right]
        assert [row["p1"] for row in left] != [row["p1"] for row in right]
    mailed = {row["send_id"] for row in two.truth["candidates"] if row["is_treated"]}
    assert {row["send_id"] for row in listed(two, "sends")} == mailed


def test_too_short_a_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="14 days"):
        synthetic.land(_config(tmp_path, last=FIRST + timedelta(days=12)))
    rows = synthetic.land(_config(tmp_path, num_users=1, last=FIRST + timedelta(days=13)))
    assert rows["users"] == 1
    assert rows["campaigns"] == 1


def test_no_horizon_means_no_late_event_inside_it(tmp_path: Path) -> None:
    shop = Shop(_config(tmp_path, "lake.lateness_days=0", num_users=60))
    assert shop.rows["dirt_late_inside"] == shop.rows["dirt_retry_next_day"] == 0
    assert shop.rows["dirt_late_beyond"] > 0
    assert {key: len(rows) for key, rows in shop.kinds.items()} == {
        (row["ingest_date"], row["kind"]): row["rows"] for row in shop.truth["dirt"]
    }


def test_a_clean_world_has_no_dirt(tmp_path: Path) -> None:
    shop = Shop(_config(tmp_path, "world.is_dirty=false", num_users=60))
    dirt = {name for name in KINDS if shop.rows[f"dirt_{name}"]}
    assert dirt <= {"clean", "late_inside"}  # a visit may run over midnight
    assert shop.rows["dirt_late_inside"] < 0.01 * shop.rows["events"]
    assert shop.truth["incidents"] == shop.truth["exclusions"] == shop.truth["links"] == []


def test_no_job_reads_the_truth() -> None:
    root = Path(__file__).parents[2]
    readers = [
        path
        for folder in ("jobs", "lib/couponflow")
        for path in (root / folder).rglob("*.py")
        if path.parent.name != "sources" and any(word in path.read_text() for word in ('"truth"', "truth/"))
    ]
    assert [path.name for path in readers] == ["world.py"]  # the help text of its switch
