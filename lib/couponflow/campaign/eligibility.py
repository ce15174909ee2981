"""Who may be mailed at all: consent, suppression, frequency cap. Fails closed everywhere.

Every user of the master gets either no reason (eligible) or exactly one from ``REASONS``, the first that
applies. What is unknown counts against mailing: no consent record, an unknown state or reason, no usable
score.
"""

from dataclasses import dataclass
from datetime import date, timedelta

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.dates import day_start
from couponflow.errors import ConflictError, DataError
from couponflow.sections import SelectionConfig

#: Suppressions that the consent source names; any other refusal is ``consent_denied``.
SUPPRESSIONS = ("unsubscribe", "bounce", "complaint", "legal")
#: Reason -> label for people, in the order in which they are tried.
REASONS: dict[str, str] = {
    "no_consent_record": "No consent record",
    "unsubscribe": "Unsubscribed",
    "bounce": "Address bounced",
    "complaint": "Complained",
    "legal": "Legal block",
    "consent_denied": "Consent denied",
    "frequency_cap": "Mailed often enough already",
    "no_prediction": "No usable score",
}


@dataclass(frozen=True)
class Snapshot:
    """The consent snapshot of a run: its day, where it comes from, and the users it covers."""

    snapshot_date: date
    source: str
    num_users: int


def user_master(users: DataFrame, run_date: date) -> DataFrame:
    """Users of the newest snapshot at or before the run date with their ``attributes``, one row each.

    Raises:
        DataError: there is no such snapshot.
    """
    known = users.where(F.col("snapshot_date") <= F.lit(run_date))
    newest = known.agg(F.max("snapshot_date")).collect()[0][0]
    if newest is None:
        raise DataError(f"table users has no snapshot up to {run_date}; run clean_feeds for that day first")
    of_day = known.where(F.col("snapshot_date") == F.lit(newest))
    return of_day.dropDuplicates(["user_id"]).select("user_id", "attributes")


def consent_status(
    consents: DataFrame, users: DataFrame, run_date: date, section: SelectionConfig
) -> tuple[DataFrame, Snapshot]:
    """The consent of each user of the newest snapshot at or before the run date.

    Returns one row per ``user_id`` with ``consent_reason`` (null = may be mailed), and the snapshot.
    Rule: channel and purpose of the config; any suppression wins over a granted state, any row that is
    not granted wins over one that is. A reason says why not, so one of an unknown kind (under age, say) is a
    denial even beside a granted state.
    Age: days between snapshot and run date, 24 hours each, so a change of summer time stops nobody.

    Raises:
        DataError: no snapshot, one that is too old, empty for the channel and purpose, or covering too
            few of ``users``. Then there is no list.
    """
    where = f"table consents, run date {run_date}"
    known = consents.where(F.col("snapshot_date") <= F.lit(run_date))
    newest = known.agg(F.max("snapshot_date")).collect()[0][0]
    if newest is None:
        raise DataError(
            f"{where}: no snapshot; deliver the consent feed and run clean_feeds, no list without it"
        )
    age_hours = 24 * (run_date - newest).days
    if age_hours > section.consent_max_age_hours:
        raise DataError(
            f"{where}: newest snapshot {newest} is {age_hours} hours old, {section.consent_max_age_hours} "
            "allowed; deliver a fresh one, no list without it"
        )
    of_channel = known.where(
        (F.col("snapshot_date") == F.lit(newest))
        & (F.col("channel") == section.consent_channel)
        & (F.col("purpose") == section.consent_purpose)
    )
    told = F.coalesce(F.lower(F.trim("reason")), F.lit(""))
    named = [F.max(told == reason).alias(reason) for reason in SUPPRESSIONS]
    is_granted = F.col("state").eqNullSafe("granted") & told.isin("", *SUPPRESSIONS)
    by_user = of_channel.groupBy("user_id").agg(
        F.min(is_granted).alias("is_granted"),
        F.max("source").alias("source"),
        *named,
    )
    reason = _first_of(
        {name: F.col(name) for name in SUPPRESSIONS} | {"consent_denied": ~F.col("is_granted")}
    )
    covered = (
        by_user.join(users.select("user_id"), "user_id", "right")
        .agg(
            F.count(F.lit(1)).alias("num_users"),
            F.count("is_granted").alias("num_covered"),
            F.max("source").alias("source"),
        )
        .collect()[0]
    )
    if covered.num_covered == 0 or covered.num_covered < section.consent_min_share * covered.num_users:
        raise DataError(
            f"{where}: snapshot {newest} covers {covered.num_covered} of {covered.num_users} users for "
            f"{section.consent_channel}/{section.consent_purpose}, at least a share of "
            f"{section.consent_min_share} is needed; check the delivery, no list without it"
        )
    status = by_user.select("user_id", reason.alias("consent_reason"))
    return status, Snapshot(newest, str(covered.source), int(covered.num_covered))


