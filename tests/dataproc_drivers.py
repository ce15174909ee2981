"""What tests on the stand-in of Dataproc share: a place, jobs, and drivers that do as they are told."""

import threading
from typing import Any

from google.api_core.retry import Retry
from google.cloud import dataproc_v1 as dp

PROJECT, REGION = "couponflow-ci", "us-west1"
PLACE = {"project_id": PROJECT, "region": REGION}
PARENT = f"projects/{PROJECT}/regions/{REGION}"
#: How often the tests look at an operation: they wait for what the stand-in does, which takes no time.
POLLING = Retry(predicate=lambda error: True, initial=0.005, maximum=0.02, timeout=300)


class Drivers:
    """Drivers whose end a test decides; the exit code is an argument of the job."""

    def __init__(self) -> None:
        self.started: list[str] = []  # main files with their arguments, in order
        self.gates: dict[str, threading.Event] = {}

    def __call__(self, job: dp.Job) -> tuple[int, str]:
        program = job.pyspark_job
        self.started.append(" ".join([program.main_python_file_uri, *program.args]))
        gate = self.gates.get(program.main_python_file_uri)
        if gate is not None and not gate.wait(300):
            return 99, "the gate stayed shut"
        if program.main_python_file_uri.endswith("/broken.py"):
            raise RuntimeError("this runner does not run that")
        code = int(program.args[0]) if program.args and program.args[0].isdecimal() else 0
        return code, f"ran {job.reference.job_id}\n"

    def stop(self, job_id: str) -> None:
        for gate in self.gates.values():
            gate.set()

    def hold(self, main: str) -> threading.Event:
        """Drivers of this file wait until the event is set."""
        self.gates[main] = threading.Event()
        return self.gates[main]


def make_job(main: str = "gs://code/a.py", exit_code: int = 0, **over: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "placement": {"cluster_name": "etl"},
        "labels": {"stage": "train", "dt": "2024-01-03"},
        "pyspark_job": {"main_python_file_uri": main, "args": [str(exit_code)]},
    }
    return job | over


def make_cluster(clusters: Any) -> str:
    """The name of a cluster that runs, made through a client."""
    operation = clusters.create_cluster(cluster={"cluster_name": "etl"}, **PLACE)
    return str(operation.result(polling=POLLING).cluster_name)
