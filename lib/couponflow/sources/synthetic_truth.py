"""What is true of the synthetic shop, written beside the feeds; no job may read it, a report may at the end.

``truth/<name>/part-NNNN.jsonl``, one part per group of shards:

* ``dirt``: event lines per ingest date and kind; they add up to all lines. ``lines``: each line that is not
  clean, with its file and position.
* ``users``: roles, tastes, segment, the pair of the order-only rule. ``days``: current, previous and possible
  next interest of each user on each day.
* ``candidates``: every user and target of every campaign, the holdout included, with ``p0`` and ``p1``
  (chance without and with a coupon), ``tau`` = p1 - p0, the true ``propensity`` and what happened.
* ``sessions``: the session of each event that is left after cleaning, found by a plain reading of the rule.
  ``links``: the first user of each visitor. ``exclusions``: user-days of bots, scanners and test accounts.
* ``incidents``: what was done to days and hours, and whether a monitor should call it one.

Ids are those of an open lake: with pseudonyms, users and sessions have other names.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from couponflow.lake import storage
from couponflow.sources import synthetic_feeds as feeds
from couponflow.sources.landing import NULL, Array
from couponflow.sources.synthetic_rows import (
    CLEAN,
    DAY_SECONDS,
    IS_VALID,
    KINDS,
    MAIL_CLICK,
    MAIL_OPEN,
    PURCHASE,
    SCANNER,
    Rows,
    take,
)
from couponflow.sources.synthetic_users import SEGMENTS, Users
from couponflow.sources.synthetic_world import NO_INCIDENTS, SHARD_USERS, World, usual_size

#: What an id of a visitor who is nobody yet begins with.
VISITOR = "visitor:"


def dirt_lines(world: World, lines: Rows) -> tuple[list[str], dict[str, int]]:
    """Event lines per ingest date and kind, and in all."""
    counts = np.zeros((len(world.days), len(KINDS)), dtype=np.int64)
    np.add.at(counts, (lines["day"], lines["kind"]), 1)
    told = [
        json.dumps({"ingest_date": str(world.days[day]), "kind": KINDS[kind], "rows": int(counts[day, kind])})
        for day, kind in np.argwhere(counts).tolist()
    ]
    return told, dict(zip(KINDS, counts.sum(axis=0).tolist(), strict=True))


def line_flags(world: World, lines: Rows, day: int, file: str) -> list[str]:
    """Each line of one file that is not clean; ``lines`` in the order of the file."""
    dirty = np.flatnonzero(lines["kind"] != CLEAN)
    ids = feeds.event_ids(world, take(lines, dirty))
    flags = zip(dirty.tolist(), lines["kind"][dirty].tolist(), ids, strict=True)
    return [
        f'{{"ingest_date":"{world.days[day]}","source_file":"{file}","row_number":{number},'
        f'"event_id":"{event_id}","kind":"{KINDS[kind]}"}}'
        for number, kind, event_id in flags
    ]


def user_lines(world: World, users: Users, known: int) -> list[str]:
    """Roles and tastes of a shard's users."""
    told = []
    for n in np.flatnonzero(users.owner < known).tolist():
        pair = world.pairs[users.pair[n]].tolist() if users.pair[n] >= 0 else None
        row = {
            "user_id": feeds.user_id(int(users.owner[n])),
            "is_bot": bool(users.is_bot[n]),
            "is_crawler": bool(users.is_crawler[n]),
            "is_heavy": bool(users.is_heavy[n]),
            "is_scanner": bool(users.is_scanner[n]),
            "is_staff": bool(users.is_staff[n]),
            "clock_seconds": int(users.clock[n]),
            "long_term_categories": [_category(number) for number in users.long_term[n].tolist()],
            "segment": SEGMENTS[users.segment[n]],
            "coupon_effect": float(users.effect[n]),
            "need_category": _category(int(users.need[n])),
            "period_days": int(users.period[n]),
            "ordered_pair": pair and [_category(number) for number in pair],
        }
        told.append(json.dumps(row))
    return told


def day_lines(world: World, users: Users, known: int) -> list[str]:
    """The interest of each user on each day; what may come next, once each."""
    following = world.next_categories(users.previous, users.current)
    told = []
    for n in np.flatnonzero(users.owner < known).tolist():
        who = feeds.user_id(int(users.owner[n]))
        rows = zip(
            world.days,
            users.current[n].tolist(),
            users.previous[n].tolist(),
            following[n].tolist(),
            strict=True,
        )
        told += [
            f'{{"user_id":"{who}","date":"{day}","current":{feeds.category(now)},'
            f'"previous":{feeds.category(before)},'
            f'"next":[{",".join(feeds.category(number) for number in sorted(set(after)))}]}}'
            for day, now, before, after in rows
        ]
    return told


