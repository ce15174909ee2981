"""Groups of reach equal a plain-Python oracle, and the job records them without changing its choice."""

import random
from collections import defaultdict
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import DataFrame, SparkSession

from couponflow.campaign import eligibility, reach
from couponflow.campaign.choice import assignment
from couponflow.campaigning import SegmentLimit, SelectionConfig
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import Run, record_run
from couponflow.errors import DataError
from couponflow.lake import literals, tables
from jobs import select_audience

COLUMNS = (
    "user_id string, attributes map<string,string>, is_cold_start boolean, conversion_probability double, "
    "reason string"
)
SECTION = SelectionConfig(reach_attributes=("age", "post code"))
ARMS = (*assignment.ARMS, "none", "none")
Person = tuple[str, dict[str, str] | None, bool | None, float | None, str | None, str]


def random_people(seed: int, size: int) -> list[Person]:
    """Ages from many users to few, some blank; a post code of nearly everybody's own; some excluded."""
    draw = random.Random(seed)
    ages = [f"age {n}" for n in range(30) for _ in range(1 + 3 * n)]
    people: list[Person] = []
    for number in range(size):
        age = draw.choice([*ages, "", "  ", " age 29 ", "x" * 70, "x" * 64 + "y"])
        attributes = draw.choice([None, {}, *[{"age": age, "post code": f"{number // 2}"}] * 6])
        is_cold = draw.choice([True, False, False, None])
        reason = draw.choice([None] * 8 + ["bounce", "no_prediction"])
        p = None if reason == "no_prediction" else draw.choice([0.0, 1.0, 0.25, draw.random()])
        arm = draw.choice(ARMS) if reason is None else "none"
        people.append((f"ü{number}", attributes, is_cold, p, reason, arm))
    return people


def oracle(people: list[Person]) -> dict[str, Any]:
    """Each eligible user once per attribute, one after the other."""
    counted: dict[str, dict[str, list[int]]] = {
        name: defaultdict(lambda: [0] * 4) for name in ("age", "post code")
    }
    counted[reach.HISTORY] = defaultdict(lambda: [0] * 4)
    for _, attributes, is_cold, p, reason, arm in people:
        if reason is not None:
            continue
        history = {True: "cold start", False: "with events", None: "unknown"}[is_cold]
        values = {
            name: (attributes or {}).get(name, "").strip()[:64] or "unknown"
            for name in SECTION.reach_attributes
        }
        for name, value in (values | {reach.HISTORY: history}).items():
            sizes = counted[name][value]
            sizes[0] += 1
            sizes[1] += arm in ("treat", "control", "holdout")
            sizes[2] += arm in ("treat", "explore")
            sizes[3] += int((p or 0.0) * 1e9 + 0.5)
    groups = {
        name: [reach.Group(value, *sizes) for value, sizes in found.items()]
        for name, found in counted.items()
    }
    return reach.told(groups)


def frame_of(spark: SparkSession, people: list[Person], section: SelectionConfig, seed: int) -> DataFrame:
    """The people as the selection leaves them: in groups, with an arm and a reason each."""
    shuffled = random.Random(seed).sample(people, len(people))
    users = literals.frame(spark, [person[:5] for person in shuffled], COLUMNS).repartition(1 + seed)
    arms = literals.frame(
        spark, [(p[0], p[5], p[4] or "value") for p in people], "user_id string, arm string, reason string"
    )
    return reach.with_groups(users, section).drop("reason").join(arms, "user_id")


@pytest.mark.parametrize("size", [0, 1, 29, 60, 4_000])
def test_groups_equal_the_oracle(spark: SparkSession, size: int) -> None:
    people = random_people(size, size)
    expected = oracle(people)
    for seed in (1, 2):
        assert reach.summarise(frame_of(spark, people, SECTION, seed), SECTION) == expected
    rows = expected["groups"]
    assert all(row["eligible_users"] >= reach.MIN_USERS for row in rows)
    by_name = {row["group"]: row for row in rows if row["attribute"] == "age"}
    if size == 4_000:
        assert len(by_name) == reach.MAX_GROUPS
        assert {reach.SMALLER, reach.UNKNOWN, "age 29"} <= set(by_name)
        codes = [row["group"] for row in rows if row["attribute"] == "post code"]
        assert codes == [reach.SMALLER, reach.UNKNOWN] or codes == [reach.UNKNOWN, reach.SMALLER]
        for name in (*SECTION.reach_attributes, reach.HISTORY):
            total = sum(row["eligible_users"] for row in rows if row["attribute"] == name)
            assert total == expected["eligible_users"]
    elif size < reach.MIN_USERS:
        assert rows == []


def test_attributes_are_carried_only_where_a_segment_may_ask_for_them(spark: SparkSession) -> None:
    users = literals.frame(spark, [("u", {"age": "7"}, False, 0.5, None)], COLUMNS)
    found = reach.with_groups(users, SECTION)
    assert found.columns == [
        "user_id", "conversion_probability", "reason", "reach_0", "reach_1", "reach_2", "reach_probability",
    ]  # fmt: skip
    asked = SECTION.model_copy(
        update={"segments": (SegmentLimit(name="s", where="attributes['age'] = '7'"),)}
    )
    assert "attributes" in reach.with_groups(users, asked).columns


