"""What in a user's history and aggregates a score rests on: attention, and what leaving a part out changes.

Occlusion: an event is taken out of the history (the aggregates stay as they are), or an aggregate is set to
its mean over the training rows; the effect is the probability with it minus the probability without. Effects
of parts do not add up to the score. torch is imported inside functions only.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from couponflow.models.batch import Batch
    from couponflow.models.bundle import Bundle

Floats = NDArray[np.float64]


def of_events(bundle: "Bundle", row: "Batch") -> list[dict[str, Any]]:
    """Attention (None without one) and effect of each event of a batch of one row, oldest first.

    The ids are those of the row: ``item``, ``category``, ``shop``, ``event_type``; ``age_days`` by then.
    """
    from couponflow.models.dien import Dien

    length = int(row.length[0])
    without = [_without(row, step) for step in range(length)]
    effects = probability(bundle, row)[0] - np.array([probability(bundle, one)[0] for one in without])
    networks = [model for model in _models(bundle) if isinstance(model, Dien)]
    weights = networks[0].attention(row) if networks and length else None
    return [
        {
            "item": int(row.hist_item[0, step]),
            "category": int(row.hist_category[0, step]),
            "shop": int(row.hist_shop[0, step]),
            "event_type": int(row.hist_type[0, step]),
            "age_days": float(np.expm1(float(row.hist_gap[0, step]))),
            "attention": None if weights is None else float(weights[0, step]),
            "effect": float(effects[step]),
        }
        for step in range(length)
    ]


def of_aggregates(bundle: "Bundle", row: "Batch") -> dict[str, float]:
    """Effect of each aggregate against its training mean; empty for a model that keeps no means."""
    import torch

    means = _means(bundle)
    if means is None:
        return {}
    num_wide = len(bundle.wide_features)
    changed = row.take([0] * num_wide)
    wide = changed.wide.clone()
    wide[torch.arange(num_wide), torch.arange(num_wide)] = torch.from_numpy(means).to(wide.dtype)
    effects = probability(bundle, row)[0] - probability(bundle, _replace(changed, wide=wide))
    return {name: float(effect) for name, effect in zip(bundle.wide_features, effects, strict=True)}


def probability(bundle: "Bundle", batch: "Batch") -> Floats:
    """Calibrated probabilities of the rows, as the score job computes them."""
    from couponflow.models import tabular

    found = bundle.probabilities(bundle.logits(batch), tabular.campaign_types(batch.wide.numpy()))
    return np.asarray(found, np.float64)


def _models(bundle: "Bundle") -> list[Any]:
    """The model, or those of a blend's members."""
    from couponflow.models.bundle import Blend

    if isinstance(bundle.model, Blend):
        return [member.model for _, member in sorted(bundle.model.members.items())]
    return [bundle.model]


def _means(bundle: "Bundle") -> Floats | None:
    """Training means of the aggregates, of the first model that keeps them."""
    from couponflow.models.dien import Dien
    from couponflow.models.tabular import Logistic

    for model in _models(bundle):
        if isinstance(model, Dien):
            return np.asarray(model.wide_mean.double().numpy())
        if isinstance(model, Logistic):
            return np.asarray(model.mean)
    return None


def _without(row: "Batch", step: int) -> "Batch":
    """The row with one event less."""
    import torch

    kept = [place for place in range(int(row.length[0])) if place != step]
    names = [name for name in vars(row) if name.startswith(("hist_", "neg_"))]
    columns = {name: getattr(row, name)[:, kept] for name in names}
    return _replace(row, **columns, length=torch.tensor([len(kept)]))


def _replace(batch: "Batch", **columns: Any) -> "Batch":
    return type(batch)(**(vars(batch) | columns))
