"""The choice among coupons for many users: seconds, and how they grow with the users.

Users with random probabilities choose among five coupons under a budget for about a fifth of them, stock of
two coupons and two limits on segments. Timed from probabilities to a choice for each user, written nowhere
(``noop``), in a session of two threads and a driver heap of 2 GB. The limits are checked on every choice.
"""

import time

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from bench.run import Claim
from couponflow.campaign import selection
from couponflow.campaign.choice import allocation, options
from couponflow.campaigning import CouponOption, SegmentLimit, SelectionConfig
from couponflow.lake import session
from couponflow.sections import SparkConfig

CLAIMS = ("selection_scaling", "selection_scaling_growth")
NUM_USERS = 1_000_000
_COUPONS = ((0.5, 0.8, None), (1.0, 1.0, None), (1.5, 1.2, 0.02), (2.0, 1.3, 0.01), (3.0, 1.5, None))


def section(num_users: int) -> SelectionConfig:
    """The limits for a number of users, all in proportion to it."""
    coupons = tuple(
        CouponOption(
            coupon_id=f"c{discount}",
            discount_amount=discount,
            response_scale=scale,
            stock=None if share is None else int(share * num_users),
        )
        for discount, scale, share in _COUPONS
    )
    segments = (
        SegmentLimit(name="odd", where="pmod(xxhash64(user_id), 10) = 1", max_recipients=num_users // 100),
        SegmentLimit(name="new", where="pmod(xxhash64(user_id), 10) = 2", min_recipients=num_users // 25),
    )
    return SelectionConfig(
        coupons=coupons,
        segments=segments,
        margin_amount=6.0,
        budget_amount=0.025 * num_users,
        max_recipients=num_users // 4,
    )


def users(spark: SparkSession, num_users: int) -> DataFrame:
    """Eligible users with skewed probabilities, the same on every call."""
    unit = F.pmod(F.xxhash64("id", F.lit(7)), F.lit(1_000_003)) / 1_000_003
    return spark.range(num_users, numPartitions=8).select(
        F.sha2(F.col("id").cast("string"), 256).alias("user_id"),
        (F.pow(unit, F.lit(3)) * 0.2 + 0.002).alias("conversion_probability"),
        unit.alias("score"),
        F.lit(None).cast("string").alias("reason"),
    )


def seconds(spark: SparkSession, num_users: int) -> tuple[float, float]:
    """Seconds of one choice, and the share of the dual bound that it misses."""
    limits = section(num_users)
    start = time.perf_counter()
    allocated = selection.allocate(users(spark, num_users), "bench", limits)
    assert allocated is not None
    chosen = allocated.choices.groupBy("option").count().collect()
    passed = time.perf_counter() - start
    check_within(allocated, limits, {row.option: row["count"] for row in chosen}, num_users)
    return passed, (allocated.bound - allocated.value) / allocated.bound


def check_within(
    allocated: allocation.Allocation, limits: SelectionConfig, counts: dict[int, int], num_users: int
) -> None:
    """Refuse to time a choice that breaks a limit."""
    assert sum(counts.values()) == num_users, "a user is lost"
    assert num_users - counts.get(-1, 0) <= limits.max_recipients, "the list is too long"
    for place, coupon in enumerate(options.coupons(limits)):
        stock = num_users if coupon.stock is None else coupon.stock
        assert counts.get(place, 0) <= stock, f"coupon {coupon.coupon_id} is given out too often"
    assert allocated.value <= allocated.bound, "worth more than possible"


def measure(names: tuple[str, ...], num_users: int = NUM_USERS) -> list[Claim]:
    """One choice each of a tenth of the users and of all, after one of a tenth to warm up."""
    spark = session.start(SparkConfig(master="local[2]", driver_memory="2g"), "bench selection")
    seconds(spark, num_users // 10)
    small, _ = seconds(spark, num_users // 10)
    large, gap = seconds(spark, num_users)
    rival = f"{num_users:,} users x 5 coupons, {100 * gap:.3f} % below the dual bound"
    found = {
        "selection_scaling": Claim("selection_scaling", large, "s", 90.0, 1, rival, "at_most"),
        "selection_scaling_growth": Claim(
            "selection_scaling_growth",
            large / small,
            "x its time",
            11.0,
            1,
            "a tenth of the users",
            "at_most",
        ),
    }
    return [found[name] for name in names]