def test_an_attribute_that_nobody_has_stops_and_says_what_there_is(spark: SparkSession) -> None:
    rows = [("u1", {"age": "7", "tier": "2"}, False, 0.5, None), ("u2", None, False, 0.5, None)]
    users = literals.frame(spark, rows, COLUMNS)
    reach.check_attributes(users, SelectionConfig())
    reach.check_attributes(users, SelectionConfig(reach_attributes=("age", "tier")))
    with pytest.raises(
        DataError, match=r"attribute aged, which selection.reach_attributes.*knows age, tier\. Corr"
    ):
        reach.check_attributes(users, SelectionConfig(reach_attributes=("age", "aged")))
    with pytest.raises(DataError, match="no attribute at all"):
        reach.check_attributes(users.where("user_id = 'u2'"), SelectionConfig(reach_attributes=("age",)))


def write_world(spark: SparkSession, root_uri: str, ages: dict[str, str | None]) -> None:
    """Users with an age or none, all consenting, scored by the number in their id."""
    scored = {
        "campaign_id": "18",
        "target_id": "18",
        "run_date": D0,
        "model_version": "logistic-0123456789ab",
    }
    consent = {"channel": "mail", "purpose": "marketing", "state": "granted", "snapshot_date": D0}
    rows = {
        "users": [
            make_row("users", user_id=u, snapshot_date=D0, attributes=None if age is None else {"age": age})
            for u, age in ages.items()
        ],
        "consents": [make_row("consents", user_id=u, **consent) for u in ages],
        "predictions": [
            make_row(
                "predictions",
                user_id=u,
                conversion_probability=(int(u[1:]) % 50) / 100,
                is_cold_start=int(u[1:]) % 5 == 0,
                **scored,
            )
            for u in ages
        ],
        "sends": [make_row("sends", user_id=min(ages), send_date=D0)],
    }
    for table, of_table in rows.items():
        tables.overwrite(make_frame(spark, table, of_table), root_uri, table, DateRange.day(D0))


def select(spark: SparkSession, config: Config, **over: Any) -> Run:
    changed = config.model_copy(update={"selection": config.selection.model_copy(update=over)})
    with record_run("select_audience", changed, DateRange.day(D0), campaign="18") as run:
        select_audience.run(spark, run)
    return run


def test_the_job_records_reach_and_intervals_and_chooses_as_before(
    spark: SparkSession, config: Config, root_uri: str
) -> None:
    ages = {f"u{n:03d}": "young" if n % 4 == 0 else "old" if n % 4 == 1 else None for n in range(400)}
    write_world(spark, root_uri, ages)
    plain = select(spark, config)
    assert {row["attribute"] for row in plain.facts["reach"]["groups"]} == {reach.HISTORY}
    versions = [tables.version(spark, root_uri, table) for table in ("assignments", "audience")]
    told = select(spark, config, reach_attributes=("age",))
    assert told.facts["version"] == plain.facts["version"]
    assert [tables.version(spark, root_uri, table) for table in ("assignments", "audience")] == versions
    assert {k: v for k, v in told.facts.items() if k != "reach"} == {
        k: v for k, v in plain.facts.items() if k != "reach"
    }
    found = told.facts["reach"]
    assert found["selected_users"] == told.facts["selected_users"] > 0
    assert found["mailed_users"] == told.facts["mailed_users"]
    rows = {row["group"]: row for row in found["groups"]}
    assert set(rows) == {"young", "old", "unknown", "with events", "cold start"}
    ledger = {row.user_id: row for row in tables.read(spark, root_uri, "assignments").collect()}
    for age, name in (("young", "young"), ("old", "old"), (None, "unknown")):
        own = [ledger[user] for user, told_age in ages.items() if told_age == age]
        assert (
            rows[name]["eligible_users"] == sum(r.reason not in eligibility.REASONS for r in own) == len(own)
        )
        assert rows[name]["selected_users"] == sum(row.would_select for row in own)
        assert rows[name]["mailed_users"] == sum(row.arm == "treat" for row in own)
    for name in ("expected_conversions", "expected_cost_amount", "expected_profit_amount"):
        low, high = told.facts[f"{name}_interval"]
        assert low < told.facts[name] < high
    with pytest.raises(DataError, match=r"selection\.reach_attributes"):
        select(spark, config, reach_attributes=("shoe size",))


def test_a_segment_may_ask_for_an_attribute_of_the_master(
    spark: SparkSession, config: Config, root_uri: str
) -> None:
    ages = {f"u{n:03d}": "young" if n % 4 == 0 else "old" for n in range(200)}
    write_world(spark, root_uri, ages)
    young = SegmentLimit(name="young", where="attributes['age'] = 'young'", max_recipients=7)
    found = select(spark, config, segments=(young,), reach_attributes=("age",)).facts["reach"]
    rows = {row["group"]: row["selected_users"] for row in found["groups"]}
    assert rows["young"] == 7
    assert rows["old"] > 7
