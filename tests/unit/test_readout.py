"""The readout tells the truth of simulated campaigns, and refuses to speak where there is no control."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from couponflow.campaign.readouts import actuals, effects, intervals, readout
from couponflow.campaign.readouts.effects import Arm, Cell, Money
from couponflow.errors import ConfigError
from couponflow.training import metrics

MONEY = Money(margin_amount=5.0, mail_cost_amount=0.02, discount_amount=1.0, costs={})
SHARES = {"treat": 0.81, "control": 0.09, "holdout": 0.1}
RUNS = 200


def bucket(probability: np.ndarray) -> np.ndarray:
    odds = np.log(probability) - np.log1p(-probability)
    return np.floor(odds * effects.BUCKETS_PER_E).astype(int)


def cells_of(users: dict[str, np.ndarray], shares: dict[str, float]) -> list[Cell]:
    """Cells as the aggregation over a ledger gives them; one row per user goes in."""
    found = []
    for arm in np.unique(users["arm"]):
        mine = {name: values[users["arm"] == arm] for name, values in users.items()}
        places, place = np.unique(mine["bucket"], return_inverse=True)

        def total(values: np.ndarray, place: np.ndarray = place) -> list[float]:
            sums: list[float] = np.bincount(place, weights=values).tolist()
            return sums

        mailed = mine["mailed"]
        columns = zip(
            places.tolist(),
            total(np.ones(place.size)),
            total(mine["converted"]),
            total(mine["revenue"]),
            total(mine["revenue"] ** 2),
            total(mine["before"]),
            total(mailed),
            total(mailed * mine["probability"]),
            total(mailed & mine["converted"]),
            strict=True,
        )
        found += [
            Cell(
                str(arm), int(n), int(size), True, shares[str(arm)], int(c), r, r2, int(b), int(m), p, int(a)
            )
            for n, size, c, r, r2, b, m, p, a in columns
        ]
    return found


def world(
    seed: int,
    size: int = 6_000,
    uplift: float = 0.03,
    deal: Callable[[np.random.Generator, np.ndarray], np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Users with known chances without (p0) and with the mail (p1), and what that makes on average."""
    draw = np.random.default_rng(seed)
    p0 = draw.beta(2.0, 30.0, size)
    p1 = np.minimum(p0 + uplift * draw.random(size) * 2.0, 1.0)
    arm = draw.choice(list(SHARES), size, p=list(SHARES.values())) if deal is None else deal(draw, p0)
    mailed = arm == "treat"
    converted = draw.random(size) < np.where(mailed, p1, p0)
    basket = np.round(draw.lognormal(2.5, 0.8, size), 2)
    mean_basket = math.exp(2.5 + 0.8**2 / 2)
    users = {
        "arm": arm,
        "probability": p1,
        "bucket": bucket(p1),
        "mailed": mailed,
        "converted": converted,
        "revenue": np.where(converted, basket, 0.0),
        "before": draw.random(size) < p0,
    }
    truth = {"conversion": float((p1 - p0).mean()), "revenue": float((p1 - p0).mean()) * mean_basket}
    truth["margin"] = 5.0 * truth["conversion"]
    truth["profit"] = float(4.0 * p1.mean() - 0.02 - 5.0 * p0.mean())
    return users, truth


def test_intervals_cover_the_truth_of_200_simulated_worlds() -> None:
    covered = dict.fromkeys((*effects.OUTCOMES, "lift"), 0)
    shown = refused = 0
    for seed in range(RUNS):
        users, truth = world(seed)
        found = readout.measure(cells_of(users, SHARES), MONEY)
        refused += bool(found["refusal"])
        arms = readout.arms(cells_of(users, SHARES))
        for name in effects.OUTCOMES:
            effect = effects.effect(name, arms["treat"], arms["withheld"], MONEY)
            covered[name] += effect.interval[0] <= truth[name] <= effect.interval[1]
            if name == "conversion":
                base = 2.0 / 32.0  # the mean of the beta of p0
                low, high = effect.lift_interval
                covered["lift"] += low <= truth[name] / base <= high
                shown += not effect.covers_zero
    for name, number in covered.items():
        assert 0.90 <= number / RUNS <= 0.99, (name, number / RUNS)
    assert refused <= 2, "four checks at one in a thousand each: 200 sound worlds refuse once at most"
    assert shown > 0.8 * RUNS, "an effect of three points is seen at this size"


