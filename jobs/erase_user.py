"""Erase one person: list, raw files, tables, ledger, lists, texts. Safe to rerun.

The id is read from an object, not from an argument, which a cluster keeps in its history; remove it then.
"""

from typing import Annotated

import typer
from pyspark.sql import SparkSession

from couponflow import erasing
from couponflow.cloud import bigquery
from couponflow.entry import ConfigPath, LogJson, Overrides, Run, job_app, open_run, today
from couponflow.lake import session, storage

app = job_app(__doc__)

UserFile = Annotated[str, typer.Option("--user-file", help="Object that holds the raw user id.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count what would go, and stop.")]


def run(spark: SparkSession, job: Run, raw_id: str, dry_run: bool = False) -> None:
    """Erase the person, or count what would go."""
    person = erasing.find_person(job.config, raw_id)
    job.rows.update(erasing.erase(spark, job, person, dry_run, bigquery))
    job.facts["is_dry_run"] = dry_run


@app.command()
def main(
    config: ConfigPath,
    user_file: UserFile,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Erase the person whose raw id an object holds."""
    with open_run("erase_user", config, overrides, today(), log_json=log_json) as job:
        raw_id = storage.read_bytes(user_file).decode().strip()
        run(session.start(job.config.spark, "erase_user"), job, raw_id, dry_run)


if __name__ == "__main__":
    app()
