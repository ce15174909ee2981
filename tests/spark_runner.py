"""Runs the driver of a PySpark job as a cluster would: files from the object store, a process of its own.

``SparkRunner`` is a runner for ``dataproc_core.Core``. Each driver is a real ``spark-submit`` in a fresh
folder that holds what the job names and nothing else: no repository is on its path, so that the package of
``pythonFileUris`` is what it imports. Paths in ``gs://`` work in Spark where the connector's jar is given.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from couponflow.lake import connector as gs

#: What a job may ask of a cluster and one machine without GPUs cannot give.
CLUSTER_ONLY = (
    "spark.executor.resource.",
    "spark.task.resource.",
    "spark.task.cpus",
    "spark.executor.cores",
    "spark.executor.instances",
    "spark.yarn.",
)
#: Of this process's environment, what a driver needs to find its programs. All else stays out.
KEPT = ("PATH", "HOME", "JAVA_HOME", "LANG", "TMPDIR")
#: A lake of a few hundred rows on two cores: the defaults would start hundreds of tasks for each of its logs,
#: and compile, optimise and plan anew what runs once.
SMALL_LAKE = {
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
}
#: Starts a command and ends with it. When its own input ends first, whoever held it is gone or wants the
#: driver gone: the group may end by itself, then is killed. Python workers of Spark end with their JVM.
GUARD = """
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGTERM, lambda number, frame: None)
driver = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)
    try:
        driver.wait(5)
    finally:
        os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = driver.wait()
os._exit(code if code >= 0 else 128 - code)
"""


def guarded(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own that ends with this process, however that ends.

    Closing ``stdin`` of what is returned ends it, too.
    """
    guard = [sys.executable, "-I", "-c", GUARD, *command]
    return subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True, **options)


class Objects:
    """An object server at a URL, by ``gs://`` names."""

    def __init__(self, url: str) -> None:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client

        anonymous: Any = AnonymousCredentials  # untyped in the library
        self.client = Client(project="test", credentials=anonymous(), client_options={"api_endpoint": url})

    def read(self, uri: str) -> bytes:
        """The bytes of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        from google.api_core.exceptions import NotFound

        try:
            return bytes(self._blob(uri).download_as_bytes())
        except NotFound as error:
            raise FileNotFoundError(f"{uri} does not exist") from error

    def write(self, uri: str, content: bytes) -> None:
        """Write an object, into a new bucket if need be, as Dataproc does with its staging bucket."""
        from google.api_core.exceptions import Conflict, NotFound

        try:
            self._blob(uri).upload_from_string(content)
        except NotFound:
            with contextlib.suppress(Conflict):  # another driver was first
                self.client.create_bucket(uri.removeprefix("gs://").partition("/")[0])
            self._blob(uri).upload_from_string(content)

    def _blob(self, uri: str) -> Any:
        bucket, _, name = uri.removeprefix("gs://").partition("/")
        return self.client.bucket(bucket).blob(name)


class SparkRunner:
    """Drivers under ``folder``, their files out of the object server at ``store_url``.

    ``connector`` is the jar of Spark's connector for ``gs://``; ``settings`` are Spark's, above those of a
    job; ``environment`` goes to every driver, such as the key that a secret store would hold.
    """

    def __init__(
        self,
        folder: Path,
        store_url: str,
        *,
        connector: Path | None = None,
        master: str = "local[2]",
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.store_url, self.connector = folder, store_url.rstrip("/"), connector
        self.master, self.settings = master, dict(settings or {})
        self.environment = dict(environment or {})
        self.objects = Objects(self.store_url)
        self.lock = threading.Lock()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.stopped: set[str] = set()  # jobs, also those that have not started yet

    def __call__(self, job: Any) -> tuple[int, str]:
        """Run the driver of a job to its end: its exit code and all that it printed."""
        program, job_id = job.pyspark_job, str(job.reference.job_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{job_id}-", dir=self.folder))
        try:
            main = self._download(program.main_python_file_uri, folder)
            packages = [self._download(uri, folder) for uri in program.python_file_uris]
            files = [self._download(uri, folder) for uri in program.file_uris]
        except FileNotFoundError as error:
            return 1, f"{error}\n"
        command = [str(_spark_home() / "bin" / "spark-submit"), "--master", self.master]
        for name, value in (self._settings() | _possible(program.properties) | self.settings).items():
            command += ["--conf", f"{name}={value}"]
        command += _listed("--py-files", packages) + _listed("--files", files)
        return self._run(job_id, [*command, main, *program.args], folder)

    def stop(self, job_id: str) -> None:
        """End a driver, now or as soon as it starts; its caller gets the exit code of a killed process."""
        with self.lock:
            self.stopped.add(job_id)
            if job_id in self.running:
                _let_go(self.running[job_id])

    def _run(self, job_id: str, command: list[str], folder: Path) -> tuple[int, str]:
        log = folder / "driveroutput"
        with log.open("wb") as output:  # not a pipe: nobody drains it, and a full one stops the driver
            process = guarded(
                command, cwd=folder, env=self._environment(folder), stdout=output, stderr=subprocess.STDOUT
            )
        with self.lock:
            self.running[job_id] = process
            if job_id in self.stopped:
                _let_go(process)
        exit_code = process.wait()
        with self.lock:
            del self.running[job_id]
            _let_go(process)
        return exit_code, log.read_text(errors="replace")

    def _download(self, uri: str, folder: Path) -> str:
        path = folder / uri.rpartition("/")[2]
        path.write_bytes(self.objects.read(uri))
        return path.name

    def _environment(self, folder: Path) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        return (
            kept
            | {
                "SPARK_HOME": str(_spark_home()),
                "SPARK_LOCAL_IP": "127.0.0.1",
                "SPARK_LOCAL_DIRS": str(folder / "scratch"),
                "PYSPARK_PYTHON": sys.executable,
                "PYTHONUNBUFFERED": "1",
                "STORAGE_EMULATOR_HOST": self.store_url,
            }
            | self.environment
        )

    def _settings(self) -> dict[str, str]:
        made = {"spark.ui.enabled": "false", "spark.driver.memory": "1g", "spark.log.level": "WARN"}
        if self.connector is not None:
            made |= gs.settings(False, self.store_url)
            if self.connector.parent != _spark_home() / "jars":  # those are on the class path already
                made["spark.jars"] = str(self.connector)
        return made


def _let_go(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _spark_home() -> Path:
    import pyspark

    return Path(pyspark.__file__).parent


def _possible(properties: Mapping[str, str]) -> dict[str, str]:
    """The properties that one machine can give."""
    return {name: value for name, value in properties.items() if not name.startswith(CLUSTER_ONLY)}


def _listed(option: str, names: Iterable[str]) -> list[str]:
    joined = ",".join(names)
    return [option, joined] if joined else []
