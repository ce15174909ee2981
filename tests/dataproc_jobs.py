"""Jobs of the stand-in of Dataproc: submitted once per request id, run by the runner, listed by labels."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dataproc_messages import last_line, now, paged
from dataproc_rules import JOB_ID, ServiceError, check, check_job, matcher
from google.cloud import dataproc_v1 as dp
from google.protobuf import empty_pb2

if TYPE_CHECKING:
    from dataproc_core import Core

State = dp.JobStatus.State
WAITING = (State.PENDING, State.SETUP_DONE)
CANCELLABLE = (State.PENDING, State.RUNNING)
ENDED = (State.DONE, State.ERROR, State.CANCELLED)


class Jobs:
    """All jobs by id, oldest first."""

    def __init__(self, core: "Core") -> None:
        self.core = core
        self.by_id: dict[str, dp.Job] = {}

    def answers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "SubmitJob": self.submit,
            "GetJob": lambda request: self.get(request.job_id),
            "ListJobs": self.list,
            "CancelJob": lambda request: self.cancel(request.job_id),
            "DeleteJob": self.delete,
        }

    def submit(self, request: dp.SubmitJobRequest) -> dp.Job:
        key = "SubmitJob", request.request_id
        if request.request_id and key in self.core.known:
            return self.get(self.core.known[key])
        job = self.launch(request.job)
        self.core.known[key] = job.reference.job_id
        return job

    def launch(self, asked: dp.Job) -> dp.Job:
        """Check a job and queue it; ``asked`` stays as it is."""
        check_job(asked)
        job = dp.Job(asked)
        job_id = job.reference.job_id or str(uuid4())
        check("job id", job_id, JOB_ID)
        if job_id in self.by_id:
            raise ServiceError("ALREADY_EXISTS", f"Already exists: Job {self.core.parent}/jobs/{job_id}")
        cluster = self.core.clusters.running(job.placement.cluster_name)
        folder = f"google-cloud-dataproc-metainfo/{cluster.cluster_uuid}/jobs/{job_id}"
        job.reference = dp.JobReference(project_id=self.core.project, job_id=job_id)
        job.placement.cluster_uuid = cluster.cluster_uuid
        job.job_uuid = str(uuid4())
        job.driver_control_files_uri = f"gs://{cluster.config.config_bucket}/{folder}/"
        job.driver_output_resource_uri = f"gs://{cluster.config.config_bucket}/{folder}/driveroutput"
        self.by_id[job_id] = job
        self._move(job, State.PENDING)
        self.core.drivers.submit(self._drive, job)
        return job

    def get(self, job_id: str) -> dp.Job:
        if job_id not in self.by_id:
            raise ServiceError("NOT_FOUND", f"Not found: Job {self.core.parent}/jobs/{job_id}")
        return self.by_id[job_id]

    def list(self, request: dp.ListJobsRequest) -> dp.ListJobsResponse:
        matches = matcher(request.filter, self._values, {"status.state": ("ACTIVE", "NON_ACTIVE")})
        wanted = {1: "ACTIVE", 2: "NON_ACTIVE"}.get(int(request.job_state_matcher))
        found = [
            job
            for job in reversed(self.by_id.values())
            if matches(job)
            and request.cluster_name in ("", job.placement.cluster_name)
            and (wanted is None or wanted in self._values(job, "status.state"))
        ]
        page, token = paged(found, request)
        return dp.ListJobsResponse(jobs=page, next_page_token=token)

    @staticmethod
    def _values(job: dp.Job, field: str) -> Iterator[str]:
        """Of ``status.state``, the only field: Dataproc knows no others in a filter of jobs."""
        yield "NON_ACTIVE" if job.status.state in ENDED else "ACTIVE"

    def cancel(self, job_id: str) -> dp.Job:
        job = self.get(job_id)
        if job.status.state not in CANCELLABLE:
            raise ServiceError(
                "FAILED_PRECONDITION",
                f"Cannot cancel jobId '{job_id}' in projectId '{self.core.project}' in state: "
                f"'{job.status.state.name}'; cancellable states: '[PENDING, RUNNING]'",
            )
        if job.status.state == State.PENDING:
            self._move(job, State.CANCELLED)
        else:
            self._move(job, State.CANCEL_PENDING)
            self._move(job, State.CANCEL_STARTED)
            self.core.stop_driver(job_id)
        return job

    def delete(self, request: dp.DeleteJobRequest) -> empty_pb2.Empty:
        job = self.get(request.job_id)
        if job.status.state not in ENDED:
            raise ServiceError("FAILED_PRECONDITION", f"Job '{request.job_id}' is active; cancel it first")
        del self.by_id[request.job_id]
        return empty_pb2.Empty()

    def stop_all(self, cluster_name: str = "") -> None:
        """What is not over ends now: the cluster goes away."""
        for job in self.by_id.values():
            if cluster_name in ("", job.placement.cluster_name) and job.status.state not in ENDED:
                was_waiting = job.status.state in WAITING
                self._move(job, State.ERROR, "The cluster was deleted while the job was active")
                if not was_waiting:
                    self.core.stop_driver(job.reference.job_id)

    def _move(self, job: dp.Job, state: State, details: str = "") -> None:
        with self.core.changed:
            if job.status.state:
                job.status_history.append(job.status)
            job.status = dp.JobStatus(state=state, details=details, state_start_time=now())
            job.done = state in ENDED
            self.core.changed.notify_all()

    def _drive(self, job: dp.Job) -> None:
        """Run a driver until it ends with 0 or may not be started again."""
        failures = 0
        while True:
            with self.core.changed:
                if job.status.state in ENDED:
                    return
                self._move(job, State.RUNNING)
                asked = dp.Job(job)
            exit_code, text = self.core.drive(asked)
            with self.core.changed:
                if job.status.state in ENDED:
                    return
                if job.status.state == State.CANCEL_STARTED:
                    return self._move(job, State.CANCELLED)
                if exit_code == 0:
                    return self._move(job, State.DONE)
                failures += 1
                details = (
                    f"driver exit {exit_code}: Google Cloud Dataproc Agent reports job failure"
                    f" [{last_line(text)}]. If logs are available, they can be found at: "
                    f"{job.driver_output_resource_uri}"
                )
                limits = job.scheduling
                total = limits.max_failures_total or limits.max_failures_per_hour
                if not limits.max_failures_per_hour or failures > min(total, limits.max_failures_per_hour):
                    return self._move(job, State.ERROR, details)
                self._move(job, State.ATTEMPT_FAILURE, details)
