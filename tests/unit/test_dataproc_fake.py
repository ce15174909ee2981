"""The real clients of google-cloud-dataproc on the stand-in, over gRPC and over REST."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from dataproc_drivers import PARENT, PLACE, POLLING, Drivers, make_cluster, make_job
from dataproc_server import Server, serving
from google.api_core import exceptions
from google.auth.exceptions import InvalidOperation
from google.cloud import dataproc_v1 as dp

State = dp.JobStatus.State


@pytest.fixture
def drivers() -> Drivers:
    return Drivers()


@pytest.fixture
def outputs() -> dict[str, bytes]:
    """What drivers printed, by URI."""
    return {}


@pytest.fixture(params=["grpc", "rest"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(drivers: Drivers, outputs: dict[str, bytes]) -> Iterator[Server]:
    with serving(drivers, store=outputs.__setitem__) as running:
        yield running


@pytest.fixture
def connect(server: Server, transport: str) -> Callable[[Any], Any]:
    return lambda kind: server.client(kind, transport)


@pytest.fixture
def jobs(connect: Callable[[Any], Any]) -> Any:
    return connect(dp.JobControllerClient)


@pytest.fixture
def cluster(connect: Callable[[Any], Any]) -> str:
    return make_cluster(connect(dp.ClusterControllerClient))


def submit(jobs: Any, job: dict[str, Any], request_id: str = "") -> Any:
    return jobs.submit_job(request={**PLACE, "job": job, "request_id": request_id})


def ended(server: Server, jobs: Any, job_id: str) -> Any:
    """The job once it is over, as the client sees it."""
    server.core.wait_for(lambda: bool(server.core.jobs.by_id[job_id].done))
    return jobs.get_job(job_id=job_id, **PLACE)


def connected(server: Server) -> tuple[Any, Any]:
    """Clients of clusters and jobs."""
    return server.client(dp.ClusterControllerClient, "grpc"), server.client(dp.JobControllerClient, "grpc")


def test_a_cluster_is_made_found_and_deleted(server: Server, connect: Callable[[Any], Any]) -> None:
    clusters = connect(dp.ClusterControllerClient)
    asked = {"cluster_name": "etl", "labels": {"app": "couponflow"}, "config": {"config_bucket": "staging"}}
    request = {**PLACE, "cluster": asked, "request_id": "one"}
    operation = clusters.create_cluster(request=request)
    assert operation.metadata.cluster_name == "etl"
    made = operation.result(polling=POLLING)
    assert made.status.state.name == "RUNNING"
    assert [status.state.name for status in made.status_history] == ["CREATING"]
    assert clusters.create_cluster(request=request).operation.name == operation.operation.name
    assert [one.cluster_name for one in clusters.list_clusters(**PLACE, filter="labels.app = couponflow")]
    assert not list(clusters.list_clusters(**PLACE, filter="labels.app = other"))
    assert clusters.get_cluster(cluster_name="etl", **PLACE).config.config_bucket == "staging"
    with pytest.raises(exceptions.Conflict):
        clusters.create_cluster(cluster=asked, **PLACE)
    clusters.delete_cluster(cluster_name="etl", **PLACE).result(polling=POLLING)
    with pytest.raises(exceptions.NotFound):
        clusters.get_cluster(cluster_name="etl", **PLACE)


def test_a_job_waits_runs_and_ends(
    server: Server, jobs: Any, cluster: str, drivers: Drivers, outputs: dict[str, bytes]
) -> None:
    gate = drivers.hold("gs://code/a.py")
    job_id = submit(jobs, make_job()).reference.job_id
    server.core.wait_for(lambda: server.core.jobs.by_id[job_id].status.state == State.RUNNING)
    seen = jobs.get_job(job_id=job_id, **PLACE)
    assert (seen.status.state, seen.done) == (State.RUNNING, False)
    gate.set()
    job = ended(server, jobs, job_id)
    assert (job.status.state, job.done) == (State.DONE, True)
    assert [status.state for status in job.status_history] == [State.PENDING, State.RUNNING]
    assert outputs == {f"{job.driver_output_resource_uri}.000000000": f"ran {job_id}\n".encode()}


def test_a_driver_that_fails_ends_the_job_in_error(server: Server, jobs: Any, cluster: str) -> None:
    job = ended(server, jobs, submit(jobs, make_job(exit_code=3)).reference.job_id)
    assert job.status.state == State.ERROR
    assert "driver exit 3" in job.status.details


def test_one_request_id_is_one_job(server: Server, jobs: Any, cluster: str, drivers: Drivers) -> None:
    first = submit(jobs, make_job(), "stage-2024-01-03-1")
    again = submit(jobs, make_job(), "stage-2024-01-03-1")
    other = submit(jobs, make_job(), "stage-2024-01-03-2")
    assert again.reference == first.reference
    assert other.reference != first.reference
    ended(server, jobs, first.reference.job_id)
    ended(server, jobs, other.reference.job_id)
    assert len(drivers.started) == 2


def test_a_lost_answer_and_a_repeat_are_one_job(
    server: Server, jobs: Any, cluster: str, drivers: Drivers, transport: str
) -> None:
    server.core.faults.lose_answer("SubmitJob")
    if transport == "rest":  # the library repeats what gRPC calls UNAVAILABLE, but no broken connection
        with pytest.raises(requests.exceptions.ConnectionError):
            submit(jobs, make_job(), "one")
    job = submit(jobs, make_job(), "one")
    assert ended(server, jobs, job.reference.job_id).status.state == State.DONE
    assert server.core.requests.count("SubmitJob") == 2
    assert len(drivers.started) == len(list(jobs.list_jobs(**PLACE))) == 1


def test_the_client_sits_out_two_refusals(server: Server, jobs: Any, cluster: str) -> None:
    server.core.faults.refuse("SubmitJob", "UNAVAILABLE", times=2)
    submit(jobs, make_job(), "one")
    assert server.core.requests.count("SubmitJob") == 3
    assert len(list(jobs.list_jobs(**PLACE))) == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("PERMISSION_DENIED", exceptions.Forbidden),
        ("RESOURCE_EXHAUSTED", exceptions.TooManyRequests),
    ],
)
def test_a_refusal_on_command(server: Server, jobs: Any, cluster: str, code: str, error: Any) -> None:
    server.core.faults.refuse("SubmitJob", code, "Insufficient 'CPUS' quota")
    with pytest.raises(error, match="Insufficient 'CPUS' quota"):
        submit(jobs, make_job())
    assert not list(jobs.list_jobs(**PLACE))


def test_an_unknown_caller(server: Server, jobs: Any, transport: str) -> None:
    server.core.faults.refuse("ListJobs", "UNAUTHENTICATED", times=3)
    # Over REST the library asks for new credentials first, and an anonymous caller has none.
    error = exceptions.Unauthorized if transport == "grpc" else InvalidOperation
    with pytest.raises(error):
        jobs.list_jobs(**PLACE)


def test_jobs_are_listed_by_labels_and_state(
    server: Server, jobs: Any, cluster: str, drivers: Drivers
) -> None:
    gate = drivers.hold("gs://code/held.py")
    ids = {}
    for stage, dt, main in [
        ("train", "2024-01-03", "a"),
        ("train", "2024-01-04", "held"),
        ("score", "2024-01-03", "a"),
    ]:
        job = make_job(f"gs://code/{main}.py", labels={"stage": stage, "dt": dt})
        ids[submit(jobs, job).reference.job_id] = f"{stage} {dt}"
    held = next(job_id for job_id, name in ids.items() if name == "train 2024-01-04")
    server.core.wait_for(
        lambda: all(job.done or job_id == held for job_id, job in server.core.jobs.by_id.items())
    )

    def found(text: str, **request: Any) -> list[str]:
        answer = jobs.list_jobs(request={**PLACE, "filter": text, **request})
        return [ids[job.reference.job_id] for job in answer]

    assert found("labels.stage = train AND labels.dt = 2024-01-03") == ["train 2024-01-03"]
    assert found("labels.stage = train", page_size=1) == ["train 2024-01-04", "train 2024-01-03"]
    assert found("status.state = ACTIVE") == ["train 2024-01-04"]
    assert found("status.state = NON_ACTIVE AND labels.stage = *") == ["score 2024-01-03", "train 2024-01-03"]
    assert found("", job_state_matcher=dp.ListJobsRequest.JobStateMatcher.ACTIVE) == ["train 2024-01-04"]
    assert found("labels.run = r1") == []
    for wrong in ("stage = train", "status.state = RUNNING", "labels.stage = train OR labels.dt = x"):
        with pytest.raises(exceptions.BadRequest):
            found(wrong)
    gate.set()


def test_a_running_job_is_cancelled_and_a_waiting_one_never_starts(
    server: Server, jobs: Any, cluster: str, drivers: Drivers
) -> None:
    drivers.hold("gs://code/held.py")
    first, second, waiting = (submit(jobs, make_job("gs://code/held.py")).reference.job_id for _ in range(3))
    server.core.wait_for(lambda: len(drivers.started) == 2)
    assert jobs.cancel_job(job_id=waiting, **PLACE).status.state == State.CANCELLED
    assert jobs.cancel_job(job_id=first, **PLACE).status.state == State.CANCEL_STARTED
    assert ended(server, jobs, first).status.state == State.CANCELLED
    assert ended(server, jobs, second).status.state == State.DONE  # the gate was one for both
    assert len(drivers.started) == 2
    with pytest.raises(exceptions.BadRequest, match="in state: 'DONE'"):
        jobs.cancel_job(job_id=second, **PLACE)


def test_a_restartable_job_is_driven_again(server: Server, jobs: Any, cluster: str, drivers: Drivers) -> None:
    server.core.faults.fail_driver("train", exit_code=137)
    job = submit(jobs, make_job(scheduling={"max_failures_per_hour": 1}))
    found = ended(server, jobs, job.reference.job_id)
    assert found.status.state == State.DONE
    states = [status.state.name for status in found.status_history]
    assert states == ["PENDING", "RUNNING", "ATTEMPT_FAILURE", "RUNNING"]
    server.core.faults.fail_driver("train", exit_code=137)
    assert ended(server, jobs, submit(jobs, make_job()).reference.job_id).status.state == State.ERROR


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"job": {"placement": {"cluster_name": "absent"}}}, exceptions.NotFound),
        ({"job": {"labels": {"stage": "Train"}}}, exceptions.BadRequest),
        ({"job": {"labels": {"dt": "x" * 64}}}, exceptions.BadRequest),
        ({"job": {"pyspark_job": {}}}, exceptions.BadRequest),
        ({"job": {"reference": {"job_id": "known"}}}, exceptions.Conflict),
        ({"job": {"reference": {"job_id": "a b"}}}, exceptions.BadRequest),
        ({"job": {"scheduling": {"max_failures_per_hour": 11}}}, exceptions.BadRequest),
        ({"request_id": "x" * 41}, exceptions.BadRequest),
        ({"request_id": "a:b"}, exceptions.BadRequest),
        ({"project_id": "other"}, exceptions.Forbidden),
        ({"region": "us-east1"}, exceptions.BadRequest),
    ],
    ids=str,
)
def test_what_the_service_refuses(
    jobs: Any, cluster: str, change: dict[str, Any], error: type[Exception]
) -> None:
    submit(jobs, make_job(reference={"job_id": "known"}))
    request = {**PLACE, **change, "job": make_job(**change.get("job", {}))}
    with pytest.raises(error):
        jobs.submit_job(request=request)
    assert len(list(jobs.list_jobs(**PLACE))) == 1


def test_what_is_not_there(jobs: Any) -> None:
    for ask in (jobs.get_job, jobs.cancel_job, jobs.delete_job):
        with pytest.raises(exceptions.NotFound):
            ask(job_id="absent", **PLACE)


def test_an_operation_that_never_ends(server: Server, connect: Callable[[Any], Any]) -> None:
    server.core.faults.never_end("CreateCluster")
    clusters = connect(dp.ClusterControllerClient)
    operation = clusters.create_cluster(cluster={"cluster_name": "etl"}, **PLACE)
    with pytest.raises(
        exceptions.RetryError if hasattr(exceptions, "never") else Exception
    ):  # replaced below
        operation.result(polling=POLLING.with_timeout(0.1))
    assert clusters.get_cluster(cluster_name="etl", **PLACE).status.state.name == "CREATING"


def test_a_deleted_cluster_takes_its_jobs_along(
    server: Server, jobs: Any, cluster: str, drivers: Drivers, connect: Callable[[Any], Any]
) -> None:
    drivers.hold("gs://code/a.py")
    job_id = submit(jobs, make_job()).reference.job_id
    server.core.wait_for(lambda: len(drivers.started) == 1)
    with pytest.raises(exceptions.BadRequest):
        jobs.delete_job(job_id=job_id, **PLACE)
    connect(dp.ClusterControllerClient).delete_cluster(cluster_name="etl", **PLACE).result(polling=POLLING)
    job = ended(server, jobs, job_id)
    assert (job.status.state, job.status.details) == (
        State.ERROR,
        "The cluster was deleted while the job was active",
    )
    jobs.delete_job(job_id=job_id, **PLACE)
    assert not list(jobs.list_jobs(**PLACE))


def test_a_runner_that_breaks_is_a_job_in_error(
    server: Server, jobs: Any, cluster: str, outputs: dict[str, bytes]
) -> None:
    job = ended(server, jobs, submit(jobs, make_job("gs://code/broken.py")).reference.job_id)
    assert job.status.state == State.ERROR
    assert b"the runner failed: RuntimeError" in outputs[f"{job.driver_output_resource_uri}.000000000"]


def test_an_output_that_cannot_be_stored_is_a_job_in_error(drivers: Drivers) -> None:
    def refuse(uri: str, content: bytes) -> None:
        raise OSError("no space left")

    with serving(drivers, store=refuse) as server:
        clusters, jobs = connected(server)
        clusters.create_cluster(cluster={"cluster_name": "etl"}, **PLACE).result(polling=POLLING)
        job = ended(server, jobs, submit(jobs, make_job()).reference.job_id)
    assert "could not be stored: OSError: no space left" in job.status.details


def test_a_policy_is_made_read_and_replaced(connect: Callable[[Any], Any]) -> None:
    policies, clusters = connect(dp.AutoscalingPolicyServiceClient), connect(dp.ClusterControllerClient)
    name = f"{PARENT}/autoscalingPolicies/etl-policy"
    cluster = {"cluster_name": "etl", "config": {"autoscaling_config": {"policy_uri": name}}}
    with pytest.raises(exceptions.NotFound):
        policies.get_autoscaling_policy(name=name)
    with pytest.raises(exceptions.NotFound):
        clusters.create_cluster(cluster=cluster, **PLACE)
    policy = dp.AutoscalingPolicy(id="etl-policy", worker_config={"max_instances": 2})
    assert policies.create_autoscaling_policy(parent=PARENT, policy=policy).name == name
    with pytest.raises(exceptions.Conflict):
        policies.create_autoscaling_policy(parent=PARENT, policy=policy)
    clusters.create_cluster(cluster=cluster, **PLACE).result(polling=POLLING)
    changed = policies.get_autoscaling_policy(name=name)
    changed.worker_config.max_instances = 5
    policies.update_autoscaling_policy(policy=changed)
    assert policies.get_autoscaling_policy(name=name).worker_config.max_instances == 5
    assert [one.id for one in policies.list_autoscaling_policies(parent=PARENT)] == ["etl-policy"]
    with pytest.raises(exceptions.BadRequest, match="is used by etl"):
        policies.delete_autoscaling_policy(name=name)


def test_a_batch_has_one_life(server: Server, drivers: Drivers, connect: Callable[[Any], Any]) -> None:
    batches = connect(dp.BatchControllerClient)
    parent = PARENT.replace("/regions/", "/locations/")

    def create(batch_id: str, *args: str) -> Any:
        program = {"main_python_file_uri": "gs://code/b.py", "args": args}
        batch = {"pyspark_batch": program, "labels": {"stage": "score"}}
        return batches.create_batch(parent=parent, batch=batch, batch_id=batch_id)

    made = create("score-2024-01-03").result(polling=POLLING)
    assert (made.state.name, made.name) == ("SUCCEEDED", f"{parent}/batches/score-2024-01-03")
    with pytest.raises(exceptions.Conflict):
        create("score-2024-01-03")
    with pytest.raises(exceptions.BadRequest):
        create("Score")
    with pytest.raises(exceptions.GoogleAPICallError, match="driver exit 3"):
        create("score-2024-01-04", "3").result(polling=POLLING)
    drivers.hold("gs://code/b.py")
    held = create("score-2024-01-05")
    server.core.wait_for(lambda: len(drivers.started) == 3)
    batches.cancel_operation(request={"name": held.operation.name})
    with pytest.raises(exceptions.GoogleAPICallError, match="was cancelled"):
        held.result(polling=POLLING)
    states = {
        batch.name.rpartition("/")[2]: batch.state.name for batch in batches.list_batches(parent=parent)
    }
    assert states == {
        "score-2024-01-03": "SUCCEEDED",
        "score-2024-01-04": "FAILED",
        "score-2024-01-05": "CANCELLED",
    }
    assert batches.get_batch(name=made.name).labels == {"stage": "score"}


def test_an_answer_is_what_was_so_when_it_was_given(server: Server) -> None:
    clusters, jobs = connected(server)
    clusters.create_cluster(cluster={"cluster_name": "etl"}, **PLACE).result(polling=POLLING)
    answer = server.core.call("SubmitJob", dp.SubmitJobRequest(job=make_job(), **PLACE))
    assert ended(server, jobs, answer.reference.job_id).status.state == State.DONE
    assert answer.status.state == State.PENDING


def test_closing_ends_what_runs(drivers: Drivers) -> None:
    with serving(drivers) as server:
        clusters, jobs = connected(server)
        clusters.create_cluster(cluster={"cluster_name": "etl"}, **PLACE).result(polling=POLLING)
        gate = drivers.hold("gs://code/a.py")
        submit(jobs, make_job())
        server.core.wait_for(lambda: len(drivers.started) == 1)
    assert gate.is_set()  # by stop: nobody else has opened it
    assert {job.status.state for job in server.core.jobs.by_id.values()} == {State.ERROR}
