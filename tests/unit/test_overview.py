"""The end of a run, from run records alone: whatever has not run is left out, and nothing is invented."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import D0, test_config

from couponflow.campaign import overview
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.errors import DataError
from couponflow.lake import runs, storage

SELECT, EXPORT, SCORE = "select_audience campaign 18", "export_audience campaign 18", "score campaign 18"
STEPS = [("user_master", 0, 10), ("bounce", 3, 7), ("value", 2, 5), ("control", 1, 4), ("mailed", 0, 4)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return test_config(tmp_path, "run.campaign_id='18'")


def make_record(job: str, rows: dict[str, int], **facts: Any) -> runs.RunRecord:
    made = runs.start(job, str(DateRange.day(D0)), {}, "f")
    made.status, made.rows, made.facts = "ok", rows, facts
    return made


def make_records() -> dict[str, runs.RunRecord]:
    waterfall = [{"reason": r, "label": r, "excluded": out, "remaining": n} for r, out, n in STEPS]
    clean = {"raw_rows": 100, "events": 88, "quarantine": 4, "quarantine_bad_time": 4, "duplicates": 6}
    clean |= {"duplicates_exact": 5, "duplicates_conflicting": 1, "erased": 2}
    feeds = {"users_raw_rows": 20, "users": 20, "users_quarantine": 0, "users_duplicates": 0}
    splits = {"train": 5, "valid": 2, "test": 1}
    examples = {"population": 9, "training_examples": 8}
    selected = {"num_users": 10, "selected_users": 5, "control_users": 1, "holdout_users": 0}
    return {
        "clean_events": make_record("clean_events", clean),
        "clean_feeds": make_record("clean_feeds", feeds),
        "sessionize": make_record("sessionize", {"sessions": 30}),
        "build_examples": make_record("build_examples", examples, splits=splits, left_out={"censored": 1}),
        "train dien": make_record("train", {"training_examples.train": 5, "training_examples.valid": 2}),
        "evaluate": make_record("evaluate", {"training_examples.test": 1}),
        SCORE: make_record("score", {"predictions": 10}, num_users=10),
        SELECT: make_record(
            "select_audience", {}, version="v1", mailed_users=4, waterfall=waterfall, **selected
        ),
        EXPORT: make_record("export_audience", {"recipients": 3, "withdrawn": 1}, version="v1"),
    }


def doors(config: Config, records: dict[str, runs.RunRecord]) -> dict[str, tuple[int, int, bool]]:
    return {
        door["door"]: (door["rows_in"], door["rows_out"], door["is_balanced"])
        for door in overview.conservation(config, records)
    }


def test_every_door_balances_on_good_records(config: Config) -> None:
    assert doors(config, make_records()) == {
        "events": (100, 88, True),
        "users": (20, 20, True),
        "sends to training examples": (9, 8, True),
        "train rows to Petastorm": (5, 5, True),
        "valid rows to Petastorm": (2, 2, True),
        "test rows to Petastorm": (1, 1, True),
        "users to predictions": (10, 10, True),  # the master has 10, though two snapshots of it came
        "predictions to audience": (10, 4, True),
        "audience to exported file": (4, 3, True),
    }


@pytest.mark.parametrize(
    ("stage", "name", "door"),
    [
        ("clean_events", "duplicates", "events"),
        ("clean_events", "erased", "events"),
        ("clean_feeds", "users", "users"),
        ("build_examples", "training_examples", "sends to training examples"),
        ("train dien", "training_examples.valid", "valid rows to Petastorm"),
        (SCORE, "predictions", "users to predictions"),
        (EXPORT, "recipients", "audience to exported file"),
    ],
)
def test_a_lost_row_is_seen_at_its_door(config: Config, stage: str, name: str, door: str) -> None:
    records = make_records()
    records[stage].rows[name] -= 1
    assert [found for found, (_, _, is_balanced) in doors(config, records).items() if not is_balanced] == [
        door
    ]


@pytest.mark.parametrize("missing", [*make_records(), None])
def test_any_stage_may_be_missing(config: Config, missing: str | None) -> None:
    records = {name: record for name, record in make_records().items() if missing not in (name, None)}
    whole = doors(config, make_records())
    assert doors(config, records).items() <= whole.items()
    funnel = overview.funnel(config, records)
    assert [step for step in funnel if step not in overview.funnel(config, make_records())] == []
    shown: list[str] = []
    overview.show_results(config, records, lambda title, columns, rows: shown.append(title))
    assert shown[0] == "From raw rows to recipients"
    assert ("Campaign 18: who gets the mail" in shown) == (SELECT in records)


def test_records_without_counts_give_no_door(config: Config) -> None:
    empty = {name: make_record(record.job, {}) for name, record in make_records().items()}
    assert overview.conservation(config, empty) == []
    assert overview.funnel(config, empty) == []


def test_a_list_of_another_version_is_not_set_against_this_audience(config: Config) -> None:
    records = make_records()
    records[EXPORT].facts["version"] = "v0"
    assert "audience to exported file" not in doors(config, records)


def test_the_funnel_has_the_recorded_numbers(config: Config) -> None:
    assert [rows for _, rows in overview.funnel(config, make_records())] == [100, 88, 30, 8, 10, 5, 1, 3]


def test_the_evaluation_is_the_one_that_the_run_names(tmp_path: Path) -> None:
    assert overview.read_evaluation({}) == {}
    uri = str(tmp_path / "evaluations" / "e1.json")
    with pytest.raises(DataError, match=r"e1\.json does not exist"):
        overview.read_evaluation({"evaluation": uri})
    storage.create(uri, json.dumps({"run_id": "e1"}).encode(), "r")
    assert overview.read_evaluation({"evaluation": uri}) == {"run_id": "e1"}


def test_results_with_undefined_metrics_are_shown_with_dashes(config: Config, tmp_path: Path) -> None:
    """A test split of one class has no AUC; the terminal says so after the run, and does not crash."""
    metrics = {"auc": None, "pr_auc": 0.25, "log_loss": 0.5, "ece_uncalibrated": 0.1, "ece": 0.05}
    good = {"metrics": metrics | {"auc": 0.75}, "intervals": {"auc": [0.7, 0.8]}}
    evaluation = {
        "models": {"dien": {"metrics": metrics, "intervals": {"auc": [None, None]}}, "logistic": good},
        "comparisons": [
            {"challenger": "dien", "champion": "logistic", "difference": None, "interval": None},
            {
                "challenger": "blend",
                "champion": "logistic",
                "difference": 0.01,
                "interval": [-0.01, 0.03],
                "minimum_detectable": 0.02,
            },
        ],
        "gate": {
            "decision": "keep_champion",
            "challenger": "blend",
            "reasons": [{"holds": False, "text": "it rains"}],
        },
    }
    uri = str(tmp_path / "e.json")
    storage.create(uri, json.dumps(evaluation).encode(), "r")
    records = make_records()
    records["evaluate"].facts["evaluation"] = uri
    shown: dict[str, list[list[Any]]] = {}
    overview.show_results(config, records, lambda title, columns, rows: shown.update({title: rows}))
    models = shown["Models on the test campaigns (95 % intervals, clustered by user)"]
    assert models[0] == ["dien", "–", "[–, –]", "0.2500", "0.5000", "0.1000", "0.0500"]  # noqa: RUF001  # the dash of a missing value
    assert models[1][1:3] == ["0.7500", "[0.7000, 0.8000]"]
    differences = shown["Paired differences in AUC"]
    assert differences[1][2:] == ["+0.0100", "[-0.0100, +0.0300]", "0.0200"]
    assert differences[0][2] == models[0][1]
    assert shown["Gate: keep_champion, challenger blend"] == [["it rains", "NO"]]
    assert ["control", 1, 4] in shown["Campaign 18: who gets the mail"]
    assert {row[-1] for row in shown["Every row is accounted for"]} == {"yes"}
