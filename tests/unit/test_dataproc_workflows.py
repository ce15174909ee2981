"""Workflow templates on the stand-in of Dataproc: the real client, and the committed templates of deploy/."""

from collections.abc import Callable, Iterator
from typing import Any

import deploy_files
import pytest
from dataproc_drivers import PARENT, PLACE, POLLING, Drivers, make_cluster
from dataproc_messages import parsed
from dataproc_server import Server, serving
from google.api_core import exceptions
from google.cloud import dataproc_v1 as dp

State = dp.JobStatus.State


@pytest.fixture
def drivers() -> Drivers:
    return Drivers()


@pytest.fixture
def server(drivers: Drivers) -> Iterator[Server]:
    with serving(drivers) as running:
        yield running


@pytest.fixture(params=["grpc", "rest"])
def connect(server: Server, request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return lambda kind: server.client(kind, str(request.param))


@pytest.fixture
def jobs(connect: Callable[[Any], Any]) -> Any:
    return connect(dp.JobControllerClient)


@pytest.fixture
def cluster(connect: Callable[[Any], Any]) -> str:
    return make_cluster(connect(dp.ClusterControllerClient))


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


@pytest.mark.parametrize(
    ("jobs_of", "text"),
    [
        ({"left": ["both"]}, "wait for each other"),
        ({"left": ["absent"]}, "unknown step 'absent'"),
    ],
    ids=["cycle", "unknown"],
)
def test_a_graph_that_cannot_run(
    connect: Callable[[Any], Any], jobs_of: dict[str, list[str]], text: str
) -> None:
    template = make_template()
    for job in template.jobs:
        job.prerequisite_step_ids = jobs_of.get(job.step_id, list(job.prerequisite_step_ids))
    with pytest.raises(exceptions.BadRequest, match=text):
        connect(dp.WorkflowTemplateServiceClient).create_workflow_template(parent=PARENT, template=template)


@pytest.mark.parametrize(
    "path",
    ["jobs['left'].pySparkJob.args[9]", "jobs['left'].labels['run']", "jobs[left]", "dagTimeout", "jobs"],
)
def test_a_parameter_that_leads_nowhere(connect: Callable[[Any], Any], path: str) -> None:
    template = make_template()
    template.parameters[0].fields.append(path)
    with pytest.raises(exceptions.BadRequest, match="Invalid field path"):
        connect(dp.WorkflowTemplateServiceClient).create_workflow_template(parent=PARENT, template=template)


@pytest.mark.parametrize("name", [name for name in deploy_files.NAMES if name.startswith("workflows/")])
def test_the_committed_templates_run(server: Server, drivers: Drivers, name: str) -> None:
    """Every parameter ends up in a job; steps start after all that they need."""
    specs = deploy_files.rendered("ci")
    values = {"RUN_DATE": "2024-01-03", "RUN_ID": "r1", "CAMPAIGNS": "18,19"}
    template = parsed(dp.WorkflowTemplate, specs[name].tree)
    for parameter in template.parameters:
        values.setdefault(
            parameter.name, "2024-01-01:2024-01-02" if "DATES" in parameter.name else "2024-01-02"
        )
    values = {parameter.name: values[parameter.name] for parameter in template.parameters}
    policies = server.client(dp.AutoscalingPolicyServiceClient, "grpc")
    policies.create_autoscaling_policy(
        parent=PARENT, policy=parsed(dp.AutoscalingPolicy, specs["autoscaling/etl"].tree)
    )
    client = server.client(dp.WorkflowTemplateServiceClient, "grpc")
    made = client.create_workflow_template(parent=PARENT, template=template)
    request = {"name": made.name, "parameters": values}
    operation = client.instantiate_workflow_template(request=request)
    operation.result(polling=POLLING)
    order = [job.labels["goog-dataproc-workflow-step-id"] for job in server.core.jobs.by_id.values()]
    assert sorted(order) == sorted(job.step_id for job in template.jobs)
    for job in template.jobs:
        assert all(order.index(before) < order.index(job.step_id) for before in job.prerequisite_step_ids)
    for job in server.core.jobs.by_id.values():
        assert (job.labels["dt"], job.labels["run"]) == ("2024-01-03", "r1")
        assert not values.keys() & set(job.pyspark_job.args)
