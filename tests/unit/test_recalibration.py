"""Calibrators from dated rows: what was final by when, which campaign is the prior, what may be refitted."""

import json
import logging
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import test_config
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts
from couponflow.models.batch import RANDOM_SIZES
from couponflow.models.bundle import Bundle, load_bundle
from couponflow.models.calibration import Calibrator, logit, sigmoid
from couponflow.models.tabular import CAMPAIGN_TYPES, Logistic, Rate
from couponflow.training import calibrators, feed, fitting, manifests, metrics, recalibration, registry
from couponflow.training.workers import Workers

WIDTH = len(layouts.WIDE_FEATURES)
TYPES = {letter: layouts.WIDE_FEATURES.index(f"is_type_{letter}") for letter in "abc"}
#: Campaign -> type, split, day of the send and day on which labels are final, rows, base logit.
CAMPAIGNS: dict[str, tuple[str, str, str, str, int, float]] = {
    "a1": ("a", "train", "2024-01-10", "2024-01-20", 500, -1.0),
    "b1": ("b", "train", "2024-01-10", "2024-01-20", 500, -1.5),
    "late": ("b", "train_late", "2024-01-30", "2024-02-10", 100, -1.5),
    "a2": ("a", "valid", "2024-02-05", "2024-02-15", 500, -1.0),
    "b2": ("b", "valid", "2024-02-05", "2024-02-15", 400, -2.0),
    "b3": ("b", "valid", "2024-02-12", "2024-02-26", 400, -0.5),
    "c3": ("c", "embargo", "2024-02-20", "2024-03-10", 50, -1.0),
    "a3": ("a", "test", "2024-03-05", "2024-03-20", 400, 0.5),
    "b4": ("b", "test", "2024-03-20", "2024-04-05", 400, 1.5),
}
VALID = DateRange.parse("2024-02-05:2024-02-19")


def instant(day: str) -> datetime:
    return datetime.fromisoformat(day).replace(tzinfo=UTC)


def make_rows() -> dict[str, list[dict[str, Any]]]:
    generator = np.random.default_rng(0)
    splits: dict[str, list[dict[str, Any]]] = {}
    for campaign, (letter, split, sent, final, size, base) in CAMPAIGNS.items():
        for number in range(size):
            wide = np.zeros(WIDTH)
            wide[0] = generator.normal()
            wide[TYPES[letter]] = 1.0
            splits.setdefault(split, []).append(
                {
                    "example_id": f"{campaign}:{number:04}",
                    "user_id": f"u{number}",
                    "target_id": campaign,
                    "split": split,
                    "vocabulary_version": "v1",
                    "label": int(generator.random() < sigmoid(np.array(1.5 * wide[0] + base))),
                    "history": b"",
                    "negatives": b"",
                    "target": np.array([[0, 2, 0]], "<i4").tobytes(),
                    "wide": wide.astype("<f4").tobytes(),
                    "as_of": instant(sent),
                    "mature_time": instant(final),
                }
            )
    return splits


ROWS = make_rows()


def rates(*campaigns: str) -> float:
    labels = [row["label"] for rows in ROWS.values() for row in rows if row["target_id"] in campaigns]
    return float(np.mean(labels))


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    """Config of a lake with one file of examples per split."""
    config = settings_of(tmp_path)
    folder = tmp_path / "files"
    folder.mkdir()
    files = {}
    for split, rows in ROWS.items():
        table = pa.Table.from_pylist(rows)
        place = table.schema.get_field_index("label")
        path = folder / f"{split}.parquet"
        pq.write_table(table.set_column(place, "label", table["label"].cast("int32")), path)
        files[split] = {path.as_uri(): len(rows)}
    dataset = manifests.Dataset(3, "v1", dict(RANDOM_SIZES), layouts.WIDE_FEATURES, files)
    manifests.write(config.lake.root_uri, dataset, "build")
    return config


def settings_of(tmp_path: Path, *overrides: str) -> Config:
    days = ("train_start=2024-01-05", "valid_start=2024-02-01", "test_start=2024-03-01")
    more = [f"examples.{day}" for day in days]
    return test_config(tmp_path, *more, "run.run_date=2024-04-01", *overrides)


def train(config: Config) -> str:
    _, facts = fitting.train(config, "logistic", "run-1", [])
    return str(facts["model_version"])


def bundle_of(config: Config, version: str) -> Bundle:
    return load_bundle(Path(config.lake.root_uri) / "models" / version)


