"""scoring_examples, model bundle -> predictions, for one run date and campaign. Safe to rerun."""

import tempfile
from pathlib import Path

from pyspark.sql import SparkSession

from couponflow.campaign import eligibility, publication
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Model, Overrides, Run, job_app, open_run
from couponflow.lake import session, tables
from couponflow.training import registry

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Score every user of the master, check the scores, replace those of the day and campaign."""
    root, section, day = job.root_uri, job.config.scoring, job.run_date
    state = tables.version(spark, root, "scoring_examples")
    examples = tables.read(spark, root, "scoring_examples", job.dates)
    users = eligibility.user_master(tables.read(spark, root, "users"), day)
    version = registry.resolve(root, job.model or section.model)
    targets = job.config.selection.targets(job.campaign)
    request = publication.Request(root, job.campaign, day, str(state), section, targets)
    known = tables.read_or_empty(spark, root, "predictions")
    before = publication.last_predictions(known, job.campaign, day)
    with tempfile.TemporaryDirectory() as folder:
        bundle = registry.fetch(root, version, Path(folder))
        with publication.scored(request, examples, users, before, bundle) as (predictions, facts):
            job.facts.update(facts)
            job.rows["predictions"] = tables.overwrite(
                predictions, root, "predictions", job.dates, job.run_id, campaign_id=job.campaign
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
        run(session.start(job.config.spark, f"score {dates}"), job)


if __name__ == "__main__":
    app()