def test_without_an_effect_one_is_shown_in_1_to_10_percent_of_200_worlds() -> None:
    shown = 0
    for seed in range(RUNS):
        users, _ = world(seed + 1_000, size=3_000, uplift=0.0)
        arms = readout.arms(cells_of(users, SHARES))
        effect = effects.effect("conversion", arms["treat"], arms["withheld"], MONEY)
        shown += not effect.covers_zero
    assert 0.01 <= shown / RUNS <= 0.10


def test_sample_ratio_false_alarms_are_as_rare_as_stated() -> None:
    draw = np.random.default_rng(3)
    p_values = []
    for sizes in draw.multinomial(5_000, list(SHARES.values()), 4_000):
        cells = [
            Cell(arm, 0, int(size), propensity=SHARES[arm]) for arm, size in zip(SHARES, sizes, strict=True)
        ]
        p_values.append(readout.sample_ratio(cells)["p_value"])
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.012)
    assert np.mean(np.array(p_values) < readout.MIN_P_VALUE) <= 0.003


@pytest.mark.parametrize("confounder", ["score", "past"])
def test_a_confounded_control_is_refused_in_every_world(confounder: str) -> None:
    """Arms of the right sizes, dealt by what users did: the same shares are logged, the check finds it."""

    def deal(draw: np.random.Generator, p0: np.ndarray) -> np.ndarray:
        keen = p0 > np.median(p0)
        is_control = draw.random(p0.size) < np.where(keen, 0.02, 0.18)
        is_holdout = draw.random(p0.size) < 0.1
        return np.where(is_holdout, "holdout", np.where(is_control, "control", "treat"))

    for seed in range(20):
        users, _ = world(seed, size=8_000, deal=deal)
        if confounder == "past":  # all alike to the model, so that only the past can tell
            users["bucket"] = np.zeros_like(users["bucket"])
            users["before"] = np.random.default_rng(seed).random(8_000) < np.where(
                users["arm"] == "control", 0.1, 0.2
            )
        cells = cells_of(users, SHARES)
        assert readout.sample_ratio(cells)["p_value"] > readout.MIN_P_VALUE
        found = readout.measure(cells, MONEY)
        assert "the control is not random" in found["refusal"], seed
        assert ("AUC" in found["refusal"]) == (confounder == "score")
        assert found["effects"] == {}
        assert "cannot be told" in found["verdict"]


def simple_cells(**arms: dict[str, Any]) -> list[Cell]:
    base = {"treat": 0.8, "control": 0.2}
    return [
        Cell(arm, 0, propensity=over.pop("propensity", base.get(arm, 0.0)), **over)
        for arm, over in arms.items()
    ]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (simple_cells(treat={"num_users": 900, "propensity": 1.0}), "nobody who was selected was withheld"),
        (
            simple_cells(treat={"num_users": 800}, control={"num_users": 200, "num_mailed": 3}),
            "3 of 200 withheld users got the mail",
        ),
        (
            simple_cells(treat={"num_users": 900}, control={"num_users": 120}),
            "treat 900 (logged shares expect 816)",
        ),
        (simple_cells(treat={"num_users": 900}), "missing 0 (logged shares expect 180)"),
        (simple_cells(treat={"num_users": 396}, control={"num_users": 99}), "withheld has 99 users"),
        (
            simple_cells(treat={"num_users": 800}, control={"num_users": 200, "propensity": 0.5}),
            "other sizes than they were dealt with",
        ),
        (
            simple_cells(treat={"num_users": 800, "propensity": math.nan}, control={"num_users": 200}),
            "other sizes than they were dealt with",
        ),
    ],
)
def test_what_is_no_experiment_is_refused_with_the_reason(cells: list[Cell], words: str) -> None:
    found = readout.measure(cells, MONEY)
    assert words in found["refusal"]
    assert found["effects"] == {}


def test_a_hundred_users_and_one_percent_of_mistakes_are_read() -> None:
    cells = simple_cells(
        treat={"num_users": 400, "num_mailed": 390}, control={"num_users": 100, "num_mailed": 1}
    )
    found = readout.measure(cells, MONEY)
    assert found["refusal"] == ""
    assert "1 withheld users got the mail" in found["verdict"]


