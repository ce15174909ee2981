"""The models to beat, and the blend: rates, a rule and logistic regressions, deterministic, as plain numbers.

From cheap to dear: the conversion rate of the campaign's type, a rule that a marketer could write down, and
logistic regression on the aggregates, standardised by the training rows. The blend sees nothing but
the raw logits of its members on validation rows; its calibrator is fitted on logits of folds that the blend
was not fitted on, so that its calibration is not judged on its own training rows.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from couponflow.errors import DataError
from couponflow.models.bundle import Blend, Bundle
from couponflow.models.calibration import Calibrator, fit_platt, logit
from couponflow.models.tabular import Logistic, Rate, Rule, campaign_types
from couponflow.training.metrics import Floats

log = logging.getLogger("couponflow")

#: The blend's members carry two to three weights: hardly any shrinkage is needed.
_BLEND_C = 10.0
#: The rule: redemptions and recent orders for, days since the last order against. All three are log1p'd, as
#: the aggregates hold them, and weigh alike; nothing here was fitted.
RULE = {"num_redemptions": 1.0, "num_orders_91_days": 1.0, "recency_days": -1.0}


def fit_rate(wide: Floats, label: Floats) -> Rate:
    """The conversion rate of each campaign type, and of all rows for a type that is absent or of one class.

    Raises:
        DataError: one class only.
    """
    overall = _rate(label)
    if overall is None:
        raise _one_class("conversion rate", label)
    types = campaign_types(wide)
    by_type = {str(name): _rate(label[types == name]) for name in np.unique(types)}
    return Rate(overall, {name: rate for name, rate in by_type.items() if rate is not None})


def fit_rule(wide: Floats, label: Floats) -> Rule:
    """The rule of ``RULE``, with the slope and intercept that make its score a logit.

    Raises:
        DataError: one class only, or a value that is not finite.
    """
    score = Rule(RULE, 1.0, 0.0).score(np.asarray(wide, np.float64))
    slope, intercept = _regress(score[:, None], label, _BLEND_C)
    return Rule(RULE, float(slope[0]), intercept)


def _rate(label: Floats) -> float | None:
    """Logit of the rate, or None where it has none."""
    return logit(float(label.mean())) if label.size and 0.0 < label.mean() < 1.0 else None


def fit_logistic(wide: Floats, label: Floats, inverse_strength: float) -> Logistic:
    """Fit the aggregates alone.

    ``wide`` [N,F] not standardised, ``label`` [N]; ``inverse_strength`` is C of the L2 penalty. Mean and
    standard deviation come from these rows; a constant feature gets no weight.

    Raises:
        DataError: one class only, or a value that is not finite.
    """
    wide = np.asarray(wide, np.float64)
    mean, sd = wide.mean(0), wide.std(0)
    sd[sd < 1e-12 * (1.0 + np.abs(mean))] = 0.0  # constant but for rounding
    standardised = np.where(sd == 0.0, 0.0, (wide - mean) / np.where(sd == 0.0, 1.0, sd))
    coefficients, intercept = _regress(standardised, label, inverse_strength)
    return Logistic(coefficients, intercept, mean, sd)


def fit_blend(logits: Mapping[str, Floats], label: Floats) -> tuple[dict[str, float], float]:
    """Weights by kind and intercept of a logistic regression on raw member logits, each [N].

    Raises:
        DataError: one class only, or a logit that is not finite.
    """
    kinds = sorted(logits)
    weights, intercept = _regress(np.column_stack([logits[kind] for kind in kinds]), label, _BLEND_C)
    return dict(zip(kinds, weights.tolist(), strict=True)), intercept


def blend_bundle(
    members: Mapping[str, Bundle],
    logits: Mapping[str, Floats],
    label: Floats,
    user_id: Sequence[str],
    calibrate: Callable[[Floats, Floats], Calibrator] = fit_platt,
) -> Bundle:
    """Blend fitted on validation rows, with a calibrator from cross-fitted logits.

    All arrays are [N] over the same rows. Fold of a row: parity of a hash of its user, so that a user's rows
    stay together. The stored weights are fitted on all rows. ``calibrate`` is given logits and labels.

    Raises:
        DataError: a fold or the whole has one class only.
    """
    fold = user_fold(user_id)
    crossed = np.empty(label.size, np.float64)
    for held_out in (0, 1):
        rows = fold == held_out
        weights, intercept = fit_blend({k: v[~rows] for k, v in logits.items()}, label[~rows])
        crossed[rows] = intercept + sum(weights[kind] * logits[kind][rows] for kind in sorted(weights))
    weights, intercept = fit_blend(logits, label)
    log.info("blend: weights %s, intercept %.3f", {k: round(v, 3) for k, v in weights.items()}, intercept)
    first = members[min(members)]
    return Bundle(
        Blend(intercept, weights, dict(members)),
        first.vocabulary_version,
        first.vocabulary_sizes,
        first.wide_features,
        calibrate(crossed, label),
    )


def user_fold(user_id: Sequence[str]) -> NDArray[np.int64]:
    """Fold 0 or 1 of each row: parity of SHA-256 of the user, never Python's ``hash``."""
    return np.array([hashlib.sha256(user.encode()).digest()[0] % 2 for user in user_id], np.int64)


def _regress(features: Floats, label: Floats, inverse_strength: float) -> tuple[Floats, float]:
    """L2 logistic regression by L-BFGS from zero, intercept not penalised; deterministic."""
    from sklearn.linear_model import LogisticRegression

    if not np.isfinite(features).all():
        raise DataError("logistic regression: a feature is not finite; check the examples and the members")
    if len(np.unique(label)) < 2:
        raise _one_class("logistic regression", label)
    model = LogisticRegression(C=inverse_strength, solver="lbfgs", max_iter=5000, tol=1e-8)
    model.fit(features, label)
    return np.asarray(model.coef_[0], np.float64), float(model.intercept_[0])


def _one_class(what: str, label: Floats) -> DataError:
    return DataError(
        f"{what}: {int(np.sum(label))} positives in {len(label)} rows; both classes are needed, widen the "
        "dates of the examples"
    )
