"""Every user of the master gets one reason or none; whatever is unknown counts against mailing."""

from datetime import date, datetime, timedelta
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import DataFrame, SparkSession

from couponflow.campaign import contact_rules, eligibility
from couponflow.campaigning import SelectionConfig
from couponflow.dates import day_start, local_day
from couponflow.errors import ConfigError, ConflictError, DataError

ZONE = "America/New_York"
SECTION = SelectionConfig(max_sends=2, cap_days=7)
RULES = SelectionConfig(
    max_sends=2,
    cap_days=7,
    min_days_since_mail=1,
    min_days_since_purchase=3,
    staff_attributes=("account=test", "is_staff=TRUE"),
)
AS_OF = day_start(D0, ZONE)
SECOND = timedelta(seconds=1)


def consent(user: str, state: str = "granted", reason: str | None = None, **over: Any) -> dict[str, Any]:
    base = {"channel": "mail", "purpose": "marketing", "source": "crm", "snapshot_date": D0}
    return make_row("consents", **(base | {"user_id": user, "state": state, "reason": reason} | over))


def send(user: str, when: datetime, campaign: str = "7", **over: Any) -> dict[str, Any]:
    base = {"send_id": f"{user}{when}{campaign}", "user_id": user, "campaign_id": campaign}
    base |= {"delivered_time": when, "send_date": local_day(when, ZONE)}
    return make_row("sends", **(base | over))


def order(user: str, when: datetime) -> dict[str, Any]:
    return make_row("orders", order_id=f"{user}{when}", user_id=user, order_time=when)


def decided(user: str, day: date, campaign: str, arm: str = "treat", version: str = "v") -> dict[str, Any]:
    return make_row("assignments", user_id=user, run_date=day, campaign_id=campaign, arm=arm, version=version)


def users_frame(spark: SparkSession, names: list[str], day: date = D0) -> DataFrame:
    return make_frame(spark, "users", [make_row("users", user_id=n, snapshot_date=day) for n in names])


