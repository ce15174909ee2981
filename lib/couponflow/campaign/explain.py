"""Why a user gets a campaign's mail, or does not: what the tables say of him, and what his score rests on."""

from collections.abc import Mapping
from datetime import date
from typing import TYPE_CHECKING, Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.campaign import eligibility, scoring, selection
from couponflow.campaign.scores import influence
from couponflow.dates import DateRange
from couponflow.errors import DataError
from couponflow.lake import layouts, runs, tables

if TYPE_CHECKING:
    from couponflow.models.bundle import Bundle

#: Events and aggregates that are named; the JSON holds all of them.
SHOWN = 5
_SMALL = 1e-4
_LABELS = {**eligibility.REASONS, **selection.REASONS}


def last_decision(root_uri: str, campaign_id: str) -> dict[str, Any]:
    """The facts of the newest successful selection of a campaign.

    Raises:
        DataError: nothing was selected for it yet.
    """
    found = [
        record.facts
        for record in runs.load_all(root_uri, "select_audience")
        if record.status == "ok" and record.facts.get("campaign_id") == campaign_id
    ]
    if not found:
        raise DataError(f"campaign {campaign_id}: nothing selected yet; run select_audience first")
    return found[-1]


def decided(spark: SparkSession, root_uri: str, user_id: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What ledger, predictions and audience say of a user under one decision.

    ``score_rank`` counts the users of the campaign with a higher probability, from 1.

    Raises:
        DataError: the decision does not know the user: he is not in the user master of that day, or his
            row was erased.
    """
    campaign_id, version, day = facts["campaign_id"], facts["version"], date.fromisoformat(facts["run_date"])
    of_version = (F.col("campaign_id") == campaign_id) & (F.col("version") == version)
    ledger = tables.read(spark, root_uri, "assignments").where(of_version)
    row = ledger.where(F.col("user_id") == user_id).first()
    if row is None:
        raise DataError(
            f"campaign {campaign_id}, version {version}: no row for this user; he is not in the user master "
            f"of {day}, or was erased. Check the id, and `couponflow job clean_feeds` for that day"
        )
    audience = tables.read(spark, root_uri, "audience").where(of_version & (F.col("user_id") == user_id))
    mailed = audience.first()
    scores = tables.read(spark, root_uri, "predictions", DateRange.day(day))
    scores = scores.where((F.col("campaign_id") == campaign_id) & (F.col("target_id") == campaign_id))
    own = scores.where(F.col("user_id") == user_id).first()
    ranks: dict[str, Any] = {}
    if own is not None:
        better = F.sum((F.col("conversion_probability") > own["conversion_probability"]).cast("int"))
        num_better, num_users = scores.agg(better, F.count(F.lit(1))).collect()[0]
        ranks = {"score_rank": int(num_better) + 1, "num_scored": int(num_users)}
    return {
        "campaign_id": campaign_id,
        "version": version,
        "run_date": facts["run_date"],
        "model_version": facts["model_version"],
        "is_eligible": row["reason"] not in eligibility.REASONS,
        "would_select": bool(row["would_select"]),
        "is_mailed": mailed is not None,
        "reason": row["reason"],
        "reason_label": _LABELS.get(row["reason"], row["reason"]),
        "arm": row["arm"],
        "propensity": float(row["propensity"]),
        "score": None if own is None else float(own["score"]),
        "conversion_probability": None if own is None else float(own["conversion_probability"]),
        "is_cold_start": None if own is None else bool(own["is_cold_start"]),
        **ranks,
        "coupon_id": row["coupon_id"],
        "audience_rank": None if mailed is None else int(mailed["rank"]),
        "expected_value_amount": None if mailed is None else float(mailed["expected_value_amount"]),
    }


def rests_on(
    spark: SparkSession, root_uri: str, user_id: str, facts: Mapping[str, Any], bundle: "Bundle"
) -> dict[str, Any]:
    """The user's events with attention and effect, and the effects of his aggregates; see ``influence``.

    Raises:
        DataError: the day's scoring examples lack the user or the campaign's target.
    """
    from couponflow.models.batch import decode

    day = date.fromisoformat(facts["run_date"])
    examples = tables.read(spark, root_uri, "scoring_examples", DateRange.day(day))
    row = examples.where(F.col("user_id") == user_id).first()
    asked = None if row is None else scoring.target_of(row.asDict(), facts["campaign_id"])
    if row is None or asked is None:
        raise DataError(
            f"table scoring_examples, {day}: no row of this user for campaign {facts['campaign_id']}; it was "
            "rebuilt since, run build_examples for that day again"
        )
    target, wide = asked
    batch = decode([bytes(row["history"])], [target], [wide])
    events = influence.of_events(bundle, batch)
    names = _names(tables.read(spark, root_uri, "vocabularies"), row["vocabulary_version"], events)
    for event in events:
        event |= {field: names.get((field, event[field]), "unknown") for field in layouts.VOCABULARY_FIELDS}
    return {"events": events, "aggregates": influence.of_aggregates(bundle, batch)}


def _names(vocabulary: DataFrame, version: str, events: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """The values behind the ids of some events."""
    wanted = sorted({event[field] for event in events for field in layouts.VOCABULARY_FIELDS})
    rows = vocabulary.where((F.col("version") == version) & F.col("index").isin(wanted or [-1]))
    found = rows.where(F.col("index") >= layouts.FIRST_INDEX).select("field", "index", "value").collect()
    return {(row["field"], row["index"]): row["value"] for row in found}


def in_words(found: Mapping[str, Any]) -> list[str]:
    """The facts as sentences, the decision first."""
    campaign = f"campaign {found['campaign_id']} on {found['run_date']}"
    if found["is_mailed"]:
        coupon = found["coupon_id"] or "the pooled coupon"
        lines = [
            f"Gets the mail of {campaign} with {coupon}, as number {found['audience_rank']} of the list."
        ]
    elif found["would_select"]:
        lines = [
            f"Was chosen for {campaign}, but is withheld to measure it ({found['arm']}): such users get no "
            "mail, by a hash of the id and not by the score."
        ]
    else:
        lines = [f"Gets no mail of {campaign}: {found['reason_label'].lower()}."]
    if found["conversion_probability"] is None:
        return [*lines, "Has no score."]
    lines.append(
        f"Converts with a probability of {found['conversion_probability']:.1%} (rank {found['score_rank']:,} "
        f"of {found['num_scored']:,}, model {found['model_version']})."
    )
    if found["is_cold_start"]:
        lines.append("Has no event before that day: the score rests on the aggregates of a new user.")
    strongest = sorted(found.get("events", ()), key=lambda event: -abs(event["effect"]))[:SHOWN]
    if strongest and abs(strongest[0]["effect"]) < _SMALL:
        lines.append("No single event moves it by as much as 0.01 points.")
    elif strongest:
        lines.append("Without one event the probability would change the most by:")
        lines += [_event_in_words(event) for event in strongest if abs(event["effect"]) >= _SMALL]
    largest = sorted(found.get("aggregates", {}).items(), key=lambda item: -abs(item[1]))[:SHOWN]
    if largest:
        lines.append("Against an average user the aggregates that move it the most are:")
        lines += [f"  {effect:+.2%}  {name}" for name, effect in largest]
    return lines


def _event_in_words(event: Mapping[str, Any]) -> str:
    attention = "" if event["attention"] is None else f", attention {event['attention']:.3f}"
    return (
        f"  {event['effect']:+.2%}  {event['event_type']} of item {event['item']} (category "
        f"{event['category']}), {event['age_days']:.0f} days before{attention}"
    )
