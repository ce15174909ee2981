"""From logits to probabilities that money may be multiplied with.

Order: undo sampling and class weights exactly, shift to the prior of the campaign, then the fitted map
(Platt or temperature, fitted on validation). Every step is affine in the logit, so the order of users never
changes as long as the slope is positive; sort by the raw logit all the same.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from couponflow.errors import ConfigError, DataError

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_STEPS = 100
_TOLERANCE = 1e-10  # on the gradient of the mean loss


@dataclass(frozen=True)
class Calibrator:
    """p = sigmoid(slope * (logit + correction) + intercept); the default changes nothing.

    ``sampling_rate`` is the share of negatives kept in training, ``positive_weight`` the loss weight of
    positives there, ``prior_shift`` a difference of prior logits (see ``prior_shift``).

    Raises:
        ConfigError: a value is not finite, or a rate or weight is not above 0.
    """

    method: str = "identity"
    slope: float = 1.0
    intercept: float = 0.0
    sampling_rate: float = 1.0
    positive_weight: float = 1.0
    prior_shift: float = 0.0

    def __post_init__(self) -> None:
        numbers = (
            self.slope,
            self.intercept,
            self.sampling_rate,
            self.positive_weight,
            self.prior_shift,
        )
        is_finite = all(math.isfinite(number) for number in numbers)
        if not is_finite or not 0 < self.sampling_rate <= 1 or self.positive_weight <= 0:
            raise ConfigError(f"{self}: not a calibrator; fit it again")

    @property
    def correction(self) -> float:
        """What is added to the logit before the fitted map: sampling, class weight and prior."""
        return math.log(self.sampling_rate) - math.log(self.positive_weight) + self.prior_shift

    def apply(self, logits: Array) -> Array:
        """Calibrated probabilities, float64, of raw logits of any shape."""
        return sigmoid(self.slope * (np.asarray(logits, np.float64) + self.correction) + self.intercept)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; ``from_dict`` gives an equal calibrator."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibrator":
        """Read ``to_dict``'s form.

        Raises:
            ConfigError: names differ from the declared ones, or a value is no number.
        """
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise ConfigError(f"calibrator has fields {sorted(values)}, expected {sorted(expected)}")
        try:
            numbers = {name: float(value) for name, value in values.items() if name != "method"}
        except (TypeError, ValueError) as error:
            raise ConfigError(f"calibrator holds no numbers ({error}); fit it again") from error
        return cls(method=str(values["method"]), **numbers)


IDENTITY = Calibrator()


def sigmoid(logits: Array) -> Array:
    """1 / (1 + e^-x) without overflow on either side."""
    decay = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, decay) / (1.0 + decay))


def logit(probability: float) -> float:
    """log(p / (1 - p)).

    Raises:
        ConfigError: p is not strictly between 0 and 1.
    """
    if not 0.0 < probability < 1.0:
        raise ConfigError(f"probability {probability} has no logit; give one strictly between 0 and 1")
    return math.log(probability) - math.log1p(-probability)


def prior_shift(trained: float, expected: float) -> float:
    """Logit shift that moves a model from the base rate it was trained on to the expected one."""
    return logit(expected) - logit(trained)


def platt_targets(num_positives: int, num_negatives: int) -> tuple[float, float]:
    """Smoothed targets of positives and negatives: (N+ + 1) / (N+ + 2) and 1 / (N- + 2).

    Source: Platt 1999; the prior keeps a separable validation set from an infinite slope.
    """
    return (num_positives + 1) / (num_positives + 2), 1 / (num_negatives + 2)


def fit_platt(logits: Array, labels: Array, base: Calibrator = IDENTITY) -> Calibrator:
    """Fit slope and intercept on validation rows by Newton steps; deterministic.

    ``base`` brings the exact corrections, which are applied first and kept.

    Raises:
        DataError: no rows, one class only, labels beside 0 and 1, or logits that are not finite.
    """
    scores, is_positive = _checked(logits, labels)
    high, low = platt_targets(int(is_positive.sum()), int((~is_positive).sum()))
    design = np.stack([scores + base.correction, np.ones_like(scores)], axis=1)
    slope, intercept = _newton(design, np.where(is_positive, high, low), np.array([1.0, 0.0]))
    return Calibrator(
        "platt", float(slope), float(intercept), base.sampling_rate, base.positive_weight, base.prior_shift
    )


def fit_temperature(logits: Array, labels: Array, base: Calibrator = IDENTITY) -> Calibrator:
    """Fit one temperature T, p = sigmoid(logit / T); it cannot move the base rate.

    Raises:
        DataError: as ``fit_platt``.
    """
    scores, is_positive = _checked(logits, labels)
    design = (scores + base.correction)[:, None]
    slope = _newton(design, is_positive.astype(np.float64), np.array([1.0]))[0]
    return Calibrator(
        "temperature", float(slope), 0.0, base.sampling_rate, base.positive_weight, base.prior_shift
    )


def _checked(logits: Array, labels: Array) -> tuple[Array, Array]:
    scores, targets = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    if scores.ndim != 1 or scores.shape != targets.shape:
        raise DataError(f"calibration: logits {scores.shape} and labels {targets.shape} do not pair up")
    if not np.isfinite(scores).all() or not np.isin(targets, (0.0, 1.0)).all():
        raise DataError("calibration: a logit is not finite or a label is neither 0 nor 1")
    is_positive = targets == 1.0
    if not is_positive.any() or is_positive.all():
        raise DataError(
            f"calibration: {int(is_positive.sum())} positives in {targets.size} validation rows; "
            "both classes are needed, widen the validation range"
        )
    return scores, is_positive


def _newton(design: Array, targets: Array, start: Array) -> Array:
    """Minimise the mean cross entropy of sigmoid(design @ w) against soft targets.

    Steps are halved until the loss falls; the loss is convex, so the optimum does not depend on the start.
    """

    def loss(weights: Array) -> float:
        scores = design @ weights
        return float(np.mean(np.logaddexp(0.0, scores) - targets * scores))

    weights, value = start, loss(start)
    for _ in range(_MAX_STEPS):
        fitted = sigmoid(design @ weights)
        gradient = design.T @ (fitted - targets) / len(targets)
        if np.abs(gradient).max() < _TOLERANCE:
            break
        curvature = (design * (fitted * (1 - fitted))[:, None]).T @ design / len(targets)
        # Equal logits leave the slope undetermined; the ridge picks the smallest step then.
        step = np.linalg.solve(curvature + 1e-12 * np.eye(len(start)), gradient)
        scale = 1.0
        while scale > 1e-10 and loss(weights - scale * step) > value:
            scale /= 2
        if scale <= 1e-10:
            break
        weights = weights - scale * step
        value = loss(weights)
    return weights
