"""Campaigns of the synthetic shop: candidates, what a coupon changes, who is mailed, what follows.

The log-odds of a conversion are a sum of effects that can be switched one by one (``[world]``); they look at
the evening before the campaign, so that a history can show everything they depend on. ``p0`` is the chance
without and ``p1`` with the coupon; a converted user buys, and redeems if he was mailed.
"""

from dataclasses import dataclass

import numpy as np

from couponflow.sources.landing import Array
from couponflow.sources.synthetic_rows import (
    HOUR_SECONDS,
    MAIL_CLICK,
    MAIL_OPEN,
    PURCHASE,
    SCANNER,
    Rows,
    concat,
    events,
    take,
)
from couponflow.sources.synthetic_users import NUM_DEVICES, Users
from couponflow.sources.synthetic_visits import MAIL_ORDERS
from couponflow.sources.synthetic_world import (
    CAMPAIGN_DAYS,
    COUPON_SHARE,
    ITEMS_PER_CATEGORY,
    MAILS,
    NUM_CATEGORIES,
    SHARD_USERS,
    Campaign,
    World,
)

RECENT_DAYS, DUE_DAYS = 28, 7
MAX_LOGIT = 8.0
#: A scanner opens a mail after this many seconds and follows as many links, one a second.
SCANNER_SECONDS, SCANNER_LINKS = 2, 4


@dataclass(frozen=True)
class Past:
    """What a shard's events say about each user before a day; counts of events with an item.

    ``before`` [users, categories, days + 1]: events on earlier days. ``spent`` [users, days + 1]: money.
    ``visits`` [visits, categories]: what each visit touched, by user and time; ``visit_day`` and
    ``visit_start`` [users + 1] place them.
    """

    before: Array
    spent: Array
    visits: Array
    visit_day: Array
    visit_start: Array


def look_back(world: World, users: Users, own: Rows) -> Past:
    """Sum up a shard's events of ordinary visits; campaigns and their purchases do not count."""
    num_days = len(world.days)
    rows = take(own, own["item"] >= 0)
    local = rows["owner"] - users.owner[0]
    day = np.clip(world.day_of(rows["time"]), 0, num_days - 1)
    category = rows["item"] // ITEMS_PER_CATEGORY
    before = np.zeros((SHARD_USERS, NUM_CATEGORIES, num_days + 1), dtype=np.int32)
    np.add.at(before, (local, category, day + 1), 1)
    spent = np.zeros((SHARD_USERS, num_days + 1))
    bought = rows["type"] == PURCHASE
    np.add.at(spent, (local[bought], day[bought] + 1), rows["price"][bought])
    order = np.lexsort((rows["time"], local))
    local, day, category, time = local[order], day[order], category[order], rows["time"][order]
    starts = np.ones(len(order), dtype=bool)
    # Midnight ends a visit too: what comes after it must not tell of the day before.
    starts[1:] = (np.diff(local) != 0) | (np.diff(day) != 0) | (np.diff(time) > world.gap_minutes * 60)
    number = np.cumsum(starts) - 1
    visits = np.zeros((int(starts.sum()), NUM_CATEGORIES), dtype=bool)
    visits[number, category] = True
    visit_start = np.searchsorted(local[starts], np.arange(SHARD_USERS + 1))
    return Past(before.cumsum(axis=2), spent.cumsum(axis=1), visits, day[starts], visit_start)


