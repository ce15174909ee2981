"""The promotion gate: each condition alone, cut-offs, the record; and its verdicts on simulated truth."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation import make_model, make_rows

from bench import gate as simulation
from couponflow.errors import ConflictError, DataError
from couponflow.sections import EvaluationConfig
from couponflow.training import decisions, evaluation
from couponflow.training.decisions import CutOff
from couponflow.training.evaluation import Comparison, LabelledRows, ScoredModel

GOOD = Comparison("b", "a", 0.03, (0.01, 0.05), 0.01)
BAD = Comparison("b", "a", 0.03, (0.0, 0.06), 0.01)
RAIN = {"condition": "weather", "holds": False, "text": "it rains"}
NUMBERS = {"calibration_ratio": 1.0, "ece": 0.02}


def cut(comparison: Comparison | None = GOOD) -> CutOff:
    return CutOff("2024-01-01", "2024-01-02", 100, 20, comparison)


def failed(verdict: dict[str, Any]) -> list[str]:
    return [reason["text"] for reason in verdict["reasons"] if not reason["holds"]]


@pytest.mark.parametrize(
    ("overall", "cutoffs", "ratio", "ece", "identical", "word"),
    [
        (GOOD, [GOOD, GOOD], 1.0, 0.02, False, ""),
        (GOOD, [GOOD, GOOD, GOOD], 0.9, 0.0, False, ""),
        (GOOD, [GOOD], 1.0, 0.02, False, "1 of 2 cut-offs: the test rows lie on too few days"),
        (GOOD, [BAD, GOOD], 1.0, 0.02, False, "cut-off 1 of 2 (2024-01-01 to 2024-01-02, 100 rows, 20 pos"),
        (GOOD, [GOOD, GOOD, BAD], 1.0, 0.02, False, "cut-off 3 of 3"),
        (GOOD, [GOOD, None], 1.0, 0.02, False, "one class only, no verdict"),
        (BAD, [GOOD, GOOD], 1.0, 0.02, False, "all test rows: auc difference +0.0300 [+0.0000, +0.0600]"),
        (GOOD, [GOOD, GOOD], 1.11, 0.02, False, "expected over observed conversions 1.110"),
        (GOOD, [GOOD, GOOD], 0.89, 0.02, False, "expected over observed conversions 0.890"),
        (GOOD, [GOOD, GOOD], float("nan"), 0.02, False, "expected over observed conversions nan"),
        (GOOD, [GOOD, GOOD], 1.0, 0.0219, False, ""),
        (GOOD, [GOOD, GOOD], 1.0, 0.0221, False, "calibration error 0.0221, champion 0.0200, standard error"),
        (GOOD, [GOOD, GOOD], 1.0, 0.02, True, "score every row alike"),
    ],
)
def test_each_condition_decides_alone(
    overall: Comparison,
    cutoffs: list[Comparison | None],
    ratio: float,
    ece: float,
    identical: bool,
    word: str,
) -> None:
    own = {"calibration_ratio": ratio, "ece": ece}
    verdict = decisions.judge(overall, [cut(found) for found in cutoffs], own, NUMBERS, 0.002, identical)
    assert verdict["decision"] == ("keep_champion" if word else "promote")
    assert len(failed(verdict)) == bool(word)
    assert word in "".join(failed(verdict))
    assert [reason["holds"] for reason in verdict["reasons"]][: bool(word)] == [False] * bool(word)
    json.dumps(verdict, allow_nan=False)


@pytest.mark.parametrize("error", [0.02, 0.0], ids=["too few users", "one user"])
def test_a_difference_that_is_not_testable_promotes_nobody(error: float) -> None:
    overall = Comparison("b", "a", 0.05, (0.01, 0.09), error)
    verdict = decisions.judge(overall, [cut(), cut()], NUMBERS, NUMBERS, 0.0)
    assert verdict["decision"] == "keep_champion"
    assert failed(verdict) == ["all test rows: a difference below the minimum detectable one is no claim"]


def test_a_difference_without_an_interval_promotes_nobody() -> None:
    unknown = Comparison("b", "a", 0.05, (float("nan"), float("nan")), float("nan"))
    verdict = decisions.judge(unknown, [cut(), cut(unknown)], NUMBERS, NUMBERS, 0.0)
    assert (verdict["decision"], len(failed(verdict))) == ("keep_champion", 2)


def test_calibration_is_compared_within_the_error_of_the_difference() -> None:
    """Without an error of the difference any higher one is refused; a missing error refuses too."""
    worse = NUMBERS | {"ece": 0.0201}
    for error, decision in ((0.0, "keep_champion"), (0.0002, "promote"), (float("nan"), "keep_champion")):
        assert decisions.judge(GOOD, [cut(), cut()], worse, NUMBERS, error)["decision"] == decision
    assert decisions.judge(GOOD, [cut(), cut()], NUMBERS, NUMBERS, 0.0)["decision"] == "promote"


def test_cut_offs_lie_between_days_and_share_the_positives() -> None:
    """Days with 12, 15, 214 and 25 positives: two parts end after the second day, 27 against 239."""
    sizes = {
        "2017-10-04": (188, 12),
        "2017-10-18": (202, 15),
        "2017-10-30": (1133, 214),
        "2017-11-15": (130, 25),
    }
    day = np.concatenate([[name] * rows for name, (rows, _) in sizes.items()])
    label = np.concatenate([np.arange(rows) < positives for rows, positives in sizes.values()]).astype(float)
    order = np.random.default_rng(0).permutation(day.size)
    for number, expected in ((2, [27, 239]), (3, [27, 214, 25]), (9, [27, 214, 25])):
        parts = decisions.cut_offs(day[order], label[order], number)
        assert [int(label[order][places].sum()) for places in parts] == expected
        assert sorted(np.concatenate(parts).tolist()) == list(range(day.size))
        spans = [(min(days), max(days)) for days in (day[order][places].tolist() for places in parts)]
        assert all(last < first for (_, last), (first, _) in itertools.pairwise(spans))
    assert [part.size for part in decisions.cut_offs(np.array(["d"] * 4), np.ones(4), 2)] == [4]


def decide(rows: LabelledRows, models: list[ScoredModel], champion: str) -> dict[str, Any]:
    config = EvaluationConfig(num_draws=100)
    judged = evaluation.evaluate(rows, models, champion, config)
    return decisions.decide(rows, models, judged, config)


def test_a_twin_is_never_promoted() -> None:
    rows = make_rows()
    one = make_model(rows, "logistic", 0.6)
    gate = decide(rows, [one, ScoredModel("twin", "t", one.logit, one.probability)], "logistic")
    assert gate["decision"] == "keep_champion"
    assert "score every row alike" in gate["reasons"][0]["text"]
    assert failed(decide(rows, [one], "logistic")) == ["there is no challenger"]


def test_the_gate_names_the_promoted_challenger_before_a_better_one_that_is_refused() -> None:
    rows = make_rows(1200)
    weak, strong, wild = (
        make_model(rows, name, strength, seed)
        for name, strength, seed in (("weak", 0.2, 8), ("strong", 1.0, 1), ("wild", 1.4, 2))
    )

    def calibrated(model: ScoredModel, slope: float) -> ScoredModel:
        probability = 1 / (1 + np.exp(-(model.logit * slope + 1.4)))
        probability *= rows.label.mean() / probability.mean()
        return ScoredModel(model.name, model.model_version, model.logit, probability)

    models = [calibrated(weak, 0.5), calibrated(strong, 2.0), wild]  # wild promises far too much
    gate = decide(rows, models, "weak")
    assert (gate["challenger"], gate["decision"]) == ("strong", "promote"), gate["reasons"]
    assert [part["num_rows"] > 100 for part in gate["cutoffs"]] == [True, True]
    assert sum(part["num_positives"] for part in gate["cutoffs"]) == rows.label.sum()
    gate = decide(rows, models, "strong")
    assert (gate["challenger"], gate["decision"]) == ("wild", "keep_champion")
    assert any(reason.startswith("expected over observed") for reason in failed(gate))


def make_record(run_id: str, challenger: str | None = "dien-1") -> dict[str, Any]:
    model = {
        "metrics": {key: 0.5 for key in ("auc", "pr_auc", "log_loss", "ece", "calibration_ratio", "brier")},
        "intervals": {"auc": [0.4, 0.6]},
    }
    names = {"logistic": "logistic-1"} | ({"dien": challenger} if challenger else {})
    return {
        "run_id": run_id,
        "dates": "2024-01-01:2024-01-31",
        "split": "test",
        "training_examples_version": 3,
        "vocabulary_version": "v1",
        "num_rows": 100,
        "num_positives": 20,
        "num_users": 80,
        "models": {name: {**model, "model_version": version} for name, version in names.items()},
        "gate": {
            "champion": "logistic",
            "challenger": "dien" if challenger else None,
            "decision": "keep_champion",
            "reasons": [RAIN],
            "comparison": GOOD.as_dict(),
            "cutoffs": [cut().as_dict()],
        },
    }


def test_a_decision_is_kept_with_its_evidence_and_never_changed(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert decisions.last(root) is None
    uri = decisions.write(root, "evaluate-1", make_record("evaluate-1"), "e.json")
    assert uri == f"{root}/decisions/evaluate-1.json"
    record = json.loads(Path(uri).read_text())
    assert record["champion"]["model_version"] == "logistic-1"
    assert record["challenger"]["metrics"]["auc"] == 0.5
    assert record["challenger"]["intervals"] == {"auc": [0.4, 0.6]}
    assert record["comparison"]["minimum_detectable"] == pytest.approx(0.028016)
    assert record["data"]["training_examples_version"] == 3
    assert record["data"]["num_positives"] == 20
    assert (record["decision"], record["reasons"]) == ("keep_champion", [RAIN])
    assert decisions.write(root, "evaluate-1", make_record("evaluate-1"), "e.json") == uri
    with pytest.raises(ConflictError, match="evaluate-1"):
        decisions.write(root, "evaluate-1", make_record("evaluate-1", "dien-2"), "e.json")


def test_the_last_decision_is_that_of_the_newest_run_that_judged_the_model(tmp_path: Path) -> None:
    root = str(tmp_path)
    for run_id, challenger in (("evaluate-2", "dien-2"), ("evaluate-1", "dien-1"), ("evaluate-3", None)):
        decisions.write(root, run_id, make_record(run_id, challenger), "e.json")

    def found(version: str) -> str | None:
        record = decisions.last(root, version)
        return record["run_id"] if record else None

    assert [found(v) for v in ("", "logistic-1", "dien-2", "dien-1", "dien-9")] == [
        "evaluate-3",
        "evaluate-3",
        "evaluate-2",
        "evaluate-1",
        None,
    ]
    Path(root, "decisions", "evaluate-4.json").write_text("{}")
    with pytest.raises(DataError, match=r"evaluate-4.json is no decision record"):
        decisions.last(root)


def test_verdicts_on_simulated_truth() -> None:
    """A small version of bench/gate.py: 300 users, 60 draws."""
    worse, equal, better = (
        simulation.outcomes(world, 30, 300, 60)
        for world in (simulation.WORSE, simulation.EQUAL, simulation.BETTER)
    )
    assert simulation.promoted_share(worse) == 0.0
    assert simulation.promoted_share(equal) <= 0.05
    assert simulation.promoted_share(better) >= 0.2
    assert 0.85 <= simulation.coverage(equal, 0.0) <= 1.0


def test_the_simulated_models_are_calibrated_and_ranked_as_said() -> None:
    rows, models = simulation.simulate(simulation.BETTER, 40_000, 1)
    for model in models:
        assert model.probability.mean() == pytest.approx(rows.label.mean(), abs=0.004)
        high = model.probability > 0.4
        assert rows.label[high].mean() == pytest.approx(model.probability[high].mean(), abs=0.02)
