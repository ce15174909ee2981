"""The dirt of the synthetic shop: what delivery does to clean events, with the truth about each line.

Of the kinds, ``clean``, ``bot``, ``late_inside`` and ``retry_next_day`` are valid events; ``duplicate`` and
``retry_same_day`` have a valid original in the same ingest date; all others belong in quarantine.
With ``lake.lateness_days = 0`` there is no ``late_inside`` and no ``retry_next_day``, and a clean visit
that is delivered after midnight is beyond the horizon too.
"""

import numpy as np
import pandas as pd

from couponflow.lake.layouts import EVENT_TYPES
from couponflow.sources.synthetic_world import HOUR_SECONDS, NUM_DEVICES, SHARD_USERS, VIEW, World

#: Code of an event type that does not exist.
NO_EVENT_TYPE = len(EVENT_TYPES)
#: Seconds that stand for a time nobody can parse.
NO_TIME = -(1 << 40)

DIRT = (
    "clean",
    "bot",
    "late_inside",
    "late_beyond",
    "duplicate",
    "retry_same_day",
    "retry_next_day",
    "malformed_user",
    "malformed_event_type",
    "malformed_price",
    "malformed_time",
    "skew_past",
    "skew_future",
)
DIRT_CODES = {name: code for code, name in enumerate(DIRT)}


def with_dirt(events: pd.DataFrame, world: World, shard: int, seed: int) -> pd.DataFrame:
    """Deliver some events late and add duplicates, retries, malformed lines and skewed clocks.

    Grain: one row per delivered line. Adds: ``dirt``, the code of its kind. Duplicates and retries copy valid
    events only, so each kind has one expected handling.
    """
    rng = np.random.default_rng([seed, 2, shard])
    clean = np.where(events["is_bot"], DIRT_CODES["bot"], DIRT_CODES["clean"])
    events = _with_late(events.assign(dirt=clean), world, rng)
    num_rows, num_days = len(events), len(world.days)
    ingest_day = world.day_of(events["ingest"].to_numpy())
    event_day = world.day_of(events["time"].to_numpy())
    is_valid = (events["dirt"] != DIRT_CODES["late_beyond"]).to_numpy()
    draw = rng.random((4, num_rows))
    duplicates = events[is_valid & (draw[0] < 0.01)].assign(dirt=DIRT_CODES["duplicate"])
    soon = events["ingest"] + 60
    is_same_day = is_valid & (draw[1] < 0.003) & (world.day_of(soon.to_numpy()) == ingest_day)
    other_device = (events["device"] + 1) % NUM_DEVICES
    retries = events.assign(ingest=soon, device=other_device, dirt=DIRT_CODES["retry_same_day"])[is_same_day]
    is_next_day = is_valid & (draw[2] < 0.002) & (event_day == ingest_day) & (ingest_day + 1 < num_days)
    is_next_day &= world.lateness_days > 0
    tomorrow = world.midnights[np.minimum(ingest_day + 1, num_days)] + 3 * HOUR_SECONDS
    again = events.assign(ingest=tomorrow, device=other_device, dirt=DIRT_CODES["retry_next_day"])[
        is_next_day
    ]
    added = pd.concat(
        [_malformed(events[is_valid & (draw[3] < 0.003)]), _skewed(events, world)], ignore_index=True
    )
    top = int(events["number"].max()) + 1 if num_rows else 0
    added["number"] = top + np.arange(len(added))
    return pd.concat([events, duplicates, retries, again, added], ignore_index=True)


def _with_late(events: pd.DataFrame, world: World, rng: np.random.Generator) -> pd.DataFrame:
    """Move the delivery of some views to a later morning, inside or beyond the lateness horizon."""
    horizon = world.lateness_days
    day = world.day_of(events["time"].to_numpy())
    draw = rng.random(len(events))
    later = np.where(
        draw < 0.004,
        1 + rng.integers(0, max(horizon, 1), len(events)),
        horizon + 1 + rng.integers(0, 3, len(events)),
    )
    is_late = (draw < 0.005) & (events["type"] == VIEW) & (events["dirt"] == DIRT_CODES["clean"])
    is_late &= (day == world.day_of(events["ingest"].to_numpy())) & (day + later < len(world.days))
    arrived = np.minimum(day + later, len(world.days))
    morning = world.midnights[arrived] + 6 * HOUR_SECONDS + rng.integers(0, HOUR_SECONDS, len(events))
    kind = np.where(later <= horizon, DIRT_CODES["late_inside"], DIRT_CODES["late_beyond"])
    return events.assign(
        ingest=np.where(is_late, morning, events["ingest"]), dirt=np.where(is_late, kind, events["dirt"])
    )


def _malformed(rows: pd.DataFrame) -> pd.DataFrame:
    """Copies of valid rows with one defect each, the four defects in turn."""
    kind = np.arange(len(rows)) % 4
    return rows.assign(
        user=np.where(kind == 0, -1, rows["user"]),
        type=np.where(kind == 1, NO_EVENT_TYPE, rows["type"]),
        price=np.where(kind == 2, -1.0, rows["price"]),
        time=np.where(kind == 3, NO_TIME, rows["time"]),
        dirt=DIRT_CODES["malformed_user"] + kind,
    )


def _skewed(events: pd.DataFrame, world: World) -> pd.DataFrame:
    """One view dated 1970 and one dated 2099 of the shard's first user, if he was ever seen."""
    seen = events[(events["owner"] % SHARD_USERS == 0) & (events["type"] == VIEW)].head(1)
    noon = world.midnights[len(world.days) // 2] + 12 * HOUR_SECONDS
    past = seen.assign(time=5, ingest=noon, dirt=DIRT_CODES["skew_past"])
    future = seen.assign(time=4_070_908_800, ingest=noon + 1, dirt=DIRT_CODES["skew_future"])
    return pd.concat([past, future], ignore_index=True)
