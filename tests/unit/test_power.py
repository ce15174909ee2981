"""Planned sizes are right: closed forms against simulation, and against each other."""

import math
from typing import Any

import numpy as np
import pytest

from couponflow import campaign_commands
from couponflow.campaign import planning
from couponflow.campaign.pages import formats
from couponflow.campaign.planning import Base
from couponflow.campaign.readouts import intervals, power
from couponflow.campaign.readouts.power import Arms
from couponflow.campaigning import CouponOption, SelectionConfig
from couponflow.errors import ConfigError, DataError

RUNS = 20_000


@pytest.mark.parametrize(
    ("base_rate", "arms"),
    [
        (0.05, Arms(9_000, 1_000)),
        (0.01, Arms(45_000, 5_000)),
        (0.3, Arms(400, 400)),
        (0.9, Arms(6_000, 2_000)),
    ],
)
def test_the_smallest_effect_is_found_in_80_percent_of_simulated_campaigns(
    base_rate: float, arms: Arms
) -> None:
    draw = np.random.default_rng(1)
    effect = power.smallest_rate_effect(base_rate, arms)
    treated = draw.binomial(arms.num_treat, base_rate + effect, RUNS) / arms.num_treat
    withheld = draw.binomial(arms.num_withheld, base_rate, RUNS) / arms.num_withheld
    error = np.sqrt(treated * (1 - treated) / arms.num_treat + withheld * (1 - withheld) / arms.num_withheld)
    found = np.mean(np.abs(treated - withheld) > intervals.Z * error)
    # Four standard errors of the simulation are .011; the rest is the normal curve in place of counts.
    assert found == pytest.approx(0.8, abs=0.025)
    assert power.rate_power(effect, base_rate, arms) == pytest.approx(0.8, abs=1e-4)


def test_the_smallest_money_effect_is_found_in_80_percent_of_simulated_campaigns() -> None:
    draw, arms = np.random.default_rng(2), Arms(3_000, 500)
    effect = power.smallest_mean_effect(2.0, arms)
    # Means of many users: drawn at once, with the spread that they have.
    treated = draw.normal(effect, 2.0 / math.sqrt(arms.num_treat), RUNS)
    withheld = draw.normal(0.0, 2.0 / math.sqrt(arms.num_withheld), RUNS)
    error = 2.0 * math.sqrt(1 / 3_000 + 1 / 500)
    assert np.mean(np.abs(treated - withheld) > intervals.Z * error) == pytest.approx(0.8, abs=0.012)
    assert power.mean_power(effect, 2.0, arms) == pytest.approx(0.8, abs=1e-4)


def test_a_known_plan_by_hand() -> None:
    # b = .05, 9,000 mailed and 1,000 withheld, z = 1.959964 + .841621: the effect solves
    # d^2 = z^2 ((.05 + d)(.95 - d) / 9000 + .05 * .95 / 1000). At d = .02074
    # .07074 * .92926 / 9000 = 7.304e-6; with 4.75e-5 that is 5.4804e-5; times 7.84888 it is 4.3015e-4,
    # the square of .02074.
    assert pytest.approx(2.801585, abs=1e-6) == power.DETECTABLE
    effect = power.smallest_rate_effect(0.05, Arms(9_000, 1_000))
    assert effect == pytest.approx(0.02074, abs=2e-6)
    assert effect**2 == pytest.approx(
        2.801585**2 * ((0.05 + effect) * (0.95 - effect) / 9_000 + 0.05 * 0.95 / 1_000), rel=1e-6
    )
    # sd 3, halves: 2.801585 * 3 * sqrt(1/500 + 1/500).
    assert power.smallest_mean_effect(3.0, Arms(500, 500)) == pytest.approx(0.531563, abs=1e-6)


def test_needed_users_and_smallest_effect_are_inverse() -> None:
    for base_rate, effect, share in ((0.02, 0.004, 0.1), (0.2, 0.05, 0.5), (0.01, -0.005, 0.2)):
        users = power.users_for_rate(effect, base_rate, share)
        withheld = users * share
        reached = power.rate_power(effect, base_rate, Arms(round(users - withheld), round(withheld)))
        assert reached == pytest.approx(0.8, abs=2e-3)
    users = power.users_for_mean(0.1, 2.0, 0.25)
    arms = Arms(round(users * 0.75), round(users * 0.25))
    assert power.smallest_mean_effect(2.0, arms) == pytest.approx(0.1, rel=1e-3)


def test_no_effect_is_shown_in_5_percent_and_more_users_show_less() -> None:
    assert power.rate_power(0.0, 0.1, Arms(100, 100)) == pytest.approx(0.05, abs=1e-9)
    effects = [power.smallest_rate_effect(0.03, Arms(9 * n, n)) for n in (10, 100, 1_000, 10_000)]
    assert effects == sorted(effects, reverse=True)
    balanced = power.smallest_rate_effect(0.03, Arms(5_000, 5_000))
    assert balanced < power.smallest_rate_effect(0.03, Arms(9_000, 1_000))


def test_without_control_nothing_can_be_shown() -> None:
    for arms in (Arms(1_000, 0), Arms(0, 1_000), Arms(0, 0)):
        assert math.isnan(power.smallest_rate_effect(0.05, arms))
        assert math.isnan(power.smallest_mean_effect(1.0, arms))
        assert math.isnan(power.rate_power(0.01, 0.05, arms))
        assert math.isnan(power.mean_power(0.01, 1.0, arms))
    assert math.isnan(power.smallest_rate_effect(0.9, Arms(5, 5))), "a rate above 1 cannot be reached"


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="base rate"):
        power.smallest_rate_effect(rate, Arms(10, 10))
    with pytest.raises(ConfigError, match="withheld share"):
        power.users_for_rate(0.01, 0.1, rate)
    with pytest.raises(ConfigError, match="with the effect"):
        power.rate_power(0.95, 0.1, Arms(10, 10))


