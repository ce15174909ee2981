"""What a decision leaves on the lake: the ledger of all users, then the audience of those who are mailed."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign.choice import assignment
from couponflow.campaign.choice.options import MICRO
from couponflow.campaign.selection import Decision
from couponflow.errors import ConflictError
from couponflow.lake import tables
from couponflow.lake.erased import TOMBSTONE


def ledger_rows(decided: DataFrame, decision: Decision, run_id: str) -> DataFrame:
    """Rows of ``assignments``: every user of the master, mailed or not. Probability 0 where none is known."""
    return decided.select(
        F.lit(decision.campaign_id).alias("campaign_id"),
        F.lit(decision.version).alias("version"),
        "user_id",
        F.lit(decision.run_date).alias("run_date"),
        F.col("arm").isin(assignment.TREAT, assignment.CONTROL, assignment.HOLDOUT).alias("would_select"),
        "arm",
        "propensity",
        "coupon_id",
        "reason",
        F.coalesce("conversion_probability", F.lit(0.0)).alias("conversion_probability"),
        F.lit(run_id).alias("run_id"),
        F.lit(None).cast("timestamp").alias("exposure_time"),
    )


def audience_rows(decided: DataFrame, decision: Decision) -> DataFrame:
    """Rows of ``audience``: the users to mail and nobody else; rank 0 is mailed at random, not chosen."""
    is_explored = F.col("arm") == assignment.EXPLORE
    return decided.where(F.col("arm").isin(*assignment.MAILED)).select(
        F.lit(decision.campaign_id).alias("campaign_id"),
        F.lit(decision.version).alias("version"),
        "user_id",
        "coupon_id",
        "conversion_probability",
        (F.col("value_micro").cast("double") / MICRO).alias("expected_value_amount"),
        F.when(is_explored, 0).otherwise(F.col("rank")).cast("bigint").alias("rank"),
    )


def publish(
    decided: DataFrame, root_uri: str, decision: Decision, run_id: str, is_final: bool
) -> dict[str, int]:
    """Write the ledger, then the audience of a version; returns the rows of each.

    The ledger only grows: a rerun with the same content writes nothing and keeps what is known about
    exposure. A version that is ``is_final`` (approved or handed over) cannot change any more; one from which
    people were erased since stays as it is, as its inputs are no longer those that it was decided on.

    Raises:
        ConflictError: the rows of a final version would change.
    """
    if is_final and (kept := _kept_after_erasure(decided, root_uri, decision)):
        return kept
    frames = {
        "assignments": ledger_rows(decided, decision, run_id),
        "audience": audience_rows(decided, decision),
    }
    return {
        table: _publish(rows, root_uri, table, decision, run_id, is_final) for table, rows in frames.items()
    }


def _kept_after_erasure(decided: DataFrame, root_uri: str, decision: Decision) -> dict[str, int]:
    """Rows of a version in ledger and audience if an erasure has left a tombstone there; else nothing."""
    frames = {
        table: tables.read_or_empty(decided.sparkSession, root_uri, table).where(
            (F.col("campaign_id") == decision.campaign_id) & (F.col("version") == decision.version)
        )
        for table in ("assignments", "audience")
    }
    if frames["assignments"].where(F.col("user_id").startswith(TOMBSTONE)).isEmpty():
        return {}
    return {table: frame.count() for table, frame in frames.items()}


def _publish(
    rows: DataFrame, root_uri: str, table: str, decision: Decision, run_id: str, is_final: bool
) -> int:
    found = tables.read_or_empty(rows.sparkSession, root_uri, table).where(
        (F.col("campaign_id") == decision.campaign_id) & (F.col("version") == decision.version)
    )
    content = [name for name in found.columns if name not in ("run_id", "exposure_time")]
    num_found = found.count()
    if num_found and tables.content_hash(found.select(*content)) == tables.content_hash(
        rows.select(*content)
    ):
        return num_found
    if num_found and is_final:
        raise ConflictError(
            f"table {table}, campaign {decision.campaign_id}, version {decision.version}: approved or handed "
            "over, but its inputs have changed since; recall it, or decide under other rules"
        )
    return tables.overwrite(
        rows, root_uri, table, run_id=run_id, campaign_id=decision.campaign_id, version=decision.version
    )
