"""Submitting: find the attempt that does some work already, or start the next one; wait; say how it ended.

An attempt that failed or was cancelled is followed by the next one; one that runs or has ended well is met.
So the same command again, after a crash of its own or from another machine, starts nothing twice.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from couponflow.cloud import preflight, releases, requests, workflows
from couponflow.cloud.dataproc import DONE, Dataproc, Job, Workflow
from couponflow.cloud.outcomes import DriverOutput, failure
from couponflow.cloud.preflight import Deployment
from couponflow.dates import DateRange
from couponflow.errors import CouponflowError, InfraError

log = logging.getLogger("couponflow")

_MAX_ATTEMPTS = 50
Print = Callable[[str], None]


@dataclass(frozen=True)
class Met:
    """The attempt of some work, and its job, if one is there."""

    work: requests.Work
    job: Job | None


def find(dataproc: Dataproc, release: str, work: requests.Work, since: datetime | None = None) -> Met:
    """The first attempt that runs, has ended well, or is not there yet.

    ``since``: one that has ended well before that does not count; its results have gone stale.

    Raises:
        InfraError: too many attempts have failed.
    """
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        candidate = replace(work, attempt=attempt)
        job = dataproc.find(candidate.job_id(release))
        if job is None or job.is_active:
            return Met(candidate, job)
        if job.state == DONE and (since is None or (job.ended is not None and job.ended >= since)):
            return Met(candidate, job)
    raise InfraError(
        f"{work.name} {work.dates}: {_MAX_ATTEMPTS} attempts of this release have ended; look at them with "
        "`couponflow status --on dataproc` before another"
    )


def prepare(
    dataproc: Dataproc, deployment: Deployment, cluster: str, ephemeral: requests.Tree | None
) -> None:
    """Bring all that jobs need: buckets checked, the release uploaded, then the cluster.

    Raises:
        ConfigError, InfraError: what is missing or was refused; nothing that costs has started, unless it was
            the cluster itself.
    """
    preflight.check_buckets(deployment.cloud)
    if ephemeral is None:
        dataproc.check_cluster(cluster)
    releases.upload(deployment.release, deployment.cloud.buckets.code)
    if ephemeral is not None:
        dataproc.ensure_cluster(ephemeral)


def start(
    dataproc: Dataproc, deployment: Deployment, work: requests.Work, cluster: str, run: str = ""
) -> Job:
    """Send the job of some work to a cluster that is there."""
    release = deployment.release.name
    return dataproc.submit(
        requests.job_request(deployment.specs, deployment.cloud, release, work, cluster, run)
    )


def follow(dataproc: Dataproc, deployment: Deployment, job: Job, show: Print | None = None) -> Job:
    """Wait for a job's end; pass on what its driver prints, if it shall be shown.

    Raises:
        ConfigError, DataError, ConflictError, InfraError: what its driver has ended with.
    """
    output = DriverOutput()

    def look(seen: Job) -> None:
        if show is not None and (text := output.more(seen)):
            show(text)

    ended = dataproc.wait(job.id, look)
    if show is None and ended.state != DONE:
        output.more(ended)
    error = failure(deployment.config.lake.root_uri, ended, output)
    if error is not None:
        raise error
    return ended


def give_back(dataproc: Dataproc, cluster: str, run: str) -> None:
    """Delete the cluster that lived for the jobs of this label ``run``, unless one of them goes on.

    Left alone it ends by itself when it has been idle.
    """
    try:
        if not dataproc.jobs({"app": "couponflow", "run": run}, only_active=True):
            dataproc.delete_cluster(cluster)
    except CouponflowError as error:  # must not hide how the work has ended
        log.warning("cluster %s is not deleted (%s); it ends by itself when it has been idle", cluster, error)


def start_workflow(
    dataproc: Dataproc, deployment: Deployment, name: str, dates: DateRange, campaign: str, attempt: int = 0
) -> tuple[str, Workflow | None]:
    """Start a workflow, or meet the one that does the same; its label ``run``, and None if it is done.

    ``attempt``: exactly this one; 0 finds it.
    """
    release = deployment.release.name
    for number in [attempt] if attempt else range(1, _MAX_ATTEMPTS + 1):
        request = workflows.workflow_request(
            deployment.specs, deployment.config, deployment.cloud, release, name, dates, campaign, number
        )
        run = request["requestId"]
        jobs = dataproc.jobs({"app": "couponflow", "run": run})
        states = [job.state for job in jobs]
        if states.count(DONE) == len(request["template"]["jobs"]):
            return run, None
        is_over = (
            bool(jobs) and not any(job.is_active for job in jobs) and {"ERROR", "CANCELLED"} & set(states)
        )
        if is_over and not attempt:
            continue
        preflight.check_buckets(deployment.cloud)
        releases.upload(deployment.release, deployment.cloud.buckets.code)
        return run, dataproc.start_workflow(request)
    raise InfraError(f"workflow {name} {dates}: {_MAX_ATTEMPTS} attempts of this release have failed")


def follow_workflow(dataproc: Dataproc, deployment: Deployment, started: Workflow, show: Print) -> Workflow:
    """Wait for a workflow's end, and tell when a step changes.

    Raises:
        ConfigError, DataError, ConflictError, InfraError: what the first failed step has ended with.
    """
    told: dict[str, str] = {}

    def look(seen: Workflow) -> None:
        for step, (state, job_id) in seen.steps.items():
            if job_id and told.get(step) != state:
                told[step] = state
                show(f"{step}: {state} (job {job_id})\n")

    ended = dataproc.wait_workflow(started.operation, look)
    if ended.error:
        raise _first_failure(dataproc, deployment, ended)
    return ended


def _first_failure(dataproc: Dataproc, deployment: Deployment, ended: Workflow) -> CouponflowError:
    """Of the steps that failed, the one that ended first: what is cancelled after it only follows."""
    failed = [dataproc.find(job_id) for state, job_id in ended.steps.values() if job_id and state == "FAILED"]
    jobs = [job for job in failed if job is not None and job.state == "ERROR" and job.ended is not None]
    for job in sorted(jobs, key=lambda one: (one.ended, one.id)):
        output = DriverOutput()
        output.more(job)
        error = failure(deployment.config.lake.root_uri, job, output)
        if error is not None:
            return error
    return InfraError(
        f"workflow {ended.operation.rpartition('/')[2]} in {dataproc.place}: {ended.error}; submit again"
    )
