"""A release in a real ``spark-submit``: package, config and key arrive, and codes come back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from dataproc_world import State, World, world
from spark_runner import SparkRunner

from couponflow.lake import program, runs


@pytest.fixture
def here(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    key = {"COUPONFLOW_USER_KEY": "of a test, and long enough to be a key"}
    runner = SparkRunner(tmp_path / "drivers", server, master="local[1]", environment=key)
    with world(tmp_path, "grpc", runner) as made:
        yield made


def test_missing_data_end_a_job_for_good_and_its_restarts_at_once(here: World) -> None:
    failed = here.call("submit", "clean_events", "--dates", "2017-10-01")
    assert failed.exit_code == 3, failed.output
    (job,) = here.jobs
    assert f"job {job.reference.job_id} failed: " in failed.stderr
    states = [status.state for status in (*job.status_history, job.status)]
    assert states.count(State.ATTEMPT_FAILURE) == 3  # Dataproc does not know that it is in vain
    (record,) = runs.load_all(here.lake)  # the restarts have not begun
    assert record.attempt_key == job.reference.job_id
    assert record.code_version == program.version()
    assert record.error in failed.stderr
