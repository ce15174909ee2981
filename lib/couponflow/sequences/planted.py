"""Facts that the leak audit plants around a cut-off, as rows of the tables; plain Python.

A row leaves ``user_id`` empty: the audit gives it to every sampled user, and makes its key unique per user.
"""

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from couponflow.dates import local_day
from couponflow.lake import layouts

Facts = dict[str, list[dict[str, Any]]]
_DAY, _HOUR = timedelta(days=1), timedelta(hours=1)
#: Events of a burst on the day before that arrives late: were it seen, the day would be a bot's.
_BURST = 150


@dataclass(frozen=True)
class Question:
    """What is audited: a campaign at the start of a day, and a category and item of its target."""

    campaign_id: str
    day: date
    as_of: datetime
    time_zone: str
    category_id: str
    item_id: str

    def local(self, instant: datetime) -> date:
        """The business day of an instant."""
        return local_day(instant, self.time_zone)


def facts_from_then_on(question: Question) -> Facts:
    """Facts that nobody could know at the start of the day, the closest ones at the very instant."""
    as_of, day = question.as_of, question.day
    moments = [  # event time, delivery, day of the file
        (as_of, as_of, day),
        (as_of - _HOUR, as_of, day),
        (as_of - 3 * _HOUR, as_of - 3 * _HOUR, day),  # filed on the day itself
        (as_of - 40 * _DAY, as_of + 10 * _DAY, day + 10 * _DAY),
        (as_of + 5 * _DAY, as_of + 5 * _DAY, day + 5 * _DAY),
    ]
    burst = [
        _event(question, f"burst {n}", "view", as_of - 2 * _HOUR + timedelta(milliseconds=n), as_of, day)
        for n in range(_BURST)
    ]
    events = [
        _event(question, f"{kind} {n}", kind, *moment)
        for kind in layouts.EVENT_TYPES
        for n, moment in enumerate(moments)
    ]
    # A visitor who turns out to be the user when the day has begun.
    alias = {"user_id": "visitor:planted:", "visitor_id": "planted"}
    before = as_of - 2 * _DAY
    anonymous = _event(question, "anonymous", "purchase", before, before, question.local(before)) | alias
    link = {"visitor_id": "planted", "linked_time": as_of, "ingest_date": day}
    return {
        "events": [*events, *burst, anonymous],
        "identity_links": [link],
        "sends": [_send(question, f"{n}", time, filed) for n, (time, _, filed) in enumerate(moments)],
        "redemptions": [
            _redemption(question, f"{n}", time, filed) for n, (time, _, filed) in enumerate(moments)
        ],
        "orders": [_returned(question, f"{n}", time, filed) for n, (time, _, filed) in enumerate(moments)]
        + [_returned(question, "told before", as_of, question.local(as_of - _HOUR))],
    }


def facts_before(question: Question) -> Facts:
    """Facts that were known in time: each must change features."""
    time = question.as_of - 2 * _DAY
    filed = question.local(time)
    events = [_event(question, kind, kind, time, time, filed) for kind in layouts.EVENT_TYPES]
    return {
        "events": events,
        "sends": [_send(question, "before", time, filed)],
        "redemptions": [_redemption(question, "before", time, filed)],
        "orders": [_returned(question, "before", time, filed)],
        # Told a day before its first delivery, this is the campaign.
        "campaigns": [
            {
                "campaign_id": question.campaign_id,
                "campaign_type": "planted",
                "start_date": question.day,
                "end_date": question.day + 400 * _DAY,
                "coupons": [("planted", question.category_id, [question.item_id])] * 3,
                "ingest_date": date(1900, 1, 1),
            }
        ],
    }


def _event(
    question: Question, name: str, kind: str, time: datetime, delivered: datetime, filed: date
) -> dict[str, Any]:
    has_item = kind in ("view", "favourite", "cart", "purchase")
    is_line = kind == "purchase"
    return {
        "event_id": f"planted {name}",
        "event_type": kind,
        "event_time": time,
        "ingest_time": delivered,
        "item_id": question.item_id if has_item else None,
        "category_id": question.category_id if has_item else None,
        "shop_id": "planted" if has_item else None,
        "order_id": f"planted {name}" if is_line else None,
        "price": 99.0 if is_line else None,
        "quantity": 1 if is_line else None,
        "discount_amount": 1.0 if is_line else None,
        "coupon_amount": 2.0 if is_line else None,
        "coupon_match_amount": 3.0 if is_line else None,
        "is_automated": False,
        "event_date": question.local(time),
        "ingest_date": filed,
    }


def _send(question: Question, name: str, time: datetime, filed: date) -> dict[str, Any]:
    return {
        "send_id": f"planted {name}",
        "campaign_id": question.campaign_id,
        "delivered_time": time,
        "send_date": question.local(time),
        "ingest_date": filed,
    }


def _redemption(question: Question, name: str, time: datetime, filed: date) -> dict[str, Any]:
    return {
        "redemption_id": f"planted {name}",
        "campaign_id": question.campaign_id,
        "coupon_id": "planted",
        "redemption_time": time,
        "ingest_date": filed,
    }


def _returned(question: Question, name: str, time: datetime, filed: date) -> dict[str, Any]:
    return {
        "order_id": f"planted {name}",
        "order_time": question.as_of - 50 * _DAY,
        "total_amount": 77.0,
        "order_status": "returned",
        "status_time": time,
        "ingest_date": filed,
    }
