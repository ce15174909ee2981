"""What a person sees on the terminal: progress of long work, and the tables a run ends with.

Bars go to stderr and only to a terminal; elsewhere the same facts are log lines. Results go to stdout.
"""

import json
import logging
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from couponflow import pipeline
from couponflow.backfill_plan import Plan
from couponflow.entry import log

_terminal = Console(highlight=False)
#: Tables keep a readable width in a log file, where no terminal sets one.
out = _terminal if _terminal.is_terminal else Console(highlight=False, width=120)
_HEARTBEAT_SECONDS = 15.0
_EPOCH = re.compile(r"\bepoch (\d+)/(\d+)")
_POLL_SECONDS = 0.5


class _Epochs(logging.Handler):
    """Moves the bar when a line such as ``epoch 3/8`` is logged: ranks speak through their lines alone."""

    def __init__(self, step: Callable[[str, int, int], None]) -> None:
        super().__init__()
        self._step = step

    def emit(self, record: logging.LogRecord) -> None:
        found = _EPOCH.search(record.getMessage())
        if found:
            self._step("epochs", int(found[1]), int(found[2]))


class RunDisplay:
    """Draws the stages of a run: a bar over all stages, one for the work inside the present stage."""

    def __init__(self, spark: Callable[[], Any | None], unit: str = "all stages") -> None:
        """Take where to look for the session, without starting one, and what the outer bar counts."""
        self._spark = spark
        self._unit = unit
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", justify="left"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._stop = threading.Event()
        self._lock = threading.RLock()  # the watcher moves a bar that the next stage removes
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._epochs = _Epochs(self._step)
        self._stages: TaskID | None = None
        self._inner: TaskID | None = None
        self._name = ""
        self._is_terminal = self._bars.console.is_terminal

    def __enter__(self) -> pipeline.Progress:
        if self._is_terminal:
            self._bars.start()
        self._thread.start()
        log.addHandler(self._epochs)
        return pipeline.Progress(self._start, self._end, self._step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        log.removeHandler(self._epochs)
        self._stop.set()
        self._thread.join(timeout=2)
        self._bars.stop()

    def _start(self, done: int, total: int, stage: pipeline.Stage) -> None:
        self._name = stage.name
        if not self._is_terminal:
            log.info("[%d/%d] %s %s", done + 1, total, stage.name, stage.dates)
            return
        if self._stages is None:
            self._stages = self._bars.add_task(self._unit, total=total, rate="")
        with self._lock:
            if self._inner is not None:
                self._bars.remove_task(self._inner)
            self._inner = self._bars.add_task(stage.name, total=None, rate="")
        self._bars.update(self._stages, completed=done)

    def _end(self, done: int, total: int, outcome: pipeline.Outcome) -> None:
        how = "skipped, nothing changed" if outcome.is_skipped else f"done in {outcome.record.seconds:.1f} s"
        if self._stages is not None:
            self._bars.update(self._stages, completed=done)
            self._bars.console.print(f"[{done}/{total}] {outcome.stage.name}: {how}")
        else:
            log.info("[%d/%d] %s: %s", done, total, outcome.stage.name, how)

    def _step(self, what: str, done: int, total: int) -> None:
        with self._lock:
            if self._inner is None:
                return
            task = self._bars.tasks[self._bars.task_ids.index(self._inner)]
            rate = f"{done / task.elapsed:,.1f}/s" if task.elapsed and done else ""
            self._bars.update(
                self._inner, completed=done, total=total, rate=rate, description=f"{self._name}: {what}"
            )

    def _watch(self) -> None:
        """Show the tasks of the running Spark stages; without a terminal, one line now and then."""
        waited = 0.0
        while not self._stop.wait(_POLL_SECONDS):
            waited += _POLL_SECONDS
            done, total = self._tasks()
            if total and self._is_terminal:
                self._step("Spark tasks", done, total)
            elif total and waited >= _HEARTBEAT_SECONDS:
                log.info("%s: %d of %d Spark tasks", self._name, done, total)
                waited = 0.0

    def _tasks(self) -> tuple[int, int]:
        spark = self._spark()
        if spark is None:
            return 0, 0
        tracker = spark.sparkContext.statusTracker()
        stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
        return sum(s.numCompletedTasks for s in stages if s), sum(s.numTasks for s in stages if s)


def show_plan(stages: list[pipeline.Stage]) -> None:
    """Print the stages of a plan."""
    table = Table("stage", "dates", "after", "writes", title="Plan", title_justify="left")
    for stage in stages:
        table.add_row(stage.name, str(stage.dates), ", ".join(stage.after), ", ".join(stage.writes))
    out.print(table)


def show_backfill(title: str, planned: Plan) -> None:
    """Print what a backfill will do and what it leaves."""
    rows = [
        [part.name, str(part.dates), part.action, part.why, part.partitions or "", _size(part.input_bytes)]
        for part in planned.parts
    ]
    show_rows(title, ["stage", "dates", "action", "why", "partitions", "input"], rows)
    for note in planned.notes:
        out.print(Text(note))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes else ""


def show_rows(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print one table; numbers to the right with thousands separators."""
    table = Table(title=title, title_justify="left")
    numeric = [
        bool(rows) and all(isinstance(row[n], int | float) for row in rows) for n in range(len(columns))
    ]
    for name, is_number in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        # Text, not markup: an error may hold [/brackets].
        table.add_row(*[Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row])
    out.print(table)


def show_json(value: Any) -> None:
    """Print one JSON document for machines."""
    out.out(json.dumps(value, indent=1, sort_keys=True, default=str), highlight=False)
