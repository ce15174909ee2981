"""The choice equals a plain-Python oracle, stays inside its limits, and is handed over as it was decided."""

import csv
import math
import random
import zlib
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from couponflow.campaign import eligibility, export, selection
from couponflow.campaign.choice import assignment, knapsack, options, pricing
from couponflow.campaigning import CouponOption, SegmentLimit, SelectionConfig
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import Run, record_run
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import literals, storage, tables
from jobs import export_audience, select_audience

SNAPSHOT = eligibility.Snapshot(D0, "constructed", 1)
User = tuple[str, float | None, str | None]


def random_users(seed: int, size: int = 240) -> list[User]:
    """Few distinct probabilities, so ties abound; some users excluded, some certain, some hopeless."""
    draw = random.Random(seed)
    levels = [0.0, 1e-7, 0.004, 0.01, 0.0125, 0.05, 0.2, 0.2 + 1e-12, 0.999, 1.0]
    users: list[User] = []
    for number in range(size):
        reason = draw.choice([None] * 9 + ["consent_denied"])
        probability = draw.choice([*levels, draw.random() / 20])
        users.append((f"{seed}/ü{number}", probability, reason))
    return [*users, (f"{seed}/none", None, "no_prediction")]


def oracle(
    users: list[User], campaign: str, section: SelectionConfig
) -> tuple[dict[str, tuple[Any, ...]], Any]:
    """Sort, take until the first that does not fit: user -> (reason, rank, arm), and the first left out."""
    mail, discount = options.micro(section.mail_cost_amount), options.micro(section.discount_amount)
    gain = options.micro(section.margin_amount) - discount
    outcome: dict[str, tuple[Any, ...]] = {}
    order = []
    for user, probability, reason in users:
        p = probability or 0.0
        cost, value = math.floor(p * discount + 0.5) + mail, math.floor(p * gain + 0.5) - mail
        outcome[user] = (reason or "value", None, "none")
        wanted = {"expected_profit": value > 0, "threshold": p >= section.min_probability, "top_k": True}
        if reason is None and wanted[section.objective]:
            ratio = math.inf if cost == 0 else value / cost
            priority = ratio if section.objective == "expected_profit" else p
            order.append((-priority, -score_of(user), assignment.tie_key(campaign, user), user, cost, value))
    spent, left_out = 0, None
    for rank, (_, _, _, user, cost, value) in enumerate(sorted(order), 1):
        spent += cost
        if rank > section.max_recipients or spent > options.micro(section.budget_amount):
            reason = "max_recipients" if rank > section.max_recipients else "budget"
            left_out = left_out or (reason, value / cost if reason == "budget" else value / options.MICRO)
            outcome[user] = (reason, rank, "none")
        else:
            arm = assignment.deal_arm(campaign, user, section)
            outcome[user] = ("selected" if arm == "treat" else arm, rank, arm)
    return outcome, left_out


def score_of(user: str) -> float:
    """A raw score that tells some users of one probability apart, and leaves others tied."""
    return zlib.crc32(user.encode()) % 7 / 7


def frame_of(spark: SparkSession, users: list[User]) -> DataFrame:
    schema = T.StructType(
        [
            T.StructField("user_id", T.StringType()),
            T.StructField("conversion_probability", T.DoubleType()),
            T.StructField("reason", T.StringType()),
            T.StructField("score", T.DoubleType()),
        ]
    )
    return literals.frame(spark, [(*user, score_of(user[0])) for user in users], schema)


