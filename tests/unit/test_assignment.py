import hashlib
from collections import Counter

import pytest

from couponflow.campaign import assignment
from couponflow.sections import SelectionConfig

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
