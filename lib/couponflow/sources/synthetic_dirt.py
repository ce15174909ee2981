"""The dirt of the synthetic shop: what delivery does to events, with the truth about each line.

Every line is of exactly one kind (``synthetic_rows.KINDS``). Valid are ``clean``, ``bot``, ``scanner``,
``skew_hour`` (a clock that is an hour off), ``late_inside`` (delivered on a later day, inside the horizon: a
visit that ran over midnight too), ``retry_next_day`` and ``stale_copy`` (second deliveries under another
ingest date). ``duplicate`` and ``double_load`` are exact copies in the same ingest date, ``retry_same_day``
is a changed one. All others belong in quarantine: ``REASONS`` says under which reason.

No event gets two kinds of copies, so exact and conflicting ones can be counted apart.
"""

import numpy as np

from couponflow.lake.layouts import EVENT_TYPES
from couponflow.sources.landing import Array
from couponflow.sources.synthetic_rows import (
    CART,
    CLEAN,
    CODES,
    FAVOURITE,
    HOUR_SECONDS,
    IS_VALID,
    MAIL_CLICK,
    MAIL_OPEN,
    PURCHASE,
    SEARCH,
    VIEW,
    Rows,
    concat,
    size,
    take,
)
from couponflow.sources.synthetic_users import NUM_DEVICES, Users
from couponflow.sources.synthetic_world import DIRT, World

#: Code of an event type that does not exist; seconds that stand for a time nobody can parse.
NO_EVENT_TYPE, NO_TIME = len(EVENT_TYPES), -(1 << 40)
LATE_MEDIAN_SECONDS, LATE_SIGMA = 14.6 * HOUR_SECONDS, 1.0
SAME_DAY_SHARE = 0.6
YEAR_2099 = 4_070_908_800

#: Reason of quarantine per kind of refused line.
REASONS = {
    "late_beyond": "too_late",
    "malformed_record": "malformed_record",
    "malformed_user": "missing_user",
    "malformed_event_type": "unknown_event_type",
    "malformed_price": "negative_price",
    "malformed_time": "bad_time",
    "malformed_category": "missing_item",
    "skew_past": "clock_skew",
    "skew_future": "clock_skew",
    "skew_seconds": "clock_skew",
    "skew_millis": "bad_time",
}
_MALFORMED = tuple(name for name in REASONS if name.startswith("malformed"))
#: Refused for a reason that is looked at before the delay is.
_EARLIER = np.array(
    [
        CODES[name]
        for name, reason in REASONS.items()
        if reason not in ("too_late", "negative_price", "missing_item")
    ]
)


def deliver(world: World, users: Users, happened: Rows) -> tuple[Rows, Rows]:
    """Turn what happened in a shard into delivered lines.

    Returns:
        The lines, and the rows that an hour lost. Adds: ``number`` (an event's own inside the shard),
        ``day`` (index of the ingest date), ``visitor`` (number or -1), ``is_known`` (whether the line names
        the user) and the final ``kind``.
    """
    dials = world.dials
    rng = world.random(DIRT, users.shard)
    rows = dict(happened) | {"number": np.arange(size(happened))}
    rows = _with_visitors(world, users, rows)
    rows = _with_delay(rows, rng, dials.late_share if dials.is_dirty else 0.0)
    rows = _with_clocks(world, users, rows)
    rows["day"] = world.day_of(rows["ingest"])
    rows = take(rows, (rows["day"] >= 0) & (rows["day"] < len(world.days)))
    is_lost = _inside(rows["ingest"], world.lost_hour)
    lost, rows = take(rows, is_lost), take(rows, ~is_lost)
    if dials.is_dirty:
        rows = concat([rows, *_copies(world, rows, rng), _defects(world, rows, rng)])
    doubled = take(rows, _inside(rows["ingest"], world.double_hour))
    rows = concat([rows, _relabelled(doubled, "double_load")])
    for day, kind in sorted(world.delivery.items()):
        rows = _with_incident(rows, day, kind)
    return _classified(world, rows), lost


