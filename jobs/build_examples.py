"""events, sends, conversions -> training_examples of a range of as_of dates.

With --campaign: all users of one as_of date -> scoring_examples and histories. Safe to rerun.
"""

from pyspark.sql import SparkSession

from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.errors import ConfigError
from couponflow.lake import tables
from couponflow.sequences import examples

app = job_app(__doc__)


def run(spark: SparkSession, job: Run) -> None:
    """Build training rows of a range or, with a campaign, scoring rows of one day."""
    if job.campaign and len(job.dates) != 1:
        raise ConfigError(f"--campaign scores one day, not {job.dates}; give --dates D")
    inputs = examples.read_inputs(spark, job.config, job.dates.last)
    job.facts["vocabulary_version"] = inputs.vocabulary_version
    inputs.events.persist()
    try:
        if job.campaign:
            rows = examples.build_scoring(inputs, job.campaign, job.dates.start, job.config).persist()
            for table in ("scoring_examples", "histories"):
                job.rows[table] = tables.overwrite(rows, job.root_uri, table, job.dates, job.run_id)
            rows.unpersist()
        else:
            complete_until = examples.watermark(spark, job.root_uri, job.config.lake.time_zone)
            rows = examples.read_labelled(spark, job.config, job.dates, complete_until).persist()
            built = examples.build_training(inputs, rows, job.config, complete_until)
            table, size = "training_examples", built.max_rows_per_file
            written = tables.overwrite(built.frame, job.root_uri, table, job.dates, job.run_id, size)
            assert written == sum(built.splits.values()), f"{written} rows written of {built.splits}"
            job.rows.update({table: written, "population": built.population})
            job.facts.update(built.facts)
            rows.unpersist()
        job.facts["oov_share"] = examples.oov_shares(inputs.events)
    finally:
        inputs.events.unpersist()


@app.command()
def main(
    config: ConfigPath,
    dates: Dates,
    campaign: Campaign = "",
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Build examples for training, or for scoring one campaign."""
    with open_run("build_examples", config, overrides, dates, campaign, log_json=log_json) as job:
        run(tables.spark_session(job.config.spark, f"build_examples {dates}"), job)


if __name__ == "__main__":
    app()