def test_a_wanted_effect_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted effect 0"):
        power.users_for_mean(0.0, 1.0, 0.1)
    with pytest.raises(ConfigError, match="wanted effect 0"):
        power.users_for_rate(0.0, 0.1, 0.1)


def facts(**over: Any) -> dict[str, Any]:
    """What a selection of 10,000 users, 1,000 of them withheld, records."""
    base = {"campaign_id": "7", "run_date": "2024-01-10", "model_version": "dien-0", "selected_users": 10_000}
    base |= {
        "mailed_users": 9_000,
        "control_users": 1_000,
        "holdout_users": 0,
        "binding_constraint": "budget",
    }
    base |= {"expected_conversions": 450.0, "expected_cost_amount": 630.0, "expected_profit_amount": 1_620.0}
    base |= {
        "expected_conversions_interval": [409, 491],
        "expected_cost_amount_interval": [588.5, 671.5],
        "expected_profit_amount_interval": None,
        "forecast_words": "chance alone",
    }
    return base | over


def test_a_plan_names_the_smallest_effect_and_what_a_wanted_one_needs() -> None:
    section = SelectionConfig(
        control_share=0.1, margin_amount=5.0, discount_amount=1.0, mail_cost_amount=0.02
    )
    found = planning.forecast(facts(), Base(0.05, "as given", 4.0), section, 0.01)
    assert found["smallest_effect"] == pytest.approx(0.02074, abs=2e-6)
    assert found["smallest_lift"] == pytest.approx(0.4148, abs=1e-4)
    assert found["smallest_margin_total_amount"] == pytest.approx(0.02074 * 5 * 9_000, rel=1e-4)
    assert found["smallest_revenue_amount"] == power.smallest_mean_effect(4.0, Arms(9_000, 1_000))
    # d * 5 = .02 + (.05 + d) * 1 at d = .0175.
    assert found["break_even_effect"] == pytest.approx(0.0175)
    assert found["wanted_effect_power"] == power.rate_power(0.01, 0.05, Arms(9_000, 1_000))
    assert found["wanted_effect_users"] == power.users_for_rate(0.01, 0.05, 0.1)
    assert found["expected_profit_amount"] == 1_620.0
    shown = dict(campaign_commands.plan_rows(found, "USD"))
    assert shown["expected conversions"] == "450 (95 %: 409 to 491)"
    assert shown["expected cost"] == "USD\u00a0630.00 (95 %: USD\u00a0588.50 to USD\u00a0671.50)"
    assert shown["expected profit"] == f"USD\u00a01,620.00 (95 %: {formats.DASH})"
    assert "2.07 points or more is shown in 4 of 5" in found["words"]


def test_several_coupons_count_as_one_expected_conversion_does() -> None:
    """450 conversions: 150 of 6 less 2, 300 of 5 less .5; 9,000 mails of .02."""
    coupons = (
        CouponOption(coupon_id="large", discount_amount=2.0, margin_amount=6.0),
        CouponOption(coupon_id="small", discount_amount=0.5),
    )
    section = SelectionConfig(coupons=coupons, margin_amount=5.0, mail_cost_amount=0.02)
    cost = 150 * 2.0 + 300 * 0.5 + 9_000 * 0.02
    told = facts(expected_cost_amount=cost, expected_profit_amount=150 * 6.0 + 300 * 5.0 - cost)
    found = planning.forecast(told, Base(0.05, "as given"), section, 0.0)
    margin, discount = 2_400 / 450, 450 / 450
    assert found["break_even_effect"] == pytest.approx((0.02 + 0.05 * discount) / (margin - discount))
    assert found["smallest_margin_amount"] == pytest.approx(found["smallest_effect"] * margin)
    nobody = facts(expected_conversions=0.0, expected_cost_amount=0.0, expected_profit_amount=0.0)
    found = planning.forecast(nobody, Base(0.05, "as given"), section, 0.0)
    assert found["break_even_effect"] == pytest.approx((0.02 + 0.05 * 1.0) / (5.0 - 1.0))
    caused = section.model_copy(update={"objective": "incremental_profit"})
    found = planning.forecast(told, Base(0.05, "as given"), caused, 0.0)
    assert found["break_even_effect"] == pytest.approx((0.02 + 0.05 * discount) / (5.0 - discount))


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"mailed_users": 10_000, "control_users": 0}, "Nobody is withheld"),
        ({"control_users": 99}, "fewer than 100 users, so a readout will be refused"),
        ({"mailed_users": 100, "control_users": 100}, "No effect could be shown"),
    ],
)
def test_a_plan_that_can_show_nothing_says_so(over: dict[str, Any], words: str) -> None:
    found = planning.forecast(facts(**over), Base(0.95, "as given"), SelectionConfig(), 0.0)
    assert words in found["words"]
    assert found["wanted_effect_users"] is None


def test_the_base_rate_is_measured_or_predicted() -> None:
    assert planning.predicted_base(facts()).rate == pytest.approx(0.05)
    with pytest.raises(DataError, match=r"nobody would be mailed \(bound by budget\).*--base-rate"):
        planning.predicted_base(facts(mailed_users=0))
    withheld = {"revenue_deviation": 3.0, "conversion_rate": 0.04}
    record: dict[str, Any] = {"campaign_id": "6", "version": "v", "arms": {"withheld": withheld}}
    assert planning.measured_base(record) == Base(0.04, "withheld users of campaign 6, version v", 3.0)
    withheld["conversion_rate"] = 0.0
    assert planning.measured_base(record) is None