def first_purchase(users: Users, rows: Rows) -> Array:
    """Time of each user's first purchase; beyond all times for those who never buy."""
    first = np.full(len(users.owner), np.iinfo(np.int64).max)
    bought = rows["type"] == PURCHASE
    np.minimum.at(first, rows["owner"][bought] - users.owner[0], rows["time"][bought])
    return first


def _with_visitors(world: World, users: Users, rows: Rows) -> Rows:
    """Some browse as a visitor until they log in, on a day or to buy; some browsers are used by two.

    Who never logs in buys with another device: no line names both.
    """
    local = rows["owner"] - users.owner[0]
    merges = users.login_day >= 0
    never = users.login_day >= len(world.days)
    on_day = world.midnights[np.clip(users.login_day, 0, len(world.days))]
    login = np.where(never, np.iinfo(np.int64).max, np.minimum(on_day, first_purchase(users, rows)))
    is_site = ~np.isin(rows["type"], (MAIL_OPEN, MAIL_CLICK)) & ~(never[local] & (rows["type"] == PURCHASE))
    is_known = ~(merges[local] & is_site & (rows["time"] < login[local]))
    visitor = np.where(merges[local] & is_site, rows["owner"], -1)
    lends = np.zeros(len(merges), dtype=bool)
    lends[1:] = (merges & (users.owner // 20 % 2 == 0))[:-1] & ~merges[1:] & users.is_person[1:]
    evening = world.midnights[len(world.days) * 2 // 3]
    borrows = lends[local] & is_site & (rows["time"] >= evening)
    return rows | {"is_known": is_known, "visitor": np.where(borrows, rows["owner"] - 1, visitor)}


def _with_delay(rows: Rows, rng: np.random.Generator, share: float) -> Rows:
    """Deliver some site events much later."""
    num = size(rows)
    can_wait = np.isin(rows["type"], (VIEW, SEARCH, FAVOURITE, CART)) & (rows["kind"] == CLEAN)
    delay = np.exp(rng.normal(np.log(LATE_MEDIAN_SECONDS), LATE_SIGMA, num)).astype(np.int64)
    is_late = can_wait & (rng.random(num) < share)
    return rows | {
        "ingest": np.where(is_late, np.maximum(rows["ingest"], rows["time"] + delay), rows["ingest"])
    }


def _with_clocks(world: World, users: Users, rows: Rows) -> Rows:
    """Shift the times of devices whose clock is an hour off; the shop's own clocks are right."""
    clock = users.clock[rows["owner"] - users.owner[0]]
    moved = rows["time"] + clock
    day = world.day_of(moved)
    is_off = (clock != 0) & ~np.isin(rows["type"], (PURCHASE, MAIL_OPEN, MAIL_CLICK))
    is_off &= (day >= 0) & (day < len(world.days))
    kind = np.where(is_off & (rows["kind"] == CLEAN), CODES["skew_hour"], rows["kind"])
    return rows | {"time": np.where(is_off, moved, rows["time"]), "kind": kind}


def _inside(seconds: Array, hours: tuple[int, int]) -> Array:
    return np.asarray((seconds >= hours[0]) & (seconds < hours[1]))


def _copies(world: World, rows: Rows, rng: np.random.Generator) -> list[Rows]:
    """Exact duplicates, and retries of the same event with a new ingest time and another device."""
    dials, num_days, day = world.dials, len(world.days), rows["day"]
    event_day = world.day_of(rows["time"])
    doubled = [number for number, kind in world.delivery.items() if kind == "double_load"]
    is_single = ~_inside(rows["ingest"], world.double_hour) & ~np.isin(day, doubled)
    is_valid = day - event_day <= world.lateness_days
    draw = rng.random((3, size(rows)))
    is_duplicate = is_valid & is_single & (draw[0] < dials.duplicate_share)
    soon = rows["ingest"] + 60
    is_soon = is_valid & is_single & ~is_duplicate & (draw[1] < SAME_DAY_SHARE * dials.retry_share)
    is_soon &= (
        (world.day_of(soon) == day) & ~_inside(soon, world.lost_hour) & ~_inside(soon, world.double_hour)
    )
    is_next = is_valid & ~is_duplicate & ~is_soon & (draw[2] < (1.0 - SAME_DAY_SHARE) * dials.retry_share)
    is_next &= (event_day == day) & (day + 1 < num_days) & (world.lateness_days > 0)
    tomorrow = np.minimum(day + 1, num_days - 1)
    changed = rows | {"device": (rows["device"] + 1) % NUM_DEVICES}
    retries = changed | {"ingest": soon, "kind": np.full(size(rows), CODES["retry_same_day"])}
    again = changed | {
        "ingest": world.midnights[tomorrow] + 3 * HOUR_SECONDS,
        "day": tomorrow,
        "kind": np.full(size(rows), CODES["retry_next_day"]),
    }
    exact = rows | {"kind": np.full(size(rows), CODES["duplicate"])}
    return [take(exact, is_duplicate), take(retries, is_soon), take(again, is_next)]


def _defects(world: World, rows: Rows, rng: np.random.Generator) -> Rows:
    """New lines with one defect each: malformed ones in turn, and four clocks that nobody can believe."""
    valid = world.day_of(rows["ingest"]) - world.day_of(rows["time"]) <= world.lateness_days
    bad = take(rows, valid & (rng.random(size(rows)) < world.dials.malformed_share))
    kind = np.array([CODES[name] for name in _MALFORMED])[np.arange(size(bad)) % len(_MALFORMED)]

    def where(name: str, column: str, value: float | bool) -> Array:
        return np.where(kind == CODES[name], value, bad[column])

    bad |= {
        "is_known": where("malformed_user", "is_known", False).astype(bool),
        "visitor": where("malformed_user", "visitor", -1),
        "item": where("malformed_category", "item", -1),
        "type": where("malformed_category", "type", VIEW),
        "price": where("malformed_price", "price", -1.0),
        "time": where("malformed_time", "time", NO_TIME),
    }
    bad |= {"type": where("malformed_event_type", "type", NO_EVENT_TYPE), "kind": kind}
    views = np.flatnonzero((rows["type"] == VIEW) & (rows["kind"] == CLEAN) & rows["is_known"])
    first = views[np.lexsort((rows["time"][views], rows["owner"][views]))][:1]
    noon = world.midnights[len(world.days) // 2] + 12 * HOUR_SECONDS
    clocks = []
    for n, (name, time) in enumerate(
        [
            ("skew_past", 5),
            ("skew_future", YEAR_2099),
            ("skew_seconds", rows["time"][first] // 1_000),
            ("skew_millis", rows["time"][first] * 1_000),
        ]
    ):
        clock = {"time": time, "ingest": noon + n, "day": len(world.days) // 2, "kind": CODES[name]}
        clocks.append(take(rows, first) | {c: np.full(len(first), v) for c, v in clock.items()})
    added = concat([bad, *clocks])
    top = int(rows["number"].max()) + 1 if size(rows) else 0
    return added | {"number": top + np.arange(size(added))}


def _relabelled(rows: Rows, kind: str) -> Rows:
    """Copies of lines: a valid one becomes the kind, a refused one is refused once more."""
    stays = ~IS_VALID[rows["kind"]]
    return rows | {"kind": np.where(stays, rows["kind"], CODES[kind])}


def _with_incident(rows: Rows, day: int, kind: str) -> Rows:
    """One day's delivery is missing, comes twice, or is the day before once more."""
    is_today = rows["day"] == day
    if kind == "double_load":
        return concat([rows, _relabelled(take(rows, is_today), kind)])
    kept = take(rows, ~is_today)
    if kind == "missing_day":
        return kept
    stale = _relabelled(take(rows, rows["day"] == day - 1), kind)
    return concat([kept, stale | {"day": np.full(size(stale), day)}])


def _classified(world: World, rows: Rows) -> Rows:
    """Late lines by the facts: the ingest date against the day of the event."""
    days_late = rows["day"] - world.day_of(rows["time"])
    kind = rows["kind"]
    is_open = ~np.isin(kind, _EARLIER)
    kind = np.where(is_open & (days_late > world.lateness_days), CODES["late_beyond"], kind)
    is_plain = (kind == CLEAN) | (kind == CODES["skew_hour"])
    return rows | {"kind": np.where(is_plain & (days_late > 0), CODES["late_inside"], kind)}
