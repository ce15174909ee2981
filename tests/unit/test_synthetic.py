"""The synthetic shop: determinism, every feed and event type, dirt counted independently, known truth."""

import json
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from builders import test_config

from couponflow.config import Config
from couponflow.errors import ConfigError, ConflictError
from couponflow.lake import contracts, layouts
from couponflow.sources import synthetic
from couponflow.sources.synthetic_world import draw_world

ZONE = ZoneInfo("America/New_York")
FIRST, LAST = date(2024, 2, 1), date(2024, 3, 16)  # 45 days over a change to summer time
NUM_USERS = 160


def _config(folder: Path, *overrides: str, num_users: int = NUM_USERS, last: date = LAST) -> Config:
    return test_config(
        folder,
        "lake.time_zone='America/New_York'",
        f"source.num_users={num_users}",
        f"run.first_date='{FIRST}'",
        f"run.last_date='{last}'",
        "run.run_date='2024-03-02'",
        *overrides,
    )


Rows = dict[str, list[dict[str, Any]]]


class Shop:
    """A landed shop: ``lines`` and ``feeds`` by ingest date, ``truth`` by file."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows = synthetic.land(config)
        base = Path(config.lake.root_uri)
        self.feeds: dict[str, Rows] = {}
        for path in sorted((base / "raw").glob("*/*/*.jsonl")):
            day = path.parent.name.removeprefix("ingest_date=")
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self.feeds.setdefault(path.parent.parent.name, {})[day] = rows
        self.truth = {
            path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in (base / "truth").glob("*.jsonl")
        }

    @cached_property
    def kinds(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        return _kinds(self)

    def clean(self) -> list[dict[str, Any]]:
        return [row for (_, kind), rows in self.kinds.items() if kind == "clean" for row in rows]

    def all(self, feed: str) -> list[dict[str, Any]]:
        return [row for day in self.feeds[feed].values() for row in day]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(_config(tmp_path_factory.mktemp("shop")))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _local(text: str) -> datetime:
    return _time(text).astimezone(ZONE)


def _kinds(shop: Shop) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Every event line by (ingest date, kind), told from the landed text alone (and the list of bots)."""
    bots = {row["user_id"] for row in shop.truth["users"] if row["is_bot"]}
    seen: set[str] = set()
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for day, rows in shop.feeds["events"].items():
        today: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            earlier = today.setdefault(row["event_id"], [])
            kind = _kind(row, earlier, seen, bots, date.fromisoformat(day), shop.config.lake.lateness_days)
            earlier.append(row)
            found.setdefault((day, kind), []).append(row)
        seen |= set(today)
    return found


def _kind(
    row: dict[str, Any],
    earlier: list[dict[str, Any]],
    seen: set[str],
    bots: set[str],
    day: date,
    lateness_days: int,
) -> str:
    if row["user_id"] is None:
        return "malformed_user"
    if row["event_type"] not in layouts.EVENT_TYPES:
        return "malformed_event_type"
    if row["price"] is not None and row["price"] < 0:
        return "malformed_price"
    if row["event_time"] == "yesterday":
        return "malformed_time"
    if row["event_time"] < "2000":
        return "skew_past"
    if row["event_time"] > "2090":
        return "skew_future"
    if earlier:
        return "duplicate" if row in earlier else "retry_same_day"
    if row["event_id"] in seen:
        return "retry_next_day"
    age = (day - _local(row["event_time"]).date()).days
    if age > lateness_days:
        return "late_beyond"
    if age > 0 and _local(row["ingest_time"]).hour >= 5:  # not just a visit that ran over midnight
        return "late_inside"
    return "bot" if row["user_id"] in bots else "clean"


def test_dirt_equals_the_truth_per_day_and_kind(shop: Shop) -> None:
    found = {key: len(rows) for key, rows in shop.kinds.items()}
    told = {(row["ingest_date"], row["kind"]): row["rows"] for row in shop.truth["dirt"]}
    assert found == told
    totals: Counter[str] = Counter()
    for (_, kind), rows in told.items():
        totals[kind] += rows
    assert {f"dirt_{kind}": rows for kind, rows in totals.items()} == {
        name: rows for name, rows in shop.rows.items() if name.startswith("dirt_")
    }
    assert set(totals) == set(synthetic.DIRT)  # each kind occurs


