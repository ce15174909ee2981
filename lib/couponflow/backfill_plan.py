"""Backfill plans: which dates of which stages must run for a range of past dates.

``plan`` compares every date with its newest run record: never run, killed, failed, built from older inputs
(``upstream``), built with another config, or finished. ``backfill all`` takes a range of ingest dates and
follows them: the event dates they can touch, the sends whose windows they can reach, the examples of later
as_of dates, training rows as one dataset and the scoring days that were built before. A vocabulary is given,
never rebuilt. No Spark is started for a plan, and nothing is written.

What runs, by ``--reprocess-behavior``:
    always       dates never run or killed, and dates whose inputs have changed or will change in this plan
    failed       also failed dates, and those whose stage has read other config values since
    completed    every date
Older code alone makes no date stale: any edit would. Such dates are named, and ``completed`` runs them.

Clocks: inputs are newer if their run ended after this run started; hosts must agree on the time to seconds.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cache

from couponflow import scopes
from couponflow.config import Config, fingerprint_of
from couponflow.dates import LAST_DAY, MAX_DAYS, DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.lake import contracts, leases, runs, storage

ALL = "all"
JOBS = ("clean_events", "clean_feeds", "sessionize", "attribute_conversions", "build_examples")
#: Also by name, though nothing follows from it.
NAMES = (ALL, *JOBS, "monitor")
BEHAVIOURS = ("none", "failed", "completed")
#: Jobs whose cost hardly depends on the dates: every chunk of them would read all sends again.
WHOLE = ("attribute_conversions", "build_examples")
#: Where a job's bytes lie: folders with one subfolder per date of the given column.
_INPUTS = {
    "clean_events": (("raw/events", "ingest_date"),),
    "clean_feeds": tuple((f"raw/{name}", "ingest_date") for name in contracts.FEEDS if name != "events"),
    "sessionize": (("tables/events", "event_date"),),
    "attribute_conversions": (("tables/sends", ""), ("tables/orders", ""), ("tables/redemptions", "")),
    "build_examples": (("tables/events", ""), ("tables/sends", ""), ("tables/conversions", "send_date")),
}


@dataclass(frozen=True)
class Part:
    """Neighbouring dates of one stage with one fate: ``action`` is run, skip or blocked.

    ``partitions``: dates that the run replaces, over all its tables. ``input_bytes``: bytes of the files in
    the folders that it reads, replaced versions that no VACUUM has removed included.
    """

    job: str
    dates: DateRange
    action: str
    why: str
    campaign: str = ""
    partitions: int = 0
    input_bytes: int = 0

    @property
    def name(self) -> str:
        """The stage."""
        return f"{self.job} campaign {self.campaign}" if self.campaign else self.job


@dataclass
class Plan:
    """Parts in the order of their stages, what a person should know, and deliveries that are missing."""

    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undelivered: list[tuple[str, date]] = field(default_factory=list)

    def running(self, name: str) -> list[DateRange]:
        """Ranges of a stage that run, neighbours joined."""
        found: list[DateRange] = []
        for part in self.parts:
            if part.name == name and part.action == "run":
                joins = bool(found) and found[-1].end == part.dates.start
                found[-1:] = (
                    [DateRange(found[-1].start, part.dates.end)] if joins else [*found[-1:], part.dates]
                )
        return found

    @property
    def stages(self) -> list[Part]:
        """One running part of each stage that runs, in order."""
        return list({part.name: part for part in self.parts if part.action == "run"}.values())

    def check(self) -> None:
        """Refuse a plan whose deliveries are not there, before any date runs.

        Raises:
            DataError: naming feed and day.
        """
        if self.undelivered:
            feed, day = self.undelivered[0]
            raise DataError(
                f"feed {feed} has no delivery for {day} ({len(self.undelivered)} deliveries missing); land "
                f"raw/{feed}/ingest_date={day}, or list closed days in lake.closed_days"
            )


def plan(config: Config, name: str, dates: DateRange, reprocess: str = "none") -> Plan:
    """Decide about every date of a job, or of all stages that a range of ingest dates reaches.

    Raises:
        ConfigError: unknown job or behaviour.
        DataError: a run record or the list of leases is damaged.
    """
    if name not in NAMES or reprocess not in BEHAVIOURS:
        raise ConfigError(
            f"backfill of {name!r} with --reprocess-behavior {reprocess!r}: jobs are {', '.join(NAMES)}, "
            f"behaviours {', '.join(BEHAVIOURS)}; a job of one campaign or model runs by `couponflow job`"
        )
    planner = _Planner(config, reprocess)
    if name != ALL:
        planner.add(name, dates)
        return planner.plan
    sends = reached_sends(config, dates)
    planner.add("clean_events", dates)
    planner.add("clean_feeds", dates)
    planner.add("sessionize", scopes.touched_dates(dates, config))
    planner.add("attribute_conversions", sends)
    planner.add(
        "build_examples", DateRange(sends.start, max(dates.end, planner.last_ingested("clean_events")))
    )
    for campaign, day in planner.campaign_days(dates):
        planner.add("build_examples", DateRange.day(day), campaign)
    return planner.plan


def reached_sends(config: Config, dates: DateRange) -> DateRange:
    """Send dates whose label windows a delivery can reach, late proofs inside the horizon included.

    A campaign's period is not known before its feed is cleaned, and mails older than the data are delivered
    on its first day: both reach back to ``run.first_as_of``.
    """
    first = min(config.run.first_as_of, dates.start)
    if config.conversions.window == "campaign" or dates.start <= config.run.first_date:
        return DateRange(first, dates.end)
    reach = config.conversions.label_days + config.lake.lateness_days + 1
    return DateRange(max(first, dates.start - timedelta(days=reach)), dates.end)


class _Planner:
    """What is known of a lake's runs, and the plan so far: later stages follow what earlier ones will run."""

    def __init__(self, config: Config, reprocess: str) -> None:
        self.plan = Plan()
        self._config, self._reprocess = config, reprocess
        self._tree = config.model_dump(mode="json")
        self._root = config.lake.root_uri
        known = runs.load_all(self._root)
        written = {record.run_id for record in known}
        for claim in leases.dead(self._root):
            if claim.run_id not in written and claim.record.job != leases.UNRECORDED:
                claim.record.status = "killed"  # nobody has written it yet, and a plan writes nothing
                known.append(claim.record)
        self._records = sorted(known, key=lambda record: record.started_time)
        self._failed: list[str] = []
        self._sizes = cache(lambda folder: storage.sizes(storage.join(self._root, folder)))
        self._ended = cache(self._successes)

    def add(self, job: str, dates: DateRange, campaign: str = "") -> None:
        """Decide about the dates of one stage."""
        newest = self._newest(job, campaign)
        fates = {day: self._fate(job, day, campaign, newest.get(day)) for day in dates.days()}
        if job == "build_examples":
            fates = self._as_one_dataset(fates, newest, campaign)
        sources = [source for source, _ in _inputs(job, dates.start, campaign, self._config)]
        blocked = [name for name in self._failed if name in sources]
        if blocked:
            fates = {
                day: ("blocked", f"{blocked[0]} failed") if action == "run" else (action, why)
                for day, (action, why) in fates.items()
            }
        if ("skip", "failed") in fates.values():
            self._failed.append(job)
        self.plan.parts += [self._part(job, campaign, *group) for group in _grouped(fates)]
        self._note(job, campaign, fates, newest)
        if job in ("clean_events", "clean_feeds"):
            self._look_for_deliveries(job)

    def last_ingested(self, job: str) -> date:
        """The day after the newest ingest date that a job has finished."""
        ends = [DateRange.parse(r.dates).end for r in self._records if r.job == job and r.status == "ok"]
        return max(ends, default=date.min)

    def campaign_days(self, dates: DateRange) -> list[tuple[str, date]]:
        """Scoring days after the first ingest date that have been built; a new one is a run of its own."""
        found = {
            (record.arguments["campaign"], DateRange.parse(record.dates).start)
            for record in self._records
            if record.job == "build_examples" and record.arguments.get("campaign") and record.status == "ok"
        }
        return sorted((day for day in found if day[1] > dates.start), key=lambda pair: (pair[1], pair[0]))

    def _newest(self, job: str, campaign: str) -> dict[date, runs.RunRecord]:
        arguments = {"campaign": campaign} if campaign else {}
        newest: dict[date, runs.RunRecord] = {}
        for record in self._records:  # oldest first
            if record.job == job and record.arguments == arguments:
                newest.update(dict.fromkeys(DateRange.parse(record.dates).days(), record))
        return newest

    def _fate(self, job: str, day: date, campaign: str, record: runs.RunRecord | None) -> tuple[str, str]:
        if record is None:
            return "run", "never run"
        if record.status == "killed":
            return "run", "killed"
        upstream = self._upstream(job, day, campaign, record)
        if upstream:
            return "run", upstream
        redone = "run" if self._reprocess != "none" else "skip"
        if record.status != "ok":
            return redone, "failed"
        if self._is_stale(job, record):
            return redone, "config changed"
        finished = "finished" if record.code_version == runs.code_version() else "finished by other code"
        return "run" if self._reprocess == "completed" else "skip", finished

    def _upstream(self, job: str, day: date, campaign: str, record: runs.RunRecord) -> str:
        """Which input of a date will change, or has changed since its newest run."""
        started = datetime.fromisoformat(record.started_time)
        for source, dates in _inputs(job, day, campaign, self._config):
            if any(part.dates.overlaps(dates) for part in self._parts_of(source)):
                return f"{source} runs"
            if any(ended > started and covered.overlaps(dates) for covered, ended in self._ended(source)):
                return f"{source} ran since"
        return ""

    def _parts_of(self, job: str) -> list[Part]:
        return [part for part in self.plan.parts if part.job == job and part.action == "run"]

    def _successes(self, job: str) -> list[tuple[DateRange, datetime]]:
        return [
            (DateRange.parse(record.dates), datetime.fromisoformat(record.finished_time))
            for record in self._records
            if record.job == job and record.status == "ok"
        ]

    def _is_stale(self, job: str, record: runs.RunRecord) -> bool:
        names = scopes.READS[job]
        if not record.config:  # written by code that kept the hash of the whole config only
            return record.config_fingerprint != self._config.fingerprint()
        return fingerprint_of(record.config, *names) != fingerprint_of(self._tree, *names)

    def _as_one_dataset(
        self,
        fates: dict[date, tuple[str, str]],
        newest: dict[date, runs.RunRecord],
        campaign: str,
    ) -> dict[date, tuple[str, str]]:
        """Examples of training are built as one range, with one vocabulary, into one dataset version."""
        from couponflow.sequences import vocabulary

        try:
            version = vocabulary.current(self._root).version
        except DataError:
            return dict.fromkeys(fates, ("blocked", "no vocabulary"))
        others = [
            day
            for day, record in newest.items()
            if record.facts.get("vocabulary_version", version) != version
        ]
        for day in set(others) & set(fates):
            if fates[day][0] == "skip":
                fates[day] = ("run" if self._reprocess != "none" else "skip", "vocabulary changed")
        running = [day for day, (action, _) in fates.items() if action == "run"]
        if campaign or not running:
            return fates
        running += others  # rows of two vocabularies must not stand side by side
        span = DateRange(min(running), max(running) + timedelta(days=1))
        why = Counter(why for action, why in fates.values() if action == "run").most_common(1)[0][0]
        before, after = min(*fates, span.start), max(*fates, span.last)
        return {
            day: ("run", why) if day in span else fates[day]
            for day in DateRange(before, after + timedelta(days=1)).days()
        }

    def _part(self, job: str, campaign: str, dates: DateRange, action: str, why: str) -> Part:
        if action != "run":
            return Part(job, dates, action, why, campaign)
        replaced = scopes.writes(job, dates, self._config, campaign)
        partitions = sum(len(days or dates) for _, days in replaced)
        size = sum(self._bytes(folder, column, dates) for folder, column in _INPUTS.get(job, ()))
        return Part(job, dates, action, why, campaign, partitions, size)

    def _bytes(self, folder: str, column: str, dates: DateRange) -> int:
        wanted = {f"{column}={day}" for day in dates.days()}
        return sum(
            size
            for name, size in self._sizes(folder).items()
            if not name.startswith("_delta_log/") and (not column or name.partition("/")[0] in wanted)
        )

    def _look_for_deliveries(self, job: str) -> None:
        closed = self._config.lake.closed_days
        for folder, column in _INPUTS[job]:
            feed = folder.removeprefix("raw/")
            if not contracts.FEEDS[feed].daily:
                continue
            delivered = {name.partition("/")[0] for name in self._sizes(folder) if "/_" not in name}
            self.plan.undelivered += [
                (feed, day)
                for dates in self.plan.running(job)
                for day in dates.days()
                if day not in closed and f"{column}={day}" not in delivered
            ]

    def _note(
        self,
        job: str,
        campaign: str,
        fates: dict[date, tuple[str, str]],
        newest: dict[date, runs.RunRecord],
    ) -> None:
        left = Counter(why for action, why in fates.values() if action == "skip")
        for why in ("failed", "config changed", "vocabulary changed"):
            if left[why]:
                self.plan.notes.append(
                    f"{job}: {left[why]} dates stay as they are ({why}); "
                    "--reprocess-behavior failed runs them again"
                )
        outside = [day for day, record in newest.items() if day not in fates and self._is_stale(job, record)]
        if outside and not campaign:
            self.plan.notes.append(
                f"{job}: {len(outside)} dates from {min(outside)} to {max(outside)}, outside this backfill, "
                "were built with another config"
            )


