"""The register of runs on Dataproc: its list of jobs by labels, joined with the run records of the lake.

One row per job. Seconds are the job's, from its submission to its end. The cost is an estimate: the list
price of the cluster of that stage at its least size, as if the job had it for itself. Of a failure the run
record says more than the service; where the lake may not be read, the service's word stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from couponflow.cloud.dataproc import Dataproc, Job
from couponflow.cloud.preflight import Deployment
from couponflow.cloud.requests import argument
from couponflow.errors import InfraError
from couponflow.lake import runs
from couponflow.prices import hourly_price


@dataclass(frozen=True)
class Row:
    """One job. ``amount`` is None where the stage has no cluster of ours; ``run_id`` is its record's."""

    stage: str
    dates: str
    state: str
    seconds: float
    amount: float | None
    job_id: str
    run: str
    run_id: str
    failure: str
    url: str


def rows(dataproc: Dataproc, deployment: Deployment, stage: str = "") -> list[Row]:
    """The jobs of an environment, oldest first, of one stage or of all."""
    labels = {"app": "couponflow", "environment": deployment.cloud.environment}
    jobs = dataproc.jobs(labels | ({"stage": stage} if stage else {}))
    prices = hourly_amounts(deployment)
    records = _records(deployment, stage) if jobs else []
    now = runs.utc_now()
    return [_row(job, deployment, prices, _record_of(job, records, now), now) for job in jobs]


def hourly_amounts(deployment: Deployment) -> dict[str, float]:
    """Price of an hour of each stage's cluster, as the first workflow that has the stage says."""
    found: dict[str, float] = {}
    for spec in deployment.specs:
        if spec.kind == "workflows":
            price = hourly_price(spec.tree["placement"]["managedCluster"]["config"], deployment.cloud)
            for step in spec.tree["jobs"]:
                found.setdefault(step["labels"]["stage"], price.least)
    return found


def _records(deployment: Deployment, stage: str) -> list[runs.RunRecord]:
    try:
        return runs.load_all(deployment.config.lake.root_uri, stage or None)
    except InfraError:  # whoever may submit need not read the lake
        return []


def _record_of(job: Job, records: list[runs.RunRecord], now: datetime) -> runs.RunRecord | None:
    """The newest record of a job: by its key, or of a workflow's job, which has none, by what and when."""
    key = argument(job.args, "--attempt-key")
    if key:
        own = [record for record in records if record.attempt_key == key]
        return own[-1] if own else None
    named = {"campaign": argument(job.args, "--campaign"), "model": argument(job.args, "--model")}
    until = job.ended or now
    same = [
        record
        for record in records
        if record.job == job.stage
        and record.dates == _dates(job)
        and record.arguments == {name: value for name, value in named.items() if value}
        and job.started <= datetime.fromisoformat(record.started_time) <= until
    ]
    return same[-1] if same else None


def _dates(job: Job) -> str:
    """Dates of a job as a run record writes them."""
    first, colon, last = argument(job.args, "--dates").partition(":")
    return f"{first}:{last if colon else first}"


def _row(
    job: Job,
    deployment: Deployment,
    prices: Mapping[str, float],
    record: runs.RunRecord | None,
    now: datetime,
) -> Row:
    cloud = deployment.cloud
    seconds = ((job.ended or now) - job.started).total_seconds()
    price = prices.get(job.stage)
    said = record.error if record is not None else ""
    return Row(
        stage=" ".join(
            filter(None, [job.stage, argument(job.args, "--model"), argument(job.args, "--campaign")])
        ),
        dates=_dates(job),
        state=job.state,
        seconds=seconds,
        amount=None if price is None else price * seconds / 3600,
        job_id=job.id,
        run=job.labels.get("run", ""),
        run_id=record.run_id if record is not None else "",
        failure=(said or job.details) if job.state == "ERROR" else "",
        url=f"https://console.cloud.google.com/dataproc/jobs/{job.id}?project={cloud.project}&region={cloud.region}",
    )
