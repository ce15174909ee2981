import json
import math
from dataclasses import replace

import numpy as np
import pytest

from couponflow.errors import ConfigError, DataError
from couponflow.modelling import CalibrationConfig
from couponflow.models.calibration import (
    IDENTITY,
    Calibrator,
    fit,
    fit_isotonic,
    fit_platt,
    fit_temperature,
    logit,
    platt_targets,
    prior_shift,
    sigmoid,
)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.mean(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities)))


def one(calibrator: Calibrator, probability: float) -> float:
    return float(calibrator.apply(np.array([logit(probability)]))[0])


def test_down_sampled_negatives_are_undone() -> None:
    assert one(Calibrator(sampling_rate=0.1), 0.5) == pytest.approx(0.090909, abs=1e-6)


def test_positive_weight_is_undone() -> None:
    assert one(Calibrator(positive_weight=9.0), 0.9) == pytest.approx(0.5)


def test_prior_moves_to_the_expected_one() -> None:
    shifts = {"type_a": prior_shift(0.1, 0.05)}
    flat = Calibrator("isotonic", shifts=shifts, knot_logits=(0.0,), knot_probabilities=(0.2,))
    for calibrator in (Calibrator(shifts=shifts), flat):
        moved, kept = calibrator.apply(np.full(2, logit(0.2)), np.array(["type_a", "type_b"]))
        assert moved == pytest.approx(0.105882, abs=1e-6)
        assert kept == pytest.approx(0.2)


def test_a_prior_is_moved_after_the_fitted_map_so_that_it_is_exact() -> None:
    """p' = p r / (p r + (1 - p) s) of the calibrated p, whatever the slope."""
    logits = np.linspace(-3.0, 2.0, 9)
    fitted = Calibrator("platt", 0.6, -0.4, sampling_rate=0.2)
    moved = replace(fitted, shifts={"type_a": prior_shift(0.3, 0.1)})
    p = fitted.apply(logits)
    r, s = 0.1 / 0.3, 0.9 / 0.7
    types = np.full(9, "type_a")
    np.testing.assert_allclose(moved.apply(logits, types), p * r / (p * r + (1 - p) * s), rtol=1e-12)
    assert moved.apply(logits, np.full(9, "other")).tolist() == p.tolist()


def test_a_calibrator_that_tells_types_apart_needs_them() -> None:
    for calibrator in (
        Calibrator(shifts={"other": 0.1}),
        Calibrator("platt", segments={"other": (1.0, 0.1)}),
    ):
        with pytest.raises(ConfigError, match="give the type of each row"):
            calibrator.apply(np.zeros(2))


def test_platt_targets_are_smoothed() -> None:
    assert platt_targets(3, 2) == (0.8, 0.25)


def test_temperature_golden_values() -> None:
    logits = np.array([4.0] * 4 + [-4.0] * 4)
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    fitted = fit_temperature(logits, labels)
    assert 1 / fitted.slope == pytest.approx(4 / math.log(3), abs=1e-6)
    assert log_loss(IDENTITY.apply(logits), labels) == pytest.approx(1.018150, abs=1e-6)
    assert log_loss(fitted.apply(logits), labels) == pytest.approx(0.562335, abs=1e-6)


def test_platt_finds_the_optimum_of_its_targets() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=400)
    labels = (generator.random(400) < sigmoid(2.0 * logits - 1.0)).astype(float)
    fitted = fit_platt(logits, labels)
    high, low = platt_targets(int(labels.sum()), int((1 - labels).sum()))
    residual = fitted.apply(logits) - np.where(labels == 1, high, low)
    assert abs(residual.sum()) < 1e-6
    assert abs((residual * logits).sum()) < 1e-6
    assert fitted.slope == pytest.approx(2.0, abs=0.5)
    assert fitted.intercept == pytest.approx(-1.0, abs=0.3)
    assert fit_platt(logits, labels) == fitted


def test_platt_recovers_known_miscalibration() -> None:
    generator = np.random.default_rng(1)
    truth = generator.normal(size=60_000) - 2.0
    labels = (generator.random(truth.size) < sigmoid(truth)).astype(float)
    fitted = fit_platt(3.0 * truth + 1.0, labels)
    assert fitted.slope == pytest.approx(1 / 3, rel=0.05)
    assert np.abs(fitted.apply(3.0 * truth + 1.0) - sigmoid(truth)).max() < 0.02


def test_platt_survives_separable_far_and_equal_logits() -> None:
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    for logits in ([-1.0, -2.0, 1.0, 2.0], [-900.0, -1.0, 1.0, 900.0], [3.0] * 4):
        fitted = fit_platt(np.array(logits), labels)
        assert np.isfinite(fitted.apply(np.array(logits))).all()
    equal = fit_platt(np.array([3.0] * 4), labels)
    assert equal.apply(np.array([3.0]))[0] == pytest.approx(0.5)
    assert equal.slope == 1.0  # equal scores say nothing about it


