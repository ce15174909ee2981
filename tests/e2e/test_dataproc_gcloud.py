"""The public command line of Dataproc on the stand-in: our specs and jobs, as another client sees them."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deploy_files
import pytest
from dataproc_drivers import PLACE, PROJECT, REGION, Drivers
from dataproc_server import Server, serving
from google.cloud import dataproc_v1 as dp
from spark_runner import Objects

PROGRAM = shutil.which("gcloud")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="gcloud is missing: install the Google Cloud CLI")
VALUES = {
    "RUN_DATE": "2024-01-03",
    "RUN_ID": "r1",
    "EVENT_DATES": "2024-01-01:2024-01-04",
    "SEND_DATES": "2024-01-01",
    "AS_OF_DATES": "2024-01-02",
}


@pytest.fixture
def cloud(server: str) -> Iterator[Server]:
    with serving(Drivers(), store=Objects(server).write) as running:
        yield running


@pytest.fixture
def gcloud(server: str, cloud: Server, tmp_path: Path) -> Callable[..., Any]:
    """Runs ``gcloud dataproc`` on both stand-ins, without an account."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAPROC": f"{cloud.rest_url}/",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{server}/storage/v1/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_PROJECT": PROJECT,
        "CLOUDSDK_DATAPROC_REGION": REGION,
    }

    def run(*arguments: str) -> Any:
        command = [str(PROGRAM), "dataproc", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_the_daily_template_is_imported_and_run(
    gcloud: Callable[..., Any], cloud: Server, tmp_path: Path
) -> None:
    specs = deploy_files.rendered("ci")
    for kind, name in (
        ("autoscaling-policies", "autoscaling/etl"),
        ("workflow-templates", "workflows/daily"),
    ):
        source = tmp_path / "spec.json"
        source.write_text(json.dumps(specs[name].tree))
        done = gcloud(kind, "import", specs[name].tree["id"], "--source", str(source))
        assert done.returncode == 0, done.stderr
    given = ",".join(f"{name}={value}" for name, value in VALUES.items())
    done = gcloud("workflow-templates", "instantiate", "couponflow-daily", "--parameters", given)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("COMPLETED") == len(specs["workflows/daily"].tree["jobs"])
    selected = "labels.stage = sessionize AND labels.dt = 2024-01-03"
    done = gcloud("jobs", "list", "--filter", selected, "--format", "value(pysparkJob.args,status.state)")
    assert "--dates;2024-01-01:2024-01-04;" in done.stdout
    assert done.stdout.split()[-1] == "DONE"
    sent = [path for _, path, _ in cloud.rest.log if path.partition("?")[0].endswith("/jobs")]
    assert "filter=labels.stage+%3D+sessionize" in sent[-1]  # the stand-in chose, not the command line


def test_a_failed_driver_is_shown_with_its_output(gcloud: Callable[..., Any], cloud: Server) -> None:
    clusters = cloud.client(dp.ClusterControllerClient, "grpc")
    clusters.create_cluster(cluster={"cluster_name": "etl"}, **PLACE)
    cloud.core.wait_for(lambda: cloud.core.clusters.get("etl").status.state.name == "RUNNING")
    job = ("pyspark", "gs://code/a.py", "--cluster", "etl", "--async", "--format", "value(reference.jobId)")
    job_id = gcloud("jobs", "submit", *job, "--", "3").stdout.strip()
    cloud.core.wait_for(lambda: bool(cloud.core.jobs.get(job_id).done))
    done = gcloud("jobs", "wait", job_id)
    assert done.returncode == 1
    assert "driver exit 3" in done.stderr
    assert f"ran {job_id}" in done.stderr
