"""Logistic regression and the blend against their optimality conditions and planted truth."""

import numpy as np
import pytest
import torch

from couponflow.config import load_config
from couponflow.errors import DataError
from couponflow.lake import layouts
from couponflow.models.batch import Batch, random_batch
from couponflow.models.bundle import Bundle
from couponflow.models.calibration import fit_platt, fit_temperature
from couponflow.models.dien import Dien
from couponflow.models.tabular import Logistic
from couponflow.training import baselines, metrics, preparation
from couponflow.training.workers import Workers

SIZES = {"item": 50, "category": 20, "shop": 8, "event_type": 9}
NUM_WIDE = len(layouts.WIDE_FEATURES)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def planted(size: int = 3000, num_features: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    wide = generator.normal(3.0, 2.0, (size, num_features))
    truth = (wide - 3.0) @ np.array([0.8, -0.4] + [0.0] * (num_features - 2)) - 1.0
    return wide, (generator.random(size) < sigmoid(truth)).astype(float)


def test_logistic_satisfies_its_optimality_conditions() -> None:
    wide, label = planted()
    model = baselines.fit_logistic(wide, label, 0.1)
    z = (wide - wide.mean(0)) / wide.std(0)
    gap = sigmoid(z @ model.coef + model.intercept) - label
    assert np.abs(gap.sum()) < 1e-2  # the intercept carries no penalty
    assert np.abs(0.1 * z.T @ gap + model.coef).max() < 1e-2
    assert model.coef[0] / 2.0 == pytest.approx(0.8, abs=0.12)


def test_logistic_repeats_bit_for_bit_and_ignores_constants() -> None:
    wide, label = planted()
    wide[:, 3] = 0.1  # not representable: its computed sd is not exactly zero
    one, two = (baselines.fit_logistic(wide, label, 0.1) for _ in range(2))
    assert one.to_dict() == two.to_dict()
    assert (one.coef[3], one.sd[3]) == (0.0, 0.0)


def test_features_that_a_source_does_not_have_change_nothing() -> None:
    """A retailer without browsing or mail events: those columns are constant, at zero or at log1p(365)."""
    wide, label = planted(500)
    absent = np.tile(np.log1p([0.0] * 40 + [365.0] * 3), (len(wide), 1)).astype(np.float32)
    alone = baselines.fit_logistic(wide.astype(np.float32), label, 0.1)
    model = baselines.fit_logistic(np.column_stack([wide.astype(np.float32), absent]), label, 0.1)
    assert model.coef[:5].tolist() == pytest.approx(alone.coef.tolist(), abs=1e-6)
    assert not model.coef[5:].any()
    both = np.column_stack([wide, absent])
    rows = preparation.WideRows(both.mean(0), both.std(0), float(label.mean()), both, label)
    config = load_config(None)
    network = Dien(config.model, SIZES, both.shape[1])
    preparation.prepare(network, rows, config)
    batch = random_batch(torch.Generator().manual_seed(0), 4, num_wide=both.shape[1])
    batch.wide[:] = torch.from_numpy(both[:4]).float()
    assert torch.isfinite(network(batch).logits).all()


def test_one_class_and_non_finite_features_are_refused() -> None:
    wide, label = planted(50)
    with pytest.raises(DataError, match="0 positives in 50 rows"):
        baselines.fit_logistic(wide, np.zeros(50), 0.1)
    wide[3, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        baselines.fit_logistic(wide, label, 0.1)


def test_blend_is_better_than_both_members_and_calibrated() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.normal(size=(2, 4000))
    label = (generator.random(4000) < sigmoid(1.2 * a + 0.8 * b - 1.5)).astype(float)
    batch = random_batch(torch.Generator().manual_seed(0), 6, num_wide=NUM_WIDE)
    zero = np.zeros(NUM_WIDE)
    members = {
        kind: Bundle(Logistic(zero + number, 0.1, zero, zero + 1), "v1", SIZES)
        for number, kind in enumerate(("dien", "logistic"), start=1)
    }
    users = [f"u{n // 2}" for n in range(4000)]
    bundle = baselines.blend_bundle(members, {"dien": a, "logistic": b}, label, users)
    weights = bundle.model.weights
    assert (weights["dien"], weights["logistic"]) == (
        pytest.approx(1.2, abs=0.2),
        pytest.approx(0.8, abs=0.2),
    )
    blended = weights["dien"] * a + weights["logistic"] * b + bundle.model.intercept
    assert metrics.auc(blended, label) > max(metrics.auc(a, label), metrics.auc(b, label)) + 0.02
    assert metrics.ece(bundle.probabilities(blended), label) < 0.03
    assert 0.8 < bundle.calibrator.slope < 1.1
    expected = sum(weights[kind] * member.logits(batch) for kind, member in members.items())
    assert bundle.logits(batch) == pytest.approx(expected + bundle.model.intercept, abs=1e-12)


def test_calibration_of_the_blend_is_cross_fitted() -> None:
    """Members of pure noise: in-sample logits look informative, honest ones get a smaller slope."""
    generator = np.random.default_rng(1)
    logits = {kind: generator.normal(size=80) for kind in ("dien", "logistic")}
    label = (generator.random(80) < 0.4).astype(float)
    zero = np.zeros(NUM_WIDE)
    members = {kind: Bundle(Logistic(zero, 0.0, zero, zero + 1), "v1", SIZES) for kind in logits}
    bundle = baselines.blend_bundle(members, logits, label, [f"u{n}" for n in range(80)])
    in_sample = fit_platt(
        sum(bundle.model.weights[k] * logits[k] for k in logits) + bundle.model.intercept, label
    )
    assert bundle.calibrator.slope < in_sample.slope - 0.3


def test_the_calibrator_of_the_blend_is_the_one_asked_for() -> None:
    generator = np.random.default_rng(1)
    logits = {"logistic": generator.normal(size=80)}
    label = (generator.random(80) < 0.4).astype(float)
    zero = np.zeros(NUM_WIDE)
    members = {"logistic": Bundle(Logistic(zero, 0.0, zero, zero + 1), "v1", SIZES)}
    users = [f"u{n}" for n in range(80)]
    bundle = baselines.blend_bundle(members, logits, label, users, fit_temperature)
    assert bundle.calibrator.method == "temperature"


def test_rates_are_those_of_the_types_and_of_all_rows_elsewhere() -> None:
    wide = np.zeros((10, NUM_WIDE))
    a, b, c = (layouts.WIDE_FEATURES.index(f"is_type_{letter}") for letter in "abc")
    wide[:4, a] = wide[4:8, b] = wide[8:, c] = 1.0
    label = np.array([1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    model = baselines.fit_rate(wide, label)
    rates = {name: float(sigmoid(value)) for name, value in model.by_type.items()}
    assert rates == {"type_a": pytest.approx(0.25), "type_b": pytest.approx(0.75)}  # none of c converted
    assert sigmoid(model.overall) == pytest.approx(0.4)
    with pytest.raises(DataError, match="conversion rate: 0 positives in 10 rows"):
        baselines.fit_rate(wide, np.zeros(10))


def test_the_rule_is_scaled_and_its_order_left_alone() -> None:
    generator = np.random.default_rng(3)
    wide = generator.normal(size=(2000, NUM_WIDE))
    places = [layouts.WIDE_FEATURES.index(name) for name in baselines.RULE]
    score = wide[:, places] @ np.array(list(baselines.RULE.values()))
    label = (generator.random(2000) < sigmoid(0.8 * score - 1.0)).astype(float)
    model = baselines.fit_rule(wide, label)
    assert (model.slope, model.intercept) == (pytest.approx(0.8, abs=0.15), pytest.approx(-1.0, abs=0.2))
    assert model.score(wide) == pytest.approx(score, abs=1e-9)
    assert baselines.RULE["num_redemptions"] > 0 > baselines.RULE["recency_days"]


def test_folds_keep_users_together_and_are_balanced() -> None:
    fold = baselines.user_fold([f"u{n}" for n in range(2000)] * 2)
    assert np.array_equal(fold[:2000], fold[2000:])
    assert 0.45 < fold.mean() < 0.55
    assert (
        baselines.user_fold(["u1", "u2", "u3"]).tolist() == baselines.user_fold(["u1", "u2", "u3"]).tolist()
    )


@pytest.mark.parametrize("warm", [True, False])
def test_a_network_starts_at_the_logistic_model_if_asked(warm: bool) -> None:
    wide, label = planted(500)
    config = load_config(None, (f"training.warm_start={str(warm).lower()}",))
    network = Dien(config.model, SIZES, wide.shape[1])
    rows = preparation.WideRows(wide.mean(0), wide.std(0), float(label.mean()), wide, label)
    preparation.prepare(network, rows, config)
    model = baselines.fit_logistic(wide, label, config.training.logistic_c)
    coef = model.coef if warm else np.zeros(wide.shape[1])
    bias = model.intercept if warm else np.log(label.mean() / (1 - label.mean()))
    assert network.wide_linear.weight[0].tolist() == pytest.approx(coef, rel=1e-5)
    assert network.last.bias.item() == pytest.approx(bias, rel=1e-5)
    assert network.wide_mean.tolist() == pytest.approx(wide.mean(0), rel=1e-5)
    assert network.wide_sd.tolist() == pytest.approx(wide.std(0), rel=1e-5)


def test_the_logistic_start_holds_on_the_statistics_of_all_rows() -> None:
    """The model is fitted on the first rows only; the network standardises by all of them."""
    wide, label = planted(500)
    wide[400:] += 4.0
    wide[:, 2] = 1.0
    config = load_config(None)
    network = Dien(config.model, SIZES, wide.shape[1])
    held = preparation.WideRows(wide.mean(0), wide.std(0), float(label.mean()), wide[:400], label[:400])
    preparation.prepare(network, held, config)
    model = baselines.fit_logistic(wide[:400], label[:400], config.training.logistic_c)
    expected = (wide - model.mean) / np.where(model.sd == 0.0, 1.0, model.sd) @ model.coef + model.intercept
    standardised = (torch.from_numpy(wide).float() - network.wide_mean) / network.wide_sd
    found = (network.wide_linear(standardised)[:, 0] + network.last.bias).tolist()
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_rows_held_for_the_start_are_bounded_over_all_ranks(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [random_batch(torch.Generator().manual_seed(n), 8, num_wide=3) for n in range(20)]
    monkeypatch.setattr(preparation, "_WARM_ROWS", 64)
    workers = Workers()
    workers.size = num_ranks
    rows = preparation.wide_rows(Batches(batches), workers)
    every = torch.cat([batch.wide for batch in batches]).double().numpy()
    assert rows.wide.tolist() == every[: 64 // num_ranks].tolist()
    assert rows.mean == pytest.approx(every.mean(0))
    assert rows.sd == pytest.approx(every.std(0))


class Batches:
    """A feed of batches in memory."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def epoch(self) -> list[Batch]:
        return self._batches
