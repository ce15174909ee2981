"""audience -> list, table, manifest: handed over exactly once, for a run date and campaign. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.campaign import export, predictions
from couponflow.cloud import bigquery
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run, today
from couponflow.lake import session, tables

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Hand over the version that the newest selection of the day has decided."""
    root, section, day = job.root_uri, job.config.export, job.run_date
    version = export.decided_version(root, job.campaign, str(job.dates))
    location = section.bigquery_location
    scores = predictions.Destination(
        bigquery.predictions_table(section, job.campaign),
        location,
        section.bigquery_predictions_days,
        today().start,
    )
    frame = tables.read(spark, root, "predictions")
    job.facts.update(predictions.export_predictions(root, frame, job.campaign, day, scores, bigquery))
    table = bigquery.audience_table(section, job.campaign, version)
    handover = export.Handover(
        root, section.target_uri, job.campaign, version, day, job.run_id, table, location
    )
    facts = export.export_audience(
        handover,
        tables.read(spark, root, "audience"),
        tables.read(spark, root, "assignments"),
        tables.read(spark, root, "consents"),
        tables.read(spark, root, "users"),
        job.config.selection,
        section,
        bigquery,
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
        run(session.start(job.config.spark, f"export_audience {dates}"), job)


if __name__ == "__main__":
    app()
