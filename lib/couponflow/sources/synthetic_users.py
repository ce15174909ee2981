"""Users of the synthetic shop, a hundred at a time: roles, tastes, and interests that evolve day by day.

A shard is drawn from (seed, shard) alone: it gives the same rows again, alone or among others. Roles that
tests count (bots, scanners, ...) go to every n-th user, so that a small shop has them too.
"""

from dataclasses import dataclass

import numpy as np

from couponflow.sources.landing import Array
from couponflow.sources.synthetic_rows import HOUR_SECONDS, VIEW, Rows, events
from couponflow.sources.synthetic_world import (
    ITEMS_PER_CATEGORY,
    NUM_CATEGORIES,
    ORDERED,
    SHARD_USERS,
    USERS,
    World,
)

#: How a coupon moves the log-odds of each segment, and the share of users in it.
SEGMENTS = ("never", "sure", "persuadable", "sleeping_dog")
SEGMENT_SHARES, SEGMENT_EFFECTS = (0.45, 0.25, 0.20, 0.10), np.array([0.0, 0.15, 1.2, -0.5])
CHEAP_TIER_EFFECT = 0.3
PERIODS = np.array([14, 21, 28])
NUM_DEVICES = 3
#: Visits per day of a heavy user.
HEAVY_RATE = 20.0
#: Day index that no world reaches.
NEVER = 1_000_000


@dataclass(frozen=True)
class Users:
    """One shard; every array has one entry per user, first axis ``SHARD_USERS``.

    ``clock``: seconds by which the device's clock is ahead. ``login_day``: day on which somebody who browses
    without an account logs in, -1 for all others. ``pair``: pair of the order-only rule, or -1.
    ``current`` and ``previous`` [users, days]: the interest of each day and the one before it.
    ``direction`` [users, days]: the latest ordered pair so far, 1 = A first, -1 = B first, 0 = none yet;
    ``ordered_day`` its day. ``effect``: what a coupon adds to the log-odds.
    """

    shard: int
    owner: Array
    is_bot: Array
    is_crawler: Array
    is_heavy: Array
    is_scanner: Array
    is_staff: Array
    clock: Array
    login_day: Array
    rate: Array
    long_term: Array
    segment: Array
    tier: Array
    effect: Array
    need: Array
    period: Array
    phase: Array
    pair: Array
    denied_from: Array
    is_bounce: Array
    has_attributes: Array
    age: Array
    device: Array
    current: Array
    previous: Array
    direction: Array
    ordered_day: Array

    @property
    def is_person(self) -> Array:
        """Who is neither a bot nor a crawler."""
        return ~(self.is_bot | self.is_crawler)


def every(owner: Array, share: float, offset: int) -> Array:
    """Every n-th user such that the share comes out; nobody for a share of 0."""
    if share <= 0.0:
        return np.zeros(len(owner), dtype=bool)
    period = max(1, round(1.0 / share))
    return np.asarray(owner % period == offset % period)


