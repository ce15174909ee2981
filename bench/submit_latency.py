"""One job on Dataproc by ``couponflow submit``, against the same request by Google's client alone.

Both are whole processes, in turns, against stand-ins of Dataproc and of the object store here, on a
cluster that runs, for another date each time, and none waits for its job. Ours also checks the specs, the
buckets, the cluster and what is uploaded, and looks for the job before it starts one. Value: the seconds that
this takes, by the median round; the services' own time is nearly nothing here and the same on both sides.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import object_server
from dataproc_world import World, world
from google.cloud import dataproc_v1 as dp

from bench.run import Claim, in_turns
from couponflow.cloud.specs import load_environment

CLAIMS = ("submit_latency",)
RUNS = 7
ROOT = Path(__file__).parents[1]
CLUSTER = "couponflow-bench"


def measure(names: tuple[str, ...]) -> list[Claim]:
    """Both sides in turns, after one of each as a warm-up; nothing where there is no object server."""
    program = object_server.find_server()
    if program is None:
        sys.stderr.write(f"submit_latency is not measured: {object_server.MISSING}\n")
        return []
    with (
        tempfile.TemporaryDirectory() as folder,
        object_server.running(program, Path(folder)) as url,
        patch.dict(os.environ, STORAGE_EMULATOR_HOST=url),
        world(Path(folder), "rest") as here,
    ):
        rounds = _rounds(here)
    value = statistics.median(seconds["ours"] - seconds["bare"] for seconds in rounds)
    ours, bare = (statistics.median(seconds[name] for seconds in rounds) for name in ("ours", "bare"))
    rival = f"Google's client alone, {bare:.2f} s against {ours:.2f} s"
    return [Claim(names[0], value, "s more", 1.5, RUNS, rival, "at_most")]


def _rounds(here: World) -> list[dict[str, float]]:
    """Seconds of both sides in each round; every call submits a job of its own."""
    cloud = load_environment(str(here.file)).cloud
    clusters = here.core.clusters
    clusters.by_name[CLUSTER] = clusters.run(dp.Cluster(cluster_name=CLUSTER))
    days = (date(2024, 1, 1) + timedelta(number) for number in range(10_000))
    request: dict[str, Any] = {}

    def submit(*more: str) -> str:
        day = str(next(days))
        where = ["--cluster", CLUSTER, "--env", str(here.file)]
        return _process(["couponflow.cli", "submit", "clean_events", "--dates", day, *where, *more])

    def ours() -> None:
        submit("--async")

    def bare() -> None:
        job = request["job"] | {"reference": {"jobId": f"bare-{next(days)}"}}
        place = [str(cloud.endpoint), cloud.project, cloud.region]
        _process(["bench.bare_client", *place], json.dumps(job))

    request |= json.loads(submit("--dry-run"))["submitJob"]
    rounds = in_turns({"bare": bare, "ours": ours}, RUNS)
    assert len(here.jobs) == 2 * (RUNS + 1), "a call has submitted no job, or two"
    return rounds


def _process(arguments: list[str], typed: str = "") -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("lib", ".", "tests"))
    }
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, input=typed, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout
