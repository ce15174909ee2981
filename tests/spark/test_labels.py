"""Labels: splits at their borders, gap and returns before a label is final, sampling and folds."""

import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from builders import make_frame, make_row
from oracles import xxhash64
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import day_start
from couponflow.lake import literals
from couponflow.sections import ExamplesConfig
from couponflow.sequences import datasets, labels

D = date(2024, 3, 1)
Row = dict[str, Any]


def days(number: int) -> date:
    return D + timedelta(days=number)


def at(number: float) -> datetime:
    return datetime(D.year, D.month, D.day, tzinfo=UTC) + timedelta(days=number)


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
    frame = literals.frame(spark, cases, "as_of_date date, mature_time timestamp, expected string")
    rows = frame.withColumn("split", labels.split_of(chosen, zone, complete)).collect()
    assert [row["split"] for row in rows] == [expected for _, _, expected in cases]


def labelled(
    spark: SparkSession, config: Config, until: datetime, sends: list[Row], campaigns: list[Row]
) -> dict[str, Row]:
    converted = make_frame(spark, "conversions", [])
    frames = make_frame(spark, "sends", sends), make_frame(spark, "campaigns", campaigns)
    rows = labels.label_sends(*frames, converted, config, until).collect()
    return {row["user_id"]: row.asDict() for row in rows}


@pytest.mark.parametrize(("gap", "returns"), [(0, 0), (2, 0), (0, 5), (2, 5)])
def test_a_label_is_final_after_gap_window_and_returns(
    spark: SparkSession, config: Config, gap: int, returns: int
) -> None:
    chosen = config.examples.model_copy(
        update={"train_start": days(0), "valid_start": days(100), "test_start": days(200)}
    )
    window = {"window": "days", "label_days": 7, "gap_days": gap, "return_days": returns}
    settings = config.model_copy(
        update={"examples": chosen, "conversions": config.conversions.model_copy(update=window)}
    )
    send = make_row("sends", send_id="s", user_id="u", delivered_time=at(0.5), send_date=days(0))
    mature = at(0.5 + gap + 7 + returns)
    for until, split in ((mature, "train"), (mature - timedelta(microseconds=1), "censored")):
        row = labelled(spark, settings, until, [send], [])["u"]
        assert (row["split"], row["as_of"].replace(tzinfo=UTC)) == (split, at(0))
        assert row["label_end"].astimezone(UTC) == at(0.5 + gap + 7)
        assert row["mature_time"].astimezone(UTC) == mature


def test_a_campaign_that_ends_inside_the_gap_gives_no_negative(spark: SparkSession, config: Config) -> None:
    chosen = config.examples.model_copy(
        update={"train_start": days(0), "valid_start": days(100), "test_start": days(200)}
    )
    window = config.conversions.model_copy(update={"window": "campaign", "gap_days": 3})
    settings = config.model_copy(update={"examples": chosen, "conversions": window})
    campaign = make_row("campaigns", campaign_id="c", start_date=days(0), end_date=days(4), coupons=[])
    sends = [
        make_row(
            "sends",
            send_id=f"s{n}",
            campaign_id="c",
            user_id=f"u{n}",
            delivered_time=at(n),
            send_date=days(n),
        )
        for n in (0, 1, 2, 4)
    ]
    rows = labelled(spark, settings, at(90), sends, [campaign])
    assert {user: row["split"] for user, row in rows.items()} == {
        "u0": "train",
        "u1": "train",  # one day is left
        "u2": "no_window",
        "u4": "no_window",
    }


def sampled(frame: DataFrame, share: float, seed: int = 0) -> dict[str, Row]:
    section = ExamplesConfig(negative_share=share, seed=seed)
    return {row["example_id"]: row.asDict() for row in labels.sample_negatives(frame, section).collect()}


