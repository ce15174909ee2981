"""Heartbeats of ranks and who watches them: a rank that makes no progress is found and named.

Horovod's own stall inspector sees no rank under Gloo, and a stopped process prints nothing and never ends. So
each rank keeps one small object in the run's folder up to date, and the process that started the ranks reads
it. It also counts the exchanges that a rank has entered: all ranks enter the same ones in the same order, so
the rank that lags is the one with the fewest, whatever the clocks say. Ranks on the launcher's machine write
a local file at every step; ranks elsewhere write to the lake, which takes longer than a step, every few
seconds.
"""

import json
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from couponflow.errors import CouponflowError, InfraError
from couponflow.lake import storage

log = logging.getLogger("couponflow")

#: Phases in which a rank may wait for others to start, and in which nothing more is expected of it.
STARTING, DONE = "start", "done"
_RECORD_BYTES = 256
_LAUNCHER = "launcher"
#: Seconds between two looks at the heartbeats, and between two of a rank at its launcher.
_LOOK_SECONDS = 0.5
#: Seconds between two beats of a rank on the lake: an object store takes one write a second of an object.
_SEND_SECONDS = 2.0


@dataclass(frozen=True)
class Beat:
    """Where a rank is: what it was last about to do, and how many exchanges it has entered.

    ``number`` counts the beats, so that no two of a rank are equal.
    """

    rank: int
    phase: str
    epoch: int = 0
    step: int = 0
    exchanges: int = 0
    process: int = 0
    number: int = 0

    def __str__(self) -> str:
        where = f"at epoch {self.epoch}, step {self.step}" if self.epoch else "before the first epoch"
        return f"{where} (last phase: {self.phase})"


class Pulse(ABC):
    """One rank's heartbeat; each beat replaces the last."""

    def __init__(self, rank: int) -> None:
        """Begin to beat."""
        self._beat = Beat(rank, STARTING, process=os.getpid())
        self._keep()

    def beat(self, phase: str, epoch: int = 0, step: int = 0) -> None:
        """Say what this rank is about to do."""
        self._beat = replace(self._beat, phase=phase, epoch=epoch, step=step)
        self._keep()

    def exchange(self) -> None:
        """Say that this rank enters an exchange with the others."""
        self._beat = replace(self._beat, exchanges=self._beat.exchanges + 1)
        self._keep()

    def close(self) -> None:  # noqa: B027 - a local file has every beat at once
        """Leave the last beat where whoever watches sees it."""

    def _keep(self) -> None:
        self._beat = replace(self._beat, number=self._beat.number + 1)
        self._write(json.dumps(asdict(self._beat)).encode())

    @abstractmethod
    def _write(self, record: bytes) -> None:
        """Take one beat; called at every step."""


