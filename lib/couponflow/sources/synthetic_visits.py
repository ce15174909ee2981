"""What users of the synthetic shop do on its site: visits, periodic needs, and what only machines do.

Evening visits of a few seconds per step; a few run over midnight. Bots view one item per second, crawlers say
what they are; heavy users come twenty times a day and are neither.
"""

import numpy as np

from couponflow.sources.landing import Array
from couponflow.sources.synthetic_rows import (
    BOT,
    CART,
    DAY_SECONDS,
    FAVOURITE,
    HOUR_SECONDS,
    PURCHASE,
    SEARCH,
    VIEW,
    Rows,
    concat,
    events,
    take,
)
from couponflow.sources.synthetic_users import NUM_DEVICES, Users, every
from couponflow.sources.synthetic_world import (
    EXTRAS,
    ITEMS_PER_CATEGORY,
    NUM_CATEGORIES,
    SHARD_USERS,
    VISITS,
    World,
)

WEEKDAY_ACTIVITY = np.array([1.0, 0.95, 0.95, 1.0, 1.1, 1.4, 1.3])  # Monday first
VIEWS_PER_VISIT = 5
CURRENT_SHARE, HABIT_SHARE = 0.55, 0.20
SEARCH_SHARE, FAVOURITE_SHARE, CART_SHARE, BUY_SHARE = 0.08, 0.05, 0.06, 0.5
#: Orders are numbered inside a shard: visits from 0, coupons and needs apart from them.
MAIL_ORDERS, NEED_ORDERS = 1_000_000, 2_000_000
#: Views of a bot per active day, one a second; of a crawler, about one a minute.
BOT_VIEWS, CRAWLER_VIEWS = 1_200, 40
#: Codes of user agents: those of the three device classes, then two that say what they are.
BOT_AGENTS = (3, 4)


def draw_visits(world: World, users: Users) -> Rows:
    """Views, searches, favourites, carts and purchases of ordinary and heavy users.

    Evening starts are reflected at midnight, so a few sessions run into the next day.
    """
    rng, num_days = world.random(VISITS, users.shard), len(world.days)
    weekday = (world.days[0].weekday() + np.arange(num_days)) % 7
    rate = np.where(users.is_person, users.rate, 0.0)
    count = rng.poisson(rate[:, None] * (WEEKDAY_ACTIVITY[weekday] * world.activity)[None, :])
    user, day = np.divmod(np.repeat(np.arange(count.size), count.ravel()), num_days)
    evening = np.clip(rng.normal(20.5, 3.2, len(user)), 7.0, None)
    evening = np.clip(np.where(evening > 23.999, 2 * 23.999 - evening, evening), 7.0, 23.999)
    hour = np.where(users.is_heavy[user], 8.0 + 15.0 * rng.random(len(user)), evening)
    start = world.midnights[day] + (hour * HOUR_SECONDS).astype(np.int64)
    length = 1 + rng.poisson(VIEWS_PER_VISIT - 1, len(user))
    visit = np.repeat(np.arange(len(user)), length)
    num_views, first = len(visit), np.cumsum(length) - length
    elapsed = np.cumsum(rng.exponential(45, num_views).astype(np.int64))
    when = start[visit] + elapsed - elapsed[first][visit]
    viewer, source = user[visit], rng.random(num_views)
    category = np.where(
        source < CURRENT_SHARE,
        users.current[user, day][visit],
        np.where(
            source < CURRENT_SHARE + HABIT_SHARE,
            users.long_term[viewer, rng.integers(0, 3, num_views)],
            rng.choice(NUM_CATEGORIES, num_views, p=world.popularity),
        ),
    )
    item = draw_items(rng, category)
    is_search = rng.random(num_views) < SEARCH_SHARE
    is_favourite = ~is_search & (rng.random(num_views) < FAVOURITE_SHARE)
    is_cart = ~is_search & (rng.random(num_views) < CART_SHARE)
    buys = rng.random(len(user)) < BUY_SHARE * world.conversion[day]
    delay = 1 + rng.exponential(20, num_views).astype(np.int64)
    quantity = 1 + (rng.random(num_views) < 0.1)
    discount = rng.random(num_views) < 0.15
    device = rng.integers(0, NUM_DEVICES, len(user))[visit]
    base = {"owner": users.owner[viewer], "item": item, "device": device, "agent": device}
    views = events(
        **base
        | {"type": np.where(is_search, SEARCH, VIEW), "item": np.where(is_search, -1, item)}
        | {"time": when, "ingest": when + delay}
    )
    favourites = events(**base, type=FAVOURITE, time=when + 5, ingest=when + 5 + delay)
    carts = events(**base, type=CART, time=when + 8, ingest=when + 8 + delay)
    # One order per visit, after its last step.
    paid = when[first + length - 1][visit] + 60 if len(user) else when
    purchases = buy(world, base, paid, visit, quantity, discount)
    return concat(
        [views, take(favourites, is_favourite), take(carts, is_cart), take(purchases, is_cart & buys[visit])]
    )


