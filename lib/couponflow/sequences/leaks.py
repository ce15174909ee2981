"""Leak audit: facts at or after a cut-off must not change a user's features, shown on the lake's own tables.

The rows of sampled users are taken from every table that features read, and the features are built three
times by the code that builds examples: from the rows as they are; from copies in which what happened or was
delivered at or after the cut-off is deleted, changed and added to; and from copies to which facts of before
were added. The first two must be the same bytes. The third must differ, or the audit would see nothing.

Not touched: the vocabulary, which names its own range, and the first delivery of the audited campaign, which
is the question and not its past. ``user_days`` are derived again from each copy of the events.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

import numpy as np
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.dates import MAX_DAYS, DateRange, day_start
from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts, literals, schemas, tables
from couponflow.sequences import conversions, events, examples, feeds, robots
from couponflow.sequences.planted import Question, facts_before, facts_from_then_on

log = logging.getLogger("couponflow")

#: Builds the features of a population (user_id, campaign_id, as_of, as_of_date) from the tables of a lake.
Builder = Callable[[SparkSession, Config, DataFrame], list[Row]]
Frames = dict[str, DataFrame]

#: Group of features -> its columns.
GROUPS = {"history": ("length", "history"), "wide": ("wide",), "target": ("target_size", "target")}
MAX_SAMPLE = 10_000
#: Days after the cut-off that the builder may read, as a training run over later days does.
REACH_DAYS = 91
_SAMPLED_TABLES = ("events", "sends", "redemptions", "orders", "users", "identity_links")
_WHOLE_TABLES = ("campaigns", "catalogue")
#: Ids of planted rows that are made unique per user.
_KEYS = {"event_id", "send_id", "redemption_id", "order_id", "visitor_id"}


@dataclass(frozen=True)
class _Knowledge:
    """When a row of a table may be used: its instants lie before ``as_of`` and its day before that day."""

    times: tuple[str, ...]
    day: str
    changed: Mapping[str, Any]  # what a changed row says instead; a Column, or a literal


@dataclass(frozen=True)
class Finding:
    """One group of features: rows compared, rows that facts of after and of before the cut-off changed."""

    group: str
    rows: int
    leaked: int
    moved: int
    first_user: str = ""
    features: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """ok; LEAK; or blind, when not even facts of before the cut-off changed anything."""
        if self.leaked:
            return "LEAK"
        return "ok" if self.moved else "blind"


def build_as_for_training(spark: SparkSession, config: Config, population: DataFrame) -> list[Row]:
    """Build features as ``build_examples`` does when its range ends long after the cut-off."""
    last = population.agg(F.max("as_of_date")).collect()[0][0] + timedelta(days=REACH_DAYS)
    length, time_zone = config.examples.history_length, config.lake.time_zone
    # By merge, a build would also store its state; all methods give the same bytes.
    inputs = replace(examples.read_inputs(spark, config, last), history_method="window")
    with examples.cached(inputs.events):
        return examples.build_features(inputs, population, length, time_zone).collect()


def audit(
    spark: SparkSession,
    config: Config,
    day: date,
    size: int,
    campaign_id: str = "",
    seed: int = 0,
    build: Builder = build_as_for_training,
) -> list[Finding]:
    """Audit the features of ``size`` users at the start of ``day`` for one campaign (default: ``run``'s).

    The sample is a function of the seed and the user master. Writes nothing.
    Cost: one pass over the tables for the rows of the sample; its features are built three times.

    Raises:
        ConfigError: the campaign is unknown, or the sample is not between 1 and ``MAX_SAMPLE`` users.
        DataError: a table is missing, or there is no user master up to that day.
    """
    if not 1 <= size <= MAX_SAMPLE:
        raise ConfigError(f"--sample {size}: expected 1 to {MAX_SAMPLE} users; correct the argument")
    question = _question(spark, config, day, campaign_id or config.run.campaign_id)
    population = _population(spark, config, question, size, seed).persist()
    log.info(
        "leak audit: reading the rows of %d users, campaign %s", population.count(), question.campaign_id
    )
    users = population.select("user_id")
    as_is = {name: frame.persist() for name, frame in _rows_of(spark, config, users).items()}
    log.info("leak audit: %d events of theirs, of any date", as_is["events"].count())
    copies = {
        "as they are": as_is,
        "changed from the cut-off on": _perturbed(as_is, users, question, seed),
        "changed before the cut-off": _added(as_is, users, facts_before(question)),
    }
    found = {}
    for name, frames in copies.items():
        found[name] = _features(spark, config, population, frames, build)
        log.info("leak audit: features of the rows %s: %d", name, len(found[name]))
    for frame in (population, *as_is.values()):
        frame.unpersist()
    return [_compare(group, *found.values()) for group in GROUPS]


def check(findings: list[Finding], day: date) -> None:
    """Refuse a leak, and an audit that could see none.

    Raises:
        DataError: naming the groups, the first user and the features.
    """
    for finding in findings:
        if finding.verdict == "LEAK":
            raise DataError(
                f"leak audit of {day}: {finding.group} of {finding.leaked} of {finding.rows} users changed "
                f"with facts at or after the cut-off, first {finding.first_user}"
                f"{', ' if finding.features else ''}{', '.join(finding.features[:5])}; "
                "test event time and delivery in what builds them"
            )
        if finding.verdict == "blind":
            raise DataError(
                f"leak audit of {day}: {finding.group} of {finding.rows} users did not change with facts of "
                "before the cut-off, so the audit proves nothing; check --as-of, and that events, campaigns "
                "and users reach back before it"
            )


def _question(spark: SparkSession, config: Config, day: date, campaign_id: str) -> Question:
    campaigns = tables.read(spark, config.lake.root_uri, "campaigns")
    first = conversions.first_deliveries(campaigns, "campaign_id").where(F.col("campaign_id") == campaign_id)
    row = first.select("coupons").first()
    if row is None:
        raise ConfigError(
            f"campaign {campaign_id!r} is not in table campaigns; check --campaign, or run clean_feeds"
        )
    categories = [coupon["category_id"] for coupon in row["coupons"] if coupon["category_id"]]
    items = [item for coupon in row["coupons"] for item in coupon["item_ids"] or ()]
    as_of = day_start(day, config.lake.time_zone)
    return Question(
        campaign_id, day, as_of, config.lake.time_zone, (categories or ["x"])[0], (items or ["x"])[0]
    )


def _population(spark: SparkSession, config: Config, question: Question, size: int, seed: int) -> DataFrame:
    masters = tables.read(spark, config.lake.root_uri, "users")
    known = masters.where(F.col("snapshot_date") <= F.lit(question.day))
    newest = known.agg(F.max("snapshot_date")).collect()[0][0]
    if newest is None:
        raise DataError(
            f"table users has no snapshot up to {question.day}; run clean_feeds for an earlier ingest date"
        )
    return (
        known.where(F.col("snapshot_date") == F.lit(newest))
        .orderBy(F.xxhash64("user_id", F.lit(seed)), "user_id")
        .limit(size)
        .select(
            "user_id",
            F.lit(question.campaign_id).alias("campaign_id"),
            F.lit(question.as_of).alias("as_of"),
            F.lit(question.day).alias("as_of_date"),
        )
    )


def _rows_of(spark: SparkSession, config: Config, users: DataFrame) -> Frames:
    """All rows of the sampled users, and of visitors who are linked to them at any time."""
    root_uri = config.lake.root_uri
    links = tables.read_or_empty(spark, root_uri, "identity_links").join(users, "user_id", "left_semi")
    visitors = links.select(F.concat(F.lit("visitor:"), F.col("visitor_id")).alias("user_id"))
    keys = F.broadcast(users.unionByName(visitors).distinct())
    found = {
        table: tables.read_or_empty(spark, root_uri, table).join(keys, "user_id", "left_semi")
        for table in _SAMPLED_TABLES
    }
    return found | {table: tables.read(spark, root_uri, table) for table in _WHOLE_TABLES}


def _knowledge(question: Question) -> dict[str, _Knowledge]:
    """Per table, when a row counts as known; every table that features read is here."""
    purchase = {
        "event_type": "purchase",
        "item_id": question.item_id,
        "category_id": question.category_id,
        "shop_id": "planted",
        "order_id": F.concat(F.lit("planted:"), F.col("event_id")),
        "price": 999.0,
        "coupon_amount": 9.0,
    }
    return {
        "events": _Knowledge(("event_time", "ingest_time"), "ingest_date", purchase),
        "sends": _Knowledge(("delivered_time",), "ingest_date", {"campaign_id": question.campaign_id}),
        "redemptions": _Knowledge(("redemption_time",), "ingest_date", {"campaign_id": question.campaign_id}),
        "orders": _Knowledge(
            ("order_time", "status_time"), "ingest_date", {"order_status": "returned", "total_amount": 999.0}
        ),
        "users": _Knowledge((), "snapshot_date", {"has_attributes": ~F.col("has_attributes")}),
        "identity_links": _Knowledge(("linked_time",), "ingest_date", {"user_id": "planted"}),
        "campaigns": _Knowledge(
            (),
            "ingest_date",
            {"end_date": F.date_sub("end_date", 400), "coupons": F.array().cast(schemas.COUPON_TYPE)},
        ),
        "catalogue": _Knowledge((), "snapshot_date", {"shop_id": "planted"}),
    }


def _perturbed(as_is: Frames, users: DataFrame, question: Question, seed: int) -> Frames:
    """Of the rows that may not be used, delete a third, change a third, and add others.

    Added are new facts of every kind at, after and filed after the cut-off, and known events, sends,
    redemptions and campaigns that are delivered once more with other contents: the first delivery counts.
    """
    result = {}
    for table, rule in _knowledge(question).items():
        frame = as_is[table]
        late = F.col(rule.day) >= F.lit(question.day)
        for time in rule.times:
            late = late | F.coalesce(F.col(time) >= F.lit(question.as_of), F.lit(False))
        if table == "campaigns":
            # The question itself may be delivered on the cut-off's own day.
            late = late & (F.col("campaign_id") != question.campaign_id)
        fate = F.pmod(F.xxhash64(*_flat(frame), F.lit(seed)), F.lit(3))
        changed = {
            name: F.when(late & (fate == 1), value if isinstance(value, Column) else F.lit(value))
            .otherwise(F.col(name))
            .alias(name)
            for name, value in rule.changed.items()
        }
        kept = frame.where(~(late & (fate == 0)))
        result[table] = kept.select(*[changed.get(name, F.col(name)) for name in frame.columns])
        if table in ("events", "sends", "redemptions", "campaigns"):
            is_again = fate == 2
            if table == "campaigns":  # one row stands behind every target: never left to chance
                is_again = is_again | (F.col("campaign_id") == question.campaign_id)
            again = frame.where(~late & is_again)
            result[table] = result[table].unionByName(_delivered_again(again, rule, question))
        if table in ("users", "catalogue"):
            fresh = frame.where(~late).withColumn(rule.day, F.lit(question.day))
            keys = ["user_id" if table == "users" else "item_id", rule.day]
            other = _other(fresh, rule).dropDuplicates(keys)
            result[table] = result[table].where(F.col(rule.day) != F.lit(question.day)).unionByName(other)
    return _added(result, users, facts_from_then_on(question))


def _flat(frame: DataFrame) -> list[Column]:
    """Columns that a hash accepts: maps have none."""
    return [F.col(name) for name, kind in frame.dtypes if not kind.startswith("map")]


def _other(frame: DataFrame, rule: _Knowledge) -> DataFrame:
    """The same rows with other contents."""
    for name, value in rule.changed.items():
        frame = frame.withColumn(name, value if isinstance(value, Column) else F.lit(value))
    return frame


def _delivered_again(frame: DataFrame, rule: _Knowledge, question: Question) -> DataFrame:
    later = F.date_add(F.greatest(F.col(rule.day), F.lit(question.day)), 1)
    again = _other(frame, rule).withColumn(rule.day, later)
    return again.withColumn("ingest_time", F.lit(question.as_of)) if "ingest_time" in again.columns else again


def _added(frames: Frames, users: DataFrame, facts: Mapping[str, list[dict[str, Any]]]) -> Frames:
    """Give every sampled user each of these facts; a fact without a user is added once."""
    result = dict(frames)
    for table, rows in facts.items():
        frame = frames[table]
        values = [tuple(row.get(name) for name in frame.columns) for row in rows]
        plain = literals.frame(frame.sparkSession, values, frame.schema)
        if "user_id" in frame.columns:
            each = plain.withColumnRenamed("user_id", "prefix").crossJoin(F.broadcast(users))
            for name in sorted(_KEYS & set(frame.columns)):
                each = each.withColumn(name, F.concat(name, F.lit(":"), "user_id"))
            # A prefix such as visitor: makes it another's.
            plain = each.withColumn("user_id", F.concat(F.coalesce("prefix", F.lit("")), "user_id"))
        result[table] = result[table].unionByName(plain.select(*frame.columns))
    return result


def _features(
    spark: SparkSession, config: Config, population: DataFrame, frames: Frames, build: Builder
) -> dict[str, Any]:
    """Features by user, built while ``frames`` stand in for the tables of the same names."""
    last = population.select("as_of_date").first()
    assert last is not None
    reach = last["as_of_date"] + timedelta(days=REACH_DAYS)
    dates = DateRange(reach - timedelta(days=MAX_DAYS), reach)
    with tables.stand_ins(frames):
        first = events.read_first_deliveries(spark, config.lake.root_uri, dates)
        rules = config.events
        staff = robots.staff_ids(rules, feeds.load_key(rules)) if rules.staff_user_ids else ()
        days = robots.build_user_days(first, config.lake.time_zone, rules, staff)
    with tables.stand_ins(frames | {"user_days": days}):
        return {row["user_id"]: row for row in build(spark, config, population)}


def _compare(group: str, first: dict[str, Any], late: dict[str, Any], control: dict[str, Any]) -> Finding:
    def values(rows: dict[str, Any], user: str) -> tuple[Any, ...]:
        return tuple(rows[user][name] for name in GROUPS[group]) if user in rows else ()

    users = sorted(first.keys() | late.keys())
    leaked = [user for user in users if values(first, user) != values(late, user)]
    moved = [user for user in first if values(first, user) != values(control, user)]
    wide = group == "wide" and bool(leaked) and leaked[0] in first and leaked[0] in late
    features = _differing(first[leaked[0]]["wide"], late[leaked[0]]["wide"]) if wide else ()
    return Finding(group, len(users), len(leaked), len(moved), (leaked or [""])[0], features)


def _differing(first: bytes, second: bytes) -> tuple[str, ...]:
    one, two = (np.frombuffer(value, dtype="<f4") for value in (first, second))
    pairs = zip(layouts.WIDE_FEATURES, one, two, strict=True)
    return tuple(f"{name} {np.expm1(a):.4g} -> {np.expm1(b):.4g}" for name, a, b in pairs if a != b)