def test_exact_corrections_come_before_the_fit_and_stay() -> None:
    generator = np.random.default_rng(2)
    logits = generator.normal(size=500)
    labels = (generator.random(500) < sigmoid(logits)).astype(float)
    base = Calibrator(sampling_rate=0.5, positive_weight=2.0)
    fitted = fit_platt(logits, labels, base)
    plain = fit_platt(logits + base.correction, labels)
    assert (fitted.sampling_rate, fitted.positive_weight) == (0.5, 2.0)
    assert fitted.apply(logits) == pytest.approx(plain.apply(logits + base.correction))


def test_order_of_users_never_changes() -> None:
    logits = np.sort(np.random.default_rng(3).normal(size=50))
    calibrated = Calibrator("platt", 0.7, -1.0, 0.1, 3.0).apply(logits)
    assert (np.diff(calibrated) > 0).all()


def test_apply_saturates_without_overflow() -> None:
    with np.errstate(over="raise"):
        assert IDENTITY.apply(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_round_trip_through_json() -> None:
    segments, shifts = {"type_b": (1 / 3, -0.1), "other": (0.7, 0.0)}, {"type_a": -2 / 3}
    affine = Calibrator("platt", 0.1 + 0.2, -1 / 3, 0.25, 4.0, segments, shifts)
    stepped = Calibrator(
        "isotonic", shifts=shifts, knot_logits=(-1 / 3, 0.1), knot_probabilities=(0.0, 2 / 3)
    )
    for calibrator in (IDENTITY, affine, stepped):
        assert Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict()))) == calibrator


def test_bad_calibrators_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected"):
        Calibrator.from_dict({"slope": 1.0})
    with pytest.raises(ConfigError, match="no numbers"):
        Calibrator.from_dict(IDENTITY.to_dict() | {"slope": "steep"})
    for over in (
        {"slope": math.nan},
        {"sampling_rate": 0.0},
        {"positive_weight": -1.0},
        {"method": "magic"},
        {"shifts": {"type_a": math.inf}},
        {"segments": {"type_a": (1.0, math.nan)}},
        {"segments": {"type_a": (1.0,)}},
    ):
        with pytest.raises(ConfigError, match="not a calibrator"):
            Calibrator(**over)  # type: ignore[arg-type]  # wrong on purpose
    for x, y in (
        ((), ()),
        ((1.0, 1.0), (0.1, 0.2)),
        ((1.0, 2.0), (0.2, 0.1)),
        ((1.0,), (1.1,)),
        ((1.0,), ()),
    ):
        with pytest.raises(ConfigError, match="do not ascend"):
            Calibrator("isotonic", knot_logits=x, knot_probabilities=y)
    with pytest.raises(ConfigError, match="do not ascend"):
        Calibrator("platt", knot_logits=(1.0,), knot_probabilities=(0.5,))
    with pytest.raises(ConfigError, match="no numbers"):
        Calibrator.from_dict(IDENTITY.to_dict() | {"segments": {"type_a": 3}})
    with pytest.raises(ConfigError, match="no logit"):
        prior_shift(0.0, 0.5)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0, 2.0], [0.0, 0.0], "0 positives in 2"),
        ([1.0, 2.0], [1.0, 1.0], "2 positives in 2"),
        ([], [], "0 positives in 0"),
        ([1.0, math.inf], [0.0, 1.0], "not finite"),
        ([1.0, 2.0], [0.0, 0.5], "neither 0 nor 1"),
        ([1.0], [0.0, 1.0], "do not pair up"),
    ],
)
def test_unfit_validation_rows_are_refused(logits: list[float], labels: list[float], message: str) -> None:
    for fit_one in (fit_platt, fit_temperature, fit_isotonic):
        with pytest.raises(DataError, match=message):
            fit_one(np.array(logits), np.array(labels))


# -------------------------------------------------------------------------------------------------- isotonic
def pools(labels: list[float]) -> list[float]:
    """Pool adjacent violators, the slow way: merge neighbours that fall until none does."""
    blocks = [[label] for label in labels]
    while True:
        for place in range(len(blocks) - 1):
            if np.mean(blocks[place]) > np.mean(blocks[place + 1]):
                blocks[place : place + 2] = [blocks[place] + blocks[place + 1]]
                break
        else:
            return [float(np.mean(block)) for block in blocks for _ in block]


def test_isotonic_golden_values() -> None:
    fitted = fit_isotonic(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 0.0, 1.0]))
    found = fitted.apply(np.array([1.0, 2.0, 3.0, 4.0, 9.0, 2.5, -5.0]))
    assert found.tolist() == pytest.approx([0.0, 0.5, 0.5, 1.0, 1.0, 0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 10, 60])
