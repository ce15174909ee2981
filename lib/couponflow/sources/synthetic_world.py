"""The world of the synthetic shop: users, sessions, campaigns and sends, drawn as numbers.

Users browse in evening sessions of a few seconds per step. Each has three long-term interests and a current
one that drifts along a secret successor of categories. About every ten days a campaign mails coupons of two
or three categories to a random half (propensity 0.5) of the users who have granted consent; a user redeems
with the probability of ``redemption_logit``, which depends on the last 28 days.

A shard of 100 users is drawn from (seed, shard) alone, so any shard gives the same rows again, alone or
among others. Its events are clean; ``synthetic_dirt`` spoils them in a separate pass.
"""

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import pandas as pd

from couponflow.config import Config
from couponflow.dates import DateRange, day_start
from couponflow.errors import ConfigError
from couponflow.lake.layouts import EVENT_TYPES
from couponflow.sources.landing import Array

NUM_CATEGORIES, ITEMS_PER_CATEGORY, CATEGORIES_PER_SHOP = 60, 20, 5
SHARD_USERS = 100
MIN_DAYS, CAMPAIGN_EVERY_DAYS, CAMPAIGN_DAYS, AFFINITY_DAYS = 14, 10, 7, 28
WEEKDAY_ACTIVITY = np.array([1.0, 0.95, 0.95, 1.0, 1.1, 1.4, 1.3])  # Monday first
CAMPAIGN_TYPES = ("Type A", "Type B", "Type C")
NUM_DEVICES = 3
#: Part of the price that a coupon pays.
COUPON_SHARE = 0.2
#: Money for one mail.
MAIL_COST = 0.05
VIEW, SEARCH, FAVOURITE, CART, PURCHASE, MAIL_OPEN, MAIL_CLICK = (
    EVENT_TYPES.index(name)
    for name in ("view", "search", "favourite", "cart", "purchase", "mail_open", "mail_click")
)
HOUR_SECONDS, DAY_SECONDS = 3_600, 86_400
#: Day index that no world reaches.
NEVER = 1_000_000


@dataclass(frozen=True)
class Coupon:
    """A coupon for eight items of one category."""

    coupon_id: str
    category: int
    items: tuple[int, ...]


@dataclass(frozen=True)
class Campaign:
    """A campaign; ``start`` is the index of its first day, its window lasts ``CAMPAIGN_DAYS``."""

    campaign_id: str
    type: str
    start: int
    categories: tuple[int, ...]
    coupons: tuple[Coupon, ...]


@dataclass(frozen=True)
class World:
    """What all users share.

    ``midnights`` [days + 1]: UTC seconds at which each business day, and the day after the last, begins.
    """

    days: tuple[date, ...]
    midnights: Array
    successor: Array
    popularity: Array
    item_price: Array
    campaigns: tuple[Campaign, ...]
    lateness_days: int

    def day_of(self, seconds: Array) -> Array:
        """Index of the business day of each instant; ``len(days)`` or more = after the world's end."""
        return np.searchsorted(self.midnights, seconds, side="right") - 1


@dataclass(frozen=True)
class Shard:
    """Everything 100 users did; one frame per kind of row, ``owner`` = number of the user."""

    events: pd.DataFrame
    sends: pd.DataFrame
    users: pd.DataFrame


