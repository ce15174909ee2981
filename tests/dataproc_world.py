"""An environment whose services are stand-ins: Dataproc of ``dataproc_server``, and fake-gcs-server."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from dataproc_drivers import Drivers
from dataproc_server import Server, serving
from deploy_files import DEPLOY, ROOT
from google.cloud import dataproc_v1 as dp
from typer.testing import CliRunner, Result

from couponflow.cli import app
from couponflow.lake import storage

State = dp.JobStatus.State
#: The command line as a terminal starts it: what a shell starts in the background ignores Ctrl-C, and so
#: would all that it starts.
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("couponflow.cli", run_name="__main__", alter_sys=True)
"""


@dataclass
class World:
    """One environment: its file for ``--env``, the server behind it, and what its drivers do."""

    file: Path
    server: Server
    drivers: Any
    lake: str

    @property
    def core(self) -> Any:
        return self.server.core

    @property
    def jobs(self) -> list[Any]:
        """All jobs, oldest first."""
        return list(self.core.jobs.by_id.values())

    def call(self, *args: str) -> Result:
        """One call of the command line."""
        return CliRunner().invoke(app, [*args, "--env", str(self.file)])

    def spawn(self, *args: str) -> subprocess.Popen[str]:
        """The command line in a process of its own."""
        command = [sys.executable, "-c", INTERRUPTIBLE, *args, "--env", str(self.file)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "lib"), str(ROOT)])}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def hold(self, stage: str) -> threading.Event:
        """Drivers of a stage wait until the event is set."""
        gate = threading.Event()
        self.drivers.gates[stage] = gate
        return gate

    def change(self, old: str, new: str) -> None:
        """Another text in the environment's file."""
        text = self.file.read_text(encoding="utf-8")
        assert old in text
        self.file.write_text(text.replace(old, new), encoding="utf-8")

    def count(self, rpc: str) -> int:
        """Requests of one name."""
        return int(self.core.requests.count(rpc))


class StageDrivers(Drivers):
    """Drivers whose gates are named by stage; the release is part of a file's name."""

    def __call__(self, job: Any) -> tuple[int, str]:
        gate = self.gates.get(job.labels["stage"])
        if gate is not None and not gate.wait(120):
            return 99, "the gate stayed shut"
        return super().__call__(job)


def write_environment(folder: Path, endpoint: str, suffix: str) -> Path:
    """``ci.toml`` with the address of a stand-in and buckets of its own."""
    text = (DEPLOY / "env" / "ci.toml").read_text(encoding="utf-8")
    text = text.replace("[cloud]\n", f'[cloud]\nendpoint = "{endpoint}"\n')
    for duty in ("code", "lake", "staging"):
        text = text.replace(f"couponflow-ci-{duty}", f"couponflow-{suffix}-{duty}")
    path = folder / f"{suffix}.toml"
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def world(folder: Path, transport: str, drivers: Any = None) -> Iterator[World]:
    """A world with empty buckets, the autoscaling policy of the specs and no cluster."""
    suffix = f"ci{uuid4().hex[:8]}"
    for duty in ("code", "lake", "staging"):
        storage._client().create_bucket(f"couponflow-{suffix}-{duty}")
    drivers = drivers or StageDrivers()
    with serving(drivers, store=write_object) as server:
        server.core.policies.by_id["couponflow-etl"] = dp.AutoscalingPolicy(id="couponflow-etl")
        endpoint = server.rest_url if transport == "rest" else f"grpc://{server.grpc_address}"
        path = write_environment(folder, endpoint, suffix)
        yield World(path, server, drivers, f"gs://couponflow-{suffix}-lake/lake")


def write_object(uri: str, content: bytes) -> None:
    """Write what a driver has printed."""
    storage._blob(uri).upload_from_string(content)
