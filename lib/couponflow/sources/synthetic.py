"""A shop with known truth, landed as raw feeds; of any size, a group of shards at a time.

``synthetic_world`` draws what all users share; ``synthetic_users``, ``synthetic_visits`` and
``synthetic_mails`` draw a shard of 100 users; ``synthetic_dirt`` spoils the delivery and ``synthetic_truth``
writes down what is true. Every dial is in ``[world]``, for instance
``couponflow land synthetic --set world.order_share=0.7 --set world.order=0``.

**Parts.** A day of a feed is one file ``part-NNNN.jsonl`` per group of ``world.group_shards`` shards. A shard
is drawn from (seed, shard) alone, so any part of any day can be landed without the others:
``land(config, parts=range(3))``, ``land(config, days=DateRange.day(day))``. Only one group is held in memory.
Truth comes with whole days; costs, which are sums over all users, with the whole world.

Events and orders are delivered for every day, possibly as an empty file; other feeds when something changed.
The default world of 60 days has campaigns 1 to 5, seven days each, starting 01-11, 01-21, 01-31, 02-10 and
02-20. This configuration gives train (1-3), valid (4) and test (5)::

    [run]          first_date = "2024-01-01"   last_date = "2024-02-29"
                   campaign_id = "5"           run_date = "2024-02-20"
    [examples]     train_start = "2024-01-11"  valid_start = "2024-02-10"  test_start = "2024-02-20"
    [conversions]  source = "redemptions"      window = "campaign"
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError
from couponflow.sources import landing, synthetic_feeds, synthetic_truth
from couponflow.sources.landing import Array, Landing, text
from couponflow.sources.synthetic_dirt import deliver
from couponflow.sources.synthetic_mails import draw_outcomes, follow_mails, look_back
from couponflow.sources.synthetic_rows import CODES, KINDS, Rows, concat, size, take
from couponflow.sources.synthetic_users import Users, draw_users
from couponflow.sources.synthetic_visits import draw_edges, draw_machines, draw_needs, draw_visits
from couponflow.sources.synthetic_world import COUPON_SHARE, SHARD_USERS, World, draw_world

Report = Callable[[str, int, int], None]

_PEOPLE = ("owner", "has_attributes", "age", "tier", "denied_from", "is_bounce")


@dataclass(frozen=True)
class Shard:
    """Everything 100 users did and what was delivered of it.

    ``lines``: delivered event lines; ``lost``: those of the lost hour; ``outcomes``: every candidate.
    """

    users: Users
    happened: Rows
    lines: Rows
    lost: Rows
    orders: Rows
    outcomes: Rows


def draw_shard(world: World, shard: int) -> Shard:
    """Draw a shard from (seed, shard) alone: the same alone and among others."""
    users, ordered = draw_users(world, shard)
    own = concat([draw_visits(world, users), draw_needs(world, users), ordered, draw_edges(world, users)])
    outcomes = draw_outcomes(world, users, look_back(world, users, own))
    happened = concat([own, follow_mails(world, users, outcomes), draw_machines(world, users)])
    lines, lost = deliver(world, users, happened)
    orders = synthetic_feeds.draw_orders(world, shard, happened)
    return Shard(users, happened, lines, lost, orders, outcomes)


def num_parts(config: Config) -> int:
    """Groups of shards, and so files per feed and day."""
    num_shards = -(-config.source.num_users // SHARD_USERS)
    return -(-num_shards // config.world.group_shards)


def land(
    config: Config,
    report: Report | None = None,
    days: DateRange | None = None,
    parts: Iterable[int] | None = None,
) -> dict[str, int]:
    """Land feeds and truth of the shop; landing twice is a no-op.

    ``days`` and ``parts`` choose what is landed, by default everything; the same files come out either way.
    ``report(step, done, total)`` is called after each shard and each day.

    Returns:
        Landed rows per feed, and the event lines of each kind of dirt as ``dirt_<kind>``.

    Raises:
        ConfigError: run.first_date to run.last_date is too short for a campaign, or a part or an incident
            does not exist.
        ConflictError: the lake holds other raw feeds.
    """
    tell = report or _quiet
    world = draw_world(config)
    everything = range(num_parts(config))
    chosen = list(everything if parts is None else parts)
    if not set(chosen) <= set(everything):
        raise ConfigError(
            f"synthetic shop: parts {sorted(set(chosen) - set(everything))} do not exist; "
            f"{config.source.num_users} users are parts 0 to {len(everything) - 1}"
        )
    out = Landing(config.lake.root_uri, "synthetic")
    kinds = dict.fromkeys(KINDS, 0)
    num_mails = np.zeros(len(world.campaigns), dtype=np.int64)
    redeemed = np.zeros((len(world.campaigns), len(world.days)))
    num_lost = num_doubled = 0
    for part in chosen:
        group = _draw_group(world, config, part, tell)
        for kind, number in _land_part(out, world, config, part, group, days, tell).items():
            kinds[kind] += number
        sends = take(group.outcomes, group.outcomes["is_treated"])
        np.add.at(num_mails, sends["campaign"], 1)
        sends = take(sends, sends["is_converted"])
        saved = np.round(COUPON_SHARE * world.item_price[sends["item"]], 2)
        np.add.at(redeemed, (sends["campaign"], world.day_of(sends["bought"])), saved)
        num_lost += size(group.lost)
        hour = (group.lines["ingest"] >= world.double_hour[0]) & (
            group.lines["ingest"] < world.double_hour[1]
        )
        num_doubled += int((hour & (group.lines["kind"] == CODES["double_load"])).sum())
    _land_shared(out, world, config, days)
    if days is None and set(chosen) == set(everything):
        for day in range(len(world.days)):
            columns = synthetic_feeds.cost_columns(world, day, num_mails, redeemed)
            if columns["campaign_id"]:
                out.day("costs", world.days[day], columns)
        out.truth("incidents", synthetic_truth.incident_lines(world, num_lost, num_doubled))
    return out.rows | {f"dirt_{kind}": number for kind, number in kinds.items()}


@dataclass(frozen=True)
class _Group:
    """Some shards together, without the users beyond the asked number."""

    shards: tuple[Users, ...]
    lines: Rows
    lost: Rows
    orders: Rows
    outcomes: Rows
    people: Rows


def _draw_group(world: World, config: Config, part: int, tell: Report) -> _Group:
    known, per_group = config.source.num_users, config.world.group_shards
    num_shards = -(-known // SHARD_USERS)
    numbers = range(part * per_group, min((part + 1) * per_group, num_shards))
    shards: list[Shard] = []
    for number in numbers:
        drawn = draw_shard(world, number)
        shards.append(drawn)
        tell("shards", number + 1, num_shards)

    def joined(name: str) -> Rows:
        rows = concat([getattr(shard, name) for shard in shards])
        return take(rows, rows["owner"] < known)

    people = concat([{name: getattr(shard.users, name) for name in _PEOPLE} for shard in shards])
    return _Group(
        tuple(shard.users for shard in shards),
        joined("lines"),
        joined("lost"),
        joined("orders"),
        joined("outcomes"),
        take(people, people["owner"] < known),
    )


def _by_day(day: Array, days: Iterable[int], *order: Array) -> Iterator[tuple[int, Array]]:
    """Positions of the rows of each chosen day, sorted by ``order``, the first one first."""
    position = np.lexsort((*order[::-1], day))
    held = day[position]
    for number in days:
        yield number, position[slice(*np.searchsorted(held, [number, number + 1]))]


def _land_part(
    out: Landing,
    world: World,
    config: Config,
    part: int,
    group: _Group,
    days: DateRange | None,
    tell: Report,
) -> dict[str, int]:
    """Land the files of one group and, with whole days, its truth; returns event lines per kind."""
    chosen = [n for n, day in enumerate(world.days) if days is None or day in days]
    lines, orders, flags = group.lines, group.orders, []
    order = (lines["ingest"], lines["owner"], lines["number"], lines["kind"])
    for number, index in _by_day(lines["day"], chosen, *order):
        tell(f"days of part {part}", number + 1, len(world.days))
        if world.delivery.get(number) == "missing_day":
            continue
        rows, is_new = take(lines, index), config.world.is_dirty and number >= world.dials.drift_day
        file = out.day(
            "events",
            world.days[number],
            synthetic_feeds.event_columns(world, rows),
            part,
            extra={synthetic_feeds.NEW_COLUMN: text("b")} if is_new else {},
            broken=synthetic_feeds.broken_lines(rows),
        )
        flags += synthetic_truth.line_flags(world, rows, number, file)
    for number, index in _by_day(orders["day"], chosen, orders["owner"], orders["order"], orders["status"]):
        out.day("orders", world.days[number], synthetic_feeds.order_columns(take(orders, index)), part)
    _land_mails(out, world, part, group.outcomes, chosen)
    _land_people(out, world, config, part, group.people, days)
    told, counts = synthetic_truth.dirt_lines(world, take(lines, np.isin(lines["day"], chosen)))
    if days is None:
        _land_truth(out, world, config, part, group, told, flags)
    return counts


def _land_mails(out: Landing, world: World, part: int, outcomes: Rows, chosen: list[int]) -> None:
    """Sends under the start of their campaign, redemptions under their own day."""
    starts = np.array([campaign.start for campaign in world.campaigns])[outcomes["campaign"]]
    sent = outcomes["is_treated"]
    for number, _ in world.rounds:
        if number in chosen:
            rows = take(outcomes, sent & (starts == number))
            out.day("sends", world.days[number], synthetic_feeds.send_columns(world, rows), part)
    redeemed = take(outcomes, sent & outcomes["is_converted"])
    days = world.day_of(redeemed["bought"])
    order = (redeemed["bought"], redeemed["owner"], redeemed["campaign"])
    for number, index in _by_day(days, chosen, *order):
        if len(index):
            columns = synthetic_feeds.redemption_columns(world, take(redeemed, index))
            out.day("redemptions", world.days[number], columns, part)


def _land_people(
    out: Landing, world: World, config: Config, part: int, people: Rows, days: DateRange | None
) -> None:
    """The user master once; a consent snapshot per campaign start and for the run date."""
    run = config.run
    if days is None or run.first_date in days:
        out.day("users", run.first_date, synthetic_feeds.user_columns(people), part)
    starts = [world.days[start] for start, _ in world.rounds]
    for day in landing.snapshot_days(starts, run.first_date, run.last_date, run.run_date):
        if days is None or day in days:
            columns = synthetic_feeds.consent_columns(world, people, (day - run.first_date).days)
            out.day("consents", day, columns, part)


def _land_shared(out: Landing, world: World, config: Config, days: DateRange | None) -> None:
    """Campaigns under their start, the catalogue under the first day: nobody's shard."""
    for start, _ in world.rounds:
        if days is None or world.days[start] in days:
            out.day("campaigns", world.days[start], synthetic_feeds.campaign_columns(world, start))
    if days is None or config.run.first_date in days:
        out.day("catalogue", config.run.first_date, synthetic_feeds.catalogue_columns())


def _land_truth(
    out: Landing,
    world: World,
    config: Config,
    part: int,
    group: _Group,
    dirt: list[str],
    flags: list[str],
) -> None:
    known = config.source.num_users
    links = synthetic_truth.first_links(group.lines)
    out.truth("dirt", dirt, part)
    out.truth("lines", flags, part)
    out.truth("links", synthetic_truth.link_lines(world, links), part)
    out.truth("candidates", synthetic_truth.candidate_lines(world, group.outcomes), part)
    people = [line for users in group.shards for line in synthetic_truth.user_lines(world, users, known)]
    out.truth("users", people, part)
    door = synthetic_truth.read_door(world, group.shards, group.lines)
    out.truth("exclusions", synthetic_truth.exclusion_lines(world, door), part)
    if config.world.has_day_truth:
        days = [line for users in group.shards for line in synthetic_truth.day_lines(world, users, known)]
        out.truth("days", days, part)
        out.truth("sessions", synthetic_truth.session_lines(world, door, links), part)


def _quiet(step: str, done: int, total: int) -> None:
    """Report to nobody."""