def draw_world(config: Config) -> World:
    """Draw what all users share from the seed alone.

    Raises:
        ConfigError: fewer than ``MIN_DAYS`` days.
    """
    run = config.run
    days = tuple(DateRange(run.first_date, run.last_date + timedelta(days=1)).days())
    if len(days) < MIN_DAYS:
        raise ConfigError(
            f"synthetic shop: {run.first_date} to {run.last_date} is shorter than {MIN_DAYS} days; "
            "move run.first_date or run.last_date"
        )
    ends = (*days, days[-1] + timedelta(days=1))
    rng = np.random.default_rng([config.source.seed, 0])
    popularity = rng.dirichlet(np.full(NUM_CATEGORIES, 3.0))
    item_price = np.round(rng.gamma(4.0, 8.0, NUM_CATEGORIES * ITEMS_PER_CATEGORY) + 2.0, 2)
    first = min(CAMPAIGN_EVERY_DAYS, len(days) // 3)
    starts = range(first, len(days) - CAMPAIGN_DAYS + 1, CAMPAIGN_EVERY_DAYS)
    return World(
        days=days,
        midnights=np.array([int(day_start(day, config.lake.time_zone).timestamp()) for day in ends]),
        successor=rng.permutation(NUM_CATEGORIES),
        popularity=popularity,
        item_price=item_price,
        campaigns=tuple(
            _draw_campaign(rng, number, start, popularity) for number, start in enumerate(starts)
        ),
        lateness_days=config.lake.lateness_days,
    )


def _draw_campaign(rng: np.random.Generator, number: int, start: int, popularity: Array) -> Campaign:
    chosen = rng.choice(NUM_CATEGORIES, size=int(rng.integers(2, 4)), replace=False, p=popularity)
    categories = tuple(sorted(chosen.tolist()))
    coupons = []
    for n in range(max(len(categories), int(rng.integers(2, 5)))):
        category = categories[n % len(categories)]
        items = category * ITEMS_PER_CATEGORY + rng.choice(ITEMS_PER_CATEGORY, size=8, replace=False)
        coupons.append(Coupon(f"k{number + 1}-{n + 1}", category, tuple(sorted(items.tolist()))))
    return Campaign(str(number + 1), CAMPAIGN_TYPES[number % 3], start, categories, tuple(coupons))


def draw_shard(world: World, shard: int, seed: int) -> Shard:
    """Draw everything 100 users do, from (seed, shard) alone."""
    rng = np.random.default_rng([seed, 1, shard])
    owner = np.arange(shard * SHARD_USERS, (shard + 1) * SHARD_USERS)
    is_bot = owner % 150 == 7
    long_term = rng.integers(0, NUM_CATEGORIES, (SHARD_USERS, 3))
    current = _draw_interests(world, rng, long_term)
    denied_from = np.where(
        rng.random(SHARD_USERS) < 0.08,
        rng.integers(-len(world.days) // 2, len(world.days), SHARD_USERS),
        NEVER,
    )
    users = pd.DataFrame(
        {
            "owner": owner,
            "is_bot": is_bot,
            "long_term": long_term.tolist(),
            "denied_from": denied_from,
            "is_bounce": rng.random(SHARD_USERS) < 0.3,
            "has_attributes": rng.random(SHARD_USERS) < 0.7,
            "age": rng.integers(0, 4, SHARD_USERS),
            "tier": rng.integers(0, 3, SHARD_USERS),
        }
    )
    organic = _draw_sessions(world, rng, long_term, current)
    organic = organic[~is_bot[organic["user"]]]
    mailed, sends = _draw_mails(world, rng, users, organic, current)
    events = pd.concat([organic, mailed, _draw_bots(world, rng, is_bot)], ignore_index=True)
    events["user"] += owner[0]
    sends["owner"] += owner[0]
    events["owner"] = events["user"]
    events["number"] = np.arange(len(events))
    events = events[world.day_of(events["ingest"].to_numpy()) < len(world.days)]
    return Shard(events.reset_index(drop=True), sends, users)


def _draw_interests(world: World, rng: np.random.Generator, long_term: Array) -> Array:
    """Current category of each user on each day, [users, days]."""
    num_users = len(long_term)
    now, days = long_term[:, 0], []
    for _ in world.days:
        change = rng.random(num_users)
        back = rng.random(num_users) < 0.35
        home = long_term[np.arange(num_users), rng.integers(0, 3, num_users)]
        step = np.where(back, home, world.successor[now])
        jump = rng.integers(0, NUM_CATEGORIES, num_users)
        now = np.where(change < 0.12, step, np.where(change < 0.14, jump, now))
        days.append(now)
    return np.stack(days, axis=1)


def _draw_sessions(world: World, rng: np.random.Generator, long_term: Array, current: Array) -> pd.DataFrame:
    """Views, searches, favourites, carts and purchases of ordinary visits; ``user`` is local, 0..99.

    Evening starts are reflected at midnight, so a few sessions run into the next day.
    """
    num_days = len(world.days)
    rate = rng.gamma(1.5, 0.4, SHARD_USERS)
    weekday = (world.days[0].weekday() + np.arange(num_days)) % 7
    count = rng.poisson(rate[:, None] * WEEKDAY_ACTIVITY[weekday][None, :])
    user, day = np.divmod(np.repeat(np.arange(count.size), count.ravel()), num_days)
    hour = np.clip(rng.normal(20.5, 3.2, len(user)), 7.0, None)
    hour = np.clip(np.where(hour > 23.999, 2 * 23.999 - hour, hour), 7.0, 23.999)
    start = world.midnights[day] + (hour * HOUR_SECONDS).astype(np.int64)
    length = 1 + rng.poisson(4, len(user))
    session = np.repeat(np.arange(len(user)), length)
    num_views = len(session)
    elapsed = np.cumsum(rng.exponential(45, num_views).astype(np.int64))
    first = np.cumsum(length) - length
    when = start[session] + elapsed - elapsed[first][session]
    viewer, source = user[session], rng.random(num_views)
    category = np.where(
        source < 0.55,
        current[user, day][session],
        np.where(
            source < 0.75,
            long_term[viewer, rng.integers(0, 3, num_views)],
            rng.choice(NUM_CATEGORIES, num_views, p=world.popularity),
        ),
    )
    item = category * ITEMS_PER_CATEGORY + (rng.random(num_views) ** 2 * ITEMS_PER_CATEGORY).astype(np.int64)
    is_search = rng.random(num_views) < 0.08
    is_favourite = ~is_search & (rng.random(num_views) < 0.05)
    is_cart = ~is_search & (rng.random(num_views) < 0.10)
    is_bought = is_cart & (rng.random(len(user)) < 0.5)[session]
    delay = 1 + rng.exponential(20, num_views).astype(np.int64)
    quantity = 1 + (rng.random(num_views) < 0.1)
    price = np.round(world.item_price[item] * quantity, 2)
    discount = np.where(rng.random(num_views) < 0.15, np.round(0.1 * price, 2), 0.0)
    base = {
        "user": viewer,
        "type": np.where(is_search, SEARCH, VIEW),
        "time": when,
        "ingest": when + delay,
        "item": np.where(is_search, -1, item),
        "device": rng.integers(0, NUM_DEVICES, len(user))[session],
    }
    views = _events(**base)
    favourites = _events(**base | {"type": FAVOURITE, "time": when + 5, "ingest": when + 5 + delay})
    carts = _events(**base | {"type": CART, "time": when + 8, "ingest": when + 8 + delay})
    paid = when[first + length - 1][session] + 60  # one order per session, after its last step
    purchases = _events(
        **base | {"type": PURCHASE, "time": paid, "ingest": paid + 1 + session % 7},
        order=session,
        price=np.round(price - discount, 2),
        quantity=quantity,
        discount=discount,
        coupon=0.0,
    )
    return pd.concat(
        [views, favourites[is_favourite], carts[is_cart], purchases[is_bought]], ignore_index=True
    )


def _events(
    user: Array,
    type: Array | int,
    time: Array,
    ingest: Array,
    item: Array | int,
    device: Array,
    order: Array | int = -1,
    price: Array | float = np.nan,
    quantity: Array | int = -1,
    discount: Array | float = np.nan,
    coupon: Array | float = np.nan,
) -> pd.DataFrame:
    """Event rows as numbers: -1 and NaN stand for null; times in UTC seconds."""
    return pd.DataFrame(
        {
            "user": user,
            "type": type,
            "time": time,
            "ingest": ingest,
            "item": item,
            "device": device,
            "order": order,
            "price": price,
            "quantity": quantity,
            "discount": discount,
            "coupon": coupon,
            "is_bot": False,
        }
    )


def redemption_logit(
    campaign: Campaign, category_events: Array, all_events: Array, is_current: Array
) -> Array:
    """True log-odds that a mailed user redeems.

    Args:
        campaign: its type moves the base rate.
        category_events: events of the user in the campaign's categories, last ``AFFINITY_DAYS``.
        all_events: events with an item in the same days.
        is_current: whether the interest on the eve of the campaign is one of its categories.
    """
    base = -4.2 + 0.4 * (1 - CAMPAIGN_TYPES.index(campaign.type))
    logit: Array = base + 1.1 * np.log1p(category_events) + 0.35 * np.log1p(all_events) + 1.0 * is_current
    return logit


def _draw_mails(
    world: World, rng: np.random.Generator, users: pd.DataFrame, organic: pd.DataFrame, current: Array
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mail events and coupon purchases, and one row per send with its outcome (``owner`` local).

    The affinity counts ordinary visits only, so it does not depend on earlier campaigns.
    """
    seen = organic[organic["item"] >= 0]
    day = np.minimum(world.day_of(seen["time"].to_numpy()), len(world.days))
    counts = np.zeros((SHARD_USERS, NUM_CATEGORIES, len(world.days) + 2))
    np.add.at(counts, (seen["user"].to_numpy(), seen["item"].to_numpy() // ITEMS_PER_CATEGORY, day + 1), 1)
    before = counts.cumsum(axis=2)  # [user, category, day]: events on earlier days
    parts, sends = [], []
    local, is_bot = np.arange(SHARD_USERS), users["is_bot"].to_numpy()
    for number, campaign in enumerate(world.campaigns):
        start, categories = campaign.start, list(campaign.categories)
        recent = before[:, :, start] - before[:, :, max(0, start - AFFINITY_DAYS)]
        logit = redemption_logit(
            campaign,
            recent[:, categories].sum(axis=1),
            recent.sum(axis=1),
            np.isin(current[:, start - 1], categories),
        )
        probability = np.where(is_bot, 0.0, 1.0 / (1.0 + np.exp(-logit)))
        draw = rng.random((4, SHARD_USERS))
        sent = (users["denied_from"].to_numpy() >= start) & (draw[0] < 0.5)
        redeemed = sent & (draw[1] < probability)
        opened = sent & ~is_bot & (draw[2] < 0.25 + 0.5 * probability)
        clicked = opened & (draw[3] < 0.15 + 0.5 * probability)
        delivered = world.midnights[start] + 8 * HOUR_SECONDS + rng.integers(0, 1_800, SHARD_USERS)
        read = delivered + 60 + rng.exponential(4 * HOUR_SECONDS, SHARD_USERS).astype(np.int64)
        bought_on = start + np.minimum(rng.geometric(0.35, SHARD_USERS), CAMPAIGN_DAYS) - 1
        bought = world.midnights[bought_on] + rng.integers(18 * HOUR_SECONDS, 22 * HOUR_SECONDS, SHARD_USERS)
        taste = np.log1p(recent[:, [coupon.category for coupon in campaign.coupons]])
        coupon = np.argmax(taste + rng.gumbel(size=taste.shape), axis=1)
        items = np.array([coupon.items for coupon in campaign.coupons])
        item = items[coupon, rng.integers(0, items.shape[1], SHARD_USERS)]
        device = rng.integers(0, NUM_DEVICES, SHARD_USERS)
        saved = np.round(COUPON_SHARE * world.item_price[item], 2)
        opens = _events(local, MAIL_OPEN, read, read + 2, -1, device)
        clicks = _events(local, MAIL_CLICK, read + 20, read + 22, -1, device)
        purchases = _events(
            local,
            PURCHASE,
            bought,
            bought + 3,
            item,
            device,
            order=1_000_000 + number * SHARD_USERS + local,  # apart from the orders of sessions
            price=np.round(world.item_price[item] - saved, 2),
            quantity=1,
            discount=0.0,
            coupon=saved,
        )
        parts += [opens[opened], clicks[clicked], purchases[redeemed]]
        outcome = {
            "owner": local,
            "campaign": number,
            "coupon": coupon,
            "item": item,
            "delivered": delivered,
            "bought": bought,
            "probability": probability,
            "is_redeemed": redeemed,
        }
        sends.append(pd.DataFrame(outcome)[sent])
    return pd.concat(parts, ignore_index=True), pd.concat(sends, ignore_index=True)


def _draw_bots(world: World, rng: np.random.Generator, is_bot: Array) -> pd.DataFrame:
    """1,200 views at one per second on each of three days, over all items; never a purchase."""
    parts = []
    for user in np.flatnonzero(is_bot):
        for day in np.sort(rng.choice(len(world.days), 3, replace=False)):
            when = world.midnights[day] + 10 * HOUR_SECONDS + np.arange(1_200)
            item = rng.integers(0, NUM_CATEGORIES * ITEMS_PER_CATEGORY, len(when))
            rows = _events(np.full(len(when), user), VIEW, when, when + 1, item, np.ones_like(when))
            parts.append(rows.assign(is_bot=True))
    nobody = np.empty(0, dtype=np.int64)
    return pd.concat([_events(nobody, VIEW, nobody, nobody, nobody, nobody), *parts], ignore_index=True)
