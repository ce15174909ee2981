"""How often, and how soon again, a user may be mailed: caps and gaps over all campaigns, and quiet days.

A mail is a marketing send of whichever team, known from the ``sends`` feed, or a decision of the ledger that
no send answers yet. Distances are whole business days from the run date. Sends after the run date are not
looked at, so that a rerun decides as before; decisions for later days are, as they were made first: a
campaign for Wednesday that is prepared after one for Friday makes room for it.
"""

from datetime import date, timedelta

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from couponflow.campaign.choice import assignment
from couponflow.campaigning import SelectionConfig
from couponflow.dates import day_start
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.sequences.conversions import first_deliveries, is_marketing


def check_quiet_day(run_date: date, quiet_days: tuple[date, ...]) -> None:
    """Refuse to send on a quiet day.

    Raises:
        ConfigError: it is one; the message names the next day that is not.
    """
    if run_date not in quiet_days:
        return
    allowed = run_date
    while allowed in quiet_days:
        allowed += timedelta(days=1)
    raise ConfigError(
        f"run date {run_date} is one of selection.quiet_days, nothing is sent on it; the next allowed day is "
        f"{allowed}"
    )


def mails_around(
    sends: DataFrame, assignments: DataFrame, campaign_id: str, run_date: date, section: SelectionConfig
) -> DataFrame:
    """What the caps have to know of each user's marketing mails around a run date, over all campaigns.

    Returns one row per ``user_id`` with a mail near enough: ``num_mails``, the most mails in any window of
    the cap that a mail on the run date would join, and ``days_to_mail``, the distance to the nearest one.
    Mails: sends of [run date - d, run date), each ``send_id`` once, no transactional ones; and mailed users
        of the ledger whose send is not known yet, decided for [run date - d, run date + d], where d is the
        longer of ``cap_days`` and ``min_days_since_mail``. A decision of this campaign for the run date is
        what is being made now and does not count; two versions of one decision are one mail. A send answers
        a decision of its campaign that is not younger; an earlier wave of the campaign is another mail.
    Window: the run date, or the day of a later decision, and the ``cap_days`` days before it.
    Cost: three shuffles of the mails of 2 d days; ``sends`` is read whole for its first deliveries.
    """
    reach = max(section.cap_days, section.min_days_since_mail)
    first, last = run_date - timedelta(days=reach), run_date + timedelta(days=reach)
    delivered = first_deliveries(sends, "send_id").where(
        is_marketing() & (F.col("send_date") >= F.lit(first)) & (F.col("send_date") < F.lit(run_date))
    )
    decided = (
        assignments.where(
            F.col("arm").isin(*assignment.MAILED)
            & F.col("run_date").between(F.lit(first), F.lit(last))
            & ~((F.col("campaign_id") == campaign_id) & (F.col("run_date") == F.lit(run_date)))
        )
        .select("user_id", "campaign_id", "run_date")
        .distinct()
    )
    answers = delivered.groupBy("user_id", "campaign_id").agg(F.max("send_date").alias("last_send_date"))
    unsent = decided.join(answers, ["user_id", "campaign_id"], "left").where(
        F.col("last_send_date").isNull() | (F.col("last_send_date") < F.col("run_date"))
    )
    mails = delivered.select("user_id", F.col("send_date").alias("mail_date")).unionByName(
        unsent.select("user_id", F.col("run_date").alias("mail_date"))
    )
    distance = F.datediff("mail_date", F.lit(run_date))
    window = Window.partitionBy("user_id").orderBy("distance").rangeBetween(-section.cap_days, 0)
    is_before = F.col("distance").between(-section.cap_days, 0)
    is_after = F.col("distance").between(1, section.cap_days)
    return (
        mails.withColumn("distance", distance)
        .withColumn("num_in_window", F.count(F.lit(1)).over(window))
        .groupBy("user_id")
        .agg(
            F.greatest(
                F.count(F.when(is_before, 1)),
                F.max(F.when(is_after, F.col("num_in_window"))),  # greatest skips nulls
            ).alias("num_mails"),
            F.min(F.abs("distance")).alias("days_to_mail"),
        )
    )


def recent_buyers(orders: DataFrame, run_date: date, time_zone: str, section: SelectionConfig) -> DataFrame:
    """Users whose last order is fewer than ``min_days_since_purchase`` days old; one row per ``user_id``.

    An order counts from the business day on which it was placed, whatever became of it since.

    Raises:
        DataError: the rule is on, and no order at all is known before the run date.
    """
    as_of = day_start(run_date, time_zone)
    placed = orders.where(F.col("order_time") < F.lit(as_of))
    if section.min_days_since_purchase and placed.isEmpty():
        raise DataError(
            f"table orders has no order before {run_date}, so nobody's last purchase is known; run "
            "clean_feeds, or set selection.min_days_since_purchase = 0"
        )
    days = max(section.min_days_since_purchase - 1, 0)
    start = day_start(run_date - timedelta(days=days), time_zone)
    return placed.where(F.col("order_time") >= F.lit(start)).select("user_id").distinct()


def check_cap(decided: DataFrame, mails: DataFrame, campaign_id: str, section: SelectionConfig) -> None:
    """Make sure that nobody who is to be mailed has met a cap or a gap since the decision was prepared.

    Inputs: ``decided`` with ``user_id`` and ``arm``; ``mails`` of ``mails_around``, read from the ledger
    after the decision was written to it. The lease on the ledger keeps two campaigns from being prepared at
    the same time; where it was lost, the one that finds the other here has to decide again.

    Raises:
        ConflictError: another campaign has taken such a user meanwhile.
    """
    is_over = (F.col("num_mails") >= section.max_sends) | (
        F.col("days_to_mail") < section.min_days_since_mail
    )
    mailed = decided.where(F.col("arm").isin(*assignment.MAILED))
    num_over = mails.where(is_over).join(mailed, "user_id").count()
    if num_over:
        raise ConflictError(
            f"campaign {campaign_id}: another campaign was prepared at the same time and mails {num_over} of "
            "the same users beyond the frequency cap; run select_audience again"
        )
