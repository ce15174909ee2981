"""A slow, obvious cleaner of delivered events in plain Python; no code shared with the package."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

TYPES = ("view", "search", "favourite", "cart", "purchase", "mail_open", "mail_click")
WITH_ITEM = ("view", "favourite", "cart", "purchase")
ABSENT = (None, "")


def to_time(value: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def is_odd(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def refusal(row: dict[str, Any], ingest_date: date, zone: str, lateness: int) -> str | None:
    """Why a delivered row is refused; rules read one by one, in their order."""
    if isinstance(row["price"], str) or isinstance(row["quantity"], str):
        return "malformed_record"
    if any(is_odd(row[name]) for name in ("discount_amount", "coupon_amount", "coupon_match_amount")):
        return "malformed_record"
    if row["shop_id"] == "TILL":
        return "till_line"
    if row["user_id"] in ABSENT and row["visitor_id"] in ABSENT:
        return "missing_user"
    if row["event_id"] in ABSENT:
        return "missing_event_id"
    if row["event_type"] not in TYPES:
        return "unknown_event_type"
    event, ingest = to_time(row["event_time"]), to_time(row["ingest_time"])
    if event is None or ingest is None:
        return "bad_time"
    if not 2000 <= event.astimezone(UTC).year <= 2098 or not 2000 <= ingest.astimezone(UTC).year <= 2098:
        return "clock_skew"
    day = event.astimezone(ZoneInfo(zone)).date()
    if event - ingest > timedelta(hours=1) or day > ingest_date + timedelta(days=1):
        return "future_event"
    if (ingest_date - day).days > lateness:
        return "too_late"
    if row["event_type"] in WITH_ITEM and (row["item_id"] in ABSENT or row["category_id"] in ABSENT):
        return "missing_item"
    if row["price"] is not None and (row["price"] < 0 or is_odd(row["price"])):
        return "negative_price"
    if row["quantity"] is not None and row["quantity"] < 0:
        return "negative_quantity"
    return None


class Outcome:
    """What a delivery must become: winners by (ingest date, event id), counters, refused positions."""

    def __init__(self) -> None:
        self.winners: dict[tuple[date, str], tuple[date, str, int]] = {}
        self.refused: dict[tuple[date, str, int], str] = {}
        self.exact = self.conflicting = self.erased = 0
        self.links: dict[tuple[str, str, date], datetime] = {}


def clean(
    rows: dict[tuple[date, str, int], dict[str, Any]], erased: set[str], zone: str, lateness: int
) -> Outcome:
    """Clean delivered rows, each under (ingest date, file, position)."""
    found = Outcome()
    groups: dict[tuple[date, str], list[tuple[datetime | None, tuple[date, str, int]]]] = defaultdict(list)
    for place, row in rows.items():
        if row["user_id"] in erased or row["visitor_id"] in erased:
            found.erased += 1
            continue
        reason = refusal(row, place[0], zone, lateness)
        if reason:
            found.refused[place] = reason
        else:
            groups[place[0], row["event_id"]].append((to_time(row["ingest_time"]), place))
    for name, copies in groups.items():
        winner = max(copies, key=lambda copy: (copy[0], copy[1][1], copy[1][2]))[1]
        found.winners[name] = winner
        for _, place in copies:
            if place != winner:
                is_exact = content(rows[place]) == content(rows[winner])
                found.exact += is_exact
                found.conflicting += not is_exact
    for winner in found.winners.values():
        row = rows[winner]
        if row["user_id"] not in ABSENT and row["visitor_id"] not in ABSENT:
            link = (row["visitor_id"], row["user_id"], winner[0])
            time = to_time(row["ingest_time"])
            assert time is not None
            found.links[link] = min(found.links.get(link, time), time)
    return found


def content(row: dict[str, Any]) -> dict[str, Any]:
    """What makes two copies equal: everything but when they were delivered."""
    shown = {name: value for name, value in row.items() if name != "ingest_time"}
    return shown | {
        "event_time": to_time(row["event_time"]),
        "user_id": row["user_id"] or f"visitor:{row['visitor_id']}",
        "visitor_id": row["visitor_id"] or None,
    }


def exclusion(events: list[dict[str, Any]], zone: str, rules: dict[str, Any]) -> str | None:
    """Why one user's day is left out; ``events`` are its rows of the ``events`` table."""
    if events[0]["user_id"] in rules["staff_user_ids"]:
        return "staff"
    seen = [e for e in events if is_in_time(e, zone)]
    acts = sorted((e for e in seen if e["event_type"] != "purchase"), key=lambda e: e["event_time"])
    has_purchase = len(acts) < len(seen)
    if sum(bool(e["is_automated"]) for e in seen) > rules["bot_agent_share"] * len(seen):
        return "bot"
    if rules["bot_max_events"] and len(acts) > rules["bot_max_events"] and not has_purchase:
        return "bot"
    is_busy = len(acts) > rules["bot_min_events"]
    gaps = sorted(seconds(a, b) for a, b in itertools.pairwise(acts))
    if rules["bot_gap_seconds"] and is_busy and gaps[len(gaps) // 2] <= rules["bot_gap_seconds"]:
        return "bot"
    items = [(e["item_id"], e["category_id"]) for e in acts if e["item_id"] is not None]
    is_narrow = 0 < len(set(items)) <= rules["bot_max_items"] and len(items) > rules["bot_min_events"]
    categories = {e["category_id"] for e in acts} - {None}
    is_wide = rules["bot_max_categories"] and is_busy and len(categories) > rules["bot_max_categories"]
    if (is_narrow or is_wide) and not has_purchase:
        return "bot"
    clicks = [e for e in acts if e["event_type"] == "mail_click"]
    opens = [e for e in acts if e["event_type"] == "mail_open"]
    soon, size = rules["scanner_click_seconds"], rules["scanner_min_clicks"]
    if soon and any(0 <= seconds(o, c) <= soon for o in opens for c in clicks):
        return "scanner"
    for first in clicks if size > 1 else []:
        near = [c for c in clicks if 0 <= seconds(first, c) <= rules["scanner_burst_seconds"]]
        if len(near) >= size:
            return "scanner"
    return None


def seconds(a: dict[str, Any], b: dict[str, Any]) -> float:
    gap: timedelta = b["event_time"] - a["event_time"]
    return gap.total_seconds()


def is_in_time(event: dict[str, Any], zone: str) -> bool:
    delivered = event["ingest_time"].astimezone(ZoneInfo(zone)).date()
    return bool(max(event["ingest_date"], delivered) <= event["event_date"])


def count_reasons(refused: dict[Any, str]) -> Counter[str]:
    return Counter(refused.values())


Draw = Callable[[list[Any]], Any]
