import json
import math

import numpy as np
import pytest

from couponflow.errors import ConfigError, DataError
from couponflow.models.calibration import (
    IDENTITY,
    Calibrator,
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
    assert one(Calibrator(prior_shift=prior_shift(0.1, 0.05)), 0.2) == pytest.approx(0.105882, abs=1e-6)


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
    assert fit_platt(np.array([3.0] * 4), labels).apply(np.array([3.0]))[0] == pytest.approx(0.5)


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
    calibrated = Calibrator("platt", 0.7, -1.0, 0.1, 3.0, 0.4).apply(logits)
    assert (np.diff(calibrated) > 0).all()


def test_apply_saturates_without_overflow() -> None:
    with np.errstate(over="raise"):
        assert IDENTITY.apply(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_round_trip_through_json() -> None:
    calibrator = Calibrator("platt", 0.1 + 0.2, -1 / 3, 0.25, 4.0, -0.7)
    assert Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict()))) == calibrator


def test_bad_calibrators_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected"):
        Calibrator.from_dict({"slope": 1.0})
    with pytest.raises(ConfigError, match="no numbers"):
        Calibrator.from_dict(IDENTITY.to_dict() | {"slope": "steep"})
    for over in ({"slope": math.nan}, {"sampling_rate": 0.0}, {"positive_weight": -1.0}):
        with pytest.raises(ConfigError, match="not a calibrator"):
            Calibrator(**over)  # type: ignore[arg-type]  # every value here is a float
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
    for fit in (fit_platt, fit_temperature):
        with pytest.raises(DataError, match=message):
            fit(np.array(logits), np.array(labels))
