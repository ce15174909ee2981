"""Who may be mailed at all: no staff, consent, suppression, caps and gaps. Fails closed everywhere.

Every user of the master gets either no reason (eligible) or exactly one from ``REASONS``, the first that
applies. What is unknown counts against mailing: no consent record, an unknown state or reason, no usable
score.
"""

from dataclasses import dataclass
from datetime import date

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from couponflow.campaigning import SelectionConfig
from couponflow.errors import DataError
from couponflow.sections import EventsConfig
from couponflow.sequences import feeds, robots

#: Suppressions that the consent source names; any other refusal is ``consent_denied``.
SUPPRESSIONS = ("unsubscribe", "bounce", "complaint", "legal")
#: Reason -> label for people, in the order in which they are tried.
REASONS: dict[str, str] = {
    "staff": "Staff or test account",
    "no_consent_record": "No consent record",
    "unsubscribe": "Unsubscribed",
    "bounce": "Address bounced",
    "complaint": "Complained",
    "legal": "Legal block",
    "consent_denied": "Consent denied",
    "frequency_cap": "Mailed often enough already",
    "recent_mail": "Mailed too recently",
    "recent_purchase": "Bought too recently",
    "no_prediction": "No usable score",
}
#: What is known of a user from his prediction.
_PREDICTED = ("conversion_probability", "score", "is_cold_start")
#: Snapshots before the newest one whose largest it is measured against: one broken delivery that nobody has
#: looked into is no measure for the next.
_NUM_EARLIER = 7


@dataclass(frozen=True)
class Snapshot:
    """The consent snapshot of a run: its day, where it comes from, and the users it covers."""

    snapshot_date: date
    source: str
    num_users: int


def staff_ids(config: EventsConfig) -> tuple[str, ...]:
    """The config's staff and test accounts as the tables know them.

    Raises:
        ConfigError: there are some, and the key of their pseudonyms is not set.
    """
    return robots.staff_ids(config, feeds.load_key(config)) if config.staff_user_ids else ()


def user_master(users: DataFrame, run_date: date) -> DataFrame:
    """Users of the newest snapshot at or before the run date with their ``attributes``, one row each.

    Raises:
        DataError: there is no such snapshot.
    """
    return _newest_master(users, run_date).select("user_id", "attributes").dropDuplicates(["user_id"])


def staff_users(
    users: DataFrame, run_date: date, section: SelectionConfig, staff: tuple[str, ...]
) -> DataFrame:
    """Those of the master that are staff or test accounts; one row per ``user_id``.

    They are in ``staff``, or have an attribute of ``staff_attributes`` (its value in any case).

    Raises:
        DataError: there is no master, or nobody in it has an attribute that marks staff.
    """
    master = _newest_master(users, run_date)
    marks = [mark.split("=") for mark in section.staff_attributes]
    _check_attributes(master, sorted({key for key, _ in marks}))
    is_staff = F.col("user_id").isin(*staff) if staff else F.lit(False)
    for key, value in marks:
        told = F.lower(F.trim(F.col("attributes").getItem(key)))
        is_staff |= F.coalesce(told == value.strip().lower(), F.lit(False))
    return master.where(is_staff).select("user_id").distinct()


def _newest_master(users: DataFrame, run_date: date) -> DataFrame:
    known = users.where(F.col("snapshot_date") <= F.lit(run_date))
    newest = known.agg(F.max("snapshot_date")).collect()[0][0]
    if newest is None:
        raise DataError(f"table users has no snapshot up to {run_date}; run clean_feeds for that day first")
    return known.where(F.col("snapshot_date") == F.lit(newest))


