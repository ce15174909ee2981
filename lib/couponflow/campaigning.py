"""The sections of the config that shape a campaign: scores, choice, hand-over."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from couponflow.values import Days, Loose, Place, Section, Share


class ScoringConfig(Section):
    """Used by score."""

    model: str = Field(
        default="champion",
        description="'champion', 'challenger', a kind (such as dien or logistic: its newest bundle), or a "
        "model version.",
    )
    arrow_batch_rows: int = Field(
        default=10_000, ge=1, description="Users per Arrow batch; about three batches make a task."
    )
    chunk_rows: int = Field(
        default=4_096, ge=1, description="Users scored at once, sorted by history length. Lower: less memory."
    )
    part_users: int = Field(
        default=1_000_000,
        ge=1,
        description="Users of a part. A run that was killed keeps its finished parts; lower loses less.",
    )
    max_row_change_share: Share = Field(
        default=0.2,
        description="Share by which the number of scored users may differ from the campaign's last scores.",
    )
    max_mean_ratio: float = Field(
        default=4.0,
        ge=1.0,
        description="Factor by which the mean probability may differ from the rate of the rows that "
        "calibrated the model, up or down.",
    )
    max_psi: float = Field(
        default=0.25,
        ge=0.0,
        description="Population stability index allowed against the campaign's last scores; above .25 the "
        "population counts as another one.",
    )

    def num_tasks(self, num_users: int) -> int:
        """Tasks of so many users: by their number alone, so that any cluster makes the same ones.

        Few users are spread over four tasks at most, a batch in each; of many, three batches share the cost
        of a task.
        """
        num_batches = max(1, -(-num_users // self.arrow_batch_rows))
        return max(min(4, num_batches), -(-num_batches // 3))


class CouponOption(Section):
    """One coupon that a user may get in the mail; each user gets one of them, or no mail."""

    coupon_id: str = Field(min_length=1, max_length=128, description="Coupon, as the audience names it.")
    discount_amount: float = Field(ge=0.0, description="Cost of one redemption, configured currency.")
    margin_amount: float | None = Field(
        default=None,
        ge=0.0,
        description="Margin of one conversion before the coupon; without it selection.margin_amount holds.",
    )
    response_scale: float = Field(
        default=1.0,
        ge=0.0,
        le=100.0,
        description="Factor on a user's probability (1 at most) and uplift. Higher for a coupon that more "
        "people redeem than the one the model was trained on.",
    )
    target_id: str = Field(
        default="",
        pattern="^[A-Za-z0-9_.:-]{0,128}$",
        description="Campaign whose target the coupon is for: a user's probability is the one for that "
        "target. Empty: the target of the campaign itself.",
    )
    stock: int | None = Field(
        default=None, ge=0, description="Mails that may carry it; 0 offers it to nobody, without it no limit."
    )


class SegmentLimit(Section):
    """How many selected users may, and have to, be of one segment."""

    name: str = Field(pattern="^[A-Za-z0-9_.:-]{1,64}$", description="Name of the segment in messages.")
    where: str = Field(
        min_length=1,
        description="Spark SQL condition over user_id, attributes, score and conversion_probability; a user "
        "for whom it is null is outside.",
    )
    min_recipients: int = Field(
        default=0, ge=0, description="Selected users it has to have; too many for its limits stop the run."
    )
    max_recipients: int | None = Field(
        default=None, ge=0, description="Selected users it may have; without it no limit."
    )

    @model_validator(mode="after")
    def _in_order(self) -> "SegmentLimit":
        if self.max_recipients is not None and self.max_recipients < self.min_recipients:
            raise ValueError("min_recipients <= max_recipients must hold")
        return self


class SelectionConfig(Section):
    """Used by select_audience."""

    objective: Literal["top_k", "threshold", "expected_profit", "incremental_profit"] = Field(
        default="expected_profit",
        description="What is maximised. top_k, threshold: probability; expected_profit: profit of the mails; "
        "incremental_profit: profit that would not have come without them, which needs uplift scores.",
    )
    coupons: Annotated[tuple[CouponOption, ...], Loose] = Field(
        default=(),
        max_length=32,
        description="Coupons to choose from per user; none: one pooled coupon of discount_amount.",
    )
    segments: Annotated[tuple[SegmentLimit, ...], Loose] = Field(
        default=(), max_length=30, description="Limits on segments of users; a user may be in several."
    )
    max_recipients: int = Field(default=1_000_000, ge=0, description="Upper bound of the list.")
    min_probability: Share = Field(
        default=0.0, description="Users below are not selected when objective = 'threshold'."
    )
    budget_amount: float = Field(
        default=1000.0, ge=0.0, description="Money for expected mail and redemption cost."
    )
    mail_cost_amount: float = Field(default=0.02, ge=0.0, description="Cost of one mail.")
    margin_amount: float = Field(
        default=5.0, ge=0.0, description="Margin of one conversion before the coupon."
    )
    discount_amount: float = Field(default=1.0, ge=0.0, description="Cost of one redeemed coupon.")
    control_share: Share = Field(
        default=0.1, description="Share of the selected users withheld to measure the campaign."
    )
    explore_share: Share = Field(
        default=0.0,
        description="Share of the eligible users not selected that is mailed at random, so that the next "
        "model learns about them too, each with one of the coupons in stock. What they need of every limit "
        "is set aside first: higher leaves less to the selected.",
    )
    holdout_share: Share = Field(default=0.0, description="Share of all users never mailed (global holdout).")
    salt: str = Field(
        default="couponflow",
        min_length=1,
        description="Salt of the assignment hash; a new one deals new arms.",
    )
    consent_channel: str = Field(default="mail", description="Channel for which consent is required.")
    consent_purpose: str = Field(default="marketing", description="Purpose for which consent is required.")
    consent_max_age_hours: int = Field(
        default=24, ge=1, description="Oldest consent snapshot accepted, measured against the run date."
    )
    consent_min_share: Share = Field(
        default=0.5,
        description="A snapshot with fewer users than this share of the user master stops the run.",
    )
    consent_max_drop_share: Share = Field(
        default=0.1,
        description="A snapshot that lacks more than this share of the users of an earlier one (of the last "
        "seven) stops the run; 1 switches the check off. Raise it for one run after a person has confirmed.",
    )
    staff_attributes: Annotated[tuple[Annotated[str, Field(pattern="^[^=]+=[^=]+$")], ...], Loose] = Field(
        default=(),
        description="Attributes of the user master that mark staff and test accounts, as key=value in any "
        "case, such as account=test. events.staff_user_ids are left out as well.",
    )
    reach_attributes: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Loose] = (
        Field(
            default=(),
            max_length=4,
            description="Attributes of the user master, such as age, by whose values record and report tell "
            "whom the campaign reaches. They change nothing of the choice.",
        )
    )
    max_sends: int = Field(
        default=3, ge=1, description="Marketing mails allowed per user in the rolling window."
    )
    cap_days: int = Field(
        default=7, ge=1, le=365, description="Days of the rolling window of the frequency cap."
    )
    min_days_since_mail: int = Field(
        default=0,
        ge=0,
        le=365,
        description="Days that have to lie between two marketing mails to a user; 1 forbids two on one day, "
        "0 switches the rule off.",
    )
    min_days_since_purchase: int = Field(
        default=0,
        ge=0,
        le=365,
        description="Days that have to lie between a user's last order and a mail: with 2, who ordered "
        "yesterday waits. 0 and 1 switch the rule off, as orders of the day itself are not known yet.",
    )
    quiet_days: Days = Field(
        default=(), description="Business days on which nothing is sent; a campaign on one is refused."
    )

    def targets(self, campaign_id: str) -> tuple[str, ...]:
        """The targets that users of a campaign are scored for: its own, then those of its coupons."""
        named = (coupon.target_id or campaign_id for coupon in self.coupons)
        return tuple(dict.fromkeys((campaign_id, *named)))

    @model_validator(mode="after")
    def _are_unique(self) -> "SelectionConfig":
        names = [coupon.coupon_id for coupon in self.coupons], [segment.name for segment in self.segments]
        if any(len(set(listed)) < len(listed) for listed in names):
            raise ValueError("each coupon_id and each segment name may stand once")
        return self

    @model_validator(mode="after")
    def _reach_is_told_once(self) -> "SelectionConfig":
        names = ("history", *self.reach_attributes)
        if len(set(names)) < len(names):
            raise ValueError("reach_attributes: each may stand once, and history is always told")
        return self


class ExportConfig(Section):
    """Used by export_audience."""

    target_uri: Place = Field(
        default="var/export", description="Folder or gs:// prefix for the list and its manifest."
    )
    auto_approve: bool = Field(
        default=False, description="Export without `campaign approve`; for local runs."
    )
    seed_user_ids: Annotated[tuple[Annotated[str, Field(pattern="^[A-Za-z0-9_.:-]{1,128}$")], ...], Loose] = (
        Field(
            default=(),
            description="Pseudonymous ids of seed accounts, mailed with every list and never counted.",
        )
    )
    bigquery_dataset: str = Field(
        default="",
        pattern=r"^$|^[a-z][a-z0-9-]{4,28}[a-z0-9]\.[A-Za-z0-9_]{1,1024}$",
        description="project.dataset into which each list is loaded as a table; empty: files only.",
    )
    bigquery_location: str = Field(
        default="US", pattern="^[A-Za-z0-9-]{2,40}$", description="Where the dataset lies, such as EU."
    )
    bigquery_predictions: bool = Field(
        default=False, description="Load the predictions of the campaign and day into BigQuery as well."
    )
    bigquery_predictions_days: int = Field(
        default=30,
        ge=1,
        le=36_500,
        description="Days after its run date until a day's predictions expire in BigQuery; an older day "
        "is not loaded. Fewer keep less about people. A table takes the value with which it was created.",
    )

    @model_validator(mode="after")
    def _predictions_have_a_dataset(self) -> "ExportConfig":
        if self.bigquery_predictions and not self.bigquery_dataset:
            raise ValueError("bigquery_predictions needs bigquery_dataset")
        if len(set(self.seed_user_ids)) < len(self.seed_user_ids):
            raise ValueError("seed_user_ids names an account twice")
        return self
