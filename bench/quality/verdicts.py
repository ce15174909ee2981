"""The arithmetic of verdicts: paired differences with their intervals, shares of a gap, what holds.

Intervals draw users, not rows, by the product's own bootstrap; both sides of a difference see the same draws.
Several seeds of a model are averaged as AUCs, not as scores: the difference is that of a typical seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from couponflow.training import evaluation, metrics

Array = NDArray[Any]

NUM_DRAWS, DRAW_SEED = 1_000, 0


@dataclass(frozen=True)
class Difference:
    """An AUC, or a difference of two, with its 95 % interval and the smallest difference it would find."""

    value: float
    low: float
    high: float
    minimum_detectable: float = float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0.0

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies in the interval."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Verdict:
    """One figure and whether it is what was asked for.

    ``rule`` says in words what ``holds`` means, ``runs`` how many seeds the figure is a mean of.
    """

    name: str
    value: float
    unit: str
    bound: float | None
    holds: bool
    runs: int
    rival: str
    rule: str
    interval: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def line(self, machine: str, commit: str) -> dict[str, Any]:
        """The verdict as it is stored."""
        return {
            "name": self.name,
            "value": _rounded(self.value),
            "unit": self.unit,
            "bound": self.bound,
            "holds": self.holds,
            "runs": self.runs,
            "rival": self.rival,
            "rule": self.rule,
            "interval": None if self.interval is None else [_rounded(end) for end in self.interval],
            "details": {name: _rounded(value) for name, value in self.details.items()},
            "machine": machine,
            "commit": commit,
        }


@dataclass(frozen=True)
class Found:
    """What an experiment gives: verdicts, and the lines of its ladder."""

    verdicts: list[Verdict] = field(default_factory=list)
    ladder: list[dict[str, Any]] = field(default_factory=list)

    def ladder_lines(self) -> list[dict[str, Any]]:
        """The ladder as it is stored."""
        return [{name: _rounded(value) for name, value in line.items()} for line in self.ladder]


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


class Bench:
    """The rows that scores are judged on: label and user of each, under fixed draws of users."""

    def __init__(self, label: Array, user: Array, num_draws: int = NUM_DRAWS) -> None:
        """Rows [N]; both classes have to be there."""
        self.label, self.user, self._num_draws = label, user, num_draws

    def auc(self, *scores: Array) -> float:
        """Mean AUC of the seeds."""
        return float(np.mean([metrics.auc(score, self.label) for score in scores]))

    def interval_of(self, *scores: Array) -> Difference:
        """Mean AUC of the seeds with its interval."""
        return self._judged([(1.0 / len(scores), score) for score in scores])

    def difference(self, ours: Sequence[Array], rival: Sequence[Array]) -> Difference:
        """Mean AUC of our seeds less that of the rival's, paired."""
        return self._judged(
            [(1.0 / len(ours), score) for score in ours] + [(-1.0 / len(rival), score) for score in rival]
        )

    def _judged(self, weighted: Sequence[tuple[float, Array]]) -> Difference:
        ranked = [(sign, metrics.Ordered(score, self.label)) for sign, score in weighted]
        blocks = [
            sum(sign * order.auc(weights) for sign, order in ranked)
            for weights in evaluation.draw_weights(self.user, self._num_draws, DRAW_SEED)
        ]
        # Rounded, so that two equal models differ by nothing.
        draws = np.round(np.concatenate([np.asarray(block) for block in blocks]), 12)
        value = round(sum(sign * metrics.auc(score, self.label) for sign, score in weighted), 12)
        low, high = evaluation.interval(draws)
        error = float(np.nanstd(draws, ddof=1))
        return Difference(float(value), low, high, evaluation.MINIMUM_DETECTABLE * error)


def gap_share(static: float, model: float, oracle: float) -> float:
    """Share of the AUC between a static model and the oracle that a model closes."""
    return (model - static) / (oracle - static)


def closes_gap(
    name: str, share: float, difference: Difference, bound: float, runs: int, rival: str
) -> Verdict:
    """A share of the gap that is reached, and a difference that is above 0 as a whole."""
    rule = f"share of the gap to the oracle >= {bound:g}, and the interval of the difference above 0"
    holds = share >= bound and difference.is_above_zero
    return Verdict(
        name,
        share,
        "share",
        bound,
        holds,
        runs,
        rival,
        rule,
        difference.interval,
        {"difference": difference.value},
    )


def exceeds(name: str, difference: Difference, bound: float, runs: int, rival: str) -> Verdict:
    """A difference of at least ``bound`` that is above 0 as a whole."""
    rule = f"difference >= {bound:g} and its interval above 0"
    holds = difference.value >= bound and difference.is_above_zero
    return Verdict(name, difference.value, "AUC", bound, holds, runs, rival, rule, difference.interval)


def is_nothing(name: str, difference: Difference, bound: float, runs: int, rival: str) -> Verdict:
    """A difference within ``bound`` of 0, or one that cannot be told from 0."""
    rule = f"size of the difference <= {bound:g}, or its interval holds 0"
    holds = abs(difference.value) <= bound or difference.holds_zero
    return Verdict(name, difference.value, "AUC", bound, holds, runs, rival, rule, difference.interval)


def is_no_gain(name: str, difference: Difference, bound: float, runs: int, rival: str) -> Verdict:
    """A difference of at most ``bound``; a loss is none of its business."""
    rule = f"difference <= {bound:g}"
    holds = difference.value <= bound
    return Verdict(name, difference.value, "AUC", bound, holds, runs, rival, rule, difference.interval)


def none_above(name: str, differences: dict[str, Difference], rival: str) -> Verdict:
    """No model is above the rival with its whole interval; the figure is the best of them."""
    best = max(differences, key=lambda model: differences[model].value)
    holds = not any(found.is_above_zero for found in differences.values())
    details = {model: [found.value, *found.interval] for model, found in differences.items()}
    found = differences[best]
    rule = "no model's difference has its whole interval above 0"
    return Verdict(name, found.value, "AUC", None, holds, 1, rival, rule, found.interval, details)


def at_least(name: str, value: float, unit: str, bound: float, rival: str, **details: Any) -> Verdict:
    """A figure that has to reach its bound."""
    interval = details.pop("interval", None)
    return Verdict(
        name, value, unit, bound, value >= bound, 1, rival, f">= {bound:g}", interval, dict(details)
    )


def at_most(name: str, value: float, unit: str, bound: float, rival: str, **details: Any) -> Verdict:
    """A figure that has to stay within its bound."""
    interval = details.pop("interval", None)
    return Verdict(
        name, value, unit, bound, value <= bound, 1, rival, f"<= {bound:g}", interval, dict(details)
    )
