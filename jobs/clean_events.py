"""raw events -> events, quarantine, user_days, for a range of ingest dates. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import tables
from couponflow.sequences import events, feeds

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Replace the events of the ingest dates, then the user days that they touch."""
    lake, settings = job.config.lake, job.config.events
    key = feeds.load_key(settings)
    delivery = feeds.find_delivery(job.root_uri, "events", job.dates, lake.closed_days)
    job.facts.update(feeds.delivery_facts(delivery, key))
    raw = feeds.read_raw(spark, delivery, key)
    cleaned = events.clean(raw, settings, lake.time_zone, lake.lateness_days)
    job.rows.update(feeds.publish(cleaned, job.root_uri, job.dates, job.run_id))
    touched = events.touched_dates(job.dates, lake.lateness_days)
    first = events.read_first_deliveries(spark, job.root_uri, touched)
    days = events.build_user_days(first, lake.time_zone)
    job.rows["user_days"] = tables.overwrite(days, job.root_uri, "user_days", touched, job.run_id)


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Validate and de-duplicate delivered events."""
    with open_run("clean_events", config, overrides, dates, log_json=log_json) as job:
        run(tables.spark_session(job.config.spark, f"clean_events {dates}"), job)


if __name__ == "__main__":
    app()
