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
from couponflow.dates import DateRange
from couponflow.entry import Run
from couponflow.errors import ConfigError, DataError
from couponflow.lake import literals, runs, tables
from couponflow.sections import VocabularyConfig
from couponflow.sequences import datasets, examples, labels, vocabulary
from couponflow.training import manifests
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
        "orders": [],
        "catalogue": [],
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
    names = ("campaigns", "sends", "redemptions", "users", "orders", "catalogue")
    frames = {name: make_frame(spark, name, world[name]) for name in names}
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
    labelled = labels.label_sends(inputs.sends, inputs.campaigns, converted, config, UNTIL)
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


@pytest.mark.nightly  # minutes; test_leaks plants leaks in every run
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
    scoring = {row["user_id"]: row for row in examples.build_scoring(inputs, ("a0",), D, config).collect()}
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


@pytest.mark.parametrize("bucket_rows", [datasets.BUCKET_ROWS, 7])
def test_rows_lie_in_hash_order_in_files_of_one_split(
    spark: SparkSession, bucket_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sorting each split whole; ranges of hashes from one to many, equal hashes, empty splits."""
    monkeypatch.setattr(datasets, "BUCKET_ROWS", bucket_rows)
    rng = random.Random(4)
    sizes = {"train": 163, "train_late": 1, "valid": 80, "embargo": 0, "test": 3}
    rows = []
    for split, size in sizes.items():
        hashes = [
            rng.choice([-(2**63), -1, 0, 2**63 - 1, rng.randint(-(2**63), 2**63 - 1)]) for _ in range(size)
        ]
        rows += [(split, value, f"{split}{n}") for n, value in enumerate(hashes)]
    rng.shuffle(rows)
    frame = literals.frame(spark, rows, "split string, row_hash bigint, example_id string")
    placed, num_files, largest = datasets.place_in_files(frame, sizes, num_ranks=4)
    written = placed.repartition(num_files, "file_key").withColumn("file", F.spark_partition_id()).collect()
    files: dict[int, list[tuple[str, int, str]]] = {}
    for row in written:
        files.setdefault(row["file"], []).append((row["split"], row["row_hash"], row["example_id"]))
    expected = []
    for split, size in sizes.items():
        ordered = sorted(row for row in rows if row[0] == split)
        count = max(1, size // 10)  # 163 rows over 4 files per rank
        cut = [[row for p, row in enumerate(ordered) if p * count // size == n] for n in range(count)]
        expected += [file for file in cut if file]
    assert sorted(sorted(file) for file in files.values()) == sorted(expected)
    assert (num_files, largest) == (len(expected), max(map(len, expected)))


def test_a_range_without_a_mature_label_is_refused(spark: SparkSession, config: Config) -> None:
    world = make_world([make_event("u0", 0)])
    inputs = make_inputs(spark, world)
    converted = make_frame(spark, "conversions", [])
    labelled = labels.label_sends(
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
    assert job.facts["left_out"] == {"no_history": 0, "censored": 16, "no_window": 0, "sampled_out": 0}
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
    dataset = manifests.load(root_uri)
    assert (dataset.rows("train"), dataset.rows("embargo"), dataset.sampling_rate) == (16, 16, 1.0)
    assert sum(sum(groups) for groups in dataset.row_groups.values()) == 32
    assert dataset.folds == tuple(job.facts["folds"]) == ()


def test_a_version_may_be_named_and_must_fit_the_events(spark: SparkSession, config: Config) -> None:
    """Exit code 3 before anything is written; folds, sampling and marked rows in the manifest beside."""
    config = adjusted(config, cutoffs=(days(0), days(20), days(45)), negative_share=0.3)
    root_uri = config.lake.root_uri
    world = make_world(make_events(random.Random(5), 6, -60, 60), (0, 45), users=20)
    world["user_days"] = []
    for name, rows in world.items():
        write(make_frame(spark, name, rows), root_uri, name)
    counts = vocabulary.count_values(make_frame(spark, "events", world["events"][:1]))
    unseen = vocabulary.build(counts, 1, ALL_DATES)
    name = vocabulary.version_of(unseen)
    tables.overwrite(unseen, root_uri, "vocabularies", version=name)
    named = config.examples.model_copy(update={"vocabulary_version": name})
    config = config.model_copy(update={"examples": named})
    strict = VocabularyConfig()  # at most a fifth
    dates = DateRange(days(0), days(60))
    with pytest.raises(
        DataError, match=rf"vocabulary {name}, field item: \d+.\d% of the values read are OOV"
    ):
        run_job(spark, build_examples, config.model_copy(update={"vocabulary": strict}), dates)
    assert not tables.exists(spark, root_uri, "training_examples")
    with pytest.raises(DataError, match="has no version v0"):
        examples.read_inputs(spark, adjusted(config, vocabulary_version="v0"), days(1))
    job = run_job(spark, build_examples, config, dates)
    assert job.facts["vocabulary_version"] == name
    assert set(job.facts["oov_share"]) == set(vocabulary.COLUMNS)
    rows = tables.read(spark, root_uri, "training_examples").collect()
    kept = [row for row in rows if row["split"] == "train"]
    sampled_out = job.facts["left_out"]["sampled_out"]
    assert len(kept) + sampled_out == 40
    assert 5 < sampled_out < 26  # of 26 negatives
    assert job.rows["population"] == 80 == len(rows) + sampled_out
    assert {(row["label"], row["sampling_rate"]) for row in kept} == {(1, 1.0), (0, 0.3)}
    assert {row["sampling_rate"] for row in rows if row["split"] != "train"} == {1.0}
    dataset = manifests.load(root_uri)
    assert (dataset.sampling_rate, dataset.vocabulary_version) == (0.3, name)
    found = [[fold[f"{part}_rows"] for part in ("train", "test")] for fold in dataset.folds]
    assert found == [[0, len(kept)], [len(kept), 0], [len(kept), 40]]
    assert dataset.folds == tuple(job.facts["folds"])
    again = examples_of(config, negative_share=0.5)
    with pytest.raises(
        DataError, match=r"kept at the rates 0.3 and 0.5, .* with one examples.negative_share"
    ):
        run_job(
            spark, build_examples, examples_of(again, valid_start=date(2024, 6, 1)), DateRange.day(days(45))
        )
    run_job(spark, build_examples, config, DateRange.day(days(45)))
    place = f"delta.`{tables.table_uri(root_uri, 'training_examples')}`"
    spark.sql(f"ALTER TABLE {place} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    spark.sql(f"DELETE FROM {place} WHERE example_id = '{kept[0]['example_id']}'")
    marked = datasets.describe(spark, config, unseen, name)
    assert sum(marked["files"]["train"].values()) == len(kept) - 1
    with pytest.raises(DataError, match="deletion vectors"):
        manifests.write(root_uri, manifests.Dataset(**marked), "r")


def examples_of(config: Config, **over: Any) -> Config:
    return config.model_copy(update={"examples": config.examples.model_copy(update=over)})


def write(frame: DataFrame, root_uri: str, table: str) -> None:
    days = {"conversions": "send_date", "user_days": "event_date"}
    column = (days | dict.fromkeys(("users", "catalogue"), "snapshot_date")).get(table, "ingest_date")
    assert column in frame.columns
    tables.overwrite(frame, root_uri, table, DateRange(date(2023, 1, 1), date(2025, 1, 1)))


def test_labels_and_treatment_change_no_row_and_no_feature(spark: SparkSession, config: Config) -> None:
    """The population is fixed before labels are read, and a coupon that only buyers hold tells nothing."""
    config = adjusted(config)
    world = make_world(make_events(random.Random(6), 6, -60, 1))
    found = []
    for buyers in (set(), {f"u{n}" for n in range(8)}, {"u1", "u4"}):
        treated = dict(world)
        treated["conversions"] = [
            make_row(
                "conversions",
                send_id=row["send_id"],
                campaign_id=row["campaign_id"],
                user_id=row["user_id"],
                converted_time=at(1),
                num_conversions=1,
                send_date=days(0),
            )
            for row in world["sends"]
            if row["user_id"] in buyers
        ]
        treated["sends"] = [
            row | {"coupon_id": "k1" if row["user_id"] in buyers else None, "propensity": len(buyers) / 8}
            for row in world["sends"]
        ]
        rows = training_rows(spark, make_inputs(spark, treated), treated, config)
        assert sum(row["label"] for row in rows.values()) == 2 * len(buyers)
        found.append(features_of(rows))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 16


def test_one_day_holds_the_targets_of_several_campaigns(spark: SparkSession, config: Config) -> None:
    config = adjusted(config)
    world = make_world(make_events(random.Random(7), 6, -60, 1))
    inputs = make_inputs(spark, world)
    names = examples.parse_campaigns("b0, a0,b0")
    assert names == ("a0", "b0")
    both, *single = (
        {row["user_id"]: row for row in examples.build_scoring(inputs, chosen, D, config).collect()}
        for chosen in (names, ("a0",), ("b0",))
    )
    assert set(both) == {f"u{n}" for n in range(8)}
    for user, row in both.items():
        alone = [rows[user] for rows in single]
        assert row["target_ids"] == ["a0", "b0"]
        assert row["target_sizes"] == [3, 1]
        assert row["targets"] == alone[0]["targets"] + alone[1]["targets"]
        assert row["wide"] == alone[0]["wide"] + alone[1]["wide"]
        assert (row["history"], row["length"]) == (alone[0]["history"], alone[0]["length"])
        assert alone[0]["wide"] != alone[1]["wide"]
    with pytest.raises(ConfigError, match="campaign 'z' is not in table campaigns"):
        examples.build_scoring(inputs, ("a0", "z"), D, config)
    with pytest.raises(ConfigError, match="remove the empty one"):
        examples.parse_campaigns("18,,19")


def test_a_popularity_table_beyond_its_bound_is_refused(
    spark: SparkSession, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(spark, make_world(make_events(random.Random(8), 6, -60, 1)))
    table = examples.build_popularity(inputs.events, config.examples, D, "UTC")
    cells = table.weights.size
    assert cells == len(table.pairs) * len(table.starts_minutes) > 50
    monkeypatch.setattr(examples, "MAX_POPULARITY_CELLS", cells)
    examples.build_popularity(inputs.events, config.examples, D, "UTC")
    monkeypatch.setattr(examples, "MAX_POPULARITY_CELLS", cells - 1)
    with pytest.raises(ConfigError, match=rf"are {cells} cells, .* raise examples.negative_refresh_days"):
        examples.build_popularity(inputs.events, config.examples, D, "UTC")
