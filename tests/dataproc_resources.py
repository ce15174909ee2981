"""Clusters, autoscaling policies and batches of the stand-in of Dataproc."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dataproc_messages import last_line, now, paged
from dataproc_rules import (
    BATCH_ID,
    CLUSTER,
    TEMPLATE_ID,
    ServiceError,
    check,
    check_image,
    check_labels,
    matcher,
)
from google.cloud import dataproc_v1 as dp
from google.protobuf import empty_pb2

if TYPE_CHECKING:
    from dataproc_core import Core, Operation

State = dp.ClusterStatus.State
CLUSTER_STATES = ("ACTIVE", "INACTIVE", *(state.name for state in State))


class Clusters:
    """All clusters by name. One is there at once in state CREATING and runs a moment later."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.by_name: dict[str, dp.Cluster] = {}

    def answers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "CreateCluster": self.create,
            "GetCluster": lambda request: self.get(request.cluster_name),
            "ListClusters": self.list,
            "DeleteCluster": self.delete,
        }

    def create(self, request: dp.CreateClusterRequest) -> Any:
        asked = request.cluster
        key = "CreateCluster", request.request_id
        if request.request_id and key in self.core.known:
            return self.core.known[key].message()
        cluster = self.add(asked.cluster_name, asked.config, asked.labels)
        operation = self.core.start(
            "CreateCluster", self._metadata(cluster, "CREATE"), lambda operation: self.run(cluster, operation)
        )
        self.core.known[key] = operation
        return operation.message()

    def add(self, name: str, config: dp.ClusterConfig, labels: Mapping[str, str]) -> dp.Cluster:
        """Check a cluster and enter it in state CREATING."""
        check("cluster name", name, CLUSTER)
        check_labels(labels)
        check_image(config)
        if name in self.by_name:
            raise ServiceError(
                "ALREADY_EXISTS", f"Already exists: Cluster {self.core.parent}/clusters/{name}"
            )
        policy = config.autoscaling_config.policy_uri
        if policy and policy.rpartition("/")[2] not in self.core.policies.by_id:
            raise ServiceError("NOT_FOUND", f"Not found: Autoscaling policy {policy}")
        cluster = dp.Cluster(
            project_id=self.core.project,
            cluster_name=name,
            config=config,
            labels=dict(labels),
            cluster_uuid=str(uuid4()),
        )
        made = cluster.config
        made.config_bucket = made.config_bucket or f"dataproc-staging-{self.core.region}-{self.core.project}"
        zone = made.gce_cluster_config.zone_uri.rpartition("/")[2] or f"{self.core.region}-a"
        made.gce_cluster_config.zone_uri = (
            f"https://www.googleapis.com/compute/v1/projects/{self.core.project}/zones/{zone}"
        )
        cluster.labels.update(
            {
                "goog-dataproc-cluster-name": name,
                "goog-dataproc-cluster-uuid": cluster.cluster_uuid,
                "goog-dataproc-location": self.core.region,
            }
        )
        self._move(cluster, State.CREATING)
        self.by_name[name] = cluster
        return cluster

    def run(self, cluster: dp.Cluster, operation: "Operation | None" = None) -> dp.Cluster:
        with self.core.changed:
            self._move(cluster, State.RUNNING)
            if operation is not None:
                operation.metadata.status.state = dp.ClusterOperationStatus.State.DONE
        return cluster

    def remove(self, name: str, operation: "Operation | None" = None) -> empty_pb2.Empty:
        with self.core.changed:
            self.by_name.pop(name, None)
            self.core.jobs.stop_all(name)
            if operation is not None:
                operation.metadata.status.state = dp.ClusterOperationStatus.State.DONE
            self.core.changed.notify_all()
        return empty_pb2.Empty()

    def delete(self, request: dp.DeleteClusterRequest) -> Any:
        key = "DeleteCluster", request.request_id
        if request.request_id and key in self.core.known:
            return self.core.known[key].message()
        cluster = self.get(request.cluster_name)
        if request.cluster_uuid not in ("", cluster.cluster_uuid):
            raise ServiceError("NOT_FOUND", f"Not found: Cluster with UUID {request.cluster_uuid}")
        self._move(cluster, State.DELETING)
        operation = self.core.start(
            "DeleteCluster",
            self._metadata(cluster, "DELETE"),
            lambda operation: self.remove(cluster.cluster_name, operation),
        )
        self.core.known[key] = operation
        return operation.message()

    def get(self, name: str) -> dp.Cluster:
        if name not in self.by_name:
            raise ServiceError("NOT_FOUND", f"Not found: Cluster {self.core.parent}/clusters/{name}")
        return self.by_name[name]

    def running(self, name: str) -> dp.Cluster:
        """The cluster, which takes jobs."""
        cluster = self.get(name)
        if cluster.status.state != State.RUNNING:
            raise ServiceError(
                "FAILED_PRECONDITION", f"Cluster '{name}' is {cluster.status.state.name}, not RUNNING"
            )
        return cluster

    def list(self, request: dp.ListClustersRequest) -> dp.ListClustersResponse:
        matches = matcher(request.filter, self._values, {"status.state": CLUSTER_STATES, "clusterName": ()})
        page, token = paged([one for one in self.by_name.values() if matches(one)], request)
        return dp.ListClustersResponse(clusters=page, next_page_token=token)

    @staticmethod
    def _values(cluster: dp.Cluster, field: str) -> Iterator[str]:
        if field == "clusterName":
            yield cluster.cluster_name
            return
        active = (State.CREATING, State.UPDATING, State.RUNNING)
        yield cluster.status.state.name
        yield "ACTIVE" if cluster.status.state in active else "INACTIVE"

    @staticmethod
    def _metadata(cluster: dp.Cluster, kind: str) -> dp.ClusterOperationMetadata:
        return dp.ClusterOperationMetadata(
            cluster_name=cluster.cluster_name,
            cluster_uuid=cluster.cluster_uuid,
            operation_type=kind,
            labels=dict(cluster.labels),
            status=dp.ClusterOperationStatus(state=dp.ClusterOperationStatus.State.RUNNING),
        )

    def _move(self, cluster: dp.Cluster, state: State) -> None:
        if cluster.status.state:
            cluster.status_history.append(cluster.status)
        cluster.status = dp.ClusterStatus(state=state, state_start_time=now())
        self.core.changed.notify_all()


