"""Links of visitors to users: first link wins, applied from its delivery on, whatever comes later."""

import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

from builders import make_event, make_frame, make_row
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.dates import DateRange
from couponflow.lake import schemas, tables
from couponflow.sequences import identity

DAY = date(2024, 1, 10)
NOON = datetime(2024, 1, 10, 12, tzinfo=UTC)
Row = dict[str, Any]


def link(visitor: str, user: str, day: date, time: datetime) -> Row:
    return make_row("identity_links", visitor_id=visitor, user_id=user, ingest_date=day, linked_time=time)


def by_hand(events: list[Row], links: list[Row]) -> dict[str, tuple[str, datetime, date]]:
    """Each event's (user, ingest time, ingest date), link by link."""
    found = {}
    for event in events:
        user, time, day = event["user_id"], event["ingest_time"], event["ingest_date"]
        if user.startswith("visitor:"):
            own = [row for row in links if "visitor:" + row["visitor_id"] == user]
            if own:
                first = min(own, key=lambda row: (row["ingest_date"], row["linked_time"], row["user_id"]))
                user = first["user_id"]
                time, day = max(time, first["linked_time"]), max(day, first["ingest_date"])
        found[event["event_id"]] = (user, time, day)
    return found


def draw(rng: random.Random, case: int) -> tuple[list[Row], list[Row]]:
    """Events and links of one case: known and anonymous, linked before, after, twice or never."""
    days = [DAY + timedelta(days=n) for n in range(4)]
    events, links = [], []
    for n in range(rng.randint(0, 8)):
        day = rng.choice(days)
        visitor = rng.choice([None, f"{case}-a", f"{case}-b"])
        user = rng.choice([f"{case}-u", None]) or (f"visitor:{visitor}" if visitor else f"{case}-w")
        when = datetime.combine(day, datetime.min.time(), UTC) + timedelta(hours=rng.randint(0, 23))
        events.append(
            make_event(user, event_id=f"{case}-{n}", visitor_id=visitor, ingest_time=when, ingest_date=day)
        )
    for visitor in ("a", "b"):
        for user in rng.sample(["u", "v", "w"], rng.choice([0, 1, 1, 2, 3])):
            day = rng.choice(days)
            links.append(
                link(f"{case}-{visitor}", f"{case}-{user}", day, NOON + timedelta(days=rng.choice([0, 1])))
            )
    return events, links


def test_random_visitors_become_users_as_by_hand(spark: SparkSession, root_uri: str) -> None:
    rng = random.Random(2)
    drawn = [draw(rng, case) for case in range(400)]
    events = [row for rows, _ in drawn for row in rows]
    links = [row for _, rows in drawn for row in rows]
    dates = DateRange(DAY, DAY + timedelta(days=4))
    frame = make_frame(spark, "events", events)
    assert identity.resolve(frame, identity.links(spark, root_uri)).count() == len(events)  # no table yet
    tables.overwrite(make_frame(spark, "identity_links", links), root_uri, "identity_links", dates)
    resolved = identity.resolve(frame, identity.links(spark, root_uri))
    assert resolved.columns == list(schemas.TABLES["events"].column_names)
    found = {
        r["event_id"]: (r["user_id"], r["ingest_time"].replace(tzinfo=UTC), r["ingest_date"])
        for r in resolved.collect()
    }
    wanted = by_hand(events, links)
    assert found == wanted
    moved = [e for e in events if wanted[e["event_id"]][0] != e["user_id"]]
    assert len(moved) > 100
    users = {
        visitor: {row["user_id"] for row in links if row["visitor_id"] == visitor}
        for visitor in {row["visitor_id"] for row in links}
    }
    assert identity.shared_visitors(spark, root_uri, dates) == sum(len(own) > 1 for own in users.values())
    on_last = {row["visitor_id"] for row in links if row["ingest_date"] == DAY}
    shared_on_last = sum(len(users[visitor]) > 1 for visitor in on_last)
    assert identity.shared_visitors(spark, root_uri, DateRange.day(DAY)) == shared_on_last


def test_a_later_link_changes_nothing_that_an_earlier_day_could_see(
    spark: SparkSession, root_uri: str
) -> None:
    rng = random.Random(4)
    drawn = [draw(rng, case) for case in range(200)]
    frame = make_frame(spark, "events", [row for rows, _ in drawn for row in rows])
    links = [row for _, rows in drawn for row in rows]
    cut = DAY + timedelta(days=2)

    def seen(known: list[Row]) -> set[tuple[Any, ...]]:
        dates = DateRange(DAY, DAY + timedelta(days=4))
        tables.overwrite(make_frame(spark, "identity_links", known), root_uri, "identity_links", dates)
        rows = identity.resolve(frame, identity.links(spark, root_uri)).where(
            F.col("ingest_date") < F.lit(cut)
        )
        # What a user's history at the cut holds; a visitor has none.
        rows = rows.where(~F.col("user_id").startswith("visitor:"))
        return {(r["event_id"], r["user_id"], r["ingest_time"], r["ingest_date"]) for r in rows.collect()}

    before = seen([row for row in links if row["ingest_date"] < cut])
    assert before
    assert seen(links) == before
