"""What the synthetic shop's users want and do: each dial moves what it says, by as much as it says.

Two worlds that differ in one dial have the same users, visits and candidates; the difference of their true
log-odds must be the dial times an indicator that is found here the slow way.
"""

from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from builders import test_config

from couponflow.config import load_config
from couponflow.errors import ConfigError
from couponflow.sources import synthetic
from couponflow.sources.synthetic import Shard, draw_shard
from couponflow.sources.synthetic_rows import CODES, PURCHASE, VIEW, Rows, concat, take
from couponflow.sources.synthetic_truth import SEGMENTS
from couponflow.sources.synthetic_users import CHEAP_TIER_EFFECT, SEGMENT_EFFECTS, draw_users
from couponflow.sources.synthetic_world import ITEMS_PER_CATEGORY, World, draw_world

ROOT = Path(__file__).parents[2]
FIRST = date(2024, 1, 1)
CANDIDATES = (
    "world.campaigns='candidates'",
    "world.campaign_first_day=20",
    "world.campaign_every_days=6",
    "world.is_dirty=false",
    "world.rate=0.8",
)
RULE = ("world.order_share=0.7", "world.order_extra=1")


def _world(*overrides: str, days: int = 60) -> World:
    last = FIRST + timedelta(days=days - 1)
    dates = (f"run.first_date='{FIRST}'", f"run.last_date='{last}'", f"run.run_date='{last}'")
    return draw_world(test_config(Path("unused"), "lake.time_zone='America/New_York'", *dates, *overrides))


def _draw(*overrides: str, shard: int = 0, days: int = 60) -> tuple[World, Shard]:
    world = _world(*overrides, days=days)
    return world, draw_shard(world, shard)


def _logit(shard: Shard) -> np.ndarray:
    p0 = shard.outcomes["p0"]
    return np.log(p0 / (1.0 - p0))


def _category(rows: Rows) -> np.ndarray:
    return rows["item"] // ITEMS_PER_CATEGORY


def _starts(world: World, shard: Shard) -> list[int]:
    return [world.campaigns[number].start for number in shard.outcomes["campaign"].tolist()]


