"""The DAG in a real Airflow, against the stand-in of Dataproc; `make test-airflow` runs these tests.

The DAG folder is made as an operator makes it: the file, and beside it what `couponflow check --deploy ci
--json` prints. Airflow keeps its state in sqlite.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RELEASE = "0123456789abcdef"
MONDAY, TUESDAY = datetime(2026, 11, 16, 12, tzinfo=UTC), datetime(2026, 11, 17, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def dag_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The DAG folder, and an empty Airflow whose database is ready."""
    home = tmp_path_factory.mktemp("airflow")
    os.environ["AIRFLOW_HOME"] = str(home)
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "false"
    os.environ["AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT"] = "600"  # a busy machine; a real one has 30 seconds
    os.environ["AIRFLOW_CONN_GOOGLE_CLOUD_DEFAULT"] = "google-cloud-platform://"
    subprocess.run(["airflow", "db", "migrate"], check=True, capture_output=True, timeout=300)
    folder = home / "dags"
    folder.mkdir()
    shutil.copy(ROOT / "deploy" / "airflow" / "couponflow_daily.py", folder)
    command = [
        str(ROOT / ".venv" / "bin" / "python"),
        "-m",
        "couponflow.cli",
        "check",
        "--deploy",
        "ci",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'lib'}:{ROOT}"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    told = json.loads(done.stdout)
    text = done.stdout.replace(told["release"], RELEASE)  # the same on every commit
    (folder / "couponflow.json").write_text(text)
    return folder / "couponflow_daily.py"


@pytest.fixture(scope="session")
def dag(dag_file: Path) -> Any:
    """The only DAG of the folder."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(dag_file.parent))
    assert bag.import_errors == {}
    assert list(bag.dags) == ["couponflow_daily_ci"]
    return bag.dags["couponflow_daily_ci"]


@pytest.fixture
def at_once(dag: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The DAG without retries, whose ten minutes a test would wait for."""
    for one in dag.task_dict.values():
        if hasattr(one, "partial_kwargs"):
            monkeypatch.setitem(one.partial_kwargs, "retries", 0)
        else:
            monkeypatch.setattr(one, "retries", 0)
    return dag


class Drivers:
    """What the drivers of jobs do: note what they were called with, and end with a code by stage."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.codes: dict[str, int] = {}
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def __call__(self, job: Any) -> tuple[int, str]:
        stage = job.labels["stage"]
        self.calls.append((stage, list(job.pyspark_job.args)))
        self.has_begun.set()
        assert self.may_end.wait(60)
        return self.codes.get(stage, 0), "ended"


@pytest.fixture
def drivers() -> Drivers:
    return Drivers()


@pytest.fixture
def server(dag_file: Path, drivers: Drivers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, with the project's autoscaling policies, behind the provider's own hook."""
    from airflow.providers.google.cloud.hooks.dataproc import DataprocHook
    from dataproc_server import serving
    from google.cloud import dataproc_v1 as dp

    with serving(drivers) as running:
        policies = running.client(dp.AutoscalingPolicyServiceClient, "grpc")
        for spec in json.loads(dag_file.with_name("couponflow.json").read_text())["specs"]:
            if "/autoscaling/" in spec["file"]:
                policy = dp.AutoscalingPolicy.from_json(json.dumps(spec["rendered"]))
                policies.create_autoscaling_policy(parent=running.core.parent, policy=policy)
        client = running.client(dp.WorkflowTemplateServiceClient, "grpc")
        monkeypatch.setattr(DataprocHook, "get_template_client", lambda self, region=None: client)
        yield running


def started(server: Any) -> list[tuple[str, dict[str, str]]]:
    """Workflows that have run: template and parameters, in order."""
    return [
        (run.metadata.template.rpartition("/")[2], dict(run.metadata.parameters))
        for run in server.core.workflows.runs
    ]


def filled(dag: Any, task_id: str) -> Any:
    """A copy of a workflow's task with all that a run would render."""
    task = dag.get_task(task_id).prepare_for_execution()
    task.parameters = {key: "2026-11-16" for key in task.parameters} | {"RUN_ID": "r"}
    task.request_id = dag.user_defined_macros["request_id"](task_id, date(2026, 11, 16))
    return task


def run_workflow(task: Any) -> None:
    """Execute a task of the DAG outside a run."""
    task.execute({"ti": SimpleNamespace(xcom_push=lambda **pushed: None), "task": task})


def states(run: Any) -> dict[str, str]:
    """How each task of a run of the DAG ended; of a mapped one each copy."""
    found = {}
    for ti in run.get_task_instances():
        found[f"{ti.task_id}{'' if ti.map_index < 0 else f'[{ti.map_index}]'}"] = str(ti.state)
    return found


