"""A side of a benchmark in a process of its own, which does its work once for every line that it reads."""

import subprocess
import sys
from collections.abc import Callable


class Served:
    """The process of ``python -m MODULE ...``, which calls ``serve``; made when it is ready."""

    def __init__(self, *arguments: str) -> None:
        """Start it."""
        command = [sys.executable, "-m", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def ask(self) -> None:
        """Let it do its work."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def answer(self) -> None:
        """Wait until it has done it."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the process has died"

    def run(self) -> None:
        """Ask and wait."""
        self.ask()
        self.answer()

    def end(self) -> None:
        """Let it end."""
        self._process.communicate()


def serve(work: Callable[[], object]) -> None:
    """The other end: say that this process is ready, then work for every line."""
    _tell("ready")
    for _ in sys.stdin:
        work()
        _tell("done")


def _tell(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()