def consent_at_export(
    consents: DataFrame, users: DataFrame, run_date: date, section: SelectionConfig
) -> DataFrame:
    """``consent_status`` of the run date, which a newer snapshot can only tighten.

    Days may pass between selection and hand-over. Where a snapshot after the run date is known by then, it
    has to grant as well: who has withdrawn meanwhile, or is not in it any more, is not mailed.

    Raises:
        DataError: either snapshot is missing, too old or too small.
    """
    status, _ = consent_status(consents, users, run_date, section)
    newest = consents.agg(F.max("snapshot_date")).collect()[0][0]
    if newest <= run_date:
        return status
    later, _ = consent_status(consents, users, newest, section)
    reason = F.coalesce("consent_reason", "later_reason").alias("consent_reason")
    return status.join(later.withColumnRenamed("consent_reason", "later_reason"), "user_id").select(
        "user_id", reason
    )


def mails_in_window(
    sends: DataFrame,
    assignments: DataFrame,
    campaign_id: str,
    run_date: date,
    time_zone: str,
    cap_days: int,
) -> DataFrame:
    """Marketing mails per user in the ``cap_days`` days before the run date, over all campaigns.

    Returns ``user_id``, ``num_mails``; users without any are absent.
    Rule: sends delivered in [start of run date - cap_days, start of run date), plus mailed users of the
    ledger whose send is not known yet: decided in the same days, or on the run date for another campaign
    (two campaigns prepared at once must not exceed the cap together). A decision of this campaign on the
    run date is what is being made now and does not count. A send answers a decision of its campaign that is
    not younger; an earlier wave of the campaign is another mail.
    """
    start = day_start(run_date - timedelta(days=cap_days), time_zone)
    as_of = day_start(run_date, time_zone)
    delivered = sends.where(
        (F.col("delivered_time") >= F.lit(start)) & (F.col("delivered_time") < F.lit(as_of))
    )
    decided = (
        assignments.where(
            (F.col("arm") == "treat")
            & (F.col("run_date") >= F.lit(run_date - timedelta(days=cap_days)))
            & (F.col("run_date") <= F.lit(run_date))
            & ~((F.col("campaign_id") == campaign_id) & (F.col("run_date") == F.lit(run_date)))
        )
        .select("user_id", "campaign_id", "run_date")
        .distinct()  # two versions of one decision are one mail
    )
    last = delivered.groupBy("user_id", "campaign_id").agg(F.max("send_date").alias("last_send_date"))
    unsent = decided.join(last, ["user_id", "campaign_id"], "left").where(
        F.col("last_send_date").isNull() | (F.col("last_send_date") < F.col("run_date"))
    )
    mails = delivered.select("user_id").unionByName(unsent.select("user_id"))
    return mails.groupBy("user_id").agg(F.count(F.lit(1)).alias("num_mails"))


