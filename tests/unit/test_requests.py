"""Requests for jobs, clusters and workflows: golden texts, ids that follow from the work, refusals."""

import json
import os
from typing import Any

import pytest
from deploy_files import DEPLOY, RELEASE, ROOT, environment
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.cloud import preflight, requests, specs, workflows
from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError

GOLDEN = ROOT / "tests" / "golden"
DEV = environment("dev")
SPECS = specs.render(DEV.cloud, RELEASE, DEPLOY)
WEEK, DAY = DateRange.parse("2017-10-01:2017-10-07"), DateRange.parse("2017-10-30")
WORKS = (
    requests.Work("sessionize", WEEK),
    requests.Work("build_examples", WEEK),
    requests.Work("build_examples", DAY, campaign="18"),
    requests.Work("build_vocabulary", WEEK),
    requests.Work("export_audience", DAY, campaign="18"),
    requests.Work("train", WEEK, model="dien"),
    requests.Work("train", WEEK, model="logistic", attempt=2),
)


def job(work: requests.Work, cluster: str = "etl-1", run: str = "") -> dict[str, Any]:
    return requests.job_request(SPECS, DEV.cloud, RELEASE, work, cluster, run)


def workflow(name: str, dates: DateRange, campaign: str = "", attempt: int = 1) -> dict[str, Any]:
    return workflows.workflow_request(SPECS, DEV.config, DEV.cloud, RELEASE, name, dates, campaign, attempt)


