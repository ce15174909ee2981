"""Mails at random with one of several coupons: drawn evenly, paid for first, inside every limit."""

from collections import Counter
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from couponflow.campaign import selection
from couponflow.campaign.choice import assignment, exploration, options
from couponflow.campaigning import CouponOption, SegmentLimit, SelectionConfig
from couponflow.errors import ConfigError
from couponflow.lake import literals

USERS = [f"u{number:03d}" for number in range(400)]
SCHEMA = "user_id string, conversion_probability double, score double, reason string"
COUPONS = (
    CouponOption(coupon_id="small", discount_amount=0.5, response_scale=0.8),
    CouponOption(coupon_id="gone", discount_amount=0.1, stock=0),
    CouponOption(coupon_id="large", discount_amount=2.0, response_scale=1.4, stock=60),
)
SEGMENTS = (
    SegmentLimit(name="even", where="cast(substring(user_id, 2) as int) % 2 = 0", max_recipients=90),
    SegmentLimit(name="first", where="user_id < 'u100'", min_recipients=30, max_recipients=80),
)
RULES: dict[str, Any] = {
    "coupons": COUPONS,
    "segments": SEGMENTS,
    "max_recipients": 150,
    "budget_amount": 120.0,
    "margin_amount": 4.0,
    "mail_cost_amount": 0.05,
    "control_share": 0.2,
    "holdout_share": 0.1,
    "explore_share": 0.15,
}


def probability_of(user: str) -> float:
    return (int(user[1:]) * 37 % 101) / 120


def reason_of(user: str) -> str | None:
    return "bounce" if int(user[1:]) % 11 == 0 else None


def users_frame(spark: SparkSession) -> DataFrame:
    rows = [(user, probability_of(user), probability_of(user), reason_of(user)) for user in USERS]
    return literals.frame(spark, rows, SCHEMA)


def drawn_by_hand(section: SelectionConfig) -> dict[str, int]:
    """Eligible users drawn for a mail at random, each with the place of his coupon; the plain reading."""
    found = {}
    places = [n for n, coupon in enumerate(section.coupons) if coupon.stock != 0] if section.coupons else [0]
    for user in USERS:
        is_held = assignment.unit_hash(f"{section.salt}|holdout", user) < section.holdout_share
        chance = assignment.unit_hash(f"{section.salt}|explore|18", user)
        if reason_of(user) is None and not is_held and chance < section.explore_share:
            draw = assignment.unit_hash(f"{section.salt}|explored coupon|18", user)
            found[user] = places[int(draw * len(places))]
    return found


def in_segments(user: str) -> list[bool]:
    return [int(user[1:]) % 2 == 0, user < "u100"]


def decide(spark: SparkSession, section: SelectionConfig) -> tuple[dict[str, Any], Any]:
    users = users_frame(spark)
    allocated = selection.allocate(users, "18", section)
    rows = selection.with_decision(users, "18", section, allocated).collect()
    return {row.user_id: row for row in rows}, allocated