BASE = {"control_share": 0.2, "holdout_share": 0.1, "mail_cost_amount": 0.05, "margin_amount": 4.0}
CASES = {
    "budget": BASE | {"budget_amount": 30.0},
    "max_recipients": BASE | {"max_recipients": 50},
    "max_recipients among free options": {
        "max_recipients": 17,
        "mail_cost_amount": 0.0,
        "discount_amount": 0.0,
        "control_share": 0.0,
    },
    "value": BASE,
    "none": BASE | {"objective": "top_k"},
    "budget of nothing": BASE | {"budget_amount": 0.0},
    "budget below the first user": BASE | {"budget_amount": 0.04},
    "max_recipients of nobody": BASE | {"max_recipients": 0},
    "value of nobody": BASE | {"margin_amount": 0.5},
    "none among free options without a budget": {
        "objective": "top_k",
        "budget_amount": 0.0,
        "mail_cost_amount": 0.0,
        "discount_amount": 0.0,
    },
    "budget beyond the range of a bigint": BASE
    | {"mail_cost_amount": 1e11, "objective": "top_k", "budget_amount": 5e11},
    "budget under top_k": BASE | {"objective": "top_k", "budget_amount": 11.0, "max_recipients": 200},
    "value under threshold": BASE | {"objective": "threshold", "min_probability": 0.0125},
}


def test_the_choice_equals_the_oracle(spark: SparkSession) -> None:
    for seed, (name, values) in enumerate(CASES.items()):
        section = SelectionConfig(**values)
        users = random_users(seed)
        expected, left_out = oracle(users, "18", section)
        shuffled = random.Random(seed).sample(users, len(users))
        frame = frame_of(spark, shuffled).repartition(1 + seed % 4)
        decided = selection.with_decision(frame, "18", section).persist()
        rows = decided.collect()
        assert len(rows) == len(users)
        found = {row.user_id: (row.reason, row.rank, row.arm) for row in rows}
        wrong = [user for user in expected if found[user] != expected[user]]
        assert not wrong, f"{name}: {len(wrong)} wrong, {wrong[0]}: {found[wrong[0]]}, {expected[wrong[0]]}"

        decision = selection.Decision.of("18", D0, "m-1", section, "abcdef99")
        facts = selection.summarise(decided, decision, SNAPSHOT)
        decided.unpersist()
        assert facts["binding_constraint"] == name.split()[0]
        assert facts["shadow_price"] == (left_out[1] if left_out else 0.0)
        assert facts["version"] == "2024-01-10-m-1-abcdef"
        chosen = [row for row in rows if row.would_select]
        assert len(chosen) <= section.max_recipients
        assert sum(row.cost_micro for row in chosen) <= options.micro(section.budget_amount)
        mailed = [row for row in rows if row.arm == "treat"]
        assert facts["expected_cost_amount"] == sum(row.cost_micro for row in mailed) / options.MICRO
        assert facts["expected_profit_amount"] == sum(row.value_micro for row in mailed) / options.MICRO
        assert facts["expected_conversions"] == pytest.approx(sum(r.conversion_probability for r in mailed))
        assert all(row.propensity == assignment.propensity(row.arm, section) for row in rows)
        steps = facts["waterfall"]
        assert steps[0]["remaining"] == facts["num_users"] == len(users)
        for before, step in pairwise(steps):
            assert before["remaining"] - step["excluded"] == step["remaining"]
        assert (steps[-1]["reason"], steps[-1]["remaining"]) == ("mailed", len(mailed))
        by_reason = {step["reason"]: step["excluded"] for step in steps}
        assert by_reason["control"] == facts["control_users"] == sum(row.arm == "control" for row in rows)


COUPONS = (
    CouponOption(coupon_id="small", discount_amount=0.5, response_scale=0.7),
    CouponOption(coupon_id="large", discount_amount=2.0, response_scale=2.0, stock=9),
    CouponOption(coupon_id="none left", discount_amount=0.1, response_scale=3.0, stock=0),
)
SEGMENTS = (
    SegmentLimit(name="ends_in_7", where="user_id LIKE '%7'", max_recipients=4),
    SegmentLimit(name="rare", where="conversion_probability < 0.01", min_recipients=6),
)


