"""The commands about jobs on Dataproc: submit a job or a workflow, cancel a job, show the jobs there are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import typer

from couponflow import console
from couponflow.backfill import Order
from couponflow.commands import DryRun, errors_as_exit_codes
from couponflow.dates import DateRange
from couponflow.entry import Campaign, Dates, Model
from couponflow.errors import ConfigError
from couponflow.lake import runs

Env = Annotated[
    str,
    typer.Option("--env", metavar="ENV", help="Environment, such as dev; see deploy/env. Or a TOML file."),
]
On = Annotated[str, typer.Option("--on", metavar="local|dataproc", help="Where: here, or on Dataproc.")]
Cluster = Annotated[
    str,
    typer.Option("--cluster", help="Cluster that runs; without it one is created, and deleted afterwards."),
]
Attempt = Annotated[
    int,
    typer.Option("--attempt", min=0, max=999, help="Exactly this attempt; 0 meets or starts the next one."),
]
Wait = Annotated[
    bool, typer.Option("--wait/--async", help="Wait for the end, or return once it is accepted.")
]
CancelOnInterrupt = Annotated[
    bool, typer.Option("--cancel-on-interrupt", help="Ctrl-C cancels the job; without it the job goes on.")
]
#: What a shell reports of a command that Ctrl-C has ended.
_INTERRUPTED = 130


@dataclass(frozen=True)
class _Asked:
    """How a submission is to go on once it is accepted."""

    env: str
    waits: bool
    cancels_on_interrupt: bool
    is_dry_run: bool

    @contextmanager
    def interruptible(self, cancel: Callable[[], object], goes_on: str) -> Iterator[None]:
        """Ctrl-C leaves what was started alone and says so, or cancels it, as asked for."""
        try:
            yield
        except KeyboardInterrupt as error:
            if self.cancels_on_interrupt:
                cancel()
            typer.echo("cancelled" if self.cancels_on_interrupt else goes_on, err=True)
            raise typer.Exit(_INTERRUPTED) from error


def submit(
    dates: Dates,
    env: Env,
    name: Annotated[str, typer.Argument(help="Job, such as clean_events; see jobs/.")] = "",
    workflow: Annotated[
        str,
        typer.Option("--workflow", help="Instead of a job: a workflow, such as daily; see deploy/workflows."),
    ] = "",
    campaign: Campaign = "",
    model: Model = "",
    cluster: Cluster = "",
    attempt: Attempt = 0,
    wait: Wait = True,
    cancel_on_interrupt: CancelOnInterrupt = False,
    dry_run: DryRun = False,
) -> None:
    """Run a job, or a workflow, on Dataproc, and end with the exit code of its driver.

    The same call again, after a crash or from another machine, meets the job that it has started. A job that
    has failed is followed by its next attempt. --dry-run prints the exact requests and asks no service.

    Example: couponflow submit sessionize --env dev --dates 2017-10-01:2017-10-07 --dry-run

    Example: couponflow submit --workflow daily --env dev --dates 2017-10-01 --async
    """
    with errors_as_exit_codes():
        if bool(name) == bool(workflow):
            raise ConfigError("submit takes a job or --workflow NAME; give one of them")
        if workflow and (model or cluster):
            raise ConfigError(f"workflow {workflow} says its models and its cluster itself; leave them out")
        from couponflow.cloud import preflight
        from couponflow.cloud.requests import Work

        deployment = preflight.deployment(env)
        asked = _Asked(env, wait, cancel_on_interrupt, dry_run)
        if workflow:
            _submit_workflow(deployment, workflow, dates, campaign, attempt, asked)
        else:
            _submit_job(deployment, Work(name, dates, campaign, model, attempt), cluster, asked)


def cancel(
    job_id: Annotated[str, typer.Argument(help="Id of the job, as `couponflow status` shows it.")], env: Env
) -> None:
    """Cancel a job on Dataproc. What it has published stays; submit it again to go on.

    Example: couponflow cancel 6c8cc59c-afce-5f69-aac4-d955f56dd1e3 --env dev
    """
    with errors_as_exit_codes():
        from couponflow.cloud import specs
        from couponflow.cloud.dataproc import Dataproc

        job = Dataproc(specs.load_environment(env).cloud).cancel(job_id)
        typer.echo(f"job {job.id}: {job.state}")


def is_remote(on: str, env: str) -> bool:
    """Whether a command is about Dataproc; its environment has to be named then, and only then.

    Raises:
        ConfigError: another place, or no environment, or one that nothing asks for.
    """
    if on not in ("local", "dataproc") or (on == "dataproc") != bool(env):
        raise ConfigError(f"--on {on} --env {env or '(none)'}: give --on dataproc and --env ENV, or neither")
    return on == "dataproc"


def show_status(env: str, stage: str, as_json: bool) -> None:
    """The jobs of an environment as a table, joined with the run records of its lake."""
    from couponflow.cloud import preflight, register
    from couponflow.cloud.dataproc import Dataproc

    deployment = preflight.deployment(env)
    rows = register.rows(Dataproc(deployment.cloud), deployment, stage)
    if as_json:
        console.show_json([row.__dict__ for row in rows])
        return
    cloud = deployment.cloud
    console.show_rows(
        f"Jobs on Dataproc, project {cloud.project}, region {cloud.region}",
        ["stage", "dates", "state", "seconds", f"est. {cloud.prices.currency}", "job", "failure", "console"],
        [
            [
                row.stage,
                row.dates,
                row.state,
                round(row.seconds),
                "" if row.amount is None else f"{row.amount:.2f}",
                row.job_id,
                row.failure,
                row.url,
            ]
            for row in rows
        ],
    )


def run_backfill(
    env: str, name: str, dates: DateRange, order: Order, reprocess: str, cluster: str, dry_run: bool
) -> None:
    """Plan and run a backfill as jobs on Dataproc."""
    from couponflow import backfill, backfill_plan, remote_backfill
    from couponflow.cloud import preflight

    deployment = preflight.deployment(env)
    started = runs.utc_now()
    planned = backfill_plan.plan(deployment.config, name, dates, reprocess)
    console.show_backfill(f"Backfill of {name} {dates} on Dataproc", planned)
    _show_estimates(remote_backfill.estimates(deployment, planned), deployment.cloud.prices.currency)
    planned.check()
    if dry_run:
        return
    place = remote_backfill.Remote(deployment, name, dates, started, cluster)
    try:
        with console.RunDisplay(lambda: None, "days") as progress:
            outcomes = backfill.run_plan(deployment.config, planned, order, place, progress)
    except KeyboardInterrupt as error:
        typer.echo("jobs that run go on; the same command meets them", err=True)
        raise typer.Exit(_INTERRUPTED) from error
    typer.echo(f"{sum(len(o.stage.dates) for o in outcomes)} days of stages in {len(outcomes)} jobs")


def _show_estimates(found: dict[str, Any], currency: str) -> None:
    rows = [
        [
            stage,
            "" if one.seconds is None else round(one.seconds),
            "" if one.amount is None else f"{one.amount:.2f}",
        ]
        for stage, one in found.items()
    ]
    if rows:
        columns = ["stage", "seconds of jobs", f"{currency}"]
        console.show_rows("Estimated by earlier runs there; empty: none yet", columns, rows)


def _submit_job(deployment: Any, work: Any, cluster: str, asked: _Asked) -> None:
    from couponflow.cloud import requests, submission
    from couponflow.cloud.dataproc import Dataproc

    release, cloud = deployment.release.name, deployment.cloud

    def cluster_of(one: Any) -> tuple[str, Any]:
        if cluster:
            return cluster, None
        own = requests.cluster_name(one.job_id(release))
        return own, requests.cluster_request(deployment.specs, cloud, own, [one])

    first = replace(work, attempt=work.attempt or 1)
    target, ephemeral = cluster_of(first)
    request = requests.job_request(deployment.specs, cloud, release, first, target)
    if asked.is_dry_run:
        shown = {"createCluster": ephemeral} if ephemeral else {}
        console.show_json({**shown, "submitJob": request})
        return
    dataproc = Dataproc(cloud)
    if work.attempt:
        met = submission.Met(work, dataproc.find(work.job_id(release)))
    else:
        met = submission.find(dataproc, release, work)
    target, ephemeral = cluster_of(met.work)
    job = met.job
    if job is None:
        submission.prepare(dataproc, deployment, target, ephemeral)
        job = submission.start(dataproc, deployment, met.work, target)
        typer.echo(f"job {job.id}: {work.name} {work.dates} on cluster {job.cluster}")
    else:
        typer.echo(
            f"job {job.id}: attempt {met.work.attempt} of {work.name} {work.dates} is there, state "
            f"{job.state}; --attempt {met.work.attempt + 1} would run it anew"
        )
    end = f"`couponflow cancel {job.id} --env {asked.env}` ends it"
    if not asked.waits:
        typer.echo(f"`couponflow status --on dataproc --env {asked.env}` shows it, {end}")
        return
    try:
        with asked.interruptible(lambda: dataproc.cancel(job.id), f"job {job.id} goes on; {end}"):
            ended = submission.follow(dataproc, deployment, job, _show_output)
    finally:
        if ephemeral is not None:
            submission.give_back(dataproc, target, job.id)
    assert ended.ended is not None  # it has
    typer.echo(f"job {job.id}: done in {(ended.ended - ended.started).total_seconds():.1f} s")


def _submit_workflow(
    deployment: Any, name: str, dates: DateRange, campaign: str, attempt: int, asked: _Asked
) -> None:
    from couponflow.cloud import submission, workflows
    from couponflow.cloud.dataproc import Dataproc

    if asked.is_dry_run:
        request = workflows.workflow_request(
            deployment.specs,
            deployment.config,
            deployment.cloud,
            deployment.release.name,
            name,
            dates,
            campaign,
            attempt or 1,
        )
        console.show_json({"instantiateInlineWorkflowTemplate": request})
        return
    dataproc = Dataproc(deployment.cloud)
    run, started = submission.start_workflow(dataproc, deployment, name, dates, campaign, attempt)
    if started is None:
        typer.echo(f"workflow {name} {dates}: run {run} is done already; --attempt N runs it anew")
        return
    typer.echo(f"workflow {name} {dates}: run {run}, operation {started.operation}")
    look = f"`couponflow status --on dataproc --env {asked.env}` shows its jobs"
    if not asked.waits:
        typer.echo(look)
        return
    cancel = partial(dataproc.cancel_workflow, started.operation)
    with asked.interruptible(cancel, f"workflow {name} goes on; {look}"):
        submission.follow_workflow(dataproc, deployment, started, _show_output)
    typer.echo(f"workflow {name} {dates}: done")


def _show_output(text: str) -> None:
    """What drivers print goes to stderr; stdout is for what this command says."""
    typer.echo(text, nl=False, err=True)
