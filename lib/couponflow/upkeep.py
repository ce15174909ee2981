"""The commands that keep a lake in order: erase a person, maintain the tables."""

import sys
from typing import Annotated

import typer

from couponflow import console, pipeline
from couponflow.commands import DEFAULT_CONFIG, DryRun, LazySpark, errors_as_exit_codes
from couponflow.config import load_config
from couponflow.entry import ConfigPath, Overrides, record_run, today
from couponflow.errors import ConfigError


def erase(
    user: Annotated[str, typer.Option("--user", help="Raw user id, as delivered; - reads it from stdin.")],
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only search every file for the id.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Erase one person from raw files, tables, ledger and lists, and keep them out.

    Old table versions hold the rows until `couponflow maintain` has removed them after the retention; then
    --verify reads every byte and ends with 3 if the id is found. Lists in BigQuery lose the person as well; a
    day's predictions there are named, and go when export_audience of that day runs again, or expire.

    Example: couponflow erase --user customer-4711 --dry-run
    """
    with errors_as_exit_codes():
        from couponflow import erasing

        settings = load_config(config, tuple(overrides or ()))
        raw_id = sys.stdin.readline().strip() if user == "-" else user
        person = erasing.find_person(settings, raw_id)
        if person.needles.is_plain:
            typer.echo(
                "the id is too plain to be searched as text; user columns are searched for it", err=True
            )
        if verify:
            erasing.verify(settings, person)
            typer.echo("no file of lake and export target holds this person")
            return
        if not (yes or dry_run or typer.confirm("Erase this person for good?")):
            raise ConfigError("nothing was erased; give --yes where nobody can answer")
        session = LazySpark(settings)
        with record_run("erase_user", settings, today()) as job:
            pipeline.load_job("erase_user").run(session(), job, raw_id, dry_run)
        _show_counts("Would be erased" if dry_run else "Erased", job.rows)
        if not job.rows:
            typer.echo("nobody of this id is in the lake; new deliveries of it will be dropped")


def maintain(
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    vacuum: Annotated[bool, typer.Option("--vacuum", help="Only remove files of old versions.")] = False,
    optimize: Annotated[bool, typer.Option("--optimize", help="Only join small files.")] = False,
    migrate: Annotated[
        bool, typer.Option("--migrate", help="Only bring tables of older code to this code's schema.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Join small files, remove files of table versions older than the retention, keep erased people out.

    After an upgrade whose code refuses the tables of the one before, --migrate brings them up, without
    writing a row: no other job may run meanwhile, and older code refuses the tables from then on.

    Example: couponflow maintain --dry-run
    """
    with errors_as_exit_codes():
        settings = load_config(config, tuple(overrides or ()))
        session = LazySpark(settings)
        with record_run("migrate" if migrate else "maintain", settings, today()) as job:
            pipeline.load_job("maintain").run(
                session(), job, vacuum or not optimize, optimize or not vacuum, dry_run, migrate
            )
        _show_counts("Would be done" if dry_run else "Done", job.rows)


def _show_counts(title: str, counts: dict[str, int]) -> None:
    console.show_rows(title, ["where", "count"], [[name, number] for name, number in counts.items()])