def test_the_dag_is_daily_and_never_catches_up(dag: Any) -> None:
    assert dag.catchup is False
    assert dag.max_active_runs == 1
    assert dag.timetable.summary == "0 5 * * *"
    assert {t for t in dag.task_ids if not t.startswith("store_")} == {
        "daily",
        "is_training_day",
        "train",
        "due_campaigns",
        "campaign",
    }


def test_airflow_never_imports_couponflow(dag: Any) -> None:
    assert [name for name in sys.modules if name.split(".")[0] == "couponflow"] == []


def test_a_monday_runs_delivery_training_and_the_campaigns_that_are_due(
    at_once: Any, server: Any, drivers: Drivers, tmp_path: Path
) -> None:
    variables = tmp_path / "variables.json"
    due = {"18": "2026-11-16", "19": "2026-11-17", "7": "2026-11-16"}
    variables.write_text(json.dumps({"couponflow_campaigns": json.dumps(due)}))
    run = at_once.test(logical_date=TUESDAY, variable_file_path=str(variables))
    assert str(run.state) == "success", states(run)
    day, name = "2026-11-16", f"couponflow-{{}}-{RELEASE}".format
    common = {"RUN_DATE": day, "RUN_ID": f"airflow-{day}-1"}
    sends = "2026-10-29:2026-11-16"
    assert started(server) == [
        (
            name("daily"),
            common | {"EVENT_DATES": "2026-11-13:2026-11-17", "SEND_DATES": sends, "AS_OF_DATES": sends},
        ),
        (name("train"), common | {"AS_OF_DATES": "2017-02-08:2017-10-03", "TEST_DATES": f"2017-10-04:{day}"}),
        (name("campaign"), common | {"CAMPAIGN_ID": "18"}),
        (name("campaign"), common | {"CAMPAIGN_ID": "7"}),
    ]
    called = dict(drivers.calls[:6])
    assert called["sessionize"] == ["--config", "ci.toml", "--dates", "2026-11-13:2026-11-17", "--log-json"]


def test_on_another_day_nothing_is_trained(at_once: Any, server: Any) -> None:
    run = at_once.test(logical_date=MONDAY)
    assert str(run.state) == "success", states(run)
    assert states(run)["train"] == "skipped"
    assert [template for template, _ in started(server)] == [f"couponflow-daily-{RELEASE}"]


def test_a_retry_meets_the_workflow_that_still_runs(dag: Any, server: Any, drivers: Drivers) -> None:
    """As after an Airflow worker was lost: the first try's workflow goes on, and the second waits for it."""
    run_workflow(dag.get_task("store_daily"))
    drivers.may_end.clear()
    with ThreadPoolExecutor(2) as tries:
        first = tries.submit(run_workflow, filled(dag, "daily"))
        assert drivers.has_begun.wait(60)
        second = tries.submit(run_workflow, filled(dag, "daily"))
        server.core.wait_for(lambda: server.core.requests.count("InstantiateWorkflowTemplate") == 2)
        drivers.may_end.set()
        assert first.result(60) is second.result(60) is None
    assert len(started(server)) == 1


def test_without_its_delivery_no_campaign_is_prepared(
    at_once: Any, server: Any, drivers: Drivers, tmp_path: Path
) -> None:
    drivers.codes["clean_events"] = 3
    variables = tmp_path / "variables.json"
    variables.write_text(json.dumps({"couponflow_campaigns": json.dumps({"18": "2026-11-17"})}))
    run = at_once.test(logical_date=datetime(2026, 11, 18, 12, tzinfo=UTC), variable_file_path=str(variables))
    ended = states(run)
    assert str(run.state) == "failed"
    assert ended["daily"] == "failed"
    assert ended["due_campaigns"] == "upstream_failed"
    assert len(started(server)) == 1


@pytest.mark.parametrize(("code", "is_final"), [(2, True), (3, True), (4, False), (5, False)])
def test_only_what_a_retry_can_help_is_retried(
    dag: Any, server: Any, drivers: Drivers, code: int, is_final: bool
) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    run_workflow(dag.get_task("store_daily"))
    drivers.codes["clean_events"] = code
    with pytest.raises(AirflowException, match=f"driver exit {code}") as caught:
        run_workflow(filled(dag, "daily"))
    assert isinstance(caught.value, AirflowFailException) is is_final
    assert dag.get_task("daily").retries == 2
    if is_final:
        assert f"deploy/runbooks/exit-{code}.md" in str(caught.value)


def test_a_folder_without_the_json_says_how_to_write_it(dag_file: Path, tmp_path: Path) -> None:
    from airflow.dag_processing.dagbag import DagBag

    shutil.copy(dag_file, tmp_path)
    (error,) = DagBag(dag_folder=str(tmp_path)).import_errors.values()
    assert "write it with couponflow check --deploy ENV --json > couponflow.json" in error
