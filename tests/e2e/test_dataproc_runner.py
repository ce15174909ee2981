"""A job through the real client, the stand-in of Dataproc and a real ``spark-submit``."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from dataproc_server import Server, serving
from google.cloud import dataproc_v1 as dp
from spark_runner import SparkRunner

from couponflow.lake import storage

PLACE = {"project_id": "couponflow-ci", "region": "us-west1"}
#: Writes into its bucket what it has seen: where its package came from, its file, a count.
MAIN = """
import json, os, signal, sys
import couponflow
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from pyspark.sql import SparkSession

bucket, mode = sys.argv[1:3]

def say(**facts):
    client = storage.Client(project="test", credentials=AnonymousCredentials())
    client.bucket(bucket).blob(f"said/{mode}.json").upload_from_string(json.dumps(facts))

def wait_in_a_worker(number):
    say(session=os.getsid(0))
    signal.pause()

if mode == "fail":
    print("the driver gives up")
    sys.exit(3)
spark = SparkSession.builder.getOrCreate()
if mode == "wait":
    spark.sparkContext.parallelize([0], 1).foreach(wait_in_a_worker)
rows = spark.range(1000).repartition(2).count()
say(
    package=couponflow.__file__, marker=couponflow.MARKER, config=open("ci.toml").read(), rows=rows,
    master=spark.sparkContext.master, partitions=spark.conf.get("spark.sql.shuffle.partitions"),
)
print("the driver has counted", rows)
spark.stop()
"""
#: Starts a process under guard, prints its id and waits for it.
HOLDER = """
import sys
from spark_runner import guarded
program = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
guarded([sys.executable, "-c", program]).wait()
"""


@pytest.fixture
def cloud(server: str, bucket: str, tmp_path: Path) -> Iterator[Server]:
    """The stand-in with a cluster; its bucket holds the job."""
    runner = SparkRunner(tmp_path / "drivers", server, master="local[1]")
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("couponflow/__init__.py", "MARKER = 'of the archive'\n")
    for name, content in {
        "couponflow.zip": package.getvalue(),
        "main.py": MAIN.encode(),
        "ci.toml": b"[lake]\n",
    }.items():
        runner.objects.write(f"{bucket}/code/{name}", content)
    with serving(runner, store=runner.objects.write) as running:
        clusters = running.client(dp.ClusterControllerClient, "grpc")
        config = {"config_bucket": bucket.removeprefix("gs://")}
        clusters.create_cluster(cluster={"cluster_name": "etl", "config": config}, **PLACE)
        running.core.wait_for(lambda: running.core.clusters.get("etl").status.state.name == "RUNNING")
        yield running


def submit(cloud: Server, bucket: str, mode: str) -> Any:
    """The job, just submitted."""
    program = {
        "main_python_file_uri": f"{bucket}/code/main.py",
        "python_file_uris": [f"{bucket}/code/couponflow.zip"],
        "file_uris": [f"{bucket}/code/ci.toml"],
        "args": [bucket.removeprefix("gs://"), mode],
        "properties": {"spark.sql.shuffle.partitions": "3", "spark.executor.resource.gpu.amount": "1"},
    }
    job = {"placement": {"cluster_name": "etl"}, "labels": {"stage": "count"}, "pyspark_job": program}
    return cloud.client(dp.JobControllerClient, "grpc").submit_job(job=job, **PLACE)


def ended(cloud: Server, job: Any) -> Any:
    job_id = job.reference.job_id
    cloud.core.wait_for(lambda: bool(cloud.core.jobs.by_id[job_id].done), 120)
    return cloud.client(dp.JobControllerClient, "grpc").get_job(job_id=job_id, **PLACE)


def said(bucket: str, mode: str) -> dict[str, Any]:
    return dict(json.loads(storage.read_bytes(f"{bucket}/said/{mode}.json")))


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether something outside this process becomes so in time."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def processes_of(session: int) -> list[str]:
    """Command lines of all that runs in a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def test_a_driver_runs_on_what_the_job_names_and_nothing_else(cloud: Server, bucket: str) -> None:
    job = ended(cloud, submit(cloud, bucket, "count"))
    log = storage.read_bytes(f"{job.driver_output_resource_uri}.000000000").decode()
    assert job.status.state.name == "DONE", log
    facts = said(bucket, "count")
    assert facts["package"].endswith("couponflow.zip/couponflow/__init__.py")
    assert (facts["marker"], facts["config"], facts["rows"]) == ("of the archive", "[lake]\n", 1000)
    assert (facts["master"], facts["partitions"]) == ("local[1]", "3")
    assert "the driver has counted 1000" in log


def test_a_driver_that_exits_with_3_is_an_error(cloud: Server, bucket: str) -> None:
    job = ended(cloud, submit(cloud, bucket, "fail"))
    log = storage.read_bytes(f"{job.driver_output_resource_uri}.000000000").decode()
    assert job.status.state.name == "ERROR", log
    assert "driver exit 3" in job.status.details
    assert "the driver gives up" in log


def test_a_cancelled_driver_leaves_no_process(cloud: Server, bucket: str) -> None:
    job_id = submit(cloud, bucket, "wait").reference.job_id
    assert eventually(lambda: storage.exists(f"{bucket}/said/wait.json"), 120)
    session = said(bucket, "wait")["session"]
    assert any("pyspark.daemon" in command for command in processes_of(session))
    cloud.client(dp.JobControllerClient, "rest").cancel_job(job_id=job_id, **PLACE)
    cloud.core.wait_for(lambda: bool(cloud.core.jobs.by_id[job_id].done))
    assert cloud.core.jobs.by_id[job_id].status.state.name == "CANCELLED"
    assert eventually(lambda: not processes_of(session), 20), processes_of(session)


def test_a_driver_ends_with_the_process_that_holds_it() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout is not None
    held = int(holder.stdout.readline())
    assert psutil.pid_exists(held)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert eventually(lambda: not psutil.pid_exists(held), 20)
