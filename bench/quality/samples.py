"""The synthetic shop as training rows in memory: from the product's world to its examples. No Spark.

A row is a user with one target on one campaign day. Its history holds what the user did by himself before
that midnight, delivered by then too. Purchases that followed earlier campaigns are left out: they tell which
targets converted, and with them what the rules of the world are, by a way that no count is meant to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from couponflow.config import Config
from couponflow.lake.layouts import EVENT_TYPES, FIRST_INDEX, HISTORY_FIELDS, NEGATIVE_FIELDS, OOV, WINDOWS
from couponflow.models.batch import MINUTES_PER_DAY
from couponflow.models.layers import GAP_EDGES_DAYS
from couponflow.sequences import packing
from couponflow.sources.synthetic import draw_shard
from couponflow.sources.synthetic_rows import CART, PURCHASE, Rows, take
from couponflow.sources.synthetic_visits import MAIL_ORDERS, NEED_ORDERS
from couponflow.sources.synthetic_world import (
    CAMPAIGN_DAYS,
    CATEGORIES_PER_SHOP,
    ITEMS_PER_CATEGORY,
    NUM_CATEGORIES,
    SHARD_USERS,
    World,
    draw_world,
)
from couponflow.training.feed import Example

Array = NDArray[Any]

#: What the networks see beside the sequence; no count of anything, so that the sequence has to tell.
WIDE = ("log_length", "log_popularity")
#: What the boosted trees see: counts of events, and of carts and purchases, per window, and days since.
COUNTS = (
    *(f"{kind}_{days}_days" for kind in ("target_events", "target_buys", "user_events") for days in WINDOWS),
    "target_event_age",
    "target_buy_age",
    "user_event_age",
    "log_popularity",
)
_NEVER_DAYS = 365
_MINUTE, _MICROS = 60, 1_000_000
_COLUMNS = ("counts", "truth", "is_order_only")
SIZES = {
    "item": NUM_CATEGORIES * ITEMS_PER_CATEGORY + FIRST_INDEX,
    "category": NUM_CATEGORIES + FIRST_INDEX,
    "shop": NUM_CATEGORIES // CATEGORIES_PER_SHOP + FIRST_INDEX,
    "event_type": len(EVENT_TYPES) + FIRST_INDEX,
}


@dataclass(frozen=True)
class Sample:
    """Rows of one split, in the order of days, shards and users.

    ``counts`` float32 [N, COUNTS]; ``truth`` [N] the true chance of a conversion; ``is_order_only`` [N] rows
    of the order-only rule.
    """

    rows: tuple[Example, ...]
    counts: Array
    truth: Array
    is_order_only: Array

    @property
    def label(self) -> Array:
        """0 or 1, float64 [N]."""
        return np.array([row.label for row in self.rows])

    @property
    def user(self) -> Array:
        """User of each row, [N]."""
        return np.array([row.user_id for row in self.rows])

    def take(self, chosen: Array) -> "Sample":
        """The rows at these positions, or those where a mask holds."""
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        rows = tuple(self.rows[place] for place in places)
        return Sample(rows, self.counts[places], self.truth[places], self.is_order_only[places])


@dataclass(frozen=True)
class Samples:
    """The three splits of a world."""

    train: Sample
    valid: Sample
    test: Sample


def draw(config: Config) -> Samples:
    """Draw a world of candidates and cut it by ``[examples]``.

    A row trains iff its window is over when validation begins, and validates iff it is over when the test
    begins: what lies between is left out.
    """
    world = draw_world(config)
    shards = [_drawn(world, shard) for shard in range(-(-config.source.num_users // SHARD_USERS))]
    popularity = _popularity(world, config, [own for own, _ in shards])
    share = np.log(_shares(world, [own for own, _ in shards]))
    parts: dict[str, list[Sample]] = {"train": [], "valid": [], "test": []}
    for own, outcomes in shards:
        known = take(outcomes, outcomes["owner"] < config.source.num_users)
        start = np.array([campaign.start for campaign in world.campaigns])[known["campaign"]]
        for name, days in split_days(world, config).items():
            chosen = np.isin(start, days)
            parts[name].append(
                _sample(world, config, own, take(known, chosen), start[chosen], popularity, share)
            )
    return Samples(**{name: _joined(found) for name, found in parts.items()})


def split_days(world: World, config: Config) -> dict[str, list[int]]:
    """Campaign days of each split, as indices of days."""
    section = config.examples
    valid, test = (_index(world, day) for day in (section.valid_start, section.test_start))
    starts = [start for start, _ in world.rounds if start >= _index(world, section.train_start)]
    return {
        "train": [start for start in starts if start + CAMPAIGN_DAYS <= valid],
        "valid": [start for start in starts if valid <= start and start + CAMPAIGN_DAYS <= test],
        "test": [start for start in starts if start >= test],
    }


def permuted(sample: Sample, seed: int) -> Sample:
    """The same rows with the events of every history permuted inside each time bucket.

    So every event keeps its time bucket, and only their order within a bucket is lost. The rows of one user
    on one day are permuted alike; negatives go with their events.
    """
    orders: dict[tuple[str, int], Array] = {}
    rows = []
    for row in sample.rows:
        history = np.frombuffer(row.history, "<i4").reshape(-1, len(HISTORY_FIELDS))
        negatives = np.frombuffer(row.negatives, "<i4").reshape(-1, len(NEGATIVE_FIELDS))
        key = (row.user_id, row.as_of)
        if key not in orders:
            generator = np.random.default_rng([seed, int(row.user_id), row.as_of // _MICROS])
            bucket = np.digitize(history[:, -1] / MINUTES_PER_DAY, GAP_EDGES_DAYS)
            orders[key] = np.lexsort((generator.random(len(history)), -bucket))
        order = orders[key]
        rows.append(row._replace(history=history[order].tobytes(), negatives=negatives[order].tobytes()))
    return replace(sample, rows=tuple(rows))


def _index(world: World, day: date) -> int:
    return (day - world.days[0]).days


def _drawn(world: World, shard: int) -> tuple[Rows, Rows]:
    """What a shard's users did by themselves, by user and time, and the outcomes of all candidates."""
    drawn = draw_shard(world, shard)
    order = drawn.happened["order"]
    own = take(drawn.happened, ~((order >= MAIL_ORDERS) & (order < NEED_ORDERS)))
    own = {name: own[name] for name in ("owner", "time", "ingest", "type", "item")}
    return take(own, np.lexsort((own["time"], own["owner"]))), drawn.outcomes


