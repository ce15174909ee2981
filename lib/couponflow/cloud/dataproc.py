"""The only door to Dataproc's clients: jobs, clusters and workflows of one project and region.

Every call may be repeated: a job has its id before it is sent, a cluster its name, a workflow its request id,
so a call whose answer was lost meets what it has started. What passes by itself (503, a lost connection) is
repeated until a deadline; the rest ends at once as one of our errors, which name project, region and cluster
and say what to do. Clients and waiting keep no state: a command that dies and comes back finds the same job.

``cloud.endpoint`` names a stand-in on this machine; it gets no credentials.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from couponflow.cloud import spec_shape
from couponflow.clouding import CloudConfig
from couponflow.errors import ConfigError, ConflictError, InfraError

#: States of a job that change no more, and the one that is success.
ENDED, DONE = ("DONE", "ERROR", "CANCELLED"), "DONE"
#: States in which a cluster takes jobs, and in which it will by itself.
_USABLE, _COMING = ("RUNNING", "UPDATING", "REPAIRING"), ("CREATING", "STARTING", "UNKNOWN")
_REQUEST_SECONDS = 60.0
_CREATION_SECONDS = 1_800.0
#: A poll follows the last one after this share of the time that the job has taken: late by no more than that.
_POLL_SHARE, _MIN_POLL_SECONDS, _MAX_POLL_SECONDS = 0.05, 0.25, 10.0


@dataclass(frozen=True)
class Patience:
    """How long a call that the service does not answer is repeated, and how the command waits, seconds."""

    first_pause: float = 1.0
    longest_pause: float = 30.0
    deadline: float = 300.0
    pause: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Job:
    """What Dataproc says of a job. ``output_uri``: prefix of the objects that hold what its driver printed.

    ``details`` is the service's own word on its state; ``ended`` is None while it works.
    """

    id: str
    state: str
    labels: Mapping[str, str]
    args: tuple[str, ...]
    cluster: str
    details: str
    started: datetime
    ended: datetime | None
    output_uri: str

    @property
    def is_active(self) -> bool:
        """Whether it may still do something."""
        return self.state not in ENDED

    @property
    def stage(self) -> str:
        """The job of ours that it runs."""
        return self.labels.get("stage", "")


@dataclass(frozen=True)
class Workflow:
    """What Dataproc says of a running workflow: its operation, and state and job of each step.

    ``error`` is why it ended, if it did not end well: of the operation, or of the first step that failed.
    """

    operation: str
    is_done: bool
    error: str
    steps: Mapping[str, tuple[str, str]] = field(default_factory=dict)


class Dataproc:
    """Dataproc in the project and region of an environment."""

    def __init__(self, cloud: CloudConfig, patience: Patience | None = None) -> None:
        """Take the place; nothing is asked yet."""
        self._cloud = cloud
        self._patience = patience or Patience()
        self._clients: dict[str, Any] = {}

    @property
    def place(self) -> str:
        """The place, for messages."""
        return f"project {self._cloud.project}, region {self._cloud.region}"

    def submit(self, request: Mapping[str, Any]) -> Job:
        """Start the job of a request, or meet the one that has its id."""
        from google.api_core.exceptions import Conflict

        job_id, cluster = request["requestId"], request["job"]["placement"]["clusterName"]
        message = spec_shape.parsed(spec_shape.JOB_REQUEST, request)
        with self._errors(f"job {job_id} on cluster {cluster}", f"cluster {cluster}"):
            try:
                return _job(self._call("jobs", "submit_job", message))
            except Conflict:
                return _job(self._call("jobs", "get_job", self._named(job_id=job_id)))

    def find(self, job_id: str) -> Job | None:
        """The job of an id; None where there is none."""
        from google.api_core.exceptions import NotFound

        with self._errors(f"job {job_id}"):
            try:
                return _job(self._call("jobs", "get_job", self._named(job_id=job_id)))
            except NotFound:
                return None

    def jobs(self, labels: Mapping[str, str], only_active: bool = False) -> list[Job]:
        """All jobs with these labels, or those that still work, oldest first."""
        terms = ["status.state = ACTIVE"] * only_active
        terms += [f"labels.{name} = {value}" for name, value in labels.items()]
        with self._errors("list of jobs"):
            listed = self._call("jobs", "list_jobs", self._named(filter=" AND ".join(terms)))
            found = [_job(one) for one in listed]
        return sorted(found, key=lambda job: (job.started, job.id))

    def cancel(self, job_id: str) -> Job:
        """Ask a job to end; one that has ended stays as it is.

        Raises:
            ConfigError: there is no such job.
        """
        job = self.find(job_id)
        if job is None:
            raise ConfigError(
                f"no job {job_id} in {self.place}; `couponflow status --on dataproc` lists them"
            )
        if job.is_active:
            from google.api_core.exceptions import BadRequest

            with self._errors(f"job {job_id}"):
                try:
                    return _job(self._call("jobs", "cancel_job", self._named(job_id=job_id)))
                except BadRequest:  # it has ended meanwhile, or is ending
                    return self.find(job_id) or job
        return job

    def wait(self, job_id: str, look: Callable[[Job], None] = lambda job: None) -> Job:
        """Until a job has ended, well or badly; ``look`` sees it at every poll, also the last.

        Raises:
            InfraError: it is gone, or the service did not answer for long; the job itself goes on.
        """
        started = self._patience.clock()
        while True:
            job = self.find(job_id)
            if job is None:
                raise InfraError(f"job {job_id} in {self.place}: was deleted while it ran; submit it again")
            look(job)
            if not job.is_active:
                return job
            self._pause(started)

    def cluster(self, name: str) -> tuple[str, str] | None:
        """State of a cluster and the service's word on it; None where there is none."""
        from google.api_core.exceptions import NotFound

        with self._errors(f"cluster {name}"):
            try:
                status = self._call("clusters", "get_cluster", self._named(cluster_name=name)).status
            except NotFound:
                return None
        return str(status.state.name), " ".join(str(status.detail).split())

    def check_cluster(self, name: str) -> None:
        """Refuse a cluster that takes no jobs.

        Raises:
            ConfigError: it is not there, or not ready.
        """
        state = self.cluster(name)
        if state is None or state[0] not in _USABLE:
            found = "there is none" if state is None else f"is in state {' '.join(state)}".strip()
            raise ConfigError(
                f"cluster {name} in {self.place}: {found}; name one that runs, or leave --cluster out for "
                "one of its own"
            )

    def ensure_cluster(self, request: Mapping[str, Any]) -> None:
        """Create the cluster of a request, unless it is there, and wait until it takes jobs.

        Raises:
            InfraError: it could not be created; what is left of it is deleted.
        """
        name = request["cluster"]["clusterName"]
        started = self._patience.clock()
        is_asked = False
        while True:
            state, detail = self.cluster(name) or ("", "")
            if state in _USABLE:
                return
            if not state and is_asked:
                raise self._not_created(name, "it was taken back")
            if not state:
                self._create(request, name)
                is_asked = True
            elif state not in (*_COMING, "DELETING", "STOPPING"):
                self.delete_cluster(name)
                raise self._not_created(name, f"state {state} {detail}".strip())
            if self._patience.clock() - started > _CREATION_SECONDS:
                raise self._not_created(name, f"not ready after {_CREATION_SECONDS:.0f} s")
            self._pause(started)

    def delete_cluster(self, name: str) -> None:
        """Ask for a cluster's end, without waiting for it; an absent one is no error."""
        from google.api_core.exceptions import NotFound

        with self._errors(f"cluster {name}", f"cluster {name}"):
            try:
                self._call("clusters", "delete_cluster", self._named(cluster_name=name))
            except NotFound:
                return

    def start_workflow(self, request: Mapping[str, Any]) -> Workflow:
        """Start the workflow of a request, or meet the one that runs under its id."""
        message = spec_shape.parsed(spec_shape.WORKFLOW_REQUEST, request)
        with self._errors(f"workflow {request['template']['id']}"):
            started = self._call("workflows", "instantiate_inline_workflow_template", message)
        return _workflow(started.operation)

    def wait_workflow(self, operation: str, look: Callable[[Workflow], None]) -> Workflow:
        """Until a workflow has ended, well or badly; ``look`` sees it at every poll, also the last."""
        started = self._patience.clock()
        while True:
            with self._errors(f"operation {operation}"):
                found = _workflow(self._call("workflows", "get_operation", {"name": operation}))
            look(found)
            if found.is_done:
                return found
            self._pause(started)

    def cancel_workflow(self, operation: str) -> None:
        """Ask a workflow to end: its jobs are cancelled, its cluster is deleted."""
        with self._errors(f"operation {operation}"):
            self._call("workflows", "cancel_operation", {"name": operation})

    def _create(self, request: Mapping[str, Any], name: str) -> None:
        from google.api_core.exceptions import Conflict

        message = spec_shape.parsed(spec_shape.CLUSTER_REQUEST, request)
        with self._errors(f"cluster {name} of image {_image(request)}", "what it names"):
            try:
                self._call("clusters", "create_cluster", message)
            except Conflict:
                return  # the answer that was lost, or whoever asked at the same time

    def _not_created(self, name: str, why: str) -> InfraError:
        return InfraError(
            f"cluster {name} in {self.place}: could not be created ({why}); look at quota, zone and image of "
            "the environment, then submit again"
        )

    def _pause(self, started: float) -> None:
        share = (self._patience.clock() - started) * _POLL_SHARE
        self._patience.pause(min(max(share, _MIN_POLL_SECONDS), _MAX_POLL_SECONDS))

    def _named(self, **fields: str) -> dict[str, str]:
        return {"project_id": self._cloud.project, "region": self._cloud.region, **fields}

    def _call(self, service: str, method: str, request: Any) -> Any:
        from google.api_core.retry import Retry

        patience = self._patience
        retry = Retry(
            predicate=_is_passing,
            initial=patience.first_pause,
            maximum=patience.longest_pause,
            timeout=patience.deadline,
        )
        call = getattr(self._client(service), method)  # names of the library, all in this module
        return call(request=request, retry=retry, timeout=_REQUEST_SECONDS)

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            from google.cloud import dataproc_v1

            kinds = {
                "jobs": dataproc_v1.JobControllerClient,
                "clusters": dataproc_v1.ClusterControllerClient,
                "workflows": dataproc_v1.WorkflowTemplateServiceClient,
            }
            self._clients[service] = _connected(kinds[service], self._cloud)
        return self._clients[service]

    @contextmanager
    def _errors(self, what: str, named: str = "") -> Iterator[None]:
        """Errors of the service as ours; ``named`` is what the request relies on and may not be there."""
        from google.api_core import exceptions
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError

        where = f"{what} in {self.place}"
        account = self._cloud.service_accounts.submit
        try:
            yield
        except exceptions.NotFound as error:
            raise ConfigError(
                f"{where}: not found ({_text(error)}); create {named or 'it'}, or correct the environment"
            ) from error
        except exceptions.TooManyRequests as error:
            raise InfraError(
                f"{where}: quota exhausted ({_text(error)}); submit again later, ask for more quota, or "
                "lower num_workers and max_secondary_workers of the environment"
            ) from error
        except exceptions.Forbidden as error:
            raise InfraError(
                f"{where}: access denied ({_text(error)}); check cloud.project, log in as {account}, and "
                "grant it roles/dataproc.editor and roles/iam.serviceAccountUser"
            ) from error
        except (exceptions.Unauthorized, DefaultCredentialsError, RefreshError) as error:
            raise InfraError(
                f"{where}: no valid credentials ({_text(error)}); run `gcloud auth application-default login "
                f"--impersonate-service-account {account}`, then submit again"
            ) from error
        except exceptions.BadRequest as error:
            raise ConfigError(
                f"{where}: Dataproc refuses the request ({_text(error)}); correct the environment or the spec"
            ) from error
        except exceptions.Conflict as error:
            raise ConflictError(f"{where}: {_text(error)}; submit again when that has ended") from error
        except (exceptions.GoogleAPIError, GoogleAuthError, OSError) as error:
            raise InfraError(
                f"{where}: Dataproc did not answer ({type(error).__name__}: {_text(error)}); what was "
                "started goes on: check the network and repeat the command, which meets it"
            ) from error


