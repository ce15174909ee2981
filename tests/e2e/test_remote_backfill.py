"""``couponflow backfill --on dataproc``: chunks as jobs that leave run records, resumed and refused."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dataproc_world import StageDrivers, State, World, world, write_object

from couponflow.cloud.requests import argument
from couponflow.dates import DateRange
from couponflow.lake import leases, runs, storage

WEEK = ("--from-date", "2017-10-01", "--to-date", "2017-10-06")
REMOTE = ("--on", "dataproc")


class RecordingDrivers(StageDrivers):
    """Drivers that do what each of ours does for a plan: they leave a run record under their key."""

    def __init__(self) -> None:
        super().__init__()
        self.lake = ""
        self.dates: list[tuple[str, str]] = []
        self.most_at_once = self.at_once = 0

    def __call__(self, job: Any) -> tuple[int, str]:
        args = list(job.pyspark_job.args)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        stage, dates = job.labels["stage"], argument(args, "--dates")
        self.dates.append((stage, dates))
        record = runs.start(stage, dates, {}, "")
        record.attempt_key = argument(args, "--attempt-key")
        code, text = super().__call__(job)
        runs.finish(self.lake, record, "ok")
        self.at_once -= 1
        return code, text


@pytest.fixture
def here(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    drivers = RecordingDrivers()
    with world(tmp_path, "grpc", drivers) as made:
        drivers.lake = made.lake
        yield made


def covered(dates: list[tuple[str, str]], stage: str) -> list[str]:
    """Every day that the jobs of a stage ran, in order of the days."""
    return sorted(str(day) for one, text in dates if one == stage for day in DateRange.parse(text).days())


DAYS = [f"2017-10-0{n}" for n in range(1, 7)]


def test_chunks_run_at_once_on_one_cluster_and_a_second_call_finds_nothing_to_do(here: World) -> None:
    gate = here.hold("monitor")
    here.core.works.submit(lambda: (here.core.wait_for(lambda: here.drivers.at_once == 2), gate.set()))
    call = ("backfill", "monitor", *WEEK, *REMOTE, "--chunk-days", "2", "--max-active-runs", "2")
    done = here.call(*call)
    assert done.exit_code == 0, done.output
    assert "6 days of stages in 3 jobs" in done.stdout
    assert covered(here.drivers.dates, "monitor") == DAYS
    assert here.drivers.most_at_once == 2
    assert here.count("CreateCluster") == here.count("DeleteCluster") == 1
    assert len({job.labels["run"] for job in here.jobs}) == 1
    again = here.call(*call)
    assert again.exit_code == 0, again.output
    assert len(here.jobs) == 3
    assert here.count("CreateCluster") == 1
    anew = here.call(*call, "--reprocess-behavior", "completed")
    assert anew.exit_code == 0, anew.output
    assert covered(here.drivers.dates, "monitor") == sorted(DAYS * 2)


def test_stages_run_in_order_and_a_missing_vocabulary_blocks_the_last(here: World) -> None:
    for day in DAYS:
        for feed in ("events", "orders", "sends", "redemptions", "consents", "costs"):
            write_object(f"{here.lake}/raw/{feed}/ingest_date={day}/part.jsonl", b"{}")
    done = here.call("backfill", "all", *WEEK, *REMOTE)
    assert done.exit_code == 3, done.output
    assert "blocked, no vocabulary" in done.stderr
    stages = list(dict.fromkeys(stage for stage, _ in here.drivers.dates))
    assert stages == ["clean_events", "clean_feeds", "sessionize", "attribute_conversions"]
    assert covered(here.drivers.dates, "clean_events") == DAYS


def test_a_dry_run_prints_plan_and_cost_and_asks_dataproc_nothing(here: World) -> None:
    record = runs.start("monitor", "2017-09-30:2017-09-30", {}, "")
    record.attempt_key = "earlier"
    record.started_time = (runs.utc_now() - timedelta(hours=1)).isoformat()
    runs.finish(here.lake, record, "ok")
    shown = here.call("backfill", "monitor", *WEEK, *REMOTE, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "never run" in shown.stdout
    hourly = (
        3 * 4 * (0.031611 + 0.010) + 3 * 16 * 0.004237 + 3 * 100 * 0.10 / 730
    )  # of ci, by its price table
    assert f"{6 * hourly:.2f}" in shown.stdout
    assert here.core.requests == []


def test_a_failed_chunk_ends_it_and_the_next_call_goes_on(here: World) -> None:
    here.core.faults.fail_driver("monitor", 5, times=4)
    call = ("backfill", "monitor", *WEEK, *REMOTE, "--chunk-days", "2")
    failed = here.call(*call)
    assert failed.exit_code == 5
    assert "monitor 2017-10-01:2017-10-02: job" in failed.stderr
    assert len(here.jobs) == 1
    assert here.count("DeleteCluster") == 1
    assert here.call(*call).exit_code == 0
    assert covered(here.drivers.dates, "monitor") == DAYS
    assert len(here.jobs) == 4


def test_a_backfill_that_was_killed_meets_the_jobs_that_run(here: World) -> None:
    """Its job runs on and holds the lease; the same call waits for it, and goes on behind it."""
    gate = here.hold("monitor")
    call = ("backfill", "monitor", *WEEK, *REMOTE, "--chunk-days", "2")
    killed = here.spawn(*call)
    here.core.wait_for(lambda: here.drivers.at_once == 1, 120)
    killed.kill()
    killed.communicate()
    (job,) = here.jobs
    held = runs.start("monitor", "2017-10-01:2017-10-02", {}, "")
    held.attempt_key = job.reference.job_id
    scope = ("verdicts", DateRange.parse("2017-10-01:2017-10-02"))
    with leases.held(here.lake, held, (scope,)):
        here.core.works.submit(lambda: (here.core.wait_for(lambda: here.count("ListJobs") == 2), gate.set()))
        done = here.call(*call)
    assert done.exit_code == 0, done.output
    assert covered(here.drivers.dates, "monitor") == DAYS
    assert len(here.jobs) == 3


def test_dates_that_another_holds_are_refused_before_a_cluster_starts(here: World) -> None:
    other = runs.start("monitor", "2017-10-03:2017-10-03", {}, "")
    with leases.held(here.lake, other, (("verdicts", DateRange.parse("2017-10-03")),)):
        refused = here.call("backfill", "monitor", *WEEK, *REMOTE)
    assert refused.exit_code == 4
    assert f"is held by run {other.run_id}" in refused.stderr
    assert here.count("CreateCluster") == here.count("SubmitJob") == 0


def test_a_job_that_still_waits_for_its_turn_is_a_holder_too(here: World) -> None:
    here.hold("monitor")
    assert here.call("submit", "monitor", "--dates", "2017-10-06:2017-10-09", "--async").exit_code == 0
    (job,) = here.jobs
    refused = here.call("backfill", "monitor", *WEEK, *REMOTE)
    assert refused.exit_code == 4
    assert f"job {job.reference.job_id} (monitor 2017-10-06:2017-10-09" in refused.stderr
    assert len(here.jobs) == 1
    assert job.status.state != State.DONE
    assert storage.list_names(f"{here.lake}/runs") == []


def test_a_cluster_stays_while_a_job_of_it_goes_on(here: World) -> None:
    """The command fails as the service refuses its polls; the job that it has started lives on."""
    gate = here.hold("monitor")
    here.core.works.submit(
        lambda: (
            here.core.wait_for(lambda: here.drivers.at_once == 1),
            here.core.faults.refuse("GetJob", "PERMISSION_DENIED"),
        )
    )
    failed = here.call("backfill", "monitor", *WEEK, *REMOTE)
    assert failed.exit_code == 5
    assert here.count("DeleteCluster") == 0
    (job,) = here.jobs
    gate.set()
    here.core.wait_for(lambda: job.status.state == State.DONE)
