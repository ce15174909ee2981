"""From logits to probabilities that money may be multiplied with.

Order: undo sampling and class weights exactly, apply the map fitted on validation (Platt, temperature or
isotonic), then move to the conversion rate of the campaign's type. Isotonic output has ties and a slope may
differ per campaign type: metrics of rank take the raw logit.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from couponflow.errors import ConfigError, DataError
from couponflow.modelling import CalibrationConfig

Array = np.ndarray[Any, np.dtype[Any]]

METHODS = ("none", "platt", "temperature", "isotonic")
#: A campaign type gets a slope of its own from so many positives on; below, its own intercept only.
OWN_SLOPE_POSITIVES = 200
_MAX_STEPS = 100
_TOLERANCE = 1e-10  # on the gradient of the mean loss


@dataclass(frozen=True)
class Calibrator:
    """p = sigmoid(slope * (logit + correction) + intercept + shift); the default changes nothing.

    ``sampling_rate`` is the share of negatives kept in training, ``positive_weight`` the loss weight of
    positives there. ``segments`` maps a campaign type to its own (slope, intercept), ``shifts`` one to the
    difference of prior logits (see ``prior_shift``): other types have the common map and no shift. With knots
    (isotonic) the map is piecewise linear through them and constant outside.

    The shift is added to the calibrated logit, not to the raw one: only there a slope beside 1 leaves
    p' = p r / (p r + (1 - p) s), r = new / old rate, s = (1 - new) / (1 - old), exact.

    Raises:
        ConfigError: an unknown method, a value that is not finite, a rate or weight that is not above 0, or
            knots that do not ascend.
    """

    method: str = "none"
    slope: float = 1.0
    intercept: float = 0.0
    sampling_rate: float = 1.0
    positive_weight: float = 1.0
    segments: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shifts: Mapping[str, float] = field(default_factory=dict)
    knot_logits: tuple[float, ...] = ()
    knot_probabilities: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = [self.slope, self.intercept, self.sampling_rate, self.positive_weight]
        numbers += [*self.shifts.values(), *self.knot_logits, *self.knot_probabilities]
        numbers += [number for pair in self.segments.values() for number in pair]
        is_sound = all(math.isfinite(number) for number in numbers) and self.method in METHODS
        is_sound = is_sound and all(len(pair) == 2 for pair in self.segments.values())
        if not is_sound or not 0 < self.sampling_rate <= 1 or self.positive_weight <= 0:
            raise ConfigError(f"{self}: not a calibrator; fit it again")
        x, y = np.array(self.knot_logits), np.array(self.knot_probabilities)
        ascends = x.size == y.size and (np.diff(x) > 0).all() and (np.diff(y) >= 0).all()
        if not ascends or not ((y >= 0) & (y <= 1)).all() or (x.size > 0) != (self.method == "isotonic"):
            raise ConfigError(
                f"calibrator: {x.size} knots of method {self.method} do not ascend; fit it again"
            )

    @property
    def correction(self) -> float:
        """What is added to the logit before the fitted map: sampling and class weight."""
        return math.log(self.sampling_rate) - math.log(self.positive_weight)

    @property
    def needs_types(self) -> bool:
        """Whether the probability depends on the campaign's type."""
        return bool(self.segments or self.shifts)

    def apply(self, logits: Array, types: Array | None = None) -> Array:
        """Calibrated probabilities, float64, of raw logits of any shape.

        ``types``: the campaign type of each logit (``tabular.campaign_types``).

        Raises:
            ConfigError: the calibrator tells types apart and none are given.
        """
        scores = np.asarray(logits, np.float64) + self.correction
        if not self.needs_types:
            return self._mapped(scores, self.slope, self.intercept, 0.0)
        if types is None:
            raise ConfigError("this calibrator tells campaign types apart; give the type of each row")
        slope, intercept, shift = (
            np.full(scores.shape, value) for value in (self.slope, self.intercept, 0.0)
        )
        for name, (own_slope, own_intercept) in self.segments.items():
            slope[types == name], intercept[types == name] = own_slope, own_intercept
        for name, own_shift in self.shifts.items():
            shift[types == name] = own_shift
        return self._mapped(scores, slope, intercept, shift)

    def _mapped(
        self, scores: Array, slope: Array | float, intercept: Array | float, shift: Array | float
    ) -> Array:
        if not self.knot_logits:
            return sigmoid(slope * scores + intercept + shift)
        probability = np.interp(scores, self.knot_logits, self.knot_probabilities)
        odds = probability * np.exp(shift)  # a knot of 0 or 1 has no logit
        return np.asarray(odds / (odds + 1.0 - probability))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; ``from_dict`` gives an equal calibrator."""
        tree = asdict(self)
        tree["segments"] = {name: list(pair) for name, pair in sorted(self.segments.items())}
        tree["shifts"] = dict(sorted(self.shifts.items()))
        for name in ("knot_logits", "knot_probabilities"):
            tree[name] = list(tree[name])
        return tree

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibrator":
        """Read ``to_dict``'s form.

        Raises:
            ConfigError: names differ from the declared ones, or a value is no number.
        """
        expected = {part.name for part in fields(cls)}
        if set(values) != expected:
            raise ConfigError(
                f"calibrator has fields {sorted(values)}, expected {sorted(expected)}; train the model again"
            )
        try:
            names = ("slope", "intercept", "sampling_rate", "positive_weight")
            numbers: dict[str, Any] = {name: float(values[name]) for name in names}
            for name in ("knot_logits", "knot_probabilities"):
                numbers[name] = tuple(float(number) for number in values[name])
            numbers["shifts"] = {str(name): float(number) for name, number in values["shifts"].items()}
            numbers["segments"] = {
                str(name): (float(slope), float(intercept))
                for name, (slope, intercept) in values["segments"].items()
            }
        except (TypeError, ValueError, AttributeError) as error:
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


def fit(
    logits: Array, labels: Array, types: Array, config: CalibrationConfig, base: Calibrator = IDENTITY
) -> Calibrator:
    """Fit the configured map on rows that the model was not trained on; deterministic.

    ``types`` [N] are campaign types; ``base`` brings the exact corrections, which are applied first and kept.

    Raises:
        DataError: no rows, one class only, labels beside 0 and 1, logits that are not finite, or fewer
            positives than the isotonic map needs.
    """
    match config.method:
        case "platt":
            return fit_platt(logits, labels, base, types if config.by == "campaign_type" else None)
        case "temperature":
            return fit_temperature(logits, labels, base)
        case "isotonic":
            return fit_isotonic(logits, labels, base, config.isotonic_positives)
        case "none":
            _checked(logits, labels)
            return base


def fit_platt(
    logits: Array, labels: Array, base: Calibrator = IDENTITY, types: Array | None = None
) -> Calibrator:
    """Fit slope and intercept on validation rows by Newton steps.

    With ``types`` [N] each campaign type has its own intercept beside one slope fitted with them, and from
    ``OWN_SLOPE_POSITIVES`` positives on its own slope. Scores that are all equal tell nothing about the
    slope, which stays 1.

    Raises:
        DataError: as ``fit``.
    """
    scores, is_positive = _checked(logits, labels)
    scores = scores + base.correction
    slope, (intercept,) = _platt(scores, is_positive, [np.ones_like(is_positive)])
    fitted = replace(base, method="platt", slope=slope, intercept=intercept, segments={})
    if types is None:
        return fitted
    names = sorted(set(np.asarray(types).tolist()))
    members = [np.asarray(types) == name for name in names]
    shared, intercepts = _platt(scores, is_positive, members)
    segments = {name: (shared, own) for name, own in zip(names, intercepts, strict=True)}
    for name, rows in zip(names, members, strict=True):
        if is_positive[rows].sum() >= OWN_SLOPE_POSITIVES and not is_positive[rows].all():
            own_slope, (own,) = _platt(scores[rows], is_positive[rows], [np.ones(rows.sum(), bool)])
            segments[name] = (own_slope, own)
    return replace(fitted, segments=segments)


def fit_temperature(logits: Array, labels: Array, base: Calibrator = IDENTITY) -> Calibrator:
    """Fit one temperature T, p = sigmoid(logit / T); it cannot move the base rate.

    Raises:
        DataError: as ``fit``.
    """
    scores, is_positive = _checked(logits, labels)
    design = (scores + base.correction)[:, None]
    slope = _newton(design, is_positive.astype(np.float64), np.array([1.0]))[0]
    return replace(base, method="temperature", slope=float(slope), intercept=0.0, segments={})


def fit_isotonic(
    logits: Array, labels: Array, base: Calibrator = IDENTITY, min_positives: int = 1
) -> Calibrator:
    """Fit a non-decreasing map by pool-adjacent-violators; stored as knots, constant outside them.

    Raises:
        DataError: as ``fit``, or fewer than ``min_positives`` positives: the steps would follow noise.
    """
    from sklearn.isotonic import IsotonicRegression

    scores, is_positive = _checked(logits, labels)
    if (found := int(is_positive.sum())) < min_positives:
        raise DataError(
            f"calibration: {found} positives in {scores.size} rows, expected {min_positives} for method "
            "isotonic; set calibration.method = 'platt', or widen the validation range"
        )
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
    model.fit(scores + base.correction, is_positive.astype(np.float64))
    return replace(
        base,
        method="isotonic",
        slope=1.0,
        intercept=0.0,
        segments={},
        knot_logits=tuple(float(x) for x in model.X_thresholds_),
        knot_probabilities=tuple(float(y) for y in model.y_thresholds_),
    )


def _platt(scores: Array, is_positive: Array, members: list[Array]) -> tuple[float, list[float]]:
    """One slope, and one intercept per set of rows; targets are smoothed by the counts of each set."""
    flags = np.stack(members, axis=1).astype(np.float64)
    targets = np.empty(scores.size)
    for rows in members:
        high, low = platt_targets(int(is_positive[rows].sum()), int((~is_positive[rows]).sum()))
        targets[rows] = np.where(is_positive[rows], high, low)
    start = np.zeros(len(members))
    if all(np.ptp(scores[rows]) == 0.0 for rows in members):
        return 1.0, _newton(flags, targets, start, scores).tolist()
    fitted = _newton(np.column_stack([scores, flags]), targets, np.append(1.0, start))
    return float(fitted[0]), fitted[1:].tolist()


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


def _newton(design: Array, targets: Array, start: Array, offset: Array | float = 0.0) -> Array:
    """Minimise the mean cross entropy of sigmoid(design @ w + offset) against soft targets.

    Steps are halved until the loss falls; the loss is convex, so the optimum does not depend on the start.
    """

    def loss(weights: Array) -> float:
        scores = design @ weights + offset
        return float(np.mean(np.logaddexp(0.0, scores) - targets * scores))

    weights, value = start, loss(start)
    for _ in range(_MAX_STEPS):
        fitted = sigmoid(design @ weights + offset)
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