def candidate_lines(world: World, outcomes: Rows) -> list[str]:
    """True chances and outcomes of every user and target."""
    names = ("p0", "p1", "propensity", "is_treated", "is_converted", "is_order_only", "direction")
    columns = [outcomes[name].tolist() for name in names]
    ids = feeds.send_ids(world, outcomes)
    told = []
    for send_id, segment, *values in zip(ids, outcomes["segment"].tolist(), *columns, strict=True):
        campaign, _, user = send_id.rpartition(":")
        row = {"send_id": send_id, "campaign_id": campaign, "user_id": user, "segment": SEGMENTS[segment]}
        row |= dict(zip(names, values, strict=True))
        told.append(json.dumps(row | {"tau": row["p1"] - row["p0"]}))
    return told


def read_chances(spark: Any, root_uri: str, campaign_ids: Sequence[str]) -> Any:
    """Users of some campaigns with ``p0`` and ``p1``, as a Spark frame; None where no truth was landed.

    Grain: one row per consenting ``user_id`` and ``campaign_id``, each campaign having one target.
    """
    folder = storage.join(root_uri, "truth", "candidates")
    if not storage.list_names(folder):
        return None
    found = spark.read.schema("campaign_id string, user_id string, p0 double, p1 double").json(folder)
    return found.where(found.campaign_id.isin(*campaign_ids))


def first_links(lines: Rows) -> dict[int, tuple[int, int, int]]:
    """Per visitor the first line that names both: (ingest day, ingest time, user)."""
    found: dict[int, tuple[int, int, int]] = {}
    both = take(lines, IS_VALID[lines["kind"]] & lines["is_known"] & (lines["visitor"] >= 0))
    columns = (both[name].tolist() for name in ("visitor", "day", "ingest", "owner"))
    for visitor, *link in zip(*columns, strict=True):
        first = (link[0], link[1], link[2])
        found[visitor] = min(found.get(visitor, first), first)
    return found


def link_lines(world: World, links: dict[int, tuple[int, int, int]]) -> list[str]:
    """The first link of each visitor."""
    return [
        f'{{"visitor_id":"{feeds.visitor_id(visitor)}","user_id":"{feeds.user_id(user)}",'
        f'"ingest_date":"{world.days[day]}","linked_time":{feeds.times(np.array([ingest]))[0]}}}'
        for visitor, (day, ingest, user) in sorted(links.items())
    ]


@dataclass(frozen=True)
class Door:
    """The events that later stages see, and whose user-days they do not: found from the lines alone.

    ``events``: first deliveries; ``who``: user of each, or his visitor while nobody is logged in; ``day``: of
    the event; ``is_left_out``: a machine's or test account's, or a mail event of a scanner's day. Purchases
    always stay. ``reasons``: (who, day) to staff, bot or scanner.
    """

    events: Rows
    who: list[str]
    day: Array
    is_left_out: Array
    reasons: dict[tuple[str, int], str]