def draw_users(world: World, shard: int) -> tuple[Users, Rows]:
    """Draw a shard's users, and the events of their ordered sessions (which their state depends on)."""
    dials, num_days = world.dials, len(world.days)
    rng = world.random(USERS, shard)
    owner = np.arange(shard * SHARD_USERS, (shard + 1) * SHARD_USERS)
    dirt = 1.0 if dials.is_dirty else 0.0
    is_bot = every(owner, dials.bot_share * dirt, 7)
    is_crawler = every(owner, dials.bot_share * dirt, 113) & ~is_bot
    person = ~(is_bot | is_crawler)
    is_heavy = every(owner, dials.heavy_share * dirt, 11) & person
    merges = every(owner, dials.merge_share * dirt, 3) & person
    skewed = every(owner, dials.skew_share * dirt, 17) & person
    rate = rng.gamma(1.5, dials.rate / 1.5, SHARD_USERS)
    long_term = rng.random((SHARD_USERS, NUM_CATEGORIES)).argsort(axis=1)[:, :3]
    segment = rng.choice(len(SEGMENTS), SHARD_USERS, p=SEGMENT_SHARES)
    tier = rng.integers(0, 3, SHARD_USERS)
    period = PERIODS[rng.integers(0, len(PERIODS), SHARD_USERS)]
    denied = rng.random(SHARD_USERS) < 0.08
    is_ordered = (rng.random(SHARD_USERS) < dials.order_share) & person
    pair = np.where(is_ordered, rng.integers(0, dials.order_pairs, SHARD_USERS), -1)
    login_day = rng.integers(0, max(1, num_days * 5 // 4), SHARD_USERS)
    previous, current = _draw_interests(world, rng, long_term)
    direction, ordered_day, ordered = _draw_ordered(world, shard, owner, pair)
    users = Users(
        shard=shard,
        owner=owner,
        is_bot=is_bot,
        is_crawler=is_crawler,
        is_heavy=is_heavy,
        is_scanner=every(owner, dials.scanner_share * dirt, 29) & person,
        is_staff=every(owner, dials.staff_share * dirt, 31) & person,
        clock=np.where(skewed, np.where(owner // 100 % 2 == 0, HOUR_SECONDS, -HOUR_SECONDS), 0),
        login_day=np.where(merges, login_day, -1),
        rate=np.where(is_heavy, HEAVY_RATE, rate),
        long_term=long_term,
        segment=segment,
        tier=tier,
        effect=SEGMENT_EFFECTS[segment] + np.where(tier == 0, CHEAP_TIER_EFFECT, 0.0),
        need=rng.integers(0, NUM_CATEGORIES, SHARD_USERS),
        period=period,
        phase=rng.integers(0, period),
        pair=pair,
        denied_from=np.where(denied, rng.integers(-num_days // 2, num_days, SHARD_USERS), NEVER),
        is_bounce=rng.random(SHARD_USERS) < 0.3,
        has_attributes=rng.random(SHARD_USERS) < 0.7,
        age=rng.integers(0, 4, SHARD_USERS),
        device=rng.integers(0, NUM_DEVICES, SHARD_USERS),
        current=current,
        previous=previous,
        direction=direction,
        ordered_day=ordered_day,
    )
    return users, ordered


def _draw_interests(world: World, rng: np.random.Generator, long_term: Array) -> tuple[Array, Array]:
    """Interest before the current one, and the current one, of each user on each day: [users, days]."""
    dials, num_users = world.dials, len(long_term)
    everyone = np.arange(num_users)
    before, now = long_term[:, 1], long_term[:, 0]
    befores, nows = [], []
    for _ in world.days:
        change, back = rng.random(num_users), rng.random(num_users) < dials.return_share
        home = long_term[everyone, rng.integers(0, 3, num_users)]
        forward = world.next_categories(before, now)[everyone, rng.integers(0, 3, num_users)]
        jump = rng.integers(0, NUM_CATEGORIES, num_users)
        step = np.where(back, home, forward)
        moved = np.where(change < dials.drift, step, np.where(change < dials.drift + dials.jump, jump, now))
        before, now = np.where(moved == now, before, now), moved
        befores.append(before)
        nows.append(now)
    return np.stack(befores, axis=1), np.stack(nows, axis=1)


def _draw_ordered(world: World, shard: int, owner: Array, pair: Array) -> tuple[Array, Array, Rows]:
    """Sessions of 15 minutes that view block A then block B, or B then A, with the same counts either way."""
    dials, num_days = world.dials, len(world.days)
    rng = world.random(ORDERED, shard)
    shape = (len(owner), num_days)
    happens = (rng.random(shape) < dials.order_day_share) & (pair >= 0)[:, None]
    first, flips = np.where(rng.random(len(owner)) < 0.5, 1, -1), rng.random(shape) < dials.order_flip
    direction, ordered_day = np.zeros(shape, dtype=np.int64), np.full(shape, -NEVER)
    latest, last_day = np.zeros(len(owner), dtype=np.int64), np.full(len(owner), -NEVER)
    for day in range(num_days):
        again = np.where(flips[:, day], -latest, latest)
        latest = np.where(happens[:, day], np.where(latest == 0, first, again), latest)
        last_day = np.where(happens[:, day], day, last_day)
        direction[:, day], ordered_day[:, day] = latest, last_day
    user, days = np.nonzero(happens)
    num_views = 2 * dials.order_views + dials.order_extra
    blocks = np.repeat(np.array([0, 1, 2]), [dials.order_views, dials.order_views, dials.order_extra])
    # Others take random places; the blocks keep their order.
    place = np.sort(rng.random((len(user), num_views)), axis=1)
    mixed = rng.random((len(user), num_views)).argsort(axis=1) < dials.order_extra
    order = np.argsort(np.where(mixed, 2, 0), axis=1, kind="stable")
    block = np.empty((len(user), num_views), dtype=np.int64)
    np.put_along_axis(block, order, blocks[None, :].repeat(len(user), axis=0), axis=1)
    a_first = (direction[user, days] == 1)[:, None]
    side = np.where(block == 2, 2, np.where(a_first, block, 1 - block))
    popular = rng.choice(NUM_CATEGORIES, (len(user), num_views), p=world.popularity)
    sides = world.pairs[np.maximum(pair[user], 0)]
    category = np.where(side == 2, popular, np.take_along_axis(sides, np.minimum(side, 1), axis=1))
    start = world.midnights[days] + np.clip(rng.normal(15.0, 2.0, len(user)), 8.0, 19.0) * HOUR_SECONDS
    when = (start[:, None] + place * 15 * 60).astype(np.int64).ravel()
    item = category * ITEMS_PER_CATEGORY + (rng.random(category.shape) ** 2 * ITEMS_PER_CATEGORY).astype(
        np.int64
    )
    rows = events(
        owner=np.repeat(owner[user], num_views),
        type=VIEW,
        time=when,
        ingest=when + 1 + rng.integers(0, 30, len(when)),
        item=item.ravel(),
        device=1,
        agent=1,
    )
    return direction, ordered_day, rows
