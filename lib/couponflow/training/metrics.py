"""Ranking and calibration metrics in numpy, exact about ties.

Arrays are aligned and one-dimensional: ``score`` (any monotone value), ``probability``, ``logit`` float [N];
``label`` 0 or 1 [N]; ``weight`` non-negative row weights [N], such as bootstrap multiplicities. A metric
that does not exist (one class only, no rows) is NaN, never 0. The order of the rows does not matter, except
that rows of equal probability at the edge of a calibration bin keep their order.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
SHARES = (0.01, 0.05, 0.1, 0.2)


def auc(score: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Chance that a positive scores above a negative, ties counting half: P(s+ > s-) + P(s+ = s-) / 2."""
    ordered = Ordered(score, label)
    weights = np.ones(ordered.size) if weight is None else np.asarray(weight, np.float64)
    return float(ordered.auc(weights[None, :])[0])


def pr_auc(score: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Average precision: sum of (R_n - R_{n-1}) P_n over distinct scores, tied rows entering together."""
    ordered = Ordered(score, label)
    weights = np.ones(ordered.size) if weight is None else np.asarray(weight, np.float64)
    return float(ordered.pr_auc(weights[None, :])[0])


class Ordered:
    """Rows sorted by score once, so that many weightings cost one cumulative sum each.

    ``weights`` of the methods is [draws, N] in the caller's row order; the result is [draws].
    """

    def __init__(self, score: ArrayLike, label: ArrayLike) -> None:
        """Sort [N] rows."""
        values = np.asarray(score, np.float64)
        self.size = values.size
        self._order = np.argsort(values, kind="stable")
        ascending = values[self._order]
        self._starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]][: self.size])
        self._label = np.asarray(label, np.float64)[self._order]

    def _groups(self, weights: Floats) -> tuple[Floats, Floats]:
        """Positive and negative weight of each group of equal scores, [draws, groups], lowest score first."""
        sorted_weights = weights[:, self._order]
        if not self.size:
            return np.zeros((len(weights), 0)), np.zeros((len(weights), 0))
        positive = np.add.reduceat(sorted_weights * self._label, self._starts, axis=1)
        negative = np.add.reduceat(sorted_weights * (1.0 - self._label), self._starts, axis=1)
        return positive, negative

    def auc(self, weights: Floats) -> Floats:
        """Weighted AUC of each draw; NaN where a draw lacks a class."""
        positive, negative = self._groups(weights)
        below = np.cumsum(negative, axis=1) - negative
        wins = (positive * (below + 0.5 * negative)).sum(1)
        pairs = positive.sum(1) * negative.sum(1)
        return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

    def pr_auc(self, weights: Floats) -> Floats:
        """Weighted average precision of each draw; NaN where a draw lacks positives."""
        positive, negative = (side[:, ::-1] for side in self._groups(weights))
        hits = np.cumsum(positive, axis=1)
        taken = hits + np.cumsum(negative, axis=1)
        precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
        total = positive.sum(1)
        return np.divide(
            (positive * precision).sum(1), total, out=np.full(len(weights), np.nan), where=total > 0
        )


def gauc(
    score: ArrayLike,
    label: ArrayLike,
    group_key: Sequence[Any] | NDArray[Any],
    weight: Literal["rows", "positives"] = "rows",
) -> tuple[float, float]:
    """Mean AUC inside groups, and the share of rows in groups that have one.

    ``group_key`` [N] names each row's group: the campaign where a user has one row per campaign. Groups of
    one class leave numerator and denominator. A group weighs its rows, or its positives.
    """
    values, labels = np.asarray(score, np.float64), np.asarray(label, np.float64)
    groups = np.unique(np.asarray(group_key), return_inverse=True)[1]
    total = mass = 0.0
    covered = 0
    for group in range(groups.max() + 1 if groups.size else 0):
        rows = groups == group
        value = auc(values[rows], labels[rows])
        if np.isnan(value):
            continue
        share = float(rows.sum() if weight == "rows" else labels[rows].sum())
        total, mass, covered = total + share * value, mass + share, covered + int(rows.sum())
    return (total / mass if mass else float("nan")), (covered / groups.size if groups.size else 0.0)


def row_log_loss(logit: ArrayLike, label: ArrayLike) -> Floats:
    """Cross entropy of each row from its logit; finite for any finite logit."""
    logits, labels = np.asarray(logit, np.float64), np.asarray(label, np.float64)
    return np.asarray(np.logaddexp(0.0, logits) - labels * logits)


def log_loss(logit: ArrayLike, label: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Weighted mean cross entropy, in nats, from logits."""
    losses = row_log_loss(logit, label)
    return float(np.average(losses, weights=weight)) if losses.size else float("nan")


def normalised_entropy(logit: ArrayLike, label: ArrayLike) -> float:
    """Log loss over the entropy of the same rows' base rate; a constant at the base rate gives 1."""
    labels = np.asarray(label, np.float64)
    rate = labels.mean() if labels.size else float("nan")
    if not 0.0 < rate < 1.0:
        return float("nan")
    entropy = -(rate * np.log(rate) + (1.0 - rate) * np.log1p(-rate))
    return log_loss(logit, labels) / float(entropy)


def captured(score: ArrayLike, label: ArrayLike, num_rows: int) -> float:
    """Share of all positives among the ``num_rows`` highest scores.

    Ties: rows that tie at the cut count by their mean label, so the order of the rows does not matter.
    """
    values, labels = np.asarray(score, np.float64), np.asarray(label, np.float64)
    positives = labels.sum()
    if not positives or not 0 <= num_rows <= values.size:
        return float("nan")
    if not num_rows:
        return 0.0
    cut = np.partition(values, values.size - num_rows)[values.size - num_rows]
    above, tied = values > cut, values == cut
    hits = labels[above].sum() + (num_rows - above.sum()) * labels[tied].mean()
    return float(hits / positives)


def rows_of_share(share: float, size: int) -> int:
    """Rows in the top ``share``: round(share * size), halves up, at least one."""
    return max(1, int(np.floor(share * size + 0.5))) if size else 0


def lift(score: ArrayLike, label: ArrayLike, num_rows: int) -> float:
    """Positive rate among the ``num_rows`` highest scores over the positive rate of all rows."""
    size = np.asarray(score).size
    return captured(score, label, num_rows) * size / num_rows if num_rows else float("nan")


def _bins(probability: Floats, num_bins: int) -> list[NDArray[np.intp]]:
    return [rows for rows in np.array_split(np.argsort(probability, kind="stable"), num_bins) if rows.size]


def reliability(probability: ArrayLike, label: ArrayLike, num_bins: int = 15) -> list[dict[str, float]]:
    """Mean predicted and observed rate in bins of equal row counts, lowest probability first."""
    values, labels = np.asarray(probability, np.float64), np.asarray(label, np.float64)
    return [
        {
            "predicted": float(values[rows].mean()),
            "observed": float(labels[rows].mean()),
            "rows": int(rows.size),
        }
        for rows in _bins(values, num_bins)
    ]


def ece(probability: ArrayLike, label: ArrayLike, num_bins: int = 15) -> float:
    """Expected calibration error: row-weighted mean of |mean p - mean y| over equal-mass bins."""
    table = reliability(probability, label, num_bins)
    rows = sum(entry["rows"] for entry in table)
    if not rows:
        return float("nan")
    return sum(abs(entry["predicted"] - entry["observed"]) * entry["rows"] for entry in table) / rows


def equal_width_ece(probability: ArrayLike, label: ArrayLike, num_bins: int) -> float:
    """The same over bins of equal width; for comparison only, since rare events share one bin."""
    values, labels = np.asarray(probability, np.float64), np.asarray(label, np.float64)
    place = np.minimum((values * num_bins).astype(int), num_bins - 1)  # p = 1 belongs to the last bin
    gaps = np.bincount(place, weights=values - labels, minlength=num_bins)
    return float(np.abs(gaps).sum() / values.size) if values.size else float("nan")


def brier(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean squared difference of probability and label."""
    gaps = np.asarray(probability, np.float64) - np.asarray(label, np.float64)
    return float(np.mean(gaps**2)) if gaps.size else float("nan")


def brier_parts(probability: ArrayLike, label: ArrayLike, num_bins: int = 15) -> dict[str, float]:
    """Where the Brier score comes from, over equal-mass bins; the parts add up to it exactly.

    brier = reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance.
    ``reliability`` (lower is better): squared gap of mean p and mean y of a bin; ``resolution`` (higher is
    better): how far the bins' rates lie from the base rate; ``uncertainty``: base rate times its complement.
    The within-bin parts are what Murphy's three (1973) leave out when a bin holds several probabilities.
    Source: Stephenson, Coelho, Jolliffe 2008, "Two extra components in the Brier score decomposition".
    """
    values, labels = np.asarray(probability, np.float64), np.asarray(label, np.float64)
    names = ("reliability", "resolution", "uncertainty", "within_bin_variance", "within_bin_covariance")
    if not values.size:
        return dict.fromkeys(names, float("nan"))
    rate = labels.mean()
    parts = np.array([0.0, 0.0, rate * (1.0 - rate), 0.0, 0.0])
    for rows in _bins(values, num_bins):
        p, y = values[rows], labels[rows]
        gap, spread = p.mean() - y.mean(), p - p.mean()
        covariance = 2.0 * (spread * (y - y.mean())).mean()
        found = np.array([gap**2, (y.mean() - rate) ** 2, 0.0, (spread**2).mean(), covariance])
        parts += found * rows.size / values.size
    return dict(zip(names, parts.tolist(), strict=True))


def calibration_ratio(probability: ArrayLike, label: ArrayLike) -> float:
    """Expected over observed conversions; 1 is right on average."""
    observed = float(np.sum(np.asarray(label, np.float64)))
    return float(np.sum(np.asarray(probability, np.float64))) / observed if observed else float("nan")


def gain_curve(score: ArrayLike, label: ArrayLike, num_points: int = 21) -> list[dict[str, float]]:
    """Share of positives captured by the top share of rows, at evenly spaced shares from 0 to 1."""
    size = np.asarray(score).size
    points = []
    for share in np.linspace(0.0, 1.0, num_points):
        rows = int(np.floor(share * size + 0.5))
        points.append({"share": round(float(share), 6), "captured": captured(score, label, rows)})
    return points