def priced(users: list[User], section: SelectionConfig) -> tuple[list[str], pricing.Users]:
    """Eligible users in tie order, with each coupon's value and cost as the config's words have it."""
    eligible = sorted(
        ((user, p or 0.0) for user, p, reason in users if reason is None),
        key=lambda one: (assignment.tie_key("18", one[0]), one[0]),
    )
    mail = options.micro(section.mail_cost_amount)
    value, cost = [], []
    for _, p in eligible:
        pairs = [(min(1.0, p * c.response_scale), options.micro(c.discount_amount)) for c in COUPONS]
        cost.append([math.floor(q * discount + 0.5) + mail for q, discount in pairs])
        margin = options.micro(section.margin_amount)
        value.append([math.floor(q * (margin - discount) + 0.5) - mail for q, discount in pairs])
    member = [[True] * 3 + [user.endswith("7"), p < 0.01] for user, p in eligible]
    arrays = (np.array(value), np.array(cost), np.ones((len(eligible), 3), bool), np.array(member))
    return [user for user, _ in eligible], pricing.Users(*arrays)


def test_coupons_and_segments_are_chosen_and_booked(spark: SparkSession) -> None:
    section = SelectionConfig(
        **(BASE | {"budget_amount": 12.0, "max_recipients": 60}), coupons=COUPONS, segments=SEGMENTS
    )
    users = random_users(40)
    frame = frame_of(spark, users).repartition(3)
    allocated = selection.allocate(frame, "18", section)
    assert allocated is not None
    decided = selection.with_decision(frame, "18", section, allocated).persist()
    rows = {row.user_id: row for row in decided.collect()}
    decision = selection.Decision.of("18", D0, "m-1", section, "abcdef99")
    facts = selection.summarise(decided, decision, SNAPSHOT, allocated)
    decided.unpersist()

    names, arrays = priced(users, section)
    offered = pricing.offered(arrays, options.limits(section))
    expected, _ = knapsack.solve(offered, options.limits(section))
    ids = [None if option < 0 else COUPONS[option].coupon_id for option in expected]
    assert [rows[user].coupon_id for user in names] == ids
    selected = [rows[user] for user, coupon in zip(names, ids, strict=True) if coupon]
    assert [row.cost_micro for row in selected] == arrays.cost[
        expected >= 0, expected[expected >= 0]
    ].tolist()
    assert sorted(row.rank for row in selected) == list(range(1, len(selected) + 1))
    by_rank = sorted(selected, key=lambda row: row.rank)
    assert all(a.value_micro / a.cost_micro >= b.value_micro / b.cost_micro for a, b in pairwise(by_rank))

    assert set(ids) == {None, "small", "large"}  # never the best of them, of which none is left
    assert ids.count("large") <= 9
    assert sum(row.user_id.endswith("7") for row in selected) <= 4
    known = {user: p for user, p, _ in users}
    assert sum((known[row.user_id] or 0.0) < 0.01 for row in selected) >= 6
    assert sum(row.cost_micro for row in selected) <= options.micro(12.0)
    assert all(row.conversion_probability >= (known[row.user_id] or 0.0) * 0.7 for row in selected)

    assert len(rows) == facts["num_users"] == len(users)
    assert {row.reason for row in rows.values()} <= {*selection.REASONS, *eligibility.REASONS}
    for before, step in pairwise(facts["waterfall"]):
        assert before["remaining"] - step["excluded"] == step["remaining"]
    assert facts["selected_users"] == len(selected)
    assert facts["binding_constraint"] == "budget"
    assert facts["shadow_price"] == facts["shadow_prices"]["budget"] == allocated.prices.budget
    assert facts["shadow_prices"]["segment_max rare"] < 0
    total = sum(row.value_micro for row in selected)
    assert allocated.value == total
    assert facts["dual_bound"] >= total / options.MICRO
    assert facts["gap_share"] == pytest.approx(1 - total / allocated.bound)


def test_a_condition_that_cannot_be_evaluated_names_its_segment(spark: SparkSession) -> None:
    frame = frame_of(spark, [("u", 0.5, None)])
    for where in ("no_such_column = 1", "user_id LIKE", "user_id) OR (true"):
        section = SelectionConfig(segments=(SegmentLimit(name="odd", where=where),))
        with pytest.raises(ConfigError, match="segment odd: where = "):
            selection.allocate(frame, "18", section)


