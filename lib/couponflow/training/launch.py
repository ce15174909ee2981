"""The only door to Horovod: what ranks exchange, how they are started, and what happens when one fails.

``Workers`` is one process' view of the group. At size 1 it does nothing and never imports Horovod, so that
training code has one form. Every method of it but ``beat`` is collective: all ranks call it, in the same
order.
"""

import gc
import json
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

import couponflow
from couponflow.errors import (
    ConfigError,
    ConflictError,
    CouponflowError,
    DataError,
    InfraError,
)
from couponflow.training.family import KILL_SECONDS, Family
from couponflow.training.watchdog import DONE, Beat, Pulse, Watch

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("couponflow")

#: A rank without a heartbeat for so long is taken for hung; ranks beat at every step.
STALL_SECONDS = 300.0
#: Between two looks of Horovod's thread at what is to be exchanged. At its usual 1 the threads of two ranks
#: on two cores talk so often that they slow the training down by a fifth; a step waits for one exchange only.
_CYCLE_MS = 10
#: Seconds that Horovod waits for a silent peer beyond the watchdog, which sees it and names it.
_AFTER_WATCH_SECONDS = 60
_RANKS_PER_CORE = 4
_TICK_SECONDS = 0.5
#: What the launcher puts before a rank's line, and the rank's own time and level.
_PREFIX = re.compile(r"^\[\d+\]<(?:stdout|stderr)>:\s?(?:\d\d:\d\d:\d\d [A-Z]+ )?")
#: How the launcher names the first rank that ended badly, on two lines of its last words.
_FIRST_DEAD = re.compile(r"Process name: (\d+)\s+Exit code: (-?\d+)")
#: What a rank says that has only lost another.
_LOST_PEER = "HorovodInternalError"
_RESUMES = "run again: training resumes from its last checkpoint"
_ERRORS: dict[str, type[CouponflowError]] = {
    error.__name__: error for error in (ConfigError, DataError, ConflictError, InfraError)
}


#: Waits for an exchange that is under way.
Pending = Callable[[], NDArray[np.float64]]


class Workers:
    """A group of one: every exchange returns what it was given."""

    rank = 0
    size = 1
    #: Of the ranks on this machine.
    local_rank = 0

    def beat(self, phase: str, epoch: int = 0, step: int = 0) -> None:
        """Tell who watches what this rank is about to do; a group of one is not watched."""

    def allreduce_sum(self, values: ArrayLike) -> NDArray[np.float64]:
        """Sum over ranks of equally long vectors, float64."""
        return np.atleast_1d(np.asarray(values, np.float64))

    def start_sum(self, name: str, values: ArrayLike) -> Pending:
        """Begin ``allreduce_sum`` and go on; the answer is there by the time that all ranks have begun it.

        A name may be under way once at a time.
        """
        found = self.allreduce_sum(values)
        return lambda: found

    def allreduce_max(self, value: float) -> float:
        """Largest value over ranks."""
        return float(value)

    def gather(self, values: ArrayLike) -> NDArray[np.float64]:
        """All ranks' vectors, of any length each, one after another by rank."""
        return np.asarray(values, np.float64)

    def average(self, tensor: "Tensor") -> "Tensor":
        """Mean over ranks of equally shaped tensors, in place."""
        return tensor

    def broadcast_state(self, state: "dict[str, Tensor]") -> None:
        """Overwrite every tensor by rank 0's, in place."""


class HorovodWorkers(Workers):
    """The group of a Horovod launcher, over Gloo."""

    def __init__(self, pulse: Pulse | None = None) -> None:
        """Join the group that the launcher describes; ``pulse`` is this rank's heartbeat."""
        import horovod.torch as hvd

        self._pulse = pulse

        hvd.init()
        self._hvd: Any = hvd
        self.rank = int(hvd.rank())
        self.size = int(hvd.size())
        self.local_rank = int(hvd.local_rank())

    def beat(self, phase: str, epoch: int = 0, step: int = 0) -> None:  # noqa: D102 - as in Workers
        if self._pulse is not None:
            self._pulse.beat(phase, epoch, step)

    def allreduce_sum(self, values: ArrayLike) -> NDArray[np.float64]:  # noqa: D102 - as in Workers
        return self._reduce(np.atleast_1d(np.asarray(values, np.float64)), self._hvd.Sum, "sum")

    def start_sum(self, name: str, values: ArrayLike) -> Pending:  # noqa: D102 - as in Workers
        return self._start(np.atleast_1d(np.asarray(values, np.float64)), self._hvd.Sum, f"sum_of_{name}")

    def allreduce_max(self, value: float) -> float:  # noqa: D102 - as in Workers
        return float(self._reduce(np.array([value], np.float64), self._hvd.Max, "max")[0])

    def gather(self, values: ArrayLike) -> NDArray[np.float64]:  # noqa: D102 - as in Workers
        import torch

        self._exchange()
        # Gloo's allgather wants a row of every rank: each sends one more than it has.
        own = torch.from_numpy(np.append(np.asarray(values, np.float64), np.nan))
        sizes = self._hvd.allgather(torch.tensor([own.numel()]), name="gather_sizes").tolist()
        parts = torch.split(self._hvd.allgather(own, name="gather"), sizes)
        return np.concatenate([part.numpy()[:-1] for part in parts])

    def average(self, tensor: "Tensor") -> "Tensor":  # noqa: D102 - as in Workers
        self._exchange()
        sent = tensor.cpu()  # Gloo knows host memory only; on the host this copies nothing
        found = self._hvd.allreduce_(sent, op=self._hvd.Average, name=f"average_{tensor.numel()}")
        return tensor.copy_(found)

    def broadcast_state(self, state: "dict[str, Tensor]") -> None:  # noqa: D102 - as in Workers
        self._exchange()
        for name, tensor in sorted(state.items()):
            tensor.copy_(self._hvd.broadcast(tensor.cpu(), root_rank=0, name=f"state_{name}"))

    def _reduce(self, values: NDArray[np.float64], operation: Any, name: str) -> NDArray[np.float64]:
        return self._start(values, operation, f"{name}_{values.size}")()

    def _start(self, values: NDArray[np.float64], operation: Any, name: str) -> Pending:
        import torch

        self._exchange()
        handle = self._hvd.allreduce_async_(torch.from_numpy(values.copy()), op=operation, name=name)
        return lambda: np.asarray(self._hvd.synchronize(handle).numpy())

    def _exchange(self) -> None:
        if self._pulse is not None:
            self._pulse.exchange()


