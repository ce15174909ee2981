"""Whom a campaign reaches: how often users of one group are selected, against all eligible users.

Groups are the values of the attributes named in ``selection.reach_attributes``, and of ``history``, which
every score tells: with events, or a cold start. They are counted on the cluster. What leaves it are counts
and sums of at least ``MIN_USERS`` eligible users each, never a user, nor a value that fewer share: smaller
groups, and those beyond ``MAX_GROUPS``, are told as one.

The share of a group over that of all eligible users has a 95 % interval as if they were a sample of such
users: Wilson intervals of the group and of the rest, combined (``intervals.ratio_to_whole``). A ratio away
from 1 is no wrong by itself; the mean probability beside it says how far the scores explain it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from couponflow.campaign import eligibility
from couponflow.campaign.choice import assignment, options
from couponflow.campaign.readouts import intervals
from couponflow.campaigning import SelectionConfig
from couponflow.errors import DataError

MIN_USERS = 30
MAX_GROUPS = 20
HISTORY, UNKNOWN, SMALLER = "history", "unknown", "smaller groups"
WITH_EVENTS, COLD_START = "with events", "cold start"
_NANO = 1_000_000_000  # probabilities are summed in these units, so that sums are order-free
_MAX_NAME = 64  # characters of a value that are told; values that are equal so far are one group
_SHOWN_KEYS = 20


@dataclass(frozen=True)
class Group:
    """Users of one value of an attribute; ``name`` None: the pool of smaller ones.

    ``probability_nano``: sum of the eligible users' probabilities in billionths, before any coupon's scale.
    """

    name: str | None
    eligible_users: int = 0
    selected_users: int = 0
    mailed_users: int = 0
    probability_nano: int = 0

    def __add__(self, other: "Group") -> "Group":
        """Both as one, under the name of the first."""
        return Group(
            self.name,
            self.eligible_users + other.eligible_users,
            self.selected_users + other.selected_users,
            self.mailed_users + other.mailed_users,
            self.probability_nano + other.probability_nano,
        )


def check_attributes(users: DataFrame, section: SelectionConfig) -> None:
    """Make sure that somebody of the user master has each attribute of the config.

    Cost: a pass over the master where attributes are named.

    Raises:
        DataError: nobody has one of them.
    """
    names = section.reach_attributes
    if not names:
        return
    counts = [F.count(F.col("attributes").getItem(name)).alias(f"n{n}") for n, name in enumerate(names)]
    found = users.agg(*counts).collect()[0]
    for place, name in enumerate(names):
        if not found[place]:
            keys = users.select(F.explode(F.map_keys("attributes")).alias("key")).distinct()
            known = sorted(row.key for row in keys.orderBy("key").limit(_SHOWN_KEYS).collect())
            raise DataError(
                f"table users: nobody in the newest snapshot has the attribute {name}, which "
                f"selection.reach_attributes names; it knows {', '.join(known) or 'no attribute at all'}. "
                "Correct the name, or check the delivery and run clean_feeds again"
            )


def with_groups(users: DataFrame, section: SelectionConfig) -> DataFrame:
    """Add the group of each user by attribute, and the probability that he is scored with.

    Grain: one row per ``user_id``, as given; needs ``attributes``, ``is_cold_start`` and
        ``conversion_probability``.
    Adds: ``reach_<n>`` text, in the order of ``reach_attributes`` with history last, and
        ``reach_probability``, which no coupon changes. Drops ``is_cold_start`` and, where no segment could
        ask for them, ``attributes``, so that they are not carried through the choice.
    Rule: the value, trimmed and cut to 64 characters; an absent or empty one, and no score, is unknown.
    """
    columns: dict[str, Column] = {}
    for place, name in enumerate(section.reach_attributes):
        value = F.substring(F.trim(F.col("attributes").getItem(name)), 1, _MAX_NAME)
        columns[_column(place)] = F.when(value != "", value).otherwise(UNKNOWN)
    columns[_column(len(section.reach_attributes))] = (
        F.when(F.col("is_cold_start"), COLD_START)
        .when(~F.col("is_cold_start"), WITH_EVENTS)
        .otherwise(UNKNOWN)
    )
    grouped = users.withColumns(columns | {"reach_probability": F.col("conversion_probability")})
    return grouped.drop("is_cold_start", *(() if section.segments else ("attributes",)))


def summarise(decided: DataFrame, section: SelectionConfig) -> dict[str, Any]:
    """The facts of reach: all eligible users, and per attribute the groups with their ratio to them.

    ``decided``: users with ``reason``, ``arm`` and the columns of ``with_groups``. Selected users are those
    of the arms treat, control and holdout; mailed ones treat and explore.
    """
    return told(_count(decided, section))


def _count(decided: DataFrame, section: SelectionConfig) -> dict[str, list[Group]]:
    """The groups of each attribute: at most ``MAX_GROUPS`` by name, the others as one.

    Cost: one pass over the eligible users; each counts once per attribute. A value for each user is safe:
    only rows of groups meet, and what is collected is at most ``MAX_GROUPS`` + 1 per attribute.
    """
    attributes = (*section.reach_attributes, HISTORY)
    group = F.explode(
        F.array(
            *[
                F.struct(F.lit(place).alias("place"), F.col(_column(place)).alias("name"))
                for place, _ in enumerate(attributes)
            ]
        )
    )
    sizes = {
        "eligible_users": F.count(F.lit(1)),
        "selected_users": F.count_if(
            F.col("arm").isin(assignment.TREAT, assignment.CONTROL, assignment.HOLDOUT)
        ),
        "mailed_users": F.count_if(F.col("arm").isin(*assignment.MAILED)),
        "probability_nano": F.sum(options.times(F.col("reach_probability"), _NANO)),
    }
    counts = (
        decided.where(~F.col("reason").isin(*eligibility.REASONS))
        .select(group.alias("of"), "arm", "reach_probability")
        .groupBy("of.place", "of.name")
        .agg(*[size.alias(name) for name, size in sizes.items()])
    )
    by_size = Window.partitionBy("place").orderBy(F.desc("eligible_users"), "name")
    is_named = (F.col("eligible_users") >= MIN_USERS) & (F.col("rank") <= MAX_GROUPS)
    pooled_rows = (
        counts.withColumn("rank", F.row_number().over(by_size))
        .withColumn("name", F.when(is_named, F.col("name")))
        .groupBy("place", "name")
        .agg(*[F.sum(name).alias(name) for name in sizes])
    )
    found: dict[str, list[Group]] = {name: [] for name in attributes}
    for row in pooled_rows.collect():
        found[attributes[row.place]].append(Group(row["name"], *(int(row[name]) for name in sizes)))
    return found


def pooled(groups: Sequence[Group]) -> list[Group]:
    """The groups as they may be told: the largest first, at most ``MAX_GROUPS``, the pool at the end.

    None has fewer than ``MIN_USERS`` eligible users. A pool that would have takes the next smallest group
    with it, as its members could be told from the rest otherwise; fewer users than that in all give nothing.
    """
    named = sorted(
        (group for group in groups if group.name is not None),
        key=lambda group: (-group.eligible_users, group.name or ""),
    )
    pool = sum((group for group in groups if group.name is None), Group(None))
    while named and (
        len(named) + (pool.eligible_users > 0) > MAX_GROUPS
        or named[-1].eligible_users < MIN_USERS
        or 0 < pool.eligible_users < MIN_USERS
    ):
        pool += named.pop()
    return [*named, pool] if pool.eligible_users >= MIN_USERS else named


def told(counted: Mapping[str, Sequence[Group]]) -> dict[str, Any]:
    """The groups of each attribute as facts; the counts are users, shares and ratios 0 or more.

    A share of nobody, and a ratio to a share of 0, is None.
    """
    whole = sum(counted[HISTORY], Group(None))
    return {
        "eligible_users": whole.eligible_users,
        "selected_users": whole.selected_users,
        "mailed_users": whole.mailed_users,
        "selected_share": _over(whole.selected_users, whole.eligible_users),
        "mean_probability": _over(whole.probability_nano / _NANO, whole.eligible_users),
        "groups": [
            _row(attribute, group, whole) for attribute, groups in counted.items() for group in pooled(groups)
        ],
    }


def _row(attribute: str, group: Group, whole: Group) -> dict[str, Any]:
    ratio, ends = intervals.ratio_to_whole(
        group.selected_users, group.eligible_users, whole.selected_users, whole.eligible_users
    )
    is_known = whole.selected_users > 0
    return {
        "attribute": attribute,
        "group": SMALLER if group.name is None else group.name,
        "eligible_users": group.eligible_users,
        "selected_users": group.selected_users,
        "mailed_users": group.mailed_users,
        "selected_share": _over(group.selected_users, group.eligible_users),
        "mean_probability": _over(group.probability_nano / _NANO, group.eligible_users),
        "ratio": ratio if is_known else None,
        "ratio_interval": list(ends) if is_known else None,
    }


def _over(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _column(place: int) -> str:
    return f"reach_{place}"
