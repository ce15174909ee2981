"""Aggregates of what was sent to a user and what became of it: mails, opens, clicks, redemptions."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.sequences import measures

_ANSWERS = ("opens", "clicks")  # of ``measures.MAIL``, in its order
_SEND_WINDOWS = (7, 28, 91)


def redemption_features(redemptions: DataFrame, cutoffs: DataFrame, time_zone: str) -> DataFrame:
    """Count redemptions before the cut-off, delivered by then.

    Grain: one row per (user_id, as_of_date) of ``cutoffs`` with a redemption.
    """
    day = F.to_date(F.from_utc_timestamp("redemption_time", time_zone))
    return (
        redemptions.select("user_id", "campaign_id", "redemption_time", "ingest_date", day.alias("day"))
        .join(cutoffs, "user_id")
        .where((F.col("redemption_time") < F.col("as_of")) & (F.col("ingest_date") < F.col("as_of_date")))
        .groupBy(*measures.PAIR)
        .agg(
            F.count(F.lit(1)).alias("num_redemptions"),
            F.countDistinct("campaign_id").alias("num_redeemed_campaigns"),
            F.min(F.datediff("as_of_date", "day")).alias("redemption_recency_days"),
        )
    )


def mail_features(events: DataFrame, sends: DataFrame, campaigns: DataFrame, cutoffs: DataFrame) -> DataFrame:
    """Count the mail a user got before the cut-off, and what became of it.

    Grain: one row per (user_id, as_of_date) of ``cutoffs``.
    Rule: a send counts once it was delivered and told of; a campaign is finished iff its end, as told by
        then, lies before. Opens and clicks of mail scanners (``is_automated``) count nowhere. Rates are per
        send of 91 days, at most 1. A send counts as unopened iff no open follows it, of whatever mail.
    """
    is_person = ~F.coalesce("is_automated", F.lit(False))
    answers = (
        events.where(F.col("event_type").isin(*measures.MAIL) & is_person)
        .select("user_id", "event_type", "event_time", "event_date", "known_date")
        .join(cutoffs, "user_id")
        .where(F.col("known_date") < F.col("as_of_date"))
        .withColumn("age", F.datediff("as_of_date", "event_date"))
        .groupBy(*measures.PAIR)
        .agg(
            *[
                measures.total((F.col("event_type") == kind) & measures.within(days)).alias(
                    f"num_{name}_{days}_days"
                )
                for kind, name in zip(measures.MAIL, _ANSWERS, strict=True)
                for days in (28, 91)
            ],
            F.max(F.when(F.col("event_type") == "mail_open", F.col("event_time"))).alias("last_open"),
        )
    )
    answered = [f"num_{name}_{days}_days" for name in _ANSWERS for days in (28, 91)]
    mails = sends.select("user_id", "campaign_id", "delivered_time", "send_date", "ingest_date")
    ends = campaigns.select("campaign_id", "end_date", F.col("ingest_date").alias("told_date"))
    is_sent = F.col("campaign_id").isNotNull()
    is_over = (F.col("end_date") < F.col("as_of_date")) & (F.col("told_date") < F.col("as_of_date"))
    known = [
        F.col("mail.user_id") == F.col("cutoff.user_id"),
        F.col("delivered_time") < F.col("as_of"),
        F.col("ingest_date") < F.col("as_of_date"),
    ]
    per_campaign = (
        cutoffs.join(answers, measures.PAIR, "left")
        .alias("cutoff")
        .join(mails.alias("mail"), known, "left")
        .join(F.broadcast(ends), "campaign_id", "left")
        .select(
            "cutoff.*",
            "campaign_id",
            "delivered_time",
            F.datediff("as_of_date", "send_date").alias("age"),
            is_over.alias("is_over"),
        )
        .groupBy(*measures.PAIR, "campaign_id")
        .agg(
            *[F.max(name).alias(name) for name in answered],
            *[
                measures.total(is_sent & measures.within(days)).alias(f"num_sends_{days}_days")
                for days in _SEND_WINDOWS
            ],
            F.min("age").alias("send_recency_days"),
            measures.total(
                is_sent & F.coalesce(F.col("delivered_time") > F.col("last_open"), F.lit(True))
            ).alias("num_sends_since_open"),
            F.max("is_over").alias("is_over"),
        )
    )
    sums = [*[f"num_sends_{days}_days" for days in _SEND_WINDOWS], "num_sends_since_open"]
    totals = per_campaign.groupBy(*measures.PAIR).agg(
        F.count("campaign_id").alias("num_campaigns_received"),
        measures.total(F.col("is_over")).alias("num_campaigns_finished"),
        *[F.max(name).alias(name) for name in answered],
        *[F.sum(name).alias(name) for name in sums],
        F.min("send_recency_days").alias("send_recency_days"),
    )
    sent = F.col("num_sends_91_days")
    return totals.select(
        "*",
        measures.ratio(F.col("num_opens_91_days"), sent).alias("open_rate_91_days"),
        measures.ratio(F.col("num_clicks_91_days"), sent).alias("click_rate_91_days"),
    )
