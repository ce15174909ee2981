"""A real object server for the tests of ``gs://``: fake-gcs-server, one per run, a fresh bucket per test."""

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from couponflow.lake import storage


def find_server() -> str | None:
    built = Path(__file__).parents[2] / ".tools" / "bin" / "fake-gcs-server"
    return str(built) if built.is_file() else shutil.which("fake-gcs-server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = find_server()
    if program is None:
        pytest.skip(
            "fake-gcs-server is missing: go install github.com/fsouza/fake-gcs-server@v1.52.2 to .tools/bin"
        )
    address = f"127.0.0.1:{free_port()}"
    url = f"http://{address}"
    command = [program, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", address.rpartition(":")[2], "-external-url", url, "-public-host", address]
    # To a file: nobody drains a pipe, and a full one stops the server.
    with (tmp_path_factory.mktemp("gcs") / "server.log").open("wb") as log:
        process = subprocess.Popen([*command, "-log-level", "warn"], stdout=log, stderr=log)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("fake-gcs-server does not answer")
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, as a ``gs://`` prefix."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    name = f"couponflow-{uuid4().hex[:12]}"
    storage._client().create_bucket(name)
    return f"gs://{name}"
