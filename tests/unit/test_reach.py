"""Ratios of reach hold what their intervals say, and no row stands for few users."""

import math
import random
from typing import Any

import numpy as np
import pytest
from builders import test_config

from couponflow.campaign import candidates, reach
from couponflow.campaign.reach import HISTORY, MAX_GROUPS, MIN_USERS, Group
from couponflow.campaign.readouts import intervals
from couponflow.campaigning import SelectionConfig
from couponflow.errors import ConfigError

NANO = 1_000_000_000


def group(name: str | None, eligible: int, selected: int = 0, mailed: int = 0, mean: float = 0.25) -> Group:
    return Group(name, eligible, selected, mailed, round(mean * eligible * NANO))


@pytest.mark.parametrize(
    ("users", "rest", "rate", "rest_rate"),
    [(200, 1_800, 0.1, 0.15), (40, 2_000, 0.05, 0.2), (900, 100, 0.3, 0.3), (60, 60, 0.02, 0.04)],
)
def test_the_interval_holds_the_true_ratio_as_often_as_stated(
    users: int, rest: int, rate: float, rest_rate: float
) -> None:
    """4,000 draws of who is selected of group and rest."""
    draw = np.random.default_rng(users)
    share = users / (users + rest)
    true = rate / (share * rate + (1 - share) * rest_rate)
    runs, held = 0, 0
    for hits, others in zip(
        draw.binomial(users, rate, 4_000).tolist(),
        draw.binomial(rest, rest_rate, 4_000).tolist(),
        strict=True,
    ):
        if hits + others:
            _, (low, high) = intervals.ratio_to_whole(hits, users, hits + others, users + rest)
            held += low <= true <= high
            runs += 1
    assert 0.935 <= held / runs <= 0.99  # two standard errors are .007; few hits give more than stated


def test_share_ratio_equals_the_published_formula() -> None:
    """Donner and Zou 2012, equation 9, as it is printed; ours multiplies the lower end out."""
    for hits, users, other_hits, other_users in ((8, 40, 30, 90), (1, 50, 2, 60), (49, 50, 3, 80)):
        share, other = hits / users, other_hits / other_users
        (low, high), (l2, u2) = intervals.wilson(hits, users), intervals.wilson(other_hits, other_users)
        product = share * other
        lower = (product - math.sqrt(product**2 - low * u2 * (2 * share - low) * (2 * other - u2))) / (
            u2 * (2 * other - u2)
        )
        upper = (product + math.sqrt(product**2 - high * l2 * (2 * share - high) * (2 * other - l2))) / (
            l2 * (2 * other - l2)
        )
        found = intervals.share_ratio(hits, users, other_hits, other_users)
        assert found == pytest.approx((lower, upper), rel=1e-9)


def test_ratios_at_their_edges() -> None:
    assert intervals.ratio_to_whole(5, 50, 5, 50) == (1.0, (1.0, 1.0))
    value, (low, high) = intervals.ratio_to_whole(0, 50, 100, 1_000)
    assert (value, low) == (0.0, 0.0)
    assert 0.5 < high < 1.0
    value, (low, high) = intervals.ratio_to_whole(20, 50, 20, 200)  # the rest has none
    assert value == high == 4.0
    assert 1.0 < low < 4.0
    for hits, users, whole, all_users in ((0, 0, 5, 50), (0, 50, 0, 100)):
        value, ends = intervals.ratio_to_whole(hits, users, whole, all_users)
        assert math.isnan(value)
        assert all(math.isnan(end) for end in ends)
    for users, rest in ((30, 30), (30, 10**6), (10**6, 30)):  # never wrong way round, whatever the counts
        for hits in (0, 1, 15, 29, users - 1, users):
            for others in (0, 1, 15, rest - 1, rest):
                if hits + others:
                    value, (low, high) = intervals.ratio_to_whole(hits, users, hits + others, users + rest)
                    assert 0.0 <= low <= value * (1 + 1e-12)
                    assert value <= high * (1 + 1e-12) <= (users + rest) / users * (1 + 1e-9)