def test_incremental_profit_counts_what_the_mail_causes(spark: SparkSession) -> None:
    section = SelectionConfig(**BASE, objective="incremental_profit")
    bare = frame_of(spark, [("u", 0.5, None)])
    with pytest.raises(ConfigError, match=r"needs uplift scores.*have none; set selection.objective"):
        selection.with_decision(bare, "18", section)
    uplift = {
        "always buys": (0.9, 0.0),
        "persuadable": (0.4, 0.3),
        "put off": (0.3, -0.1),
        "no score": (0.9, None),
    }
    rows = [(user, p, None, 0.5, tau) for user, (p, tau) in uplift.items()]
    columns = "user_id string, conversion_probability double, reason string, score double, uplift double"
    frame = literals.frame(spark, rows, columns)
    decided = {row.user_id: row for row in selection.with_decision(frame, "18", section).collect()}
    values = {user: row.value_micro for user, row in decided.items()}
    assert values["persuadable"] == 0.3 * 4_000_000 - 0.4 * 1_000_000 - 50_000
    assert values["always buys"] == values["no score"] == -0.9 * 1_000_000 - 50_000
    assert values["put off"] == -0.1 * 4_000_000 - 0.3 * 1_000_000 - 50_000
    assert [user for user, row in decided.items() if row.would_select] == ["persuadable"]


def test_hashes_are_equal_in_spark_and_python(spark: SparkSession) -> None:
    names = [f"u{n}" for n in range(2000)] + ["", "ü|x", "日本", "a:b"]
    frame = literals.frame(spark, [(name,) for name in names], "user_id string")
    user = frame["user_id"]
    rows = frame.select(
        user,
        assignment.unit_hash_column("s", user).alias("unit"),
        assignment.tie_key_column("18", user).alias("tie"),
    ).collect()
    assert {r.user_id: (r.unit, r.tie) for r in rows} == {
        name: (assignment.unit_hash("s", name), assignment.tie_key("18", name)) for name in names
    }


def test_an_amount_without_end_is_refused() -> None:
    for amount in (math.inf, 1e13):
        with pytest.raises(ConfigError, match="section selection: amount"):
            options.micro(amount)
    assert options.micro(1e12) == 10**18


def test_an_unknown_reason_stops() -> None:
    with pytest.raises(DataError, match="'typo', which is not in the closed list"):
        selection.waterfall({"selected": 1, "typo": 2})


def write_world(spark: SparkSession, root_uri: str, users: list[str]) -> None:
    def row(table: str, user: str, **over: Any) -> dict[str, Any]:
        return make_row(table, user_id=user, **over)

    frames = {
        "users": [row("users", u, snapshot_date=D0) for u in users],
        "consents": [consent_row(u) for u in users],
        "predictions": [
            row(
                "predictions",
                u,
                campaign_id="18",
                target_id="18",
                run_date=D0,
                model_version="logistic-0123456789ab",
                conversion_probability=(number % 50) / 100,
            )
            for number, u in enumerate(users)
        ],
        "sends": [row("sends", users[0], send_date=D0 - timedelta(days=400))],
    }
    for table, rows in frames.items():
        dates = DateRange(D0 - timedelta(days=400), D0 + timedelta(days=1))
        tables.overwrite(make_frame(spark, table, rows), root_uri, table, dates)


def consent_row(user: str, state: str = "granted") -> dict[str, Any]:
    return make_row(
        "consents",
        user_id=user,
        channel="mail",
        purpose="marketing",
        state=state,
        source="constructed",
        snapshot_date=D0,
    )


def run_job(name: str, spark: SparkSession, config: Config) -> Run:
    job = {"select_audience": select_audience, "export_audience": export_audience}[name]
    with record_run(name, config, DateRange.day(D0), campaign="18") as run:
        job.run(spark, run)
    return run


