import hashlib
import math
from collections import Counter

import pytest

from couponflow.campaign.choice import assignment
from couponflow.campaigning import SelectionConfig

USERS = [f"user-{n}" for n in range(20_000)]


def test_unit_hash_is_the_first_eight_bytes_of_sha256() -> None:
    digest = hashlib.sha256(b"salt|u1").digest()
    assert assignment.unit_hash("salt", "u1") == pytest.approx(
        int.from_bytes(digest[:8], "big") / 2**64, abs=2**-52
    )
    assert all(0.0 <= assignment.unit_hash("s", user) < 1.0 for user in USERS)


def test_tie_key_orders_like_the_number() -> None:
    number = int.from_bytes(hashlib.sha256(b"18:u1").digest()[:8], "big")
    assert int(assignment.tie_key("18", "u1"), 16) == number
    assert len(assignment.tie_key("18", "u1")) == 16


def test_arms_have_their_shares_and_propensities_add_up() -> None:
    section = SelectionConfig(control_share=0.2, holdout_share=0.1)
    arms = Counter(assignment.deal_arm("18", user, section) for user in USERS)
    for arm in (assignment.TREAT, assignment.CONTROL, assignment.HOLDOUT):
        share = assignment.propensity(arm, section)
        # six standard deviations of a share over 20,000 users
        assert arms[arm] / len(USERS) == pytest.approx(
            share, abs=6 * (share * (1 - share) / len(USERS)) ** 0.5
        )
    assert sum(assignment.propensity(a, section) for a in ("treat", "control", "holdout")) == pytest.approx(1)
    assert assignment.propensity("none", section) == 1.0


def test_a_share_of_those_not_selected_is_mailed_at_random_and_nobody_of_the_holdout() -> None:
    section = SelectionConfig(control_share=0.2, holdout_share=0.1, explore_share=0.05)
    dealt = {user: assignment.deal_arm("18", user, section, is_selected=False) for user in USERS}
    assert set(dealt.values()) == {"explore", "none"}
    for arm in ("explore", "none"):
        share = assignment.propensity(arm, section)
        found = list(dealt.values()).count(arm) / len(USERS)
        assert found == pytest.approx(share, abs=6 * (share * (1 - share) / len(USERS)) ** 0.5)
    assert assignment.propensity("explore", section) == pytest.approx(0.9 * 0.05)
    assert assignment.propensity("explore", section) + assignment.propensity("none", section) == 1.0
    explored = {user for user, arm in dealt.items() if arm == "explore"}
    selected = {user: assignment.deal_arm("18", user, section) for user in USERS}
    assert "holdout" not in {selected[user] for user in explored}
    # The draw is one of its own: neither the control nor the draw of another campaign goes with it.
    assert {"treat", "control"} == {selected[user] for user in explored}
    again = {
        user for user in USERS if assignment.deal_arm("19", user, section, is_selected=False) == "explore"
    }
    assert len(explored & again) < 0.2 * len(explored)
    nobody = section.model_copy(update={"explore_share": 0.0})
    assert {assignment.deal_arm("18", user, nobody, is_selected=False) for user in USERS} == {"none"}


def test_the_holdout_is_stable_when_the_list_grows() -> None:
    section = SelectionConfig(holdout_share=0.1)
    before = {user: assignment.deal_arm("18", user, section) for user in USERS[:5000]}
    after = {user: assignment.deal_arm("18", user, section) for user in reversed(USERS)}
    assert {user: after[user] for user in before} == before


def test_srm_equals_the_known_value() -> None:
    """[treat 40, control 60] of halves: (10^2 + 10^2) / 50 = 4 with one degree of freedom, p = .0455."""
    halves = SelectionConfig(control_share=0.5)
    assert assignment.srm_p_value({"treat": 40, "control": 60}, halves) == pytest.approx(0.04550026, rel=1e-6)
    # Three arms of .72, .18, .10: 1,000 dealt as 700, 190, 110 is 0.5556 + 0.5556 + 1, two degrees.
    three = SelectionConfig(control_share=0.2, holdout_share=0.1)
    found = assignment.srm_p_value({"treat": 700, "control": 190, "holdout": 110}, three)
    assert found == pytest.approx(math.exp(-(400 / 720 + 100 / 180 + 100 / 100) / 2), rel=1e-9)


@pytest.mark.parametrize(
    ("counts", "over", "expected"),
    [
        ({}, {"control_share": 0.5}, 1.0),
        ({"treat": 9}, {"control_share": 0.0}, 1.0),  # one arm: nothing to compare
        ({"treat": 50, "control": 50, "explore": 999, "none": 5}, {"control_share": 0.5}, 1.0),
        ({"treat": 9, "control": 1}, {"control_share": 0.0}, 0.0),  # an arm that nobody was to be in
    ],
)
def test_srm_at_the_edges(counts: dict[str, int], over: dict[str, float], expected: float) -> None:
    assert assignment.srm_p_value(counts, SelectionConfig(**over)) == expected


def test_srm_finds_a_broken_split_and_seldom_doubts_a_good_one() -> None:
    section = SelectionConfig(control_share=0.3, holdout_share=0.1)
    doubted = 0
    for campaign in range(200):
        arms = Counter(assignment.deal_arm(str(campaign), user, section) for user in USERS[:1000])
        doubted += assignment.srm_p_value(arms, section) < 0.05
    # The holdout is common to all campaigns, so their p-values hang together; 10 are expected.
    assert doubted <= 30
    arms = Counter(assignment.deal_arm("18", user, section) for user in USERS)
    assert assignment.srm_p_value(arms, section) > assignment.SRM_LIMIT
    arms["control"] -= arms["control"] // 10  # a tenth of the control has got lost
    assert assignment.srm_p_value(arms, section) < assignment.SRM_LIMIT


def test_the_holdout_is_the_same_in_every_campaign_and_the_control_is_not() -> None:
    section = SelectionConfig(control_share=0.5, holdout_share=0.1)
    arms = {c: {u: assignment.deal_arm(c, u, section) for u in USERS[:2000]} for c in ("18", "19")}
    held = {c: {u for u, arm in a.items() if arm == "holdout"} for c, a in arms.items()}
    assert held["18"] == held["19"] != set()
    assert {u for u, a in arms["18"].items() if a == "control"} != {
        u for u, a in arms["19"].items() if a == "control"
    }


def test_a_new_salt_deals_new_arms_and_shares_only_grow_an_arm() -> None:
    base = SelectionConfig(control_share=0.1)
    more = SelectionConfig(control_share=0.2)
    salted = SelectionConfig(control_share=0.1, salt="other")
    control = {u for u in USERS[:5000] if assignment.deal_arm("18", u, base) == "control"}
    assert control < {u for u in USERS[:5000] if assignment.deal_arm("18", u, more) == "control"}
    assert control != {u for u in USERS[:5000] if assignment.deal_arm("18", u, salted) == "control"}


@pytest.mark.parametrize(("share", "arm"), [(0.0, "treat"), (1.0, "control")])
def test_extreme_shares(share: float, arm: str) -> None:
    section = SelectionConfig(control_share=share)
    assert {assignment.deal_arm("18", user, section) for user in USERS[:500]} == {arm}
