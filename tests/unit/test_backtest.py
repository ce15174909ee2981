"""The progressive back-test and sampled negatives, on tiny Parquet files with planted signal."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from couponflow.config import Config
from couponflow.errors import DataError
from couponflow.lake import layouts
from couponflow.models.calibration import Calibrator, sigmoid
from couponflow.training import backtest, baselines, feed, fitting, manifests

T0 = datetime(2024, 1, 1, tzinfo=UTC)
SIZES = {"item": 50, "category": 20, "shop": 8, "event_type": 9}
WIDTH = len(layouts.WIDE_FEATURES)
NUM_VARYING = 35  # more of pure noise would drown a few hundred rows
TYPE_PLACES = [place for place, name in enumerate(layouts.WIDE_FEATURES) if name.startswith("is_type_")]
WINDOW = timedelta(days=10)


def make_rows(size: int, seed: int = 0, split: str = "train", base: float = -1.0) -> list[dict[str, Any]]:
    """Sent over 100 days; the label depends on the first aggregate, whose sign turns on day 80."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(size):
        day = int(generator.integers(0, 100))
        wide = np.zeros(WIDTH)
        wide[:NUM_VARYING] = generator.normal(size=NUM_VARYING)
        wide[TYPE_PLACES] = 0.0  # one campaign type
        logit = (2.0 if day < 80 else -2.0) * wide[0] + base
        rows.append(
            {
                "example_id": f"{split}{seed}-{number:05}",
                "user_id": f"u{number % (size // 2)}",
                "target_id": f"c{day // 10}",
                "split": split,
                "vocabulary_version": "v1",
                "label": int(generator.random() < sigmoid(np.array(logit))),
                "wide": wide.astype("<f4").tobytes(),
                "as_of": T0 + timedelta(days=day),
                "mature_time": T0 + timedelta(days=day) + WINDOW,
            }
        )
    return rows


def make_dataset(
    folder: Path, rows: list[dict[str, Any]], cutoffs: tuple[int, ...] = ()
) -> manifests.Dataset:
    files: dict[str, dict[str, int]] = {}
    for split in sorted({row["split"] for row in rows}):
        table = pa.Table.from_pylist([row for row in rows if row["split"] == split])
        place = table.schema.get_field_index("label")
        path = folder / f"{split}.parquet"
        pq.write_table(
            table.set_column(place, "label", table["label"].cast("int32")), path, row_group_size=100
        )
        files[split] = {path.as_uri(): table.num_rows}
    folds = []
    for place, day in enumerate(cutoffs):
        start = T0 + timedelta(days=day)
        end = T0 + timedelta(days=cutoffs[place + 1]) if place + 1 < len(cutoffs) else None
        train = [row for row in rows if row["mature_time"] <= start]
        test = [row for row in rows if row["as_of"] >= start and (end is None or row["as_of"] < end)]
        fold: dict[str, Any] = {"cutoff": f"day {day}", "start": start.isoformat()}
        fold["end"] = end.isoformat() if end else ""
        for part, chosen in (("train", train), ("test", test)):
            fold |= {f"{part}_rows": len(chosen), f"{part}_positives": sum(row["label"] for row in chosen)}
        folds.append(fold)
    dataset = manifests.Dataset(1, "v1", SIZES, layouts.WIDE_FEATURES, files, folds=tuple(folds))
    manifests.write(str(folder), dataset, "r")
    return manifests.load(str(folder))


def test_each_cut_off_is_judged_on_what_followed_it(tmp_path: Path, config: Config) -> None:
    rows = make_rows(900) + make_rows(300, 1, "test")
    dataset = make_dataset(tmp_path, rows, (5, 30, 60, 80))
    found = backtest.run(config, dataset)
    assert [fold["cutoff"] for fold in found["folds"]] == ["day 5", "day 30", "day 60", "day 80"]
    empty, *known, turned = found["folds"]
    assert (empty["train_rows"], empty["auc"], empty["interval"]) == (0, None, None)  # nothing mature yet
    for fold in known:
        low, high = fold["interval"]
        assert 0.75 < low < fold["auc"] < high < 0.95
    assert turned["interval"][1] < 0.5, "a model of the days before must fail where the world turned"
    assert found["pooled"]["test_rows"] == sum(fold["test_rows"] for fold in found["folds"][1:])
    assert found["pooled"]["auc"] < known[0]["auc"]
    assert backtest.run(config, replace(dataset, folds=())) == {}


