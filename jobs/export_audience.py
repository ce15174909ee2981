"""audience -> list and manifest, handed over exactly once, for a run date and campaign. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.campaign import export
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import tables

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Hand over the version that the newest selection of the day has decided."""
    root, section = job.root_uri, job.config.export
    version = export.decided_version(root, job.campaign, str(job.dates))
    handover = export.Handover(root, section.target_uri, job.campaign, version, job.run_date, job.run_id)
    facts = export.export_audience(
        handover,
        tables.read(spark, root, "audience"),
        tables.read(spark, root, "assignments"),
        tables.read(spark, root, "consents"),
        tables.read(spark, root, "users"),
        job.config.selection,
        section.auto_approve,
    )
    job.facts.update(facts)
    job.rows["recipients"] = facts["num_recipients"]
    job.rows["withdrawn"] = facts["num_withdrawn"]


@app.command()
def main(
    config: ConfigPath,
    dates: Dates,
    campaign: Campaign,
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Hand the list of a campaign over."""
    with open_run("export_audience", config, overrides, dates, campaign, log_json=log_json) as job:
        run(tables.spark_session(job.config.spark, f"export_audience {dates}"), job)


if __name__ == "__main__":
    app()
