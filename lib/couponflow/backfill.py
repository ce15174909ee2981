"""Running a backfill plan: stage by stage, inside a stage chunk by chunk in any order, several at once.

Every chunk is a run of its own with its own record, so a backfill that dies goes on where it was: call it
again. Chunks that run at once never replace the same dates. In this process one lease covers all dates that
the plan replaces until the command ends. Contents do not depend on chunks, order, repetition or place.
"""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from couponflow import pipeline, scopes
from couponflow.backfill_plan import WHOLE, Part, Plan, chunks
from couponflow.config import Config
from couponflow.dates import MAX_DAYS, DateRange
from couponflow.entry import record_run
from couponflow.errors import ConfigError, CouponflowError, DataError
from couponflow.lake import leases, runs
from couponflow.pipeline import Outcome, Progress, Stage

log = logging.getLogger("couponflow")


@dataclass(frozen=True)
class Order:
    """How the dates of a stage are cut and in which order they run.

    ``chunk_days``: neighbouring days that one Spark run takes; more is faster and needs more memory.
    ``order_seed``: any order, drawn from this seed. ``max_active_runs``: chunks at once, in one session or as
    jobs of one cluster.
    """

    chunk_days: int = 7
    run_backwards: bool = False
    order_seed: int | None = None
    max_active_runs: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_days <= MAX_DAYS or not 1 <= self.max_active_runs <= 64:
            raise ConfigError(
                f"backfill with --chunk-days {self.chunk_days} --max-active-runs {self.max_active_runs}: "
                f"expected 1 to {MAX_DAYS} days and 1 to 64 runs"
            )

    def cut(self, job: str, ranges: list[DateRange]) -> list[DateRange]:
        """The chunks of a stage in the order in which they start."""
        found = chunks(ranges, MAX_DAYS if job in WHOLE else self.chunk_days)
        if self.run_backwards:
            found.reverse()
        if self.order_seed is not None:
            random.Random(f"{self.order_seed} {job}").shuffle(found)
        return found


#: Each stage that runs, with its chunks in the order in which they start.
Stages = list[tuple[Part, list[DateRange]]]


class Place(Protocol):
    """Where the chunks of a plan run: in this process, or as jobs of a cluster."""

    def held(self, stages: Stages) -> AbstractContextManager[Callable[[], None]]:
        """Bring what all stages need, and take it away; what is given is called after each stage.

        Raises:
            ConflictError: another run holds dates that the plan replaces; nothing has run then.
        """

    def stage(self, part: Part) -> Callable[[DateRange], runs.RunRecord]:
        """What runs one chunk of a stage to its end; several threads call it at once."""

    def interrupt(self) -> None:
        """A person has ended the command: chunks that are waited for need not be waited for."""


def execute(
    config: Config, planned: Plan, order: Order, spark: Callable[[], Any], progress: Progress
) -> list[Outcome]:
    """Run what a plan says in this process; as ``run_plan``."""
    return run_plan(config, planned, order, _Here(config, spark), progress)


def run_plan(config: Config, planned: Plan, order: Order, place: Place, progress: Progress) -> list[Outcome]:
    """Run what a plan says; returns one outcome per chunk. The first failure ends it; what is done stays.

    Raises:
        ConflictError: another run holds dates that the plan replaces; nothing has run then.
        DataError: a delivery is missing, or stages of the plan are blocked; all others have run.
    """
    planned.check()
    stages = [(part, order.cut(part.job, planned.running(part.name))) for part in planned.stages]
    total = sum(len(dates) for _, cut in stages for dates in cut)
    outcomes: list[Outcome] = []
    with place.held(stages) as check:
        for part, cut in stages:
            shown = _Shown(part, progress, sum(len(o.stage.dates) for o in outcomes), total)
            outcomes += _run_stage(config, part, cut, order.max_active_runs, place, shown)
            check()
    _refuse_blocked([part for part in planned.parts if part.action == "blocked"])
    return outcomes


def replaced(config: Config, stages: Stages) -> tuple[leases.Scope, ...]:
    """Everything that the chunks of the stages will replace."""
    found = [
        scope
        for part, cut in stages
        for dates in cut
        for scope in scopes.writes(part.job, dates, config, part.campaign)
    ]
    return tuple(dict.fromkeys(found))


