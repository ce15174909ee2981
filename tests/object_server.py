"""A local object server that stands in for Cloud Storage, and what lets a running Spark session reach it."""

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from uuid import uuid4

from couponflow.lake import connector, storage

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MISSING = "fake-gcs-server is missing: go install github.com/fsouza/fake-gcs-server@v1.52.2 to .tools/bin"


def find_server() -> str | None:
    """The program, as ``make test`` builds it, or that of the PATH."""
    built = Path(__file__).parents[1] / ".tools" / "bin" / "fake-gcs-server"
    return str(built) if built.is_file() else shutil.which("fake-gcs-server")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(program: str, folder: Path) -> Iterator[str]:
    """The server while the body runs, its address; ``folder`` takes its log."""
    address = f"127.0.0.1:{free_port()}"
    url = f"http://{address}"
    command = [program, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", address.rpartition(":")[2], "-external-url", url, "-public-host", address]
    # To a file: nobody drains a pipe, and a full one stops the server.
    with (folder / "server.log").open("wb") as log:
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


def make_bucket() -> str:
    """A fresh bucket on the server that the environment names, as a ``gs://`` prefix."""
    name = f"couponflow-{uuid4().hex[:12]}"
    storage._client().create_bucket(name)
    return f"gs://{name}"


@contextmanager
def reaching(
    spark: "SparkSession", url: str, more: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Let a running session and its Python workers reach a server, as one that was started beside it would.

    ``more`` are further settings of the connector. A bucket that the session has met under another address
    stays there: use a fresh one.
    """
    prefix = "spark.hadoop."
    ours = {name: value for name, value in connector.settings(False, url).items() if name.startswith(prefix)}
    wanted = {name.removeprefix(prefix): value for name, value in ours.items()}
    wanted |= more
    hadoop = spark.sparkContext._jsc.hadoopConfiguration()
    before = {name: hadoop.get(name) for name in wanted}
    workers = spark.sparkContext.environment
    try:
        for name, value in wanted.items():
            hadoop.set(name, value)
        workers["STORAGE_EMULATOR_HOST"] = url
        yield
    finally:
        workers.pop("STORAGE_EMULATOR_HOST", None)
        for name, value in before.items():
            if value is None:
                hadoop.unset(name)
            else:
                hadoop.set(name, value)
