"""Workflow templates of the stand-in of Dataproc, and the run of one: a graph of jobs on one cluster."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dataproc_jobs import CANCELLABLE, ENDED
from dataproc_messages import now, paged
from dataproc_rules import TEMPLATE_ID, ServiceError, check, check_template, filled
from google.cloud import dataproc_v1 as dp
from google.protobuf import empty_pb2

if TYPE_CHECKING:
    from dataproc_core import Core, Operation

Node = dp.WorkflowNode.NodeState
JobState = dp.JobStatus.State


class Templates:
    """Templates by id; the version counts updates and guards them."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.by_id: dict[str, dp.WorkflowTemplate] = {}

    def answers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "CreateWorkflowTemplate": self.create,
            "GetWorkflowTemplate": lambda request: self.get(request.name, request.version),
            "ListWorkflowTemplates": self.list,
            "UpdateWorkflowTemplate": self.update,
            "DeleteWorkflowTemplate": self.delete,
        }

    def create(self, request: dp.CreateWorkflowTemplateRequest) -> dp.WorkflowTemplate:
        template_id = request.template.id
        check("template id", template_id, TEMPLATE_ID)
        name = f"{self.core.parent}/workflowTemplates/{template_id}"
        if template_id in self.by_id:
            raise ServiceError("ALREADY_EXISTS", f"Already exists: {name}")
        return self._put(request.template, name, version=1)

    def update(self, request: dp.UpdateWorkflowTemplateRequest) -> dp.WorkflowTemplate:
        known = self.get(request.template.name)
        if request.template.version != known.version:
            raise ServiceError(
                "FAILED_PRECONDITION",
                f"Template version is {known.version}, the request has {request.template.version}",
            )
        made = self._put(request.template, known.name, version=known.version + 1)
        made.create_time = known.create_time
        return made

    def _put(self, asked: dp.WorkflowTemplate, name: str, version: int) -> dp.WorkflowTemplate:
        check_template(asked)
        made = dp.WorkflowTemplate(asked)
        made.id, made.name, made.version = name.rpartition("/")[2], name, version
        made.create_time = made.update_time = now()
        self.by_id[made.id] = made
        return made

    def get(self, name: str, version: int = 0) -> dp.WorkflowTemplate:
        known = self.by_id.get(name.rpartition("/")[2])
        if known is None or version not in (0, known.version):
            raise ServiceError("NOT_FOUND", f"Not found: {name}" + f" at version {version}" * bool(version))
        return known

    def list(self, request: dp.ListWorkflowTemplatesRequest) -> dp.ListWorkflowTemplatesResponse:
        page, token = paged(list(self.by_id.values()), request)
        return dp.ListWorkflowTemplatesResponse(templates=page, next_page_token=token)

    def delete(self, request: dp.DeleteWorkflowTemplateRequest) -> empty_pb2.Empty:
        del self.by_id[self.get(request.name, request.version).id]
        return empty_pb2.Empty()


@dataclass
class Run:
    """One workflow: its template with all values in place, and what its operation says of it."""

    template: dp.WorkflowTemplate
    metadata: dp.WorkflowMetadata
    is_cancelled: bool = False

    def node(self, step_id: str) -> dp.WorkflowNode:
        return next(node for node in self.metadata.graph.nodes if node.step_id == step_id)

    def is_ready(self, node: dp.WorkflowNode) -> bool:
        return all(self.node(step).state == Node.COMPLETED for step in node.prerequisite_step_ids)


