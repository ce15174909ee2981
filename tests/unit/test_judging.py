"""From stored rows and scores to one record: days, segments, the gate, and what the log says."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from couponflow.errors import DataError
from couponflow.lake import layouts
from couponflow.sections import EvaluationConfig
from couponflow.training import judging
from couponflow.training.evaluation import ScoredModel
from couponflow.training.feed import Example


def make_rows(size: int = 400) -> list[Example]:
    """Sends of four days, local midnight in New York."""
    generator = np.random.default_rng(0)
    wide = generator.uniform(0, 5, (size, len(layouts.WIDE_FEATURES))).astype("<f4")
    instants = [datetime(2017, 10, 4 + n, 4, tzinfo=UTC).timestamp() * 1e6 for n in range(4)]
    return [
        Example(
            wide=wide[n].tobytes(),
            label=float(generator.random() < 0.25),
            target=np.array([[0, 7, 0]], "<i4").tobytes(),
            user_id=f"u{n // 2}",
            target_id=f"c{n % 4}",
            as_of=int(instants[n % 4]),
        )
        for n in range(size)
    ]


def make_model(rows: list[Example], name: str, strength: float, seed: int) -> ScoredModel:
    noise = np.random.default_rng(seed).normal(size=len(rows))
    logit = strength * np.array([row.label for row in rows]) + noise - 1.4
    return ScoredModel(name, f"{name}-1", logit, 1 / (1 + np.exp(-logit)))


def test_the_day_of_a_row_is_the_business_day_of_its_cut_off() -> None:
    found = judging.labelled(make_rows(), "America/New_York")
    assert found.day[:5].tolist() == ["2017-10-04", "2017-10-05", "2017-10-06", "2017-10-07", "2017-10-04"]
    assert judging.labelled(make_rows(), "America/Los_Angeles").day[0] == "2017-10-03"
    assert (found.user_id[3], found.campaign_id[3]) == ("u1", "c3")
    with pytest.raises(DataError, match="both classes are needed"):
        judging.labelled([row._replace(label=0.0) for row in make_rows(9)], "UTC")


def judged(*models: ScoredModel, champion: str = "logistic") -> dict[str, Any]:
    rows = make_rows()
    truth = judging.labelled(rows, "UTC")
    return judging.judge_rows(truth, rows, models, champion, EvaluationConfig(num_draws=50))


def test_one_record_holds_metrics_segments_comparisons_and_the_gate() -> None:
    rows = make_rows()
    record = judged(make_model(rows, "logistic", 0.8, 1), make_model(rows, "dien", 0.9, 2))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record["models"]["dien"]["segments"]) == {"user", "campaign_type", "category", "activity"}
    for by_name in record["models"]["dien"]["segments"].values():
        assert sum(entry["rows"] for entry in by_name.values()) == 400
        assert sum(entry["positives"] for entry in by_name.values()) == record["num_positives"]
    assert "not stored" in record["segments_left_out"]["device"]
    parts = record["models"]["dien"]["metrics"]["brier_parts"]
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"]
    total += parts["within_bin_variance"] - parts["within_bin_covariance"]
    assert total == pytest.approx(record["models"]["dien"]["metrics"]["brier"], abs=1e-12)
    assert [part["first_day"] for part in record["gate"]["cutoffs"]] == ["2017-10-04", "2017-10-06"]
    assert record["gate"]["comparison"] == record["comparisons"][0]


def test_every_logged_difference_says_what_would_have_been_detected(caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows()
    one = make_model(rows, "logistic", 0.8, 1)
    record = judged(
        one, make_model(rows, "dien", 0.85, 2), ScoredModel("twin", "t", one.logit, one.probability)
    )
    with caplog.at_level(logging.INFO, "couponflow"):
        judging._log(record)
    text = caplog.text
    assert text.count("minimum detectable 0.") == 2
    assert "twin against logistic: AUC +0.0000 [+0.0000, +0.0000], minimum detectable 0.0000, not" in text
    assert "gate: keep_champion" in text
