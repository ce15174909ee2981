"""Models judged on the same rows: metrics, and intervals by a paired cluster bootstrap.

Rows of one user are not independent, so users are drawn, not rows: each draw gives every user an integer
multiplicity, used as row weight, which equals writing the user's rows that many times. All models of a
comparison see the same draws; a difference of two models is therefore far better known than either value.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from couponflow.errors import DataError
from couponflow.sections import EvaluationConfig
from couponflow.training import metrics
from couponflow.training.metrics import Floats

#: (z .975 + z .80): a true difference this many standard errors wide is found with 80 % power at 5 %.
MINIMUM_DETECTABLE = 2.8016
INTERVAL_METRICS = ("auc", "pr_auc", "log_loss", "ece")
_BLOCK_CELLS = 4_000_000  # draws x rows held at once, 32 MB as float64


@dataclass(frozen=True)
class LabelledRows:
    """What is judged: label 0 or 1, user, campaign and business day (ISO text) of each row, all [N]."""

    label: Floats
    user_id: NDArray[Any]
    campaign_id: NDArray[Any]
    day: NDArray[Any]

    def __post_init__(self) -> None:
        if not self.label.size or len(set(self.label.tolist())) < 2:
            raise DataError(
                f"split to evaluate has {self.label.size} rows and {int(self.label.sum())} positives; "
                "both classes are needed, widen the range of the test split"
            )


@dataclass(frozen=True)
class ScoredModel:
    """One model's raw logits and calibrated probabilities on the rows, float64 [N]."""

    name: str
    model_version: str
    logit: Floats
    probability: Floats


@dataclass(frozen=True)
class Comparison:
    """Paired difference of the primary metric, challenger minus champion, on one cut-off."""

    challenger: str
    champion: str
    difference: float
    interval: tuple[float, float]
    standard_error: float
    skipped_draws: int = 0
    metric: str = "auc"

    @property
    def minimum_detectable(self) -> float:
        """The smallest true difference this data would find with 80 % power."""
        return MINIMUM_DETECTABLE * self.standard_error

    @property
    def is_testable(self) -> bool:
        """Whether the difference seen is at least the minimum detectable one."""
        return abs(self.difference) >= self.minimum_detectable > 0.0

    def as_dict(self) -> dict[str, Any]:
        """The comparison as the evaluation record keeps it."""
        return {
            "challenger": self.challenger,
            "champion": self.champion,
            "metric": self.metric,
            "difference": self.difference,
            "interval": list(self.interval),
            "standard_error": self.standard_error,
            "minimum_detectable": self.minimum_detectable,
            "is_testable": self.is_testable,
            "skipped_draws": self.skipped_draws,
        }


def draw_weights(user_id: NDArray[Any], num_draws: int, seed: int) -> Iterator[Floats]:
    """Row weights of the bootstrap in blocks [draws, N]; each row weighs its user's multiplicity.

    A draw takes as many users as there are, with replacement. The draws depend on the seed and the set of
    users only, not on the block size.
    """
    users, place = np.unique(user_id, return_inverse=True)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_CELLS // max(1, user_id.size))
    for start in range(0, num_draws, block):
        counts = [
            np.bincount(generator.integers(0, users.size, users.size), minlength=users.size)
            for _ in range(min(block, num_draws - start))
        ]
        yield np.asarray(counts, np.float64)[:, place]


def bootstrap(
    rows: LabelledRows, models: Sequence[ScoredModel], num_draws: int, num_bins: int, seed: int
) -> dict[str, dict[str, Floats]]:
    """Every interval metric of every model under the same draws: name -> metric -> [draws].

    Cost: one sort per model, then cumulative sums over blocks of draws.
    """
    ranked = {model.name: metrics.Ordered(model.logit, rows.label) for model in models}
    losses = {model.name: metrics.row_log_loss(calibrated_logit(model), rows.label) for model in models}
    calibration = {model.name: _DrawnEce(model.probability, rows.label, num_bins) for model in models}
    parts: dict[str, dict[str, list[Floats]]] = {m.name: {k: [] for k in INTERVAL_METRICS} for m in models}
    for weights in draw_weights(rows.user_id, num_draws, seed):
        for name, found in parts.items():
            found["auc"].append(ranked[name].auc(weights))
            found["pr_auc"].append(ranked[name].pr_auc(weights))
            found["log_loss"].append(weights @ losses[name] / weights.sum(1))
            found["ece"].append(calibration[name](weights))
    return {
        name: {key: np.concatenate(blocks) for key, blocks in found.items()} for name, found in parts.items()
    }


