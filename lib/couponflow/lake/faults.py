"""Faults on purpose, for tests only: ``COUPONFLOW_FAULT=stage:point:action``.

``stage`` is a job or a table, or one of them with the first day of its range: ``clean_events@2024-01-03``.
Points:
    of a job    ``before_run`` (lease held, nothing read), ``before_record`` (all tables written, no record),
                ``after_record`` (record written, lease still held);
    of a table  ``before_write``, ``during_write`` (data files lie there, no commit), ``after_commit``;
    of export_audience  ``after_claim``, ``after_list``, ``after_load`` (the table is there, no manifest),
                ``after_manifest``;
    of scoring, stage ``score@part``: ``part`` (that part is written);
    of a rank of train, stage ``train@rank-epoch-step``: ``load``, ``step``, ``checkpoint`` (its content is
                written, its manifest not), ``validate``.
Actions: ``kill`` (SIGKILL of the driver), ``stop`` (SIGSTOP of it), ``exc`` (an infrastructure error),
``enospc`` (a full disk), ``sleep`` (five seconds); only during a write also ``kill_worker`` (SIGKILL of the
Python worker), ``kill_executor`` and ``end_executor`` (SIGKILL and SIGTERM of its JVM, on ``local-cluster``).
A fault fires once per lake: a marker file, created exclusively, lies in the lake's folder. Any master that is
not local, and any lake that is not a folder, is refused: no deployed run can have a fault.
"""

import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from couponflow.errors import ConfigError, InfraError
from couponflow.lake import storage

if TYPE_CHECKING:
    import pyarrow as pa

VARIABLE = "COUPONFLOW_FAULT"
POINTS = ("before_run", "before_record", "after_record", "before_write", "during_write", "after_commit")
HANDOVER_POINTS = ("after_claim", "after_list", "after_load", "after_manifest")
RANK_POINTS = ("load", "step", "checkpoint", "validate")
SCORE_POINTS = ("part",)
_ALL_POINTS = POINTS + HANDOVER_POINTS + RANK_POINTS + SCORE_POINTS
ACTIONS = ("kill", "stop", "exc", "enospc", "sleep", "kill_worker", "kill_executor", "end_executor")
_SIGNALS = {"stop": signal.SIGSTOP, "end_executor": signal.SIGTERM}
_SLEEP_SECONDS = 5.0


def check(root_uri: str, master: str) -> None:
    """Refuse a fault that is misspelt, or that is set where a real run could meet it.

    Raises:
        ConfigError: see above.
    """
    if not os.environ.get(VARIABLE):
        return
    _, point, action = _parsed()
    if point not in _ALL_POINTS or action not in ACTIONS:
        raise ConfigError(
            f"{VARIABLE}={os.environ[VARIABLE]}: expected stage:point:action with a point of "
            f"{', '.join(_ALL_POINTS)} and an action of {', '.join(ACTIONS)}; unset it outside tests"
        )
    if not master.startswith("local") or storage.is_remote(root_uri):
        raise ConfigError(
            f"{VARIABLE} is set and master {master}, lake {root_uri} is no test on one machine; unset it"
        )


def fire(root_uri: str, stage: str, point: str, place: date | str | None = None) -> None:
    """Do what the variable asks for at this place, if it means this place and has not fired.

    ``place``: the first day of the range, or where a rank is.
    """
    if is_set(stage, point, place):
        _act(root_uri, os.getpid())


def is_set(stage: str, point: str, place: date | str | None = None) -> bool:
    """Whether the variable means this place."""
    if not os.environ.get(VARIABLE):
        return False
    wanted, at, _ = _parsed()
    return at == point and wanted in (stage, f"{stage}@{place}")


def passing(root_uri: str) -> "Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]":
    """Work for ``python_tasks.map_in_arrow`` that hands rows on and fires, once, at the end of a partition.

    By then other tasks may have left data files; the action meets the driver, not the Python worker.
    """
    driver, fault = os.getpid(), os.environ[VARIABLE]

    def run(batches: "Iterable[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
        yield from batches
        os.environ[VARIABLE] = fault
        _act(root_uri, driver)

    return run


def _parsed() -> tuple[str, str, str]:
    stage, _, rest = os.environ[VARIABLE].partition(":")
    point, _, action = rest.partition(":")
    return stage, point, action


def _act(root_uri: str, process: int) -> None:
    fault = os.environ[VARIABLE]
    marker = Path(root_uri) / f".fault-{hashlib.sha256(fault.encode()).hexdigest()[:12]}"
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    action = _parsed()[2]
    if action == "exc":
        raise InfraError(f"fault {fault}: an error on purpose; run again")
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root_uri))
    if action == "sleep":
        time.sleep(_SLEEP_SECONDS)
        return
    if action == "kill_worker":
        process = os.getpid()
    elif action.endswith("_executor"):
        process = _parent_jvm(os.getpid())
    os.kill(process, _SIGNALS.get(action, signal.SIGKILL))
    time.sleep(_SLEEP_SECONDS)  # the worker waits for the driver's end, and hands nothing on meanwhile


def _parent_jvm(process: int) -> int:
    """The executor that started this Python worker: the nearest ``java`` above it."""
    while Path(f"/proc/{process}/comm").read_text().strip() != "java":
        # After the name in brackets, which may hold blanks: state, then the parent.
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process
