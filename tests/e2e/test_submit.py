"""``couponflow submit`` on stand-ins of Dataproc and of the object store: one job, whatever gets lost."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from dataproc_world import State, World, world, write_environment
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.lake import attempts, runs, storage

DAY = ("--dates", "2017-10-01")


@pytest.fixture(params=["rest", "grpc"])
def here(
    request: pytest.FixtureRequest, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    with world(tmp_path, str(request.param)) as made:
        yield made


def release_of(here: World) -> str:
    """The one release that was uploaded."""
    code = here.lake.replace("-lake/lake", "-code")
    (name,) = storage.list_names(f"{code}/releases")
    return name


def test_a_job_runs_on_a_cluster_of_its_own_and_is_not_run_again(here: World) -> None:
    done = here.call("submit", "sessionize", *DAY)
    assert done.exit_code == 0, done.output
    (job,) = here.jobs
    assert (
        f"job {job.reference.job_id}: sessionize 2017-10-01:2017-10-01 on cluster couponflow-" in done.stdout
    )
    assert f"ran {job.reference.job_id}\n" in done.stderr
    assert here.count("CreateCluster") == here.count("DeleteCluster") == 1
    again = here.call("submit", "sessionize", *DAY)
    assert again.exit_code == 0
    assert "attempt 1 of sessionize 2017-10-01:2017-10-01 is there, state DONE" in again.stdout
    assert here.count("SubmitJob") == here.count("CreateCluster") == 1
    assert here.call("submit", "sessionize", *DAY, "--attempt", "2").exit_code == 0
    assert len(here.jobs) == 2


def test_what_the_dry_run_prints_is_what_is_sent(here: World) -> None:
    printed = json.loads(here.call("submit", "sessionize", *DAY, "--dry-run").stdout)
    assert here.core.requests == []
    assert here.call("submit", "sessionize", *DAY).exit_code == 0
    (job,) = here.jobs
    assert job.reference.job_id == printed["submitJob"]["requestId"]
    assert list(job.pyspark_job.args) == printed["submitJob"]["job"]["pysparkJob"]["args"]
    assert dict(job.labels) == printed["submitJob"]["job"]["labels"]
    for uri in (job.pyspark_job.main_python_file_uri, *job.pyspark_job.python_file_uris):
        assert f"/releases/{release_of(here)}/" in uri
        assert storage.exists(uri)


def test_an_accepted_job_whose_answer_was_lost_is_one_job(here: World) -> None:
    here.core.faults.lose_answer("SubmitJob")
    here.core.faults.lose_answer("CreateCluster")
    done = here.call("submit", "sessionize", *DAY)
    assert done.exit_code == 0, done.output
    assert len(here.jobs) == 1
    assert here.count("SubmitJob") == here.count("CreateCluster") == 2


def test_lost_polls_are_sat_out(here: World) -> None:
    gate = here.hold("sessionize")
    assert here.call("submit", "sessionize", *DAY, "--async").exit_code == 0
    here.core.faults.refuse("GetJob", "UNAVAILABLE", times=2)
    here.core.faults.lose_answer("GetJob")
    gate.set()
    done = here.call("submit", "sessionize", *DAY)
    assert done.exit_code == 0, done.output
    assert not here.core.faults.refusals["GetJob"]
    assert len(here.jobs) == 1


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_the_exit_code_of_the_driver_is_ours(here: World, code: int) -> None:
    here.core.faults.fail_driver("sessionize", code, times=4)
    failed = here.call("submit", "sessionize", *DAY)
    assert failed.exit_code == code
    (job,) = here.jobs
    assert job.status.state == State.ERROR
    assert f"sessionize 2017-10-01:2017-10-01: job {job.reference.job_id} failed" in failed.stderr
    assert here.core.clusters.by_name == {} or here.count("DeleteCluster") == 1
    again = here.call("submit", "sessionize", *DAY)
    assert again.exit_code == 0, again.output
    assert len(here.jobs) == 2


def test_a_final_failure_is_told_in_the_words_of_the_driver(here: World) -> None:
    planned = json.loads(here.call("submit", "sessionize", *DAY, "--dry-run").stdout)
    key = planned["submitJob"]["requestId"]
    content = {"exit_code": 3, "error": "feed events has no delivery for 2017-10-01; land it"}
    storage.create(f"{here.lake}/attempts/{key}.json", json.dumps(content).encode(), key)
    assert attempts.noted(here.lake, key) is not None
    here.core.faults.fail_driver("sessionize", 1, times=4)
    failed = here.call("submit", "sessionize", *DAY)
    assert failed.exit_code == 3
    assert f"job {key} failed: feed events has no delivery for 2017-10-01; land it" in failed.stderr


REFUSALS = [
    ("SubmitJob", "RESOURCE_EXHAUSTED", 5, "quota exhausted"),
    ("SubmitJob", "PERMISSION_DENIED", 5, "access denied"),
    ("SubmitJob", "UNAUTHENTICATED", 5, "no valid credentials"),
    ("CreateCluster", "RESOURCE_EXHAUSTED", 5, "lower num_workers and max_secondary_workers"),
    ("CreateCluster", "INVALID_ARGUMENT", 2, "Dataproc refuses the request"),
    ("CreateCluster", "NOT_FOUND", 2, "create what it names"),
    ("GetJob", "PERMISSION_DENIED", 5, "grant it roles/dataproc.editor"),
]


@pytest.mark.parametrize(("rpc", "code", "exit_code", "words"), REFUSALS)
def test_a_refusal_says_where_and_what_to_do(
    here: World, rpc: str, code: str, exit_code: int, words: str
) -> None:
    here.core.faults.refuse(rpc, code)
    failed = here.call("submit", "sessionize", *DAY)
    assert failed.exit_code == exit_code
    assert words in failed.stderr
    assert "project couponflow-ci, region us-west1" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert here.jobs == []


def test_a_wrong_project_starts_nothing(here: World) -> None:
    here.change("couponflow-ci", "couponflow-xy")
    failed = here.call("submit", "sessionize", *DAY)
    assert failed.exit_code == 5
    assert "in project couponflow-xy, region us-west1: access denied" in failed.stderr
    assert here.core.clusters.by_name == {}


@pytest.mark.parametrize("duty", ["code", "lake", "staging"])
def test_a_missing_bucket_is_found_before_a_cluster_starts(here: World, duty: str) -> None:
    here.change(here.lake.removeprefix("gs://").replace("-lake/lake", f"-{duty}"), f"couponflow-none-{duty}")
    failed = here.call("submit", "sessionize", *DAY)
    assert failed.exit_code == 2
    assert f"bucket couponflow-none-{duty} (cloud.buckets.{duty})" in failed.stderr
    assert here.count("CreateCluster") == here.count("SubmitJob") == 0


def test_a_cluster_that_is_not_there_is_named(here: World) -> None:
    failed = here.call("submit", "sessionize", *DAY, "--cluster", "etl-9")
    assert failed.exit_code == 2
    assert "cluster etl-9 in project couponflow-ci, region us-west1: there is none" in failed.stderr
    assert here.count("SubmitJob") == 0


def test_a_job_is_cancelled(here: World) -> None:
    here.hold("sessionize")
    assert here.call("submit", "sessionize", *DAY, "--async").exit_code == 0
    (job,) = here.jobs
    here.core.wait_for(lambda: job.status.state == State.RUNNING)
    assert here.call("cancel", job.reference.job_id).exit_code == 0
    here.core.wait_for(lambda: job.status.state == State.CANCELLED)
    assert "CANCELLED" in here.call("cancel", job.reference.job_id).stdout
    assert here.call("cancel", "no-such-job").exit_code == 2


def test_a_client_that_is_killed_and_started_again_meets_its_job(here: World) -> None:
    gate = here.hold("sessionize")
    killed = here.spawn("submit", "sessionize", *DAY)
    here.core.wait_for(lambda: bool(here.jobs) and here.jobs[0].status.state == State.RUNNING, 120)
    killed.kill()
    killed.communicate()
    gate.set()
    again = here.call("submit", "sessionize", *DAY)
    assert again.exit_code == 0, again.output
    assert len(here.jobs) == here.count("CreateCluster") == 1
    assert here.drivers.started == [here.drivers.started[0]]


@pytest.mark.parametrize("cancels", [False, True])
def test_an_interrupt_leaves_the_job_or_cancels_it(here: World, cancels: bool) -> None:
    gate = here.hold("sessionize")
    client = here.spawn("submit", "sessionize", *DAY, *["--cancel-on-interrupt"] * cancels)
    here.core.wait_for(lambda: bool(here.jobs) and here.jobs[0].status.state == State.RUNNING, 120)
    (job,) = here.jobs
    polls = here.count("GetJob")
    here.core.wait_for(lambda: here.count("GetJob") > polls + 1)  # it waits, and does nothing else
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=60)
    assert client.returncode == 130
    if cancels:
        here.core.wait_for(lambda: job.status.state == State.CANCELLED)
        return
    assert f"`couponflow cancel {job.reference.job_id} --env {here.file}` ends it" in said
    assert job.status.state == State.RUNNING
    gate.set()
    here.core.wait_for(lambda: job.status.state == State.DONE)


def test_a_workflow_of_a_day(here: World) -> None:
    done = here.call("submit", "--workflow", "daily", *DAY)
    assert done.exit_code == 0, done.output
    assert [job.labels["stage"] for job in here.jobs][-1] == "monitor"
    assert len(here.jobs) == 6
    assert {job.labels["dt"] for job in here.jobs} == {"2017-10-01"}
    again = here.call("submit", "--workflow", "daily", *DAY)
    assert again.exit_code == 0
    assert "is done already" in again.stdout
    assert len(here.jobs) == 6


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_workflow_ends_as_its_first_failed_step(here: World, is_silent: bool) -> None:
    here.core.faults.silent_workflows = is_silent
    here.core.faults.fail_driver("sessionize", 3)
    failed = here.call("submit", "--workflow", "daily", *DAY)
    assert failed.exit_code == 3
    assert "sessionize 2017-09-28:2017-10-02: job sessionize-" in failed.stderr
    num_jobs = len(here.jobs)
    assert here.call("submit", "--workflow", "daily", *DAY).exit_code == 0
    assert len(here.jobs) == num_jobs + 6  # the next attempt runs every step, which skip what is finished


def test_a_workflow_that_runs_is_met(here: World) -> None:
    gate = here.hold("clean_events")
    assert here.call("submit", "--workflow", "daily", *DAY, "--async").exit_code == 0
    here.core.wait_for(lambda: bool(here.jobs))
    here.core.faults.lose_answer("GetOperation")
    gate.set()
    done = here.call("submit", "--workflow", "daily", *DAY)
    assert done.exit_code == 0, done.output
    assert len(here.jobs) == 6


def test_the_register_joins_jobs_with_run_records(here: World) -> None:
    here.core.faults.fail_driver("sessionize", 1, times=4)
    assert here.call("submit", "sessionize", *DAY).exit_code == 5
    assert here.call("submit", "monitor", *DAY).exit_code == 0
    failed, _ = here.jobs
    record = runs.start("sessionize", "2017-10-01:2017-10-01", {}, "")
    record.attempt_key = failed.reference.job_id
    runs.finish(here.lake, record, "failed", "disk full writing sessions; free space")
    rows = json.loads(here.call("status", "--on", "dataproc", "--json").stdout)
    assert [(row["stage"], row["dates"], row["state"]) for row in rows] == [
        ("sessionize", "2017-10-01:2017-10-01", "ERROR"),
        ("monitor", "2017-10-01:2017-10-01", "DONE"),
    ]
    assert rows[0]["failure"] == "disk full writing sessions; free space"
    assert rows[0]["run_id"] == record.run_id
    assert rows[1]["failure"] == ""
    hourly = (
        3 * 4 * (0.031611 + 0.010) + 3 * 16 * 0.004237 + 3 * 100 * 0.10 / 730
    )  # of ci, by its price table
    assert rows[1]["amount"] == pytest.approx(hourly * rows[1]["seconds"] / 3600)
    url = f"https://console.cloud.google.com/dataproc/jobs/{failed.reference.job_id}?project=couponflow-ci"
    assert rows[0]["url"] == f"{url}&region=us-west1"
    only = json.loads(here.call("status", "--on", "dataproc", "--job", "monitor", "--json").stdout)
    assert [row["stage"] for row in only] == ["monitor"]


def test_expired_credentials_are_told_before_anything_starts(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google's own endpoint with credentials of a file that is not there; nothing leaves this machine."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    path = write_environment(tmp_path, "", "cinone")
    failed = CliRunner().invoke(app, ["submit", "sessionize", *DAY, "--env", str(path)])
    assert failed.exit_code == 5
    assert "no valid credentials" in failed.stderr
    assert "gcloud auth application-default login" in failed.stderr


def test_what_a_driver_prints_is_read_on_from_a_store(bucket: str) -> None:
    blob = storage._blob(f"{bucket}/output")
    blob.upload_from_string(b"one\n")
    assert storage.read_from(f"{bucket}/output", 0) == b"one\n"
    assert storage.read_from(f"{bucket}/output", 4) == b""
    blob.upload_from_string(b"one\ntwo\n")
    assert storage.read_from(f"{bucket}/output", 4) == b"two\n"
    assert storage.has_bucket(bucket.removeprefix("gs://"))
    assert not storage.has_bucket("couponflow-is-not-there")
