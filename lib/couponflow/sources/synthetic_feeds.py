"""The numbers of the synthetic shop as JSON texts: the columns of each raw feed.

Ids are texts made of numbers (``u000123``, ``v000123``, ``i0042``, ``c07``, ``s01``), so every shard makes
them on its own.
"""

import hashlib
import json
from datetime import timedelta

import numpy as np

from couponflow.lake.layouts import EVENT_TYPES
from couponflow.sources import landing
from couponflow.sources.landing import NULL, Array, Column, numbers, text, texts
from couponflow.sources.synthetic_dirt import NO_TIME
from couponflow.sources.synthetic_rows import (
    CODES,
    DAY_SECONDS,
    HOUR_SECONDS,
    MAIL_CLICK,
    MAIL_OPEN,
    PURCHASE,
    Rows,
    concat,
    take,
)
from couponflow.sources.synthetic_world import (
    CAMPAIGN_DAYS,
    CATEGORIES_PER_SHOP,
    ITEMS_PER_CATEGORY,
    MAIL_COST,
    NUM_CATEGORIES,
    SHARD_USERS,
    STATUS,
    World,
)

DEVICES, CHANNELS = ("app", "web", "tablet"), ("app", "site", "site")
AGENTS = (
    "couponflow-app/3.2 (Android 14)",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) Firefox/121.0",
    "Mozilla/5.0 (iPad; CPU OS 17_2 like Mac OS X) Safari/604.1",
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    "python-requests/2.31.0",
)
#: Texts by type code; the last is what a malformed line says.
TYPE_NAMES = (*EVENT_TYPES, "teleport")
#: The column that comes with ``world.drift_day``.
NEW_COLUMN = "page_layout"
STATUSES = ("placed", "cancelled", "returned")
LONGEST_RETURN_DAYS = 14


def user_id(number: int) -> str:
    """Id of a user."""
    return f"u{number:06d}"


def visitor_id(number: int) -> str:
    """Id of a browser."""
    return f"v{number:06d}"


