"""predictions, consents, ledger -> assignments, audience, for one run date and campaign. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.campaign import candidates, contact_rules, export, ledger, reach
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import session, tables

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Decide about every user of the master, write the ledger, then the audience."""
    root, day, section = job.root_uri, job.run_date, job.config.selection
    found = candidates.read(spark, job.config, job.campaign, day)
    with candidates.decided(found) as (rows, facts):
        job.facts.update(facts | {"reach": reach.summarise(rows, section)})
        target, decision = job.config.export.target_uri, found.decision
        handover = export.Handover(root, target, job.campaign, decision.version, day, job.run_id)
        job.rows.update(ledger.publish(rows, root, decision, job.run_id, export.is_final(handover)))
        mails = candidates.mails(spark, job.config, job.campaign, day)  # with what others have decided
        contact_rules.check_cap(rows, mails, job.campaign, section)


@app.command()
def main(
    config: ConfigPath,
    dates: Dates,
    campaign: Campaign,
    overrides: Overrides = None,
    log_json: LogJson = False,
) -> None:
    """Choose who gets the coupon of a campaign."""
    with open_run("select_audience", config, overrides, dates, campaign, log_json=log_json) as job:
        run(session.start(job.config.spark, f"select_audience {dates}"), job)


if __name__ == "__main__":
    app()
