"""The stand-in of gcloud against gcloud itself: the files that `check --write` makes, imported by either."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm_programs
from dataproc_drivers import PROJECT, Drivers
from dataproc_server import Server, serving
from deploy_files import ROOT, rendered
from typer.testing import CliRunner

from couponflow.cli import app

REGION = ("--region", "us-west1")
DATES = "EVENT_DATES=2024-01-01:2024-01-04,SEND_DATES=2024-01-01,AS_OF_DATES=2024-01-02"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("programs")
    with warm_programs.serving(folder):
        yield str(folder / "dataproc-gcloud")


@pytest.fixture(params=["stand-in", "gcloud"])
def program(request: pytest.FixtureRequest, stand_in: str) -> str:
    if request.param == "stand-in":
        return stand_in
    found = shutil.which("gcloud")
    if found is None:
        pytest.skip("gcloud is missing: install the Google Cloud CLI")
    return found


@pytest.fixture
def cloud() -> Iterator[Server]:
    with serving(Drivers()) as running:
        yield running


@pytest.fixture
def specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command writes."""
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["check", "--deploy", "ci", "--write", str(tmp_path / "specs")])
    assert done.exit_code == 0, done.output
    return tmp_path / "specs"


def run(program: str, cloud: Server, folder: Path, *words: str, **over: str) -> Any:
    """One command without an account; ``over`` are variables of gcloud."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAPROC": f"{cloud.rest_url}/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CONFIG": str(folder),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_PROJECT": PROJECT,
    }
    command = [program, *words]
    return subprocess.run(command, env=environment | over, capture_output=True, text=True, timeout=120)


def test_specs_are_imported_and_used(program: str, cloud: Server, specs: Path, tmp_path: Path) -> None:
    def ok(*words: str) -> str:
        done = run(program, cloud, tmp_path, "dataproc", *words, *REGION)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    for _ in range(2):  # the second time it is there already
        source = str(specs / "autoscaling" / "etl.json")
        ok("autoscaling-policies", "import", "couponflow-etl", "--source", source)
    assert cloud.core.policies.by_id["couponflow-etl"].secondary_worker_config.max_instances == 2
    ok("clusters", "import", "first", "--source", str(specs / "clusters" / "etl.json"))
    cluster = cloud.core.clusters.by_name["first"]
    assert cluster.labels["app"] == "couponflow"
    assert cluster.config.software_config.properties["dataproc:efm.spark.shuffle"] == "primary-worker"
    assert ok("clusters", "describe", "first", "--format", "value(status.state)").strip() == "RUNNING"
    assert "first" in ok("clusters", "list")
    ok("clusters", "delete", "first")
    assert cloud.core.clusters.by_name == {}
    for version in (1, 2):
        daily = str(specs / "workflows" / "daily.json")
        ok("workflow-templates", "import", "couponflow-daily", "--source", daily)
        assert cloud.core.templates.by_id["couponflow-daily"].version == version
    ok(
        "workflow-templates",
        "instantiate",
        "couponflow-daily",
        "--parameters",
        f"RUN_DATE=2024-01-03,RUN_ID=r1,{DATES}",
    )
    jobs = list(cloud.core.jobs.by_id.values())
    assert len(jobs) == len(rendered("ci")["workflows/daily"].tree["jobs"])
    assert {job.status.state.name for job in jobs} == {"DONE"}


def test_what_the_message_or_the_project_lacks_is_refused(
    program: str, cloud: Server, specs: Path, tmp_path: Path
) -> None:
    source = specs / "clusters" / "etl.json"
    words = ("dataproc", "clusters", "import", "first", "--source", str(source), *REGION)
    refused = run(program, cloud, tmp_path, *words)
    assert refused.returncode == 1
    assert "Not found: Autoscaling policy" in refused.stderr
    source.write_text(source.read_text().replace('"configBucket"', '"configBuckets"'))
    refused = run(program, cloud, tmp_path, *words)
    assert refused.returncode == 1
    assert "configBuckets" in refused.stderr
    assert cloud.core.clusters.by_name == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "false"}, "gcloud auth login"),
        ({"CLOUDSDK_CORE_PROJECT": ""}, "project"),
    ],
)
def test_login_and_project_come_first(
    program: str, cloud: Server, tmp_path: Path, given: dict[str, str], words: str
) -> None:
    done = run(program, cloud, tmp_path, "dataproc", "clusters", "list", *REGION, **given)
    assert done.returncode == 1
    assert words in done.stderr


def test_the_stand_in_keeps_login_and_project(stand_in: str, cloud: Server, tmp_path: Path) -> None:
    given = {"CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "false", "CLOUDSDK_CORE_PROJECT": ""}
    for words in (("auth", "login"), ("config", "set", "project", PROJECT)):
        assert run(stand_in, cloud, tmp_path, *words, **given).returncode == 0
    assert run(stand_in, cloud, tmp_path, "dataproc", "clusters", "list", *REGION, **given).returncode == 0
    assert run(stand_in, cloud, tmp_path, "dataproc", "clusters", "stop", "first", *REGION).returncode == 2