class _DrawnEce:
    """Equal-mass calibration error of resampled rows; a row may lie in two bins when drawn often."""

    def __init__(self, probability: Floats, label: Floats, num_bins: int) -> None:
        self._order = np.argsort(probability, kind="stable")
        self._gap = (probability - label)[self._order]
        self._num_bins = num_bins

    def __call__(self, weights: Floats) -> Floats:
        return np.asarray([self._one(draw) for draw in weights[:, self._order].astype(np.int64)])

    def _one(self, multiplicity: NDArray[np.int64]) -> float:
        gaps = np.repeat(self._gap, multiplicity)
        size, num_bins = gaps.size, self._num_bins
        long, short = size % num_bins, size // num_bins  # the sizes of numpy's array_split
        edges = np.minimum(np.arange(num_bins), long) + np.arange(num_bins) * short
        edges = edges[edges < size] if short else edges[:long]
        return float(np.abs(np.add.reduceat(gaps, edges)).sum() / size)


def calibrated_logit(model: ScoredModel) -> Floats:
    """The logit of the calibrated probability; log loss is that of what the system would use."""
    probability = np.clip(model.probability, 1e-12, 1.0 - 1e-12)
    return np.asarray(np.log(probability) - np.log1p(-probability))


def interval(draws: Floats) -> tuple[float, float]:
    """Percentile 95 % interval over the draws that exist."""
    if np.isnan(draws).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def compare(
    rows: LabelledRows,
    challenger: ScoredModel,
    champion: ScoredModel,
    draws: Mapping[str, Mapping[str, Floats]],
) -> Comparison:
    """Paired AUC difference with its interval and standard error; draws of one class are skipped."""
    differences = draws[challenger.name]["auc"] - draws[champion.name]["auc"]
    point = metrics.auc(challenger.logit, rows.label) - metrics.auc(champion.logit, rows.label)
    valid = differences[~np.isnan(differences)]
    error = float(valid.std(ddof=1)) if valid.size > 1 else float("nan")
    skipped = int(differences.size - valid.size)
    return Comparison(challenger.name, champion.name, point, interval(differences), error, skipped)


def compare_on(
    rows: LabelledRows,
    challenger: ScoredModel,
    champion: ScoredModel,
    places: NDArray[np.intp],
    config: EvaluationConfig,
) -> Comparison:
    """The same on some of the rows, with draws of their own users.

    Raises:
        DataError: these rows have one class only.
    """
    part = LabelledRows(
        *(values[places] for values in (rows.label, rows.user_id, rows.campaign_id, rows.day))
    )
    draws: dict[str, dict[str, Floats]] = {}
    pair = [
        replace(m, logit=m.logit[places], probability=m.probability[places]) for m in (challenger, champion)
    ]
    ranked = [metrics.Ordered(model.logit, part.label) for model in pair]
    blocks = [
        [order.auc(weights) for order in ranked]
        for weights in draw_weights(part.user_id, config.num_draws, config.seed)
    ]
    for model, drawn in zip(pair, zip(*blocks, strict=True), strict=True):
        draws[model.name] = {"auc": np.concatenate(drawn)}
    return compare(part, pair[0], pair[1], draws)


