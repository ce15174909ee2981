"""Random worlds, two campaigns one after the other: nobody who may not be mailed is in any output.

Each world is a few users whose ids carry its number, so that all worlds are one job per campaign.
"""

import random
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import Row, SparkSession

from couponflow.campaign import contact_rules, eligibility, selection
from couponflow.campaign import ledger as books
from couponflow.campaign.choice import assignment
from couponflow.campaigning import SelectionConfig
from couponflow.dates import day_start
from couponflow.errors import ConfigError
from couponflow.lake import literals

ZONE = "Asia/Tokyo"
NUM_WORLDS = 120
SNAPSHOT_DATE = D0 - timedelta(days=4)
PRIOR = ("7", "8", "loyalty")  # campaigns decided and sent before
OWN = {"consent_max_age_hours": 9999, "consent_min_share": 0.0, "staff_attributes": ("account=test",)}


@dataclass
class Person:
    """What is known of a user; days are numbers from ``D0``."""

    user_id: str
    attributes: dict[str, str] | None
    consents: list[tuple[str, str, str | None]]  # channel, state, reason
    sends: list[tuple[int, str, str | None]]  # day, campaign, mail type
    decisions: list[tuple[int, str, str]]  # day, campaign, arm
    orders: list[int]
    probability: float | None
    mailed: list[tuple[int, str, str]] = field(default_factory=list)  # by the campaigns of the test


def random_people(seed: int) -> list[Person]:
    """Up to seven users; days lie close together, so that edges of windows and equal days are common."""
    draw = random.Random(seed)
    attributes = [None, None, None, {}, {"account": "TEST "}, {"account": "shopper"}]
    granted = ("mail", "granted", None)
    others = [
        ("mail", "denied", None),
        ("mail", "denied", " Unsubscribe"),
        ("mail", "granted", "bounce"),
        ("mail", "granted", "Legal"),
        ("mail", "denied", "complaint"),
        ("mail", "granted", "under_age"),
        ("push", "granted", None),
    ]
    people = []
    for number in range(draw.randint(0, 7)):
        consents = [granted] * (draw.random() < 0.9) + draw.sample(others, draw.choice([0, 0, 0, 1, 2]))
        sends = [
            (draw.randint(-9, -1), draw.choice(PRIOR), draw.choice([None, "marketing", "transactional"]))
            for _ in range(draw.choice([0, 0, 1, 2, 3]))
        ]
        decisions = {
            (draw.randint(-9, 9), draw.choice(PRIOR), draw.choice(["treat", "treat", "explore", "control"]))
            for _ in range(draw.choice([0, 0, 1, 2]))
        }
        people.append(
            Person(
                f"{seed}/ü{number}",
                draw.choice(attributes),
                consents,
                sends,
                sorted(decisions),
                [draw.randint(-5, 1) for _ in range(draw.choice([0, 0, 0, 1]))],
                draw.choice([0.0, 0.01, 0.2, draw.random(), draw.random(), draw.random(), None, 2.0]),
            )
        )
    return people


def mail_days(person: Person, campaign: str, day: int) -> list[int]:
    """Marketing mails that a decision of a campaign for a day has to count, by the words of the rule."""
    sent = [(at, of) for at, of, kind in person.sends if kind != "transactional" and at < day]
    decided = {(at, of) for at, of, arm in person.decisions + person.mailed if arm in ("treat", "explore")}
    unsent = [
        at
        for at, of in decided
        if (at, of) != (day, campaign) and not any(of == by and when >= at for when, by in sent)
    ]
    return [at for at, _ in sent] + unsent


def oracle(person: Person, campaign: str, day: int, section: SelectionConfig) -> str | None:
    """Why a user may not be mailed, tried in order."""
    told = [
        ((reason or "").strip().lower(), state)
        for channel, state, reason in person.consents
        if channel == "mail"
    ]
    if (person.attributes or {}).get("account", "").strip().lower() == "test" or person.user_id in STAFF:
        return "staff"
    if not told:
        return "no_consent_record"
    for name in ("unsubscribe", "bounce", "complaint", "legal"):
        if any(reason == name for reason, _ in told):
            return name
    if any(reason or state != "granted" for reason, state in told):
        return "consent_denied"
    days = mail_days(person, campaign, day)
    for end in [day, *(at for at in days if at > day)]:
        is_joined = end - section.cap_days <= day
        if is_joined and sum(end - section.cap_days <= at <= end for at in days) >= section.max_sends:
            return "frequency_cap"
    if any(abs(at - day) < section.min_days_since_mail for at in days):
        return "recent_mail"
    if any(0 < day - at < section.min_days_since_purchase for at in person.orders):
        return "recent_purchase"
    if person.probability is None or person.probability > 1.0:
        return "no_prediction"
    return None


STAFF = tuple(f"{world}/ü0" for world in range(0, NUM_WORLDS, 9))


