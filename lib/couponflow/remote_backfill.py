"""A backfill whose chunks are jobs of one cluster on Dataproc; plan and scheduling are those of ``backfill``.

Every chunk is a job under its own id (``cloud.requests``), and its driver holds the lease on what it
replaces. All jobs of one backfill carry its id as label ``run``. The command holds nothing: killed and
started again, it plans anew from the run records, meets the jobs that still run, and starts what is left.
A chunk whose job has ended well before the plan was made, and which it runs all the same, is a new attempt.
"""

import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from couponflow import backfill, scopes
from couponflow.backfill_plan import Part, Plan
from couponflow.cloud import register, requests, submission
from couponflow.cloud.dataproc import Dataproc, Job, Patience
from couponflow.cloud.preflight import Deployment
from couponflow.dates import DateRange
from couponflow.errors import ConflictError, InfraError
from couponflow.lake import leases, runs


class InterruptedWaitError(InfraError):
    """Nobody waits any more; the jobs go on."""


class Remote:
    """Jobs on a cluster: the one that is named, or one that lives for this backfill."""

    def __init__(
        self, deployment: Deployment, name: str, dates: DateRange, planned: datetime, cluster: str = ""
    ) -> None:
        """Take the deployment, what is backfilled, and when the plan was made. Nothing is asked yet."""
        self._deployment, self._planned = deployment, planned
        self._stop = threading.Event()
        self.run = requests.derived_id(f"backfill {name}", str(dates), deployment.release.name)
        self._is_own = not cluster
        self._cluster = cluster or requests.cluster_name(self.run)
        self._dataproc = Dataproc(deployment.cloud, Patience(pause=self._pause))

    @contextmanager
    def held(self, stages: backfill.Stages) -> Iterator[Callable[[], None]]:
        """Refuse dates that others hold, and bring release and cluster; the cluster goes when all is done."""
        if not stages:
            yield lambda: None
            return
        self._refuse_held(stages)
        works = [requests.Work(part.job, cut[0], part.campaign) for part, cut in stages]
        deployment = self._deployment
        own = requests.cluster_request(deployment.specs, deployment.cloud, self._cluster, works)
        submission.prepare(self._dataproc, deployment, self._cluster, own if self._is_own else None)
        try:
            yield lambda: None
        finally:
            if self._is_own and not self._stop.is_set():
                submission.give_back(self._dataproc, self._cluster, self.run)

    def stage(self, part: Part) -> Callable[[DateRange], runs.RunRecord]:
        """What runs one chunk of a stage as a job, or meets the job that does."""

        def run_one(dates: DateRange) -> runs.RunRecord:
            release = self._deployment.release.name
            work = requests.Work(part.job, dates, part.campaign)
            met = submission.find(self._dataproc, release, work, self._planned)
            job = met.job or submission.start(
                self._dataproc, self._deployment, met.work, self._cluster, self.run
            )
            return _record(submission.follow(self._dataproc, self._deployment, job), work, release)

        return run_one

    def interrupt(self) -> None:
        """Stop waiting; jobs and cluster go on, the latter until it has been idle for its time."""
        self._stop.set()

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise InterruptedWaitError("interrupted; the jobs go on, the same command meets them")

    def _refuse_held(self, stages: backfill.Stages) -> None:
        """Neither a run that holds its lease nor a job that still waits for its turn may be in the way."""
        config = self._deployment.config
        wanted, record = backfill.replaced(config, stages), backfill.opened(config, stages)
        labels = {"app": "couponflow", "environment": self._deployment.cloud.environment}
        active = self._dataproc.jobs(labels, only_active=True)
        own = {job.id for job in active if job.labels.get("run") == self.run}
        leases.check_free(config.lake.root_uri, record, wanted, own)
        for job in active:
            if job.id not in own and any(leases.clash(a, b) for a in wanted for b in self._scopes(job)):
                raise ConflictError(
                    f"backfill {record.dates}: job {job.id} ({job.stage} "
                    f"{requests.argument(job.args, '--dates')}, {job.state}) replaces dates of this plan; "
                    "run again when it has ended"
                )

    def _scopes(self, job: Job) -> tuple[leases.Scope, ...]:
        dates = DateRange.parse(requests.argument(job.args, "--dates"))
        campaign = requests.argument(job.args, "--campaign")
        return scopes.writes(job.stage, dates, self._deployment.config, campaign)


@dataclass(frozen=True)
class Estimate:
    """What the running dates of a stage took when they ran on Dataproc before; None where none has."""

    seconds: float | None
    amount: float | None


def estimates(deployment: Deployment, planned: Plan) -> dict[str, Estimate]:
    """Seconds and cost of each stage that runs, by the median of a day in earlier runs on Dataproc."""
    hourly = register.hourly_amounts(deployment)
    known = [
        record
        for record in runs.load_all(deployment.config.lake.root_uri)
        if record.attempt_key and record.status == "ok"
    ]
    found = {}
    for part in planned.stages:
        rates = [
            record.seconds / len(DateRange.parse(record.dates)) for record in known if record.job == part.job
        ]
        days = sum(len(dates) for dates in planned.running(part.name))
        seconds = statistics.median(rates) * days if rates else None
        price = hourly.get(part.job)
        amount = None if seconds is None or price is None else seconds / 3600 * price
        found[part.name] = Estimate(seconds, amount)
    return found


def _record(job: Job, work: requests.Work, release: str) -> runs.RunRecord:
    """A job that has ended well, as a run; the record on the lake is its driver's and says more."""
    assert job.ended is not None  # it has ended
    arguments = {"campaign": work.campaign} if work.campaign else {}
    record = runs.RunRecord(
        job.id, work.stage, str(work.dates), arguments, "", release, job.started.isoformat()
    )
    record.finished_time, record.status, record.attempt_key = job.ended.isoformat(), "ok", job.id
    return record