def is_launched() -> bool:
    """Whether a Horovod launcher started this process."""
    return "HOROVOD_RANK" in os.environ  # the launcher's own protocol, not a setting of ours


def connect(folder: Path | None = None) -> Workers:
    """The group of this process: Horovod's under its launcher, else a group of one.

    A rank whose run has a ``folder`` leaves its heartbeat there, from before it meets the others.
    """
    if not is_launched():
        return Workers()
    return HorovodWorkers(None if folder is None else Pulse(folder, int(os.environ["HOROVOD_RANK"])))


def command(
    num_ranks: int,
    argv: Sequence[str],
    start_timeout_seconds: int = 120,
    stall_seconds: float = STALL_SECONDS,
) -> list[str]:
    """The static launch of ``argv`` on ``num_ranks`` local processes, as an argument list.

    Gloo by itself gives a silent peer up after 30 s, and only says that it lost one; here it waits longer
    than whoever watches the ranks. A peer that ended is noticed at once, whatever the limit.

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
    patience = math.ceil(start_timeout_seconds + stall_seconds) + _AFTER_WATCH_SECONDS
    limits = ["--start-timeout", str(start_timeout_seconds), "--gloo-timeout-seconds", str(patience)]
    return [str(launcher), *where, *limits, "--cycle-time-ms", str(_CYCLE_MS), *argv]


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
    for stale in folder.glob("error-*.json"):
        stale.unlink()
    watch = Watch(folder, num_ranks, start_timeout_seconds, stall_seconds)
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
        raise _first_error(folder, num_ranks, code, tail, watch.beats(), hung)


def run_rank(folder: Path, work: Callable[[Workers], None]) -> None:
    """Run ``work`` as one rank; its error goes to a file for the launcher, its exit code to the caller.

    An error that is not ours, such as Horovod's when a peer is gone, counts as ``InfraError``; its traceback
    goes to a file beside.
    """
    workers = connect(folder)
    gc.freeze()  # what is imported stays: walking through it at each collection takes 3 % of a step
    try:
        work(workers)
        workers.beat(DONE)
    except Exception as error:
        ours = error if isinstance(error, CouponflowError) else _foreign(error, folder, workers.rank)
        note = {"class": type(ours).__name__, "message": str(ours)}
        partial = folder / f"{workers.rank}.partial"
        partial.write_text(json.dumps(note), encoding="utf-8")
        partial.replace(folder / f"error-{workers.rank}.json")  # whole: the launcher may kill this rank now
        raise SystemExit(ours.exit_code) from error


def _foreign(error: Exception, folder: Path, rank: int) -> InfraError:
    path = folder / f"traceback-{rank}.txt"
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    text = str(error).strip().partition("\n")[0]
    return InfraError(f"{type(error).__name__}: {text}; run again, or see {path}")


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


def _first_error(
    folder: Path, num_ranks: int, code: int, tail: Sequence[str], beats: Sequence[Beat], hung: Sequence[Beat]
) -> CouponflowError:
    """Why the ranks ended with a code: what one of them has named, or who died or hung without a word, where.

    ``hung``: ranks that outlived their launcher. The others have then only lost their peer.
    """
    named = _rank_error(folder)
    if named is not None and not isinstance(named, InfraError):
        return named
    if hung:
        return InfraError(f"rank {hung[0].rank} hung {hung[0]} and was killed; {_RESUMES}")
    first = _FIRST_DEAD.search("\n".join(tail))
    silent = [beat for beat in beats if not (folder / f"error-{beat.rank}.json").is_file()]
    for beat in silent:
        if first is not None and beat.rank == int(first[1]):
            return InfraError(
                f"rank {beat.rank} ended with code {first[2]} without a word {beat}; {_RESUMES}"
            )
    working = [beat for beat in silent if beat.phase != DONE]
    if working and named is not None and _LOST_PEER in str(named):
        beat = min(working, key=lambda found: found.exchanges)
        return InfraError(f"rank {beat.rank} ended without a word {beat}; {_RESUMES}")
    return named or InfraError(
        f"{num_ranks} ranks ended with code {code} and no error of ours; last lines: "
        f"{' | '.join(list(tail)[-5:])}; run again"
    )


def _rank_error(folder: Path) -> CouponflowError | None:
    notes = []
    for path in folder.glob("error-*.json"):
        note = json.loads(path.read_text(encoding="utf-8"))
        # A rank that saw the cause outranks one that only lost its peer; of those the first counts.
        failed_at = path.stat().st_mtime_ns if note["class"] == "InfraError" else 0
        notes.append((failed_at, int(path.stem.removeprefix("error-")), note))
    if not notes:
        return None
    _, rank, note = min(notes, key=lambda found: found[:2])
    return _ERRORS.get(note["class"], InfraError)(f"rank {rank}: {note['message']}")


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
        text = _PREFIX.sub("", line)
        if text:
            tail.append(text)
            log.info("%s", text)
        if process.poll() is None and watch.look():
            family.look(watch)
