"""The multiple-choice knapsack: one option or none per user, under a budget and limits on counts of users.

A Lagrangian solution on arrays, no Spark; the same rows give the same choice.

1. ``pricing.find_prices``: a price per unit of each limit, by exact steps in one price at a time.
2. ``choose``: per user the upper convex hull of (cost, value less prices); its steps in order of slope until
   the first that does not fit the budget; then users over a limit leave, the least valuable first.
3. ``fill``: among all options the change with the best value per cost that fits, until none is left.

Legend: N users in tie order, M options, U unit limits (list size, stock of a coupon, segment).
"""

import numpy as np

from couponflow.campaign.choice.pricing import (
    NONE,
    Floats,
    Ints,
    Limits,
    Prices,
    Usage,
    Users,
    after_unit_prices,
    find_prices,
    hull_steps,
    reduced_values,
    within_budget,
)
from couponflow.errors import DataError

MAX_FILLS = 50
#: Prices of the last sweeps that ``solve`` tries on few users, of whom each weighs; one on more of them.
NUM_TRIALS, MAX_TRIAL_USERS = 6, 5_000
#: Factors on the price of the budget when segments get their minimum: the higher, the cheaper their users.
_THRIFT = (0.0, 1.0, 4.0, 16.0)


def choose(users: Users, limits: Limits, prices: Prices) -> Ints:
    """[N] the option of each user, or ``NONE``; within every limit, before the fill.

    Raises:
        DataError: a segment cannot get its minimum.
    """
    nobody = np.full(users.value.shape[0], NONE)
    choice = _take(users, limits, prices, nobody)
    if not _missing(users, choice, limits):
        return choice
    held = _hold_minimums(users, limits, prices, choice)
    return max((_take(users, limits, prices, start) for start in held), key=users.total_value)


def _take(users: Users, limits: Limits, prices: Prices, held: Ints) -> Ints:
    """Hull steps of users who hold nothing, in order, within the budget; then back inside the unit limits."""
    left = limits.less(users.usage(held, limits))
    value = after_unit_prices(users, limits, prices)
    value[held != NONE] = -np.inf
    steps = hull_steps(users, value)
    count, _ = within_budget(steps, left.budget)
    choice = held.copy()
    choice[steps.row[:count]] = steps.option[:count]  # the last step of a user counts
    reduced = reduced_values(users, limits, prices)
    for unit, limit in enumerate(limits.units):
        is_free = (choice != NONE) & (held == NONE)
        rows = np.flatnonzero((choice != NONE) & users.member[:, unit])
        rows = rows[limits.uses[unit][choice[rows]]]
        excess = rows.size - limit.maximum
        if excess > 0:
            rows = rows[is_free[rows]]
            worst = np.lexsort((-rows, reduced[rows, choice[rows]]))
            choice[rows[worst[:excess]]] = NONE
    return choice


def _missing(users: Users, choice: Ints, limits: Limits) -> list[int]:
    """The unit limits whose minimum is not met."""
    counts = users.usage(choice, limits).counts
    return [u for u, unit in enumerate(limits.units) if counts[u] < unit.minimum]


def _hold_minimums(users: Users, limits: Limits, prices: Prices, choice: Ints) -> list[Ints]:
    """Ways to give each segment its minimum: to add to its chosen users, or to choose them anew.

    Anew means best users first, with the budget ever dearer; the cheapest users where nothing else is within
    the limits.

    Raises:
        DataError: no way is within the limits.
    """
    reduced = reduced_values(users, limits, prices)
    nobody = np.full(choice.size, NONE)
    needed = [unit.minimum > 0 for unit in limits.units]
    kept = np.where(users.member[:, needed].any(1), choice, NONE)
    dearer = [reduced - factor * prices.budget * users.cost for factor in _THRIFT]
    ways = [_hold(users, limits, preferred, start) for preferred in dearer for start in (kept, nobody)]
    if found := [held for held in ways if not _missing(users, held, limits)]:
        return found
    cheap = np.where(users.is_offered, -users.cost.astype(np.float64), -np.inf)
    held = _hold(users, limits, cheap, nobody)
    if not (missing := _missing(users, held, limits)):
        return [held]
    limit, count = limits.units[missing[0]], users.usage(held, limits).counts[missing[0]]
    raise DataError(
        f"section selection: segment {limit.name} needs {limit.minimum} recipients, {count} found within "
        "budget, list size, stock and the other segments; lower its min_recipients, or raise what is short"
    )


