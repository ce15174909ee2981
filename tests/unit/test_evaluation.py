"""The paired cluster bootstrap."""

import json
import time

import numpy as np
import pytest

from couponflow.errors import DataError
from couponflow.sections import EvaluationConfig
from couponflow.training import evaluation, metrics
from couponflow.training.evaluation import Comparison, LabelledRows, ScoredModel


def make_rows(size: int = 400, seed: int = 0) -> LabelledRows:
    generator = np.random.default_rng(seed)
    return LabelledRows(
        (generator.random(size) < 0.2).astype(float),
        np.array([f"u{n}" for n in generator.integers(0, size // 2, size)]),
        np.array([f"c{n}" for n in generator.integers(0, 3, size)]),
        np.array([f"2024-01-0{n}" for n in generator.integers(1, 6, size)]),
    )


def make_model(rows: LabelledRows, name: str, strength: float, seed: int = 1) -> ScoredModel:
    noise = np.random.default_rng(seed).normal(size=rows.label.size)
    logit = strength * (2 * rows.label - 1) + noise - 1.4
    return ScoredModel(name, f"{name}-000000000000", logit, 1 / (1 + np.exp(-logit)))


def test_weights_equal_explicit_resampling() -> None:
    rows = make_rows(60)
    models = [make_model(rows, "a", 0.5)]
    draws = evaluation.bootstrap(rows, models, 50, 7, seed=3)["a"]
    blocks = np.concatenate(list(evaluation.draw_weights(rows.user_id, 50, seed=3)))
    assert len(blocks) == 50
    for n, weights in enumerate(blocks):
        index = np.repeat(np.arange(60), weights.astype(int))
        label, logit = rows.label[index], models[0].logit[index]
        assert draws["auc"][n] == metrics.auc(logit, label)
        assert draws["pr_auc"][n] == pytest.approx(metrics.pr_auc(logit, label), abs=1e-12)
        assert draws["log_loss"][n] == pytest.approx(metrics.log_loss(logit, label), abs=1e-9)
        assert draws["ece"][n] == pytest.approx(
            metrics.ece(models[0].probability[index], label, 7), abs=1e-12
        )


def test_all_rows_of_a_user_share_a_weight_and_draws_take_all_users() -> None:
    rows = make_rows(80)
    for weights in evaluation.draw_weights(rows.user_id, 20, seed=0):
        for user in np.unique(rows.user_id):
            assert (np.ptp(weights[:, rows.user_id == user], axis=1) == 0).all()
        first = np.unique(rows.user_id, return_index=True)[1]
        assert (weights[:, first].sum(1) == first.size).all()


def test_block_size_does_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(50)
    whole = np.concatenate(list(evaluation.draw_weights(rows.user_id, 11, seed=4)))
    monkeypatch.setattr(evaluation, "_BLOCK_CELLS", 150)
    assert np.array_equal(np.concatenate(list(evaluation.draw_weights(rows.user_id, 11, seed=4))), whole)


def test_a_model_compared_with_itself_differs_by_nothing() -> None:
    rows = make_rows()
    one = make_model(rows, "logistic", 0.6)
    twin = ScoredModel("twin", one.model_version, one.logit, one.probability)
    judged = evaluation.evaluate(rows, [one, twin], "logistic", EvaluationConfig(num_draws=50))
    (found,) = judged.comparisons
    assert (found.difference, found.interval, found.standard_error) == (0.0, (0.0, 0.0), 0.0)
    assert not found.is_testable


def test_part_of_the_rows_is_compared_as_if_it_were_all() -> None:
    rows, config = make_rows(300), EvaluationConfig(num_draws=40)
    models = [make_model(rows, "a", 0.5), make_model(rows, "b", 0.8, seed=5)]
    places = np.flatnonzero(rows.day >= "2024-01-03")
    part = LabelledRows(*(v[places] for v in (rows.label, rows.user_id, rows.campaign_id, rows.day)))
    cut = [ScoredModel(m.name, m.name, m.logit[places], m.probability[places]) for m in models]
    (whole,) = evaluation.evaluate(part, cut, "a", config).comparisons
    assert evaluation.compare_on(rows, models[1], models[0], places, config) == whole
    positive = np.flatnonzero(rows.label == 1)
    with pytest.raises(DataError, match="both classes are needed"):
        evaluation.compare_on(rows, models[1], models[0], positive, config)


def test_minimum_detectable_difference() -> None:
    found = Comparison("b", "a", 0.02, (0.0, 0.04), 0.01)
    assert found.minimum_detectable == pytest.approx(0.028016)
    assert not found.is_testable
    assert Comparison("b", "a", 0.03, (0.0, 0.04), 0.01).is_testable


def test_record_is_plain_json_and_covers_all_rows() -> None:
    rows = make_rows(300)
    models = [make_model(rows, "logistic", 0.6), make_model(rows, "dien", 0.7, seed=3)]
    config = EvaluationConfig(num_draws=30)
    judged = evaluation.evaluate(rows, models, "logistic", config)
    record = evaluation.without_nan(evaluation.describe(rows, models, judged, config))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    dien = record["models"]["dien"]
    assert record["num_rows"] == sum(c["rows"] for c in dien["by_campaign"].values()) == 300
    assert sum(c["positives"] for c in dien["by_campaign"].values()) == record["num_positives"]
    assert set(dien["metrics"]["lift"]) == {"0.01", "0.05", "0.1", "0.2"}
    low, high = dien["intervals"]["auc"]
    assert low < dien["metrics"]["auc"] < high


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="both classes are needed"):
        LabelledRows(np.zeros(3), *(np.array(["a"] * 3) for _ in range(3)))


def test_a_thousand_draws_take_seconds() -> None:
    rows = make_rows(1653)
    models = [make_model(rows, name, 0.5, seed) for seed, name in enumerate(("a", "b", "c"))]
    start = time.perf_counter()
    evaluation.bootstrap(rows, models, 1000, 15, seed=0)
    assert time.perf_counter() - start < 20