def test_sampling_takes_training_negatives_only_and_equals_an_oracle(spark: SparkSession) -> None:
    rng = random.Random(3)
    splits = [*labels.SPLITS, "censored", "no_history"]
    rows = [(f"c:ü{n}:{'x' * (n % 40)}", rng.choice(splits), int(rng.random() < 0.3)) for n in range(3000)]
    frame = literals.frame(spark, rows, "example_id string, split string, label int")
    found = {share: sampled(frame, share) for share in (1.0, 0.5, 0.25, 0.001)}
    salt = xxhash64("negative_share 0") % 2**64
    for share, by_id in found.items():
        for name, split, label in rows:
            is_candidate = split == "train" and label == 0
            uniform = ((xxhash64(name, salt) % 2**64) >> 11) / 2**53
            kept = not is_candidate or uniform < share
            assert by_id[name]["split"] == (split if kept else "sampled_out")
            assert by_id[name]["sampling_rate"] == (share if is_candidate else 1.0)
            assert by_id[name]["label"] == label
    gone = {share: sum(row["split"] == "sampled_out" for row in found[share].values()) for share in found}
    candidates = sum(split == "train" and label == 0 for _, split, label in rows)
    assert gone[1.0] == 0
    assert abs(gone[0.5] - candidates / 2) < 4 * (candidates / 4) ** 0.5
    assert found[0.5] == sampled(frame.repartition(7).orderBy("label"), 0.5)  # order-free
    assert found[0.5] != sampled(frame, 0.5, seed=1)
    kept = {
        share: {name for name, row in by_id.items() if row["split"] != "sampled_out"}
        for share, by_id in found.items()
    }
    assert kept[0.001] < kept[0.25] < kept[0.5] < kept[1.0]
    splits_found, left_out = labels.count_splits(labels.sample_negatives(frame, ExamplesConfig()), at(0))
    assert sum(splits_found.values()) + sum(left_out.values()) == len(rows)
    _, left_out = labels.count_splits(
        labels.sample_negatives(frame, ExamplesConfig(negative_share=0.25)), at(0)
    )
    assert left_out["sampled_out"] == gone[0.25]


def test_folds_are_purged_and_counted_as_an_oracle_counts_them(spark: SparkSession) -> None:
    rng = random.Random(5)
    zone = "America/New_York"
    rows = []
    for _ in range(2000):
        as_of = day_start(days(rng.randrange(120)), zone)
        mature = as_of + timedelta(days=rng.randint(1, 40), seconds=rng.choice([0, 0, 1]))
        rows.append((as_of, mature, int(rng.random() < 0.2)))
    frame = literals.frame(spark, rows, "as_of timestamp, mature_time timestamp, label int")
    cutoffs = (days(-5), days(20), days(50), days(90), days(119), days(130))
    found = datasets.count_folds(frame, cutoffs, zone)
    starts = [day_start(day, zone) for day in cutoffs]
    for fold, start, end in zip(found, starts, [*starts[1:], None], strict=True):
        train = [row for row in rows if row[1] <= start]
        test = [row for row in rows if row[0] >= start and (end is None or row[0] < end)]
        assert not set(map(id, train)) & set(map(id, test))
        assert all(row[1] <= start for row in train)
        assert fold["train_positives"] == sum(row[2] for row in train)
        counted = {part: fold[f"{part}_rows"] for part in ("train", "test")}
        assert counted == {"train": len(train), "test": len(test)}
        assert fold["test_positives"] == sum(row[2] for row in test)
        assert (fold["start"], fold["end"]) == (start.isoformat(), end.isoformat() if end else "")
    assert found[0]["train_rows"] == found[-1]["test_rows"] == 0
    assert sum(fold["test_rows"] for fold in found) == len(rows)  # every row is tested once at most
    assert datasets.count_folds(frame, (), zone) == []
    (only,) = datasets.count_folds(frame.where(F.lit(False)), (days(1),), zone)
    assert (only["train_rows"], only["test_positives"]) == (0, 0)