def read_door(world: World, shards: Sequence[Users], lines: Rows) -> Door:
    """Apply the cleaning rules to the lines of a group by what is known, not by what they look like.

    Only what is delivered on the day itself gives a machine away: no later delivery changes a history.
    """
    kept = take(lines, IS_VALID[lines["kind"]])
    ids = np.column_stack([kept["owner"] // SHARD_USERS, kept["number"], kept["day"]])
    kept = take(kept, np.lexsort(ids.T[::-1]))
    _, first = np.unique(
        np.column_stack([kept["owner"] // SHARD_USERS, kept["number"]]), axis=0, return_index=True
    )
    kept = take(kept, first)
    local = kept["owner"] - shards[0].owner[0]
    is_staff = np.concatenate([users.is_staff for users in shards])[local]
    is_machine = ~np.concatenate([users.is_person for users in shards])[local]
    is_mail, is_bought = np.isin(kept["type"], (MAIL_OPEN, MAIL_CLICK)), kept["type"] == PURCHASE
    day = world.day_of(kept["time"])
    user_day = kept["owner"] * (len(world.days) + 2) + day
    is_scanned = np.isin(user_day, user_day[kept["kind"] == SCANNER])
    # A machine of which nothing was delivered on the day itself (a missing day, then retries) stays unseen.
    is_machine &= np.isin(user_day, user_day[kept["day"] <= day])
    names = zip(kept["owner"].tolist(), kept["visitor"].tolist(), kept["is_known"].tolist(), strict=True)
    who = [feeds.user_id(owner) if known else VISITOR + feeds.visitor_id(v) for owner, v, known in names]
    reasons: dict[tuple[str, int], str] = {}
    for reason, is_so in (("scanner", is_scanned), ("bot", is_machine), ("staff", is_staff)):
        for n in np.flatnonzero(is_so & kept["is_known"]).tolist():
            reasons[who[n], int(day[n])] = reason
    is_left_out = ~is_bought & kept["is_known"] & (is_machine | is_staff | (is_mail & is_scanned))
    return Door(kept, who, day, is_left_out, reasons)


def exclusion_lines(world: World, door: Door) -> list[str]:
    """The user-days that are no shopper's."""
    return [
        f'{{"user_id":"{who}","event_date":"{world.days[day]}","reason":"{reason}"}}'
        for (who, day), reason in sorted(door.reasons.items())
    ]


def session_lines(world: World, door: Door, links: dict[int, tuple[int, int, int]]) -> list[str]:
    """The session of each event behind the read door, and the user it is known to be of in the end.

    Nothing is shared with the pipeline but the rule.
    """
    stays = np.flatnonzero(~door.is_left_out)
    kept = take(door.events, stays)
    by_user: dict[str, list[tuple[int, str, str]]] = {}
    columns = (kept[name].tolist() for name in ("time", "visitor", "is_known"))
    ids = feeds.event_ids(world, kept)
    for n, event_id, time, visitor, known in zip(stays.tolist(), ids, *columns, strict=True):
        who = resolved = door.who[n]
        if not known and visitor in links:
            resolved = feeds.user_id(links[visitor][2])
        by_user.setdefault(who, []).append((time, event_id, resolved))
    told = []
    for who, own in sorted(by_user.items()):
        own.sort()
        starts = session_starts(world, [event[0] for event in own])
        names = {start: session_id(who, start) for start in set(starts)}
        told += [
            f'{{"event_id":"{event_id}","user_id":"{user}","session_id":"{names[start]}"}}'
            for (_, event_id, user), start in zip(own, starts, strict=True)
        ]
    return told


def session_id(who: str, start: int) -> str:
    """Name of a session: from its user and its first second."""
    return hashlib.sha256(f"{who}|{start * 1_000_000}".encode()).hexdigest()[:32]


def session_starts(world: World, times: list[int]) -> list[int]:
    """Start of the session of each of one user's events, oldest first.

    First runs inside one business day: a silence longer than the gap, or midnight, begins a new one. Then the
    first run of a day goes to the last one of the day before if the silence between them allows it, unless
    that one is itself the first of its day and near the day before.
    """
    gap = world.gap_minutes * 60
    days: list[int] = world.day_of(np.array(times)).tolist()
    runs: list[list[int]] = []  # day, start, end, number of events
    for day, time in zip(days, times, strict=True):
        if runs and runs[-1][0] == day and time - runs[-1][2] <= gap:
            runs[-1][2], runs[-1][3] = time, runs[-1][3] + 1
        else:
            runs.append([day, time, time, 1])
    near = [False] + [now[0] - old[0] == 1 and now[1] - old[2] <= gap for old, now in pairwise(runs)]
    found: list[int] = []
    for n, (_, start, _, number) in enumerate(runs):
        joins = near[n] and not near[n - 1]
        found += [runs[n - 1][1] if joins else start] * number
    return found


def incident_lines(world: World, num_lost: int, num_doubled: int) -> list[str]:
    """Planned incidents and the two odd hours."""
    rows: list[dict[str, object]] = [
        {
            "kind": incident.kind,
            "first_date": str(incident.date),
            "days": incident.days,
            "size": usual_size(incident),
            "is_incident": incident.kind not in NO_INCIDENTS,
        }
        for incident in world.dials.incidents
    ]
    for kind, (start, end), number in (
        ("lost_hour", world.lost_hour, num_lost),
        ("double_hour", world.double_hour, num_doubled),
    ):
        if end > start:
            day = int(world.day_of(np.array([start]))[0])
            hour = (start - int(world.midnights[day])) % DAY_SECONDS // 3_600
            row = {"kind": kind, "first_date": str(world.days[day]), "hour": hour, "rows": number}
            rows.append(row | {"is_incident": True})
    return [json.dumps(row) for row in rows]


def _category(number: int) -> str | None:
    name = feeds.category(number)
    return None if name == NULL else name.strip('"')
