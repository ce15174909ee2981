"""Examples: no leak, one feature path for training and scoring, splits at their borders, reruns."""

import random
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from builders import make_event, make_frame, make_row
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import DateRange, day_start
from couponflow.entry import Run
from couponflow.errors import DataError
from couponflow.lake import runs, tables
from couponflow.sequences import examples, vocabulary
from jobs import build_examples, build_vocabulary

D = date(2024, 3, 1)
ALL_DATES = DateRange(date(2024, 1, 1), date(2024, 6, 1))
UNTIL = datetime(2024, 5, 1, tzinfo=UTC)
FEATURES = ("length", "history", "negatives", "target", "wide")
Row = dict[str, Any]


def days(number: int, base: date = D) -> date:
    return base + timedelta(days=number)


def at(number: float) -> datetime:
    return datetime(D.year, D.month, D.day, tzinfo=UTC) + timedelta(days=number)


def make_events(
    rng: random.Random, users: int, start: int, stop: int, tag: str = "", late_days: int = 2
) -> list[Row]:
    rows = []
    for number in range(users * 12):
        when = at(start) + timedelta(minutes=rng.randint(0, (stop - start) * 1440 - 1))
        arrived = when + timedelta(days=rng.choice([0, 0, 0, late_days]))
        item = rng.randint(1, 9)
        over = {
            "event_id": f"{tag}{number}",
            "event_time": when,
            "ingest_time": arrived,
            "event_date": when.date(),
            "ingest_date": arrived.date(),
            "item_id": f"i{item}",
            "category_id": f"c{item % 4}",
            "order_id": f"{tag}{number // 2}",
            "price": rng.randint(1, 900) / 100,
            "coupon_amount": rng.choice([0.0, 0.5]),
        }
        rows.append(make_event(f"u{rng.randrange(users)}", 0, **over))
    return rows


def is_known(row: Row) -> bool:
    return bool(row["event_time"] < at(0) and row["ingest_time"] < at(0))


def make_world(events: list[Row], send_days: tuple[int, ...] = (0,), users: int = 8) -> dict[str, list[Row]]:
    """Campaigns a, b start on each send day; users u0.. get them, the last two users have no event."""
    world: dict[str, list[Row]] = {
        "events": events,
        "campaigns": [],
        "sends": [],
        "redemptions": [],
        "users": [],
    }
    coupons = {
        "a": [("k1", "c1", ["i1", "i5"]), ("k2", "c1", ["i1"]), ("k3", "never sold", []), ("k4", None, [])]
    }
    coupons["b"] = [("k5", "c2", [])]
    world["conversions"] = []
    for number in send_days:
        for name, offers in coupons.items():
            campaign = f"{name}{number}"
            over = {"start_date": days(number), "end_date": days(number + 9), "coupons": offers}
            over |= {"campaign_type": "Type A", "ingest_date": days(number)}
            world["campaigns"].append(make_row("campaigns", campaign_id=campaign, **over))
            for user in range(users):
                over = {"send_id": f"{campaign}:u{user}", "campaign_id": campaign, "user_id": f"u{user}"}
                when = {"delivered_time": at(number), "send_date": days(number), "ingest_date": days(number)}
                world["sends"].append(make_row("sends", **over, **when))
                if user % 3 == 0:
                    hit = {"converted_time": at(number + 1), "send_date": days(number), "num_conversions": 1}
                    world["conversions"].append(make_row("conversions", **over, **hit))
    for user in range(users):
        world["users"].append(
            make_row("users", user_id=f"u{user}", has_attributes=user % 2 == 0, snapshot_date=days(-50))
        )
    return world


def make_inputs(spark: SparkSession, world: dict[str, list[Row]], before: date = D) -> examples.Inputs:
    """Inputs of a world; the vocabulary is built from its events known before ``before``."""
    frames = {
        name: make_frame(spark, name, world[name]) for name in ("campaigns", "sends", "redemptions", "users")
    }
    raw = make_frame(spark, "events", world["events"])
    visible = raw.where((F.col("event_date") < F.lit(before)) & (F.to_date("ingest_time") < F.lit(before)))
    terms = vocabulary.build(vocabulary.count_values(visible), 1, ALL_DATES).cache()
    events = examples.prepare_events(raw, terms, "UTC")
    version = vocabulary.version_of(terms)
    return examples.Inputs(events, **frames, vocabulary=terms, vocabulary_version=version)


