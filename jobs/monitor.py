"""All tables -> verdicts on freshness and row counts, for a range of run dates. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import runs, session, tables
from couponflow.monitoring import kpis

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Count, compare with what was due and what was recorded, replace the verdicts of the dates."""
    counts = kpis.count_rows(spark, job.root_uri, job.dates)
    recorded = kpis.recorded_rows(runs.load_all(job.root_uri))
    closed, max_age = job.config.lake.closed_days, job.config.monitoring.max_age_days
    verdicts = kpis.check_tables(counts, recorded, job.dates, closed, max_age)
    job.facts.update(kpis.facts(verdicts))
    rows = kpis.verdict_rows(spark, verdicts)
    job.rows["verdicts"] = tables.overwrite(rows, job.root_uri, "verdicts", job.dates, job.run_id)


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Check that tables are fresh and complete."""
    with open_run("monitor", config, overrides, dates, log_json=log_json) as job:
        run(session.start(job.config.spark, f"monitor {dates}"), job)


if __name__ == "__main__":
    app()