class Workflows:
    """Instances of templates. A request id keeps a second one from running beside the first, as on Dataproc:
    once that has ended, the same id starts another.
    """

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.runs: list[Run] = []

    def answers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "InstantiateWorkflowTemplate": self.instantiate,
            "InstantiateInlineWorkflowTemplate": self.instantiate_inline,
        }

    def instantiate(self, request: dp.InstantiateWorkflowTemplateRequest) -> Any:
        template = self.core.templates.get(request.name)
        if request.version not in (0, template.version):
            raise ServiceError("FAILED_PRECONDITION", f"Template version is {template.version}")
        return self._start("InstantiateWorkflowTemplate", template, request.parameters, request.request_id)

    def instantiate_inline(self, request: dp.InstantiateInlineWorkflowTemplateRequest) -> Any:
        check_template(request.template)
        return self._start("InstantiateInlineWorkflowTemplate", request.template, {}, request.request_id)

    def cancel_all(self) -> None:
        for run in self.runs:
            run.is_cancelled = True

    def _start(
        self, rpc: str, template: dp.WorkflowTemplate, values: Mapping[str, str], request_id: str
    ) -> Any:
        known = self.core.known.get((rpc, request_id)) if request_id else None
        if known is not None and not known.is_done:
            return known.message()
        ready = filled(template, values)
        nodes = [
            dp.WorkflowNode(
                step_id=job.step_id,
                prerequisite_step_ids=list(job.prerequisite_step_ids),
                state=Node.BLOCKED if job.prerequisite_step_ids else Node.RUNNABLE,
            )
            for job in ready.jobs
        ]
        metadata = dp.WorkflowMetadata(
            template=template.name,
            version=template.version,
            graph=dp.WorkflowGraph(nodes=nodes),
            state=dp.WorkflowMetadata.State.PENDING,
            parameters=dict(values),
            start_time=now(),
        )
        run = Run(ready, metadata)
        self.runs.append(run)

        def cancel() -> None:
            run.is_cancelled = True
            self.core.changed.notify_all()

        operation = self.core.start(rpc, metadata, lambda operation: self._run(run, operation), cancel)
        self.core.known[rpc, request_id] = operation
        return operation.message()

    def _run(self, run: Run, operation: "Operation") -> empty_pb2.Empty:
        """The whole workflow: cluster, jobs, and the end of the cluster whatever happened.

        Raises:
            ServiceError: the cluster could not be had, a step failed, or a client cancelled it.
        """
        run.metadata.state = dp.WorkflowMetadata.State.RUNNING
        instance = operation.name.rpartition("/")[2]
        try:
            cluster_name = self._cluster(run, instance)
            run.metadata.dag_start_time = now()
            self._run_graph(run, cluster_name, instance)
        finally:
            with self.core.changed:
                if run.metadata.dag_start_time:
                    run.metadata.dag_end_time = now()
                if "managed_cluster" in run.template.placement and run.metadata.cluster_name:
                    self.core.clusters.remove(run.metadata.cluster_name)
                    run.metadata.delete_cluster = dp.ClusterOperation(operation_id=str(uuid4()), done=True)
                run.metadata.state = dp.WorkflowMetadata.State.DONE
                run.metadata.end_time = now()
        return empty_pb2.Empty()

    def _cluster(self, run: Run, instance: str) -> str:
        """Name of the cluster of a run: its own, made now, or the one that has the labels."""
        placement, clusters = run.template.placement, self.core.clusters
        with self.core.changed:
            if "managed_cluster" not in placement:
                wanted = placement.cluster_selector.cluster_labels.items()
                for cluster in clusters.by_name.values():
                    if wanted <= dict(cluster.labels).items():
                        return str(clusters.running(cluster.cluster_name).cluster_name)
                raise ServiceError("NOT_FOUND", f"No cluster has the labels {dict(wanted)}")
            asked = placement.managed_cluster
            run.metadata.create_cluster = dp.ClusterOperation(operation_id=str(uuid4()))
            try:
                self.core.faults.check("CreateCluster")
                labels = dict(asked.labels) | {"goog-dataproc-workflow-instance-id": instance}
                made = clusters.add(f"{asked.cluster_name}-{uuid4().hex[:12]}", asked.config, labels)
            except ServiceError as refusal:
                run.metadata.create_cluster.error, run.metadata.create_cluster.done = refusal.message, True
                self._fail_rest(run, "The cluster could not be created")
                raise
            clusters.run(made)
            run.metadata.create_cluster.done = True
            run.metadata.cluster_name, run.metadata.cluster_uuid = made.cluster_name, made.cluster_uuid
            return str(made.cluster_name)

    def _run_graph(self, run: Run, cluster_name: str, instance: str) -> None:
        """Start each step once its prerequisites are done; one that fails ends all."""
        nodes = run.metadata.graph.nodes
        with self.core.changed:
            while not all(node.state == Node.COMPLETED for node in nodes):
                for step in run.template.jobs:
                    node = run.node(step.step_id)
                    if node.state in (Node.BLOCKED, Node.RUNNABLE) and run.is_ready(node):
                        node.state = Node.RUNNING
                        node.job_id = self._launch(run, step, cluster_name, instance)
                self.core.changed.wait_for(lambda: run.is_cancelled or any(map(self._has_ended, nodes)))
                for node in filter(self._has_ended, nodes):
                    self._finish(node)
                failed = next((node for node in nodes if node.state == Node.FAILED), None)
                if failed is None and not run.is_cancelled:
                    continue
                self._fail_rest(run, "A step failed" if failed else "The workflow was cancelled")
                if failed is None:
                    raise ServiceError("CANCELLED", "The workflow was cancelled")
                if self.core.faults.silent_workflows:
                    return
                reason = f"Job '{failed.job_id}' of step '{failed.step_id}' failed: {failed.error}"
                raise ServiceError("ABORTED", reason)

    def _has_ended(self, node: dp.WorkflowNode) -> bool:
        return node.state == Node.RUNNING and self.core.jobs.get(node.job_id).status.state in ENDED

    def _finish(self, node: dp.WorkflowNode) -> None:
        status = self.core.jobs.get(node.job_id).status
        if status.state == JobState.DONE:
            node.state = Node.COMPLETED
        else:
            node.state, node.error = Node.FAILED, status.details or status.state.name

    def _launch(self, run: Run, step: dp.OrderedJob, cluster_name: str, instance: str) -> str:
        labels = dict(step.labels) | {
            "goog-dataproc-workflow-instance-id": instance,
            "goog-dataproc-workflow-step-id": step.step_id.lower(),
        }
        if run.template.id:
            labels["goog-dataproc-workflow-template-id"] = run.template.id.lower()
        raw = dp.OrderedJob.pb(step)
        job = dp.Job(labels=labels, placement=dp.JobPlacement(cluster_name=cluster_name))
        job.reference = dp.JobReference(job_id=f"{step.step_id}-{uuid4().hex[:13]}")
        kind = raw.WhichOneof("job_type")
        getattr(dp.Job.pb(job), kind).CopyFrom(getattr(raw, kind))
        return str(self.core.jobs.launch(job).reference.job_id)

    def _fail_rest(self, run: Run, error: str) -> None:
        """A step fails with its ancestors and its peers. What still runs is cancelled, and waited for."""
        running = [node.job_id for node in run.metadata.graph.nodes if node.state == Node.RUNNING]
        for job_id in running:
            if self.core.jobs.get(job_id).status.state in CANCELLABLE:
                self.core.jobs.cancel(job_id)
        self.core.changed.wait_for(
            lambda: all(self.core.jobs.get(job_id).status.state in ENDED for job_id in running)
        )
        for node in run.metadata.graph.nodes:
            if node.state not in (Node.COMPLETED, Node.FAILED):
                node.state, node.error = Node.FAILED, error