class Policies:
    """Autoscaling policies by id."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.by_id: dict[str, dp.AutoscalingPolicy] = {}

    def answers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "CreateAutoscalingPolicy": self.create,
            "GetAutoscalingPolicy": lambda request: self.get(request.name),
            "UpdateAutoscalingPolicy": self.update,
            "ListAutoscalingPolicies": self.list,
            "DeleteAutoscalingPolicy": self.delete,
        }

    def create(self, request: dp.CreateAutoscalingPolicyRequest) -> dp.AutoscalingPolicy:
        policy = dp.AutoscalingPolicy(request.policy)
        check("policy id", policy.id, TEMPLATE_ID)
        policy.name = f"{self.core.parent}/autoscalingPolicies/{policy.id}"
        if policy.id in self.by_id:
            raise ServiceError("ALREADY_EXISTS", f"Already exists: {policy.name}")
        self.by_id[policy.id] = policy
        return policy

    def get(self, name: str) -> dp.AutoscalingPolicy:
        policy_id = name.rpartition("/")[2]
        if policy_id not in self.by_id:
            raise ServiceError("NOT_FOUND", f"Not found: {name}")
        return self.by_id[policy_id]

    def update(self, request: dp.UpdateAutoscalingPolicyRequest) -> dp.AutoscalingPolicy:
        known = self.get(request.policy.name)
        self.by_id[known.id] = dp.AutoscalingPolicy(request.policy, id=known.id, name=known.name)
        return self.by_id[known.id]

    def list(self, request: dp.ListAutoscalingPoliciesRequest) -> dp.ListAutoscalingPoliciesResponse:
        page, token = paged(list(self.by_id.values()), request)
        return dp.ListAutoscalingPoliciesResponse(policies=page, next_page_token=token)

    def delete(self, request: dp.DeleteAutoscalingPolicyRequest) -> empty_pb2.Empty:
        policy = self.get(request.name)
        for cluster in self.core.clusters.by_name.values():
            if cluster.config.autoscaling_config.policy_uri.rpartition("/")[2] == policy.id:
                raise ServiceError("FAILED_PRECONDITION", f"{policy.name} is used by {cluster.cluster_name}")
        del self.by_id[policy.id]
        return empty_pb2.Empty()


class Batches:
    """Batches of serverless Spark by id; the runner gets each as a job of that id."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.by_id: dict[str, dp.Batch] = {}

    def answers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "CreateBatch": self.create,
            "GetBatch": lambda request: self.get(request.name),
            "ListBatches": self.list,
            "DeleteBatch": self.delete,
        }

    def create(self, request: dp.CreateBatchRequest) -> Any:
        key = "CreateBatch", request.request_id
        if request.request_id and key in self.core.known:
            return self.core.known[key].message()
        batch_id = request.batch_id or uuid4().hex
        check("batch id", batch_id, BATCH_ID)
        check_labels(request.batch.labels)
        batch = dp.Batch(request.batch)
        batch.name = f"{self.core.parent.replace('/regions/', '/locations/')}/batches/{batch_id}"
        batch.uuid = str(uuid4())
        if batch_id in self.by_id:
            raise ServiceError("ALREADY_EXISTS", f"Already exists: {batch.name}")
        if not batch.pyspark_batch.main_python_file_uri:
            raise ServiceError("INVALID_ARGUMENT", "pysparkBatch.mainPythonFileUri must be set")
        self._move(batch, dp.Batch.State.PENDING)
        self.by_id[batch_id] = batch
        metadata = dp.BatchOperationMetadata(
            batch=batch.name, batch_uuid=batch.uuid, labels=dict(batch.labels)
        )
        operation = self.core.start(
            "CreateBatch",
            metadata,
            lambda operation: self._run(batch, batch_id),
            cancel=lambda: self._cancel(batch, batch_id),
        )
        batch.operation = operation.name
        self.core.known[key] = operation
        return operation.message()

    def _run(self, batch: dp.Batch, batch_id: str) -> dp.Batch:
        with self.core.changed:
            if batch.state == dp.Batch.State.PENDING:
                self._move(batch, dp.Batch.State.RUNNING)
        asked = batch.pyspark_batch
        job = dp.Job(
            reference=dp.JobReference(project_id=self.core.project, job_id=batch_id),
            labels=dict(batch.labels),
            pyspark_job=dp.PySparkJob(
                main_python_file_uri=asked.main_python_file_uri,
                args=list(asked.args),
                python_file_uris=list(asked.python_file_uris),
                file_uris=list(asked.file_uris),
                properties=dict(batch.runtime_config.properties),
            ),
        )
        exit_code, text = self.core.drivers.submit(self.core.drive, job).result()
        if batch.state == dp.Batch.State.CANCELLING:
            self._move(batch, dp.Batch.State.CANCELLED)
            raise ServiceError("CANCELLED", f"{batch.name} was cancelled")
        if exit_code == 0:
            self._move(batch, dp.Batch.State.SUCCEEDED)
            return batch
        message = f"Job failed with message [{last_line(text)}]: driver exit {exit_code}"
        self._move(batch, dp.Batch.State.FAILED, message)
        raise ServiceError("ABORTED", message)

    def _cancel(self, batch: dp.Batch, batch_id: str) -> None:
        if batch.state in (dp.Batch.State.PENDING, dp.Batch.State.RUNNING):
            self._move(batch, dp.Batch.State.CANCELLING)
            self.core.stop_driver(batch_id)

    def stop_all(self) -> None:
        for batch_id, batch in self.by_id.items():
            self._cancel(batch, batch_id)

    def get(self, name: str) -> dp.Batch:
        batch_id = name.rpartition("/")[2]
        if batch_id not in self.by_id:
            raise ServiceError("NOT_FOUND", f"Not found: {name}")
        return self.by_id[batch_id]

    def list(self, request: dp.ListBatchesRequest) -> dp.ListBatchesResponse:
        matches = matcher(request.filter, lambda batch, _: [batch.state.name], {"state": ()})
        page, token = paged([one for one in self.by_id.values() if matches(one)], request)
        return dp.ListBatchesResponse(batches=page, next_page_token=token)

    def delete(self, request: dp.DeleteBatchRequest) -> empty_pb2.Empty:
        batch = self.get(request.name)
        if batch.state in (dp.Batch.State.PENDING, dp.Batch.State.RUNNING):
            raise ServiceError(
                "FAILED_PRECONDITION", f"{request.name} is {batch.state.name}; cancel it first"
            )
        del self.by_id[request.name.rpartition("/")[2]]
        return empty_pb2.Empty()

    def _move(self, batch: dp.Batch, state: dp.Batch.State, message: str = "") -> None:
        with self.core.changed:
            batch.state, batch.state_message, batch.state_time = state, message, now()
            self.core.changed.notify_all()
