"""Models that read the aggregates alone, in the form in which a bundle keeps them: plain numbers, no pickle.

Each has a ``kind``, ``logits(rows)`` and ``to_dict()``, whose JSON gives the model back exactly. A row is
scored by itself: no other row of the batch can change it by a bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from couponflow.errors import ConfigError
from couponflow.lake import layouts
from couponflow.models.batch import Array, Batch, Targets

#: Campaign types as the aggregates tell them; a campaign without a flag is of type ``other``.
CAMPAIGN_TYPES = (
    *(name.removeprefix("is_") for name in layouts.WIDE_FEATURES if name.startswith("is_type_")),
    "other",
)
_TYPE_PLACES = [layouts.WIDE_FEATURES.index(f"is_{name}") for name in CAMPAIGN_TYPES[:-1]]


def campaign_codes(wide: Array) -> Array:
    """Place in ``CAMPAIGN_TYPES`` of each row of aggregates [B,F], int64 [B]."""
    flags = np.asarray(wide)[:, _TYPE_PLACES] > 0.5
    return np.where(flags.any(axis=1), flags.argmax(axis=1), len(CAMPAIGN_TYPES) - 1)


def campaign_types(wide: Array) -> Array:
    """The campaign type of each row of aggregates [B,F]: names of ``CAMPAIGN_TYPES``, [B]."""
    return np.asarray(CAMPAIGN_TYPES)[campaign_codes(wide)]


@dataclass(frozen=True, eq=False)
class Logistic:
    """Logistic regression on standardised aggregates: ``coef . (wide - mean) / sd + intercept``.

    ``coef``, ``mean``, ``sd`` are float64 [F] in the order of ``Bundle.wide_features``; an sd of 0 (a
    constant feature) counts as 1.
    """

    coef: Array
    intercept: float
    mean: Array
    sd: Array
    kind: ClassVar[str] = "logistic"

    def __post_init__(self) -> None:
        _hold(self, np.float64, "coef", "mean", "sd")
        shapes = {self.coef.shape, self.mean.shape, self.sd.shape}
        numbers = np.concatenate([self.coef.ravel(), self.mean.ravel(), self.sd.ravel(), [self.intercept]])
        if len(shapes) != 1 or self.coef.ndim != 1 or not np.isfinite(numbers).all():
            raise ConfigError(f"logistic: shapes {shapes} differ or a number is not finite; train it again")

    def logits(self, rows: Batch | Targets) -> Array:
        """Float64 [B]."""
        sd = np.where(self.sd == 0.0, 1.0, self.sd)
        standardised = (_wide(rows) - self.mean) / sd
        return np.asarray((standardised * self.coef).sum(axis=1) + self.intercept)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact: floats keep all digits."""
        return {
            "coef": self.coef.tolist(),
            "intercept": float(self.intercept),
            "mean": self.mean.tolist(),
            "sd": self.sd.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Rate:
    """The conversion rate of the campaign's type, as logits; ``overall`` for a type without one."""

    overall: float
    by_type: Mapping[str, float]
    kind: ClassVar[str] = "rate"

    def __post_init__(self) -> None:
        _check_finite("rate", [self.overall, *self.by_type.values()])

    def logits(self, rows: Batch | Targets) -> Array:
        """Float64 [B]."""
        known = [self.by_type.get(name, self.overall) for name in CAMPAIGN_TYPES]
        return np.asarray(known, np.float64)[campaign_codes(_wide(rows))]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        return {"overall": float(self.overall), "by_type": dict(sorted(self.by_type.items()))}


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule that was written down, not learnt: ``slope * sum weights[name] * feature + intercept``.

    Only slope and intercept are fitted: they turn the score into a logit and leave its order alone.
    """

    weights: Mapping[str, float]
    slope: float
    intercept: float
    kind: ClassVar[str] = "rule"

    def __post_init__(self) -> None:
        _check_finite("rule", [self.slope, self.intercept, *self.weights.values()])
        if unknown := sorted(set(self.weights) - set(layouts.WIDE_FEATURES)):
            raise ConfigError(f"rule: unknown aggregates {', '.join(unknown)}; train it again")

    def score(self, wide: Array) -> Array:
        """The rule's own score, float64 [B], of aggregates [B,F]."""
        names = sorted(self.weights)  # the order of the sum must survive the JSON
        places = [layouts.WIDE_FEATURES.index(name) for name in names]
        return np.asarray((wide[:, places] * np.array([self.weights[name] for name in names])).sum(axis=1))

    def logits(self, rows: Batch | Targets) -> Array:
        """Float64 [B]."""
        return self.slope * self.score(_wide(rows)) + self.intercept

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        weights = {name: float(weight) for name, weight in self.weights.items()}
        return {"weights": weights, "slope": float(self.slope), "intercept": float(self.intercept)}


@dataclass(frozen=True, eq=False)
class Trees:
    """Boosted trees as flat arrays over all nodes: ``baseline + sum of the leaf values`` of every tree.

    ``roots`` [trees] are node numbers. A node compares ``feature`` with ``threshold``: not above goes
    ``left``, above goes ``right``, a missing (NaN) value left where ``missing_left`` is 1. A leaf has
    ``left`` -1 and a ``value``. Children come after their parent, so that every walk ends.
    """

    baseline: float
    num_features: int
    roots: Array
    feature: Array
    threshold: Array
    left: Array
    right: Array
    missing_left: Array
    value: Array
    kind: ClassVar[str] = "boosted"

    def __post_init__(self) -> None:
        _hold(self, np.int64, "roots", "feature", "left", "right", "missing_left")
        _hold(self, np.float64, "threshold", "value")
        size = self.feature.size
        names = ("feature", "threshold", "left", "right", "missing_left", "value")
        if {getattr(self, name).shape for name in names} != {(size,)} or self.roots.ndim != 1:
            raise ConfigError("boosted: arrays of unequal length; train it again")
        _check_finite("boosted", [self.baseline, *self.threshold, *self.value])
        inner = np.flatnonzero(self.left >= 0)
        children = np.concatenate([self.left[inner], self.right[inner]])
        is_sound = (children > np.concatenate([inner, inner])).all() and (children < size).all()
        is_sound = is_sound and ((self.roots >= 0) & (self.roots < size)).all()
        if not is_sound or not ((self.feature >= 0) & (self.feature < self.num_features)).all():
            raise ConfigError("boosted: a node points outside the trees or the aggregates; train it again")

    def logits(self, rows: Batch | Targets) -> Array:
        """Float64 [B]: all rows walk all trees together, one level a step."""
        return self.raw(_wide(rows))

    def raw(self, wide: Array) -> Array:
        """Float64 [B] of aggregates [B,F]; memory is B x trees node numbers."""
        if wide.shape[1] != self.num_features:
            raise ConfigError(f"boosted: {self.num_features} aggregates expected, found {wide.shape[1]}")
        rows = np.arange(len(wide))[:, None]
        node = np.tile(self.roots, (len(wide), 1))
        while (is_inner := self.left[node] >= 0).any():
            values = wide[rows, self.feature[node]]
            is_left = np.where(np.isnan(values), self.missing_left[node] == 1, values <= self.threshold[node])
            node = np.where(is_inner, np.where(is_left, self.left[node], self.right[node]), node)
        return np.asarray(self.value[node].sum(axis=1) + self.baseline)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        tree = {part.name: getattr(self, part.name) for part in fields(self)}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in tree.items()
        }


Tabular = Logistic | Rate | Rule | Trees
FORMS: Mapping[str, type[Tabular]] = {form.kind: form for form in (Logistic, Rate, Rule, Trees)}


def _wide(rows: Batch | Targets) -> Array:
    return np.asarray(rows.wide.cpu().numpy(), np.float64)


def _hold(model: object, kind: type[np.generic], *names: str) -> None:
    """Make arrays of what JSON gave as lists."""
    for name in names:
        object.__setattr__(model, name, np.asarray(getattr(model, name), kind))


def _check_finite(kind: str, numbers: list[float]) -> None:
    if not np.isfinite(np.asarray(numbers, np.float64)).all():
        raise ConfigError(f"{kind}: a number is not finite; train it again")