@pytest.mark.parametrize("outcome", ["open", "click", "mail_open", "mail_click", "redemption"])
def test_what_an_unmailed_user_cannot_do_is_never_compared(outcome: str) -> None:
    with pytest.raises(ConfigError, match="a user without mail cannot have it"):
        effects.effect(outcome, Arm(500, 50), Arm(500, 0), MONEY)
    assert outcome not in effects.OUTCOMES


def test_a_known_campaign_by_hand() -> None:
    treat = Arm(9_000, 540, revenue_amount=10_800.0, revenue_squares=250_000.0, num_mailed=8_900)
    withheld = Arm(1_000, 40, revenue_amount=800.0, revenue_squares=18_000.0)
    effect = effects.effect("conversion", treat, withheld, MONEY)
    assert effect.difference == pytest.approx(0.02)
    # Newcombe's method 10, worked out apart: Wilson (.055274, .065103) and (.029512, .054011).
    assert effect.interval == pytest.approx((0.005207, 0.031668), abs=2e-5)
    assert effect.lift == pytest.approx(0.5)
    width = intervals.Z * math.sqrt(0.94 / 540 * 9_000 / 8_999 + 0.96 / 40 * 1_000 / 999)
    assert effect.lift_interval == pytest.approx((1.5 * math.exp(-width) - 1, 1.5 * math.exp(width) - 1))
    assert effect.described(9_000)["total"] == pytest.approx(180.0)
    margin = effects.effect("margin", treat, withheld, MONEY)
    assert margin.described(9_000)["total"] == pytest.approx(900.0)
    # 540 conversions of 4 each, 8,900 mails of .02, against 5 x 360 that would have come anyway.
    profit = effects.effect("profit", treat, withheld, MONEY)
    assert profit.described(9_000)["total"] == pytest.approx(540 * 4 - 8_900 * 0.02 - 5 * 360)
    told = replace(MONEY, costs={"mail": 100.0, "redemption": 500.0})
    known = effects.effect("profit", treat, withheld, told)
    assert known.described(9_000)["total"] == pytest.approx(900.0 - 600.0)
    gap = margin.interval[0] - known.interval[0]
    assert gap == pytest.approx(600.0 / 9_000), "a known cost moves the interval and does not widen it"
    revenue = effects.effect("revenue", treat, withheld, MONEY)
    spread = (250_000 - 9_000 * 1.2**2) / 8_999 / 9_000 + (18_000 - 1_000 * 0.8**2) / 999 / 1_000
    assert revenue.standard_error == pytest.approx(math.sqrt(spread))
    assert revenue.difference == pytest.approx(0.4)


def test_words_say_what_was_shown_and_what_could_have_been() -> None:
    def words(converted: int, margin: float = 5.0) -> str:
        cells = simple_cells(
            treat={"num_users": 8_000, "num_converted": converted, "num_mailed": 8_000},
            control={"num_users": 2_000, "num_converted": 100},
        )
        verdict: str = readout.measure(cells, replace(MONEY, margin_amount=margin))["verdict"]
        return verdict

    assert words(440).startswith("Not shown to work at this size: +0.50 points of conversion")
    assert "smallest effect this campaign could have shown: +1.57 points" in words(440)
    assert words(800).startswith("The mail caused 400 conversions: +5.00 points")
    assert "Profit is above 0." in words(800)
    assert "It lost money." in words(800, margin=1.0)
    assert "Whether it paid is not shown." in words(560)
    assert words(200).startswith("The mail prevented 200 conversions: -2.50 points")


def test_nobody_converting_proves_nothing() -> None:
    cells = simple_cells(treat={"num_users": 800}, control={"num_users": 200})
    effect = readout.measure(cells, MONEY)["effects"]["conversion"]
    assert effect["covers_zero"]
    assert effect["interval"][1] > 0.004
    assert math.isnan(effect["lift"])


def test_exploration_stands_apart() -> None:
    plain = simple_cells(
        treat={"num_users": 800, "num_converted": 80}, control={"num_users": 200, "num_converted": 10}
    )
    explored = Cell("explore", 5, 300, is_selected=False, propensity=0.01, num_converted=90, num_mailed=300)
    with_it, without = (readout.measure(cells, MONEY) for cells in ([*plain, explored], plain))
    assert with_it["arms"]["explore"]["conversion_rate"] == pytest.approx(0.3)
    assert with_it["effects"] == without["effects"]
    assert with_it["checks"] == without["checks"]


