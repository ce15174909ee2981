"""Ranks as processes of this machine: how they are started, followed and ended.

Horovod's launcher runs a static command on each of them; what they exchange is in ``workers``. On a cluster
ranks are Spark tasks instead (``spark_launch``).
"""

import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import couponflow
from couponflow.errors import ConfigError, InfraError
from couponflow.training import rank_errors, watchdog
from couponflow.training.family import KILL_SECONDS, Family
from couponflow.training.watchdog import FilePulse, Watch
from couponflow.training.workers import Workers, connect, launched_rank

log = logging.getLogger("couponflow")

#: A rank without a heartbeat for so long is taken for hung; ranks beat at every step.
STALL_SECONDS = 300.0
#: Between two looks of Horovod's thread at what is to be exchanged. At its usual 1 the threads of two ranks
#: on two cores talk so often that they slow the training down by a fifth; a step waits for one exchange only.
CYCLE_MS = 10
#: Seconds that Horovod waits for a silent peer beyond the watchdog, which sees it and names it.
_AFTER_WATCH_SECONDS = 60
_RANKS_PER_CORE = 4
_TICK_SECONDS = 0.5
#: What the launcher puts before a rank's line, and the rank's own time and level.
_PREFIX = re.compile(r"^\[\d+\]<(?:stdout|stderr)>:\s?(?:\d\d:\d\d:\d\d [A-Z]+ )?")


def patience(start_timeout_seconds: float, stall_seconds: float) -> int:
    """Seconds that Horovod waits for a silent peer: longer than whoever watches the ranks.

    Gloo by itself gives one up after 30 s, and only says that it lost it. A peer that ended is noticed at
    once, whatever the limit.
    """
    return math.ceil(start_timeout_seconds + stall_seconds) + _AFTER_WATCH_SECONDS


def command(
    num_ranks: int,
    argv: Sequence[str],
    start_timeout_seconds: int = 120,
    stall_seconds: float = STALL_SECONDS,
) -> list[str]:
    """The static launch of ``argv`` on ``num_ranks`` local processes, as an argument list.

    Raises:
        ConfigError: more ranks than this machine can sensibly hold.
    """
    slots = (os.cpu_count() or 1) * _RANKS_PER_CORE
    if num_ranks > slots:
        raise ConfigError(
            f"training.num_ranks = {num_ranks}: this machine has slots for {slots}; lower it, "
            "or train on a cluster"
        )
    launcher = Path(sys.executable).parent / "horovodrun"
    if not launcher.is_file():
        raise ConfigError(f"{launcher} does not exist; install the train group (make install)")
    where = ["-np", str(num_ranks), "-H", f"localhost:{num_ranks}", "--gloo"]
    seconds = patience(start_timeout_seconds, stall_seconds)
    limits = ["--start-timeout", str(start_timeout_seconds), "--gloo-timeout-seconds", str(seconds)]
    return [str(launcher), *where, *limits, "--cycle-time-ms", str(CYCLE_MS), *argv]


def run(
    num_ranks: int,
    argv: Sequence[str],
    folder: Path,
    start_timeout_seconds: int = 120,
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Start the ranks, pass their lines on, and raise what stopped them.

    ``folder`` is where ranks leave heartbeats and errors (``run_rank``); it must exist. The whole family is
    killed, the stopped processes in it too, when a rank makes no progress for ``stall_seconds``, when the
    launcher ends and leaves some behind, when this call is left early or this process is asked to end
    (SIGTERM).

    Raises:
        ConfigError, DataError, ConflictError, InfraError: the error of the first rank that named one;
            InfraError when a rank died without a word or made no progress.
    """
    uri = str(folder)
    rank_errors.forget(uri, num_ranks)
    watch = Watch(uri, num_ranks, start_timeout_seconds, stall_seconds)
    watchdog.announce(folder)
    bin_folder = str(Path(sys.executable).parent)
    package_folder = str(Path(couponflow.__file__).parent.parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",  # ranks share the cores; a second thread each would only fight for them
    }
    process = subprocess.Popen(
        command(num_ranks, argv, start_timeout_seconds, stall_seconds),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    family = Family(process)
    assert process.stdout is not None  # a pipe was asked for
    tail: deque[str] = deque(maxlen=20)
    try:
        with _ended_by_sigterm():
            _follow(process, tail, watch, family)
            code = process.wait(timeout=KILL_SECONDS)
            watch.refresh()
            hung = [beat for beat in watch.beats() if family.has(beat.process)]
    except subprocess.TimeoutExpired as error:
        raise InfraError(
            f"ranks closed their output but did not end within {KILL_SECONDS:.0f} s; run again"
        ) from error
    finally:
        family.kill()
    if code:
        raise rank_errors.first(uri, num_ranks, f"code {code}", tail, watch.beats(), hung)


def run_rank(folder: Path, work: Callable[[Workers], None]) -> None:
    """Run ``work`` as one rank of ``run``, whose heartbeat and error go to ``folder``."""
    rank = launched_rank()
    pulse = None if rank is None else FilePulse(folder, rank)
    rank_errors.guard(str(folder), connect(pulse), work)


def plain(line: str) -> str:
    """A line of a rank without what the launcher and the rank's own log put before it."""
    return _PREFIX.sub("", line)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit that runs clean-up: ranks have sessions of their own and would live on."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that Python cannot restore


def _follow(process: "subprocess.Popen[str]", tail: deque[str], watch: Watch, family: Family) -> None:
    """Log each line as it comes until the ranks' output ends.

    Raises:
        InfraError: a rank makes no progress.
    """
    stream = process.stdout
    assert stream is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        with stream:  # closed here: a close elsewhere would wait for this thread's read
            for line in stream:
                lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    ended = 0
    while ended * _TICK_SECONDS < KILL_SECONDS:  # whoever holds the pipe longer than that is a stray
        try:
            line = lines.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            line = ""
            ended += process.poll() is not None
        if line is None:
            return
        text = plain(line)
        if text:
            tail.append(text)
            log.info("%s", text)
        if process.poll() is None and watch.look():
            family.look(watch)