def decide(
    spark: SparkSession, people: list[Person], campaign: str, day: int, section: SelectionConfig
) -> tuple[list[Row], list[Row], list[Row], dict[str, Any]]:
    """Decided users, ledger, audience and facts of one campaign, made as the job makes them."""
    run_date = D0 + timedelta(days=day)

    def on(number: int) -> date:
        return D0 + timedelta(days=number)

    def frame(table: str, rows: list[dict[str, Any]]) -> Any:
        return make_frame(spark, table, random.Random(day).sample(rows, len(rows)))

    users = frame(
        "users",
        [
            make_row("users", user_id=p.user_id, attributes=p.attributes, snapshot_date=SNAPSHOT_DATE)
            for p in people
        ],
    )
    consents = [
        make_row(
            "consents",
            user_id=p.user_id,
            channel=channel,
            purpose="marketing",
            state=state,
            reason=reason,
            snapshot_date=SNAPSHOT_DATE,
        )
        for p in people
        for channel, state, reason in p.consents
    ]
    sends = [
        make_row(
            "sends",
            send_id=f"{p.user_id}{n}",
            user_id=p.user_id,
            send_date=on(at),
            campaign_id=of,
            mail_type=kind,
        )
        for p in people
        for n, (at, of, kind) in enumerate(p.sends)
    ]
    ledger = [
        make_row("assignments", user_id=p.user_id, run_date=on(at), campaign_id=of, arm=arm, version=f"{at}")
        for p in people
        for at, of, arm in p.decisions + p.mailed
    ]
    orders = [
        make_row("orders", order_id=f"{p.user_id}{at}", user_id=p.user_id, order_time=day_start(on(at), ZONE))
        for p in people
        for at in p.orders
    ]
    scores = [
        make_row("predictions", user_id=p.user_id, conversion_probability=p.probability)
        for p in people
        if p.probability is not None
    ]
    master = eligibility.user_master(users, run_date)
    staff = eligibility.staff_users(users, run_date, section, STAFF)
    consent, snapshot = eligibility.consent_status(frame("consents", consents), master, run_date, section)
    reasoned = eligibility.with_reason(
        master,
        staff,
        consent,
        contact_rules.mails_around(
            frame("sends", sends), frame("assignments", ledger), campaign, run_date, section
        ),
        contact_rules.recent_buyers(frame("orders", orders), run_date, ZONE, section),
        frame("predictions", scores),
        section,
    )
    decided = selection.with_decision(reasoned, campaign, section).persist()
    decision = selection.Decision.of(campaign, run_date, "m", section, "abcdef")
    facts = selection.summarise(decided, decision, snapshot)
    outputs = [
        decided,
        books.ledger_rows(decided, decision, "run"),
        books.audience_rows(decided, decision),
    ]
    rows, ledger_rows, audience = (output.collect() for output in outputs)
    decided.unpersist()
    return rows, ledger_rows, audience, facts


@pytest.mark.parametrize(
    ("first_day", "second_day", "bound", "values"),
    [
        (0, 0, "none", {"max_sends": 2, "cap_days": 3, "objective": "top_k", "explore_share": 0.0}),
        (
            0,
            2,
            "budget",
            {"max_sends": 1, "cap_days": 4, "min_days_since_purchase": 3, "budget_amount": 16.0},
        ),
        (
            2,
            0,
            "max_recipients",
            {"max_sends": 3, "cap_days": 5, "min_days_since_mail": 2, "max_recipients": 60},
        ),
    ],
)
def test_nobody_is_mailed_who_may_not_be(
    spark: SparkSession, first_day: int, second_day: int, bound: str, values: dict[str, Any]
) -> None:
    shares = {"holdout_share": 0.25, "control_share": 0.2, "explore_share": 0.25, "margin_amount": 1.2}
    section = SelectionConfig(**(OWN | shares | values))
    people = [person for world in range(NUM_WORLDS) for person in random_people(world)]
    grown = [person for world in range(NUM_WORLDS, NUM_WORLDS + 20) for person in random_people(world)]
    held: dict[str, set[str]] = {}
    arms: set[str] = set()
    for campaign, day, known in (("18", first_day, people), ("19", second_day, people + grown)):
        by_id = {person.user_id: person for person in known}
        expected = {person.user_id: oracle(person, campaign, day, section) for person in known}
        rows, ledger, audience, facts = decide(spark, known, campaign, day, section)
        assert sorted(row.user_id for row in rows) == sorted(row.user_id for row in ledger) == sorted(by_id)

        # The reason is the first that applies, and nobody with one is in an output.
        found = {row.user_id: row.reason if row.reason in eligibility.REASONS else None for row in rows}
        wrong = [user for user in expected if found[user] != expected[user]]
        assert not wrong, f"{len(wrong)}: {by_id[wrong[0]]} {found[wrong[0]]}, not {expected[wrong[0]]}"
        assert set(eligibility.REASONS) - set(expected.values()) == {
            *({"recent_mail"} if not section.min_days_since_mail else ()),
            *({"recent_purchase"} if not section.min_days_since_purchase else ()),
        }
        assert facts["binding_constraint"] == bound
        listed = {row.user_id: row for row in audience}
        assert len(listed) == len(audience) == facts["mailed_users"]
        assert {user for user, reason in expected.items() if reason}.isdisjoint(listed)

        # Arms are a function of salt, campaign and user alone: the list may grow.
        for row in rows:
            is_eligible = expected[row.user_id] is None
            arm = (
                assignment.deal_arm(campaign, row.user_id, section, row.would_select)
                if is_eligible
                else "none"
            )
            assert row.arm == arm
            assert row.propensity == (assignment.propensity(arm, section) if is_eligible else 1.0)
            assert (row.user_id in listed) == (arm in ("treat", "explore"))
            assert row.user_id not in listed or listed[row.user_id].rank == (
                row.rank if arm == "treat" else 0
            )
        arms |= {row.arm for row in rows}
        assert facts["explore_users"] == sum(row.arm == "explore" for row in rows)
        assert (facts["explore_users"] > 0) == (section.explore_share > 0)
        held[campaign] = {u for u in by_id if assignment.unit_hash("couponflow|holdout", u) < 0.25}
        assert held[campaign].isdisjoint(listed)
        assert {(row.user_id, row.arm, row.would_select) for row in ledger} == {
            (row.user_id, row.arm, row.would_select) for row in rows
        }

        # Exploration is inside the limits, and the waterfall ends with the list.
        costly = [row for row in rows if row.would_select or row.arm == "explore"]
        assert len(costly) <= section.max_recipients
        assert sum(row.cost_micro for row in costly) <= selection.micro(section.budget_amount)
        assert facts["waterfall"][-1]["remaining"] == len(listed)
        excluded = {step["reason"]: step["excluded"] for step in facts["waterfall"]}
        assert len(rows) - sum(excluded.values()) == len(listed)
        for reason in eligibility.REASONS:
            assert excluded[reason] == list(expected.values()).count(reason)

        for user in listed:
            by_id[user].mailed.append((day, campaign, "treat"))

    assert held["18"] <= held["19"]
    assert arms >= {"treat", "control", "holdout", "none"}
    both = 0
    for person in people:
        for day, _, _ in person.mailed:
            others = mail_days(person, "none", 99)
            ends = {day, *(at for at in others if day < at <= day + section.cap_days)}
            assert all(
                sum(end - section.cap_days <= at <= end for at in others) <= section.max_sends for end in ends
            ), person
            others.remove(day)
            assert all(abs(at - day) >= section.min_days_since_mail for at in others), person
        both += len(person.mailed) == 2
    assert (both > 0) == (section.max_sends > 1)


