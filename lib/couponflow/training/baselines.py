"""The models to beat, and the blend: logistic regressions, deterministic, as plain coefficients.

The logistic model sees the aggregates only, standardised by the training rows. The blend sees nothing but
the raw logits of its members on validation rows; its calibrator is fitted on logits of folds that the blend
was not fitted on, so that its calibration is not judged on its own training rows.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from couponflow.errors import DataError
from couponflow.models.bundle import Blend, Bundle, Logistic
from couponflow.models.calibration import Calibrator, fit_platt
from couponflow.training.metrics import Floats

log = logging.getLogger("couponflow")

#: The blend's members carry two to three weights: hardly any shrinkage is needed.
_BLEND_C = 10.0


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
    members: Mapping[str, Bundle], logits: Mapping[str, Floats], label: Floats, user_id: Sequence[str]
) -> Bundle:
    """Blend fitted on validation rows, with a calibrator from cross-fitted logits.

    All arrays are [N] over the same rows. Fold of a row: parity of a hash of its user, so that a user's rows
    stay together. The stored weights are fitted on all rows.

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
    calibrator: Calibrator = fit_platt(crossed, label)
    return Bundle(
        Blend(intercept, weights, dict(members)),
        first.vocabulary_version,
        first.vocabulary_sizes,
        first.wide_features,
        calibrator,
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
        raise DataError(
            f"logistic regression: {int(np.sum(label))} positives in {len(label)} rows; both classes are "
            "needed, widen the dates of the examples"
        )
    model = LogisticRegression(C=inverse_strength, solver="lbfgs", max_iter=5000, tol=1e-8)
    model.fit(features, label)
    return np.asarray(model.coef_[0], np.float64), float(model.intercept_[0])
