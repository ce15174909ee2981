"""Programs that a shell starts at once: what they import is there already.

A test that types dozens of commands would wait two seconds for each import of Google's libraries. ``serving``
starts one process that imports them and puts small programs into a folder for the PATH: each sends its
arguments, folder, variables and open files there, where a fork takes them all over and runs the command.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spark_runner import guarded

#: Its arguments give its exit code; it may also raise ``SystemExit``.
Program = Callable[[list[str]], object]
#: What stands on the PATH: a Python without site packages, so that it starts in some 20 ms.
CLIENT = """
import json, os, socket, sys
place, name, *words = sys.argv[1:]
asked = json.dumps({"name": name, "words": words, "folder": os.getcwd(), "variables": dict(os.environ)})
with socket.socket(socket.AF_UNIX) as link:
    link.connect(place)
    socket.send_fds(link, [f"{len(asked.encode()):8d}".encode()], [0, 1, 2])
    link.sendall(asked.encode())
    code = link.recv(8)
sys.exit(int(code) if code else 1)
"""


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """The programs ``couponflow`` and ``dataproc-gcloud`` in a folder, while the block runs."""
    place = (
        Path(tempfile.mkdtemp(prefix="warm-")) / "socket"
    )  # a test's own folder is too long a name for one
    client = folder / "warm_client.py"
    client.write_text(CLIENT, encoding="utf-8")
    for name in ("couponflow", "dataproc-gcloud"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {client} {place} {name} "$@"\n')
        program.chmod(0o755)
    process = guarded([sys.executable, __file__, str(place)])
    try:
        until = time.monotonic() + 60
        while not place.exists():
            assert process.poll() is None, "the process that holds the programs has ended"
            assert time.monotonic() < until, "the process that holds the programs does not start"
            time.sleep(0.05)
        yield
    finally:
        process.communicate(timeout=10)  # closes what holds it
        shutil.rmtree(place.parent, ignore_errors=True)


def serve(place: str) -> None:
    """Import, then answer until the process is ended."""
    import dataproc_gcloud

    from couponflow.cli import app

    programs: dict[str, Program] = {
        "couponflow": lambda words: app(words, prog_name="couponflow"),
        "dataproc-gcloud": dataproc_gcloud.main,
    }
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{place}.new")
        door.listen()
        Path(f"{place}.new").rename(place)
        while True:
            link, _ = door.accept()
            if os.fork() == 0:
                answer(link, programs)
            link.close()


def answer(link: socket.socket, programs: Mapping[str, Program]) -> None:
    """Become the program that was asked for, and end with it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(link, 8, 3)
    asked = json.loads(link.makefile("rb").read(int(head)))
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["variables"])
    code: object = 1
    try:
        code = programs[asked["name"]](asked["words"])
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        link.sendall(str(int(code or 0)).encode())
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
