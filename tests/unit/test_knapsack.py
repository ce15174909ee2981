"""The knapsack against slow, obvious oracles: brute force, the steps by hand, the exact optimum of milp."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from knapsack_cases import random_case
from scipy.optimize import Bounds, LinearConstraint, milp

from couponflow.campaign.choice import knapsack, pricing
from couponflow.campaign.choice.pricing import Limits, UnitLimit, Users
from couponflow.errors import DataError

#: Value and cost of the options of users A, B, C, in thousandths, so that a slope is no whole number.
G25 = [[(3, 1), (4, 3)], [(2, 1), (5, 2)], [(1, 2)]]


def make_users(options: list[list[tuple[int, int]]], segments: list[list[bool]] | None = None) -> Users:
    """Users from (value, cost) per option; missing options are not offered."""
    width = max(map(len, options), default=1)
    padded = [user + [(0, 0)] * (width - len(user)) for user in options]
    table = np.array(padded, np.int64).reshape(len(options), width, 2)
    offered = np.array([[j < len(user) for j in range(width)] for user in options], bool)
    member = np.ones((len(options), 1), bool)
    if segments is not None:
        member = np.hstack([member, np.array(segments, bool)])
    return Users(table[..., 0], table[..., 1], offered.reshape(len(options), width), member)


def budget_alone(budget: int, width: int) -> Limits:
    return Limits(budget, (UnitLimit("max_recipients", "", (True,) * width),))


def check_within(users: Users, limits: Limits, choice: np.ndarray) -> None:
    used = users.usage(choice, limits)
    assert used.cost <= limits.budget
    assert all(unit.minimum <= n <= unit.maximum for n, unit in zip(used.counts, limits.units, strict=True))
    rows = np.flatnonzero(choice != pricing.NONE)
    assert users.is_offered[rows, choice[rows]].all()


def brute_force(users: Users, limits: Limits) -> int | None:
    """The best value over all choices within the limits; None where there is no such choice."""
    best = None
    for combination in product(range(-1, users.value.shape[1]), repeat=len(users.value)):
        choice = np.array(combination)
        rows = np.flatnonzero(choice != pricing.NONE)
        used = users.usage(choice, limits)
        fits = used.cost <= limits.budget and users.is_offered[rows, choice[rows]].all()
        counts = zip(used.counts, limits.units, strict=True)
        if fits and all(unit.minimum <= n <= unit.maximum for n, unit in counts):
            best = users.total_value(choice) if best is None else max(best, users.total_value(choice))
    return best


def optimum(users: Users, limits: Limits, is_whole: bool) -> float:
    """The exact optimum, at most a thousandth above it; or that of the linear relaxation."""
    num_users, num_options = users.value.shape
    one_each = np.kron(np.eye(num_users), np.ones(num_options))
    uses = [
        (users.member[:, u, None] & limits.uses[u]).reshape(-1).astype(float)
        for u in range(len(limits.units))
    ]
    rows = np.vstack([one_each, users.cost.reshape(-1), *uses])
    lower = [0.0] * num_users + [0.0] + [float(unit.minimum) for unit in limits.units]
    upper = [1.0] * num_users + [float(limits.budget)]
    upper += [float(min(unit.maximum, num_users)) for unit in limits.units]
    found = milp(
        -users.value.reshape(-1).astype(float),
        constraints=LinearConstraint(rows, lower, upper),
        integrality=np.full(users.value.size, int(is_whole)),
        bounds=Bounds(0, users.is_offered.reshape(-1).astype(float)),
        options={"mip_rel_gap": 1e-3, "time_limit": 10},
    )
    return -float(found.mip_dual_bound if is_whole else found.fun)


def by_hand(options: list[list[tuple[int, int]]], budget: int) -> tuple[list[int], int]:
    """models.md section 9, steps 1 to 3, in fractions and loops; also the value before the fill."""
    steps = []
    for row, user in enumerate(options):
        at, place = (0, 0), 0
        while True:
            ups = [
                (Fraction(v - at[0], c - at[1]) if c > at[1] else Fraction(10**9), v - at[0], -j)
                for j, (v, c) in enumerate(user)
                if v > at[0] and c >= at[1]
            ]
            if not ups:
                break
            slope, _, option = max(ups)
            steps.append((-slope, row, place, -option, user[-option][1] - at[1]))
            at, place = user[-option], place + 1
    choice, left = [-1] * len(options), budget
    for _, row, _, option, cost in sorted(steps):
        if cost > left:
            break
        choice[row], left = option, left - cost
    worth = sum(options[row][j][0] for row, j in enumerate(choice) if j >= 0)
    while True:
        held = [options[row][j] if j >= 0 else (0, 0) for row, j in enumerate(choice)]
        fits = [
            (c <= held[row][1], Fraction(v - held[row][0], max(1, c - held[row][1])), -row, -j)
            for row, user in enumerate(options)
            for j, (v, c) in enumerate(user)
            if v > held[row][0] and c - held[row][1] <= left
        ]
        if not fits:
            return choice, worth
        _, _, row, option = max(fits)
        left -= options[-row][-option][1] - held[-row][1]
        choice[-row] = -option


def test_golden_g25() -> None:
    users = make_users(G25)
    before_fill, after_fill = [], []
    for budget in range(8):
        limits = budget_alone(budget, 2)
        offered = pricing.offered(users, limits)
        choice, prices = knapsack.solve(offered, limits)
        check_within(offered, limits, choice)
        before_fill.append(offered.total_value(knapsack.choose(offered, limits, prices)))
        after_fill.append(offered.total_value(choice))
        if budget == 4:
            assert choice.tolist() == [0, 1, -1]
            assert offered.usage(choice, limits).cost == 3
    assert after_fill == [0, 3, 5, 8, 8, 9, 9, 10]
    assert before_fill == [0, 3, 3, 8, 8, 9, 9, 10]


@pytest.mark.parametrize(
    ("price", "expected"), [(0.4, [1, 1, 0]), (1.0, [0, 1, -1]), (2.0, [0, 1, -1]), (2.6, [0, -1, -1])]
)
def test_golden_g25_at_a_price(price: float, expected: list[int]) -> None:
    users, limits = make_users(G25), budget_alone(7, 2)
    reduced = pricing.reduced_values(users, limits, pricing.Prices(price, (0.0,)))
    assert np.where(reduced.max(1) > 0, reduced.argmax(1), -1).tolist() == expected


def test_the_hull_leaves_out_what_lies_below_it() -> None:
    users = make_users(G25)
    steps = pricing.hull_steps(users, np.where(users.is_offered, users.value, -np.inf))
    found = list(zip(steps.row.tolist(), steps.option.tolist(), steps.slope.tolist(), strict=True))
    assert found == [(0, 0, 3.0), (1, 1, 2.5), (0, 1, 0.5), (2, 0, 0.5)]  # B1 never; ties by row
    free = make_users([[(1, 0), (5, 0), (6, 2), (7, 4), (8, 6)]])
    steps = pricing.hull_steps(free, free.value.astype(float))
    assert (steps.option.tolist(), steps.slope.tolist()) == (
        [1, 4],
        [np.inf, 0.5],
    )  # on one line: the farthest


def test_the_budget_alone_equals_the_steps_by_hand() -> None:
    for seed in range(120):
        draw = np.random.default_rng(seed)
        options = [
            [(int(draw.integers(-2, 12)), int(draw.integers(0, 7))) for _ in range(draw.integers(1, 4))]
            for _ in range(draw.integers(1, 12))
        ]
        budget = int(draw.integers(0, 30))
        limits = budget_alone(budget, max(map(len, options)))
        users = make_users(options)
        choice, prices = knapsack.solve(users, limits)
        expected, worth = by_hand(options, budget)
        check_within(users, limits, choice)
        found = sum(options[row][j][0] for row, j in enumerate(choice) if j >= 0)
        wanted = sum(options[row][j][0] for row, j in enumerate(expected) if j >= 0)
        assert found == wanted, (seed, options, budget, choice, expected)
        first = users.total_value(knapsack.choose(users, limits, prices))
        assert first == worth, (seed, options, budget)


def test_no_choice_of_brute_force_is_much_better_and_none_is_above_the_bound() -> None:
    losses = []
    for seed in range(80):
        users, limits = random_case(seed, 4, 2, 2)
        best = brute_force(users, limits)
        if best is None:
            with pytest.raises(DataError, match=r"segment s\d needs"):
                knapsack.solve(users, limits)
            continue
        choice, prices = knapsack.solve(users, limits)
        check_within(users, limits, choice)
        assert users.total_value(choice) <= best <= pricing.dual_bound(users, limits, prices) + 1e-6
        losses.append(best - users.total_value(choice))
    assert len(losses) > 65
    assert np.mean(np.array(losses) == 0) > 0.75


def test_the_budget_alone_is_within_a_hundredth_of_the_linear_bound() -> None:
    for seed in range(6):
        users, limits = random_case(seed, 400)
        limits = budget_alone(limits.budget, 4)
        users = Users(users.value, users.cost, users.cost <= limits.budget, users.member[:, :1])
        choice, prices = knapsack.solve(users, limits)
        check_within(users, limits, choice)
        relaxed = optimum(users, limits, is_whole=False)
        assert users.total_value(choice) >= 0.99 * relaxed
        assert pricing.dual_bound(users, limits, prices) == pytest.approx(relaxed, rel=1e-6)  # Dantzig: exact


def test_all_limits_together_stay_near_the_optimum() -> None:
    for seed in range(4):
        users, limits = random_case(seed, 150)
        choice, prices = knapsack.solve(users, limits)
        check_within(users, limits, choice)
        best = optimum(users, limits, is_whole=True)
        assert users.total_value(choice) >= 0.97 * best
        assert pricing.dual_bound(users, limits, prices) >= best * (1 - 1e-3)


def test_no_limit_is_exceeded_in_many_cases() -> None:
    solved = 0
    for seed in range(1000, 1060):
        users, limits = random_case(seed, 10 + seed % 60, 1 + seed % 5, seed % 3)
        try:
            choice, _ = knapsack.solve(users, limits)
        except DataError:
            continue
        check_within(users, limits, choice)
        solved += 1
    assert solved > 50


def test_a_coupon_without_stock_and_a_budget_of_nothing() -> None:
    options = [[(9, 1), (5, 1)]] * 3
    users = make_users(options)
    member = np.ones((3, 3), bool)
    units = (
        UnitLimit("max_recipients", "", (True, True), 2),
        UnitLimit("stock", "a", (True, False), 0),
        UnitLimit("stock", "b", (False, True), 3),
    )
    users = Users(users.value, users.cost, users.is_offered, member)
    limits = Limits(10, units)
    choice, prices = knapsack.solve(pricing.offered(users, limits), limits)
    assert choice.tolist() == [1, 1, -1]  # never the better coupon; the first of equals
    assert pricing.barriers(users, limits, prices).tolist()[2] == "max_recipients"
    only_a = Users(users.value, users.cost, np.array([[True, False]] * 3), member)
    assert set(pricing.barriers(only_a, limits, prices)) == {"stock"}
    nothing = Limits(0, units)
    choice, prices = knapsack.solve(pricing.offered(users, nothing), nothing)
    assert choice.tolist() == [-1] * 3
    assert set(pricing.barriers(users, nothing, prices)) == {"budget"}


def test_a_minimum_pays_for_users_who_are_worth_less_than_a_mail() -> None:
    users = make_users([[(-5, 2)], [(-1, 2)], [(8, 2)]], [[True], [True], [False]])
    units = (UnitLimit("max_recipients", "", (True,), 2), UnitLimit("segment_max", "vip", (True,), 5, 1))
    choice, prices = knapsack.solve(users, Limits(4, units))
    assert choice.tolist() == [-1, 0, 0]
    assert prices.units[1] < 0
    with pytest.raises(DataError, match=r"segment vip needs 2 recipients, 1 found within budget"):
        knapsack.solve(users, Limits(3, (units[0], UnitLimit("segment_max", "vip", (True,), 5, 2))))


def test_sizes_of_nothing() -> None:
    users, limits = make_users([]), budget_alone(5, 1)
    choice, prices = knapsack.solve(users, limits)
    assert (choice.size, prices.budget, pricing.dual_bound(users, limits, prices)) == (0, 0.0, 0.0)


def test_sums_beyond_a_bigint_fit_nothing() -> None:
    limits = budget_alone(10**18, 1)
    users = make_users([[(10**18, 10**18)]] * 40)
    choice, _ = knapsack.solve(users, limits)
    assert choice.tolist() == [0] + [-1] * 39
