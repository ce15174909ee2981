"""The ``couponflow`` command. Bodies import what they start, so that ``--help`` stays light."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from couponflow import (
    campaign_commands,
    campaign_file,
    checks,
    console,
    costs,
    explanations,
    model_commands,
    pipeline,
    submit_commands,
    upkeep,
)
from couponflow.commands import DEFAULT_CONFIG, AsJson, DryRun, LazySpark, Reason, errors_as_exit_codes
from couponflow.config import Config, load_config
from couponflow.dates import DateRange, parse_day
from couponflow.entry import Campaign, ConfigPath, Dates, FromScratch, Model, Overrides, record_run
from couponflow.errors import ConfigError, CouponflowError
from couponflow.lake import leases, runs, storage
from couponflow.submit_commands import On

app = typer.Typer(
    help="Decide who gets a coupon mail: from raw browsing logs to an exported audience.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(
    help="List, inspect, promote, roll back and recalibrate models.", no_args_is_help=True
)
campaign_app = typer.Typer(
    help="Plan, approve, recall, read out and report a campaign.", no_args_is_help=True
)
app.add_typer(models_app, name="models")
app.add_typer(campaign_app, name="campaign")


def _load(config: Path, overrides: list[str] | None) -> Config:
    return load_config(config, tuple(overrides or ()))


@app.command()
def run(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run every stage of the main job; finished stages are skipped.

    Example: couponflow run --config deploy/env/local.toml
    """
    with errors_as_exit_codes():
        settings = _load(config, overrides)
        stages = pipeline.plan(settings)
        if dry_run:
            console.show_plan(stages)
            return
        session = LazySpark(settings)
        with console.RunDisplay(session.peek) as progress:
            outcomes = pipeline.execute(settings, stages, session, progress)
        _show_run(settings, outcomes, session())