@pytest.mark.parametrize("change", [{}, {"segments": ()}, {"coupons": ()}])
def test_drawn_and_selected_users_together_keep_every_limit(
    spark: SparkSession, change: dict[str, Any]
) -> None:
    section = SelectionConfig(**(RULES | change))
    rows, allocated = decide(spark, section)
    drawn = drawn_by_hand(section)
    offers = options.coupons(section)
    assert {user for user, row in rows.items() if row.arm == "explore"} == {
        user for user in drawn if not rows[user].would_select
    }
    assert any(rows[user].would_select for user in drawn)

    held: Counter[str | None] = Counter()
    by_segment, cost = [0] * len(section.segments), 0
    for user, row in rows.items():
        if row.arm == "explore":
            place = exploration.drawn_coupon("18", user, section)
            assert place == drawn[user]
            coupon = offers[place]
            assert row.coupon_id == (coupon.coupon_id if section.coupons else None)
            scaled = min(probability_of(user) * coupon.response_scale, 1.0)
            assert row.conversion_probability == pytest.approx(scaled, abs=1e-12)
            assert row.cost_micro == pytest.approx(scaled * coupon.discount_amount * 1e6 + 50_000, abs=1)
            gain = scaled * (4.0 - coupon.discount_amount) - 0.05
            assert row.value_micro == pytest.approx(gain * 1e6, abs=1)
            share = 0.9 * 0.15 / (2 if section.coupons else 1)
            assert row.propensity == pytest.approx(share)
        elif not row.would_select:
            assert (row.coupon_id, row.cost_micro) == (None, None)
            expected = 1.0 if reason_of(user) else 1 - 0.9 * 0.15
            assert row.propensity == pytest.approx(expected)
        if row.would_select or row.arm == "explore":
            held[row.coupon_id] += 1
            cost += row.cost_micro
            by_segment = [n + inside for n, inside in zip(by_segment, in_segments(user), strict=False)]
    assert sum(held.values()) <= section.max_recipients
    assert cost <= options.micro(section.budget_amount)
    assert held["gone"] == 0
    assert held["large"] <= 60
    for count, segment in zip(by_segment, section.segments, strict=True):
        assert count <= (segment.max_recipients or 0)
    if section.segments:
        chosen = [user for user, row in rows.items() if row.would_select]
        assert sum(user < "u100" for user in chosen) >= 30

    # What is left for the selection is each limit less what the drawn take of it.
    left = {(unit.kind, unit.name): unit.maximum for unit in allocated.limits.units}
    assert left["max_recipients", ""] == 150 - len(drawn)
    if section.coupons:
        assert left["stock", "large"] == 60 - list(drawn.values()).count(2)
        assert left["stock", "gone"] == 0
    if section.segments:
        assert left["segment_max", "even"] == 90 - sum(in_segments(user)[0] for user in drawn)
        assert left["segment_max", "first"] == 80 - sum(in_segments(user)[1] for user in drawn)


def test_each_coupon_in_stock_is_drawn_equally_often() -> None:
    section = SelectionConfig(**RULES)
    places = Counter(exploration.drawn_coupon("18", f"user-{n}", section) for n in range(20_000))
    assert set(places) == {0, 2}
    assert abs(places[0] - 10_000) < 400
    other = Counter(exploration.drawn_coupon("19", f"user-{n}", section) for n in range(100))
    assert other != Counter(exploration.drawn_coupon("18", f"user-{n}", section) for n in range(100))


def test_without_exploration_or_without_any_stock_nothing_is_set_aside(spark: SparkSession) -> None:
    section = SelectionConfig(**(RULES | {"explore_share": 0.0}))
    assert exploration.left_over(users_frame(spark), "18", section) is section
    empty = tuple(coupon.model_copy(update={"stock": 0}) for coupon in COUPONS)
    nothing = SelectionConfig(**(RULES | {"coupons": empty, "segments": ()}))
    rows, allocated = decide(spark, nothing)
    assert {row.arm for row in rows.values()} == {"none"}
    assert {row.propensity for row in rows.values()} == {1.0}
    assert allocated.limits.budget == options.micro(120.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_recipients": 20}, r"of selection\.max_recipients, which allows 20; lower it"),
        ({"budget_amount": 3.0}, r"above selection\.budget_amount 3\.0; lower it"),
        (
            {"coupons": (COUPONS[2].model_copy(update={"stock": 9}),)},
            r"of the stock of coupon large, which allows 9; lower it",
        ),
        (
            {"segments": (SEGMENTS[1].model_copy(update={"max_recipients": 31}),)},
            r"of segment first with at least 30 selected, which allows 31; lower it",
        ),
    ],
)
def test_more_drawn_than_a_limit_allows_is_refused(
    spark: SparkSession, change: dict[str, Any], message: str
) -> None:
    section = SelectionConfig(**(RULES | change))
    num_drawn = len(drawn_by_hand(section))
    with pytest.raises(
        ConfigError, match=rf"campaign 18: selection\.explore_share = 0\.15 draws {num_drawn} users for"
    ) as error:
        selection.allocate(users_frame(spark), "18", section)
    assert error.match(message)
