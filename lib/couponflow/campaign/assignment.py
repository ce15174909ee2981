"""Who is withheld: arms by salted hash, the same for everyone who asks, with the propensity logged.

An arm is a pure function of (salt, campaign, user): no draw, no state, so that growth of the list or a rerun
never moves a user. The global holdout does not depend on the campaign; a user in it is never mailed by any.
Selection runs first over all eligible users; arms are dealt among the selected only, so that
selected-and-mailed and selected-and-withheld users are comparable.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from couponflow.sections import SelectionConfig

TREAT, CONTROL, HOLDOUT, NONE = "treat", "control", "holdout", "none"
ARMS = (TREAT, CONTROL, HOLDOUT, NONE)

_BITS = 53  # what a double holds exactly; the other 11 of the 8 bytes are dropped


def unit_hash(salt: str, user_id: str) -> float:
    """Map a user to [0, 1): first 8 bytes of SHA-256 of ``salt|user_id``, big-endian, top 53 bits."""
    head = hashlib.sha256(f"{salt}|{user_id}".encode()).digest()[:8]
    return (int.from_bytes(head, "big") >> (64 - _BITS)) / float(1 << _BITS)


def unit_hash_column(salt: str, user_id: Column) -> Column:
    """``unit_hash`` as a Spark expression: equal bit for bit."""
    text = F.sha2(F.concat(F.lit(f"{salt}|"), user_id), 256)
    # conv to base -10 gives the signed reading, which a bigint holds; the unsigned one would overflow.
    bits = F.conv(F.substring(text, 1, 16), 16, -10).cast("bigint")
    return F.shiftrightunsigned(bits, 64 - _BITS) / F.lit(float(1 << _BITS))


def tie_key(campaign_id: str, user_id: str) -> str:
    """Order among equals: first 8 bytes of SHA-256 of ``campaign_id:user_id`` as 16 hex digits."""
    return hashlib.sha256(f"{campaign_id}:{user_id}".encode()).hexdigest()[:16]


def tie_key_column(campaign_id: str, user_id: Column) -> Column:
    """``tie_key`` as a Spark expression; text order equals number order."""
    return F.substring(F.sha2(F.concat(F.lit(f"{campaign_id}:"), user_id), 256), 1, 16)


def deal_arm(campaign_id: str, user_id: str, section: SelectionConfig) -> str:
    """The arm of a selected user."""
    is_holdout = unit_hash(_holdout_salt(section), user_id) < section.holdout_share
    is_control = unit_hash(_control_salt(section, campaign_id), user_id) < section.control_share
    return HOLDOUT if is_holdout else CONTROL if is_control else TREAT


def propensity(arm: str, section: SelectionConfig) -> float:
    """Probability of the arm given that the user was selected; 1 for a user who was not."""
    mailed = 1.0 - section.holdout_share
    return {
        HOLDOUT: section.holdout_share,
        CONTROL: mailed * section.control_share,
        TREAT: mailed * (1.0 - section.control_share),
        NONE: 1.0,
    }[arm]


def with_arm(users: DataFrame, campaign_id: str, section: SelectionConfig) -> DataFrame:
    """Add ``arm`` and ``propensity`` to each user.

    Grain: one row per ``user_id``, as given. Needs ``would_select``; users without it get arm none.
    Rule: holdout before control before treat, as ``deal_arm``.
    """
    user = F.col("user_id")
    is_holdout = unit_hash_column(_holdout_salt(section), user) < section.holdout_share
    is_control = unit_hash_column(_control_salt(section, campaign_id), user) < section.control_share
    arm = (
        F.when(~F.coalesce("would_select", F.lit(False)), NONE)
        .when(is_holdout, HOLDOUT)
        .when(is_control, CONTROL)
        .otherwise(TREAT)
    )
    return users.withColumn("arm", arm).withColumn("propensity", _by_arm(lambda a: propensity(a, section)))


def _by_arm(value: Callable[[str], Any]) -> Column:
    column = F.lit(None)
    for arm in ARMS:
        column = F.when(F.col("arm") == arm, F.lit(value(arm))).otherwise(column)
    return column


def _holdout_salt(section: SelectionConfig) -> str:
    return f"{section.salt}|holdout"


def _control_salt(section: SelectionConfig, campaign_id: str) -> str:
    return f"{section.salt}|{campaign_id}"
