"""sends, orders or redemptions, campaigns -> conversions, for a range of send dates. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import session, tables
from couponflow.sequences import conversions

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Replace the conversions of the sends of the range."""
    settings, time_zone = job.config.conversions, job.config.lake.time_zone
    sends = conversions.read_sends(spark, job.root_uri, job.dates)
    campaigns = tables.read(spark, job.root_uri, "campaigns")
    conversions.check_campaigns(sends, campaigns)
    proofs = conversions.read_proofs(spark, job.root_uri, sends, campaigns, settings, time_zone)
    found = conversions.attribute(sends, proofs, campaigns, settings, time_zone)
    job.rows["conversions"] = tables.overwrite(found, job.root_uri, "conversions", job.dates, job.run_id)


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Find the sends that converted in their window."""
    with open_run("attribute_conversions", config, overrides, dates, log_json=log_json) as job:
        run(session.start(job.config.spark, f"attribute_conversions {dates}"), job)


if __name__ == "__main__":
    app()
