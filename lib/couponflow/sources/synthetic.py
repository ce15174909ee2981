"""A small shop with known truth, landed as raw feeds.

``synthetic_world`` draws users and campaigns, ``synthetic_dirt`` spoils the delivery; this module writes both
as a source would. Events and orders are delivered for every day, possibly as an empty file; other feeds when
something changed.

Beside the feeds lies ``truth/``, which no job may read: ``dirt.jsonl`` (event lines per kind and ingest
date; the kinds add up to all lines), ``sends.jsonl`` (true redemption probability per send),
``users.jsonl`` (bots, long-term interests).

The default world of 60 days has campaigns 1 to 5, seven days each, starting 01-11, 01-21, 01-31, 02-10 and
02-20. This configuration gives train (1-3), valid (4) and test (5)::

    [run]          first_date = "2024-01-01"   last_date = "2024-02-29"
                   campaign_id = "5"           run_date = "2024-02-20"
    [examples]     train_start = "2024-01-11"  valid_start = "2024-02-10"  test_start = "2024-02-20"
    [conversions]  source = "redemptions"      window = "campaign"
"""

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pandas as pd

from couponflow.config import Config
from couponflow.lake.layouts import EVENT_TYPES
from couponflow.sources import landing
from couponflow.sources.landing import NULL, Landing, numbers, text, texts
from couponflow.sources.synthetic_dirt import DIRT, DIRT_CODES, NO_TIME, with_dirt
from couponflow.sources.synthetic_world import (
    CAMPAIGN_DAYS,
    CATEGORIES_PER_SHOP,
    COUPON_SHARE,
    DAY_SECONDS,
    ITEMS_PER_CATEGORY,
    MAIL_CLICK,
    MAIL_COST,
    MAIL_OPEN,
    NUM_CATEGORIES,
    PURCHASE,
    SHARD_USERS,
    World,
    draw_shard,
    draw_world,
)

Report = Callable[[str, int, int], None]

DEVICES, CHANNELS = ("app", "web", "tablet"), ("app", "site", "site")
#: Texts by type code; the last is what a malformed line says.
TYPE_NAMES = (*EVENT_TYPES, "teleport")


def land(config: Config, report: Report | None = None) -> dict[str, int]:
    """Land all feeds of the shop and its truth; landing twice is a no-op.

    ``report(step, done, total)`` is called after each shard and each day.

    Returns:
        Landed rows per feed, and the event lines of each kind of ``DIRT`` as ``dirt_<kind>``.

    Raises:
        ConfigError: run.first_date to run.last_date is too short for a campaign.
        ConflictError: the lake holds other raw feeds.
    """
    tell = report or _quiet
    world = draw_world(config)
    seed, known = config.source.seed, config.source.num_users
    num_shards = -(-known // SHARD_USERS)
    parts: list[tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]] = []
    for number in range(num_shards):
        shard = draw_shard(world, number, seed)
        parts.append((with_dirt(shard.events, world, number, seed), shard.sends, shard.users))
        tell("users", number + 1, num_shards)
    events, sends, users = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    events, sends, users = (frame[frame["owner"] < known] for frame in (events, sends, users))
    out = Landing(config.lake.root_uri, "synthetic")
    _land_events(out, world, events, seed, tell)
    _land_orders(out, world, events)
    _land_campaigns(out, world, sends)
    _land_costs(out, world, sends)
    _land_masters(out, world, users, config)
    counts = _land_truth(out, world, events, sends, users)
    return out.rows | {f"dirt_{kind}": counts[kind] for kind in DIRT}


