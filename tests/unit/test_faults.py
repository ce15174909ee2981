"""Faults on purpose: they fire once, at the place that they name, and nowhere that a real run could be."""

from contextlib import suppress
from pathlib import Path

import pytest
from builders import test_config

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import ConfigError, InfraError
from couponflow.lake import faults, runs

DAYS = DateRange.parse("2024-01-10:2024-01-11")


def ends(config: Config, job: str = "sessionize") -> str:
    """How one run ends: its record's status, or none."""
    with suppress(InfraError), record_run(job, config, DAYS) as run:
        run.rows["in"] = 1
    return [record.status for record in runs.load_all(config.lake.root_uri, job)][-1]


@pytest.mark.parametrize("stage", ["sessionize", "sessionize@2024-01-10"])
@pytest.mark.parametrize("point", ["before_run", "before_record"])
@pytest.mark.parametrize("action", ["exc", "enospc"])
def test_a_fault_fires_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, stage: str, point: str, action: str
) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"{stage}:{point}:{action}")
    assert ends(config, "clean_feeds") == "ok"
    assert ends(config) == "failed"
    assert ends(config) == "ok"


def test_another_day_or_no_variable_is_no_fault(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "sessionize@2024-01-11:before_run:exc")
    assert ends(config) == "ok"
    monkeypatch.delenv(faults.VARIABLE)
    assert ends(config) == "ok"


def test_after_the_record_the_run_counts(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "sessionize:after_record:exc")
    assert ends(config) == "ok"


@pytest.mark.parametrize(
    ("fault", "override", "words"),
    [
        ("sessionize:anywhere:kill", "spark.master=local[2]", "expected stage:point:action"),
        ("sessionize:before_run:burn", "spark.master=local[2]", "expected stage:point:action"),
        ("sessionize", "spark.master=local[2]", "expected stage:point:action"),
        ("sessionize:before_run:exc", "spark.master=yarn", "is no test on one machine; unset it"),
        ("sessionize:before_run:exc", "lake.root_uri=gs://mails/lake", "is no test on one machine; unset it"),
    ],
)
def test_a_fault_where_a_real_run_could_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, override: str, words: str
) -> None:
    monkeypatch.setenv(faults.VARIABLE, fault)
    config = test_config(tmp_path, override)
    with pytest.raises(ConfigError, match=words), record_run("sessionize", config, DAYS):
        pytest.fail("it must not start")


def test_points_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "train@1-2-3:step:exc")
    faults.check(str(tmp_path), "local[2]")
    for point, place in (("load", "1-2-3"), ("step", "0-2-3"), ("step", "1-2-4")):
        faults.fire(str(tmp_path), "train", point, place)
    with pytest.raises(InfraError, match="on purpose"):
        faults.fire(str(tmp_path), "train", "step", "1-2-3")
    faults.fire(str(tmp_path), "train", "step", "1-2-3")


def test_points_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "events:after_commit:exc")
    faults.fire(str(tmp_path), "events", "before_write", DAYS.start)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InfraError, match="on purpose"):
        faults.fire(str(tmp_path), "events", "after_commit", DAYS.start)
    faults.fire(str(tmp_path), "events", "after_commit", DAYS.start)