def test_a_row_whose_window_reaches_over_the_cut_off_never_trains_it(tmp_path: Path) -> None:
    rows = make_rows(200)
    dataset = make_dataset(tmp_path, rows, (40, 70))
    read = feed.read_dated(dataset)
    for day, fold in zip((40, 70), dataset.folds, strict=True):
        train, test = backtest.fold_rows(read, fold)
        ids = {read[place].example_id for place in train}
        assert ids == {r["example_id"] for r in rows if r["as_of"] + WINDOW <= T0 + timedelta(days=day)}
        assert not ids & {read[place].example_id for place in test}


def test_a_first_month_that_expects_too_much_is_shown_and_moved(tmp_path: Path, config: Config) -> None:
    """The rate halves on day 30 and stays: campaigns of ten days."""
    rows = []
    for row in make_rows(1500):
        day = (row["as_of"] - T0).days
        rows.append(row | {"label": row["label"] if day < 30 or int(row["example_id"][-1]) % 2 else 0})
    dataset = make_dataset(tmp_path, rows, (30, 70))
    first, later = backtest.run(config, dataset)["folds"]
    assert first["ratio_before"] == pytest.approx(2.0, rel=0.35)
    assert set(first["by_campaign"]) == {"c3", "c4", "c5", "c6"}
    for fold in (first, later):
        for part in ("rows", "positives"):
            assert fold[part] == fold[f"test_{part}"]
            assert fold[part] == sum(campaign[part] for campaign in fold["by_campaign"].values())
    assert later["prior_shifts"]["other"] < -0.2, (
        "campaign c5, final by day 70, is below all of them together"
    )
    assert abs(later["ratio_after"] - 1) < abs(later["ratio_before"] - 1)
    sampled = backtest.run(config, replace(dataset, sampling_rate=0.5))["folds"]
    assert not any("ratio_before" in fold for fold in sampled)
    assert [fold["auc"] for fold in sampled] == [first["auc"], later["auc"]]


def test_a_fold_that_differs_from_the_manifest_stops(tmp_path: Path, config: Config) -> None:
    dataset = make_dataset(tmp_path, make_rows(200), (40,))
    wrong = {**dataset.folds[0], "test_positives": 1}
    with pytest.raises(DataError, match=r"cut-off day 40 .* expected \d+ test rows, 1 positive, found"):
        backtest.run(config, replace(dataset, folds=(wrong,)))


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_the_correction_of_sampled_negatives_is_exact(rate: float) -> None:
    """Known probabilities: a model of the sampled rows, corrected, has the mean of the world."""
    generator = np.random.default_rng(7)
    size = 60_000
    wide = generator.normal(size=(size, 3))
    logit = 1.5 * wide[:, 0] - wide[:, 1] - 3.0
    truth = sigmoid(logit)
    calibrator = Calibrator(sampling_rate=rate)
    np.testing.assert_allclose(
        calibrator.apply(logit - math.log(rate)), truth, rtol=1e-12
    )  # odds of the sample
    label = (generator.random(size) < truth).astype(float)
    kept = (label == 1) | (generator.random(size) < rate)
    model = baselines.fit_logistic(wide[kept], label[kept], 1e6)
    slope = np.divide(model.coef, model.sd)
    raw = (wide - model.mean) @ slope + model.intercept
    error = 3 * math.sqrt(label.mean() * (1 - label.mean()) / size / rate)
    assert abs(calibrator.apply(raw).mean() - truth.mean()) < error
    assert abs(Calibrator().apply(raw).mean() - truth.mean()) > 10 * error  # uncorrected


def test_a_model_of_sampled_rows_is_corrected_before_its_fitted_map(tmp_path: Path, config: Config) -> None:
    rows = [row | {"as_of": T0} for row in make_rows(4000, base=-2.0)]
    generator = np.random.default_rng(1)
    kept = [row for row in rows if row["label"] or generator.random() < 0.25]
    valid = make_rows(2000, 3, "valid", base=-2.0)
    dataset = replace(make_dataset(tmp_path, kept + valid), sampling_rate=0.25)
    bundle, plain = (
        fitting.fit_tabular(config, chosen, "logistic")
        for chosen in (dataset, replace(dataset, sampling_rate=1.0))
    )
    assert bundle.calibrator.sampling_rate == 0.25
    assert abs(bundle.calibrator.intercept) < 0.3  # the exact part leaves the fitted one little to do
    assert abs(plain.calibrator.intercept) > 0.8
    assert bundle.metrics["valid"]["log_loss"] < plain.metrics["valid"]["log_loss"] - 0.02
    assert bundle.metrics["valid"]["auc"] == plain.metrics["valid"]["auc"]
