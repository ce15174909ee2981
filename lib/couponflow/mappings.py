"""Config section ``feeds``: a sender's own column names and unit of time, checked against the contract."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from couponflow.lake import contracts
from couponflow.values import Section


class FeedMapping(Section):
    """How a sender delivers one feed."""

    columns: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default={}, description="Declared column = the sender's name of it; others keep their name."
    )
    time_unit: Literal["iso", "s", "ms"] = Field(
        default="iso", description="Times are ISO-8601 text, or seconds or milliseconds since 1970 UTC."
    )

    def delivered(self, name: str) -> str:
        """The sender's name of a declared column."""
        return self.columns.get(name, name)


def _mapping(feed: str) -> FeedMapping:
    field: FeedMapping = Field(
        default=FeedMapping(), description=f"Column names and unit of time of feed {feed}."
    )
    return field


class FeedsConfig(Section):
    """Used by clean_events and clean_feeds; one mapping per raw feed."""

    events: FeedMapping = _mapping("events")
    orders: FeedMapping = _mapping("orders")
    redemptions: FeedMapping = _mapping("redemptions")
    sends: FeedMapping = _mapping("sends")
    campaigns: FeedMapping = _mapping("campaigns")
    consents: FeedMapping = _mapping("consents")
    users: FeedMapping = _mapping("users")
    catalogue: FeedMapping = _mapping("catalogue")
    costs: FeedMapping = _mapping("costs")

    @model_validator(mode="after")
    def _of_the_contract(self) -> "FeedsConfig":
        wrong = [contracts.check_mapping(name, self.of(name).columns) for name in contracts.FEEDS]
        if any(wrong):
            raise ValueError("; ".join(filter(None, wrong)))
        return self

    def of(self, feed: str) -> FeedMapping:
        """The mapping of one feed."""
        mapping: FeedMapping = getattr(self, feed)
        return mapping
