"""predictions, consents, ledger -> assignments, audience, for one run date and campaign. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.campaign import eligibility, export, selection
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import tables

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Decide about every user of the master, write the ledger, then the audience."""
    root, day, section = job.root_uri, job.run_date, job.config.selection
    scores = tables.read(spark, root, "predictions", job.dates)
    predictions, model_version = eligibility.one_prediction_per_user(scores, job.campaign, day)
    rules = job.config.fingerprint("selection")
    decision = selection.Decision.of(job.campaign, day, model_version, section, rules)
    users = eligibility.user_master(tables.read(spark, root, "users"), day)
    consent, snapshot = eligibility.consent_status(tables.read(spark, root, "consents"), users, day, section)
    sends = tables.read(spark, root, "sends")
    ledger = tables.read_or_empty(spark, root, "assignments")
    zone = job.config.lake.time_zone
    mails = eligibility.mails_in_window(sends, ledger, job.campaign, day, zone, section.cap_days)
    reasoned = eligibility.with_reason(users, consent, mails, predictions, section.max_sends)
    allocated = selection.allocate(reasoned, job.campaign, section)
    decided = selection.with_decision(reasoned, job.campaign, section, allocated).persist()
    try:
        job.facts.update(selection.summarise(decided, decision, snapshot, allocated))
        target = job.config.export.target_uri
        handover = export.Handover(root, target, job.campaign, decision.version, day, job.run_id)
        is_final = export.is_final(handover)
        job.rows.update(selection.publish(decided, root, decision, job.run_id, is_final))
        ledger = tables.read(spark, root, "assignments")
        mails = eligibility.mails_in_window(sends, ledger, job.campaign, day, zone, section.cap_days)
        eligibility.check_cap(decided, mails, job.campaign, section.max_sends)
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