def test_each_user_has_the_first_reason_that_applies(spark: SparkSession) -> None:
    start = day_start(D0 - timedelta(days=7), ZONE)
    expected: dict[str, str | None] = {
        "fine": None,
        "staff by config": "staff",
        "staff by attribute, denied": "staff",
        "test account": "staff",
        "attribute of another value": None,
        "no record": "no_consent_record",
        "other channel": "no_consent_record",
        "other purpose": "no_consent_record",
        "denied": "consent_denied",
        "odd state": "consent_denied",
        "unsubscribed": "unsubscribe",
        "bounced though granted": "bounce",
        "complained": "complaint",
        "legal": "legal",
        "bounced in other letters": "bounce",
        "reason nobody knows": "consent_denied",
        "blank reason": None,
        "denied beside granted": "consent_denied",
        "capped": "frequency_cap",
        "capped and denied": "consent_denied",
        "two, one at the edge": "frequency_cap",
        "two, one before the edge": None,
        "two, one at as_of": None,
        "two, one decided": "frequency_cap",
        "decided and sent": None,
        "an earlier wave sent, another decided": "frequency_cap",
        "sent on the day it was decided for": None,
        "decided in two versions": None,
        "decided by this campaign today": None,
        "decided by another today": "frequency_cap",
        "control elsewhere": None,
        "explored elsewhere": "frequency_cap",
        "one, delivered on two days": None,
        "two of another team": "frequency_cap",
        "one, and two transactional": None,
        "one, and one of a type nobody knows": "frequency_cap",
        "one decided, answered by a transactional": "frequency_cap",
        "one decided by another today": "recent_mail",
        "two decided for later days": "frequency_cap",
        "one, and one decided at the end of the window": "frequency_cap",
        "one, and one decided after the window": None,
        "one early, one late, never in one window": None,
        "bought": "recent_purchase",
        "bought and capped": "frequency_cap",
        "bought at the start of the third day before": None,
        "bought on the day itself": None,
        "bought, no score": "recent_purchase",
        "no score": "no_prediction",
        "score is NaN": "no_prediction",
        "score above one": "no_prediction",
    }
    special = {
        "no record": [],
        "other channel": [consent("other channel", channel="push")],
        "other purpose": [consent("other purpose", purpose="transactional")],
        "denied": [consent("denied", "denied")],
        "odd state": [consent("odd state", "Granted")],
        "unsubscribed": [consent("unsubscribed", "denied", "unsubscribe")],
        "bounced though granted": [consent("bounced though granted", "granted", "bounce")],
        "complained": [consent("complained", "denied", "complaint")],
        "legal": [consent("legal", "denied", "legal")],
        "bounced in other letters": [consent("bounced in other letters", reason=" Bounce")],
        "reason nobody knows": [consent("reason nobody knows", reason="under_age")],
        "blank reason": [consent("blank reason", reason=" ")],
        "denied beside granted": [consent("denied beside granted", s) for s in ("granted", "denied")],
        "capped and denied": [consent("capped and denied", "denied", "by letter")],
        "staff by attribute, denied": [consent("staff by attribute, denied", "denied")],
    }
    consents = [row for name in expected for row in special.get(name, [consent(name)])]
    consents += [consent("no record", snapshot_date=D0 - timedelta(days=1)), consent("stranger")]
    one = AS_OF - timedelta(days=1)
    sends = [
        *(send(name, when) for name in ("capped", "capped and denied") for when in (one, one - SECOND)),
        send("two, one at the edge", one),
        send("two, one at the edge", start),
        send("two, one before the edge", one),
        send("two, one before the edge", start - SECOND),
        send("two, one at as_of", one),
        send("two, one at as_of", AS_OF, "18"),
        send("two, one decided", one),
        send("decided and sent", one),
        send("an earlier wave sent, another decided", AS_OF - timedelta(days=5), "8"),
        send("sent on the day it was decided for", AS_OF - timedelta(days=2) + SECOND, "8"),
        send("decided in two versions", AS_OF - timedelta(days=9)),
        send("decided by this campaign today", one),
        send("decided by another today", one),
        send("control elsewhere", one),
        send("explored elsewhere", one),
        send("one, delivered on two days", one, ingest_date=D0 - timedelta(days=1)),
        send("one, delivered on two days", one),
        *(send("two of another team", when, "loyalty-77") for when in (one, one - SECOND)),
        send("one, and two transactional", one),
        send("one, and two transactional", one, "receipt", mail_type="transactional"),
        send("one, and two transactional", one, "8", mail_type=" Transactional"),
        send("one, and one of a type nobody knows", one),
        send("one, and one of a type nobody knows", one, "8", mail_type="newsletter"),
        send("one decided, answered by a transactional", one),
        send("one decided, answered by a transactional", one, "8", mail_type="transactional"),
        send("one, and one decided at the end of the window", one),
        send("one, and one decided after the window", one),
        send("one early, one late, never in one window", AS_OF - timedelta(days=7)),
        *(send("bought and capped", when) for when in (one, one - SECOND)),
    ]
    third = day_start(D0 - timedelta(days=2), ZONE)
    orders = [
        order("bought", third),
        order("bought and capped", one),
        order("bought at the start of the third day before", third - SECOND),
        order("bought on the day itself", AS_OF),
        order("bought, no score", one),
    ]
    assignments = [
        decided("two, one decided", D0 - timedelta(days=7), "8"),
        decided("two, one at the edge", D0 - timedelta(days=8), "8"),
        decided("decided and sent", D0 - timedelta(days=2), "7"),
        decided("an earlier wave sent, another decided", D0 - timedelta(days=1), "8"),
        decided("sent on the day it was decided for", D0 - timedelta(days=2), "8"),
        decided("decided in two versions", D0 - timedelta(days=2), "8", version="v1"),
        decided("decided in two versions", D0 - timedelta(days=2), "8", version="v2"),
        decided("decided by this campaign today", D0, "18"),
        decided("decided by another today", D0, "8"),
        decided("control elsewhere", D0 - timedelta(days=1), "8", arm="control"),
        decided("explored elsewhere", D0 - timedelta(days=1), "8", arm="explore"),
        decided("one decided, answered by a transactional", D0 - timedelta(days=2), "8"),
        decided("one decided by another today", D0, "8"),
        decided("two decided for later days", D0 + timedelta(days=1), "8"),
        decided("two decided for later days", D0 + timedelta(days=2), "9"),
        decided("one, and one decided at the end of the window", D0 + timedelta(days=6), "8"),
        decided("one, and one decided after the window", D0 + timedelta(days=7), "8"),
        decided("one early, one late, never in one window", D0 + timedelta(days=1), "8"),
    ]
    scores = {name: 0.25 for name in expected} | {"score is NaN": float("nan"), "score above one": 1.5}
    del scores["no score"], scores["bought, no score"]
    predictions = [
        make_row("predictions", user_id=name, conversion_probability=p) for name, p in scores.items()
    ]
    attributes = {
        "staff by attribute, denied": {"is_staff": "true"},
        "test account": {"account": " Test"},
        "attribute of another value": {"account": "customer", "is_staff": "no", "age": "test"},
    }
    snapshots = make_frame(
        spark,
        "users",
        [
            make_row("users", user_id=name, snapshot_date=D0, attributes=attributes.get(name))
            for name in [*expected, "fine"]
        ],
    )
    users = eligibility.user_master(snapshots, D0)
    staff = eligibility.staff_users(snapshots, D0, RULES, ("staff by config", "nobody"))
    status, snapshot = eligibility.consent_status(make_frame(spark, "consents", consents), users, D0, RULES)
    mails = contact_rules.mails_around(
        make_frame(spark, "sends", sends), make_frame(spark, "assignments", assignments), "18", D0, RULES
    )
    buyers = contact_rules.recent_buyers(make_frame(spark, "orders", orders), D0, ZONE, RULES)
    rows = eligibility.with_reason(
        users, staff, status, mails, buyers, make_frame(spark, "predictions", predictions), RULES
    ).collect()
    assert len(rows) == len(expected)
    assert {row.user_id: row.reason for row in rows} == expected
    assert set(filter(None, expected.values())) == set(eligibility.REASONS)
    assert (snapshot.snapshot_date, snapshot.source) == (D0, "crm")
    assert snapshot.num_users == len(expected) - 3  # no record, other channel, other purpose