@app.command()
def land(
    source: Annotated[str, typer.Argument(help="completejourney or synthetic.")],
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Land a source's raw feeds under the lake's root. The dials of the synthetic shop are in [world].

    Example: couponflow land synthetic --config deploy/env/demo.toml --set world.bot_share=0.02
    """
    with errors_as_exit_codes():
        settings = _load(config, [*(overrides or []), f"source.name={source}"])
        data = DateRange(settings.run.first_date, settings.run.last_date + timedelta(days=1))
        with (
            console.RunDisplay(lambda: None) as progress,
            record_run("land", settings, data) as job,
        ):
            progress.start(0, 1, pipeline.Stage("land", data, (), uses_spark=False))
            job.rows.update(pipeline.land(settings, progress.step))
        console.show_rows("Landed", ["feed", "rows"], [[name, n] for name, n in job.rows.items()])


@app.command("job")
def one_job(
    name: Annotated[str, typer.Argument(help="Job, such as clean_events; see jobs/.")],
    dates: Dates,
    config: ConfigPath = DEFAULT_CONFIG,
    campaign: Campaign = "",
    model: Model = "",
    from_scratch: FromScratch = False,
    overrides: Overrides = None,
) -> None:
    """Run one job over one date range, in this process.

    Example: couponflow job sessionize --dates 2017-10-01:2017-10-31
    """
    with errors_as_exit_codes():
        _run_job(name, _load(config, overrides), dates, campaign, model, from_scratch)


@app.command()
def backfill(
    name: Annotated[str, typer.Argument(help="Job, such as clean_events; or all, for ingest dates.")],
    from_date: Annotated[str, typer.Option("--from-date", help="First day, inclusive.")],
    to_date: Annotated[str, typer.Option("--to-date", help="Last day, inclusive.")],
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    reprocess_behavior: Annotated[
        str,
        typer.Option(
            "--reprocess-behavior",
            help="none: new dates and changed inputs; failed: also what failed, or was built with another "
            "config; completed: every date.",
        ),
    ] = "none",
    chunk_days: Annotated[
        int, typer.Option("--chunk-days", help="Neighbouring days per run; 1 is day by day.")
    ] = 7,
    run_backwards: Annotated[bool, typer.Option("--run-backwards", help="Newest days first.")] = False,
    order_seed: Annotated[
        int | None, typer.Option("--order-seed", help="Days in an order drawn from this seed.")
    ] = None,
    max_active_runs: Annotated[
        int, typer.Option("--max-active-runs", help="Runs at once, where they replace other dates.")
    ] = 1,
    on: On = "local",
    env: Annotated[str, typer.Option("--env", metavar="ENV", help="Environment of --on dataproc.")] = "",
    cluster: Annotated[
        str, typer.Option("--cluster", help="Cluster of --on dataproc; without it one of its own.")
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Run past dates of one job, or of every stage that they reach; finished dates are skipped.

    The vocabulary in use is taken as it is. Stopped or killed, the same command goes on where it was.
    With --on dataproc every chunk is a job there, under the config of the environment.

    Example: couponflow backfill all --from-date 2017-10-01 --to-date 2017-10-07 --dry-run

    Example: couponflow backfill all --from-date 2017-10-01 --to-date 2017-10-31 --on dataproc --env dev
    """
    with errors_as_exit_codes():
        from couponflow import backfill as backfilling
        from couponflow import backfill_plan

        dates = DateRange(parse_day(from_date), parse_day(to_date) + timedelta(days=1))
        order = backfilling.Order(chunk_days, run_backwards, order_seed, max_active_runs)
        if submit_commands.is_remote(on, env):
            if overrides:
                raise ConfigError("--set changes nothing on Dataproc; change the environment's file")
            submit_commands.run_backfill(env, name, dates, order, reprocess_behavior, cluster, dry_run)
            return
        settings = _load(config, overrides)
        planned = backfill_plan.plan(settings, name, dates, reprocess_behavior)
        console.show_backfill(f"Backfill of {name} {dates}", planned)
        planned.check()
        if dry_run:
            return
        session = LazySpark(settings)
        with console.RunDisplay(session.peek, "days") as progress:
            outcomes = backfilling.execute(settings, planned, order, session, progress)
        typer.echo(f"{sum(len(o.stage.dates) for o in outcomes)} days of stages in {len(outcomes)} runs")


@app.command()
def status(
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    job: Annotated[str, typer.Option("--job", help="Only this job.")] = "",
    content: Annotated[
        bool, typer.Option("--content", help="Rows and content hash of every table instead of the runs.")
    ] = False,
    on: On = "local",
    env: Annotated[str, typer.Option("--env", metavar="ENV", help="Environment of --on dataproc.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the runs of this lake, oldest first, with the reason of each failure, and who holds what now.

    With --content: what the tables hold. Equal hashes mean equal rows, whatever the files and versions.
    With --on dataproc: the jobs of an environment, with state, time and estimated cost.

    Example: couponflow status --job train

    Example: couponflow status --on dataproc --env dev
    """
    with errors_as_exit_codes():
        known = ("land", "migrate", *pipeline.UPKEEP, *pipeline.JOBS)
        if job and job not in known:
            raise ConfigError(f"unknown job {job!r}; one of {', '.join(sorted(known))}")
        if submit_commands.is_remote(on, env):
            submit_commands.show_status(env, job, as_json)
            return
        settings = _load(config, overrides)
        if content:
            _show_content(settings, LazySpark(settings)(), as_json)
            return
        records = runs.load_all(settings.lake.root_uri, job or None)
        since = runs.reproducible_since(settings.lake.root_uri)
        if as_json:
            console.show_json(
                [record.__dict__ | {"is_reproducible": record.started_time >= since} for record in records]
            )
            return
        console.show_rows(
            "Runs",
            ["job", "dates", "arguments", "status", "seconds", "used", "rows", "error"],
            [
                [
                    record.job,
                    record.dates,
                    " ".join(record.arguments.values()),
                    record.status + ("" if record.started_time >= since else ", not reproducible"),
                    round(record.seconds, 1),
                    costs.text(record.usage, settings.cloud.prices.currency if settings.cloud else ""),
                    json.dumps(record.rows),
                    record.error,
                ]
                for record in records
            ],
        )
        _show_leases(settings.lake.root_uri)


app.command()(upkeep.erase)
app.command()(upkeep.maintain)
app.command()(submit_commands.submit)
app.command()(submit_commands.cancel)
app.command()(checks.check)
app.command()(explanations.explain)


@models_app.command("list")
def list_models(
    config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """List registered bundles, champion and challenger marked.

    Example: couponflow models list
    """
    with errors_as_exit_codes():
        from couponflow.training import registry

        root_uri = _load(config, overrides).lake.root_uri
        roles = registry.roles(root_uri)
        found = [{"version": v, "role": roles.get(v, "")} for v in registry.versions(root_uri)]
        if as_json:
            console.show_json(found)
            return
        console.show_rows("Models", ["version", "role"], [list(model.values()) for model in found])


@models_app.command("show")
def show_model(name: str, config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Print a bundle's manifest and metrics, and the gate's last decision about it.

    NAME is a version, a kind, 'champion' or 'challenger'.

    Example: couponflow models show champion
    """
    with errors_as_exit_codes():
        from couponflow.training import decisions, registry

        root_uri = _load(config, overrides).lake.root_uri
        version = registry.resolve(root_uri, name)
        folder = storage.join(root_uri, "models", version)
        files = {
            name: storage.read_bytes(storage.join(folder, name)) for name in ("manifest.json", "metrics.json")
        }
        shown = {name: json.loads(content) for name, content in files.items()}
        console.show_json({**shown, "last_decision": decisions.last(root_uri, version)})


@models_app.command("promote")
def promote(
    name: str, reason: Reason, config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None
) -> None:
    """Make a bundle the champion: model, calibrator and vocabulary move together, or are refused together.

    Example: couponflow models promote blend --reason "gate of 2017-12-31"
    """
    with errors_as_exit_codes():
        from couponflow.training import registry

        root_uri = _load(config, overrides).lake.root_uri
        version = registry.promote(root_uri, name, "command line", reason)
        typer.echo(f"champion is now {version}")


@models_app.command("rollback")
def rollback(reason: Reason, config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Make the previous champion the champion again.

    Example: couponflow models rollback --reason "calibration drifted"
    """
    with errors_as_exit_codes():
        from couponflow.training import registry

        root_uri = _load(config, overrides).lake.root_uri
        typer.echo(f"champion is now {registry.roll_back(root_uri, 'command line', reason)}")


models_app.command("recalibrate")(model_commands.recalibrate)


campaign_app.command("create")(campaign_commands.create)
campaign_app.command("plan")(campaign_commands.plan)
campaign_app.command("approve")(campaign_commands.approve)
campaign_app.command("recall")(campaign_commands.recall)
campaign_app.command("readout")(campaign_commands.readout)


@campaign_app.command("report")
def report(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Write the HTML reports of the config's campaigns from the finished runs.

    Example: couponflow campaign report --config deploy/env/local.toml
    """
    with errors_as_exit_codes():
        settings = _load(config, overrides)
        outcomes = pipeline.recorded(settings, pipeline.plan(settings))
        for uri in _write_reports(settings, outcomes, LazySpark(settings)()):
            typer.echo(uri)


def _show_run(settings: Config, outcomes: list[pipeline.Outcome], spark: Any) -> None:
    from couponflow.campaign import overview

    overview.show_results(settings, _by_stage(outcomes), console.show_rows)
    _show_content(settings, spark)
    for campaign in settings.run.campaign_ids:
        _read_out(settings, campaign, _by_stage(outcomes), spark)
    skipped = sum(outcome.is_skipped for outcome in outcomes)
    typer.echo(f"{len(outcomes)} stages, {skipped} skipped because nothing had changed")
    for uri in _write_reports(settings, outcomes, spark):
        typer.echo(f"report: {uri}")


def _read_out(settings: Config, campaign: str, records: dict[str, runs.RunRecord], spark: Any) -> None:
    """What the campaign's mails did, or why that cannot be told; a run ends well either way."""
    from couponflow.campaign.readouts import settled

    version = str(records[f"select_audience campaign {campaign}"].facts["version"])
    own = campaign_file.applied(settings, campaign)
    try:
        record = settled.read_out(own, lambda: spark, campaign, version, "run")
    except CouponflowError as error:
        typer.echo(f"readout: {error}")
        return
    campaign_commands.show_readout(record)


def _show_leases(root_uri: str) -> None:
    claims = leases.claims(root_uri)
    if not claims:
        return
    alive = {True: "working", False: "killed; the next run that needs the range takes it over"}
    console.show_rows(
        "Leases",
        ["run", "holds", "since", "state"],
        [
            [
                claim.run_id,
                ", ".join(f"{name} {dates}" if dates else name for name, dates in claim.scopes),
                claim.since,
                alive[claim.is_alive(runs.utc_now())],
            ]
            for claim in claims
        ],
    )


def _show_content(settings: Config, spark: Any, as_json: bool = False) -> None:
    names = ["table", "version", "rows", "content hash"]
    found = [list(row) for row in pipeline.content(settings.lake.root_uri, spark)]
    if as_json:
        console.show_json([dict(zip(names, row, strict=True)) for row in found])
    else:
        console.show_rows("Table contents", names, found)


def _write_reports(settings: Config, outcomes: list[pipeline.Outcome], spark: Any) -> list[str]:
    from couponflow.campaign import overview

    records = _by_stage(outcomes)
    skipped = {outcome.stage.name for outcome in outcomes if outcome.is_skipped}
    found = overview.look_back(settings, records, spark, console.show_rows)
    return overview.write_reports(settings, records, skipped, spark, found)


def _by_stage(outcomes: list[pipeline.Outcome]) -> dict[str, runs.RunRecord]:
    return {outcome.stage.name: outcome.record for outcome in outcomes}


def _run_job(
    name: str, settings: Config, dates: DateRange, campaign: str, model: str, from_scratch: bool
) -> None:
    pipeline.check_arguments(name, campaign, model)
    if from_scratch and name != "train":
        raise ConfigError(f"job {name} has no checkpoints; leave --from-scratch out")
    job = pipeline.load_job(name)
    session = LazySpark(settings)
    with record_run(name, settings, dates, campaign, model) as record:
        record.from_scratch = from_scratch
        if name in pipeline.WITHOUT_SPARK:
            job.run(record)
        else:
            job.run(session(), record)
    console.show_rows(f"{name} {dates}", ["rows", "count"], [[key, n] for key, n in record.rows.items()])


if __name__ == "__main__":
    sys.exit(app())