# ---------------------------------------------------------------------------------------------------- priors
def test_the_latest_matured_campaign_of_each_type() -> None:
    """Against the slow version, on random campaigns, some of them with a row that is not final yet."""
    generator = np.random.default_rng(3)
    for _ in range(20):
        rows, told = [], []
        for number in range(12):
            letter, day = "ab"[generator.integers(2)], int(generator.integers(0, 9))
            wide = np.zeros(WIDTH, "<f4")
            wide[TYPES[letter]] = 1.0
            final = [int(generator.integers(day, 14)) for _ in range(3)]
            labels = generator.integers(0, 2, 3).tolist()
            told.append((letter, day, f"c{number:02}", max(final), float(np.mean(labels))))
            rows += [
                feed.Example(
                    wide.tobytes(), label, target_id=f"c{number:02}", as_of=day, mature_time=final_day
                )
                for label, final_day in zip(labels, final, strict=True)
            ]
        found = calibrators.latest_matured(rows, 10)
        for letter in "ab":
            ripe = sorted(
                (day, name, rate) for kind, day, name, last, rate in told if kind == letter and last <= 10
            )
            prior = found.get(f"type_{letter}")
            assert (prior and (prior.campaign_id, prior.rate)) == (ripe[-1][1:] if ripe else None)
    assert calibrators.latest_matured([], 10) == {}


def test_shifts_are_differences_of_logits_and_what_is_unknown_stays(caplog: pytest.LogCaptureFixture) -> None:
    types = np.array(["type_a"] * 10 + ["type_b"] * 4 + ["other"] * 2)
    label = np.array([1.0] * 2 + [0.0] * 8 + [1.0] * 2 + [0.0] * 2 + [0.0] * 2)
    priors = {
        "type_a": calibrators.Prior("type_a", "7", 0.05),
        "type_c": calibrators.Prior("type_c", "8", 0.5),
        "other": calibrators.Prior("other", "9", 0.5),
    }
    logging.getLogger("couponflow").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, "couponflow"):
        shifts = calibrators.prior_shifts(types, label, priors)
    assert shifts == {"type_a": pytest.approx(logit(0.05) - logit(0.2))}
    text = caplog.text
    for kind, reason in (("type_b", "no matured campaign"), ("type_c", "no rate"), ("other", "no rate")):
        assert f"{kind}: not moved, {reason}" in text
    assert calibrators.prior_shifts(types, label, {"type_b": calibrators.Prior("type_b", "1", 1.0)}) == {}


def test_training_moves_types_to_what_was_final_before_the_test_range(
    settings: Config, tmp_path: Path
) -> None:
    config = settings_of(tmp_path, "calibration.prior=latest_matured")
    for split in ("test", "embargo"):
        (tmp_path / "files" / f"{split}.parquet").unlink()  # never opened
    made = bundle_of(config, train(config))
    expected = {"type_a": 0.0, "type_b": logit(rates("b3")) - logit(rates("b2", "b3"))}
    assert made.calibrator.shifts == {name: pytest.approx(value) for name, value in expected.items()}
    plain = bundle_of(settings, train(settings))
    assert plain.calibrator == replace(made.calibrator, shifts={})
    assert plain.calibrator.shifts == {}


def test_an_evaluation_keeps_the_ratio_before_and_after() -> None:
    model = Rate(-1.0, {})
    calibrator = Calibrator("platt", shifts={"type_a": -1.0})
    bundle = Bundle(model, "v1", dict(RANDOM_SIZES), calibrator=calibrator)
    types = np.array(["type_a", "type_a", "type_b", "type_b"])
    campaigns, label = np.array(["1", "1", "2", "3"]), np.array([1.0, 0.0, 1.0, 0.0])
    found = calibrators.described(bundle, np.full(4, -1.0), label, types, campaigns)
    low, high = float(sigmoid(np.array(-2.0))), float(sigmoid(np.array(-1.0)))
    assert found["prior_shifts"] == {"type_a": -1.0}
    assert found["prior"]["ratio_before"] == pytest.approx(4 * high / 2)
    assert found["prior"]["ratio_after"] == pytest.approx((2 * low + 2 * high) / 2)
    by_campaign = found["prior"]["by_campaign"]
    assert by_campaign["1"] == {
        "rows": 2,
        "positives": 1,
        "ratio_before": pytest.approx(2 * high),
        "ratio_after": pytest.approx(2 * low),
        "z_before": pytest.approx((2 * high - 1) / math.sqrt(2 * high * (1 - high))),
        "z_after": pytest.approx((2 * low - 1) / math.sqrt(2 * low * (1 - low))),
    }
    third = by_campaign["3"]
    assert (third["rows"], third["positives"]) == (1, 0)
    assert third["ratio_before"] is None
    assert third["ratio_after"] is None
    assert third["z_before"] == third["z_after"] == pytest.approx(math.sqrt(high / (1 - high)))
    json.dumps(found, allow_nan=False)
    unmoved = replace(bundle, calibrator=Calibrator("platt"))
    assert "prior" not in calibrators.described(unmoved, np.full(4, -1.0), label, types, campaigns)


