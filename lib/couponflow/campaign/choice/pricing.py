"""Prices of limits: what one more unit of the budget, the list, a stock or a segment is worth.

Options of users as arrays, the upper convex hulls of them, and the prices at which users who each take what
suits them best use about what the limits allow. Values and costs are whole micro-units, so sums are exact;
prices are floats and only ever order choices. Rows come in tie order, so that equals are decided by place.

Legend: N users in tie order, M options, U unit limits (list size, stock of a coupon, segment).
Source: Sinha and Zoltners 1979 (hull), Fisher 1981 (dual ascent).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NONE = -1  # the choice of a user without an option
NO_LIMIT = 1 << 62
MAX_SWEEPS = 60
_KINDS = ("stock", "segment_max", "max_recipients")
_SETTLED = 1e-6  # a sweep that changes the dual bound by a smaller share is the last
_SAFE_SUM = 2.0**62  # a float sum below shows that the bigint sum has not wrapped round


@dataclass(frozen=True)
class UnitLimit:
    """How many users may, and have to, hold one of some options; users outside its ``member`` are free.

    ``kind`` is max_recipients, stock or segment_max; ``name`` says which coupon or segment.
    """

    kind: str
    name: str
    options: tuple[bool, ...]
    maximum: int = NO_LIMIT
    minimum: int = 0


@dataclass(frozen=True)
class Limits:
    """The budget in micro-units and the unit limits, of which there is at least one: the list size."""

    budget: int
    units: tuple[UnitLimit, ...]

    def less(self, used: "Usage") -> "Limits":
        """What is left of the limits after some users hold an option; a maximum may become negative."""
        units = tuple(
            replace(unit, maximum=unit.maximum - int(count), minimum=max(0, unit.minimum - int(count)))
            for unit, count in zip(self.units, used.counts, strict=True)
        )
        return Limits(self.budget - used.cost, units)

    @property
    def is_budget_alone(self) -> bool:
        """Whether no unit limit can bind."""
        return all(unit.maximum >= NO_LIMIT and not unit.minimum for unit in self.units)

    @property
    def uses(self) -> Bools:
        """Which options count against which unit limit."""
        return np.array([unit.options for unit in self.units], bool)


@dataclass(frozen=True)
class Usage:
    """What the choices of some users take: money in micro-units, users per unit limit."""

    cost: int
    counts: Ints


@dataclass(frozen=True)
class Users:
    """Options of users in tie order: ``value``, ``cost``, ``is_offered`` [N, M], ``member`` [N, U].

    A value may be negative, a cost may not; what is not offered is no option. A user counts against a unit
    limit iff he is a ``member`` of it and holds one of its options.
    """

    value: Ints
    cost: Ints
    is_offered: Bools
    member: Bools

    def take(self, rows: Bools | Ints) -> "Users":
        """Some of the users, in their order."""
        return Users(self.value[rows], self.cost[rows], self.is_offered[rows], self.member[rows])

    def usage(self, choice: Ints, limits: Limits) -> Usage:
        """What ``choice`` takes of each limit."""
        rows = np.flatnonzero(choice != NONE)
        chosen = choice[rows]
        counted = self.member[rows] & limits.uses.T[chosen]
        return Usage(int(self.cost[rows, chosen].sum()), counted.sum(0).astype(np.int64))

    def total_value(self, choice: Ints) -> int:
        """Sum of the values of the chosen options."""
        rows = np.flatnonzero(choice != NONE)
        return int(self.value[rows, choice[rows]].sum())


@dataclass(frozen=True)
class Prices:
    """Shadow prices: value per unit of cost, and value per user of each unit limit.

    A price below 0 pays for users that a minimum needs.
    """

    budget: float
    units: tuple[float, ...]


@dataclass(frozen=True)
class Steps:
    """Steps up the users' hulls, in order of (slope desc, row, step): from one option to the next."""

    row: Ints
    option: Ints
    slope: Floats
    cost: Ints


