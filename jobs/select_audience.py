"""predictions, consents, ledger -> assignments, audience, for one run date and campaign. Safe to rerun."""

from pyspark.sql import SparkSession

from couponflow.campaign import contact_rules, eligibility, export, selection
from couponflow.entry import Campaign, ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import tables

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Decide about every user of the master, write the ledger, then the audience."""
    root, day, section = job.root_uri, job.run_date, job.config.selection
    contact_rules.check_quiet_day(day, section.quiet_days)
    scores = tables.read(spark, root, "predictions", job.dates)
    predictions, model_version = eligibility.one_prediction_per_user(scores, job.campaign, day)
    rules = job.config.fingerprint("selection", "events.staff_user_ids")
    decision = selection.Decision.of(job.campaign, day, model_version, section, rules)
    snapshots = tables.read(spark, root, "users")
    users = eligibility.user_master(snapshots, day)
    staff = eligibility.staff_users(snapshots, day, section, eligibility.staff_ids(job.config.events))
    consent, snapshot = eligibility.consent_status(tables.read(spark, root, "consents"), users, day, section)
    sends, orders = tables.read(spark, root, "sends"), tables.read_or_empty(spark, root, "orders")
    ledger = tables.read_or_empty(spark, root, "assignments")
    mails = contact_rules.mails_around(sends, ledger, job.campaign, day, section)
    buyers = contact_rules.recent_buyers(orders, day, job.config.lake.time_zone, section)
    reasoned = eligibility.with_reason(users, staff, consent, mails, buyers, predictions, section)
    decided = selection.with_decision(reasoned, job.campaign, section).persist()
    try:
        job.facts.update(selection.summarise(decided, decision, snapshot))
        target = job.config.export.target_uri
        handover = export.Handover(root, target, job.campaign, decision.version, day, job.run_id)
        is_final = export.is_final(handover)
        job.rows.update(selection.publish(decided, root, decision, job.run_id, is_final))
        ledger = tables.read(spark, root, "assignments")
        mails = contact_rules.mails_around(sends, ledger, job.campaign, day, section)
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