def test_selection_and_hand_over_are_done_once(spark: SparkSession, config: Config, root_uri: str) -> None:
    users = [f"u{number:03d}" for number in range(200)]
    write_world(spark, root_uri, users)
    with pytest.raises(DataError, match="run select_audience first"):
        run_job("export_audience", spark, config)
    first = run_job("select_audience", spark, config)
    assert first.rows["assignments"] == 200
    assert first.rows["audience"] == first.facts["mailed_users"] > 0
    ledger = {r.user_id: r for r in tables.read(spark, root_uri, "assignments").collect()}
    assert set(ledger) == set(users)
    mailed = {user for user, row in ledger.items() if row.arm == "treat"}
    audience = {r.user_id: r.rank for r in tables.read(spark, root_uri, "audience").collect()}
    assert set(audience) == mailed
    assert {row.reason for row in ledger.values()} == {"selected", "control", "value"}

    versions = [tables.version(spark, root_uri, t) for t in ("assignments", "audience")]
    again = run_job("select_audience", spark, config)
    assert (again.rows, again.facts) == (first.rows, first.facts)
    assert [tables.version(spark, root_uri, t) for t in ("assignments", "audience")] == versions

    # One of the chosen withdraws between selection and hand-over.
    gone = min(mailed)
    consents = [consent_row(u, "denied" if u == gone else "granted") for u in users]
    tables.overwrite(make_frame(spark, "consents", consents), root_uri, "consents", DateRange.day(D0))
    unapproved = config.model_copy(
        update={"export": config.export.model_copy(update={"auto_approve": False})}
    )
    with pytest.raises(ConfigError, match="campaign approve"):
        run_job("export_audience", spark, unapproved)
    handed = run_job("export_audience", spark, config)
    assert handed.rows == {"recipients": len(mailed) - 1, "withdrawn": 1}
    content = storage.read_bytes(handed.facts["file"])
    listed = list(csv.DictReader(content.decode().splitlines()))
    assert [r["user_id"] for r in listed] == sorted(mailed - {gone}, key=audience.__getitem__)
    assert [int(r["rank"]) for r in listed] == [audience[r["user_id"]] for r in listed]
    second = run_job("export_audience", spark, config)
    assert second.facts == handed.facts | {"already_exported": True}
    assert Path(handed.facts["file"]).read_bytes() == content

    # The consent has changed, so selecting again would change a list that is out.
    with pytest.raises(ConflictError, match="approved or handed over"):
        run_job("select_audience", spark, config)
    assert tables.version(spark, root_uri, "assignments") == versions[0]

    # Neither another place nor another version gets the day's users once more.
    moved = config.model_copy(
        update={"export": config.export.model_copy(update={"target_uri": f"{root_uri}/new"})}
    )
    with pytest.raises(ConflictError, match="would mail its users again"):
        run_job("export_audience", spark, moved)
    assert not Path(f"{root_uri}/new").exists()


def test_a_user_with_two_ranks_is_refused(spark: SparkSession) -> None:
    consent = literals.frame(spark, [("u1", None), ("u2", None)], "user_id string, consent_reason string")
    base = {"campaign_id": "18", "version": "v"}
    audience = [
        make_row("audience", user_id=f"u{n}", rank=rank, **base) for rank, n in enumerate((1, 2, 1), 1)
    ]
    ledger = [make_row("assignments", user_id=f"u{n}", arm="treat", **base) for n in (1, 2)]
    with pytest.raises(DataError, match="stands in it twice"):
        export.recipients(
            make_frame(spark, "audience", audience), make_frame(spark, "assignments", ledger), consent
        )


def test_a_list_that_the_ledger_does_not_mail_is_refused(spark: SparkSession) -> None:
    consent = literals.frame(spark, [("u1", None), ("u2", None)], "user_id string, consent_reason string")
    base = {"campaign_id": "18", "version": "v"}
    audience = make_frame(
        spark, "audience", [make_row("audience", user_id=f"u{n}", rank=n, **base) for n in (1, 2)]
    )
    for arms, message in (
        (["treat", "control"], "arm control"),
        (["treat", "holdout"], "arm holdout"),
        (["treat"], "arm None"),
        (["treat", "treat", "treat"], "rank None"),
    ):
        rows = [make_row("assignments", user_id=f"u{n}", arm=arm, **base) for n, arm in enumerate(arms, 1)]
        with pytest.raises(DataError, match=message):
            export.recipients(audience, make_frame(spark, "assignments", rows), consent)
