"""raw events -> events, quarantine, identity_links, user_days, for a range of ingest dates. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import erased, session, tables
from couponflow.sequences import events, feeds, identity, robots

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Replace the events of the ingest dates, then the user days that they touch."""
    lake, settings, root_uri = job.config.lake, job.config.events, job.root_uri
    key = feeds.load_key(settings)
    delivery = feeds.find_delivery(root_uri, "events", job.dates, lake.closed_days, job.config.feeds.events)
    job.facts.update(feeds.delivery_facts(delivery, key))
    raw = feeds.read_raw(spark, delivery, key, erased.load(root_uri))
    cleaned = events.clean(raw, settings, lake.time_zone, lake.lateness_days)
    counts = feeds.publish(
        cleaned, root_uri, job.dates, job.run_id, lambda rows: {"identity_links": identity.new_links(rows)}
    )
    job.rows.update(counts)
    touched = events.touched_dates(job.dates, lake.lateness_days)
    first = events.read_first_deliveries(spark, root_uri, touched)
    days = robots.build_user_days(first, lake.time_zone, settings, robots.staff_ids(settings, key))
    job.rows["user_days"] = tables.overwrite(days, root_uri, "user_days", touched, job.run_id)
    job.facts["exclusions"] = robots.summary(spark, root_uri, touched)
    job.facts["shared_visitors"] = (
        identity.shared_visitors(spark, root_uri, job.dates) if counts["identity_links"] else 0
    )


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Validate and de-duplicate delivered events."""
    with open_run("clean_events", config, overrides, dates, log_json=log_json) as job:
        run(session.start(job.config.spark, f"clean_events {dates}"), job)


if __name__ == "__main__":
    app()