def opened(config: Config, stages: Stages) -> runs.RunRecord:
    """The backfill as a run, from its first to its last date; it is never written."""
    first = min(dates.start for _, cut in stages for dates in cut)
    last = max(dates.end for _, cut in stages for dates in cut)
    return runs.start(leases.UNRECORDED, str(DateRange(first, last)), {}, config.fingerprint())


class _Here:
    """This process: one Spark session, one lease on everything that the plan replaces."""

    def __init__(self, config: Config, spark: Callable[[], Any]) -> None:
        self._config, self._spark = config, spark
        self._run_id = ""

    @contextmanager
    def held(self, stages: Stages) -> Iterator[Callable[[], None]]:
        if not stages:
            yield lambda: None
            return
        record = opened(self._config, stages)
        with leases.held(self._config.lake.root_uri, record, replaced(self._config, stages)) as lease:
            self._run_id = lease.run_id
            yield lease.check

    def stage(self, part: Part) -> Callable[[DateRange], runs.RunRecord]:
        job, session = pipeline.load_job(part.job), self._spark()

        def run_one(dates: DateRange) -> runs.RunRecord:
            try:
                with record_run(part.job, self._config, dates, part.campaign, within=self._run_id) as run:
                    job.run(session, run)
            except CouponflowError:  # the same command would pass over dates that are recorded as failed
                log.warning(
                    "%s %s failed; when its cause is gone, repeat this command with "
                    "--reprocess-behavior failed",
                    part.name,
                    dates,
                )
                raise
            return run.record

        return run_one

    def interrupt(self) -> None:
        """Chunks of this process end with it."""


class _Shown:
    """Tells how many days are done; chunks that run at once take turns."""

    def __init__(self, part: Part, progress: Progress, done: int, total: int) -> None:
        self._part, self._progress, self._done, self._total = part, progress, done, total
        self._lock = threading.Lock()

    def stage(self, dates: DateRange) -> Stage:
        """The stage as a progress display knows it."""
        return Stage(self._part.job, dates, (), campaign=self._part.campaign)

    def start(self, dates: DateRange) -> None:
        """A chunk starts."""
        with self._lock:
            self._progress.start(self._done, self._total, self.stage(dates))

    def end(self, outcome: Outcome) -> None:
        """A chunk has ended well."""
        with self._lock:
            self._done += len(outcome.stage.dates)
            self._progress.end(self._done, self._total, outcome)


def _run_stage(
    config: Config, part: Part, cut: list[DateRange], max_active: int, place: Place, shown: _Shown
) -> list[Outcome]:
    """Run the chunks of one stage, at most so many at once, none beside one that replaces its dates."""
    run_chunk = place.stage(part)

    def run_one(dates: DateRange) -> Outcome:
        shown.start(dates)
        outcome = Outcome(shown.stage(dates), run_chunk(dates), False)
        shown.end(outcome)
        return outcome

    def meet(one: DateRange, other: DateRange) -> bool:
        pairs = [scopes.writes(part.job, dates, config, part.campaign) for dates in (one, other)]
        return any(leases.clash(a, b) for a in pairs[0] for b in pairs[1])

    waiting, outcomes = list(cut), []
    active: dict[Future[Outcome], DateRange] = {}
    failure: BaseException | None = None
    with ThreadPoolExecutor(max_active) as pool, _interrupting(place):
        while active or (waiting and failure is None):
            for dates in list(waiting) if failure is None else ():
                if len(active) < max_active and not any(meet(dates, other) for other in active.values()):
                    waiting.remove(dates)
                    active[pool.submit(run_one, dates)] = dates
            done, _ = wait(active, return_when=FIRST_COMPLETED)
            for future in done:
                del active[future]
                failure = failure or future.exception()
                if future.exception() is None:
                    outcomes.append(future.result())
    if failure is not None:
        raise failure
    return outcomes


@contextmanager
def _interrupting(place: Place) -> Iterator[None]:
    """Tells the place of Ctrl-C before the pool waits for its threads."""
    try:
        yield
    except KeyboardInterrupt:
        place.interrupt()
        raise


def _refuse_blocked(blocked: list[Part]) -> None:
    if not blocked:
        return
    part = blocked[0]
    step = (
        "run `couponflow job build_vocabulary --dates A:B` over the event dates that it may see, then this "
        "command again"
        if part.why == "no vocabulary"
        else "repeat this command with --reprocess-behavior failed"
    )
    raise DataError(f"{part.name} {part.dates}: blocked, {part.why}; {step}")