def _check_attributes(master: DataFrame, keys: list[str]) -> None:
    """Refuse a master in which nobody has an attribute that marks staff: its source has changed."""
    if not keys:
        return
    found = master.agg(*[F.count(F.col("attributes").getItem(key)).alias(key) for key in keys]).collect()[0]
    for key in keys:
        if not found[key]:
            raise DataError(
                f"table users: nobody in the newest snapshot has the attribute {key}, by which "
                "selection.staff_attributes finds staff and test accounts; check the delivery or the name"
            )


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
        DataError: no snapshot, one that is too old, empty for the channel and purpose, covering too few of
            ``users``, or with suddenly fewer users than before. Then there is no list.
    """
    where = f"table consents, run date {run_date}"
    known = consents.where(F.col("snapshot_date") <= F.lit(run_date))
    days = sorted(row[0] for row in known.select("snapshot_date").distinct().collect())
    if not days:
        raise DataError(
            f"{where}: no snapshot; deliver the consent feed and run clean_feeds, no list without it"
        )
    newest = days[-1]
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
    if len(days) > 1:
        _check_drop(known, days[-1 - _NUM_EARLIER :], section, where)
    status = by_user.select("user_id", reason.alias("consent_reason"))
    return status, Snapshot(newest, str(covered.source), int(covered.num_covered))


def _check_drop(known: DataFrame, days: list[date], section: SelectionConfig, where: str) -> None:
    """Refuse the last of these snapshots if it has suddenly fewer users for the channel and purpose.

    Raises:
        DataError: more than ``consent_max_drop_share`` of the largest one's number are gone.
    """
    sizes = (
        known.where(
            F.col("snapshot_date").isin(days)
            & (F.col("channel") == section.consent_channel)
            & (F.col("purpose") == section.consent_purpose)
        )
        .groupBy("snapshot_date")
        .agg(F.countDistinct("user_id").alias("num_users"))
    )
    by_day = {row.snapshot_date: int(row.num_users) for row in sizes.collect()}
    newest, largest = days[-1], max(by_day, key=lambda day: (by_day[day], day))
    num_gone = by_day[largest] - by_day[newest]
    if num_gone > section.consent_max_drop_share * by_day[largest] + 1e-9:
        raise DataError(
            f"{where}: snapshot {newest} has {by_day[newest]} users for {section.consent_channel}/"
            f"{section.consent_purpose}, {num_gone} fewer than that of {largest}; a share of "
            f"{section.consent_max_drop_share} may be gone at once. Check the delivery; if it is right, run "
            "once with a higher selection.consent_max_drop_share"
        )


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


def with_reason(
    users: DataFrame,
    staff: DataFrame,
    consent: DataFrame,
    mails: DataFrame,
    buyers: DataFrame,
    predictions: DataFrame,
    section: SelectionConfig,
) -> DataFrame:
    """Join what is known about each user and name why he may not be mailed.

    Grain: one row per ``user_id`` of ``users``; every one of them, and no other.
    Adds: ``conversion_probability`` (null without a usable prediction), the raw ``score`` and
    ``is_cold_start`` beside it, ``reason`` (null = eligible). Other columns of ``users`` and
    ``predictions`` stay, for conditions on segments and groups of reach.
    Inputs: ``users`` of ``user_master``, ``staff`` of ``staff_users``, ``consent`` of ``consent_status``,
    ``mails`` and ``buyers`` of ``contact_rules``, ``predictions`` with one row per user.
    """
    probability = F.col("conversion_probability")
    scored = [name for name in predictions.columns if name not in users.columns]
    is_usable = probability.isNotNull() & ~F.isnan(probability) & probability.between(0.0, 1.0)
    joined = (
        users.join(staff.select("user_id", F.lit(True).alias("is_staff")), "user_id", "left")
        .join(consent.withColumn("has_record", F.lit(True)), "user_id", "left")
        .join(mails, "user_id", "left")
        .join(buyers.select("user_id", F.lit(True).alias("has_bought")), "user_id", "left")
        .join(predictions.select("user_id", *scored), "user_id", "left")
        .withColumn("conversion_probability", F.when(is_usable, probability))
    )
    tests = {"staff": F.col("is_staff"), "no_consent_record": F.col("has_record").isNull()}
    tests |= {name: F.col("consent_reason") == name for name in (*SUPPRESSIONS, "consent_denied")}
    tests |= {
        "frequency_cap": F.coalesce(F.col("num_mails"), F.lit(0)) >= section.max_sends,
        "recent_mail": F.col("days_to_mail") < section.min_days_since_mail,
        "recent_purchase": F.col("has_bought"),
        "no_prediction": F.col("conversion_probability").isNull(),
    }
    kept = [*users.columns, *scored]
    return joined.select(*kept, _first_of(tests).alias("reason"))


def one_prediction_per_user(
    predictions: DataFrame, campaign_id: str, run_date: date, targets: tuple[str, ...] = ()
) -> tuple[DataFrame, str]:
    """The predictions of a campaign on a day with the one model version that made them.

    Grain: one row per scored ``user_id`` with ``conversion_probability`` and ``score`` for the campaign's own
        target, and ``target_probabilities``, a map of it and the other ``targets``.

    Raises:
        DataError: none, more than one model version, or a user with two scores for a target or without one.
    """
    of_campaign = predictions.where(
        (F.col("campaign_id") == campaign_id) & (F.col("run_date") == F.lit(run_date))
    )
    found = of_campaign.where(F.col("target_id") == campaign_id)
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
    own = found.select("user_id", *_PREDICTED)
    if set(targets) - {campaign_id}:
        rows_of = of_campaign.where(F.col("target_id").isin(*targets))
        own = own.join(_by_target(rows_of, targets, rows[0], where), "user_id", "left")
    else:
        only = F.create_map(F.lit(campaign_id), F.col("conversion_probability"))
        own = own.withColumn("target_probabilities", only)
    return own, str(rows[0].model_version)


def _by_target(rows: DataFrame, targets: tuple[str, ...], own: Row, where: str) -> DataFrame:
    """``target_probabilities`` of each user.

    Raises:
        DataError: a target has other users, or another model, than the campaign's own.
    """
    counted = rows.groupBy("target_id").agg(
        F.count(F.lit(1)).alias("num_rows"),
        F.countDistinct("user_id").alias("num_users"),
        F.min("model_version").alias("first"),
        F.max("model_version").alias("last"),
    )
    known = {str(row.target_id): row for row in counted.collect()}
    for target in targets:
        row = known.get(target)
        sizes = (0, 0) if row is None else (row.num_rows, row.num_users)
        if (
            row is None
            or sizes != (own.num_rows, own.num_users)
            or {row.first, row.last} != {own.model_version}
        ):
            raise DataError(
                f"{where}: target {target} of selection.coupons has {sizes[0]} rows, {own.num_rows} of model "
                f"{own.model_version} are needed; run build_examples --campaign with this target, then score"
            )
    pairs = F.collect_list(F.struct("target_id", "conversion_probability"))
    return rows.groupBy("user_id").agg(F.map_from_entries(pairs).alias("target_probabilities"))


def _first_of(tests: dict[str, Column]) -> Column:
    """Name of the first test that holds; a test that is null does not hold."""
    column = F.lit(None).cast("string")
    for name, test in reversed(tests.items()):
        column = F.when(test, F.lit(name)).otherwise(column)
    return column