def test_lines_are_conserved_and_ids_unique_without_copies(shop: Shop) -> None:
    events = shop.all("events")
    assert len(events) == shop.rows["events"] == sum(row["rows"] for row in shop.truth["dirt"])
    copies = {"duplicate", "retry_same_day", "retry_next_day"}
    ids = [row["event_id"] for (_, kind), rows in shop.kinds.items() if kind not in copies for row in rows]
    assert len(ids) == len(set(ids))
    for row in events[:50]:
        assert list(row) == [column.name for column in contracts.FEEDS["events"].columns]


def test_every_feed_is_landed_and_daily_feeds_every_day(shop: Shop) -> None:
    assert set(shop.feeds) == set(contracts.FEEDS)
    days = [str(FIRST + timedelta(days=n)) for n in range(45)]
    for name, feed in contracts.FEEDS.items():
        if feed.daily:
            assert list(shop.feeds[name]) == days
        required = [column.name for column in feed.columns if not column.nullable]
        if name != "events":  # the only dirty feed
            assert all(row[column] is not None for row in shop.all(name) for column in required), name
        assert sum(map(len, shop.feeds[name].values())) == shop.rows[name]
    clean = shop.clean()
    assert {row["event_type"] for row in clean} == set(layouts.EVENT_TYPES)
    catalogue = {row["item_id"]: (row["category_id"], row["shop_id"]) for row in shop.all("catalogue")}
    assert all(
        catalogue[row["item_id"]] == (row["category_id"], row["shop_id"]) for row in clean if row["item_id"]
    )


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def files(name: str, *overrides: str) -> dict[str, bytes]:
        config = _config(tmp_path / name, *overrides, num_users=30, last=FIRST + timedelta(days=19))
        synthetic.land(config)
        base = Path(config.lake.root_uri)
        return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*.jsonl")}

    first = files("a")
    assert files("b") == first
    assert files("a") == first  # landed twice
    assert first["raw/events/ingest_date=2024-02-05/part-0000.jsonl"] != b""
    assert files("c", "source.seed=1") != first
    with pytest.raises(ConflictError, match=r"new lake\.root_uri"):
        files("a", "source.seed=1")


def test_a_user_does_not_depend_on_the_number_of_users(tmp_path: Path, shop: Shop) -> None:
    small = Shop(_config(tmp_path, num_users=120))
    for feed in ("events", "sends", "orders", "redemptions"):
        chosen = [
            {json.dumps(row) for row in rows if row["user_id"] is not None and row["user_id"] < "u000120"}
            for rows in (shop.all(feed), small.all(feed))
        ]
        assert chosen[0] == chosen[1], feed
        assert chosen[0]