def event_ids(world: World, rows: Rows) -> list[str]:
    """Ids of events: from the shard and the number in it, so copies share one."""
    pairs = zip((rows["owner"] // SHARD_USERS).tolist(), rows["number"].tolist(), strict=True)
    return [_hash(f"{world.seed}:{shard}:{number}") for shard, number in pairs]


def event_columns(world: World, rows: Rows) -> dict[str, Column]:
    """The events feed, one line per row."""
    types, agents = texts(TYPE_NAMES), texts(AGENTS)
    devices, channels, mail = texts(DEVICES), texts(CHANNELS), text("mail")
    device, item = rows["device"].tolist(), rows["item"].tolist()
    is_mail = np.isin(rows["type"], (MAIL_OPEN, MAIL_CLICK)).tolist()
    people = zip(rows["owner"].tolist(), rows["is_known"].tolist(), strict=True)
    return {
        "event_id": [f'"{event_id}"' for event_id in event_ids(world, rows)],
        "user_id": [f'"{user_id(owner)}"' if known else NULL for owner, known in people],
        "visitor_id": [f'"{visitor_id(n)}"' if n >= 0 else NULL for n in rows["visitor"].tolist()],
        "event_type": [types[code] for code in rows["type"].tolist()],
        "event_time": times(rows["time"]),
        "ingest_time": times(rows["ingest"]),
        "item_id": [_item(number) for number in item],
        "category_id": [category(number // ITEMS_PER_CATEGORY) for number in item],
        "shop_id": [_shop(number // ITEMS_PER_CATEGORY) for number in item],
        "order_id": order_ids(rows),
        "price": _money(rows["price"]),
        "quantity": [str(n) if n >= 0 else NULL for n in rows["quantity"].tolist()],
        "discount_amount": _money(rows["discount"]),
        "coupon_amount": _money(rows["coupon"]),
        "coupon_match_amount": _money(rows["coupon"] * 0.0),
        "device": [devices[code] for code in device],
        "channel": [mail if sent else channels[code] for sent, code in zip(is_mail, device, strict=True)],
        "user_agent": [agents[code] if code >= 0 else NULL for code in rows["agent"].tolist()],
    }


def broken_lines(rows: Rows) -> list[int]:
    """Positions of lines that are cut in the middle."""
    positions: list[int] = np.flatnonzero(rows["kind"] == CODES["malformed_record"]).tolist()
    return positions


def draw_orders(world: World, shard: int, happened: Rows) -> Rows:
    """The orders of a shard's purchases, and the later word that some were cancelled or taken back.

    Grain: one row per delivery: ``day`` index, ``status`` code, ``status_time``. An order is delivered with
    its purchases, a change on a later day, and none after the end of the world.
    """
    rng, dials = world.random(STATUS, shard), world.dials
    lines = take(happened, happened["type"] == PURCHASE)
    order, first, group = np.unique(lines["order"], return_index=True, return_inverse=True)
    orders = {name: lines[name][first] for name in ("owner", "order", "time", "ingest", "item")}
    total = np.round(np.bincount(group, weights=lines["price"], minlength=len(order)), 2)
    placed = np.zeros(len(order), dtype=np.int64)
    day = world.day_of(orders["ingest"])
    orders |= {"total": total, "day": day, "status": placed, "status_time": placed + NO_TIME}
    draw, wait = rng.random(len(order)), 2 + rng.integers(0, LONGEST_RETURN_DAYS - 2, len(order))
    is_cancelled = draw < dials.cancel_share
    later = orders["day"] + np.where(is_cancelled, 1, wait)
    later_time = world.midnights[np.clip(later, 0, len(world.days))] + 9 * HOUR_SECONDS
    changed = orders | {"day": later, "status": np.where(is_cancelled, 1, 2), "status_time": later_time}
    both = concat([orders, take(changed, draw < dials.cancel_share + dials.take_back_share)])
    return take(both, both["day"] < len(world.days))


def order_columns(rows: Rows) -> dict[str, Column]:
    """The orders feed."""
    status = rows["status"].tolist()
    return {
        "order_id": order_ids(rows),
        "user_id": [f'"{user_id(owner)}"' for owner in rows["owner"].tolist()],
        "order_time": times(rows["time"]),
        "total_amount": numbers(rows["total"]),
        "shop_id": [_shop(item // ITEMS_PER_CATEGORY) for item in rows["item"].tolist()],
        "order_status": [text(STATUSES[code]) if code else NULL for code in status],
        "status_time": [
            t if code else NULL for t, code in zip(times(rows["status_time"]), status, strict=True)
        ],
    }


def campaign_columns(world: World, start: int) -> dict[str, Column]:
    """The campaigns that start on a day."""
    chosen = [campaign for campaign in world.campaigns if campaign.start == start]
    day = world.days[start]
    coupons = [
        [
            {
                "coupon_id": coupon.coupon_id,
                "category_id": json.loads(category(coupon.category)),
                "item_ids": [json.loads(_item(item)) for item in coupon.items],
            }
            for coupon in campaign.coupons
        ]
        for campaign in chosen
    ]
    return {
        "campaign_id": [text(campaign.campaign_id) for campaign in chosen],
        "campaign_type": [text(campaign.type) for campaign in chosen],
        "start_date": text(str(day)),
        "end_date": text(str(day + timedelta(days=CAMPAIGN_DAYS - 1))),
        "coupons": [json.dumps(held) for held in coupons],
    }


def send_columns(world: World, sends: Rows) -> dict[str, Column]:
    """The sends feed. In a world of sets any coupon of the campaign may be redeemed."""
    is_randomised = world.dials.assignment == "randomised"
    return {
        "send_id": [text(send_id) for send_id in send_ids(world, sends)],
        "campaign_id": texts(_campaign_ids(world, sends)),
        "user_id": [f'"{user_id(owner)}"' for owner in sends["owner"].tolist()],
        "coupon_id": NULL if world.dials.campaigns == "sets" else texts(_coupon_ids(world, sends)),
        "delivered_time": times(sends["delivered"]),
        "propensity": numbers(sends["propensity"]) if is_randomised else NULL,
        "mail_type": text("marketing"),
    }


def redemption_columns(world: World, redeemed: Rows) -> dict[str, Column]:
    """The redemptions feed."""
    return {
        "redemption_id": [f'"{_hash(send_id)}"' for send_id in send_ids(world, redeemed)],
        "user_id": [f'"{user_id(owner)}"' for owner in redeemed["owner"].tolist()],
        "campaign_id": texts(_campaign_ids(world, redeemed)),
        "coupon_id": texts(_coupon_ids(world, redeemed)),
        "redemption_time": times(redeemed["bought"]),
    }


def cost_columns(world: World, day: int, num_mails: Array, redeemed_amount: Array) -> dict[str, Column]:
    """What each running campaign cost on a day: its mails on the first one, its redeemed coupons on all.

    ``num_mails`` [campaigns] and ``redeemed_amount`` [campaigns, days]: of all users.
    """
    ids, kinds, amounts = [], [], []
    for number, campaign in enumerate(world.campaigns):
        if campaign.start == day:
            ids.append(campaign.campaign_id)
            kinds.append("mail")
            amounts.append(float(num_mails[number]) * MAIL_COST)
        if campaign.start <= day < campaign.start + CAMPAIGN_DAYS:
            ids.append(campaign.campaign_id)
            kinds.append("redemption")
            amounts.append(float(redeemed_amount[number, day]))
    return {
        "campaign_id": texts(ids),
        "cost_date": text(str(world.days[day])),
        "cost_type": texts(kinds),
        "cost_amount": numbers(np.round(np.array(amounts, dtype=float), 2)),
    }


def user_columns(people: Rows) -> dict[str, Column]:
    """The user master."""
    known = people["has_attributes"].tolist()
    attributes = [
        json.dumps({"age_group": str(age), "price_tier": str(tier)}) if has else NULL
        for has, age, tier in zip(known, people["age"].tolist(), people["tier"].tolist(), strict=True)
    ]
    return {
        "user_id": [f'"{user_id(owner)}"' for owner in people["owner"].tolist()],
        "has_attributes": ["true" if has else "false" for has in known],
        "attributes": attributes,
    }


def consent_columns(world: World, people: Rows, day: int) -> dict[str, Column]:
    """One consent snapshot; ``day`` is an index and may lie outside the world."""
    denied_from = people["denied_from"]
    is_denied = denied_from < day
    changed = np.where(is_denied, denied_from * DAY_SECONDS + DAY_SECONDS // 2, -30 * DAY_SECONDS)
    reasons = [
        ("bounce" if bounce else "unsubscribe") if denied else None
        for denied, bounce in zip(is_denied.tolist(), people["is_bounce"].tolist(), strict=True)
    ]
    return {
        "user_id": [f'"{user_id(owner)}"' for owner in people["owner"].tolist()],
        "channel": text("mail"),
        "purpose": text("marketing"),
        "state": texts(np.where(is_denied, "denied", "granted").tolist()),
        "updated_time": times(world.midnights[0] + changed),
        "reason": texts(reasons),
        "source": text("crm"),
    }


def catalogue_columns() -> dict[str, Column]:
    """All items."""
    items = range(NUM_CATEGORIES * ITEMS_PER_CATEGORY)
    return {
        "item_id": [_item(item) for item in items],
        "category_id": [category(item // ITEMS_PER_CATEGORY) for item in items],
        "shop_id": [_shop(item // ITEMS_PER_CATEGORY) for item in items],
        "item_type": [text(f"t{item % 4}") for item in items],
        "brand": [text(f"b{item % 7}") for item in items],
    }


def send_ids(world: World, rows: Rows) -> list[str]:
    """One per campaign and user."""
    pairs = zip(_campaign_ids(world, rows), rows["owner"].tolist(), strict=True)
    return [f"{campaign}:{user_id(owner)}" for campaign, owner in pairs]


def _campaign_ids(world: World, rows: Rows) -> list[str]:
    return [world.campaigns[number].campaign_id for number in rows["campaign"].tolist()]


def _coupon_ids(world: World, rows: Rows) -> list[str]:
    pairs = zip(rows["campaign"].tolist(), rows["coupon"].tolist(), strict=True)
    return [world.campaigns[number].coupons[n].coupon_id for number, n in pairs]


def order_ids(rows: Rows) -> list[str]:
    """Orders are numbered inside a shard; null for what is no purchase."""
    pairs = zip((rows["owner"] // SHARD_USERS).tolist(), rows["order"].tolist(), strict=True)
    return [f'"o{shard}-{order}"' if order >= 0 else NULL for shard, order in pairs]


def category(number: int) -> str:
    """JSON text of a category; null for a negative number."""
    return f'"c{number:02d}"' if number >= 0 else NULL


def _item(number: int) -> str:
    return f'"i{number:04d}"' if number >= 0 else NULL


def _shop(number: int) -> str:
    return f'"s{number // CATEGORIES_PER_SHOP:02d}"' if number >= 0 else NULL


def _money(values: Array) -> list[str]:
    return [NULL if value != value else repr(value) for value in values.tolist()]


def times(seconds: Array) -> list[str]:
    """ISO texts of UTC seconds; ``NO_TIME`` becomes a word."""
    bad = seconds == NO_TIME
    known = landing.times(np.where(bad, 0, seconds).astype("datetime64[s]"))
    return [text("yesterday") if is_bad else known[n] for n, is_bad in enumerate(bad.tolist())]


def _hash(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
