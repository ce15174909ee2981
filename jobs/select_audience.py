"""predictions, consents, ledger -> assignments, audience, for one run date and campaign. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.campaign import candidates, contact_rules, export, ledger, reach, selection
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import tables

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Decide about every user of the master, write the ledger, then the audience."""
    root, day, section = job.root_uri, job.run_date, job.config.selection
    found = candidates.read(spark, job.config, job.campaign, day)
    decision = found.decision
    allocated = selection.allocate(found.users, job.campaign, section)
    decided = selection.with_decision(found.users, job.campaign, section, allocated).persist()
    try:
        job.facts.update(selection.summarise(decided, decision, found.snapshot, allocated))
        job.facts["reach"] = reach.summarise(decided, section)
        target = job.config.export.target_uri
        handover = export.Handover(root, target, job.campaign, decision.version, day, job.run_id)
        is_final = export.is_final(handover)
        job.rows.update(ledger.publish(decided, root, decision, job.run_id, is_final))
        mails = candidates.mails(spark, job.config, job.campaign, day)  # with what others have decided
        contact_rules.check_cap(decided, mails, job.campaign, section)
    finally:
        decided.unpersist()


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
        run(tables.spark_session(job.config.spark, f"select_audience {dates}"), job)


if __name__ == "__main__":
    app()
