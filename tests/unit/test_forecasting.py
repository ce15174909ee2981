"""Intervals of a forecast hold what they say: exactly on short lists, by simulation on long ones."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from couponflow.campaign import forecasting
from couponflow.campaign.choice.options import MICRO
from couponflow.campaign.forecasting import NANO, Spread
from couponflow.campaign.readouts import intervals
from couponflow.campaigning import CouponOption, SelectionConfig

COUPONS = (
    CouponOption(coupon_id="small", discount_amount=0.5),
    CouponOption(coupon_id="large", discount_amount=2.0, margin_amount=9.0),
    CouponOption(coupon_id="dear", discount_amount=6.0),
)
SECTION = SelectionConfig(margin_amount=4.0, mail_cost_amount=0.05, discount_amount=1.0)
NAMES = ("expected_conversions", "expected_cost_amount", "expected_profit_amount")
Mailed = list[tuple[int, float]]  # coupon of the section, probability


def sums(mailed: Mailed, section: SelectionConfig) -> dict[str, Any]:
    """What the cluster would add up, one user after the other."""
    offers = section.coupons or (CouponOption(coupon_id="pooled", discount_amount=section.discount_amount),)
    row: dict[str, Any] = {"num_users": len(mailed), "cost": 0, "value": 0, "conversions": 0}
    row |= {f"{name}_{n}": 0 for n in range(len(offers)) for name in ("num_users", "variance_nano")}
    for place, p in mailed:
        coupon = offers[place]
        margin = section.margin_amount if coupon.margin_amount is None else coupon.margin_amount
        row["cost"] += round((section.mail_cost_amount + p * coupon.discount_amount) * MICRO)
        row["value"] += round((p * (margin - coupon.discount_amount) - section.mail_cost_amount) * MICRO)
        row["conversions"] += round(p * NANO)
        row[f"num_users_{place}"] += 1
        row[f"variance_nano_{place}"] += round(p * (1 - p) * NANO)
    return row


def amounts(mailed: Mailed, section: SelectionConfig) -> dict[str, tuple[float, list[float]]]:
    """Of each sum: what is sure, and what each user's conversion adds."""
    offers = section.coupons or (CouponOption(coupon_id="pooled", discount_amount=section.discount_amount),)
    chosen = [offers[place] for place, _ in mailed]
    mail = section.mail_cost_amount * len(mailed)
    margins = [section.margin_amount if c.margin_amount is None else c.margin_amount for c in chosen]
    return {
        "expected_conversions": (0.0, [1.0] * len(mailed)),
        "expected_cost_amount": (mail, [c.discount_amount for c in chosen]),
        "expected_profit_amount": (
            -mail,
            [m - c.discount_amount for m, c in zip(margins, chosen, strict=True)],
        ),
    }