def _targets(world: World, users: Users, start: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Category members of each user's targets, [users, targets, members], and which targets exist.

    In a world of sets there is one target per campaign of the day, its categories. Otherwise the pool of a
    user is three long-term interests, the current and a next one, and random ones; while the order-only rule
    is fresh both of its wanted categories are in front of it. A category stands once.
    """
    if world.dials.campaigns == "sets":
        members = np.array([world.campaigns[number].categories for number in dict(world.rounds)[start]])
        return np.tile(members, (SHARD_USERS, 1, 1)), np.ones((SHARD_USERS, len(members)), dtype=bool)
    eve, size = start - 1, world.dials.num_candidates
    current = users.current[:, eve]
    following = world.next_categories(users.previous[:, eve], current)
    some = following[np.arange(SHARD_USERS), rng.integers(0, following.shape[1], SHARD_USERS)]
    likely = np.column_stack([users.long_term, current, some])
    likely = rng.permuted(likely, axis=1)
    others = rng.integers(0, NUM_CATEGORIES, (SHARD_USERS, size))
    wanted = np.where(is_fresh(world, users, start)[:, None], world.pairs[users.pair][:, 2:], -1)
    pool = np.column_stack([wanted, likely, others])
    same = pool[:, :, None] == pool[:, None, :]
    is_first = ~np.any(same & np.tri(pool.shape[1], k=-1, dtype=bool), axis=2) & (pool >= 0)
    order = np.argsort(~is_first, axis=1, kind="stable")[:, :size]
    rows = np.arange(SHARD_USERS)[:, None]
    return pool[rows, order][:, :, None], is_first[rows, order]


def is_fresh(world: World, users: Users, start: int) -> Array:
    """For whom the order-only rule holds at a campaign's start."""
    age = start - 1 - users.ordered_day[:, start - 1]
    return np.asarray((users.pair >= 0) & (age < world.dials.order_fresh_days))


def log_odds(world: World, users: Users, past: Past, start: int, members: Array) -> Array:
    """True log-odds, without a coupon, that each user converts on each target, [users, targets].

    ``members`` [users, targets, members]: the categories of each target; what is known is the evening before
    ``start``.
    """
    dials, eve = world.dials, start - 1
    rows = np.arange(SHARD_USERS)[:, None, None]

    def holds(categories: Array) -> Array:
        """Whether a target has one of a user's categories, [users, n]."""
        found = members[:, :, :, None] == categories[:, None, None, :]
        return np.asarray(found.any(axis=(2, 3)))

    current = users.current[:, eve]
    logit = np.full(members.shape[:2], dials.base)
    logit += dials.habit * holds(users.long_term)
    logit += dials.popularity * np.log(NUM_CATEGORIES * world.popularity[members].mean(axis=2))
    logit += dials.activity * np.log(users.rate + 0.05)[:, None]
    logit += dials.local * holds(current[:, None])
    logit += dials.chain * holds(world.next_categories(users.previous[:, eve], current))
    days_left = (users.phase - start) % users.period
    logit += dials.period * (holds(users.need[:, None]) & (days_left < DUE_DAYS)[:, None])
    if dials.recency:
        recent = past.before[:, :, start] - past.before[:, :, max(0, start - RECENT_DAYS)]
        logit += dials.recency * np.log1p(recent[rows, members].sum(axis=2))
    if dials.momentum:
        logit += dials.momentum * _momentum(world, past, start)[rows, members].sum(axis=2)
    logit += dials.order * holds(_ordered(world, users, start)[0][:, None])
    return np.clip(logit, -MAX_LOGIT, MAX_LOGIT)


def _ordered(world: World, users: Users, start: int) -> tuple[Array, Array]:
    """Per user the category that the order-only rule lifts, and the one that it does not; -2 without it."""
    fresh, a_first = is_fresh(world, users, start), users.direction[:, start - 1] == 1
    pair = world.pairs[users.pair]
    wanted, unwanted = np.where(a_first, pair[:, 2], pair[:, 3]), np.where(a_first, pair[:, 3], pair[:, 2])
    return np.where(fresh, wanted, -2), np.where(fresh, unwanted, -2)


def _momentum(world: World, past: Past, start: int) -> Array:
    """Visits to each category among the last three less those among the three before, signed."""
    total = np.zeros((SHARD_USERS, NUM_CATEGORIES))
    for user in range(SHARD_USERS):
        first, end = past.visit_start[user], past.visit_start[user + 1]
        last = first + np.searchsorted(past.visit_day[first:end], start)
        visits = past.visits[max(first, last - 6) : last]
        total[user] = visits[-3:].sum(axis=0).astype(float) - visits[:-3].sum(axis=0)
    return np.asarray(total * world.momentum_sign)


def draw_outcomes(world: World, users: Users, past: Past) -> Rows:
    """Every candidate of every campaign: its true chances, whether it was mailed, and what became of it.

    Grain: one row per consenting user and target, the holdout included. ``propensity`` is the true chance of
    being mailed; the log tells it only where it was randomised.
    """
    rng = world.random(MAILS, users.shard)
    parts = []
    for start, numbers in world.rounds:
        members, exists = _targets(world, users, start, rng)
        logit = log_odds(world, users, past, start, members)
        p0, p1 = _sigmoid(logit), _sigmoid(logit + users.effect[:, None])
        propensity = _propensity(world, past, start)
        consents = users.denied_from >= start
        draw = rng.random((4, *exists.shape))
        day = start + np.minimum(rng.geometric(0.35, exists.shape), CAMPAIGN_DAYS) - 1
        bought = world.midnights[day] + rng.integers(18 * HOUR_SECONDS, 22 * HOUR_SECONDS, exists.shape)
        delivered = world.midnights[start] + 8 * HOUR_SECONDS + rng.integers(0, 1_800, exists.shape)
        user, target = np.nonzero(exists & consents[:, None])
        is_set = world.dials.campaigns == "sets"
        campaign = np.array(numbers)[target if is_set else members[user, target, 0]]
        coupon, item = _choose(world, past, start, user, campaign, rng)
        wanted, unwanted = _ordered(world, users, start)
        category = members[user, target, 0]
        chance = {"p0": p0[user, target], "p1": p1[user, target]}
        chance = {name: np.where(users.is_person[user], p, 0.0) for name, p in chance.items()}
        is_treated = draw[0][user, target] < propensity[user]
        parts.append(
            {
                "owner": users.owner[user],
                "campaign": campaign,
                "category": category,
                "coupon": coupon,
                "item": item,
                "segment": users.segment[user],
                "is_order_only": np.isin(category, world.pairs[:, 2:])
                & ((category == wanted[user]) | (category == unwanted[user])),
                "direction": np.where(wanted[user] >= 0, users.direction[user, start - 1], 0),
                "propensity": propensity[user],
                "is_treated": is_treated,
                **chance,
                "is_converted": draw[1][user, target] < np.where(is_treated, chance["p1"], chance["p0"]),
                "read": draw[2][user, target],
                "click": draw[3][user, target],
                "delivered": delivered[user, target],
                "bought": bought[user, target],
            }
        )
    return concat(parts)


def _sigmoid(logit: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def _propensity(world: World, past: Past, start: int) -> Array:
    """Chance of being mailed: the same for all, or steeply rising with what a user spent so far."""
    if world.dials.assignment == "randomised":
        return np.full(SHARD_USERS, world.dials.treat_share)
    return _sigmoid(0.8 * (np.log1p(past.spent[:, start]) - 3.0))


def _choose(
    world: World, past: Past, start: int, user: Array, campaign: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """The coupon of each candidate's mail (rather one of a familiar category) and the item he would buy."""
    coupon, item = np.zeros(len(user), dtype=np.int64), np.zeros(len(user), dtype=np.int64)
    for number in np.unique(campaign):
        rows = np.flatnonzero(campaign == number)
        held: Campaign = world.campaigns[number]
        categories = [one.category for one in held.coupons]
        taste = np.log1p(past.before[user[rows]][:, categories, start]) + rng.gumbel(
            size=(len(rows), len(categories))
        )
        coupon[rows] = taste.argmax(axis=1)
        items = np.array([one.items for one in held.coupons])
        item[rows] = items[coupon[rows], rng.integers(0, items.shape[1], len(rows))]
    return coupon, item


def follow_mails(world: World, users: Users, outcomes: Rows) -> Rows:
    """Opens and clicks of people and of scanners, and the purchases of all who converted."""
    rng = world.random(MAILS + 100, users.shard)
    num = len(outcomes["owner"])
    local = outcomes["owner"] - users.owner[0]
    device = rng.integers(0, NUM_DEVICES, num)
    chance = outcomes["p1"]
    reads = outcomes["is_treated"] & users.is_person[local] & (world.dials.open_share > 0.0)
    opened = reads & (outcomes["read"] < world.dials.open_share + 0.5 * chance)
    clicked = opened & (outcomes["click"] < 0.15 + 0.5 * chance)
    read = outcomes["delivered"] + 60 + rng.exponential(4 * HOUR_SECONDS, num).astype(np.int64)
    base = {"owner": outcomes["owner"], "device": device}
    opens = events(**base, type=MAIL_OPEN, time=read, ingest=read + 2)
    clicks = events(**base, type=MAIL_CLICK, time=read + 20, ingest=read + 22)
    price = world.item_price[outcomes["item"]]
    saved = np.where(outcomes["is_treated"], np.round(COUPON_SHARE * price, 2), 0.0)
    purchases = events(
        **base | {"agent": device, "item": outcomes["item"], "type": np.full(num, PURCHASE)},
        time=outcomes["bought"],
        ingest=outcomes["bought"] + 3,
        order=MAIL_ORDERS + np.arange(num),
        price=np.round(price - saved, 2),
        quantity=1,
        discount=0.0,
        coupon=saved,
    )
    scanned = take(outcomes, outcomes["is_treated"] & users.is_scanner[local])
    return concat(
        [
            take(opens, opened),
            take(clicks, clicked),
            take(purchases, outcomes["is_converted"]),
            _scan(scanned),
        ]
    )


def _scan(sends: Rows) -> Rows:
    """What a mail scanner does: one open, then a click on each link, a second apart."""
    steps = np.arange(1 + SCANNER_LINKS)
    when = (sends["delivered"][:, None] + SCANNER_SECONDS + steps).ravel()
    return events(
        owner=np.repeat(sends["owner"], len(steps)),
        type=np.tile(np.where(steps == 0, MAIL_OPEN, MAIL_CLICK), len(sends["owner"])),
        time=when,
        ingest=when + 1,
        kind=SCANNER,
    )