def _before(world: World, shard: Shard) -> dict[int, list[tuple[int, int, int]]]:
    """Per user (time, day, category) of what the user did by himself, oldest first; no mails."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    rows = shard.happened
    for owner, time, item, order in zip(
        *(rows[n].tolist() for n in ("owner", "time", "item", "order")), strict=True
    ):
        if item >= 0 and not 1_000_000 <= order < 2_000_000:
            day = int(np.searchsorted(world.midnights, time, side="right")) - 1
            found.setdefault(owner, []).append((time, day, item // ITEMS_PER_CATEGORY))
    return {owner: sorted(events) for owner, events in found.items()}


def _indicator(dial: str, world: World, shard: Shard) -> list[float]:
    """What the dial is multiplied with, for each candidate, by a plain reading of its rule."""
    users, past = shard.users, _before(world, shard)
    found = []
    rows = zip(
        shard.outcomes["owner"].tolist(),
        shard.outcomes["category"].tolist(),
        _starts(world, shard),
        strict=True,
    )
    for owner, category, start in rows:
        n, eve = owner - int(users.owner[0]), start - 1
        now, before = int(users.current[n, eve]), int(users.previous[n, eve])
        own = [event for event in past.get(owner, []) if event[1] < start]
        if dial == "habit":
            found.append(float(category in users.long_term[n].tolist()))
        elif dial == "local":
            found.append(float(category == now))
        elif dial == "chain":
            after = (
                world.successors[before, now].tolist() if world.dials.second_order else [world.successor[now]]
            )
            found.append(float(category in after))
        elif dial == "period":
            due = [
                d for d in range(start, start + 7) if (d - int(users.phase[n])) % int(users.period[n]) == 0
            ]
            found.append(float(category == int(users.need[n]) and bool(due)))
        elif dial == "recency":
            found.append(float(np.log1p(sum(c == category and day >= start - 28 for _, day, c in own))))
        elif dial == "momentum":
            visits: list[set[int]] = []
            last = (-(10**9), -1)
            for time, day, c in own:
                if time - last[0] > 30 * 60 or day != last[1]:
                    visits.append(set())
                visits[-1].add(c)
                last = (time, day)
            lately = [category in touched for touched in visits[-6:]]
            found.append(float(world.momentum_sign[category] * (sum(lately[-3:]) - sum(lately[:-3]))))
    return found


@pytest.mark.parametrize(
    ("dial", "second_order"),
    [
        *((name, "false") for name in ("habit", "local", "chain", "period", "recency", "momentum")),
        ("chain", "true"),
    ],
)
def test_a_dial_adds_what_it_says(dial: str, second_order: str) -> None:
    same = (*CANDIDATES, "world.base=-2", f"world.second_order={second_order}", "world.activity=0")
    world, off = _draw(*same, f"world.{dial}=0")
    _, on = _draw(*same, f"world.{dial}=0.7")
    for name in ("owner", "campaign", "category"):
        assert (off.outcomes[name] == on.outcomes[name]).all()
    indicator = np.array(_indicator(dial, world, off))
    np.testing.assert_allclose(_logit(on) - _logit(off), 0.7 * indicator, atol=1e-9)
    assert len(np.unique(indicator)) > 1


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = score.argsort().argsort() + 1.0
    hits = label.sum()
    return float((rank[label].sum() - hits * (hits + 1) / 2) / (hits * (len(label) - hits)))


@pytest.mark.parametrize(("name", "auc", "rate"), [("quality", 0.80, 0.145), ("order", 0.80, 0.14)])
def test_the_worlds_of_the_quality_suites_are_as_hard_as_measured(name: str, auc: float, rate: float) -> None:
    world = draw_world(load_config(ROOT / "deploy" / "env" / f"{name}.toml"))
    outcomes = concat([draw_shard(world, shard).outcomes for shard in range(3)])
    assert outcomes["is_treated"].all()
    assert outcomes["is_converted"].mean() == pytest.approx(rate, abs=0.015)
    assert _auc(outcomes["p1"], outcomes["is_converted"]) == pytest.approx(auc, abs=0.02)
    if name == "order":
        rows = take(outcomes, outcomes["is_order_only"])
        assert _auc(rows["p1"], rows["is_converted"]) == pytest.approx(0.84, abs=0.02)


def test_interests_move_along_the_secret_successors() -> None:
    world, shard = _draw("world.drift=0.5", "world.jump=0", "world.return_share=0", "world.second_order=true")
    before, now = shard.users.previous, shard.users.current
    moved = now[:, 1:] != now[:, :-1]
    allowed = world.successors[before[:, :-1], now[:, :-1]]
    assert (allowed == now[:, 1:, None]).any(axis=2)[moved].all()
    assert 0.4 < moved.mean() < 0.55
    # The previous category matters: one current category, several sets of next ones.
    assert len({tuple(sorted(row)) for row in world.successors[:, 7].tolist()}) > 50
    first_order, _ = _draw("world.drift=0.5")
    assert sorted(first_order.successor.tolist()) == list(range(60))
    frozen = _draw("world.drift=0", "world.jump=0")[1].users.current
    assert (frozen == frozen[:, :1]).all()


def test_views_follow_the_interest_of_the_day() -> None:
    world, shard = _draw("world.is_dirty=false", "world.rate=2")
    rows = take(shard.happened, (shard.happened["type"] == VIEW) & (shard.happened["order"] < 0))
    day, category = world.day_of(rows["time"]), _category(rows)
    current = shard.users.current[rows["owner"], np.clip(day, 0, len(world.days) - 1)]
    habits = (shard.users.long_term[rows["owner"]] == category[:, None]).any(axis=1)
    assert 0.5 < (category == current).mean() < 0.65
    assert 0.12 < (habits & (category != current)).mean() < 0.35


def test_a_periodic_need_is_bought_in_its_period() -> None:
    world, shard = _draw("world.is_dirty=false", "world.rate=3", days=90)
    rows = shard.happened
    bought = take(rows, (rows["type"] == PURCHASE) & (rows["order"] >= 2_000_000))
    assert (_category(bought) == shard.users.need[bought["owner"]]).all()
    for user in range(10):
        days = sorted(world.day_of(bought["time"][bought["owner"] == user]).tolist())
        if shard.users.rate[user] > 0.5:
            assert set(np.diff(days)) == {shard.users.period[user]}


# --- the order-only rule --------------------------------------------------------------------------------


def _latest_order(
    world: World, shard: Shard, views: list[tuple[int, int, int]], owner: int, start: int
) -> int:
    """1 = A first, -1 = B first, told from the views of the latest session of the rule; 0 = none in time."""
    n = owner - int(shard.users.owner[0])
    if shard.users.pair[n] < 0:
        return 0
    a, b = world.pairs[shard.users.pair[n]].tolist()[:2]
    size = 2 * world.dials.order_views + world.dials.order_extra
    mine = [v for v in views if v[0] == owner]
    sessions = [mine[i : i + size] for i in range(0, len(mine), size)]
    old = [s for s in sessions if world.day_of(np.array([s[0][1]]))[0] < start]
    if not old:
        return 0
    last_day = int(world.day_of(np.array([old[-1][0][1]]))[0])
    if start - 1 - last_day >= world.dials.order_fresh_days:
        return 0
    seen = [category for _, _, category in old[-1] if category in (a, b)]
    return 1 if seen[0] == a else -1


def _ordered_views(world: World, shard: Shard) -> list[tuple[int, int, int]]:
    rows = draw_users(world, shard.users.shard)[1]
    views = zip(rows["owner"].tolist(), rows["time"].tolist(), _category(rows).tolist(), strict=True)
    return sorted(views, key=lambda view: (view[0], view[1]))


def test_order_alone_tells_what_is_wanted() -> None:
    """Wanted is C after A-B and D after B-A; nothing but the order of two blocks is different."""
    world, shard = _draw(*CANDIDATES, *RULE)
    _, off = _draw(*CANDIDATES, *RULE, "world.order=0")
    lift = _logit(shard) - _logit(off)
    views = [view for view in _ordered_views(world, shard) if view[0] < 40]
    rows = zip(
        shard.outcomes["owner"].tolist(),
        shard.outcomes["category"].tolist(),
        _starts(world, shard),
        shard.outcomes["is_order_only"].tolist(),
        shard.outcomes["direction"].tolist(),
        lift.tolist(),
        strict=True,
    )
    seen: Counter[int] = Counter()
    for owner, category, start, is_order_only, direction, lifted in rows:
        if owner >= 40:
            continue
        expected = _latest_order(world, shard, views, owner, start)
        assert direction == expected
        seen[direction] += 1
        if expected == 0:
            assert not is_order_only
            assert lifted == pytest.approx(0.0, abs=1e-9)
            continue
        *_, c, d = world.pairs[shard.users.pair[owner]].tolist()
        wanted, unwanted = (c, d) if expected == 1 else (d, c)
        assert is_order_only == (category in (c, d))
        assert lifted == pytest.approx(3.0 if category == wanted else 0.0, abs=1e-9)
        assert category != unwanted or lifted == pytest.approx(0.0, abs=1e-9)
    assert min(seen[1], seen[-1], seen[0]) > 50


def test_both_wanted_categories_stand_in_the_list() -> None:
    world, shard = _draw(*CANDIDATES, *RULE)
    lists: dict[tuple[int, int], list[int]] = {}
    rows = zip(
        shard.outcomes["owner"].tolist(),
        shard.outcomes["category"].tolist(),
        _starts(world, shard),
        strict=True,
    )
    for owner, category, start in rows:
        lists.setdefault((owner, start), []).append(category)
    for (owner, start), categories in lists.items():
        assert len(set(categories)) == len(categories) == world.dials.num_candidates
        pair = world.pairs[shard.users.pair[owner]].tolist()
        chosen = shard.outcomes["owner"] == owner
        fresh = shard.outcomes["direction"][chosen & (np.array(_starts(world, shard)) == start)].any()
        assert not fresh or set(pair[2:]) <= set(categories)


def test_both_orders_leave_the_same_counts_and_the_switch_leaves_the_sessions() -> None:
    world, shard = _draw(*CANDIDATES, *RULE)
    _, off = _draw(*CANDIDATES, *RULE, "world.order=0")
    mine = take(shard.happened, shard.happened["order"] < 0)
    others = take(off.happened, off.happened["order"] < 0)
    views, same = (take(rows, rows["type"] == VIEW) for rows in (mine, others))
    assert all((views[name] == same[name]).all() for name in ("owner", "time", "item"))
    ordered = _ordered_views(world, shard)
    counts: dict[tuple[int, int], Counter[int]] = {}
    for owner, time, category in ordered:
        counts.setdefault((owner, int(world.day_of(np.array([time]))[0])), Counter())[category] += 1
    for (owner, day), seen in counts.items():
        a, b, *_ = world.pairs[shard.users.pair[owner]].tolist()
        assert seen[a] >= 2 <= seen[b]
        assert sum(seen.values()) == 5
        times = [
            time for user, time, _ in ordered if user == owner and world.day_of(np.array([time]))[0] == day
        ]
        assert max(times) - min(times) < 15 * 60
    directions = Counter(shard.users.direction[:, -1].tolist())
    assert directions[1] > 15 < directions[-1]
    assert _draw(*CANDIDATES)[1].users.direction.any() == False  # noqa: E712  # a numpy truth value


# --- coupons and who gets them --------------------------------------------------------------------------


def test_a_coupon_changes_each_segment_as_told() -> None:
    _, shard = _draw(*CANDIDATES)
    p1 = shard.outcomes["p1"]
    effect = np.log(p1 / (1.0 - p1)) - _logit(shard)
    tier, segment = shard.users.tier[shard.outcomes["owner"]], shard.outcomes["segment"]
    expected = SEGMENT_EFFECTS[segment] + np.where(tier == 0, CHEAP_TIER_EFFECT, 0.0)
    np.testing.assert_allclose(effect, expected, atol=1e-9)
    shares = Counter(SEGMENTS[code] for n in range(6) for code in draw_users(_world(), n)[0].segment.tolist())
    for name, share in zip(SEGMENTS, (0.45, 0.25, 0.20, 0.10), strict=True):
        assert abs(shares[name] / 600 - share) < 0.08


def test_random_assignment_knows_nothing_and_confounded_knows_spending() -> None:
    def spent(world: World, shard: Shard) -> np.ndarray:
        rows = take(
            shard.happened,
            (shard.happened["type"] == PURCHASE) & ~np.isin(shard.happened["order"] // 1_000_000, [1]),
        )
        day = world.day_of(rows["time"])
        starts = _starts(world, shard)
        return np.array(
            [
                rows["price"][(rows["owner"] == owner) & (day < start)].sum()
                for owner, start in zip(shard.outcomes["owner"].tolist(), starts, strict=True)
            ]
        )

    for assignment, low, high in (("randomised", -0.1, 0.1), ("confounded", 0.3, 1.0)):
        world, shard = _draw("world.is_dirty=false", "world.rate=0.8", f"world.assignment='{assignment}'")
        ranks = spent(world, shard).argsort().argsort()
        correlation = np.corrcoef(ranks, shard.outcomes["is_treated"])[0, 1]
        assert low < correlation < high, assignment
        columns = synthetic.synthetic_feeds.send_columns(
            world, take(shard.outcomes, shard.outcomes["is_treated"])
        )
        assert (columns["propensity"] == "null") == (assignment == "confounded")


# --- incidents ------------------------------------------------------------------------------------------


def _incident(kind: str, day: int, days: int = 1, size: float | None = None) -> str:
    value = f", size={size}" if size is not None else ""
    return f'world.incidents=[{{kind="{kind}", date="{FIRST + timedelta(days=day)}", days={days}{value}}}]'


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("outage", None, 0.5),
        ("holiday", None, 0.4),
        ("sale", None, 1.4),
        ("ramp", 0.1, 0.45),
        ("outage", 1.0, 0.0),
    ],
)
def test_an_incident_changes_visits_on_its_days_only(kind: str, size: float | None, expected: float) -> None:
    same = ("world.is_dirty=false", "world.rate=20")
    counts = []
    for incidents in ("world.incidents=[]", _incident(kind, 20, 10, size)):
        world, shard = _draw(*same, incidents, days=40)
        views = shard.happened["time"][shard.happened["type"] == VIEW]
        counts.append(np.bincount(np.clip(world.day_of(views), 0, 39), minlength=40))
    ratio = counts[1][20:30].sum() / counts[0][20:30].sum()
    assert ratio == pytest.approx(expected, abs=0.04)
    assert counts[1][:20].sum() / counts[0][:20].sum() == pytest.approx(1.0, abs=0.04)


def test_a_conversion_drop_leaves_the_visits() -> None:
    same = ("world.is_dirty=false", "world.rate=20")
    bought = []
    for incidents in ("world.incidents=[]", _incident("conversion_drop", 0, 30, 0.2)):
        _, shard = _draw(*same, incidents, days=30)
        rows = shard.happened
        bought.append(((rows["type"] == PURCHASE).sum(), (rows["type"] == VIEW).sum()))
    assert bought[1][0] / bought[0][0] == pytest.approx(0.8, abs=0.04)
    assert bought[1][1] == bought[0][1]


def test_deliveries_are_missing_doubled_or_stale(tmp_path: Path) -> None:
    days = [
        f'{{kind="{kind}", date="{FIRST + timedelta(days=day)}"}}'
        for kind, day in (("missing_day", 3), ("double_load", 5), ("stale_copy", 11))
    ]
    last = FIRST + timedelta(days=15)
    dates = (f"run.first_date='{FIRST}'", f"run.last_date='{last}'", f"run.run_date='{last}'")
    config = test_config(tmp_path, *dates, "source.num_users=100", f"world.incidents=[{','.join(days)}]")
    rows = synthetic.land(config)
    assert rows["dirt_stale_copy"] > 0

    def lines(day: int) -> Counter[str]:
        file = (
            Path(config.lake.root_uri)
            / "raw/events"
            / f"ingest_date={FIRST + timedelta(days=day)}/part-0000.jsonl"
        )
        return Counter(file.read_text().splitlines())

    assert not (
        Path(config.lake.root_uri) / "raw/events" / f"ingest_date={FIRST + timedelta(days=3)}"
    ).exists()
    assert {number % 2 for number in lines(5).values()} == {0}
    assert lines(11) == lines(10)
    truth = (Path(config.lake.root_uri) / "truth/incidents/part-0000.jsonl").read_text()
    assert truth.count('"is_incident": true') == 5  # with the two odd hours
    assert CODES["stale_copy"] < CODES["duplicate"]  # a valid row of another ingest date


def test_an_incident_outside_the_world_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"world\.incidents: outage of 2 days from 2024-02-29 is not inside"
    ):
        _world(_incident("outage", 59, 2))
    with pytest.raises(ConfigError, match="kind"):
        _world('world.incidents=[{kind="flood", date="2024-01-05"}]')