def point_metrics(rows: LabelledRows, model: ScoredModel, num_bins: int) -> dict[str, Any]:
    """All metrics of one model on all rows; log loss and calibration of the calibrated probability."""
    label = rows.label
    logit = calibrated_logit(model)
    raw = 1.0 / (1.0 + np.exp(-np.clip(model.logit, -500.0, 500.0)))
    grouped, covered = metrics.gauc(model.logit, label, rows.campaign_id)
    sizes = {f"{share:g}": metrics.rows_of_share(share, label.size) for share in metrics.SHARES}
    return {
        "auc": metrics.auc(model.logit, label),
        "gauc": grouped,
        "gauc_covered_share": covered,
        "pr_auc": metrics.pr_auc(model.logit, label),
        "log_loss": metrics.log_loss(logit, label),
        "normalised_entropy": metrics.normalised_entropy(logit, label),
        "ece": metrics.ece(model.probability, label, num_bins),
        "ece_uncalibrated": metrics.ece(raw, label, num_bins),
        "brier": metrics.brier(model.probability, label),
        "brier_parts": metrics.brier_parts(model.probability, label, num_bins),
        "calibration_ratio": metrics.calibration_ratio(model.probability, label),
        "lift": {share: metrics.lift(model.logit, label, size) for share, size in sizes.items()},
        "captured": {share: metrics.captured(model.logit, label, size) for share, size in sizes.items()},
    }


@dataclass(frozen=True)
class Judged:
    """All models on the same rows: point metrics and draws by name, each other model against the champion.

    ``draws`` maps a name to its interval metrics, each [draws]; ``comparisons`` are in the order of the
    models, ``ece_errors`` holds the paired standard error of each challenger's calibration error minus the
    champion's.
    """

    champion: str
    points: dict[str, dict[str, Any]]
    draws: dict[str, dict[str, Floats]]
    comparisons: list[Comparison]
    ece_errors: dict[str, float]


def evaluate(
    rows: LabelledRows, models: Sequence[ScoredModel], champion: str, config: EvaluationConfig
) -> Judged:
    """Judge all models on the rows; ``champion`` names one of them, every other one is compared with it."""
    by_name = {model.name: model for model in models}
    draws = bootstrap(rows, models, config.num_draws, config.num_bins, config.seed)
    others = [model for model in models if model.name != champion]
    return Judged(
        champion,
        {model.name: point_metrics(rows, model, config.num_bins) for model in models},
        draws,
        [compare(rows, model, by_name[champion], draws) for model in others],
        {
            model.name: float(np.std(draws[model.name]["ece"] - draws[champion]["ece"], ddof=1))
            for model in others
        },
    )


def describe(
    rows: LabelledRows, models: Sequence[ScoredModel], judged: Judged, config: EvaluationConfig
) -> dict[str, Any]:
    """The part of the evaluation record that numbers decide: metrics, intervals and curves of each model."""
    return {
        "num_rows": int(rows.label.size),
        "num_positives": int(rows.label.sum()),
        "num_users": int(np.unique(rows.user_id).size),
        "models": {
            model.name: {
                "model_version": model.model_version,
                "metrics": judged.points[model.name],
                "intervals": {
                    key: list(interval(values)) for key, values in judged.draws[model.name].items()
                },
                "reliability": metrics.reliability(model.probability, rows.label, config.num_bins),
                "gain_curve": metrics.gain_curve(model.logit, rows.label),
                "by_campaign": _by_campaign(rows, model),
            }
            for model in models
        },
        "comparisons": [found.as_dict() for found in judged.comparisons],
    }


def _by_campaign(rows: LabelledRows, model: ScoredModel) -> dict[str, dict[str, Any]]:
    found = {}
    for campaign in np.unique(rows.campaign_id):
        chosen = rows.campaign_id == campaign
        label = rows.label[chosen]
        found[str(campaign)] = {
            "rows": int(chosen.sum()),
            "positives": int(label.sum()),
            "auc": metrics.auc(model.logit[chosen], label),
            "calibration_ratio": metrics.calibration_ratio(model.probability[chosen], label),
        }
    return found


def without_nan(value: Any) -> Any:
    """JSON has no NaN: a metric that does not exist is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
