"""The world of the synthetic shop: what all its users share, drawn from the seed alone.

Categories with their popularity and secret successors, prices, campaigns, the pairs of the order-only rule,
and what happens on which day. Users are drawn in shards (``synthetic_users``), so a world of any size is
never held in memory.
"""

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from couponflow.config import Config
from couponflow.dates import DateRange, day_start
from couponflow.errors import ConfigError
from couponflow.sources.landing import Array
from couponflow.sources.synthetic_rows import HOUR_SECONDS
from couponflow.world import Incident, WorldConfig

NUM_CATEGORIES, ITEMS_PER_CATEGORY, CATEGORIES_PER_SHOP = 60, 20, 5
SHARD_USERS = 100
MIN_DAYS, CAMPAIGN_DAYS = 14, 7
CAMPAIGN_TYPES = ("Type A", "Type B", "Type C")
NUM_SUCCESSORS = 3
#: Part of the price that a coupon pays; money for one mail.
COUPON_SHARE, MAIL_COST = 0.2, 0.05
#: Usual size of each kind of incident, and whether it is one: the others only look like it.
USUAL_SIZE = {"outage": 0.5, "ramp": 0.02, "conversion_drop": 0.1, "sale": 0.4, "holiday": 0.6}
NO_INCIDENTS = ("sale", "holiday")
OF_DELIVERY = ("missing_day", "double_load", "stale_copy")

