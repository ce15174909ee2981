"""The sums behind a forecast's intervals are those of a slow oracle, whatever the order of the rows."""

import random
from typing import Any

import pytest
from builders import D0
from pyspark.sql import SparkSession

from couponflow.campaign import eligibility, forecasting, selection
from couponflow.campaign.forecasting import NANO, Spread
from couponflow.campaigning import CouponOption, SelectionConfig
from couponflow.lake import literals

COUPONS = (
    CouponOption(coupon_id="small", discount_amount=0.5),
    CouponOption(coupon_id="large", discount_amount=2.0, margin_amount=9.0),
    CouponOption(coupon_id="nobody's", discount_amount=6.0),
)
COLUMNS = (
    "reason string, conversion_probability double, coupon_id string, cost_micro bigint, value_micro bigint, "
    "rank bigint"
)
Row = tuple[str, float | None, str | None, int | None, int | None, int | None]


def random_rows(seed: int, size: int, coupons: tuple[CouponOption, ...]) -> list[Row]:
    draw = random.Random(seed)
    rows: list[Row] = []
    for rank in range(1, size + 1):
        reason = draw.choice(["selected", "selected", "explore", "control", "value", "bounce"])
        if reason == "bounce":
            rows.append((reason, None, None, None, None, None))
            continue
        p = draw.choice([0.0, 1.0, 1e-10, 0.5, draw.random()])
        coupon = draw.choice(coupons[:2]).coupon_id if coupons and reason != "value" else None
        rows.append((reason, p, coupon, draw.randrange(10**6), draw.randrange(-(10**6), 10**6), rank))
    return rows


def oracle(rows: list[Row], coupon_id: str | None) -> Spread:
    own = [
        p or 0.0
        for reason, p, coupon, *_ in rows
        if reason in ("selected", "explore") and coupon == coupon_id
    ]
    return Spread(len(own), sum(int(p * (1 - p) * NANO + 0.5) for p in own))


@pytest.mark.parametrize("coupons", [(), COUPONS])
@pytest.mark.parametrize("size", [0, 1, 400])
def test_facts_rest_on_the_sums_of_the_mailed_users(
    spark: SparkSession, coupons: tuple[CouponOption, ...], size: int
) -> None:
    section = SelectionConfig(coupons=coupons, control_share=0.2)
    rows = random_rows(size, size, coupons)
    ids = [coupon.coupon_id for coupon in coupons] or [None]
    parts = [oracle(rows, coupon_id) for coupon_id in ids]
    mailed = [row for row in rows if row[0] in ("selected", "explore")]
    sums: dict[str, Any] = {
        "num_users": len(mailed),
        "cost": sum(row[3] or 0 for row in mailed),
        "value": sum(row[4] or 0 for row in mailed),
        "conversions": sum(int((row[1] or 0.0) * NANO + 0.5) for row in mailed),
    }
    for place, part in enumerate(parts):
        sums |= {f"num_users_{place}": part.num_users, f"variance_nano_{place}": part.variance_nano}
    expected = forecasting.intervals_of([sums], section)
    decision = selection.Decision.of("18", D0, "m-1", section, "abcdef")
    snapshot = eligibility.Snapshot(D0, "crm", 1)
    for seed in (1, 2):
        shuffled = random.Random(seed).sample(rows, len(rows))
        frame = literals.frame(spark, shuffled, COLUMNS).repartition(seed)
        facts = selection.summarise(frame, decision, snapshot)
        assert {name: facts[name] for name in expected} == expected
    low, high = expected["expected_conversions_interval"]
    assert low <= facts["expected_conversions"] <= high
    if size == 400:
        assert high - low > 10
        assert all(part.num_users for part in parts[:2])