def test_types_of_a_feed_lie_beside_its_labels(settings: Config) -> None:
    dataset = manifests.load(settings.lake.root_uri)
    valid_feed = feed.Feed(dataset, "valid", Workers(), 64)
    types = fitting.valid_types(valid_feed, Workers())
    rows = [(kind, label) for kind, label in zip(types, labels_of(valid_feed), strict=True)]
    expected = [(f"type_{CAMPAIGNS[row['target_id']][0]}", row["label"]) for row in ROWS["valid"]]
    assert sorted(rows) == sorted(expected)
    assert set(types.tolist()) <= set(CAMPAIGN_TYPES)


def labels_of(valid_feed: feed.Feed) -> list[float]:
    return np.concatenate([batch.label.numpy() for batch in valid_feed.epoch()]).tolist()


# ------------------------------------------------------------------------------------------------ recalibrate
def test_a_new_calibrator_is_a_new_version_of_the_same_weights(settings: Config, tmp_path: Path) -> None:
    parent = train(settings)
    root = settings.lake.root_uri
    config = settings_of(tmp_path, "calibration.prior=latest_matured", "calibration.by=campaign_type")
    planned = recalibration.recalibrate(config, "champion", VALID, "run-2", dry_run=True)
    assert registry.versions(root) == [parent]
    done = recalibration.recalibrate(config, "champion", VALID, "run-2", dry_run=False)
    assert done == planned
    assert done.version != parent == done.parent
    assert registry.versions(root) == sorted([parent, done.version])
    assert registry.resolve(root, "logistic") == done.version  # as any registration
    assert registry.resolve(root, "champion") == parent  # until somebody promotes it
    old, new = bundle_of(settings, parent), bundle_of(settings, done.version)
    assert new.model.to_dict() == old.model.to_dict()  # type: ignore[union-attr]  # a logistic model
    assert set(new.calibrator.segments) == {"type_a", "type_b"}
    # a3 was final on the run date, b4 was not.
    assert new.calibrator.shifts == {
        "type_a": pytest.approx(logit(rates("a3")) - logit(rates("a2"))),
        "type_b": pytest.approx(logit(rates("b3")) - logit(rates("b2", "b3"))),
    }
    assert new.metrics["recalibrated"] == {
        "parent": parent,
        "dates": str(VALID),
        "rows": 1300,
        "positives": sum(row["label"] for row in ROWS["valid"]),
        "known_by": "2024-04-01",
    }
    again = recalibration.recalibrate(config, done.version, VALID, "run-3", dry_run=False)
    assert again.version == done.version


def test_a_spoilt_calibrator_is_mended_and_both_qualities_are_told(settings: Config) -> None:
    bundle = bundle_of(settings, train(settings))
    spoilt = replace(bundle, calibrator=Calibrator("platt", 1.0, 2.0))
    every = feed.read_dated(manifests.load(settings.lake.root_uri))
    rows = [row for row in every if row.target_id in ("a2", "b2")]
    made, before, after = recalibration.refit(settings, spoilt, rows, every)
    label = np.array([row.label for row in rows])
    logits = fitting.score_rows(spoilt, rows)
    assert before.ece == pytest.approx(metrics.ece(spoilt.probabilities(logits), label))
    assert before.ratio > 1.5
    assert after.ece < 0.06 < 0.2 < before.ece
    assert after.ratio == pytest.approx(1.0, abs=0.1)
    assert made.calibrator.intercept < 1.0


