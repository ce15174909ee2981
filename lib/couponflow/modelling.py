"""The sections of the config that shape a model beside its network: boosted trees, and the calibrator."""

from typing import Literal

from pydantic import Field, model_validator

from couponflow.values import Section


class BoostingConfig(Section):
    """Used by train of the boosted trees."""

    max_trees: int = Field(
        default=500, ge=1, le=100_000, description="Upper bound of trees; validation log loss stops earlier."
    )
    patience: int = Field(
        default=20, ge=1, description="Trees without a better validation log loss before stopping."
    )
    learning_rate: float = Field(
        default=0.05, gt=0.0, le=1.0, description="Share of each tree that is added. Lower needs more trees."
    )
    max_leaves: int = Field(default=8, ge=2, le=1024, description="Leaves of a tree. Higher fits finer.")
    min_leaf_rows: int = Field(
        default=20, ge=1, description="Rows a leaf needs. Higher ignores what few rows show."
    )
    l2: float = Field(default=1.0, ge=0.0, description="L2 penalty on the values of leaves.")


class CalibrationConfig(Section):
    """Used by train and ``couponflow models recalibrate``: from a model's logits to probabilities."""

    method: Literal["platt", "temperature", "isotonic", "none"] = Field(
        default="platt",
        description="The map fitted on validation rows. temperature cannot move the base rate, isotonic "
        "needs isotonic_positives, none only undoes sampled negatives.",
    )
    by: Literal["none", "campaign_type"] = Field(
        default="none",
        description="campaign_type: an intercept per type, from 200 positives on a slope too. platt only.",
    )
    prior: Literal["none", "latest_matured"] = Field(
        default="none",
        description="latest_matured: move each campaign type to the conversion rate of its latest campaign "
        "whose labels are final.",
    )
    isotonic_positives: int = Field(
        default=1000, ge=2, description="Positives below which method isotonic is refused."
    )

    @property
    def needs_types(self) -> bool:
        """Whether a calibrator is fitted with the campaign type of each row."""
        return self.by != "none" or self.prior != "none"

    @model_validator(mode="after")
    def _fits_together(self) -> "CalibrationConfig":
        if self.by != "none" and self.method != "platt":
            raise ValueError("by = 'campaign_type' needs method = 'platt'; set one of them")
        return self