def adjusted(config: Config, **over: Any) -> Config:
    splits = {
        "train_start": date(2024, 2, 1),
        "valid_start": date(2024, 4, 1),
        "test_start": date(2024, 4, 20),
    }
    chosen = config.examples.model_copy(update=splits | {"history_length": 6} | over)
    windows = config.conversions.model_copy(update={"window": "campaign"})
    return config.model_copy(update={"examples": chosen, "conversions": windows})


def training_rows(
    spark: SparkSession, inputs: examples.Inputs, world: dict[str, list[Row]], config: Config
) -> dict[str, dict[str, Any]]:
    converted = make_frame(spark, "conversions", world["conversions"])
    labelled = examples.label_sends(inputs.sends, inputs.campaigns, converted, config, UNTIL)
    frame = examples.build_training(inputs, labelled, config, UNTIL).frame
    return {row["example_id"]: row.asDict() for row in frame.collect()}


def features_of(rows: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    return {key: tuple(row[name] for name in FEATURES) for key, row in rows.items()}


def late_is_ignored(inputs: examples.Inputs) -> examples.Inputs:
    """The planted leak: events count from their own time on, whenever they arrived."""
    leaky = inputs.events.withColumn("ingest_time", F.col("event_time")).withColumn(
        "known_date", F.col("event_date")
    )
    return replace(inputs, events=leaky)


def test_nothing_after_as_of_changes_a_feature_and_a_planted_leak_is_found(
    spark: SparkSession, config: Config
) -> None:
    config = adjusted(config)
    events = make_events(random.Random(1), 6, -60, 20, late_days=30)
    before = make_world(events)
    kept = [row for row in events if is_known(row)]
    unknown = [row for row in events if not is_known(row)]
    changed = [
        row | {"item_id": "i1", "category_id": "c9", "price": 99.0} for row in unknown[::2]
    ]  # half deleted
    added = [row for row in make_events(random.Random(2), 6, -60, 20, "new", 30) if not is_known(row)]
    backdated = {"event_time": at(-3), "event_date": days(-3), "ingest_time": at(-3), "item_id": "i1"}
    filed_late = make_event("u0", 0, **backdated, event_id="filed late", ingest_date=days(0))
    after = make_world([*added, *changed, *kept, filed_late])
    after["conversions"] = after["conversions"][:1]
    redeemed = {"user_id": "u1", "campaign_id": "a0"}
    after["redemptions"] = [
        make_row(
            "redemptions", redemption_id=str(n), redemption_time=at(when), ingest_date=days(known), **redeemed
        )
        for n, (when, known) in enumerate([(0, 0), (3, 3), (-5, 0)])
    ]
    for user in range(8):  # a snapshot of the cut-off's own day is delivered after it
        fresh = {"has_attributes": user % 2 != 0, "snapshot_date": days(0)}
        after["users"].append(make_row("users", user_id=f"u{user}", **fresh))
    late_before = [row for row in changed + added if row["event_time"] < at(0)]
    assert len(late_before) > 2, "the world must hold events that happened before and arrived after"
    worlds = [(make_inputs(spark, world), world) for world in (before, after)]
    first, second = (training_rows(spark, inputs, world, config) for inputs, world in worlds)
    assert len(first) == 16
    assert features_of(first) == features_of(second)
    labels = [{key: row["label"] for key, row in rows.items()} for rows in (first, second)]
    assert sum(labels[0].values()) == 6
    assert sum(labels[1].values()) == 1
    leaks = [training_rows(spark, late_is_ignored(inputs), world, config) for inputs, world in worlds]
    assert features_of(leaks[0]) != features_of(leaks[1]), "this test cannot see a leak"


def test_training_and_scoring_features_are_the_same_bytes(spark: SparkSession, config: Config) -> None:
    config = adjusted(config)
    world = make_world(make_events(random.Random(3), 6, -60, 1))
    inputs = make_inputs(spark, world)
    training = training_rows(spark, inputs, world, config)
    scoring = {row["user_id"]: row for row in examples.build_scoring(inputs, "a0", D, config).collect()}
    assert set(scoring) == {f"u{n}" for n in range(8)}
    for user, row in scoring.items():
        trained = training[f"a0:{user}:{D}"]
        assert (row["length"], row["history"], row["targets"], row["wide"]) == tuple(
            trained[name] for name in ("length", "history", "target", "wide")
        )
        assert (row["target_ids"], row["target_sizes"]) == (["a0"], [3])
    categories = np.frombuffer(scoring["u0"]["targets"], dtype="<i4").reshape(-1, 3)
    assert categories.tolist() == [[0, 1, 0], [0, 3, 0], [0, 3, 0]]  # OOV, and c1 of two coupons
    assert [scoring[user]["length"] for user in ("u6", "u7")] == [0, 0]
    assert scoring["u6"]["history"] == training[f"a0:u6:{D}"]["negatives"] == b""
    assert scoring["u0"]["length"] == 6
    drawn = 0
    for row in training.values():
        history = np.frombuffer(row["history"], dtype="<i4").reshape(-1, 5)
        negatives = np.frombuffer(row["negatives"], dtype="<i4").reshape(-1, 2)
        blocked = set(np.frombuffer(row["target"], dtype="<i4").reshape(-1, 3)[:, 1].tolist())
        assert len(history) == len(negatives)
        assert (history > 0)[:, :4].all()
        assert not (negatives[:, 0] == history[:, 0]).any()
        assert not blocked & set(negatives[:, 1].tolist())
        drawn += int((negatives > 0).all(axis=1).sum())
    assert drawn > 40


def test_splits_at_every_border(spark: SparkSession, config: Config) -> None:
    chosen = config.examples.model_copy(
        update={"train_start": days(0), "valid_start": days(30), "test_start": days(60)}
    )
    zone = "America/New_York"
    second = timedelta(seconds=1)
    train_end, valid_end, complete = (day_start(days(n), zone) for n in (30, 60, 90))
    cases = [
        (days(-1), train_end, "no_history"),
        (days(-1), complete + second, "no_history"),
        (days(0), train_end, "train"),
        (days(0), train_end + second, "train_late"),
        (days(0), complete + second, "censored"),
        (days(29), train_end, "train"),
        (days(30), train_end, "valid"),
        (days(30), valid_end, "valid"),
        (days(30), valid_end + second, "embargo"),
        (days(59), complete, "embargo"),
        (days(60), valid_end, "test"),
        (days(60), complete, "test"),
        (days(60), complete + second, "censored"),
    ]
    frame = spark.createDataFrame(cases, "as_of_date date, label_end timestamp, expected string")
    rows = frame.withColumn("split", examples.split_of(chosen, zone, complete)).collect()
    assert [row["split"] for row in rows] == [expected for _, _, expected in cases]


def test_rows_lie_in_hash_order_in_files_of_one_split(spark: SparkSession, config: Config) -> None:
    world = make_world(make_events(random.Random(4), 6, -60, 1), (0, 40), users=40)
    config = adjusted(config)
    inputs = make_inputs(spark, world)
    converted = make_frame(spark, "conversions", world["conversions"])
    labelled = examples.label_sends(
        inputs.sends, inputs.campaigns, converted, config, UNTIL + timedelta(days=30)
    )
    built = examples.build_training(inputs, labelled, config, UNTIL)
    assert built.splits == {"train": 80, "train_late": 0, "valid": 80, "embargo": 0, "test": 0}
    assert built.max_rows_per_file == 10
    rows = (
        built.frame.withColumn("file", F.spark_partition_id()).select("file", "split", "row_hash").collect()
    )
    files: dict[int, list[tuple[str, int]]] = {}
    for row in rows:
        files.setdefault(row["file"], []).append((row["split"], row["row_hash"]))
    assert sorted(len(file) for file in files.values()) == [10] * 16
    assert all(len({split for split, _ in file}) == 1 and file == sorted(file) for file in files.values())


def test_a_range_without_a_mature_label_is_refused(spark: SparkSession, config: Config) -> None:
    world = make_world([make_event("u0", 0)])
    inputs = make_inputs(spark, world)
    converted = make_frame(spark, "conversions", [])
    labelled = examples.label_sends(
        inputs.sends, inputs.campaigns, converted, adjusted(config), at(10) - timedelta(seconds=1)
    )
    with pytest.raises(
        DataError, match=r"as_of 2024-03-01 has label_end 2024-03-11 .* watermark 2024-03-10 23:59"
    ):
        examples.build_training(inputs, labelled, adjusted(config), at(10) - timedelta(seconds=1))


def run_job(spark: SparkSession, module: Any, config: Config, dates: DateRange, campaign: str = "") -> Run:
    job = Run(config, dates, runs.start("test", str(dates), {}, ""), campaign)
    module.run(spark, job)
    return job


def test_day_runs_equal_a_range_run_and_a_rerun_changes_nothing(spark: SparkSession, config: Config) -> None:
    config = adjusted(config)
    root_uri = config.lake.root_uri
    world = make_world(make_events(random.Random(5), 6, -60, 60), (0, 45, 55))
    world["user_days"] = []
    redeemed = {"redemption_id": "r", "user_id": "u1", "campaign_id": "a0", "redemption_time": at(-5)}
    world["redemptions"] = [make_row("redemptions", ingest_date=days(-n), **redeemed) for n in (2, 4)]
    resent = [row | {"ingest_date": days(2), "campaign_id": "b0"} for row in world["sends"][:3]]
    for name, rows in world.items():
        write(make_frame(spark, name, rows + (resent if name == "sends" else [])), root_uri, name)
    first = run_job(spark, build_vocabulary, config, DateRange(days(-60), days(0)))
    again = run_job(spark, build_vocabulary, config, DateRange(days(-60), days(0)))
    version = first.facts["vocabulary_version"]
    assert again.facts["vocabulary_version"] == version == vocabulary.current(root_uri).version
    inputs = examples.read_inputs(spark, config, days(50))  # copies count once, as they came first
    assert [row["ingest_date"] for row in inputs.redemptions.collect()] == [days(-4)]
    wanted = make_frame(spark, "sends", world["sends"])
    assert tables.content_hash(inputs.sends) == tables.content_hash(wanted)
    job = run_job(spark, build_examples, config, DateRange(days(-10), days(60)))
    assert job.facts["splits"] == {"train": 16, "train_late": 0, "valid": 0, "embargo": 16, "test": 0}
    assert job.facts["left_out"] == {"no_history": 0, "censored": 16}
    assert job.rows == {"training_examples": 32, "population": 48}
    assert job.facts["vocabulary_version"] == version
    whole = tables.content_hash(tables.read(spark, root_uri, "training_examples"))
    for day in (45, 0):
        run_job(spark, build_examples, config, DateRange.day(days(day)))
    stored = tables.read(spark, root_uri, "training_examples")
    assert tables.content_hash(stored) == whole
    scored = run_job(spark, build_examples, config, DateRange.day(days(45)), "b45")
    assert scored.rows == {"scoring_examples": 8, "histories": 8}
    histories = {
        row["user_id"]: row["history"] for row in tables.read(spark, root_uri, "histories").collect()
    }
    trained = stored.where("target_id = 'b45'").select("user_id", "history").collect()
    assert histories == {row["user_id"]: row["history"] for row in trained}
    with pytest.raises(DataError, match="no label is mature"):
        run_job(spark, build_examples, config, DateRange.day(days(55)))


def write(frame: DataFrame, root_uri: str, table: str) -> None:
    column = {"conversions": "send_date", "users": "snapshot_date", "user_days": "event_date"}.get(
        table, "ingest_date"
    )
    assert column in frame.columns
    tables.overwrite(frame, root_uri, table, DateRange(date(2023, 1, 1), date(2025, 1, 1)))