#: Streams of random numbers, so that one part of the world never shifts another.
USERS, VISITS, EXTRAS, ORDERED, MAILS, DIRT, STATUS = range(1, 8)


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
    ``successor`` [C] and ``successors`` [previous, current, 3]: the secret next categories.
    ``pairs`` [K, 4]: categories A, B, C, D of the order-only rule; A before B makes C wanted, else D.
    ``rounds``: (first day, numbers of the campaigns that start on it); one campaign, or one per category.
    ``activity`` and ``conversion`` [days]: what incidents multiply visits and purchases with.
    ``delivery``: day index to what happened to that day's events feed.
    ``lost_hour`` and ``double_hour``: half-open seconds of delivery, empty where there is none.
    ``clock_changes``: UTC seconds at which the local clock is moved.
    """

    dials: WorldConfig
    seed: int
    gap_minutes: int
    lateness_days: int
    days: tuple[date, ...]
    midnights: Array
    successor: Array
    successors: Array
    popularity: Array
    item_price: Array
    momentum_sign: Array
    pairs: Array
    campaigns: tuple[Campaign, ...]
    rounds: tuple[tuple[int, tuple[int, ...]], ...]
    activity: Array
    conversion: Array
    delivery: dict[int, str]
    lost_hour: tuple[int, int]
    double_hour: tuple[int, int]
    clock_changes: tuple[int, ...]

    def day_of(self, seconds: Array) -> Array:
        """Index of the business day of each instant; -1 before the world, ``len(days)`` after its end."""
        return np.searchsorted(self.midnights, seconds, side="right") - 1

    def random(self, stream: int, shard: int) -> np.random.Generator:
        """The generator of one part of one shard."""
        return np.random.default_rng([self.seed, stream, shard])

    def next_categories(self, previous: Array, current: Array) -> Array:
        """What may come next, [..., 3]; in a world of first order all three are the same."""
        if self.dials.second_order:
            return np.asarray(self.successors[previous, current])
        return np.repeat(self.successor[current][..., None], NUM_SUCCESSORS, axis=-1)


def draw_world(config: Config) -> World:
    """Draw what all users share.

    Raises:
        ConfigError: fewer than ``MIN_DAYS`` days, or an incident outside them.
    """
    run, dials = config.run, config.world
    days = tuple(DateRange(run.first_date, run.last_date + timedelta(days=1)).days())
    if len(days) < MIN_DAYS:
        raise ConfigError(
            f"synthetic shop: {run.first_date} to {run.last_date} is shorter than {MIN_DAYS} days; "
            "move run.first_date or run.last_date"
        )
    ends = (*days, days[-1] + timedelta(days=1))
    midnights = np.array([int(day_start(day, config.lake.time_zone).timestamp()) for day in ends])
    rng = np.random.default_rng([config.source.seed, 0])
    popularity = rng.dirichlet(np.full(NUM_CATEGORIES, 3.0))
    item_price = np.round(rng.gamma(4.0, 8.0, NUM_CATEGORIES * ITEMS_PER_CATEGORY) + 2.0, 2)
    successor = rng.permutation(NUM_CATEGORIES)
    ranks = rng.random((NUM_CATEGORIES, NUM_CATEGORIES, NUM_CATEGORIES)).argsort(axis=2)
    sign = np.where(rng.permutation(NUM_CATEGORIES) % 2, 1.0, -1.0)
    pairs = rng.permutation(NUM_CATEGORIES)[: 4 * dials.order_pairs].reshape(-1, 4)
    campaigns, rounds = _draw_campaigns(rng, dials, len(days), popularity)
    activity, conversion, delivery = _effects(dials.incidents, days)
    has_odd_hours = dials.is_dirty and dials.has_odd_hours
    return World(
        dials=dials,
        seed=config.source.seed,
        gap_minutes=config.sessions.gap_minutes,
        lateness_days=config.lake.lateness_days,
        days=days,
        midnights=midnights,
        successor=successor,
        successors=ranks[:, :, :NUM_SUCCESSORS].copy(),
        popularity=popularity,
        item_price=item_price,
        momentum_sign=sign,
        pairs=pairs,
        campaigns=campaigns,
        rounds=rounds,
        activity=activity,
        conversion=conversion,
        delivery=delivery,
        lost_hour=_evening_hour(midnights[len(days) // 3], has_odd_hours),
        double_hour=_evening_hour(midnights[len(days) // 2], has_odd_hours),
        clock_changes=_clock_changes(midnights),
    )


def _evening_hour(midnight: int, exists: bool) -> tuple[int, int]:
    start = int(midnight) + 20 * HOUR_SECONDS
    return (start, start + HOUR_SECONDS) if exists else (0, 0)


def _clock_changes(midnights: Array) -> tuple[int, ...]:
    """02:00 of each day that has not 24 hours: where clocks are moved in North America and nearby."""
    odd = np.flatnonzero(np.diff(midnights) != 24 * HOUR_SECONDS)
    return tuple(int(midnights[day]) + 2 * HOUR_SECONDS for day in odd)


def _draw_campaigns(
    rng: np.random.Generator, dials: WorldConfig, num_days: int, popularity: Array
) -> tuple[tuple[Campaign, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
    first = min(dials.campaign_first_day, num_days // 3)
    campaigns: list[Campaign] = []
    rounds = []
    for number, start in enumerate(range(first, num_days - CAMPAIGN_DAYS + 1, dials.campaign_every_days)):
        if dials.campaigns == "sets":
            size = int(rng.integers(2, 4))  # the same for all of a day: their targets are one array
            targets = []
            for index in range(len(campaigns), len(campaigns) + dials.campaigns_at_once):
                chosen = rng.choice(NUM_CATEGORIES, size=size, replace=False, p=popularity)
                categories = tuple(sorted(chosen.tolist()))
                targets.append((str(index + 1), index, categories, int(rng.integers(2, 5))))
        else:
            targets = [
                (f"{start}-c{category:02d}", number, (category,), 1) for category in range(NUM_CATEGORIES)
            ]
        rounds.append((start, tuple(range(len(campaigns), len(campaigns) + len(targets)))))
        for name, turn, categories, least in targets:
            coupons = tuple(
                _draw_coupon(rng, f"k{name}-{n + 1}", categories[n % len(categories)])
                for n in range(max(len(categories), least))
            )
            campaigns.append(Campaign(name, CAMPAIGN_TYPES[turn % 3], start, categories, coupons))
    return tuple(campaigns), tuple(rounds)


def _draw_coupon(rng: np.random.Generator, coupon_id: str, category: int) -> Coupon:
    items = category * ITEMS_PER_CATEGORY + rng.choice(ITEMS_PER_CATEGORY, size=8, replace=False)
    return Coupon(coupon_id, category, tuple(sorted(items.tolist())))


def _effects(incidents: tuple[Incident, ...], days: tuple[date, ...]) -> tuple[Array, Array, dict[int, str]]:
    """What incidents do to visits, to purchases and to the delivery of each day."""
    activity, conversion = np.ones(len(days)), np.ones(len(days))
    delivery: dict[int, str] = {}
    for incident in incidents:
        first = (incident.date - days[0]).days
        if not 0 <= first <= len(days) - incident.days:
            raise ConfigError(
                f"synthetic shop: world.incidents: {incident.kind} of {incident.days} days from "
                f"{incident.date} is not inside {days[0]}:{days[-1]}; move it, or widen run.*_date"
            )
        for n in range(incident.days):
            loss = usual_size(incident) * (n + 1 if incident.kind == "ramp" else 1)
            if incident.kind in OF_DELIVERY:
                delivery[first + n] = incident.kind
            elif incident.kind == "conversion_drop":
                conversion[first + n] *= 1.0 - loss
            else:
                activity[first + n] *= 1.0 + loss if incident.kind == "sale" else max(0.0, 1.0 - loss)
    return activity, conversion, delivery


def usual_size(incident: Incident) -> float:
    """The share that an incident takes or adds: its own, or that of its kind."""
    return USUAL_SIZE.get(incident.kind, 0.0) if incident.size is None else incident.size