def test_the_deal_is_judged_without_the_global_holdout() -> None:
    """Holdout users never got a mail, so what they did before may differ without any fault of the deal."""
    cells = [
        Cell("treat", 0, 810, propensity=0.81, num_before=400),
        Cell("control", 0, 90, propensity=0.09, num_before=44),
        Cell("holdout", -200, 100, propensity=0.1, num_before=0),
    ]
    assert readout.measure(cells, MONEY)["refusal"] == ""


@pytest.mark.parametrize(
    ("value", "degrees", "tail"),
    [
        (3.841459, 1, 0.05),
        (5.991465, 2, 0.05),
        (7.814728, 3, 0.05),
        (9.487729, 4, 0.05),
        (13.815511, 2, 0.001),
    ],
)
def test_chi_square_tails_are_those_of_the_tables(value: float, degrees: int, tail: float) -> None:
    assert intervals.chi_square_tail(value, degrees) == pytest.approx(tail, rel=1e-6)


def test_t_quantiles_are_those_of_the_tables() -> None:
    for degrees, quantile in ((10, 2.228139), (30, 2.042272), (100, 1.983972), (1e9, 1.959964)):
        assert intervals.t_quantile(degrees) == pytest.approx(quantile, abs=1e-4)


def test_welch_is_exact_on_a_textbook_case() -> None:
    # Sizes 15 and 29, variances 7.9 and 3.8, means 20.8 and 23.0: 21.7 degrees of freedom.
    errors = 7.9 / 15, 3.8 / 29
    degrees = sum(errors) ** 2 / (errors[0] ** 2 / 14 + errors[1] ** 2 / 28)
    low, high = intervals.mean_difference(-2.2, errors, (15, 29))
    assert (high - low) / 2 == pytest.approx(intervals.t_quantile(degrees) * math.sqrt(sum(errors)))
    assert degrees == pytest.approx(21.7, abs=0.6)
    assert intervals.mean_difference(0.0, (0.0, 0.0), (5, 5)) == (0.0, 0.0)
    assert math.isnan(intervals.mean_difference(0.0, (0.0, 0.0), (1, 5))[0])


def calibrated(seed: int, factor: float = 1.0) -> list[Cell]:
    """Mailed users whose chance is ``factor`` times the predicted one."""
    draw = np.random.default_rng(seed)
    size = 5_000
    probability = draw.beta(2.0, 30.0, size)
    users = {
        "arm": np.full(size, "treat"),
        "probability": probability,
        "bucket": bucket(probability),
        "mailed": np.ones(size, bool),
        "converted": draw.random(size) < factor * probability,
        "revenue": np.zeros(size),
        "before": np.zeros(size, bool),
    }
    return cells_of(users, {"treat": 1.0})


def test_expected_against_actual_holds_in_deciles_of_a_calibrated_model() -> None:
    inside = drifted = 0
    for seed in range(40):
        found = actuals.expected_against_actual(calibrated(seed), 15, None)
        assert [row["decile"] for row in found["deciles"]] == list(range(1, 11))
        assert sum(row["num_users"] for row in found["deciles"]) == found["num_users"] == 5_000
        assert all(400 <= row["num_users"] <= 600 for row in found["deciles"])
        rates = [row["expected_rate"] for row in found["deciles"]]
        assert rates == sorted(rates)
        inside += sum(row["is_inside"] for row in found["deciles"])
        drifted += found["is_drifted"]
    assert 0.90 <= inside / 400 <= 0.99
    # An interval at 95 % misses 2 of 40; the band is 1.8 standard errors wide here, so it forgives few.
    assert drifted <= 5


def test_drift_is_found_and_told_beside_the_evaluation() -> None:
    records = [
        {"run_id": "evaluate-1", "models": {"dien": {"model_version": "dien-2", "metrics": {}}}},
        {
            "run_id": "evaluate-2",
            "models": {
                "dien": {"model_version": "dien-1", "metrics": {"calibration_ratio": 1.02, "ece": 0.004}}
            },
        },
        {
            "run_id": "evaluate-3",
            "models": {
                "dien": {"model_version": "dien-1", "metrics": {"calibration_ratio": 9.0, "ece": 0.1}}
            },
        },
    ]
    evaluated = actuals.find_evaluated(records, "dien-1")
    assert evaluated is not None
    assert evaluated.run_id == "evaluate-2"
    assert actuals.find_evaluated(records, "dien-9") is None
    found = actuals.expected_against_actual(calibrated(1, factor=0.6), 15, evaluated)
    assert found["is_drifted"]
    assert found["ratio_interval"][0] > 1.0
    assert "1.02 times when the model was evaluated. Calibration has drifted" in found["words"]
    assert found["evaluation"]["ece"] == 0.004