def draw_items(rng: np.random.Generator, category: Array) -> Array:
    """An item of each category; the first ones are the popular ones."""
    skewed = (rng.random(category.shape) ** 2 * ITEMS_PER_CATEGORY).astype(np.int64)
    return np.asarray(category * ITEMS_PER_CATEGORY + skewed)


def buy(
    world: World, base: dict[str, Array], paid: Array, order: Array, quantity: Array, is_reduced: Array
) -> Rows:
    """Purchase lines at the list price, some with the shop's discount of 10 %."""
    price = np.round(world.item_price[base["item"]] * quantity, 2)
    discount = np.where(is_reduced, np.round(0.1 * price, 2), 0.0)
    return events(
        **base,
        type=PURCHASE,
        time=paid,
        ingest=paid + 1 + order % 7,
        order=order,
        price=np.round(price - discount, 2),
        quantity=quantity,
        discount=discount,
        coupon=0.0,
    )


def draw_needs(world: World, users: Users) -> Rows:
    """A view, a cart and a purchase of the needed category each period; those who come rarely skip many."""
    rng, num_days = world.random(EXTRAS, users.shard), len(world.days)
    day = np.arange(num_days)
    due = (day[None, :] - users.phase[:, None]) % users.period[:, None] == 0
    comes = rng.random(due.shape) < np.minimum(1.0, 2.0 * users.rate)[:, None]
    user, day = np.nonzero(due & comes & users.is_person[:, None])
    start = world.midnights[day] + rng.integers(9 * HOUR_SECONDS, 18 * HOUR_SECONDS, len(user))
    device = rng.integers(0, NUM_DEVICES, len(user))
    item = draw_items(rng, users.need[user])
    base = {"owner": users.owner[user], "item": item, "device": device, "agent": device}
    ones, order = np.ones(len(user), dtype=np.int64), NEED_ORDERS + np.arange(len(user))
    return concat(
        [
            events(**base, type=VIEW, time=start, ingest=start + 2),
            events(**base, type=CART, time=start + 40, ingest=start + 45),
            buy(world, base, start + 100, order, ones, np.zeros(len(user), dtype=bool)),
        ]
    )


def draw_machines(world: World, users: Users) -> Rows:
    """Bots (a view per second, all categories alike, some with a telling user agent) and slow crawlers."""
    rng, num_days = world.random(EXTRAS + 100, users.shard), len(world.days)
    dials = world.dials
    share = dials.bot_activity * dials.rate * VIEWS_PER_VISIT / BOT_VIEWS
    parts = [events(time=np.empty(0, dtype=np.int64))]
    for user in np.flatnonzero(~users.is_person):
        is_bot, owner = users.is_bot[user], users.owner[user]
        active = rng.random(num_days) < (min(1.0, share) if is_bot else 0.5)
        num_views = BOT_VIEWS if is_bot else CRAWLER_VIEWS
        agent = BOT_AGENTS[owner // SHARD_USERS % 2] if not is_bot or owner // 200 % 2 else 1
        for day in np.flatnonzero(active):
            steps = np.arange(num_views) if is_bot else np.cumsum(rng.integers(30, 90, num_views))
            when = world.midnights[day] + 10 * HOUR_SECONDS + steps
            item = rng.integers(0, NUM_CATEGORIES * ITEMS_PER_CATEGORY, num_views)
            parts.append(
                events(
                    owner=owner,
                    type=VIEW,
                    time=when,
                    ingest=when + 1,
                    item=item,
                    device=1,
                    agent=agent,
                    kind=BOT,
                )
            )
    return concat(parts)


def draw_edges(world: World, users: Users) -> Rows:
    """Sessions where a day is cut: over a change of the clock, over one midnight, and over three.

    One user of every shard has them, in a dirty world. The long one views something every 25 minutes from
    23:40 until half past midnight two days later; the rule of three days cuts it once.
    """
    marathon = 2 * DAY_SECONDS // 1_500
    around = np.array([-900, -60, 0, 60, 900])
    last = len(world.days) - 4
    instants = [change + around for change in world.clock_changes]
    instants += [world.midnights[min(5, last)] + np.array([-600, -1, 0, 1, 600])]
    instants += [world.midnights[min(8, last)] - 1_200 + 1_500 * np.arange(marathon)]
    when = np.concatenate(instants)
    share = 1.0 / SHARD_USERS if world.dials.is_dirty else 0.0
    chosen = np.flatnonzero(every(users.owner, share, 19) & users.is_person)
    owner = np.repeat(users.owner[chosen], len(when))
    when = np.tile(when, len(chosen))
    item = np.arange(len(when)) % ITEMS_PER_CATEGORY
    return events(owner=owner, type=VIEW, time=when, ingest=when + 2, item=item, device=1, agent=1)
