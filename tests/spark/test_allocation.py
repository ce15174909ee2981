"""The choice over partitions equals that of one table, or stays as near the bound, within every limit."""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from knapsack_cases import random_case
from pyspark.sql import DataFrame, SparkSession

from couponflow.campaign.choice import allocation, assignment, knapsack, pricing
from couponflow.campaign.choice.pricing import Limits, Users
from couponflow.errors import DataError
from couponflow.lake import literals

USERS = 700


@dataclass(frozen=True)
class Case:
    """Users in tie order with their ids, and what limits them."""

    user_ids: list[str]
    users: Users
    limits: Limits


def make_case(seed: int, is_budget_alone: bool = False) -> Case:
    users, limits = random_case(seed, USERS)
    if is_budget_alone:
        only_list = (pricing.UnitLimit("max_recipients", "", (True,) * 4),)
        limits = Limits(limits.budget, only_list)
        users = Users(users.value, users.cost, users.cost <= limits.budget, users.member[:, :1])
    user_ids = sorted((f"u{n}" for n in range(USERS)), key=partial(assignment.tie_key, "18"))
    return Case(user_ids, users, limits)


def frame_of(spark: SparkSession, case: Case, seed: int, partitions: int) -> DataFrame:
    """The columns of ``options.option_columns``, rows in an order of their own."""
    users, is_segment = case.users, [unit.kind == "segment_max" for unit in case.limits.units]
    offered = (users.is_offered * (1 << np.arange(users.value.shape[1]))).sum(1)
    segments = (users.member[:, is_segment] * (1 << np.arange(sum(is_segment)))).sum(1)
    rows = [
        (
            user_id,
            assignment.tie_key("18", user_id),
            *users.value[row].tolist(),
            *users.cost[row].tolist(),
            int(offered[row]),
            int(segments[row]),
        )
        for row, user_id in enumerate(case.user_ids)
    ]
    random.Random(seed).shuffle(rows)
    options = range(users.value.shape[1])
    names = [*(f"value_{j}" for j in options), *(f"cost_{j}" for j in options), "offered", "segments"]
    schema = ", ".join(["user_id string", "tie string", *(f"{name} bigint" for name in names)])
    return literals.frame(spark, rows, schema).repartition(partitions)


def choice_of(case: Case, allocated: allocation.Allocation) -> tuple[np.ndarray, list[str | None]]:
    rows = {row.user_id: row for row in allocated.choices.collect()}
    assert len(rows) == USERS
    found = np.array([rows[user_id].option for user_id in case.user_ids])
    reasons = [rows[user_id].reason for user_id in case.user_ids]
    assert [reason is None for reason in reasons] == (found != pricing.NONE).tolist()
    used = case.users.usage(found, case.limits)
    assert used.cost <= case.limits.budget
    limited = zip(used.counts, case.limits.units, strict=True)
    assert all(unit.minimum <= count <= unit.maximum for count, unit in limited)
    assert allocated.value == case.users.total_value(found) <= allocated.bound
    return found, reasons


def test_with_the_budget_alone_a_core_gives_the_choice_of_one_table(spark: SparkSession) -> None:
    case = make_case(3, is_budget_alone=True)  # with ties
    expected, prices = knapsack.solve(case.users, case.limits)
    barred = pricing.barriers(case.users, case.limits, prices)
    allocated = allocation.allocate(frame_of(spark, case, 3, 3), case.limits, core_users=60)
    found, reasons = choice_of(case, allocated)
    assert found.tolist() == expected.tolist()
    assert allocated.prices == prices
    assert prices.budget > 0
    assert reasons == [barred[row] if option == pricing.NONE else None for row, option in enumerate(expected)]


def test_one_task_gives_the_choice_of_one_table_whatever_the_order(spark: SparkSession) -> None:
    case = make_case(5)
    expected, prices = knapsack.solve(case.users, case.limits)
    allocated = allocation.allocate(frame_of(spark, case, 1, 3), case.limits)
    found, _ = choice_of(case, allocated)
    assert found.tolist() == expected.tolist()
    assert allocated.prices == prices


def test_a_core_stays_within_all_limits_and_near_the_bound(spark: SparkSession) -> None:
    case = make_case(7)
    found = []
    for partitions in (2, 3):
        frame = frame_of(spark, case, partitions, partitions)
        allocated = allocation.allocate(frame, case.limits, core_users=200)
        choice, reasons = choice_of(case, allocated)
        found.append((choice.tolist(), reasons, allocated.prices, allocated.value, allocated.bound))
        assert allocated.value >= 0.97 * allocated.bound
    assert found[0] == found[1]


def test_a_minimum_that_nobody_can_meet_names_its_segment(spark: SparkSession) -> None:
    case = make_case(5)
    units = list(case.limits.units)
    size = int(case.users.member[:, -1].sum())
    units[-1] = pricing.UnitLimit("segment_max", "s1", (True,) * 4, minimum=size + 1)
    limits = Limits(case.limits.budget, tuple(units))
    with pytest.raises(DataError, match=rf"segment s1 needs {size + 1} recipients, \d+ found"):
        allocation.allocate(frame_of(spark, case, 1, 2), limits, core_users=200)
