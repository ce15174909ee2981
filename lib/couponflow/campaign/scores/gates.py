"""What has to hold of scores before they are published; nothing is written where a gate is closed.

The scores before stay current then, and the job ends with exit code 3.
"""

from typing import Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign.scores.shipping import ShippedBundle
from couponflow.campaigning import ScoringConfig
from couponflow.errors import ConfigError, DataError

_PSI_BUCKETS = 10
_LEAST_SHARE = 1e-4


def check_vocabulary(examples: DataFrame, shipped: ShippedBundle) -> None:
    """Refuse examples whose ids are not those of the model.

    Raises:
        DataError: there are no examples.
        ConfigError: another vocabulary, or several.
    """
    versions = sorted(row[0] for row in examples.select("vocabulary_version").distinct().collect())
    if not versions:
        raise DataError("table scoring_examples: no rows for that day; run build_examples for it first")
    if versions != [shipped.vocabulary_version]:
        raise ConfigError(
            f"model {shipped.model_version} expects vocabulary {shipped.vocabulary_version}, table "
            f"scoring_examples has {', '.join(versions)}; rebuild the examples with it or name another model"
        )


def check_predictions(predictions: DataFrame, users: DataFrame) -> dict[str, Any]:
    """The gates before publishing; returns num_users, cold_start_users, mean_probability.

    Every user of the master exactly once and nobody else, probabilities and scores in [0, 1] without null
    or NaN, and not all equal.

    Raises:
        DataError: a gate is closed; nothing may be written.
    """
    values = [F.col("score"), F.col("conversion_probability")]
    fine = F.lit(True)
    for value in values:
        fine = fine & value.isNotNull() & ~F.isnan(value) & value.between(0.0, 1.0)
    by_user = predictions.groupBy("user_id").agg(
        F.count(F.lit(1)).alias("num_rows"),
        F.sum(F.when(fine, 0).otherwise(1)).alias("num_bad"),
        F.sum("conversion_probability").alias("probability"),
        F.max(F.col("is_cold_start").cast("int")).alias("is_cold_start"),
    )
    master = users.select("user_id").withColumn("is_known", F.lit(True))
    found = (
        by_user.join(master, "user_id", "full")
        .agg(
            F.count("is_known").alias("num_users"),
            F.count(F.when(F.col("num_rows").isNull(), 1)).alias("num_missing"),
            F.count(F.when(F.col("is_known").isNull(), 1)).alias("num_unknown"),
            F.count(F.when(F.col("num_rows") > 1, 1)).alias("num_repeated"),
            F.coalesce(F.sum("num_bad"), F.lit(0)).alias("num_bad"),
            F.coalesce(F.sum("is_cold_start"), F.lit(0)).alias("num_cold"),
            F.min("probability").alias("low"),
            F.max("probability").alias("high"),
            F.avg("probability").alias("mean"),
        )
        .collect()[0]
    )
    problems = {
        "users of the master without a score": found.num_missing,
        "scored users who are not in the master": found.num_unknown,
        "users with several scores": found.num_repeated,
        "scores that are null, NaN or outside [0, 1]": found.num_bad,
        "users in all, so nothing to publish": int(found.num_users == 0),
        "value for all users: the model is constant": int(found.num_users > 1 and found.low == found.high),
    }
    bad = [f"{count} {what}" for what, count in problems.items() if count]
    if bad:
        raise DataError(
            f"predictions: {'; '.join(bad)}; nothing written, the scores before stay. Rebuild "
            "scoring_examples for that day, or name another model"
        )
    return {
        "num_users": int(found.num_users),
        "cold_start_users": int(found.num_cold),
        "mean_probability": float(found.mean),
    }


def check_drift(
    predictions: DataFrame, before: DataFrame | None, base_rate: float | None, section: ScoringConfig
) -> dict[str, Any]:
    """Gates against what is known: the rate that the calibrator was fitted on, and the scores before.

    ``predictions`` and ``before`` hold one campaign and day each; ``before`` is None where the campaign has
    never been scored. Returns mean_ratio, psi and previous_users, null where there is nothing to compare.
    PSI: sum over buckets of (a - b) ln(a / b), buckets between the deciles of the scores before.

    Raises:
        DataError: a gate is closed; nothing may be written.
    """
    now = predictions.agg(F.count(F.lit(1)), F.avg("conversion_probability")).collect()[0]
    num_users, mean = int(now[0]), float(now[1])
    problems: list[str] = []
    facts: dict[str, Any] = {"mean_ratio": None, "psi": None, "previous_users": None}
    if base_rate:
        ratio = mean / base_rate
        facts["mean_ratio"] = round(ratio, 4)
        if not 1.0 / section.max_mean_ratio <= ratio <= section.max_mean_ratio:
            problems.append(
                f"mean probability {mean:.4f} is {ratio:.2f} times the rate {base_rate:.4f} of the rows that "
                f"calibrated the model, {section.max_mean_ratio} allowed (scoring.max_mean_ratio)"
            )
    if before is not None:
        previous = before.count()
        facts["previous_users"] = previous
        if abs(num_users - previous) > section.max_row_change_share * previous:
            problems.append(
                f"{num_users} users, {previous} the last time: more than a share of "
                f"{section.max_row_change_share} has changed (scoring.max_row_change_share)"
            )
        psi = stability_index(before, predictions)
        facts["psi"] = round(psi, 4)
        if psi > section.max_psi:
            problems.append(
                f"population stability index {psi:.3f} against the last time, {section.max_psi} allowed "
                "(scoring.max_psi)"
            )
    if problems:
        raise DataError(
            f"predictions: {'; '.join(problems)}; nothing written, the scores before stay. Look at the "
            "examples and the model; where the change is wanted, raise the bound for one run"
        )
    return facts


def stability_index(before: DataFrame, after: DataFrame) -> float:
    """PSI of ``conversion_probability``; a share of 0 counts as one in ten thousand."""
    places = [number / _PSI_BUCKETS for number in range(1, _PSI_BUCKETS)]
    edges = sorted(set(before.approxQuantile("conversion_probability", places, 0.001)))
    shares = []
    for frame in (before, after):
        above = [(F.col("conversion_probability") > edge).cast("int") for edge in edges]
        bucket = sum(above, F.lit(0)).alias("bucket")
        counts = np.zeros(len(edges) + 1)
        for row in frame.select(bucket).groupBy("bucket").count().collect():
            counts[row["bucket"]] = row["count"]
        shares.append(np.maximum(counts / max(counts.sum(), 1.0), _LEAST_SHARE))
    expected, found = shares
    return float(((found - expected) * np.log(found / expected)).sum())
