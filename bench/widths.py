"""The cell in which networks are compared: widths, sizes and batches."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from couponflow.modelling import ModelConfig

ROWS, STEPS, WIDTH = 1024, 100, 18
ITEMS, CATEGORIES, USERS = 100_000, 1_000, 10_000
#: Hidden widths of attention, auxiliary net and head.
ATTENTION, AUXILIARY, HEAD = (80, 40), (100, 50), (200, 80)
#: Ours; the fields that the peers do not have get the smallest width there is.
MODEL = ModelConfig(
    item_dim=WIDTH,
    category_dim=WIDTH,
    shop_dim=1,
    type_dim=1,
    gap_dim=1,
    hidden_dim=2 * WIDTH,
    attention_dims=ATTENTION,
    auxiliary_dims=AUXILIARY,
    head_dims=HEAD,
    dropout=0.0,
)


@dataclass(frozen=True)
class Rows:
    """Ids of one batch before any implementation has collated it; 0 is padding, real ids start at 2.

    ``item``, ``category``, ``negative``, ``negative_category`` [B,T]; ``length``, ``user``, ``target``,
    ``target_category``, ``label`` [B]. An item has one category.
    """

    item: torch.Tensor
    category: torch.Tensor
    negative: torch.Tensor
    negative_category: torch.Tensor
    length: torch.Tensor
    user: torch.Tensor
    target: torch.Tensor
    target_category: torch.Tensor
    label: torch.Tensor


def categories() -> torch.Tensor:
    """Category of every item id, padding and OOV included."""
    drawn = np.random.default_rng(1).integers(2, CATEGORIES + 2, ITEMS + 2)
    drawn[0] = 0
    return torch.from_numpy(drawn)


def make_rows(is_ragged: bool, seed: int, rows: int = ROWS, steps: int = STEPS) -> Rows:
    """Full histories, or geometric lengths with a mean of a third of the cap; always padded to the cap."""
    generator = np.random.default_rng(seed)
    length = np.full(rows, steps)
    if is_ragged:
        length = generator.geometric(3 / steps, rows).clip(2, steps)
    mask = torch.from_numpy(np.arange(steps) < length[:, None])

    def ids(high: int, *shape: int) -> torch.Tensor:
        drawn: NDArray[np.int64] = generator.integers(2, high + 2, shape)
        return torch.from_numpy(drawn)

    of_item = categories()
    item, negative, target = ids(ITEMS, rows, steps) * mask, ids(ITEMS, rows, steps) * mask, ids(ITEMS, rows)
    return Rows(
        item,
        of_item[item],
        negative,
        of_item[negative],
        torch.from_numpy(length),
        ids(USERS, rows),
        target,
        of_item[target],
        torch.from_numpy(generator.integers(0, 2, rows)).float(),
    )