def test_no_list_without_a_good_snapshot(spark: SparkSession) -> None:
    users = users_frame(spark, ["u1", "u2", "u3", "u4"]).select("user_id")
    day = timedelta(days=1)
    frame = make_frame(
        spark,
        "consents",
        [consent(f"u{n}", snapshot_date=D0) for n in (1, 2)]
        + [consent("u1", snapshot_date=D0 + 5 * day)]
        + [consent(f"stranger{n}", snapshot_date=D0 + 5 * day) for n in range(9)]
        + [consent(f"u{n}", channel="push", snapshot_date=D0 + 9 * day) for n in range(1, 5)],
    )

    def status(run_date: date, **over: Any) -> eligibility.Snapshot:
        return eligibility.consent_status(frame, users, run_date, SelectionConfig(**over))[1]

    assert status(D0).num_users == 2
    assert status(D0 + day).snapshot_date == D0
    with pytest.raises(DataError, match="no snapshot"):
        status(D0 - day)
    with pytest.raises(DataError, match="48 hours old"):
        status(D0 + 2 * day)
    assert status(D0 + 2 * day, consent_max_age_hours=48).snapshot_date == D0
    with pytest.raises(DataError, match="covers 1 of 4"):
        status(D0 + 5 * day)
    with pytest.raises(DataError, match="covers 0 of 4"):
        status(D0 + 9 * day, consent_min_share=0.0)
    with pytest.raises(DataError, match="no snapshot up to"):
        eligibility.user_master(users_frame(spark, ["u1"], D0 + day), D0)
    marked = SelectionConfig(staff_attributes=("account=test",))
    with pytest.raises(DataError, match="nobody in the newest snapshot has the attribute account"):
        eligibility.staff_users(users_frame(spark, ["u1"]), D0, marked, ())


def test_a_snapshot_that_suddenly_lacks_users_stops_selection_and_hand_over(spark: SparkSession) -> None:
    """Against the largest of the snapshots before it, so that a second broken one is no better."""
    day = timedelta(days=1)
    sizes = {-9: 40, -8: 19, -7: 20, -1: 20, 0: 18, 1: 17, 2: 17, 10: 17}
    frame = make_frame(
        spark,
        "consents",
        [
            consent(f"u{n}", channel=channel, snapshot_date=D0 + number * day)
            for number, size in sizes.items()
            for n in range(size)
            for channel in (("mail",) if number else ("mail", "push"))  # another channel makes up for nothing
        ]
        + [consent(f"u{n}", snapshot_date=D0 + number * day) for number in range(-6, -1) for n in range(20)],
    )
    users = users_frame(spark, [f"u{n}" for n in range(20)]).select("user_id")
    section = SelectionConfig(consent_max_age_hours=24)

    def size(number: int, chosen: SelectionConfig = section) -> int:
        return eligibility.consent_status(frame, users, D0 + number * day, chosen)[1].num_users

    assert size(0) == 18  # 2 of 20 may be gone; the 40 are too long ago
    for number in (1, 2):
        with pytest.raises(
            DataError, match="has 17 users for mail/marketing, 3 fewer than that of 2024-01-0"
        ):
            size(number)
    assert size(1, section.model_copy(update={"consent_max_drop_share": 0.15})) == 17
    with pytest.raises(DataError, match="snapshot 2024-01-20 has 17 users for mail/marketing, 3 fewer"):
        eligibility.consent_at_export(frame, users, D0, section)


def test_nothing_is_sent_on_a_quiet_day() -> None:
    quiet = tuple(D0 + timedelta(days=number) for number in (0, 1, 3))
    for day, allowed in ((0, "2024-01-12"), (1, "2024-01-12"), (3, "2024-01-14")):
        with pytest.raises(ConfigError, match=f"the next allowed day is {allowed}"):
            contact_rules.check_quiet_day(D0 + timedelta(days=day), quiet)
    contact_rules.check_quiet_day(D0 + timedelta(days=2), quiet)
    contact_rules.check_quiet_day(D0, ())


