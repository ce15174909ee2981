"""Scoring rows of users as ``scoring_examples`` holds them, packed histories and targets included."""

from typing import Any

import numpy as np

from couponflow.lake import layouts
from couponflow.models.batch import RANDOM_SIZES

NUM_WIDE = len(layouts.WIDE_FEATURES)
CAMPAIGNS = ("17", "18")
Packed = dict[str, Any]


def packed_users(size: int, max_length: int = 30) -> list[Packed]:
    """Users with histories of every length from 0, two targets of different sizes each."""
    draw = np.random.default_rng(0)
    ids = [RANDOM_SIZES[name] for name in ("item", "category", "shop", "event_type")]
    users = []
    for number in range(size):
        length = int(draw.integers(0, max_length + 1)) if number else 0
        history = np.column_stack(
            [draw.integers(1, n, length) for n in ids] + [draw.integers(0, 9999, length)]
        )
        sizes = [int(draw.integers(1, 4)) for _ in CAMPAIGNS]
        targets = np.column_stack([draw.integers(1, n, sum(sizes)) for n in ids[:3]])
        users.append(
            {
                "user_id": f"u{number:03d}",
                "length": length,
                "history": history.astype("<i4").tobytes(),
                "target_ids": list(CAMPAIGNS),
                "target_sizes": sizes,
                "targets": targets.astype("<i4").tobytes(),
                "wide": draw.normal(size=(2, NUM_WIDE)).astype("<f4").tobytes(),
            }
        )
    return users
