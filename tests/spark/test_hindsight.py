"""A choice judged by the true chances equals a plain sum, and nothing beats the choice that knows them."""

import random
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from couponflow.campaign import hindsight, selection
from couponflow.campaigning import CouponOption, SegmentLimit, SelectionConfig
from couponflow.lake import literals

MASTER = "user_id string, attributes map<string,string>"
LEDGER = "user_id string, reason string, would_select boolean, coupon_id string"
COUPONS = (
    CouponOption(coupon_id="small", discount_amount=0.5, response_scale=0.8),
    CouponOption(coupon_id="large", discount_amount=2.0, response_scale=1.4, stock=25),
)
SEGMENT = SegmentLimit(name="young", where="attributes['age'] = 'young'", max_recipients=20)
POOLED: dict[str, Any] = {"budget_amount": 30.0, "margin_amount": 4.0, "explore_share": 0.05}
OTHER = CouponOption(coupon_id="other", discount_amount=1.0, target_id="19", stock=30)
SHAPES: dict[str, dict[str, Any]] = {
    "pooled": POOLED,
    "coupons": POOLED | {"coupons": COUPONS},
    "targets": POOLED | {"coupons": (*COUPONS, OTHER)},
    "segments": POOLED | {"coupons": COUPONS, "segments": (SEGMENT,)},
}


class Shop:
    """Users with true chances, some of them excluded, and what a model makes of the chances."""

    def __init__(self, seed: int, size: int, noise: float) -> None:
        draw = random.Random(seed)
        self.users = [f"u{number:03d}" for number in range(size)]
        self.chance = {user: draw.betavariate(1, 6) for user in self.users if draw.random() < 0.95}
        self.other = {user: draw.betavariate(1, 5) for user in self.users}
        self.other_score = {
            user: min(max(self.other[user] + noise * draw.gauss(0, 1), 0.0), 1.0) for user in self.users
        }
        self.score = {
            user: min(max(self.chance.get(user, 0.0) + noise * draw.gauss(0, 1), 0.0), 1.0)
            for user in self.users
        }
        self.reason = {user: draw.choice([None] * 6 + ["bounce"]) for user in self.users}
        self.is_young = {user: draw.random() < 0.5 for user in self.users}

    def master(self, spark: SparkSession) -> DataFrame:
        rows = [(user, {"age": "young" if self.is_young[user] else "old"}) for user in self.users]
        return literals.frame(spark, rows, MASTER)

    def chances(self, spark: SparkSession) -> DataFrame:
        rows = [(user, "18", chance) for user, chance in self.chance.items()]
        rows += [(user, "19", chance) for user, chance in self.other.items()]
        return literals.frame(spark, rows, "user_id string, campaign_id string, p1 double")

    def ledger(self, spark: SparkSession, section: SelectionConfig) -> DataFrame:
        rows = [
            (
                user,
                self.score[user],
                self.score[user],
                self.reason[user],
                {"18": self.score[user], "19": self.other_score[user]},
            )
            for user in self.users
        ]
        schema = (
            "user_id string, conversion_probability double, score double, reason string, "
            "target_probabilities map<string,double>"
        )
        users = literals.frame(spark, rows, schema).join(self.master(spark), "user_id")
        allocated = selection.allocate(users, "18", section)
        decided = selection.with_decision(users, "18", section, allocated)
        return decided.select("user_id", "reason", "would_select", "coupon_id")


def true_profit(shop: Shop, user: str, coupon: CouponOption) -> float:
    chance = shop.other[user] if coupon.target_id else shop.chance.get(user, 0.0)
    return min(chance * coupon.response_scale, 1.0) * (4.0 - coupon.discount_amount) - 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_profit_by_the_true_chances_is_a_plain_sum(spark: SparkSession, shape: str) -> None:
    section, shop = SelectionConfig(**SHAPES[shape]), Shop(1, 160, noise=0.05)
    ledger = shop.ledger(spark, section)
    found = hindsight.compare(ledger, shop.master(spark), shop.chances(spark), "18", section)
    offers = {coupon.coupon_id: coupon for coupon in section.coupons} or {
        None: CouponOption(coupon_id="pooled", discount_amount=section.discount_amount)
    }
    rows = [row for row in ledger.collect() if row.reason != "bounce"]
    chosen = [(row.user_id, offers[row.coupon_id]) for row in rows if row.would_select]
    profit = sum(true_profit(shop, user, coupon) for user, coupon in chosen)
    drawn = sum(
        sum(true_profit(shop, row.user_id, coupon) for row in rows) / len(rows) for _, coupon in chosen
    )
    assert (found["num_eligible"], found["num_chosen"]) == (len(rows), len(chosen))
    assert found["chosen_profit_amount"] == pytest.approx(profit, abs=1e-4)
    assert found["random_profit_amount"] == pytest.approx(drawn, abs=1e-3)
    assert found["random_profit_amount"] < found["chosen_profit_amount"] < found["best_profit_amount"]
    share = found["chosen_profit_amount"] / found["best_profit_amount"]
    assert found["share_of_best"] == pytest.approx(share)
    gain = found["best_profit_amount"] - found["random_profit_amount"]
    assert found["share_of_gain"] == pytest.approx(
        (found["chosen_profit_amount"] - found["random_profit_amount"]) / gain
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_who_knows_the_chances_makes_the_best_choice(spark: SparkSession, shape: str) -> None:
    section, shop = SelectionConfig(**SHAPES[shape]), Shop(2, 120, noise=0.0)
    found = hindsight.compare(
        shop.ledger(spark, section), shop.master(spark), shop.chances(spark), "18", section
    )
    assert found["chosen_profit_amount"] == found["best_profit_amount"] > 0
    assert found["num_chosen"] == found["num_best"]
    assert found["share_of_best"] == found["share_of_gain"] == 1.0


@pytest.mark.parametrize("shape", ["pooled", "segments"])
def test_nobody_eligible_has_no_share(spark: SparkSession, shape: str) -> None:
    section = SelectionConfig(**SHAPES[shape])
    ledger = literals.frame(spark, [("u1", "bounce", False, None)], LEDGER)
    shop = Shop(3, 2, noise=0.0)
    found = hindsight.compare(ledger, shop.master(spark), shop.chances(spark), "18", section)
    assert (found["num_eligible"], found["num_chosen"], found["num_best"]) == (0, 0, 0)
    assert found["best_profit_amount"] == found["chosen_profit_amount"] == found["random_profit_amount"] == 0
    assert found["share_of_best"] is found["share_of_gain"] is None