def distribution(probabilities: list[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The exact distribution of the number of conversions, user by user."""
    found = np.ones(1)
    for p in probabilities:
        found = np.convolve(found, [1 - p, p])
    return found


def test_the_interval_of_conversions_holds_95_of_100_outcomes_of_any_list() -> None:
    """Against the exact distribution; on a short list the next whole number makes it more."""
    draw = np.random.default_rng(3)
    shares = []
    for size in (1, 2, 3, 5, 10, 30, 100, 400, 1_500):
        for mean in (0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999):
            ps = draw.beta(2 * mean, 2 * (1 - mean), size).tolist()
            found = forecasting.intervals_of([sums([(0, p) for p in ps], SECTION)], SECTION)
            low, high = found["expected_conversions_interval"]
            assert 0 <= low <= high <= size
            shares.append((distribution(ps)[low : high + 1].sum(), size, mean))
    assert min(shares)[0] >= 0.95, min(shares)
    assert np.mean([share for share, size, _ in shares if size == 1_500]) < 0.97


@pytest.mark.parametrize("coupons", [(), COUPONS])
@pytest.mark.parametrize("size", [40, 1_000])
def test_simulated_outcomes_fall_inside_as_often_as_stated(
    coupons: tuple[CouponOption, ...], size: int
) -> None:
    """4,000 draws of every user's conversion: conversions, cost and profit, one coupon or several."""
    section = SECTION.model_copy(update={"coupons": coupons})
    draw = np.random.default_rng(size)
    ps = draw.beta(1.0, 6.0, size)
    mailed = [(int(n), float(p)) for n, p in zip(draw.integers(0, len(coupons) or 1, size), ps, strict=True)]
    found = forecasting.intervals_of([sums(mailed, section)], section)
    converted = draw.random((4_000, size)) < ps
    for name, (fixed, each) in amounts(mailed, section).items():
        outcomes = fixed + converted @ np.array(each)
        low, high = found[f"{name}_interval"]
        share = np.mean((outcomes >= low - 1e-6) & (outcomes <= high + 1e-6))
        most = 0.99 if size == 40 else 0.97  # a step of the largest amount is much of a short list's spread
        assert 0.943 <= share <= most, (name, share)  # .95 less two standard errors of 4,000 draws
        assert low <= np.mean(outcomes) <= high


def test_intervals_equal_a_slow_oracle() -> None:
    draw = np.random.default_rng(8)
    section = SECTION.model_copy(update={"coupons": COUPONS})
    mailed = [(int(draw.integers(3)), float(draw.random() / 4)) for _ in range(500)]
    parts = [sums(mailed[:200], section), sums(mailed[200:], section)]  # selected, and mailed at random
    found = forecasting.intervals_of(parts, section)
    for name, (fixed, each) in amounts(mailed, section).items():
        terms = list(zip((Fraction(p) for _, p in mailed), map(Fraction, each), strict=True))
        mean = fixed + float(sum(p * a for p, a in terms))
        deviation = math.sqrt(sum(a * a * p * (1 - p) for p, a in terms))
        width = intervals.Z * deviation + max(map(abs, each)) / 2
        low, high = mean - width, mean + width
        if name == "expected_conversions":
            low, high = math.ceil(low), math.floor(high)
        assert found[f"{name}_interval"] == pytest.approx([low, high], abs=1e-3)


@pytest.mark.parametrize(
    ("mailed", "conversions", "cost", "profit"),
    [
        ([], [0, 0], [0.0, 0.0], [0.0, 0.0]),
        ([(0, 0.0)], [0, 0], [0.05, 0.05], [-0.05, -0.05]),
        ([(0, 1.0)], [1, 1], [1.05, 1.05], [2.95, 2.95]),
        ([(0, 0.5)], [0, 1], [0.05, 1.05], [-0.05, 2.95]),
        ([(0, 1.0)] * 7 + [(0, 0.0)] * 2, [7, 7], [7.45, 7.45], [20.55, 20.55]),
        ([(0, 5e-10)], [0, 0], [0.05, 0.05], [-0.05, -0.05]),  # a mean without a variance, by rounding
    ],
)
def test_edges(mailed: Mailed, conversions: list[int], cost: list[float], profit: list[float]) -> None:
    parts = [sums(mailed, SECTION)] if mailed else []
    found = forecasting.intervals_of(parts, SECTION)
    assert found["expected_conversions_interval"] == conversions
    assert found["expected_cost_amount_interval"] == pytest.approx(cost)
    assert found["expected_profit_amount_interval"] == pytest.approx(profit)
    assert "chance alone" in found["forecast_words"]
    assert "calibration" in found["forecast_words"]


def test_a_loss_per_conversion_turns_the_interval_round() -> None:
    section = SECTION.model_copy(update={"margin_amount": 0.25, "discount_amount": 1.0})
    found = forecasting.intervals_of([sums([(0, 0.5)] * 100, section)], section)
    low, high = found["expected_profit_amount_interval"]
    assert low < -5.0 - 0.75 * 50 < high < -5.0
    assert found["expected_cost_amount_interval"][0] > 5.0


def test_a_coupon_that_nobody_got_widens_nothing() -> None:
    alone = SECTION.model_copy(update={"coupons": COUPONS[:1]})
    beside = SECTION.model_copy(update={"coupons": COUPONS})
    mailed: Mailed = [(0, 0.1)] * 50
    assert forecasting.intervals_of([sums(mailed, alone)], alone) == forecasting.intervals_of(
        [sums(mailed, beside)], beside
    )


def test_profit_that_the_mail_causes_has_no_interval_and_says_why() -> None:
    section = SECTION.model_copy(update={"objective": "incremental_profit"})
    found = forecasting.intervals_of([sums([(0, 0.5)] * 100, section)], section)
    assert found["expected_profit_amount_interval"] is None
    assert "Profit has no interval" in found["forecast_words"]
    plain = forecasting.intervals_of([sums([(0, 0.5)] * 100, SECTION)], SECTION)
    for name in NAMES[:2]:
        assert found[f"{name}_interval"] == plain[f"{name}_interval"]


def test_the_largest_amounts_and_lists_stay_exact() -> None:
    """Squares of amounts times billions of users are whole numbers of Python, which do not wrap round."""
    amount, part = 10**18, Spread(10**10, NANO * 10**9)
    low, high = forecasting.interval(5e27, 0, [amount], [part])
    width = intervals.Z * math.sqrt(10**9) * 10**18 + 5e17
    assert high - low == pytest.approx(2 * width)
