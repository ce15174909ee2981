"""The knapsack over users in many partitions: the same choice, however they are spread.

Up to ``CORE_USERS`` users are solved in one task. Of more, only those whose choice is not plain are: prices
come from a sample (the users of lowest tie key) and, for the budget, from a histogram of hull slopes over all
users; whoever is far from changing his option at these prices keeps it. The rest, the core, shares what is
left of the limits. With the budget alone the core is the bucket of slopes that holds the price, and the
choice equals that of one task exactly. The driver sees histograms of some thousand rows and no user.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign.choice import knapsack, option_tables, pricing
from couponflow.campaign.choice.pricing import NO_LIMIT, Bools, Floats, Ints, Limits, Prices, Usage, Users
from couponflow.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

CORE_USERS = 100_000
MAX_FILL_ROUNDS = 4
_CORE_GROWTH = 4
_SLOPES_PER_E = 256  # buckets per factor e of slope
_MARGINS_PER_OCTAVE = 16
_FREE = 1 << 30  # bucket of an infinite slope
_NO_MARGIN = -(1 << 20)


@dataclass(frozen=True)
class Allocation:
    """A choice for each user, and what it is worth.

    ``choices``: one row per user with ``option`` (-1 = none) and ``reason`` (why none; null for a holder).
    ``value`` and ``bound`` in the unit of the values: what was reached, and what nobody can exceed under
    the ``limits``.
    """

    choices: DataFrame
    limits: Limits
    prices: Prices
    value: int
    bound: int


def allocate(options: DataFrame, limits: Limits, core_users: int = CORE_USERS) -> Allocation:
    """Choose one option or none for every user, within all limits.

    Grain: one row per ``user_id``; columns as ``options.option_columns`` gives them. The result is a pure
        function of the rows, not of their order or partitions.
    Cost: up to ``core_users`` users one task; else about six passes over the options, which are kept in
        memory or on disk meanwhile, and one sort of the core.

    Raises:
        DataError: a segment cannot get its minimum.
    """
    kept = options.localCheckpoint()
    num_users = kept.count()
    if num_users <= core_users:
        return _solved(kept, limits)
    return _spread(kept, limits, num_users, core_users)


def _solved(kept: DataFrame, limits: Limits) -> Allocation:
    """All users in one task."""

    def work(table: "pa.Table") -> "pa.Table":
        everyone = option_tables.users_of(table, limits)
        users = pricing.offered(everyone, limits)
        try:
            choice, prices = knapsack.solve(users, limits)
        except DataError as error:
            return option_tables.choice_rows(facts={"error": str(error)})
        facts = _facts(users, limits, choice, prices) | {"bound": _bound(users, limits, prices)}
        return option_tables.choice_rows(table, choice, _reasons(everyone, limits, prices, choice), facts)

    rows, facts = option_tables.in_one_task(kept, work)
    return Allocation(rows, limits, _prices(facts), facts["value"], facts["bound"])


def _spread(kept: DataFrame, limits: Limits, num_users: int, core_users: int) -> Allocation:
    """Prices from a sample and a histogram, plain users at once, the core in one task, then the fill."""
    units = _sampled_prices(kept, limits, num_users, core_users).units
    bucket = _budget_bucket(kept, limits, units)
    slope = 0.0 if bucket is None else float(np.exp((bucket + 0.5) / _SLOPES_PER_E))
    screen = _Screen(limits, Prices(slope, units), bucket)
    groups = _by_margin(kept, screen)
    most = core_users
    last = _last_of_core(groups, limits, most)
    core, facts = _core(kept, screen, last, groups)
    while "error" in facts:  # a minimum needs users whose choice seemed plain
        most *= _CORE_GROWTH
        last = _last_of_core(groups, limits, most)
        core, facts = _core(kept, screen, last, groups)
    prices = _prices(facts) if limits.is_budget_alone else screen.prices
    plain = [group for group in groups if group["key"] > last]
    used = _sum(_usage(plain, limits), facts)
    value = sum(int(group["value"]) for group in plain) + facts["value"]
    state = _overridden(_with_plain_option(kept, screen), core)
    for _ in range(MAX_FILL_ROUNDS):
        changed, facts = _filled(state, limits, used, core_users)
        used, value = _sum(used, facts), value + facts["value"]
        state = _overridden(state, changed)
        if facts["num_users"] < core_users:
            break
    bound = sum(int(group["best"]) for group in groups)
    bound += int(np.ceil(pricing.limits_worth(limits, screen.prices)))
    return Allocation(_with_reason(state, limits, prices), limits, prices, value, bound)


@dataclass(frozen=True)
class _Screen:
    """What tells plain users from the core: prices, and the bucket of slopes with that of the budget."""

    limits: Limits
    prices: Prices
    bucket: int | None

    def options(self, users: Users) -> Ints:
        """[N] the option of highest reduced value, or none."""
        reduced = pricing.reduced_values(users, self.limits, self.prices)
        return np.where(reduced.max(1) > 0, reduced.argmax(1), pricing.NONE)

    def margins(self, users: Users) -> Ints:
        """[N] how far a user is from another option: the core has the lowest.

        With the budget alone 0 for a user with a slope in the bucket of its price, else 1. With unit limits
        the logarithm of what the best option is worth more than the next.
        """
        if self.limits.is_budget_alone:
            steps = _steps(users, self.limits, self.prices.units)
            margin = np.ones(users.value.shape[0], np.int64)
            if self.bucket is not None:
                margin[steps.row[_buckets(steps.slope) == self.bucket]] = 0
            return margin
        reduced = pricing.reduced_values(users, self.limits, self.prices)
        worths = np.sort(np.hstack([reduced, np.zeros((len(reduced), 1))]), 1)
        ahead = worths[:, -1] - worths[:, -2]
        is_tied = ~(ahead > 0)
        ahead = np.minimum(np.where(is_tied, 1.0, ahead), float(NO_LIMIT))
        key = np.floor(np.log2(ahead) * _MARGINS_PER_OCTAVE).astype(np.int64)
        return np.where(is_tied, _NO_MARGIN, key)


def _sampled_prices(kept: DataFrame, limits: Limits, num_users: int, core_users: int) -> Prices:
    """Prices of the unit limits at the users of lowest tie key, with limits cut down to their share."""
    if limits.is_budget_alone:
        return Prices(0.0, (0.0,) * len(limits.units))
    share = core_users / num_users
    units = [
        replace(
            unit,
            maximum=unit.maximum if unit.maximum >= NO_LIMIT else int(unit.maximum * share),
            minimum=int(unit.minimum * share),
        )
        for unit in limits.units
    ]
    cut = Limits(int(limits.budget * share), tuple(units))

    def work(table: "pa.Table") -> "pa.Table":
        users = _users(table, limits)
        prices = pricing.find_prices(users, cut)[0]
        return option_tables.choice_rows(facts={"budget": prices.budget, "units": prices.units})

    below = f"{min(int(share * 2**64), 2**64 - 1):016x}"
    _, facts = option_tables.in_one_task(kept.where(F.col("tie") < below), work)
    return _prices(facts)


def _budget_bucket(kept: DataFrame, limits: Limits, units: tuple[float, ...]) -> int | None:
    """The bucket of hull slopes in which the budget runs out; None where it never does."""

    def work(users: Users) -> dict[str, Ints]:
        steps = _steps(users, limits, units)
        return {"key": _buckets(steps.slope), "cost": steps.cost}

    spent = 0
    for group in reversed(option_tables.grouped_sums(kept, limits, work, ("cost",))):
        spent += int(group["cost"])
        if spent > limits.budget:
            return int(group["key"])
    return None


def _by_margin(kept: DataFrame, screen: _Screen) -> list[dict[str, Any]]:
    """Per margin, ascending: users, and what their plain options cost, use and are worth."""
    names = ("num_users", "cost", "value", "best", *_use_names(screen.limits))

    def work(users: Users) -> dict[str, Ints]:
        choice = screen.options(users)
        held = np.maximum(choice, 0)[:, None]
        is_held = choice != pricing.NONE
        best = np.ceil(pricing.reduced_values(users, screen.limits, screen.prices).max(1))
        uses = users.member & screen.limits.uses.T[choice] & is_held[:, None]
        sums = {
            "key": screen.margins(users),
            "num_users": np.ones(choice.size, np.int64),
            "cost": np.where(is_held, np.take_along_axis(users.cost, held, 1)[:, 0], 0),
            "value": np.where(is_held, np.take_along_axis(users.value, held, 1)[:, 0], 0),
            "best": np.maximum(best, 0).astype(np.int64),
        }
        return sums | {
            name: uses[:, place].astype(np.int64) for place, name in enumerate(_use_names(screen.limits))
        }

    return option_tables.grouped_sums(kept, screen.limits, work, names)


def _last_of_core(groups: list[dict[str, Any]], limits: Limits, core_users: int) -> int:
    """The largest margin of the core: as many users as it may have; more if plain ones exceed a limit."""
    last, num_users = groups[0]["key"] - 1, 0
    for place, group in enumerate(groups):
        left = limits.less(_usage(groups[place:], limits))
        fits = left.budget >= 0 and all(unit.maximum >= 0 for unit in left.units)
        num_users += int(group["num_users"])
        wanted = group["key"] <= 0 if limits.is_budget_alone else num_users <= core_users
        if fits and not wanted:
            break
        last = group["key"]
    return int(last)


def _core(
    kept: DataFrame, screen: _Screen, last: int, groups: list[dict[str, Any]]
) -> tuple[DataFrame, dict[str, Any]]:
    """The options of the users up to a margin, from what the others leave of the limits.

    Raises:
        DataError: a segment cannot get its minimum from all users.
    """
    limits = screen.limits
    left = limits.less(_usage([group for group in groups if group["key"] > last], limits))

    def is_core(users: Users) -> Bools:
        return np.asarray(screen.margins(users) <= last)

    def work(table: "pa.Table") -> "pa.Table":
        users = _users(table, limits)
        try:
            if limits.is_budget_alone:  # the fill comes last, over all users
                prices = pricing.find_prices(users, left)[0]
                choice = knapsack.choose(users, left, prices)
            else:
                choice, prices = knapsack.solve(users, left)
        except DataError as error:
            return option_tables.choice_rows(facts={"error": str(error)})
        return option_tables.choice_rows(table, choice, None, _facts(users, limits, choice, prices))

    is_whole = last >= groups[-1]["key"]
    return option_tables.in_one_task(option_tables.where(kept, limits, is_core), work, is_whole)


def _filled(state: DataFrame, limits: Limits, used: Usage, most: int) -> tuple[DataFrame, dict[str, Any]]:
    """The changes of a fill among the ``most`` users who have the best of them, and what they take."""
    left = limits.less(used)

    def ratios(table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        users, choice = (
            _users(table, limits),
            option_tables.options_of(table),
        )
        rows, options = knapsack.changes(users, left, choice)
        ratio = knapsack.change_ratios(users, choice, rows, options)
        best, first = np.unique(rows, return_index=True)
        return table.take(pa.array(best)).append_column("ratio", pa.array(ratio[first]))

    def work(table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        users, before = (
            _users(table, limits),
            option_tables.options_of(table),
        )
        mine = users.usage(before, limits)
        whole = limits.less(Usage(used.cost - mine.cost, used.counts - mine.counts))
        choice = knapsack.fill(users, whole, before)
        after = users.usage(choice, limits)
        facts = {
            "cost": after.cost - mine.cost,
            "counts": (after.counts - mine.counts).tolist(),
            "value": users.total_value(choice) - users.total_value(before),
            "num_users": len(before),
        }
        changed = np.flatnonzero(choice != before)
        return option_tables.choice_rows(table.take(pa.array(changed)), choice[changed], None, facts)

    best = option_tables.mapped(state, ratios, f"{option_tables.schema_of(state)}, ratio double")
    return option_tables.in_one_task(best.orderBy(F.desc("ratio"), "tie", "user_id").limit(most), work)


def _with_plain_option(kept: DataFrame, screen: _Screen) -> DataFrame:
    """Add ``option`` as the prices alone have it."""

    def work(table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        choice = screen.options(_users(table, screen.limits))
        return table.append_column("option", pa.array(choice.astype(np.int32)))

    return option_tables.mapped(kept, work, f"{option_tables.schema_of(kept)}, option int")


def _overridden(state: DataFrame, changed: DataFrame) -> DataFrame:
    """The state with the options of some users replaced."""
    new = changed.select("user_id", F.col("option").alias("new_option"))
    option = F.coalesce("new_option", "option").alias("option")
    columns = [name for name in state.columns if name != "option"]
    return state.join(F.broadcast(new), "user_id", "left").select(*columns, option)


def _with_reason(state: DataFrame, limits: Limits, prices: Prices) -> DataFrame:
    """User, option and reason of each row of the state."""

    def work(table: "pa.Table") -> "pa.Table":
        choice, everyone = option_tables.options_of(table), option_tables.users_of(table, limits)
        return option_tables.choice_rows(table, choice, _reasons(everyone, limits, prices, choice))

    return option_tables.mapped(state, work, option_tables.CHOICES).drop("facts")


def _steps(users: Users, limits: Limits, units: tuple[float, ...]) -> pricing.Steps:
    return pricing.hull_steps(users, pricing.after_unit_prices(users, limits, Prices(0.0, units)))


def _buckets(slope: Floats) -> Ints:
    """A coarse number that never falls when the slope grows."""
    is_free = np.isinf(slope)
    key = np.floor(np.log(np.where(is_free, 1.0, slope)) * _SLOPES_PER_E).astype(np.int64)
    return np.where(is_free, _FREE, key)


def _users(table: "pa.Table", limits: Limits) -> Users:
    """The users of a table without the options that nobody can hold."""
    return pricing.offered(option_tables.users_of(table, limits), limits)


def _reasons(users: Users, limits: Limits, prices: Prices, choice: Ints) -> list[str | None]:
    barred = pricing.barriers(users, limits, prices)
    return [str(why) if option == pricing.NONE else None for option, why in zip(choice, barred, strict=True)]


def _bound(users: Users, limits: Limits, prices: Prices) -> int:
    return int(np.ceil(pricing.dual_bound(users, limits, prices)))


def _facts(users: Users, limits: Limits, choice: Ints, prices: Prices) -> dict[str, Any]:
    used = users.usage(choice, limits)
    return {
        "budget": prices.budget,
        "units": prices.units,
        "cost": used.cost,
        "counts": used.counts.tolist(),
        "value": users.total_value(choice),
    }


def _prices(facts: dict[str, Any]) -> Prices:
    return Prices(facts["budget"], tuple(facts["units"]))


def _use_names(limits: Limits) -> tuple[str, ...]:
    return tuple(f"use_{place}" for place in range(len(limits.units)))


def _usage(groups: list[dict[str, Any]], limits: Limits) -> Usage:
    counts = [sum(int(group[name]) for group in groups) for name in _use_names(limits)]
    return Usage(sum(int(group["cost"]) for group in groups), np.array(counts, np.int64))


def _sum(used: Usage, facts: dict[str, Any]) -> Usage:
    return Usage(used.cost + facts["cost"], used.counts + np.array(facts["counts"], np.int64))