def test_visits_are_in_the_evening_and_some_run_over_midnight(shop: Shop) -> None:
    clean = shop.clean()
    visits = [row for row in clean if row["channel"] != "mail"]
    hours = sorted(_local(row["event_time"]).hour for row in visits)
    assert 18 <= hours[len(hours) // 2] <= 22
    by_user: dict[str, list[datetime]] = {}
    for row in visits:
        by_user.setdefault(row["user_id"], []).append(_local(row["event_time"]))
    crossings = 0
    for times in by_user.values():
        times.sort()
        pairs = pairwise(times)
        crossings += sum(b - a <= timedelta(minutes=30) and a.date() < b.date() for a, b in pairs)
    assert crossings >= 5
    sizes = sorted(map(len, by_user.values()))
    assert sizes[-1] > 3 * sizes[len(sizes) // 2]  # heavy tail


def test_a_bot_has_one_second_rhythm_and_no_purchase(shop: Shop) -> None:
    bots = {row["user_id"] for row in shop.truth["users"] if row["is_bot"]}
    assert bots == {"u000007", "u000157"}
    rows = [row for (_, kind), rows in shop.kinds.items() if kind == "bot" for row in rows]
    assert {row["user_id"] for row in rows} == bots
    assert {row["event_type"] for row in rows} == {"view"}
    times = sorted({_time(row["event_time"]) for row in rows if row["user_id"] == "u000007"})
    gaps = Counter(b - a for a, b in pairwise(times))
    assert gaps[timedelta(seconds=1)] == len(times) - 3  # three days of 1,200 views
    assert not bots & {row["user_id"] for row in shop.all("orders")}


def test_orders_add_up_their_purchases(shop: Shop) -> None:
    lines: dict[str, list[dict[str, Any]]] = {}
    for (_, kind), rows in shop.kinds.items():
        for row in rows:
            if kind == "clean" and row["event_type"] == "purchase":
                lines.setdefault(row["order_id"], []).append(row)
    orders = {row["order_id"]: row for row in shop.all("orders")}
    assert set(orders) == set(lines)
    for order_id, order in orders.items():
        assert order["total_amount"] == pytest.approx(sum(row["price"] for row in lines[order_id]))
        assert {(row["user_id"], row["event_time"]) for row in lines[order_id]} == {
            (order["user_id"], order["order_time"])
        }


def test_mail_goes_to_half_of_the_consenting_users_and_redemptions_follow(shop: Shop) -> None:
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
    assert 0.4 < share < 0.6
    assert {row["propensity"] for row in sends.values()} == {0.5}
    denied = [row for row in shop.all("consents") if row["state"] == "denied"]
    assert {row["reason"] for row in denied} == {"unsubscribe", "bounce"}
    assert 0.01 < len(denied) / len(shop.all("consents")) < 0.12
    bought = {
        (row["user_id"], row["event_time"]): row
        for row in shop.all("events")
        if row["event_type"] == "purchase" and row["coupon_amount"]
    }
    for row in shop.all("redemptions"):
        campaign = campaigns[row["campaign_id"]]
        sent = sends[row["campaign_id"], row["user_id"]]
        assert _time(sent["delivered_time"]) < _time(row["redemption_time"])
        day = str(_local(row["redemption_time"]).date())
        assert campaign["start_date"] <= day <= campaign["end_date"]
        coupon = next(c for c in campaign["coupons"] if c["coupon_id"] == row["coupon_id"])
        assert bought[row["user_id"], row["redemption_time"]]["item_id"] in coupon["item_ids"]


def test_truth_tells_the_probability_of_each_send(shop: Shop) -> None:
    truth = {row["send_id"]: row for row in shop.truth["sends"]}
    assert set(truth) == {row["send_id"] for row in shop.all("sends")}
    redeemed = {f"{row['campaign_id']}:{row['user_id']}" for row in shop.all("redemptions")}
    assert redeemed == {send_id for send_id, row in truth.items() if row["is_redeemed"]}
    expected = sum(row["redemption_probability"] for row in truth.values())
    variance = sum(
        row["redemption_probability"] * (1 - row["redemption_probability"]) for row in truth.values()
    )
    assert abs(len(redeemed) - expected) < 4 * variance**0.5
    hits = [row["redemption_probability"] for row in truth.values() if row["is_redeemed"]]
    misses = [row["redemption_probability"] for row in truth.values() if not row["is_redeemed"]]
    wins = sum((hit > miss) + 0.5 * (hit == miss) for hit in hits for miss in misses)
    assert wins / (len(hits) * len(misses)) > 0.7  # there is something to learn


def test_past_events_in_the_campaigns_categories_predict_redemption(shop: Shop) -> None:
    """The signal is in the landed feeds, not only in the truth."""
    campaigns = {row["campaign_id"]: row for row in shop.all("campaigns")}
    clean = shop.clean()
    redeemed = {(row["campaign_id"], row["user_id"]) for row in shop.all("redemptions")}
    past: dict[tuple[str, str], list[str]] = {}
    for row in clean:
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


def test_too_short_a_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="14 days"):
        synthetic.land(_config(tmp_path, last=FIRST + timedelta(days=12)))
    rows = synthetic.land(_config(tmp_path, num_users=1, last=FIRST + timedelta(days=13)))
    assert rows["users"] == 1
    assert rows["campaigns"] == 1


def test_no_horizon_means_no_late_event_inside_it(tmp_path: Path) -> None:
    shop = Shop(_config(tmp_path, "lake.lateness_days=0", num_users=60))
    found = {
        key: len(rows) for key, rows in shop.kinds.items() if key[1] in ("late_inside", "retry_next_day")
    }
    assert found == {}
    assert shop.rows["dirt_late_beyond"] > 0


def test_no_job_reads_the_truth() -> None:
    root = Path(__file__).parents[2]
    readers = [
        path
        for folder in ("jobs", "lib/couponflow")
        for path in (root / folder).rglob("*.py")
        if path.parent.name != "sources" and any(word in path.read_text() for word in ('"truth"', "truth/"))
    ]
    assert readers == []
