"""What a network looked at in one send: the weight of each event of its history, for the report.

Nothing of it names a user or an item: an event is its age, its weight and what it has in common with what the
mail was about.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from couponflow.lake import layouts
from couponflow.training import feed

if TYPE_CHECKING:
    from couponflow.models.batch import Batch
    from couponflow.models.dien import Dien

#: What an event may share with a member of the target, the closest first; ``other`` shares nothing.
RELATIONS = ("item", "category", "shop", "other")


def attention_sample(network: "Dien", rows: Sequence[feed.Example]) -> dict[str, Any] | None:
    """Ages in days, weights and relations of the events of one converted send, oldest first.

    The send is the one with the median history among the converted, the smaller ``example_id`` of two. None
    where no converted send has a history, or the encoder has no attention.
    """
    if (chosen := _typical(rows)) is None:
        return None
    batch = feed.decode([chosen])
    weight = network.attention(batch)
    if weight is None:
        return None
    events = [
        {"age_days": float(np.expm1(gap)), "weight": float(one), "relation": relation}
        for gap, one, relation in zip(
            batch.hist_gap[0].tolist(), weight[0].tolist(), _relations(batch), strict=True
        )
    ]
    return {"events": events, "sends": int(sum(row.label > 0 for row in rows))}


def _typical(rows: Sequence[feed.Example]) -> feed.Example | None:
    converted = [row for row in rows if row.label > 0 and row.history]
    converted.sort(key=lambda row: (len(row.history), row.example_id))
    return converted[(len(converted) - 1) // 2] if converted else None


def _relations(batch: "Batch") -> list[str]:
    """Relation of each event of a batch of one row; absent target fields match nothing."""
    found = np.full(batch.hist_item.shape[1], len(RELATIONS) - 1)
    pairs = (
        (batch.hist_item, batch.cand_item),
        (batch.hist_category, batch.cand_category),
        (batch.hist_shop, batch.cand_shop),
    )
    for place, (history, target) in reversed(list(enumerate(pairs))):
        members = target[0][target[0] > layouts.OOV]  # neither absent nor unknown
        found[np.isin(history[0].numpy(), members.numpy())] = place
    return [RELATIONS[place] for place in found]
