"""All tables: small files joined, files of old versions removed, erased people kept out. Safe to rerun."""

from typing import Annotated

import typer
from pyspark.sql import SparkSession

from couponflow import maintenance
from couponflow.entry import ConfigPath, LogJson, Overrides, Run, job_app, open_run, today
from couponflow.lake import session

app = job_app(__doc__)

Vacuum = Annotated[bool, typer.Option("--vacuum", help="Only remove files of old versions.")]
Optimize = Annotated[bool, typer.Option("--optimize", help="Only join small files.")]
Migrate = Annotated[bool, typer.Option("--migrate", help="Only bring tables of older code to this schema.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]


def run(
    spark: SparkSession,
    job: Run,
    vacuum: bool = True,
    optimize: bool = True,
    dry_run: bool = False,
    migrate: bool = False,
) -> None:
    """Do both, or one of them, or migrate; or only count."""
    if migrate:
        job.rows.update(maintenance.migrate(spark, job, dry_run))
    else:
        job.rows.update(maintenance.maintain(spark, job, vacuum, optimize, dry_run))
    job.facts["is_dry_run"] = dry_run


@app.command()
def main(
    config: ConfigPath,
    vacuum: Vacuum = False,
    optimize: Optimize = False,
    migrate: Migrate = False,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Keep the tables small and fast; without a choice both parts are done."""
    with open_run("migrate" if migrate else "maintain", config, overrides, today(), log_json=log_json) as job:
        spark = session.start(job.config.spark, "maintain")
        run(spark, job, vacuum or not optimize, optimize or not vacuum, dry_run, migrate)


if __name__ == "__main__":
    app()