def _land_events(out: Landing, world: World, events: pd.DataFrame, seed: int, tell: Report) -> None:
    order = np.lexsort(tuple(events[name] for name in ("dirt", "number", "owner", "ingest")))
    events = events.iloc[order]
    days = world.day_of(events["ingest"].to_numpy())
    types = [text(name) for name in TYPE_NAMES]
    for number, day in enumerate(world.days):
        rows = events[days == number]
        shard = (rows["owner"] // SHARD_USERS).tolist()
        pairs = list(zip(shard, rows["number"].tolist(), strict=True))
        item, is_mail = rows["item"].tolist(), rows["type"].isin([MAIL_OPEN, MAIL_CLICK]).tolist()
        out.day(
            "events",
            day,
            {
                "event_id": [f'"{_hash(f"{seed}:{part}:{n}")}"' for part, n in pairs],
                "user_id": [_user(user) for user in rows["user"].tolist()],
                "event_type": [types[code] for code in rows["type"].tolist()],
                "event_time": _times(rows["time"]),
                "ingest_time": _times(rows["ingest"]),
                "item_id": [_item(number) for number in item],
                "category_id": [_category(number // ITEMS_PER_CATEGORY) for number in item],
                "shop_id": [_shop(number // ITEMS_PER_CATEGORY) for number in item],
                "order_id": _orders(rows),
                "price": _money(rows["price"]),
                "quantity": [str(n) if n >= 0 else NULL for n in rows["quantity"].tolist()],
                "discount_amount": _money(rows["discount"]),
                "coupon_amount": _money(rows["coupon"]),
                "coupon_match_amount": _money(rows["coupon"] * 0.0),
                "visitor_id": NULL,
                "user_agent": NULL,
                "device": [text(DEVICES[code]) for code in rows["device"].tolist()],
                "channel": [
                    text("mail" if mail else CHANNELS[code])
                    for mail, code in zip(is_mail, rows["device"].tolist(), strict=True)
                ],
            },
        )
        tell("days", number + 1, len(world.days))


def _land_orders(out: Landing, world: World, events: pd.DataFrame) -> None:
    """One order per purchase order, delivered with its lines; an empty file for a day without any."""
    lines = events[(events["type"] == PURCHASE) & (events["dirt"] == DIRT_CODES["clean"])]
    grouped = lines.assign(shard=lines["owner"] // SHARD_USERS).groupby(["shard", "order"])
    orders = grouped.agg(
        owner=("owner", "first"),
        time=("time", "first"),
        ingest=("ingest", "first"),
        item=("item", "first"),
        total=("price", "sum"),
    ).reset_index()
    days = world.day_of(orders["ingest"].to_numpy())
    for number, day in enumerate(world.days):
        rows = orders[days == number]
        out.day(
            "orders",
            day,
            {
                "order_id": _orders(rows),
                "user_id": [_user(user) for user in rows["owner"].tolist()],
                "order_time": _times(rows["time"]),
                "total_amount": numbers(rows["total"].to_numpy()),
                "shop_id": [_shop(item // ITEMS_PER_CATEGORY) for item in rows["item"].tolist()],
                "order_status": NULL,
                "status_time": NULL,
            },
        )


def _land_campaigns(out: Landing, world: World, sends: pd.DataFrame) -> None:
    """Campaigns and sends under the start day, redemptions under their own day."""
    for number, campaign in enumerate(world.campaigns):
        day = world.days[campaign.start]
        coupons = [
            {
                "coupon_id": coupon.coupon_id,
                "category_id": json.loads(_category(coupon.category)),
                "item_ids": [json.loads(_item(item)) for item in coupon.items],
            }
            for coupon in campaign.coupons
        ]
        out.day(
            "campaigns",
            day,
            {
                "campaign_id": [text(campaign.campaign_id)],
                "campaign_type": [text(campaign.type)],
                "start_date": [text(str(day))],
                "end_date": [text(str(day + timedelta(days=CAMPAIGN_DAYS - 1)))],
                "coupons": [json.dumps(coupons)],
            },
        )
        rows = sends[sends["campaign"] == number]
        out.day(
            "sends",
            day,
            {
                "send_id": [text(send_id) for send_id in _send_ids(world, rows)],
                "campaign_id": text(campaign.campaign_id),
                "user_id": [_user(user) for user in rows["owner"].tolist()],
                "coupon_id": NULL,
                "delivered_time": _times(rows["delivered"]),
                "propensity": "0.5",
            },
        )
    redeemed = sends[sends["is_redeemed"]].sort_values(["bought", "owner"])
    days = world.day_of(redeemed["bought"].to_numpy())
    for index in np.unique(days):
        rows = redeemed[days == index]
        campaigns = [world.campaigns[number] for number in rows["campaign"].tolist()]
        coupons_ = [
            campaign.coupons[n].coupon_id
            for campaign, n in zip(campaigns, rows["coupon"].tolist(), strict=True)
        ]
        out.day(
            "redemptions",
            world.days[index],
            {
                "redemption_id": [f'"{_hash(send_id)}"' for send_id in _send_ids(world, rows)],
                "user_id": [_user(user) for user in rows["owner"].tolist()],
                "campaign_id": texts(campaign.campaign_id for campaign in campaigns),
                "coupon_id": texts(coupons_),
                "redemption_time": _times(rows["bought"]),
            },
        )


def _land_costs(out: Landing, world: World, sends: pd.DataFrame) -> None:
    """What mails cost on the first day of a campaign, and its redeemed coupons on each day of its window."""
    saved = world.item_price[sends["item"].to_numpy()] * COUPON_SHARE
    sends = sends.assign(cost=np.round(saved, 2), day=world.day_of(sends["bought"].to_numpy()))
    for number, campaign in enumerate(world.campaigns):
        mails = sends[sends["campaign"] == number]
        redeemed = mails[mails["is_redeemed"]].groupby("day")["cost"].sum()
        for index in range(campaign.start, campaign.start + CAMPAIGN_DAYS):
            amounts = {"mail": len(mails) * MAIL_COST} if index == campaign.start else {}
            amounts["redemption"] = float(redeemed.get(index, 0.0))
            out.day(
                "costs",
                world.days[index],
                {
                    "campaign_id": text(campaign.campaign_id),
                    "cost_date": text(str(world.days[index])),
                    "cost_type": texts(amounts),
                    "cost_amount": numbers(np.round(np.array(list(amounts.values())), 2)),
                },
            )


def _land_masters(out: Landing, world: World, users: pd.DataFrame, config: Config) -> None:
    """User master and catalogue once; a consent snapshot per campaign start and for the run date."""
    ids = [_user(user) for user in users["owner"].tolist()]
    attributes = [
        json.dumps({"age_group": str(age), "price_tier": str(tier)}) if has else NULL
        for has, age, tier in zip(users["has_attributes"], users["age"], users["tier"], strict=True)
    ]
    has = ["true" if known else "false" for known in users["has_attributes"]]
    out.day("users", world.days[0], {"user_id": ids, "has_attributes": has, "attributes": attributes})
    items = range(NUM_CATEGORIES * ITEMS_PER_CATEGORY)
    out.day(
        "catalogue",
        world.days[0],
        {
            "item_id": [_item(item) for item in items],
            "category_id": [_category(item // ITEMS_PER_CATEGORY) for item in items],
            "shop_id": [_shop(item // ITEMS_PER_CATEGORY) for item in items],
            "item_type": [text(f"t{item % 4}") for item in items],
            "brand": [text(f"b{item % 7}") for item in items],
        },
    )
    run = config.run
    starts = [world.days[campaign.start] for campaign in world.campaigns]
    denied_from = users["denied_from"].to_numpy()
    for day in landing.snapshot_days(starts, run.first_date, run.last_date, run.run_date):
        is_denied = denied_from < (day - run.first_date).days
        changed = world.midnights[0] + np.where(
            is_denied, denied_from * DAY_SECONDS + DAY_SECONDS // 2, -30 * DAY_SECONDS
        )
        reasons = [
            ("bounce" if bounce else "unsubscribe") if denied else None
            for denied, bounce in zip(is_denied.tolist(), users["is_bounce"].tolist(), strict=True)
        ]
        out.day(
            "consents",
            day,
            {
                "user_id": ids,
                "channel": text("mail"),
                "purpose": text("marketing"),
                "state": texts(np.where(is_denied, "denied", "granted").tolist()),
                "updated_time": _times(pd.Series(changed)),
                "reason": texts(reasons),
                "source": text("crm"),
            },
        )


def _land_truth(
    out: Landing, world: World, events: pd.DataFrame, sends: pd.DataFrame, users: pd.DataFrame
) -> dict[str, int]:
    """Write the truth files; returns the event lines per kind of dirt."""
    days = world.day_of(events["ingest"].to_numpy())
    counts = np.zeros((len(world.days), len(DIRT)), dtype=np.int64)
    np.add.at(counts, (days, events["dirt"].to_numpy()), 1)
    lines = [
        json.dumps({"ingest_date": str(world.days[day]), "kind": DIRT[kind], "rows": int(counts[day, kind])})
        for day, kind in np.argwhere(counts).tolist()
    ]
    out.truth("dirt", lines)
    outcomes = zip(_send_ids(world, sends), sends["probability"], sends["is_redeemed"], strict=True)
    names = ("send_id", "redemption_probability", "is_redeemed")
    out.truth("sends", [json.dumps(dict(zip(names, outcome, strict=True))) for outcome in outcomes])
    people = zip(users["owner"].tolist(), users["is_bot"].tolist(), users["long_term"], strict=True)
    out.truth(
        "users",
        [
            f'{{"user_id":{_user(owner)},"is_bot":{json.dumps(is_bot)},'
            f'"long_term_categories":[{",".join(_category(number) for number in categories)}]}}'
            for owner, is_bot, categories in people
        ],
    )
    return dict(zip(DIRT, counts.sum(axis=0).tolist(), strict=True))


def _user(number: int) -> str:
    return f'"u{number:06d}"' if number >= 0 else NULL


def _item(number: int) -> str:
    return f'"i{number:04d}"' if number >= 0 else NULL


def _category(number: int) -> str:
    return f'"c{number:02d}"' if number >= 0 else NULL


def _shop(category: int) -> str:
    return f'"s{category // CATEGORIES_PER_SHOP:02d}"' if category >= 0 else NULL


def _orders(rows: pd.DataFrame) -> list[str]:
    shards = (rows["owner"] // SHARD_USERS).tolist()
    pairs = zip(shards, rows["order"].tolist(), strict=True)
    return [f'"o{shard}-{order}"' if order >= 0 else NULL for shard, order in pairs]


def _send_ids(world: World, sends: pd.DataFrame) -> list[str]:
    pairs = zip(sends["campaign"].tolist(), sends["owner"].tolist(), strict=True)
    return [f"{world.campaigns[number].campaign_id}:u{owner:06d}" for number, owner in pairs]


def _money(column: "pd.Series[float]") -> list[str]:
    return [NULL if value != value else repr(value) for value in column.tolist()]


def _times(seconds: "pd.Series[int]") -> list[str]:
    values = seconds.to_numpy()
    known = landing.times(np.where(values == NO_TIME, 0, values).astype("datetime64[s]"))
    return [text("yesterday") if bad else known[n] for n, bad in enumerate((values == NO_TIME).tolist())]


def _hash(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _quiet(step: str, done: int, total: int) -> None:
    """Report to nobody."""
