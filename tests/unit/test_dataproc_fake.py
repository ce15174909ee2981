"""The real clients of google-cloud-dataproc on the stand-in, over gRPC and over REST."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from dataproc_messages import parsed
from dataproc_server import Server, serving
from google.api_core import exceptions
from google.api_core.retry import Retry
from google.auth.exceptions import InvalidOperation
from google.cloud import dataproc_v1 as dp

PROJECT, REGION = "couponflow-ci", "us-west1"
PLACE = {"project_id": PROJECT, "region": REGION}
PARENT = f"projects/{PROJECT}/regions/{REGION}"
#: How often the tests look at an operation: they wait for what the stand-in does, which takes no time.
POLLING = Retry(predicate=lambda error: True, initial=0.005, maximum=0.02, timeout=30)
State = dp.JobStatus.State


class Drivers:
    """Drivers whose end a test decides; the exit code is an argument of the job."""

    def __init__(self) -> None:
        self.started: list[str] = []  # main files with their arguments, in order
        self.gates: dict[str, threading.Event] = {}

    def __call__(self, job: dp.Job) -> tuple[int, str]:
        program = job.pyspark_job
        self.started.append(" ".join([program.main_python_file_uri, *program.args]))
        gate = self.gates.get(program.main_python_file_uri)
        if gate is not None and not gate.wait(30):
            return 99, "the gate stayed shut"
        code = int(program.args[0]) if program.args and program.args[0].isdecimal() else 0
        return code, f"ran {job.reference.job_id}\n"

    def stop(self, job_id: str) -> None:
        for gate in self.gates.values():
            gate.set()

    def hold(self, main: str) -> threading.Event:
        """Drivers of this file wait until the event is set."""
        self.gates[main] = threading.Event()
        return self.gates[main]


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
    """A cluster that runs."""
    clusters = connect(dp.ClusterControllerClient)
    operation = clusters.create_cluster(cluster={"cluster_name": "etl"}, **PLACE)
    return str(operation.result(polling=POLLING).cluster_name)


def make_job(main: str = "gs://code/a.py", exit_code: int = 0, **over: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "placement": {"cluster_name": "etl"},
        "labels": {"stage": "train", "dt": "2024-01-03"},
        "pyspark_job": {"main_python_file_uri": main, "args": [str(exit_code)]},
    }
    return job | over


def submit(jobs: Any, job: dict[str, Any], request_id: str = "") -> Any:
    return jobs.submit_job(request={**PLACE, "job": job, "request_id": request_id})


def ended(server: Server, jobs: Any, job_id: str) -> Any:
    """The job once it is over, as the client sees it."""
    server.core.wait_for(lambda: bool(server.core.jobs.by_id[job_id].done))
    return jobs.get_job(job_id=job_id, **PLACE)


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


def make_template(**over: Any) -> Any:
    """Two first steps, one that needs both, a last one; DAY is the label and the argument of each."""
    steps = {"left": [], "right": [], "both": ["left", "right"], "last": ["both"]}
    template: dict[str, Any] = {
        "id": "daily",
        "placement": {
            "managedCluster": {"clusterName": "daily", "labels": {"app": "couponflow"}, "config": {}}
        },
        "jobs": [
            {
                "stepId": step,
                "prerequisiteStepIds": before,
                "labels": {"stage": step, "dt": "day"},
                "pysparkJob": {"mainPythonFileUri": f"gs://code/{step}.py", "args": ["0", "day"]},
            }
            for step, before in steps.items()
        ],
        "parameters": [
            {
                "name": "DAY",
                "validation": {"regex": {"regexes": [r"\d\d\d\d-\d\d-\d\d"]}},
                "fields": [
                    path
                    for step in steps
                    for path in (f"jobs['{step}'].labels['dt']", f"jobs['{step}'].pySparkJob.args[1]")
                ],
            }
        ],
    }
    return parsed(dp.WorkflowTemplate, template | over)


@pytest.fixture
def templates(connect: Callable[[Any], Any]) -> Any:
    """The client, with a template in place."""
    client = connect(dp.WorkflowTemplateServiceClient)
    client.create_workflow_template(parent=PARENT, template=make_template())
    return client


def instantiate(templates: Any, **request: Any) -> Any:
    name = f"{PARENT}/workflowTemplates/daily"
    return templates.instantiate_workflow_template(
        request={"name": name, "parameters": {"DAY": "2024-01-03"}, **request}
    )


def test_a_workflow_runs_its_graph_on_its_own_cluster(
    server: Server, templates: Any, jobs: Any, drivers: Drivers, connect: Callable[[Any], Any]
) -> None:
    gate = drivers.hold("gs://code/both.py")
    operation = instantiate(templates)
    server.core.wait_for(lambda: len(drivers.started) == 3)
    clusters = list(
        connect(dp.ClusterControllerClient).list_clusters(**PLACE, filter="labels.app = couponflow")
    )
    assert [one.cluster_name.rpartition("-")[0] for one in clusters] == ["daily"]
    gate.set()
    operation.result(polling=POLLING)
    main = [one.removeprefix("gs://code/").replace(".py 0", "") for one in drivers.started]
    assert sorted(main[:2]) == ["left 2024-01-03", "right 2024-01-03"]
    assert main[2:] == ["both 2024-01-03", "last 2024-01-03"]
    assert {node.state.name for node in operation.metadata.graph.nodes} == {"COMPLETED"}
    assert operation.metadata.state == dp.WorkflowMetadata.State.DONE
    assert operation.metadata.delete_cluster.done
    assert not list(connect(dp.ClusterControllerClient).list_clusters(**PLACE))
    listed = jobs.list_jobs(request={**PLACE, "filter": "labels.stage = both AND labels.dt = 2024-01-03"})
    assert [job.reference.job_id.startswith("both-") for job in listed] == [True]


def test_a_failing_step_ends_the_workflow(
    server: Server, templates: Any, drivers: Drivers, connect: Callable[[Any], Any]
) -> None:
    drivers.hold("gs://code/right.py")  # a peer that runs when the other one fails
    server.core.faults.fail_driver("left", exit_code=3)
    operation = instantiate(templates)
    with pytest.raises(exceptions.GoogleAPICallError, match="driver exit 3"):
        operation.result(polling=POLLING)
    nodes = {node.step_id: node for node in operation.metadata.graph.nodes}
    assert {node.state.name for node in nodes.values()} == {"FAILED"}
    assert "driver exit 3" in nodes["left"].error
    assert server.core.jobs.by_id[nodes["right"].job_id].status.state == State.CANCELLED
    assert nodes["both"].job_id == nodes["last"].job_id == ""
    assert not list(connect(dp.ClusterControllerClient).list_clusters(**PLACE))


def test_a_failed_step_may_show_in_the_graph_only(server: Server, templates: Any) -> None:
    server.core.faults.silent_workflows = True
    server.core.faults.fail_driver("both")
    operation = instantiate(templates)
    operation.result(polling=POLLING)
    states = {node.step_id: node.state.name for node in operation.metadata.graph.nodes}
    assert states == {"left": "COMPLETED", "right": "COMPLETED", "both": "FAILED", "last": "FAILED"}


def test_a_workflow_without_quota_for_its_cluster(server: Server, templates: Any, drivers: Drivers) -> None:
    server.core.faults.refuse("CreateCluster", "RESOURCE_EXHAUSTED", "Insufficient 'CPUS' quota")
    operation = instantiate(templates)
    with pytest.raises(exceptions.GoogleAPICallError, match="quota"):
        operation.result(polling=POLLING)
    assert "quota" in operation.metadata.create_cluster.error
    assert not drivers.started


def test_one_request_id_is_one_workflow_while_it_runs(
    server: Server, templates: Any, drivers: Drivers
) -> None:
    gate = drivers.hold("gs://code/left.py")
    first = instantiate(templates, request_id="one")
    assert instantiate(templates, request_id="one").operation.name == first.operation.name
    gate.set()
    first.result(polling=POLLING)
    again = instantiate(templates, request_id="one")
    assert again.operation.name != first.operation.name
    again.result(polling=POLLING)
    assert len(drivers.started) == 8


def test_a_cancelled_workflow_leaves_nothing(
    server: Server, templates: Any, drivers: Drivers, connect: Callable[[Any], Any]
) -> None:
    drivers.hold("gs://code/left.py")
    operation = instantiate(templates)
    server.core.wait_for(lambda: len(drivers.started) == 2)
    # Not operation.cancel(): over REST the library fails at it before it asks anything.
    templates.cancel_operation(request={"name": operation.operation.name})
    with pytest.raises(exceptions.GoogleAPICallError, match="cancelled"):
        operation.result(polling=POLLING)
    assert all(job.done for job in server.core.jobs.by_id.values())
    assert not list(connect(dp.ClusterControllerClient).list_clusters(**PLACE))


def test_an_inline_workflow_on_a_cluster_found_by_labels(
    server: Server, connect: Callable[[Any], Any], cluster: str, drivers: Drivers
) -> None:
    placement = {"clusterSelector": {"clusterLabels": {"goog-dataproc-cluster-name": cluster}}}
    client = connect(dp.WorkflowTemplateServiceClient)
    template = make_template(placement=placement, parameters=[])
    client.instantiate_inline_workflow_template(parent=PARENT, template=template).result(polling=POLLING)
    assert len(drivers.started) == 4
    assert connect(dp.ClusterControllerClient).get_cluster(cluster_name=cluster, **PLACE)


def test_a_template_is_changed_only_from_what_was_read(templates: Any) -> None:
    name = f"{PARENT}/workflowTemplates/daily"
    read = templates.get_workflow_template(name=name)
    with pytest.raises(exceptions.Conflict):
        templates.create_workflow_template(parent=PARENT, template=make_template())
    assert templates.update_workflow_template(template=read).version == 2
    with pytest.raises(exceptions.GoogleAPICallError, match="version is 2"):
        templates.update_workflow_template(template=read)
    assert [one.id for one in templates.list_workflow_templates(parent=PARENT)] == ["daily"]
    templates.delete_workflow_template(name=name)
    with pytest.raises(exceptions.NotFound):
        templates.get_workflow_template(name=name)


@pytest.mark.parametrize(
    "values",
    [{}, {"DAY": "3 January"}, {"DAY": "2024-01-03", "OTHER": "x"}],
    ids=["missing", "wrong", "unknown"],
)
def test_parameters_are_checked(templates: Any, drivers: Drivers, values: dict[str, str]) -> None:
    with pytest.raises(exceptions.BadRequest):
        instantiate(templates, parameters=values)
    assert not drivers.started
