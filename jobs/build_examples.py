"""events, sends, conversions -> training_examples of a range of as_of dates.

With --campaign A,B: all users of one as_of date, with these targets -> scoring_examples and histories.
Safe to rerun.
"""

from pyspark.sql import SparkSession

from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import session, tables
from couponflow.sequences import datasets, examples, labels
from couponflow.training import manifests

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Build training rows of a range or, with campaigns, scoring rows of one day."""
    with examples.cached_inputs(spark, job.config, job.dates, job.run_id) as inputs:
        job.facts.update(examples.check_vocabulary(inputs, job.config))
        build = _build_scoring if job.campaign else _build_training
        build(spark, inputs, job)


def _build_scoring(spark: SparkSession, inputs: examples.Inputs, job: Run) -> None:
    campaigns = examples.parse_campaigns(job.campaign)
    with examples.cached(examples.build_scoring(inputs, campaigns, job.run_date, job.config)) as rows:
        for table in ("scoring_examples", "histories"):
            job.rows[table] = tables.overwrite(rows, job.root_uri, table, job.dates, job.run_id)


def _build_training(spark: SparkSession, inputs: examples.Inputs, job: Run) -> None:
    root, table = job.root_uri, "training_examples"
    until = labels.watermark(spark, root, job.config.lake.time_zone)
    with examples.cached(labels.read_labelled(spark, job.config, job.dates, until)) as labelled:
        built = examples.build_training(inputs, labelled, job.config, until)
        size = built.max_rows_per_file
        written = tables.overwrite(built.frame, root, table, job.dates, job.run_id, size)
    job.rows.update({table: built.checked(written), "population": built.population})
    found = datasets.describe(spark, job.config, inputs.vocabulary, inputs.vocabulary_version)
    uri = manifests.write(root, manifests.Dataset(**found), job.run_id)
    job.facts.update({**built.facts, "dataset": uri, "folds": found["folds"]})


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
        run(session.start(job.config.spark, f"build_examples {dates}"), job)


if __name__ == "__main__":
    app()