def test_no_list_without_orders_where_purchases_matter(spark: SparkSession) -> None:
    orders = make_frame(spark, "orders", [order("u1", AS_OF)])
    with pytest.raises(DataError, match="table orders has no order before 2024-01-10"):
        contact_rules.recent_buyers(orders, D0, ZONE, RULES)
    assert contact_rules.recent_buyers(orders, D0, ZONE, SECTION).collect() == []


def test_a_newer_snapshot_can_only_tighten_at_the_hand_over(spark: SparkSession) -> None:
    names = ["stays", "leaves later", "left before", "comes back later", "not in the later one"]
    users = users_frame(spark, names).select("user_id")
    old = {name: "denied" if name in ("left before", "comes back later") else "granted" for name in names}
    new = old | {"leaves later": "denied", "comes back later": "granted"}
    del new["not in the later one"]
    day = timedelta(days=1)
    first = [consent(user, state) for user, state in old.items()]
    second = [consent(user, state, snapshot_date=D0 + 9 * day) for user, state in new.items()]

    def may_mail(rows: list[dict[str, Any]], run_date: date = D0) -> set[str]:
        section = SelectionConfig(consent_max_drop_share=0.2)
        status = eligibility.consent_at_export(make_frame(spark, "consents", rows), users, run_date, section)
        return {row.user_id for row in status.collect() if row.consent_reason is None}

    assert may_mail(first) == {"stays", "leaves later", "not in the later one"}
    assert may_mail(first + second) == {"stays"}
    with pytest.raises(DataError, match="snapshot 2024-01-19 covers 1 of 5"):
        may_mail(first + second[:1])
    with pytest.raises(DataError, match="no snapshot"):
        may_mail(second)


def test_two_campaigns_prepared_at_once_do_not_exceed_the_cap_together(spark: SparkSession) -> None:
    """Neither saw the other before it wrote its decision; the one that finds the other stops."""
    sends = make_frame(spark, "sends", [send("both", AS_OF - SECOND), send("one", AS_OF - SECOND)])
    mine = [decided("both", D0, "18"), decided("one", D0, "18"), decided("fresh", D0, "18")]
    other = [decided("fresh", D0, "8"), decided("one", D0, "8", arm="control")]

    def check(ledger: list[dict[str, Any]], section: SelectionConfig = SECTION) -> None:
        mails = contact_rules.mails_around(sends, make_frame(spark, "assignments", ledger), "18", D0, section)
        contact_rules.check_cap(make_frame(spark, "assignments", mine), mails, "18", section)

    check(mine + other)
    with pytest.raises(ConflictError, match="mails 1 of the same users beyond the frequency cap"):
        check([*mine, *other, decided("both", D0, "8")])
    with pytest.raises(ConflictError, match="mails 1 of the same users"):
        check(mine + other, SelectionConfig(max_sends=9, min_days_since_mail=1))


def test_predictions_of_one_model_and_one_row_per_user(spark: SparkSession) -> None:
    def row(campaign: str, user: str, model: str = "m1", **over: Any) -> dict[str, Any]:
        base = {"campaign_id": campaign, "target_id": campaign, "user_id": user, "model_version": model}
        return make_row("predictions", **(base | {"run_date": D0} | over))

    frame = make_frame(
        spark,
        "predictions",
        [
            row("1", "u1", conversion_probability=0.5, score=0.7),
            row("1", "u1", run_date=D0 + timedelta(days=1)),
            row("1", "u1", target_id="other", conversion_probability=0.25),
            row("1", "u1", target_id="twice"),
            row("1", "u1", target_id="twice"),
            row("1", "u1", "m2", target_id="newer"),
            row("2", "u1"),
            row("2", "u2", "m2"),
            row("3", "u1"),
            row("3", "u1"),
        ],
    )
    found, version = eligibility.one_prediction_per_user(frame, "1", D0)
    assert ([tuple(r) for r in found.collect()], version) == ([("u1", 0.5, 0.7, False, {"1": 0.5})], "m1")
    found, _ = eligibility.one_prediction_per_user(frame, "1", D0, ("1", "other"))
    assert [tuple(r) for r in found.collect()] == [("u1", 0.5, 0.7, False, {"1": 0.5, "other": 0.25})]
    for target, rows in (("none", 0), ("twice", 2), ("newer", 1)):
        wanted = f"target {target} of selection.coupons has {rows} rows, 1 of model m1 are needed"
        with pytest.raises(DataError, match=wanted):
            eligibility.one_prediction_per_user(frame, "1", D0, ("1", target))
    for campaign, message in (("2", "several models \\(m1, m2\\)"), ("3", "2 rows for 1"), ("4", "no rows")):
        with pytest.raises(DataError, match=message):
            eligibility.one_prediction_per_user(frame, campaign, D0)
