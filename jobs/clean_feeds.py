"""raw feeds other than events -> their tables and quarantine, for a range of ingest dates. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import erased, session, tables
from couponflow.sequences import feeds

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Check every feed before the first write, then replace the ingest dates of each table."""
    key = feeds.load_key(job.config.events)
    config, do_not_ingest = job.config, erased.load(job.root_uri)
    deliveries = feeds.find_other_deliveries(job.root_uri, job.dates, config.lake.closed_days, config.feeds)
    for delivery in deliveries:
        job.facts[delivery.feed] = feeds.delivery_facts(delivery, key)
        raw = feeds.read_raw(spark, delivery, key, do_not_ingest)
        cleaned = feeds.clean_feed(raw, delivery.feed, config.lake.time_zone)
        counts = feeds.publish(cleaned, job.root_uri, job.dates, job.run_id)
        job.rows.update(feeds.with_feed_name(counts, delivery.feed))


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Validate and de-duplicate every feed but events."""
    with open_run("clean_feeds", config, overrides, dates, log_json=log_json) as job:
        run(session.start(job.config.spark, f"clean_feeds {dates}"), job)


if __name__ == "__main__":
    app()