def test_exploration_takes_its_users_off_the_limits_or_is_refused(spark: SparkSession) -> None:
    """Ten users at 1.00 each, of whom chance draws some: they are paid for before anyone is selected."""
    schema = "user_id string, conversion_probability double, score double, reason string"
    frame = literals.frame(spark, [(f"u{n}", 0.5, n / 10, None) for n in range(10)], schema)
    base = {"explore_share": 0.4, "control_share": 0.0, "objective": "top_k", "mail_cost_amount": 0.5}
    drawn = {
        f"u{n}"
        for n in range(10)
        if assignment.unit_hash("couponflow|explore|18", f"u{n}") < base["explore_share"]
    }
    num_drawn = len(drawn)
    assert 2 <= num_drawn <= 8

    def mailed(**over: Any) -> dict[str, str]:
        section = SelectionConfig(**(base | over))
        rows = selection.with_decision(frame, "18", section).where("arm in ('treat', 'explore')").collect()
        return {row.user_id: row.arm for row in rows}

    for limit in ({"budget_amount": float(num_drawn)}, {"max_recipients": num_drawn}):
        assert mailed(**limit) == dict.fromkeys(drawn, "explore")
    best = {f"u{n}" for n in (9, 8)}
    for limit in ({"budget_amount": num_drawn + 2.999999}, {"max_recipients": num_drawn + 2}):
        assert mailed(**limit) == dict.fromkeys(drawn, "explore") | dict.fromkeys(best, "treat")
    for limit in ({"budget_amount": num_drawn - 0.000001}, {"max_recipients": num_drawn - 1}):
        with pytest.raises(
            ConfigError, match=f"explore_share = 0.4 draws {num_drawn} users for {num_drawn}.00"
        ):
            mailed(**limit)


def test_a_split_that_is_not_the_intended_one_is_reported_with_a_warning(
    spark: SparkSession, caplog: pytest.LogCaptureFixture
) -> None:
    schema = "user_id string, conversion_probability double, score double, reason string"
    frame = literals.frame(spark, [(f"u{n}", 0.5, 0.5, None) for n in range(10)], schema)
    section = SelectionConfig(control_share=0.0)
    decided = selection.with_decision(frame, "18", section).persist()
    for share, is_wrong in ((0.0, False), (0.9, True)):
        caplog.clear()
        believed = selection.Decision.of("18", D0, "m", SelectionConfig(control_share=share), "abcdef")
        facts = selection.summarise(decided, believed, eligibility.Snapshot(D0, "crm", 10))
        assert (facts["srm_p_value"] < assignment.SRM_LIMIT) == is_wrong
        assert ("campaign 18: treat, control and holdout are" in caplog.text) == is_wrong
    decided.unpersist()