def _shares(world: World, shards: Sequence[Rows]) -> Array:
    """Share of each category among the events before the first campaign day."""
    first = world.midnights[world.rounds[0][0]]
    counts = np.ones(NUM_CATEGORIES)
    for own in shards:
        item = own["item"][(own["time"] < first) & (own["item"] >= 0)]
        counts += np.bincount(item // ITEMS_PER_CATEGORY, minlength=NUM_CATEGORIES)
    return np.asarray(counts / counts.sum())


def _popularity(world: World, config: Config, shards: Sequence[Rows]) -> packing.Popularity:
    """Items of earlier days, for the auxiliary negatives, as ``build_examples`` counts them."""
    starts = world.midnights[: -1 : config.examples.negative_refresh_days]
    cells: Array = np.zeros((len(starts) + 1, NUM_CATEGORIES * ITEMS_PER_CATEGORY), dtype=np.int64)
    for own in shards:
        rows = take(own, own["item"] >= 0)
        np.add.at(cells, (np.searchsorted(starts, rows["time"], side="right"), rows["item"]), 1)
    refresh, item = np.nonzero(cells[: len(starts)])
    pairs = np.column_stack([item, item // ITEMS_PER_CATEGORY]).astype(np.int32) + FIRST_INDEX
    return packing.Popularity.from_counts(
        refresh, pairs, cells[refresh, item], starts // _MINUTE, config.examples.negative_power
    )


def _sample(
    world: World,
    config: Config,
    own: Rows,
    outcomes: Rows,
    start: Array,
    popularity: packing.Popularity,
    log_share: Array,
) -> Sample:
    """Rows of one shard."""
    order = np.lexsort((outcomes["category"], outcomes["owner"], start))
    outcomes, start = take(outcomes, order), start[order]
    owner, category = outcomes["owner"], outcomes["category"]
    midnight = world.midnights[start]
    shown: dict[tuple[int, int], Array] = {}
    for key in zip(owner.tolist(), midnight.tolist(), strict=True):
        if key not in shown:
            shown[key] = _history(own, *key, config.examples.history_length)
    histories = [shown[key] for key in zip(owner.tolist(), midnight.tolist(), strict=True)]
    sizes = np.array([len(history) for history in histories], dtype=np.int64)
    stacked = np.concatenate([np.zeros((0, 5), np.int32), *histories])
    keys = (start.astype(np.int64) * 1_000 + category) * 10_000_000 + owner
    target = category.astype(np.int32) + FIRST_INDEX
    blocked = [frozenset([int(number)]) for number in target]
    seed = config.examples.seed
    drawn = packing.draw_negatives(stacked, sizes, midnight // _MINUTE, keys, blocked, popularity, seed)
    negatives = np.split(drawn.astype("<i4"), np.cumsum(sizes)[:-1])
    members = np.zeros((len(target), 3), "<i4")
    members[:, 1] = target
    wide = np.column_stack([np.log1p(sizes), log_share[category]]).astype("<f4")
    rows = tuple(
        Example(
            wide=wide[n].tobytes(),
            label=float(outcomes["is_converted"][n]),
            history=histories[n].tobytes(),
            negatives=negatives[n].tobytes(),
            target=members[n].tobytes(),
            example_id=f"{start[n]}:{owner[n]}:{category[n]}",
            user_id=str(owner[n]),
            target_id=f"{start[n]}",
            as_of=int(midnight[n]) * _MICROS,
            mature_time=int(world.midnights[start[n] + CAMPAIGN_DAYS]) * _MICROS,
        )
        for n in range(len(owner))
    )
    truth = np.where(outcomes["is_treated"], outcomes["p1"], outcomes["p0"])
    counts = _counts(world, own, owner, category, start, log_share)
    return Sample(rows, counts, truth, np.asarray(outcomes["is_order_only"], dtype=bool))


def _history(own: Rows, user: int, cut: int, length: int) -> Array:
    """The user's last events that happened and were delivered before ``cut``, [length, 5] int32."""
    first, end = np.searchsorted(own["owner"], [user, user + 1])
    end = first + np.searchsorted(own["time"][first:end], cut, side="left")
    index = np.arange(first, end)
    index = index[own["ingest"][index] < cut][-length:]
    item = own["item"][index]
    has_item, category = item >= 0, item // ITEMS_PER_CATEGORY
    fields = [
        np.where(has_item, item + FIRST_INDEX, OOV),
        np.where(has_item, category + FIRST_INDEX, OOV),
        np.where(has_item, category // CATEGORIES_PER_SHOP + FIRST_INDEX, OOV),
        own["type"][index] + FIRST_INDEX,
        (cut - own["time"][index]) // _MINUTE,
    ]
    return np.column_stack(fields).astype("<i4")


def _counts(world: World, own: Rows, owner: Array, category: Array, start: Array, log_share: Array) -> Array:
    """Windows and recency of each row's target and user, by way of one cube per kind of event."""
    first_user, num_days = int(own["owner"][0]) // SHARD_USERS * SHARD_USERS, len(world.days)
    rows = take(own, own["item"] >= 0)
    day = np.clip(world.day_of(rows["time"]), 0, num_days - 1)
    place = (rows["owner"] - first_user, rows["item"] // ITEMS_PER_CATEGORY, day + 1)
    columns: list[Array] = []
    ages: list[Array] = []
    user = owner - first_user
    for is_kind, by_target in (
        (np.ones(len(day), dtype=bool), True),
        (np.isin(rows["type"], (CART, PURCHASE)), True),
        (np.ones(len(day), dtype=bool), False),
    ):
        cube = np.zeros((SHARD_USERS, NUM_CATEGORIES, num_days + 1), dtype=np.int32)
        np.add.at(cube, tuple(axis[is_kind] for axis in place), 1)
        if not by_target:
            cube = cube.sum(axis=1, keepdims=True)
        key = (user, category if by_target else np.zeros_like(category))
        total = cube.cumsum(axis=2)
        columns += [total[(*key, start)] - total[(*key, np.maximum(start - days, 0))] for days in WINDOWS]
        last = np.maximum.accumulate(np.where(cube > 0, np.arange(num_days + 1), -_NEVER_DAYS), axis=2)
        ages.append(np.minimum(start + 1 - last[(*key, start)], _NEVER_DAYS))
    return np.column_stack([*columns, *ages, log_share[category]]).astype(np.float32)


def _joined(parts: Sequence[Sample]) -> Sample:
    return Sample(
        tuple(row for part in parts for row in part.rows),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS),
    )
