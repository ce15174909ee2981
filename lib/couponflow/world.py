"""The config section of the synthetic shop: every dial of its users, campaigns and dirt.

The defaults are those of the measured world: DIN and DIEN have something to find, and nothing in it is
special to a test. ``--set world.order_share=0.7`` turns one dial.
"""

from typing import Annotated, Literal

from pydantic import Field

from couponflow.values import Day, Loose, Section, Share


class Incident(Section):
    """Something that happened to the synthetic shop, or to its delivery, on one or several days."""

    kind: Literal[
        "outage", "ramp", "conversion_drop", "sale", "holiday", "missing_day", "double_load", "stale_copy"
    ] = Field(
        description="outage, ramp (daily worse), conversion_drop; missing_day, double_load, stale_copy of "
        "the events feed; sale and holiday are no incidents, and a monitor must know them."
    )
    date: Day = Field(description="First day.")
    days: int = Field(default=1, ge=1, le=3_660, description="Number of days.")
    size: Share | None = Field(
        default=None,
        description="Share lost (ramp: per day; sale: gained); null is the usual one of its kind.",
    )


class WorldConfig(Section):
    """Used by ``couponflow land synthetic``: how users behave, what campaigns do, what delivery spoils."""

    rate: float = Field(default=0.35, gt=0.0, le=50.0, description="Mean visits of a user per day.")
    drift: Share = Field(
        default=0.12, description="Chance per day that the current interest moves on; 0 freezes interests."
    )
    return_share: Share = Field(default=0.35, description="Share of these moves that go back to a habit.")
    jump: Share = Field(default=0.02, description="Chance per day of a move to any category.")
    second_order: bool = Field(
        default=False,
        description="The next interest depends on the previous and the current one (3 allowed) instead of on "
        "the current one alone.",
    )
    base: float = Field(default=-3.3, description="Log-odds. Of a conversion before any effect.")
    habit: float = Field(default=0.6, description="Log-odds. A target among the three long-term interests.")
    popularity: float = Field(default=0.3, description="Log-odds per unit of log popularity of the target.")
    activity: float = Field(default=0.5, description="Log-odds per unit of log visits per day.")
    local: float = Field(default=1.5, description="Log-odds. A target that is the current interest.")
    chain: float = Field(default=1.5, description="Log-odds. A target that may be the next interest.")
    period: float = Field(default=1.2, description="Log-odds. A periodic need that is due within 7 days.")
    momentum: float = Field(
        default=0.0,
        description="Log-odds per visit. Visits to the target in the last 3 sessions less those in the 3 "
        "before; for half of the categories the other way round. 1.5 is strong.",
    )
    recency: float = Field(
        default=0.0, description="Log-odds per unit of log events with the target in the last 28 days."
    )
    order_share: Share = Field(
        default=0.0,
        description="Share of users with sessions whose order alone tells what they want; 0: none.",
    )
    order: float = Field(
        default=3.0, description="Log-odds of that rule; 0 keeps its sessions and takes away their effect."
    )
    order_pairs: int = Field(default=3, ge=1, le=15, description="Category pairs of that rule.")
    order_day_share: Share = Field(default=0.3, description="Chance per day of such a session.")
    order_views: int = Field(default=2, ge=1, le=50, description="Views of each of its two blocks.")
    order_extra: int = Field(default=0, ge=0, le=50, description="Other views mixed into it.")
    order_flip: Share = Field(default=0.3, description="Chance that the next one is the other way round.")
    order_fresh_days: int = Field(default=7, ge=1, le=60, description="Days for which the rule holds.")
    campaigns: Literal["sets", "candidates"] = Field(
        default="sets",
        description="sets: one campaign of 2 or 3 categories for everybody at a time; candidates: one "
        "campaign per category, for the users of whom it is one of num_candidates targets.",
    )
    campaign_first_day: int = Field(default=10, ge=1, description="Days before the first campaign.")
    campaign_every_days: int = Field(default=10, ge=1, description="Days from one campaign to the next.")
    campaigns_at_once: int = Field(
        default=1, ge=1, le=10, description="Campaigns that start on the same day; for campaigns = 'sets'."
    )
    num_candidates: int = Field(default=6, ge=3, le=12, description="Targets of a user per campaign day.")
    assignment: Literal["randomised", "confounded"] = Field(
        default="randomised",
        description="Who is mailed: anybody with chance treat_share, or rather those who spent much, with a "
        "chance that the log does not tell.",
    )
    treat_share: Share = Field(default=0.8, description="Chance of being mailed; the others are a holdout.")
    open_share: Share = Field(
        default=0.25, description="Least chance that a mail is opened; 0 lands no mail events of people."
    )
    cancel_share: Share = Field(default=0.02, description="Share of orders cancelled on the next day.")
    take_back_share: Share = Field(default=0.05, description="Share of orders returned within two weeks.")
    incidents: Annotated[tuple[Incident, ...], Loose] = Field(
        default=(), description="What happens on which days."
    )
    is_dirty: bool = Field(default=True, description="Off: no dirt of any kind below, and nothing is late.")
    bot_share: Share = Field(default=0.005, description="Share of users that are bots; as many are crawlers.")
    bot_activity: float = Field(
        default=50.0, ge=1.0, le=1_000.0, description="Events of a bot relative to those of a user."
    )
    heavy_share: Share = Field(
        default=0.004, description="Share of users with 20 visits a day who are no bots."
    )
    scanner_share: Share = Field(default=0.02, description="Share of users behind a mail scanner.")
    staff_share: Share = Field(default=0.0025, description="Share of users that are test accounts.")
    merge_share: Share = Field(default=0.05, description="Share of users who browse before they log in.")
    skew_share: Share = Field(default=0.01, description="Share of users whose clock is an hour off.")
    duplicate_share: Share = Field(default=0.01, description="Share of events delivered twice.")
    retry_share: Share = Field(default=0.005, description="Share delivered again, later and changed.")
    late_share: Share = Field(
        default=0.0217, description="Share delivered after about 15 hours; 0.1 % of all come after 3 days."
    )
    malformed_share: Share = Field(default=0.003, description="Malformed lines per event.")
    drift_day: int = Field(default=60, ge=0, description="Day of the data from which a new column comes.")
    has_odd_hours: bool = Field(default=True, description="One hour is lost, another one delivered twice.")
    has_day_truth: bool = Field(
        default=True, description="Write the interest of every user-day and every event's session to truth/."
    )
    group_shards: int = Field(
        default=20,
        ge=1,
        le=1_000,
        description="Shards of 100 users per file and day. Lower needs less memory and gives more files.",
    )
