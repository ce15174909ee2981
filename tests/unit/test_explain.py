"""A decision in words, for each outcome."""

from typing import Any

import pytest

from couponflow.campaign import explain


def facts(**over: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "campaign_id": "5",
        "run_date": "2024-02-20",
        "is_mailed": True,
        "would_select": True,
        "reason_label": "Mailed",
        "arm": "treat",
        "coupon_id": "c1",
        "audience_rank": 7,
        "conversion_probability": 0.125,
        "score_rank": 12,
        "num_scored": 2469,
        "model_version": "dien-0",
        "is_cold_start": False,
    }
    return base | over


def event(effect: float, attention: float | None = 0.25) -> dict[str, Any]:
    named = {"item": "i1", "category": "shoes", "shop": "s1", "event_type": "view", "age_days": 3.2}
    return named | {"effect": effect, "attention": attention}


@pytest.mark.parametrize(
    ("over", "first"),
    [
        ({}, "Gets the mail of campaign 5 on 2024-02-20 with c1, as number 7 of the list."),
        ({"coupon_id": None}, "with the pooled coupon, as number 7"),
        ({"is_mailed": False, "arm": "holdout"}, "is withheld to measure it (holdout)"),
        (
            {"is_mailed": False, "would_select": False, "reason_label": "Complained"},
            "Gets no mail of campaign 5 on 2024-02-20: complained.",
        ),
    ],
)
def test_the_decision_comes_first(over: dict[str, Any], first: str) -> None:
    lines = explain.in_words(facts(**over))
    assert first in lines[0]
    assert lines[1] == "Converts with a probability of 12.5% (rank 12 of 2,469, model dien-0)."


def test_what_a_score_rests_on_is_told_the_strongest_first() -> None:
    events = [event(0.001), event(-0.02), event(0.00001), event(0.01, None)]
    lines = explain.in_words(facts(events=events, aggregates={"recency_days": 0.03, "tenure_days": -0.2}))
    assert lines[2:] == [
        "Without one event the probability would change the most by:",
        "  -2.00%  view of item i1 (category shoes), 3 days before, attention 0.250",
        "  +1.00%  view of item i1 (category shoes), 3 days before",
        "  +0.10%  view of item i1 (category shoes), 3 days before, attention 0.250",
        "Against an average user the aggregates that move it the most are:",
        "  -20.00%  tenure_days",
        "  +3.00%  recency_days",
    ]
    quiet = explain.in_words(facts(events=[event(0.00002)]))
    assert quiet[2:] == ["No single event moves it by as much as 0.01 points."]


def test_a_user_without_a_score_or_a_past_is_told_so() -> None:
    unscored = facts(is_mailed=False, would_select=False, reason_label="No usable score")
    assert explain.in_words(unscored | {"conversion_probability": None})[1:] == ["Has no score."]
    assert "new user" in explain.in_words(facts(is_cold_start=True))[2]