def test_isotonic_equals_pooling_by_hand(size: int) -> None:
    for seed in range(5):
        generator = np.random.default_rng(seed)
        logits = np.sort(generator.normal(size=size))
        labels = np.append(generator.integers(0, 2, size - 2), [0.0, 1.0]).astype(float)
        base = Calibrator(sampling_rate=0.5)
        fitted = fit_isotonic(logits, labels, base)
        assert fitted.apply(logits).tolist() == pytest.approx(pools(labels.tolist()), abs=1e-9)
        assert fitted.sampling_rate == 0.5
        outside = fitted.apply(np.array([-1e9, 1e9]))
        assert outside.tolist() == fitted.apply(logits[[0, -1]]).tolist()


def test_few_positives_are_refused_for_isotonic_with_the_next_step() -> None:
    logits, labels = np.arange(10.0), np.array([0.0, 1.0] * 5)
    config = CalibrationConfig(method="isotonic", isotonic_positives=6)
    with pytest.raises(DataError, match=r"5 positives in 10 rows, expected 6 .* set calibration.method"):
        fit(logits, labels, np.full(10, "other"), config)
    enough = config.model_copy(update={"isotonic_positives": 5})
    assert fit(logits, labels, np.full(10, "other"), enough).method == "isotonic"


# ------------------------------------------------------------------------------------------------- by config
def test_every_method_is_what_the_config_names() -> None:
    generator = np.random.default_rng(5)
    logits = generator.normal(size=300)
    labels = (generator.random(300) < sigmoid(2 * logits - 1)).astype(float)
    types, base = np.full(300, "type_a"), Calibrator(sampling_rate=0.5)
    expected = {
        "none": base,
        "platt": fit_platt(logits, labels, base),
        "temperature": fit_temperature(logits, labels, base),
        "isotonic": fit_isotonic(logits, labels, base),
    }
    for method, calibrator in expected.items():
        config = CalibrationConfig(method=method, isotonic_positives=2)  # type: ignore[arg-type]  # all four
        assert fit(logits, labels, types, config, base) == calibrator
        assert calibrator.method == method
    with pytest.raises(ValueError, match="needs method = 'platt'"):
        CalibrationConfig(method="isotonic", by="campaign_type")


def typed_rows(seed: int = 0, small: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Type a: many rows and its own slope; type b: few positives and another base rate only."""
    generator = np.random.default_rng(seed)
    types = np.array(["type_a"] * 4000 + ["type_b"] * small)
    logits = generator.normal(size=types.size)
    truth = np.where(types == "type_a", 0.5 * logits - 1.0, 0.5 * logits - 3.0)
    return logits, (generator.random(types.size) < sigmoid(truth)).astype(float), types


def test_a_type_of_few_positives_gets_an_intercept_beside_the_shared_slope() -> None:
    logits, labels, types = typed_rows()
    assert labels[types == "type_b"].sum() < 200 < labels[types == "type_a"].sum()
    fitted = fit_platt(logits, labels, types=types)
    alone = fit_platt(logits[types == "type_a"], labels[types == "type_a"])
    assert fitted.segments["type_a"] == pytest.approx((alone.slope, alone.intercept), abs=1e-9)
    shared, intercept = fitted.segments["type_b"]
    assert shared == pytest.approx(0.5, abs=0.1)
    assert intercept == pytest.approx(-3.0, abs=0.4)
    for name in ("type_a", "type_b"):
        rows = types == name
        assert fitted.apply(logits, types)[rows].mean() == pytest.approx(labels[rows].mean(), abs=0.01)
    common = fit_platt(logits, labels)  # for a type that validation has not
    unseen = fitted.apply(logits[:3], np.full(3, "type_c"))
    assert unseen.tolist() == pytest.approx(common.apply(logits[:3]).tolist())
    assert abs(common.apply(logits)[types == "type_b"].mean() - labels[types == "type_b"].mean()) > 0.1


def test_types_of_one_class_or_of_equal_scores_stay_finite() -> None:
    logits, labels, types = typed_rows(small=5)
    labels[types == "type_b"] = 0.0
    fitted = fit_platt(logits, labels, types=types)
    assert fitted.apply(logits, types)[-5:].max() < 0.5
    flat = fit_platt(np.where(types == "type_a", -1.0, -2.0), labels, types=types)
    slopes = {slope for slope, _ in flat.segments.values()}
    assert slopes == {1.0}
    assert flat.apply(np.array([-1.0]), np.array(["type_a"]))[0] == pytest.approx(
        labels[:4000].mean(), abs=1e-3
    )
