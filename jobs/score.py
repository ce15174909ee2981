"""scoring_examples, model bundle -> predictions, for one run date and campaign. Safe to rerun."""

import tempfile
from pathlib import Path

from pyspark.sql import SparkSession

from couponflow.campaign import eligibility, scoring
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Model, Overrides, Run, job_app, open_run
from couponflow.lake import tables
from couponflow.training import registry

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Score every user of the master, check the scores, replace those of the day and campaign."""
    section, day = job.config.scoring, job.run_date
    examples = tables.read(spark, job.root_uri, "scoring_examples", job.dates)
    users = eligibility.user_master(tables.read(spark, job.root_uri, "users"), day)
    version = registry.resolve(job.root_uri, job.model or section.model)
    with tempfile.TemporaryDirectory() as folder:
        bundle = registry.fetch(job.root_uri, version, Path(folder))
        with scoring.scored(examples, users, bundle, job.campaign, day, section) as (predictions, facts):
            job.facts.update(facts)
            job.rows["predictions"] = tables.overwrite(
                predictions, job.root_uri, "predictions", job.dates, job.run_id, campaign_id=job.campaign
            )


@app.command()
def main(
    config: ConfigPath,
    dates: Dates,
    campaign: Campaign,
    model: Model = "",
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Score all users for a campaign."""
    with open_run("score", config, overrides, dates, campaign, model, log_json=log_json) as job:
        run(tables.spark_session(job.config.spark, f"score {dates}"), job)


if __name__ == "__main__":
    app()