def check_cap(decided: DataFrame, mails: DataFrame, campaign_id: str, max_sends: int) -> None:
    """Make sure that nobody who is to be mailed has reached the cap since the decision was prepared.

    Inputs: ``decided`` with ``user_id`` and ``arm``; ``mails`` of ``mails_in_window``, read from the ledger
    after the decision was written to it. Two campaigns prepared at the same time cannot see each other
    before, so the one that finds the other here has to decide again.

    Raises:
        ConflictError: another campaign has taken such a user meanwhile.
    """
    over = mails.where(F.col("num_mails") >= max_sends).join(
        decided.where(F.col("arm") == "treat"), "user_id"
    )
    num_over = over.count()
    if num_over:
        raise ConflictError(
            f"campaign {campaign_id}: another campaign was prepared at the same time and mails {num_over} of "
            "the same users beyond the frequency cap; run select_audience again"
        )


def with_reason(
    users: DataFrame, consent: DataFrame, mails: DataFrame, predictions: DataFrame, max_sends: int
) -> DataFrame:
    """Join what is known about each user and name why he may not be mailed.

    Grain: one row per ``user_id`` of ``users``; every one of them, and no other.
    Adds: ``conversion_probability`` (null without a usable prediction), the raw ``score`` beside it,
    ``reason`` (null = eligible). Other columns of ``users`` stay, for conditions on segments.
    Inputs: ``consent`` of ``consent_status``, ``mails`` of ``mails_in_window``, ``predictions`` with one
    row per user.
    """
    probability = F.col("conversion_probability")
    is_usable = probability.isNotNull() & ~F.isnan(probability) & probability.between(0.0, 1.0)
    joined = (
        users.join(consent.withColumn("has_record", F.lit(True)), "user_id", "left")
        .join(mails, "user_id", "left")
        .join(predictions.select("user_id", "conversion_probability", "score"), "user_id", "left")
        .withColumn("conversion_probability", F.when(is_usable, probability))
    )
    tests = {"no_consent_record": F.col("has_record").isNull()}
    tests |= {name: F.col("consent_reason") == name for name in (*SUPPRESSIONS, "consent_denied")}
    tests |= {
        "frequency_cap": F.coalesce(F.col("num_mails"), F.lit(0)) >= max_sends,
        "no_prediction": F.col("conversion_probability").isNull(),
    }
    kept = [*users.columns, "conversion_probability", "score"]
    return joined.select(*kept, _first_of(tests).alias("reason"))


def one_prediction_per_user(
    predictions: DataFrame, campaign_id: str, run_date: date
) -> tuple[DataFrame, str]:
    """The predictions of a campaign on a day with the one model version that made them.

    Raises:
        DataError: none, more than one model version, or a user with two scores for the campaign.
    """
    found = predictions.where(
        (F.col("campaign_id") == campaign_id)
        & (F.col("target_id") == campaign_id)
        & (F.col("run_date") == F.lit(run_date))
    )
    where = f"table predictions, campaign {campaign_id}, {run_date}"
    versions = found.groupBy("model_version").agg(
        F.count(F.lit(1)).alias("num_rows"), F.countDistinct("user_id").alias("num_users")
    )
    rows = sorted(versions.collect(), key=lambda row: str(row.model_version))
    if not rows:
        raise DataError(f"{where}: no rows; run score for that campaign and day first")
    if len(rows) > 1:
        names = ", ".join(str(row.model_version) for row in rows)
        raise DataError(
            f"{where}: rows of several models ({names}); run score again, it replaces all of them"
        )
    if rows[0].num_rows != rows[0].num_users:
        raise DataError(f"{where}: {rows[0].num_rows} rows for {rows[0].num_users} users; run score again")
    return found.select("user_id", "conversion_probability", "score"), str(rows[0].model_version)


def _first_of(tests: dict[str, Column]) -> Column:
    """Name of the first test that holds; a test that is null does not hold."""
    column = F.lit(None).cast("string")
    for name, test in reversed(tests.items()):
        column = F.when(test, F.lit(name)).otherwise(column)
    return column