def test_calibration_error_of_cells_is_close_to_that_of_rows() -> None:
    draw = np.random.default_rng(5)
    probability = draw.beta(2.0, 30.0, 20_000)
    converted = draw.random(20_000) < 0.7 * probability
    users = {"arm": np.full(20_000, "treat"), "probability": probability, "bucket": bucket(probability)}
    users |= {"mailed": np.ones(20_000, bool), "converted": converted, "revenue": np.zeros(20_000)}
    cells = cells_of(users | {"before": np.zeros(20_000, bool)}, {"treat": 1.0})
    found = actuals.expected_against_actual(cells, 15, None)
    # Cells are not cut, so bins differ by some users: a hundredth of the error itself.
    assert found["ece"] == pytest.approx(metrics.ece(probability, converted), rel=0.02)
    assert found["ratio"] == pytest.approx(metrics.calibration_ratio(probability, converted))


def test_nothing_mailed_has_no_ratio_and_nobody_coming_is_drift() -> None:
    nobody = actuals.expected_against_actual([Cell("control", 0, 5)], 15, None)
    assert nobody["num_users"] == 0
    assert nobody["deciles"] == []
    assert nobody["words"] == "No mailed user has a prediction."
    mailed = Cell("treat", 0, 900, num_mailed=900, mailed_probability=40.0)
    assert actuals.expected_against_actual([mailed], 15, None)["is_drifted"]
    few = replace(mailed, mailed_probability=2.0)
    assert not actuals.expected_against_actual([few], 15, None)["is_drifted"]


@pytest.mark.parametrize("costs", [{}, {"mail": 90.0}])
def test_each_coupon_brings_its_own_margin_and_discount(costs: dict[str, float]) -> None:
    """Against means and variances of amounts per user, the plain way."""
    draw = np.random.default_rng(3)
    coupons: dict[str | None, tuple[float, float]] = {"small": (5.0, 0.5), "large": (8.0, 2.5)}
    money = replace(MONEY, coupons=coupons, costs=costs)
    size = 4_000
    arm = draw.choice(["treat", "control"], size, p=[0.8, 0.2])
    coupon = draw.choice([*coupons, None], size)
    converted = draw.random(size) < np.where(arm == "treat", 0.12, 0.08)
    cells = [
        Cell(
            name,
            0,
            int(mine.sum()),
            num_converted=int((mine & converted).sum()),
            num_mailed=int(mine.sum()) if name == "treat" else 0,
            coupon_id=offer,
        )
        for name in ("treat", "control")
        for offer in (*coupons, None)
        if (mine := (arm == name) & (coupon == offer)).any()
    ]
    amounts = [coupons.get(offer, (5.0, 1.0)) for offer in coupon.tolist()]
    margin, gain = (converted * np.array([one - two * share for one, two in amounts]) for share in (0.0, 1.0))
    treat = arm == "treat"
    found = readout.arms(cells)
    effect = effects.effect("margin", found["treat"], found["withheld"], money)
    assert effect.treated == pytest.approx(margin[treat].mean())
    assert effect.withheld == pytest.approx(margin[~treat].mean())
    spread = margin[treat].var(ddof=1) / treat.sum() + margin[~treat].var(ddof=1) / (~treat).sum()
    assert effect.standard_error == pytest.approx(math.sqrt(spread))
    profit = effects.effect("profit", found["treat"], found["withheld"], money)
    cost = 90.0 / treat.sum() if costs else 0.02
    kept = margin if costs else gain
    assert profit.difference == pytest.approx(kept[treat].mean() - cost - margin[~treat].mean())
    spread = kept[treat].var(ddof=1) / treat.sum() + margin[~treat].var(ddof=1) / (~treat).sum()
    assert profit.standard_error == pytest.approx(math.sqrt(spread))
    assert math.isnan(profit.lift)
    given = (margin - gain)[treat].sum() + 0.02 * treat.sum()
    assert money.cost(found["treat"]) == pytest.approx(90.0 if costs else given)
    assert money.cost(Arm(0)) == (90.0 if costs else 0.0)