def test_random_groups_are_pooled_until_no_row_is_small() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        sizes = [draw.choice([1, 29, 30, 31, 500]) for _ in range(draw.choice([0, 1, 2, 19, 20, 21, 40]))]
        groups = [group(f"g{n}", size, size // 3, size // 4) for n, size in enumerate(sizes)]
        if draw.random() < 0.5:
            groups.append(group(None, draw.choice([1, 29, 30, 400])))
        found = reach.pooled(draw.sample(groups, len(groups)))
        total = sum(one.eligible_users for one in groups)
        assert sum(one.eligible_users for one in found) == (total if total >= MIN_USERS else 0)
        assert len(found) <= MAX_GROUPS
        assert all(one.eligible_users >= MIN_USERS for one in found)
        named = [one for one in found if one.name is not None]
        assert named == sorted(named, key=lambda one: (-one.eligible_users, one.name))
        assert [one.name for one in found[len(named) :]] in ([], [None])
        assert all(one in groups for one in named)
        # Nobody is pooled without need: with the smallest pooled group out again, a row would be too small
        # or one too many.
        if found and found[-1].name is None and not any(one.name is None for one in groups):
            pooled = sorted(set(groups) - set(named), key=lambda one: -one.eligible_users)
            left = found[-1].eligible_users - pooled[0].eligible_users
            assert pooled[0].eligible_users < MIN_USERS or 0 < left < MIN_USERS or len(found) == MAX_GROUPS


def test_a_pool_of_few_takes_the_next_smallest_group_with_it() -> None:
    found = reach.pooled([group("a", 500), group("b", 40, 4), group("c", 5, 1)])
    assert [(one.name, one.eligible_users, one.selected_users) for one in found] == [
        ("a", 500, 0),
        (None, 45, 5),
    ]
    assert reach.pooled([group("a", 20), group("b", 9)]) == []
    assert reach.pooled([]) == []


def test_the_facts_are_counts_shares_and_ratios() -> None:
    counted = {
        "age": [group("35-44", 400, 100, 90, 0.3), group("unknown", 600, 50, 45, 0.1)],
        HISTORY: [group("with events", 960, 150, 135, 0.18), group("cold start", 40, 0, 0, 0.18)],
    }
    found = reach.told(counted)
    assert {name: found[name] for name in ("eligible_users", "selected_users", "mailed_users")} == {
        "eligible_users": 1_000,
        "selected_users": 150,
        "mailed_users": 135,
    }
    assert (found["selected_share"], found["mean_probability"]) == pytest.approx((0.15, 0.18))
    rows = {(row["attribute"], row["group"]): row for row in found["groups"]}
    assert list(rows) == [
        ("age", "unknown"),
        ("age", "35-44"),
        *((HISTORY, g.name) for g in counted[HISTORY]),
    ]
    young = rows["age", "35-44"]
    assert (young["selected_share"], young["ratio"]) == pytest.approx((0.25, 0.25 / 0.15))
    assert young["ratio_interval"][0] > 1.0
    assert rows[HISTORY, "cold start"]["ratio_interval"][1] < 1.0
    assert sum(row["eligible_users"] for (name, _), row in rows.items() if name == "age") == 1_000


def test_nobody_eligible_or_selected_gives_no_ratio() -> None:
    empty = reach.told({HISTORY: []})
    assert (empty["eligible_users"], empty["selected_share"], empty["groups"]) == (0, None, [])
    none = reach.told({HISTORY: [group("with events", 50)]})
    assert [(row["ratio"], row["ratio_interval"]) for row in none["groups"]] == [(None, None)]
    one = reach.told({HISTORY: [group("with events", 1, 1, 1)]})
    assert (one["eligible_users"], one["groups"]) == (1, [])


@pytest.mark.parametrize("names", ["['age', 'age']", "['history']", "['a','b','c','d','e']", "['']"])
def test_attributes_that_cannot_be_told_are_refused(tmp_path: Any, names: str) -> None:
    with pytest.raises(ConfigError, match="reach_attributes"):
        test_config(tmp_path, f"selection.reach_attributes={names}")


def test_what_is_only_told_makes_no_other_version(tmp_path: Any) -> None:
    plain = test_config(tmp_path)
    told = test_config(tmp_path, "selection.reach_attributes=['age']")
    other = test_config(tmp_path, "selection.budget_amount=7.0")
    assert told.selection != plain.selection == SelectionConfig()
    assert candidates._rules(told) == candidates._rules(plain) != candidates._rules(other)
