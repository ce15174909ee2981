"""Whom a campaign may choose from on a day: the user master with scores and reasons against mailing.

The one place where a selection and a plan of it read their tables and decide.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from couponflow.campaign import contact_rules, eligibility, reach, selection
from couponflow.config import Config, fingerprint_of
from couponflow.dates import DateRange
from couponflow.lake import tables


@dataclass(frozen=True)
class Candidates:
    """``users`` as ``eligibility.with_reason`` gives them, in the groups of ``reach``, what is to be decided,
    and by which consent.
    """

    users: DataFrame
    decision: selection.Decision
    snapshot: eligibility.Snapshot


def read(spark: SparkSession, config: Config, campaign_id: str, day: date) -> Candidates:
    """Every user of the day's master with his score and, if any, the first reason against mailing him.

    Raises:
        ConfigError: nothing is sent on that day, or the key of the staff's pseudonyms is missing.
        DataError: predictions, master, consent or orders are missing, stale or too small, or nobody has an
            attribute whose reach is asked for.
    """
    root, section = config.lake.root_uri, config.selection
    contact_rules.check_quiet_day(day, section.quiet_days)
    scores = tables.read(spark, root, "predictions", DateRange.day(day))
    predictions, model_version = eligibility.one_prediction_per_user(
        scores, campaign_id, day, section.targets(campaign_id)
    )
    decision = selection.Decision.of(campaign_id, day, model_version, section, _rules(config))
    snapshots = tables.read(spark, root, "users")
    users = eligibility.user_master(snapshots, day)
    reach.check_attributes(users, section)
    staff = eligibility.staff_users(snapshots, day, section, eligibility.staff_ids(config.events))
    consent, snapshot = eligibility.consent_status(tables.read(spark, root, "consents"), users, day, section)
    orders = tables.read_or_empty(spark, root, "orders")
    buyers = contact_rules.recent_buyers(orders, day, config.lake.time_zone, section)
    around = mails(spark, config, campaign_id, day)
    reasoned = eligibility.with_reason(users, staff, consent, around, buyers, predictions, section)
    return Candidates(reach.with_groups(reasoned, section), decision, snapshot)


def _rules(config: Config) -> str:
    """Fingerprint of what decides. What is only told of the choice makes no other version of it."""
    tree = config.model_dump(mode="json")
    del tree["selection"]["reach_attributes"]
    return fingerprint_of(tree, "selection", "events.staff_user_ids")


@contextmanager
def decided(found: Candidates) -> Iterator[tuple[DataFrame, dict[str, Any]]]:
    """Choice and arm of every candidate, kept for the block, and the facts of the selection.

    Raises:
        ConfigError: the rules do not fit the candidates.
        DataError: a segment cannot get its minimum, or the counts do not add up.
    """
    decision = found.decision
    campaign_id, section = decision.campaign_id, decision.section
    allocated = selection.allocate(found.users, campaign_id, section)
    rows = selection.with_decision(found.users, campaign_id, section, allocated).persist()
    try:
        yield rows, selection.summarise(rows, decision, found.snapshot, allocated)
    finally:
        rows.unpersist()


def mails(spark: SparkSession, config: Config, campaign_id: str, day: date) -> DataFrame:
    """The mails around the day, as the ledger knows them now; see ``contact_rules.mails_around``."""
    root = config.lake.root_uri
    ledger = tables.read_or_empty(spark, root, "assignments")
    sends = tables.read(spark, root, "sends")
    return contact_rules.mails_around(sends, ledger, campaign_id, day, config.selection)