def test_requests_are_the_golden_text() -> None:
    trees = {f"{work.name} {work.dates}": job(work) for work in WORKS}
    trees["cluster"] = requests.cluster_request(SPECS, DEV.cloud, "couponflow-1", [WORKS[0]])
    trees["daily"] = workflow("daily", DAY)
    path = GOLDEN / "requests-dev.json"
    text = json.dumps(trees, indent=1, sort_keys=True) + "\n"
    if os.environ.get("COUPONFLOW_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "run `make golden` and review the difference"


def test_an_id_follows_from_stage_range_release_and_attempt_alone() -> None:
    ids = {work.job_id(release) for work in WORKS for release in (RELEASE, "f" * 16)}
    ids |= {requests.Work("sessionize", WEEK, attempt=n).job_id(RELEASE) for n in (2, 3)}
    ids |= {requests.Work("sessionize", DAY).job_id(RELEASE)}
    assert len(ids) == 2 * len(WORKS) + 3
    one, two = job(WORKS[0], "etl-1"), job(WORKS[0], "etl-2", "a-run")
    assert one["requestId"] == two["requestId"] == one["job"]["reference"]["jobId"]
    assert len(one["requestId"]) <= 40
    assert two["job"]["labels"]["run"] == "a-run"


@pytest.mark.parametrize("work", WORKS)
def test_a_job_is_the_step_of_its_workflow(work: requests.Work) -> None:
    made = job(work)["job"]
    program = made["pysparkJob"]
    assert program["mainPythonFileUri"].endswith(f"/releases/{RELEASE}/jobs/{work.stage}.py")
    args = program["args"]
    assert requests.argument(args, "--dates") == str(work.dates)
    assert requests.argument(args, "--campaign") == work.campaign
    assert requests.argument(args, "--model") == work.model
    assert requests.argument(args, "--attempt-key") == made["reference"]["jobId"]
    assert not [arg for arg in args if arg.isupper()], "a parameter has kept its name"
    assert all(len(value) <= 63 for value in made["labels"].values())
    assert {"app", "environment", "stage", "dt", "run", "version", "cost_center"} == set(made["labels"])
    assert made["labels"]["version"] == RELEASE
    assert made["scheduling"]["maxFailuresPerHour"] <= 10


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (requests.Work("sessionise", WEEK), "unknown job 'sessionise'"),
        (requests.Work("train", WEEK), "needs --model KIND"),
        (requests.Work("train", WEEK, model="din"), "--model is one of blend, boosted, dien"),
        (requests.Work("score", DAY), "needs --campaign ID"),
        (requests.Work("score", WEEK, campaign="18"), "give one day"),
        (requests.Work("monitor", DAY, campaign="18"), "leave --campaign and --model out"),
        (requests.Work("build_vocabulary", DAY, campaign="18"), "leave --campaign and --model out"),
        (requests.Work("sessionize", DAY, model="dien"), "leave --campaign and --model out"),
    ],
)
def test_what_no_job_can_be_is_refused(work: requests.Work, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        job(work)


def test_a_cluster_ends_soon_after_its_last_job_and_is_of_one_kind() -> None:
    made = requests.cluster_request(SPECS, DEV.cloud, "couponflow-1", [WORKS[0], WORKS[3]])["cluster"]
    life = made["config"]["lifecycleConfig"]
    assert life == {"idleDeleteTtl": "300s", "autoDeleteTtl": f"{DEV.cloud.etl.age_seconds}s"}
    with pytest.raises(ConfigError, match="belong on different clusters"):
        requests.cluster_request(SPECS, DEV.cloud, "couponflow-1", [WORKS[0], WORKS[5]])


@pytest.mark.parametrize(
    ("name", "dates", "campaign"),
    [("daily", DAY, ""), ("backfill", WEEK, ""), ("train", DAY, ""), ("campaign", DAY, "18")],
)
def test_a_workflow_holds_values_alone(name: str, dates: DateRange, campaign: str) -> None:
    request = workflow(name, dates, campaign)
    inline = request["template"]
    assert "parameters" not in inline
    for step in inline["jobs"]:
        assert step["labels"]["dt"] == str(dates.last)
        assert step["labels"]["run"] == request["requestId"]
        assert not [arg for arg in step["pysparkJob"]["args"] if arg.isupper()]
        assert requests.argument(step["pysparkJob"]["args"], "--campaign") == campaign
    assert workflow(name, dates, campaign, 2)["requestId"] != request["requestId"]
    assert "RUN_DATE" in json.dumps(workflows.template(SPECS, name)), "the rendered template has changed"


def test_the_dates_of_a_day_are_those_of_scopes_and_backfills() -> None:
    steps = {
        step["stepId"]: step["pysparkJob"]["args"] for step in workflow("daily", DAY)["template"]["jobs"]
    }
    dates = {step: requests.argument(args, "--dates") for step, args in steps.items()}
    assert dates == {
        "clean-events": "2017-10-30",
        "clean-feeds": "2017-10-30",
        "sessionize": "2017-10-27:2017-10-31",  # three days late, one early
        "attribute-conversions": "2017-10-12:2017-10-30",  # 14 days of window, 3 of lateness, 1
        "build-examples": "2017-10-12:2017-10-30",
        "monitor": "2017-10-30",
    }


@pytest.mark.parametrize(
    ("name", "dates", "campaign", "words"),
    [
        ("weekly", DAY, "", "one of backfill, campaign, daily, maintain, train"),
        ("daily", WEEK, "", "give one day"),
        ("campaign", DAY, "", "give --campaign ID"),
        ("campaign", DAY, "18 19", "does not match"),
        ("train", DateRange.parse("2017-05-01"), "", "give dates from examples.test_start on"),
    ],
)
def test_what_no_workflow_can_be_is_refused(name: str, dates: DateRange, campaign: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        workflow(name, dates, campaign)


def test_an_image_of_other_minor_versions_is_refused() -> None:
    image = "projects/p/global/images/couponflow-etl-2-3-debian12-20261102"
    preflight.check_image(image)
    for wrong, words in [("2-2", "found 2.2"), ("debian", "found none")]:
        with pytest.raises(ConfigError, match=words):
            preflight.check_image(image.replace("2-3", wrong))
    with pytest.raises(ConfigError, match=r"delta-spark 3\.3, this program was installed with 4\.0\.0"):
        preflight.check_image(image, {"python": "3.11", "pyspark": "", "delta-spark": "4.0.0"}.__getitem__)


@pytest.mark.parametrize(
    "endpoint",
    ["http://10.0.0.1:80", "https://dataproc.example.com:443", "http://127.0.0.1.x:80", "grpc://[::]:1", "x"],
)
def test_only_a_stand_in_on_this_machine_may_take_the_place_of_dataproc(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"cloud\.endpoint"):
        load_config(DEPLOY / "env" / "ci.toml", (f'cloud.endpoint="{endpoint}"',))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give one of them"),
        (("sessionize", "--workflow", "daily"), "give one of them"),
        (("--workflow", "daily", "--cluster", "etl-1"), "leave them out"),
        (("sessionise",), "unknown job"),
    ],
)
def test_contradictions_on_the_command_line_end_with_2(args: tuple[str, ...], words: str) -> None:
    refused = CliRunner().invoke(app, ["submit", *args, "--env", "dev", "--dates", "2017-10-01", "--dry-run"])
    assert refused.exit_code == 2
    assert words in refused.stderr


@pytest.mark.parametrize("args", [("--on", "dataproc"), ("--env", "dev"), ("--on", "mars", "--env", "dev")])
def test_a_place_needs_its_environment(args: tuple[str, ...]) -> None:
    refused = CliRunner().invoke(app, ["status", *args])
    assert refused.exit_code == 2
    assert "give --on dataproc and --env ENV, or neither" in refused.stderr