def _hold(users: Users, limits: Limits, preferred: Floats, start: Ints) -> Ints:
    """Give users options in order of preference until the minimums are met or nobody is left who fits."""
    room = _Room(users, limits, users.usage(start, limits))
    choice = start.copy()
    best = preferred.max(1, initial=-np.inf)
    for unit, limit in enumerate(limits.units):
        if not limit.minimum:
            continue
        rows = np.flatnonzero(users.member[:, unit] & np.isfinite(best) & (choice == NONE))
        for row in rows[np.lexsort((rows, -best[rows]))]:
            if room.used[unit] >= limit.minimum:
                break
            for option in np.argsort(-preferred[row], kind="stable"):
                if preferred[row, option] > -np.inf and room.fits(row, NONE, option):
                    room.change(row, NONE, option)
                    choice[row] = option
                    break
    return choice


class _Room:
    """What is left of the limits while users change options one by one."""

    def __init__(self, users: Users, limits: Limits, used: Usage) -> None:
        self.users = users
        self.uses = limits.uses
        self.maximum = np.array([unit.maximum for unit in limits.units], np.int64)
        self.used = used.counts.copy()
        self.budget = limits.budget - used.cost

    def _delta(self, row: int, before: int, after: int) -> tuple[int, Ints]:
        cost = int(self.users.cost[row, after])
        units = self.uses[:, after].astype(np.int64)
        if before != NONE:
            cost -= int(self.users.cost[row, before])
            units = units - self.uses[:, before]
        return cost, units * self.users.member[row]

    def fits(self, row: int, before: int, after: int) -> bool:
        """Whether a user can change from one option to another; what gets no worse always fits."""
        cost, units = self._delta(row, before, after)
        is_within = (units <= 0) | (self.used + units <= self.maximum)
        return (cost <= 0 or cost <= self.budget) and bool(is_within.all())

    def change(self, row: int, before: int, after: int) -> None:
        """Book the change."""
        cost, units = self._delta(row, before, after)
        self.budget -= cost
        self.used += units


def fill(users: Users, limits: Limits, choice: Ints) -> Ints:
    """[N] choices after the changes that still fit, the best value per cost first, until none is left.

    Rule: rounds over all changes of one user to an option of higher value that fit at the start of the
        round, in order of (value per cost desc, row, option); a user changes once a round. A change that
        costs nothing comes first, the largest gain of them before the others. No user loses his mail, so a
        minimum stays met.
    """
    choice = choice.copy()
    for _ in range(MAX_FILLS):
        used = users.usage(choice, limits)
        rows, options = changes(users, limits.less(used), choice)
        room = _Room(users, limits, used)
        is_changed = False
        done: set[int] = set()
        for row, option in zip(rows.tolist(), options.tolist(), strict=True):
            if row not in done and room.fits(row, int(choice[row]), option):
                room.change(row, int(choice[row]), option)
                choice[row] = option
                done.add(row)
                is_changed = True
        if not is_changed:
            break
    return choice


def changes(users: Users, left: Limits, choice: Ints) -> tuple[Ints, Ints]:
    """Rows and options of all changes for the better that fit into what is left, in order of the fill."""
    gain, cost = _against(users.value, choice), _against(users.cost, choice)
    is_kept = users.is_offered & (gain > 0) & ((cost <= 0) | (cost <= left.budget))
    holds = users.member & left.uses.T[choice] & (choice != NONE)[:, None]
    for unit, limit in enumerate(left.units):
        if limit.maximum <= 0:
            needs = users.member[:, unit] & ~holds[:, unit]
            is_kept &= ~(needs[:, None] & left.uses[unit])
    row, option = np.nonzero(is_kept)
    free_gain = np.where(cost[row, option] <= 0, gain[row, option], 0)
    order = np.lexsort((option, row, -free_gain, -change_ratios(users, choice, row, option)))
    return row[order], option[order]


def change_ratios(users: Users, choice: Ints, row: Ints, option: Ints) -> Floats:
    """Value per cost of changes of rows to options; infinite where the change costs nothing."""
    gain = _against(users.value, choice)[row, option]
    cost = _against(users.cost, choice)[row, option]
    return np.where(cost <= 0, np.inf, gain / np.maximum(cost, 1))


def _against(amount: Ints, choice: Ints) -> Ints:
    """Each option's amount less that of the chosen option."""
    held = np.take_along_axis(amount, np.maximum(choice, 0)[:, None], 1)
    return np.asarray(amount - np.where(choice[:, None] == NONE, 0, held), np.int64)


def solve(users: Users, limits: Limits) -> tuple[Ints, Prices]:
    """[N] the option of each user, or ``NONE``, and the prices behind: all steps on one table of users.

    Without unit limits this is the greedy solution of the budget alone. With them, prices of several sweeps
    are tried on few users, and the choice worth most is kept, the earliest of equals.

    Raises:
        DataError: a segment cannot get its minimum.
    """
    found = find_prices(users, limits)
    trials = found[: NUM_TRIALS if users.value.shape[0] <= MAX_TRIAL_USERS else 1]
    choices = [fill(users, limits, choose(users, limits, prices)) for prices in trials]
    return max(choices, key=users.total_value), found[0]
