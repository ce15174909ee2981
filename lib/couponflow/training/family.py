"""The processes of a launch: who belongs to it, who is left, and the end of all of them."""

import subprocess
import time
from contextlib import suppress
from typing import Any

from couponflow.training.watchdog import Watch

#: Seconds that processes have to be gone after they were told to.
KILL_SECONDS = 10.0


class Family:
    """The launcher and all its descendants; ranks have sessions of their own, and may outlive it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        """The family of a launcher that has just been started."""
        import psutil  # type: ignore[import-untyped]  # comes with horovod, without types

        self._psutil, self._process = psutil, process
        self._parent = psutil.Process(process.pid)
        self._members: set[Any] = set()  # psutil tells a process from a later one with its number
        self._ranks: set[int] = set()

    def look(self, watch: Watch) -> None:
        """Remember who belongs to it now."""
        gone = self._psutil.NoSuchProcess
        with suppress(gone):
            self._members.update(self._parent.children(recursive=True))
        for process in {beat.process for beat in watch.beats()} - self._ranks - {0}:
            self._ranks.add(process)  # looked up once: its number may later be another's
            with suppress(gone):
                self._members.add(self._psutil.Process(process))

    def has(self, process: int) -> bool:
        """Whether this process of it is left."""
        return any(member.pid == process and self._is_left(member) for member in self._members)

    def kill(self) -> None:
        """End all that are left, also those that are stopped."""
        gone = self._psutil.NoSuchProcess
        with suppress(gone):
            self._members.update(self._parent.children(recursive=True))
        if self._process.poll() is None:
            self._members.add(self._parent)
        for member in self._members:
            with suppress(gone):
                member.kill()
        deadline = time.monotonic() + KILL_SECONDS
        while any(map(self._is_left, self._members)) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._process.wait(timeout=KILL_SECONDS)

    def _is_left(self, member: Any) -> bool:
        with suppress(self._psutil.NoSuchProcess):
            return bool(member.is_running() and member.status() != self._psutil.STATUS_ZOMBIE)
        return False
