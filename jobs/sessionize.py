"""events -> session_segments, sessions, for a range of event dates. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import session, tables
from couponflow.sequences import events, sessions

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Replace the segments of the range, then every session that they can change."""
    gap_minutes = job.config.sessions.gap_minutes
    segments = sessions.build_segments(events.read_events(spark, job.root_uri, job.dates), gap_minutes)
    job.rows["session_segments"] = tables.overwrite(
        segments.repartition("event_date"), job.root_uri, "session_segments", job.dates, job.run_id
    )
    stitched = sessions.build_sessions(spark, job.root_uri, job.dates, gap_minutes)
    affected = sessions.affected_dates(job.dates)
    job.rows["sessions"] = tables.overwrite(stitched, job.root_uri, "sessions", affected, job.run_id)


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Add sessions to events."""
    with open_run("sessionize", config, overrides, dates, log_json=log_json) as job:
        run(session.start(job.config.spark, f"sessionize {dates}"), job)


if __name__ == "__main__":
    app()