def test_quality_after_is_not_judged_on_the_rows_that_shaped_it(tmp_path: Path) -> None:
    """Labels of pure chance, one step per row: in sample an isotonic map looks far too good."""
    config = settings_of(tmp_path, "calibration.method=isotonic", "calibration.isotonic_positives=10")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(120):
        wide = np.zeros(WIDTH, "<f4")
        wide[0] = generator.normal()
        rows.append(feed.Example(wide.tobytes(), float(generator.random() < 0.3), user_id=f"u{number}"))
    weights = np.zeros(WIDTH)
    weights[0] = 1.0
    model = Logistic(weights, -1.0, np.zeros(WIDTH), np.ones(WIDTH))
    bundle = Bundle(model, "v1", dict(RANDOM_SIZES), metrics={"fitted_on": {"from": 0, "final_by": 0}})
    made, _, after = recalibration.refit(config, bundle, rows, rows)
    label = np.array([row.label for row in rows])
    in_sample = metrics.ece(made.probabilities(fitting.score_rows(bundle, rows)), label)
    assert after.ece > in_sample + 0.02


def test_what_trained_the_model_or_is_not_final_is_refused(
    settings: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(settings)

    def recalibrate(dates: str, *overrides: str) -> recalibration.Recalibrated:
        config = settings_of(tmp_path, *overrides)
        return recalibration.recalibrate(config, "logistic", DateRange.parse(dates), "r", dry_run=True)

    with pytest.raises(ConfigError, match=r"was fitted on 1000 of 2400 rows; name days after"):
        recalibrate("2024-01-10:2024-02-12")
    assert recalibrate("2024-01-30").rows == 100  # sent before validation, but no training row
    with pytest.raises(DataError, match="none of 0 rows has a label"):
        recalibrate("2024-02-06:2024-02-07")
    with pytest.raises(DataError, match=r"none of 400 rows has a label that was final on run.run_date"):
        recalibrate("2024-03-20")
    assert recalibrate("2024-03-20", "run.run_date=2024-04-05").rows == 400
    caplog.clear()
    with caplog.at_level(logging.WARNING, "couponflow"):
        assert recalibrate("2024-02-05:2024-03-20").rows == 1300 + 50 + 400
    assert "400 of these rows are of split test" in caplog.text
    with pytest.raises(DataError, match="positives in 1300 rows, expected 1000 for method isotonic"):
        recalibrate(str(VALID), "calibration.method=isotonic")


def test_a_blend_counts_validation_as_its_training(settings: Config) -> None:
    assert fitting.fitted_on(settings, "logistic") == {
        "from": int(instant("2024-01-05").timestamp()) * 1_000_000,
        "final_by": int(instant("2024-02-01").timestamp()) * 1_000_000,
    }
    blend = fitting.fitted_on(settings, "blend")
    assert blend["final_by"] == int(instant("2024-03-01").timestamp()) * 1_000_000
    bundle = bundle_of(settings, train(settings))
    every = feed.read_dated(manifests.load(settings.lake.root_uri))
    with pytest.raises(ConfigError, match="was fitted on 1300 of 1300 rows"):
        recalibration.matured_rows(
            settings, replace(bundle, metrics={"fitted_on": blend}), "blend-x", every, VALID
        )
    with pytest.raises(ConfigError, match="does not say which rows trained it; train it again"):
        recalibration.matured_rows(settings, replace(bundle, metrics={}), "old", every, VALID)


def test_the_command_prints_before_and_after(settings: Config, tmp_path: Path) -> None:
    parent = train(settings)
    file = tmp_path / "c.toml"
    file.write_text(
        f"[lake]\nroot_uri = '{settings.lake.root_uri}'\n[run]\nrun_date = 2024-04-01\n"
        "[examples]\ntrain_start = 2024-01-05\nvalid_start = 2024-02-01\ntest_start = 2024-03-01\n"
    )
    argv = ["models", "recalibrate", "--config", str(file), "--dates", "2024-02-05"]
    done = CliRunner().invoke(app, [*argv, "--dry-run"])
    assert done.exit_code == 0, done.output
    for words in ("before", "after", "calibration error", "900 rows", "nothing was registered"):
        assert words in done.stdout
    assert registry.versions(settings.lake.root_uri) == [parent]
    done = CliRunner().invoke(app, [*argv[:2], "logistic", *argv[2:]])
    assert "registered logistic-" in done.stdout
    assert len(registry.versions(settings.lake.root_uri)) == 2
    done = CliRunner().invoke(app, [*argv[:-1], "2024-01-10"])
    assert done.exit_code == 2
    assert "was fitted on" in done.output