class FilePulse(Pulse):
    """The heartbeat of a rank on the machine of its launcher: every beat is one write to a local file."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Begin to beat in ``folder``."""
        self._file = os.open(_uri(str(folder), rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        launcher = folder / _LAUNCHER
        self._launcher = int(launcher.read_text(encoding="utf-8")) if launcher.is_file() else 0
        self._looked = 0.0
        super().__init__(rank)

    def beat(self, phase: str, epoch: int = 0, step: int = 0) -> None:
        """Say what this rank is about to do.

        Raises:
            InfraError: the process that started the ranks is gone; nobody would use the result.
        """
        super().beat(phase, epoch, step)
        now = time.monotonic()
        if self._launcher and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if not _is_alive(self._launcher):
                raise InfraError("the process that started this rank is gone; run again")

    def _write(self, record: bytes) -> None:
        os.pwrite(self._file, record.ljust(_RECORD_BYTES), 0)


class LakePulse(Pulse):
    """The heartbeat of a rank that shares nothing but the lake with whoever watches it.

    A thread writes the newest beat, and nothing while there is none: a rank that is stopped, or stuck between
    two beats, is silent. What a rank did in the two seconds before it was killed or stopped is not known.
    """

    def __init__(self, uri: str, rank: int, send_seconds: float = _SEND_SECONDS) -> None:
        """Begin to beat below ``uri``."""
        self._uri, self._seconds = _uri(uri, rank), send_seconds
        self._newest = b""
        self._sent: bytes | None = None
        self._is_over = threading.Event()
        super().__init__(rank)
        self._send()
        self._thread = threading.Thread(target=self._keep_sending, daemon=True)
        self._thread.start()

    def close(self) -> None:  # noqa: D102 - as in Pulse
        self._is_over.set()
        self._thread.join()
        self._send()

    def _write(self, record: bytes) -> None:
        self._newest = record

    def _keep_sending(self) -> None:
        while not self._is_over.wait(self._seconds):
            self._send()

    def _send(self) -> None:
        newest = self._newest
        if newest == self._sent:
            return
        try:
            storage.replace(self._uri, newest, self._sent)
            self._sent = newest
        except CouponflowError as error:  # the rank itself may be well, and says so with its next beat
            log.debug("heartbeat: %s", error)
            self._sent = _held(self._uri)  # an answer may have been lost, not the write


def announce(folder: Path) -> None:
    """Tell the ranks that beat in ``folder`` to end when this process does."""
    (folder / _LAUNCHER).write_text(str(os.getpid()), encoding="utf-8")


class Watch:
    """The launcher's view of all heartbeats of a run."""

    def __init__(
        self,
        uri: str,
        num_ranks: int,
        start_seconds: float,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Forget an earlier run's heartbeats below ``uri``, a local folder or a place on the lake.

        A rank may take ``stall_seconds`` between two beats, and ``start_seconds`` more while ranks start.
        """
        for rank in range(num_ranks):
            storage.remove(_uri(uri, rank))
        self._uri, self._start, self._stall, self._clock = uri, start_seconds, stall_seconds, clock
        begun = clock()
        self._looked = begun
        #: Of each rank the last beat, and when it was first seen by this process' clock.
        self._seen = {rank: (Beat(rank, STARTING, exchanges=-1), begun) for rank in range(num_ranks)}

    def beats(self) -> list[Beat]:
        """The last beat of each rank; one that has not beaten yet has no process."""
        return [beat for beat, _ in self._seen.values()]

    def look(self) -> bool:
        """Read the heartbeats, unless they were just read; returns whether they were.

        Raises:
            InfraError: a rank made no progress for too long; the one that lags is named.
        """
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        self.refresh()
        working = [found for found in self._seen.values() if found[0].phase != DONE]
        if not working:
            if now - max(since for _, since in self._seen.values()) > self._stall:
                raise InfraError(
                    f"all ranks are done but their launcher did not end for {self._stall:g} s and was "
                    "killed; run again"
                )
            return True
        # The others wait for those that lag; while these go on, nobody is stuck.
        fewest = min(beat.exchanges for beat, _ in working)
        beat, since = min(
            (found for found in working if found[0].exchanges == fewest), key=lambda found: found[1]
        )
        if now - since > self._limit(beat):
            raise InfraError(
                f"rank {beat.rank} made no progress for {now - since:.0f} s {beat} and all ranks were "
                "killed; run again: training resumes from its last checkpoint"
            )
        return True

    def refresh(self) -> None:
        """Read every heartbeat; a changed one counts as progress now."""
        for rank, (last, _) in self._seen.items():
            beat = _read(_uri(self._uri, rank))
            if beat is not None and beat != last:
                self._seen[rank] = beat, self._clock()

    def _limit(self, beat: Beat) -> float:
        return self._stall + (self._start if beat.phase == STARTING else 0.0)


def _uri(uri: str, rank: int) -> str:
    return storage.join(uri, f"heartbeat-{rank}")


def _held(uri: str) -> bytes | None:
    """What lies there; None if nothing does, or it cannot be read now."""
    try:
        return storage.read_bytes(uri)
    except CouponflowError:
        return None


def _read(uri: str) -> Beat | None:
    """The beat that lies there; None if there is none, or it is being written."""
    record = _held(uri)
    try:
        return None if record is None else Beat(**json.loads(record))
    except (ValueError, TypeError):
        return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's: it is there
        return True
    return True