def _inputs(job: str, day: date, campaign: str, config: Config) -> list[tuple[str, DateRange]]:
    """The dates of other stages on which one date of a stage depends."""
    if job == "sessionize":
        late = config.lake.lateness_days
        return [("clean_events", DateRange.day(day).widen(before=1, after=late))]
    earlier = DateRange(day - timedelta(days=MAX_DAYS), day)
    if job == "attribute_conversions":
        reach = config.conversions.label_days + config.lake.lateness_days + 1
        if config.conversions.window == "campaign":
            reach = min(MAX_DAYS - 2, (LAST_DAY - day).days)
        return [("clean_feeds", DateRange.day(day).widen(before=1, after=reach))]
    if job == "build_examples" and campaign:
        return [("clean_events", earlier), ("clean_feeds", earlier)]
    if job == "build_examples":
        converted = ("attribute_conversions", DateRange.day(day))
        return [("clean_events", earlier), ("clean_feeds", earlier), converted]
    return []


def _grouped(fates: dict[date, tuple[str, str]]) -> Iterator[tuple[DateRange, str, str]]:
    """Neighbouring dates of one fate, oldest first."""
    days = sorted(fates)
    start = 0
    for end in range(1, len(days) + 1):
        if end < len(days) and fates[days[end]] == fates[days[start]]:
            continue
        yield DateRange(days[start], days[end - 1] + timedelta(days=1)), *fates[days[start]]
        start = end


def chunks(ranges: Iterable[DateRange], size: int) -> list[DateRange]:
    """Cut ranges into runs of at most ``size`` days, oldest first."""
    return [
        DateRange(first, min(first + timedelta(days=size), dates.end))
        for dates in ranges
        for first in list(dates.days())[::size]
    ]
