"""The daily state of histories: merge equals full in any order, and a corrected past forces a rebuild."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from typing import Any

import pytest
from builders import D0, T0, make_event, make_frame, make_row
from pyspark.sql import DataFrame, SparkSession
from test_histories import encoded, event, population, random_case, unpacked

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.lake import literals, runs, tables
from couponflow.sequences import examples, histories, merging
from couponflow.sequences.merging import State

LENGTH = 3
ALL_DATES = DateRange(date(2023, 1, 1), date(2025, 1, 1))
ONE_DAY = timedelta(days=1)


def content(frame: DataFrame) -> str:
    return tables.content_hash(frame)


@pytest.mark.parametrize("length", [1, 3, 50])
def test_merge_equals_full_in_any_order_of_days_and_replayed(spark: SparkSession, length: int) -> None:
    cases = {f"{n}/u": random_case(random.Random(n), f"{n}/u") for n in range(150)}
    rows = [e for events, _ in cases.values() for e in events]
    rows += [e | {"ingest_time": e["ingest_time"] + timedelta(minutes=40)} for e in rows[::7]]  # copies
    rows += [event(f"visitor:{n}", n, event_id=f"v{n}") for n in range(5)]
    frame = encoded(make_frame(spark, "events", rows)).cache()
    instants = {place: T0 + timedelta(minutes=at) for place, at in enumerate((1, 2.5, 30.5, 61, 150))}
    keys = [(user, T0 + timedelta(minutes=at)) for user in cases for at in (60, 61, 200)]
    asked = population(spark, [*keys, ("visitor:1", T0 + timedelta(minutes=61)), ("nobody", instants[4])])
    full = content(histories.build(frame, asked, length))
    alone = {place: content(merging.last_known(frame, at, length)) for place, at in instants.items()}
    for order in ([0, 1, 2], [2], [0, 2, 2], [1, 1, 2]):  # of the days whose state is made
        state: State | None = None
        for place in order:
            known = frame if state is None else merging.merged(state, frame)
            last = merging.last_known(known, instants[place], length)
            assert content(last) == alone[place], f"state {place} of {order}"
            state = State(D0, instants[place], last)
        assert content(histories.build(frame, asked, length, "merge", state)) == full, order
    frame.unpersist()


def test_a_state_holds_no_more_than_the_last_events(spark: SparkSession) -> None:
    frame = encoded(make_frame(spark, "events", [event("u", n, event_id=f"{n:03}") for n in range(100)]))
    kept = merging.last_known(frame, T0 + timedelta(minutes=80), 5).collect()
    assert sorted(row["event_id"] for row in kept) == ["075", "076", "077", "078", "079"]


def day(number: int) -> date:
    return D0 + timedelta(days=number)


def lake_event(user: str, event_day: int, name: str, ingest_day: int | None = None, **over: Any) -> Any:
    ingested = event_day if ingest_day is None else ingest_day
    return make_event(
        user,
        event_day * 1440 + 60,
        event_id=name,
        ingest_time=T0 + timedelta(days=ingested, minutes=70),
        ingest_date=day(ingested),
        **over,
    )


class World:
    """A lake of a few days that ``build_examples`` would read, and histories built as that job does."""

    def __init__(self, spark: SparkSession, config: Config) -> None:
        self.spark = spark
        self.config = with_method(config, "merge")
        self.root_uri = config.lake.root_uri
        rng = random.Random(3)
        self.events = [
            lake_event(
                f"u{rng.randrange(4)}", n % 4, f"e{n}", n % 4 + rng.choice([0, 0, 1]), item_id=f"i{n % 5}"
            )
            for n in range(40)
        ]
        for table in ("campaigns", "sends", "redemptions", "users", "orders", "catalogue"):
            column = "snapshot_date" if table in ("users", "catalogue") else "ingest_date"
            over = {"coupons": []} if table == "campaigns" else {}
            row = make_row(table, **{column: D0}, **over)
            tables.overwrite(make_frame(spark, table, [row]), self.root_uri, table, ALL_DATES)
        self.exclude({})
        self.deliver(*range(5))
        terms = [("v1", f, f"{f[0]}{n}", n + 2, 1) for f in ("item", "category", "shop") for n in range(5)]
        names = "version string, field string, value string, index int, num_events bigint"
        self.terms = literals.frame(spark, terms, names)

    def deliver(self, *numbers: int) -> None:
        """Write the events of some ingest days."""
        for number in numbers:
            rows = [row for row in self.events if row["ingest_date"] == day(number)]
            dates = DateRange.day(day(number))
            tables.overwrite(make_frame(self.spark, "events", rows), self.root_uri, "events", dates)

    def exclude(self, users: dict[str, int]) -> None:
        """Write user days: these users are bots on that day."""
        rows = [
            make_row("user_days", user_id=user, event_date=day(number), exclusion_reason="bot")
            for user, number in users.items()
        ]
        frame = make_frame(self.spark, "user_days", rows)
        tables.overwrite(frame, self.root_uri, "user_days", ALL_DATES)

    @contextmanager
    def inputs(self, number: int, config: Config | None = None) -> Iterator[examples.Inputs]:
        """The inputs of one as_of date."""
        dates = DateRange.day(day(number))
        with examples.cached_inputs(self.spark, config or self.config, dates, "test") as inputs:
            yield inputs

    def build(self, number: int, config: Config | None = None) -> tuple[bool, Any]:
        """Whether a state was used for the histories of a day, and their bytes."""
        as_of = T0 + timedelta(days=number)
        asked = population(self.spark, [(f"u{n}", as_of) for n in range(5)])
        with self.inputs(number, config) as inputs:
            frame = histories.build(inputs.events, asked, LENGTH, inputs.history_method, inputs.history_state)
            return inputs.history_state is not None, unpacked(frame)

    def full(self, number: int) -> Any:
        """The bytes of the default method."""
        return self.build(number, with_method(self.config, "window"))[1]


def with_method(config: Config, method: str, length: int = LENGTH) -> Config:
    changed = config.examples.model_copy(update={"history_method": method, "history_length": length})
    return config.model_copy(update={"examples": changed})


@pytest.fixture
def world(spark: SparkSession, config: Config, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(spark, config)
    monkeypatch.setattr(examples.vocabulary, "current", lambda root_uri: Version("v1"))
    monkeypatch.setattr(examples.vocabulary, "load", lambda spark, root_uri, version: made.terms)
    return made


class Version:
    """Stands for a published vocabulary."""

    def __init__(self, version: str) -> None:
        self.version = version


def test_days_in_any_order_and_replayed_equal_the_default_method(world: World) -> None:
    expected = {number: world.full(number) for number in (2, 3, 4, 5)}
    assert not tables.exists(world.spark, world.root_uri, merging.TABLE), "another method keeps no state"
    used = []
    for number in (3, 2, 4, 4, 5, 3):
        is_used, found = world.build(number)
        assert found == expected[number], f"day {number}"
        used.append((number, is_used))
    # A state of a later day says nothing about an earlier one.
    assert used == [(3, False), (2, False), (4, True), (4, True), (5, True), (3, False)]
    stored = tables.read(world.spark, world.root_uri, merging.TABLE)
    assert {row[0] for row in stored.select("state_date").distinct().collect()} == {day(3), day(5)}


def test_a_late_delivery_keeps_the_state_and_a_correction_forces_a_rebuild(
    world: World, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.build(3)
    world.events.append(lake_event("u1", 0, "late", 4))
    world.exclude({"u2": 4})
    world.deliver(4)
    with world.inputs(5) as inputs:
        assert inputs.history_state is not None, "what comes later changes no earlier state"
    assert world.build(5) == (True, world.full(5))

    def is_valid(config: Config | None = None) -> bool:
        past = merging.Past.of(spark, config or world.config, DateRange.day(day(6)))
        return past.load("v1") is not None

    assert is_valid()
    assert merging.Past.of(spark, world.config, DateRange.day(day(6))).load("v2") is None, "other vocabulary"
    assert not is_valid(with_method(world.config, "merge", LENGTH + 1)), "other length"
    zone = world.config.lake.model_copy(update={"time_zone": "Europe/Berlin"})
    assert not is_valid(world.config.model_copy(update={"lake": zone})), "other config"
    monkeypatch.setattr(runs, "code_version", lambda: "other")
    assert not is_valid(), "other code"
    monkeypatch.undo()


@pytest.mark.parametrize("what", ["event removed", "event added", "user excluded", "link"])
def test_each_kind_of_correction_is_noticed(world: World, spark: SparkSession, what: str) -> None:
    past = merging.Past.of(spark, world.config, DateRange.day(day(4)))
    frame = examples.prepare_events(make_frame(spark, "events", world.events), world.terms, "UTC")
    past.publish(frame, None, "v1", "test")
    next_day = merging.Past.of(spark, world.config, DateRange.day(day(5)))
    assert next_day.load("v1") is not None
    if what == "event removed":
        world.events = [row for row in world.events if row["event_id"] != "e1"]
        world.deliver(*range(4))
    elif what == "event added":
        world.events.append(lake_event("u1", 1, "forgotten", 1))
        world.deliver(1)
    elif what == "user excluded":
        world.exclude({"u1": 1})
    else:
        link = make_row("identity_links", ingest_date=day(1))
        dates = DateRange.day(day(1))
        tables.overwrite(make_frame(spark, "identity_links", [link]), world.root_uri, "identity_links", dates)
    assert next_day.load("v1") is None


def test_a_change_while_histories_are_built_is_noticed_by_the_next_run(
    world: World, spark: SparkSession
) -> None:
    with world.inputs(4):
        world.events.append(lake_event("u1", 1, "meanwhile", 1))
        world.deliver(1)
    assert merging.Past.of(spark, world.config, DateRange.day(day(5))).load("v1") is None