def after_unit_prices(users: Users, limits: Limits, prices: Prices) -> Floats:
    """[N, M] value of each option less the prices of the unit limits that it uses; -inf where not offered."""
    charged = users.member * np.array(prices.units)
    value = users.value - charged @ limits.uses
    return np.where(users.is_offered, value, -np.inf)


def reduced_values(users: Users, limits: Limits, prices: Prices) -> Floats:
    """[N, M] value of each option less all prices; -inf where not offered."""
    return after_unit_prices(users, limits, prices) - prices.budget * users.cost


def hull_steps(users: Users, value: Floats) -> Steps:
    """Steps up the upper convex hull of (cost, ``value``) of each user, from no option at (0, 0).

    Rule: from where a user stands, the next option is the one of the steepest slope among those worth more;
        of equal slopes the farthest, then the first listed. Slopes of a user strictly fall, rounding aside;
        an option of no further cost has an infinite slope.

    One user, options (cost, value) (1, 2), (2, 5)::

        (0, 0) -> (2, 5) slope 2.5        the first option lies below the hull
    """
    num_users, num_options = value.shape
    at_cost, at_value = np.zeros(num_users, np.int64), np.zeros(num_users)
    last_slope = np.full(num_users, np.inf)
    rows = np.arange(num_users)
    parts: list[tuple[Ints, Ints, Floats, Ints]] = []
    for _ in range(num_options):
        cost = users.cost[rows] - at_cost[:, None]
        gain = value[rows] - at_value[:, None]
        is_up = (gain > 0) & (cost >= 0)
        slope = np.full(gain.shape, -np.inf)
        np.divide(gain, cost, out=slope, where=is_up & (cost > 0))
        slope[is_up & (cost == 0)] = np.inf
        best = slope.max(1)
        is_best = is_up & (slope == best[:, None])
        option = np.where(is_best, gain, -np.inf).argmax(1)
        kept = np.flatnonzero(is_best.any(1))
        if not kept.size:
            break
        option = option[kept]
        slope = np.minimum(best[kept], last_slope[kept])
        parts.append((rows[kept], option, slope, cost[kept, option]))
        at_cost = at_cost[kept] + cost[kept, option]
        at_value = value[rows[kept], option]
        rows, last_slope = rows[kept], slope
    if not parts:
        return Steps(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    row, option, slope, cost = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((row, -slope))  # stable: a user's steps stay in their order
    return Steps(row[order], option[order], slope[order], cost[order])


def within_budget(steps: Steps, budget: int) -> tuple[int, float]:
    """How many steps fit, up to the first that does not; its slope is the price of the budget."""
    is_safe = np.cumsum(steps.cost.astype(np.float64)) < _SAFE_SUM
    fits = is_safe & (np.cumsum(steps.cost) <= budget)
    count = int(np.argmin(fits)) if not fits.all() else fits.size
    return count, float(steps.slope[count]) if count < fits.size else 0.0


def find_prices(users: Users, limits: Limits) -> list[Prices]:
    """Prices at which users who each take their best option use about what the limits allow, best first.

    Returns the prices with the least dual bound, then those of other sweeps, the last first.
    Rule: minimise the dual bound in one price at a time, the others fixed, until the bound stands still. A
        unit limit has one threshold per user, the gain of using it: its price is the largest threshold that
        has to stay outside. The price of the budget is the slope of the first hull step that does not fit.
    Empty: without users, or with limits that do not bind, all prices are 0.
    """
    prices = Prices(0.0, (0.0,) * len(limits.units))
    bounded = [u for u, unit in enumerate(limits.units) if unit.maximum < NO_LIMIT or unit.minimum > 0]
    tried: list[tuple[float, Prices]] = []
    for _ in range(MAX_SWEEPS if bounded else 1):
        for unit in bounded:
            prices = _with_unit_price(users, limits, prices, unit)
        steps = hull_steps(users, after_unit_prices(users, limits, prices))
        prices = replace(prices, budget=within_budget(steps, limits.budget)[1])
        bound = dual_bound(users, limits, prices)
        is_settled = bool(tried) and abs(bound - tried[-1][0]) <= _SETTLED * abs(bound)
        tried.append((bound, prices))
        if is_settled:
            break
    _, best = min(tried, key=lambda one: one[0])
    return [best, *dict.fromkeys(found for _, found in reversed(tried) if found != best)]


def _with_unit_price(users: Users, limits: Limits, prices: Prices, unit: int) -> Prices:
    """The prices with that of one unit limit at its best, given the others."""
    free = replace(prices, units=tuple(0.0 if u == unit else p for u, p in enumerate(prices.units)))
    gain = unit_gains(users, limits, reduced_values(users, limits, free), unit)
    limit = limits.units[unit]
    price = max(0.0, _largest(gain, limit.maximum))
    if limit.minimum:
        price = min(price, _largest(gain, limit.minimum - 1))
    price = price if np.isfinite(price) else 0.0  # too few users for the minimum: no price helps
    return replace(free, units=tuple(price if u == unit else p for u, p in enumerate(free.units)))


def unit_gains(users: Users, limits: Limits, reduced: Floats, unit: int) -> Floats:
    """[N] what a user gains from an option that uses a unit limit over the best that does not, or none."""
    uses = users.member[:, unit, None] & limits.uses[unit]
    using = np.where(uses, reduced, -np.inf).max(1, initial=-np.inf)
    other: Floats = np.where(uses, -np.inf, reduced).max(1, initial=0.0)
    return np.asarray(using - other, np.float64)


def _largest(gain: Floats, place: int) -> float:
    """The value at a place of the descending order, from 0; -inf beyond its end."""
    if place >= gain.size:
        return -np.inf
    return float(np.partition(gain, gain.size - 1 - place)[gain.size - 1 - place])


def dual_bound(users: Users, limits: Limits, prices: Prices) -> float:
    """No choice within the limits is worth more, whatever the prices."""
    best = reduced_values(users, limits, prices).max(1, initial=0.0)
    return float(best.sum()) + limits_worth(limits, prices)


def limits_worth(limits: Limits, prices: Prices) -> float:
    """What the limits are worth at the prices; a minimum that binds is worth less than nothing."""
    units = zip(limits.units, prices.units, strict=True)
    worth = sum(price * (unit.maximum if price > 0 else unit.minimum) for unit, price in units)
    return prices.budget * limits.budget + worth


def offered(users: Users, limits: Limits) -> Users:
    """The users without options that nobody can hold: dearer than the budget, or of a used-up limit."""
    is_open = users.is_offered & (users.cost <= limits.budget)
    for unit, limit in enumerate(limits.units):
        if limit.maximum <= 0:
            is_open &= ~(users.member[:, unit, None] & limits.uses[unit])
    return replace(users, is_offered=is_open)


def barriers(users: Users, limits: Limits, prices: Prices) -> NDArray[np.object_]:
    """[N] why a user without an option has none: value, or the kind of the limit that stood in the way.

    Rule: the limits are charged one kind after the other (stock, segment_max, max_recipients, budget); the
        first at which no option is worth anything any more is the reason. Whom all of them leave worth a mail
        was left out by the dearest limit.
    """
    left = np.where(users.is_offered & (users.value > 0), users.value.astype(np.float64), -np.inf)
    worth = dict.fromkeys((*_KINDS, "budget"), 0.0)
    reason = np.full(left.shape[0], "", object)
    reason[left.max(1, initial=-np.inf) <= 0] = "value"
    for kind in (*_KINDS, "budget"):
        if kind == "budget":
            left = np.where(users.cost > limits.budget, -np.inf, left - prices.budget * users.cost)
            worth[kind] = prices.budget * limits.budget
        for unit, limit in enumerate(limits.units):
            if limit.kind == kind:
                price = np.inf if limit.maximum <= 0 else max(0.0, prices.units[unit])
                uses = users.member[:, unit, None] & limits.uses[unit]
                left = np.where(uses, left - price, left)
                worth[kind] += price * max(0, limit.maximum) if price < np.inf else 0.0
        is_barred = left.max(1, initial=-np.inf) <= 0
        reason[(reason == "") & is_barred] = kind
    reason[reason == ""] = max(worth, key=lambda kind: worth[kind])
    return reason