def _connected(kind: Any, cloud: CloudConfig) -> Any:
    from google.auth.credentials import AnonymousCredentials

    if not cloud.endpoint:
        return kind(client_options={"api_endpoint": f"{cloud.region}-dataproc.googleapis.com:443"})
    scheme, _, address = cloud.endpoint.partition("://")
    if scheme == "grpc":
        import grpc

        return kind(transport=kind.get_transport_class("grpc")(channel=grpc.insecure_channel(address)))
    anonymous: Any = AnonymousCredentials  # untyped in the library
    return kind(transport="rest", credentials=anonymous(), client_options={"api_endpoint": cloud.endpoint})


def _is_passing(error: BaseException) -> bool:
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError
    from requests import exceptions as requests

    if isinstance(error, exceptions.MethodNotImplemented | requests.SSLError):
        return False
    lost = requests.ConnectionError, requests.Timeout, requests.ChunkedEncodingError
    return isinstance(error, (exceptions.ServerError, TransportError, *lost))


def _job(found: Any) -> Job:
    history = [*found.status_history, found.status]
    times = [status.state_start_time for status in history]
    is_ended = found.status.state.name in ENDED
    return Job(
        id=str(found.reference.job_id),
        state=str(found.status.state.name),
        labels=dict(found.labels),
        args=tuple(found.pyspark_job.args),
        cluster=str(found.placement.cluster_name),
        details=" ".join(str(found.status.details).split()),
        started=min(times),
        ended=max(times) if is_ended else None,
        output_uri=str(found.driver_output_resource_uri),
    )


def _workflow(operation: Any) -> Workflow:
    from google.cloud import dataproc_v1

    kind = dataproc_v1.WorkflowMetadata
    metadata = kind.pb(kind())
    operation.metadata.Unpack(metadata)
    nodes = kind.wrap(metadata).graph.nodes
    steps = {str(node.step_id): (str(node.state.name), str(node.job_id)) for node in nodes}
    error = str(operation.error.message) if operation.HasField("error") else ""
    failed = next((node for node in nodes if node.state.name == "FAILED" and node.job_id), None)
    if operation.done and failed is not None and not error:  # seen on the service: the graph alone tells
        error = f"step {failed.step_id} failed: {failed.error}"
    return Workflow(str(operation.name), bool(operation.done), " ".join(error.split()), steps)


def _image(request: Mapping[str, Any]) -> str:
    return str(request["cluster"]["config"]["masterConfig"]["imageUri"])


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
