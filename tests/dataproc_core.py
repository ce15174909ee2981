"""A small Dataproc behind any front: clusters, jobs, templates, policies, batches, long-running operations.

``Core.call(rpc, request)`` is the one door. Requests and answers are the types of google-cloud-dataproc. A
job is run by the ``runner`` that is given in; drivers run in a few threads, so that a client sees a job wait,
run and end. What goes wrong on command is in ``Core.faults``.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from dataproc_jobs import Jobs
from dataproc_messages import raw, snapshot
from dataproc_resources import Batches, Clusters, Policies
from dataproc_rules import REQUEST_ID, ServiceError, check
from dataproc_workflows import Templates, Workflows
from google.cloud import dataproc_v1 as dp
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.rpc import code_pb2, status_pb2


class Runner(Protocol):
    """Runs the driver of a job. May have ``stop(job_id)``, which ends one before its time."""

    def __call__(self, job: dp.Job, /) -> tuple[int, str]:
        """Exit code and all that the driver printed."""


class LostAnswerError(Exception):
    """All was done, and the client will not hear of it."""


@dataclass
class Faults:
    """What goes wrong with the next calls, by name of the rpc; each entry is used up once."""

    refusals: dict[str, list[ServiceError]] = field(default_factory=lambda: defaultdict(list))
    lost: Counter[str] = field(default_factory=Counter)
    endless: Counter[str] = field(default_factory=Counter)
    exits: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    #: A workflow whose step failed ends without an error, as was seen on the service; its graph tells.
    silent_workflows: bool = False

    def refuse(self, rpc: str, code: str, message: str = "refused on command", times: int = 1) -> None:
        """Nothing is done: UNAVAILABLE, PERMISSION_DENIED, UNAUTHENTICATED, RESOURCE_EXHAUSTED, ..."""
        self.refusals[rpc] += [ServiceError(code, message)] * times

    def lose_answer(self, rpc: str, times: int = 1) -> None:
        """All is done, but the connection ends before the answer."""
        self.lost[rpc] += times

    def never_end(self, rpc: str, times: int = 1) -> None:
        """The operation that this rpc starts does nothing and stays open."""
        self.endless[rpc] += times

    def fail_driver(self, stage: str, exit_code: int = 1, times: int = 1) -> None:
        """Drivers of jobs with this label ``stage`` end with this code and do nothing."""
        self.exits[stage] += [exit_code] * times

    def check(self, rpc: str) -> None:
        if waiting := self.refusals.get(rpc):
            raise waiting.pop(0)

    def uses(self, counts: Counter[str], rpc: str) -> bool:
        if counts[rpc] <= 0:
            return False
        counts[rpc] -= 1
        return True


@dataclass
class Operation:
    """One long-running operation; ``cancel`` is what its owner does when a client cancels it."""

    name: str
    metadata: Any
    cancel: Callable[[], None]
    response: Any = None
    error: ServiceError | None = None
    is_done: bool = False

    def message(self) -> operations_pb2.Operation:
        made = operations_pb2.Operation(name=self.name, done=self.is_done)
        made.metadata.Pack(raw(self.metadata))
        if self.error is not None:
            code = code_pb2.Code.Value(self.error.code)
            made.error.CopyFrom(status_pb2.Status(code=code, message=self.error.message))
        elif self.is_done:
            made.response.Pack(raw(self.response))
        return made


class Core:
    """One project in one region, and everything in it.

    ``changed`` guards all state and is notified when any of it changes. ``requests`` has the names of the
    rpcs that were asked for, in order. ``store`` writes an object, such as the output of a driver.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        project: str = "couponflow-ci",
        region: str = "us-west1",
        store: Callable[[str, bytes], None] | None = None,
        num_drivers: int = 2,
    ) -> None:
        self.runner, self.store = runner, store
        self.project, self.region = project, region
        self.faults = Faults()
        self.requests: list[str] = []
        self.changed = threading.Condition(threading.RLock())
        self.operations: dict[str, Operation] = {}
        self.known: dict[tuple[str, str], Any] = {}  # what a request id has brought about
        self.drivers = ThreadPoolExecutor(num_drivers, "driver")
        self.works = ThreadPoolExecutor(16, "operation")
        self.clusters, self.policies, self.batches = Clusters(self), Policies(self), Batches(self)
        self.jobs, self.templates, self.workflows = Jobs(self), Templates(self), Workflows(self)
        self.answers: dict[str, Callable[[Any], Any]] = {
            "GetOperation": lambda request: self.operation(request.name).message(),
            "CancelOperation": self.cancel_operation,
        }
        for part in (
            self.clusters,
            self.policies,
            self.batches,
            self.jobs,
            self.templates,
            self.workflows,
        ):
            self.answers |= part.answers()

    def call(self, rpc: str, request: Any) -> Any:
        """Answer one request.

        Raises:
            ServiceError: the service would refuse it, or was told to.
            LostAnswerError: it is done, and the front has to drop the connection.
        """
        with self.changed:
            self.requests.append(rpc)
            self.faults.check(rpc)
            if rpc not in self.answers:
                raise ServiceError("UNIMPLEMENTED", f"{rpc} is not served here")
            self._check_place(request)
            if request_id := getattr(request, "request_id", ""):
                check("request id", request_id, REQUEST_ID)
            answer = self.answers[rpc](request)
            self.changed.notify_all()
            if self.faults.uses(self.faults.lost, rpc):
                raise LostAnswerError(rpc)
            return snapshot(answer)

    def _check_place(self, request: Any) -> None:
        name = next((text for key in ("parent", "name") if (text := getattr(request, key, ""))), "")
        for inner in ("template", "policy"):
            name = name or getattr(getattr(request, inner, None), "name", "")
        parts = name.split("/")
        if len(parts) >= 4 and parts[0] == "projects":
            project, region = parts[1], parts[3]
        else:
            project, region = getattr(request, "project_id", ""), getattr(request, "region", "")
        if project != self.project:
            raise ServiceError(
                "PERMISSION_DENIED",
                f"Permission denied on resource project {project} (or it may not exist).",
            )
        if region != self.region:
            raise ServiceError(
                "INVALID_ARGUMENT", f"Region '{region}' is not that of the endpoint, {self.region}"
            )

    @property
    def parent(self) -> str:
        return f"projects/{self.project}/regions/{self.region}"

    def start(
        self,
        rpc: str,
        metadata: Any,
        work: Callable[[Operation], Any],
        cancel: Callable[[], None] | None = None,
    ) -> Operation:
        """A new operation whose ``work`` runs in a thread, without the lock, and returns the response."""
        operation = Operation(f"{self.parent}/operations/{uuid4()}", metadata, cancel or (lambda: None))
        self.operations[operation.name] = operation
        if not self.faults.uses(self.faults.endless, rpc):
            self.works.submit(self._work, operation, work)
        return operation

    def _work(self, operation: Operation, work: Callable[[Operation], Any]) -> None:
        response, error = None, None
        try:
            response = work(operation)
        except ServiceError as refusal:
            error = refusal
        except Exception as problem:  # a fault of the stand-in itself has to show, not to hang the client
            error = ServiceError("INTERNAL", f"{type(problem).__name__}: {problem}")
        with self.changed:
            operation.response, operation.error, operation.is_done = response, error, True
            self.changed.notify_all()

    def operation(self, name: str) -> Operation:
        if name not in self.operations:
            raise ServiceError("NOT_FOUND", f"Not found: Operation {name}")
        return self.operations[name]

    def cancel_operation(self, request: Any) -> empty_pb2.Empty:
        operation = self.operation(request.name)
        if not operation.is_done:
            operation.cancel()
        return empty_pb2.Empty()

    def drive(self, job: dp.Job) -> tuple[int, str]:
        """Exit code and output of a driver, which is stored; whatever fails, a job has both in the end."""
        with self.changed:
            planned = self.faults.exits.get(job.labels.get("stage", ""))
            exit_code = planned.pop(0) if planned else None
        try:
            exit_code, text = (exit_code, "ended on command\n") if exit_code else self.runner(job)
        except Exception as problem:
            exit_code, text = 1, f"the runner failed: {type(problem).__name__}: {problem}\n"
        try:
            if self.store is not None and job.driver_output_resource_uri:
                self.store(f"{job.driver_output_resource_uri}.000000000", text.encode())
        except Exception as problem:
            return 1, f"{text}the output could not be stored: {type(problem).__name__}: {problem}\n"
        return exit_code, text

    def stop_driver(self, job_id: str) -> None:
        """End a driver if the runner can; else its job is over when it ends by itself."""
        if (stop := getattr(self.runner, "stop", None)) is not None:
            stop(job_id)

    def wait_for(self, holds: Callable[[], bool], timeout_seconds: float = 60) -> None:
        """Wait until something holds of the state, or of what a runner keeps, which notifies nobody.

        Raises:
            TimeoutError: it never did.
        """
        until = time.monotonic() + timeout_seconds
        with self.changed:
            while not holds():
                if time.monotonic() > until:
                    raise TimeoutError(f"not so within {timeout_seconds} s")
                self.changed.wait(0.02)

    def close(self) -> None:
        """End all drivers and workflows; nothing is left running."""
        with self.changed:
            self.workflows.cancel_all()
            self.jobs.stop_all()
            self.batches.stop_all()
            self.changed.notify_all()
        self.drivers.shutdown(cancel_futures=True)
        self.works.shutdown(cancel_futures=True)
