"""``deploy/README.md`` followed literally: bash runs every line of its ``sh`` blocks, in their order.

Then come the commands of its last table that need no nodes. Each line has a claim here; a new one without
fails. What stands in Google's place, and the little that differs from the text: ``guide_walk``.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dataproc_world import State
from deploy_files import DEPLOY, environment
from guide_walk import Claim, Walk, commands, walking

from couponflow import pipeline
from couponflow.cloud import specs
from couponflow.config import load_config
from couponflow.lake import storage
from couponflow.training import registry

GUIDE = (DEPLOY / "README.md").read_text(encoding="utf-8")
TYPED = commands(GUIDE)
LAKE = "gs://couponflow-dev-lake/lake"
#: Beginnings of commands of the last table that need nodes, or programs of Google's that are not here.
LIVE_ONLY = ("gcloud compute ", "bq query", "nvidia-smi", "python generate_custom_image.py")


def table(first: str, after: str) -> list[list[str]]:
    """Cells of the rows of a table of the guide."""
    lines = GUIDE[GUIDE.index(first) : GUIDE.index(after)].splitlines()
    return [[cell.strip() for cell in re.split(r" ?\| ?", line)[1:-1]] for line in lines[2:] if line]


def proofs() -> list[list[str]]:
    """The commands of each row of the table of what only a live project can prove."""
    known = ("couponflow ", "gcloud ", *LIVE_ONLY)
    return [
        [one for one in re.findall(r"`([^`]+)`", cell) if one.startswith(known)]
        for _, cell in table("| question |", "`training.launcher")
    ]


def logs_in(walk: Walk) -> Claim:
    yield
    assert walk.login["account"]


def sets_the_project(walk: Walk) -> Claim:
    yield
    assert walk.login["project"] == environment("dev").cloud.project


def prints_and_makes_nothing(walk: Walk) -> Claim:
    said = yield
    assert "gcloud storage buckets create gs://couponflow-dev-lake" in said
    assert walk.made == []


def makes_the_project(walk: Walk) -> Claim:
    yield
    made = walk.made
    for name in ("code", "lake", "staging"):
        assert f"storage buckets gs://couponflow-dev-{name}" in made
        storage._client().create_bucket(f"couponflow-dev-{name}")
    for name in ("etl", "train", "submit"):
        assert f"iam service-accounts couponflow-{name}" in made
    assert "compute networks subnets couponflow us-west1" in made
    secret, _, version = environment("dev").config.events.key_secret.partition("/versions/")
    assert (f"secrets {secret.rpartition('/')[2]}" in made, version) == (True, "1")


def exported(walk: Walk) -> set[str]:
    return {path.name for path in (walk.folder / "dist" / "image").iterdir()}


def exports_requirements(walk: Walk) -> Claim:
    said = yield
    found = re.search(r"gcloud storage cp -r dist/image/\* gs://CODE/image/([0-9a-f]{16})/", said)
    assert found, said
    walk.image = found[1]
    assert {"etl.txt", "gpu.txt", "horovod.txt", "customize.sh"} <= exported(walk)


def uploads_requirements(walk: Walk) -> Claim:
    yield
    held = storage.list_names(f"gs://couponflow-dev-code/image/{walk.image}")
    assert set(held) == exported(walk)


def prints_the_build(walk: Walk) -> Claim:
    said = yield
    assert f"gcloud storage cp gs://couponflow-dev-code/image/{walk.image}/* " in said
    assert "smoke_test.py gpu" in said


def appends_the_shop(walk: Walk) -> Claim:
    yield
    loaded = specs.load_environment("dev", walk.folder / "deploy").config
    assert (loaded.source.name, loaded.run.campaign_id) == ("synthetic", "9")


def checks(walk: Walk) -> Claim:
    said = yield
    assert said.count("valid") == 9
    assert f"list prices of {environment('dev').cloud.prices.read_date}" in said


def checks_for_machines(walk: Walk) -> Claim:
    assert json.loads((yield))["environment"] == "dev"


def writes_the_specs(walk: Walk) -> Claim:
    yield
    written = {path.stem for path in (walk.folder / "dist" / "specs").rglob("*.json")}
    assert {"etl", "gpu", "daily", "campaign", "train", "backfill", "maintain"} == written


def imports_the_policy(walk: Walk) -> Claim:
    yield
    assert walk.server.core.policies.by_id["couponflow-etl"].secondary_worker_config.max_instances == 4


def imports_a_cluster(walk: Walk) -> Claim:
    before = walk.clusters
    yield
    (name,) = walk.clusters - before
    config = walk.server.core.clusters.get(name).config
    network = config.gce_cluster_config.subnetwork_uri.rpartition("/")[2]
    assert f"compute networks subnets {network} us-west1" in walk.made
    account = config.gce_cluster_config.service_account.partition("@")[0]
    assert f"iam service-accounts {account}" in walk.made
    assert storage.has_bucket(config.config_bucket)


def is_running(walk: Walk) -> Claim:
    assert (yield) == "RUNNING\n"


def deletes_a_cluster(walk: Walk) -> Claim:
    before = walk.clusters
    yield
    assert len(before - walk.clusters) == 1


def lands(walk: Walk) -> Claim:
    said = yield
    assert "events" in said
    assert len(storage.list_names(f"{LAKE}/raw/events")) >= 60


def lists_a_delivery(walk: Walk) -> Claim:
    assert "ingest_date=2024-02-29/" in (yield)


def cleans_events(walk: Walk) -> Claim:
    yield
    assert walk.stages() == {"clean_events": 9}  # 60 days, a week each
    assert {"2024-01-01_2024-01-07", "2024-02-26_2024-02-29"} <= walk.dates()


def builds_the_vocabulary(walk: Walk) -> Claim:
    yield
    assert walk.stages() == {"build_vocabulary": 1}
    assert walk.dates() == {"2024-01-01_2024-02-09"}


def backfills_the_rest(walk: Walk) -> Claim:
    yield
    found = walk.stages()
    assert found.pop("sessionize") in (9, 10)  # the days before and after, too
    assert found == {"clean_feeds": 9, "attribute_conversions": 1, "build_examples": 1}
    num_jobs = len(walk.jobs)
    walk.type(next(line for line in TYPED if line.startswith("couponflow backfill all")))
    assert len(walk.jobs) == num_jobs


def shows_runs(walk: Walk) -> Claim:
    said = yield
    assert "build_vocabulary" in said
    assert "failed" not in said


def trains(walk: Walk) -> Claim:
    yield
    assert walk.stages() == {"train": 6, "evaluate": 1}
    assert walk.dates() == {"2024-02-29"}
    assert set(registry.roles(LAKE).values()) == {"champion"}


def lists_models(walk: Walk) -> Claim:
    said = yield
    assert re.search(r"logistic-[0-9a-f]{12} +│ champion", said)
    assert re.search(r"boosted-[0-9a-f]{12}", said)


def shows_a_model(walk: Walk) -> Claim:
    assert json.loads((yield))["manifest.json"]["kind"] == "boosted"


def promotes(walk: Walk) -> Claim:
    yield
    assert registry.resolve(LAKE, "champion").startswith("boosted-")


def declares(walk: Walk) -> Claim:
    yield
    assert (
        storage.read_bytes(f"{LAKE}/campaigns/9.toml") == (DEPLOY / "campaigns" / "first.toml").read_bytes()
    )


def prepares_the_campaign(walk: Walk) -> Claim:
    yield
    assert [job.labels["stage"] for job in walk.new] == ["build_examples", "score", "select_audience"]
    assert walk.stages().total() == 3
    assert walk.dates() == {"2024-02-20"}
    assert all("--campaign 9 " in " ".join(job.pyspark_job.args) for job in walk.new)


def tells_the_version(walk: Walk) -> Claim:
    (record,) = json.loads((yield))
    walk.version = record["facts"]["version"]


def approves(walk: Walk) -> Claim:
    yield
    assert storage.exists(f"{LAKE}/approvals/9/{walk.version}.json")


def hands_over(walk: Walk) -> Claim:
    yield
    assert walk.stages() == {"export_audience": 1}


def lists_the_list(walk: Walk) -> Claim:
    said = yield
    assert {uri.rpartition("/")[2] for uri in said.split()} == {"audience.csv", "manifest.json"}


def has_no_cluster(walk: Walk) -> Claim:
    yield
    assert walk.clusters == set()


def sends_nothing(walk: Walk) -> Claim:
    requests = len(walk.server.core.requests)
    said = yield
    assert len(walk.server.core.requests) == requests
    assert said


def runs_a_week(walk: Walk) -> Claim:
    yield
    assert walk.stages() == {"sessionize": 1}
    assert walk.dates() == {"2024-02-01_2024-02-07"}


def starts_and_returns(walk: Walk) -> Claim:
    walk.drivers.gates["score"] = threading.Event()  # which ends with the job
    yield
    (job,) = walk.new
    assert (job.labels["stage"], job.placement.cluster_name) == ("score", "etl-1")
    walk.server.core.wait_for(lambda: job.status.state == State.RUNNING)
    walk.waiting = job.reference.job_id


def shows_the_job(walk: Walk) -> Claim:
    said = yield
    assert "RUNNING" in said


def cancels(walk: Walk) -> Claim:
    yield
    job = walk.server.core.jobs.get(walk.waiting)
    walk.server.core.wait_for(lambda: job.status.state == State.CANCELLED, 30)
    walk.drivers.gates.clear()


def runs_a_day(walk: Walk) -> Claim:
    yield
    assert walk.stages().total() == 6
    assert walk.dates() == {"2024-02-29"}


def imports_the_template(walk: Walk) -> Claim:
    yield
    assert "couponflow-daily" in walk.server.core.templates.by_id


def instantiates(walk: Walk) -> Claim:
    yield
    assert walk.stages().total() == 6
    assert {job.labels["run"] for job in walk.new} == {"proof"}
    sessionize = next(job for job in walk.new if job.labels["stage"] == "sessionize")
    assert "2024-02-25:2024-03-01" in sessionize.pyspark_job.args


def runs_one_job(walk: Walk) -> Claim:
    yield
    assert walk.stages().total() == 1


#: What a line that begins so promises; the first that fits.
CLAIMS: dict[str, Callable[[Walk], Claim]] = {
    "gcloud auth ": logs_in,
    "gcloud config ": sets_the_project,
    "deploy/iam/setup.sh dev --dry-run": prints_and_makes_nothing,
    "deploy/iam/setup.sh dev": makes_the_project,
    "make image-requirements": exports_requirements,
    "gcloud storage cp -r dist/image/": uploads_requirements,
    "bash deploy/image/customize.sh gpu": prints_the_build,
    "cat deploy/env/shop.toml": appends_the_shop,
    "couponflow check --deploy dev --write": writes_the_specs,
    "couponflow check --deploy dev --json": checks_for_machines,
    "couponflow check --deploy dev": checks,
    "gcloud dataproc autoscaling-policies import couponflow-etl": imports_the_policy,
    "gcloud dataproc clusters import ": imports_a_cluster,
    "gcloud dataproc clusters describe first": is_running,
    "gcloud dataproc clusters delete ": deletes_a_cluster,
    "couponflow land synthetic": lands,
    "gcloud storage ls gs://couponflow-dev-lake/lake/raw/": lists_a_delivery,
    "couponflow backfill clean_events ": cleans_events,
    "couponflow submit build_vocabulary": builds_the_vocabulary,
    "couponflow backfill all --from-date 2024-01-01": backfills_the_rest,
    "couponflow status --config": shows_runs,
    "couponflow submit --workflow train": trains,
    "couponflow models list": lists_models,
    "couponflow models show boosted": shows_a_model,
    "couponflow models promote boosted": promotes,
    "couponflow campaign create deploy/campaigns/first.toml": declares,
    "couponflow submit --workflow campaign": prepares_the_campaign,
    "couponflow status --job select_audience": tells_the_version,
    "couponflow campaign approve": approves,
    "couponflow submit export_audience": hands_over,
    "gcloud storage ls gs://couponflow-dev-lake/export/9/": lists_the_list,
    "gcloud dataproc clusters list": has_no_cluster,
    "couponflow submit sessionize --env dev --dates 2024-02-01:2024-02-07 --dry-run": sends_nothing,
    "couponflow submit sessionize --env dev --dates 2024-02-01:2024-02-07": runs_a_week,
    "couponflow submit score": starts_and_returns,
    "couponflow status --on dataproc": shows_the_job,
    "couponflow cancel ": cancels,
    "couponflow submit --workflow daily": runs_a_day,
    "couponflow backfill all --from-date 2024-02-01": sends_nothing,
    # Of the last table.
    "gcloud dataproc workflow-templates import": imports_the_template,
    "gcloud dataproc workflow-templates instantiate": instantiates,
    "couponflow submit ": runs_one_job,
}


@pytest.fixture
def walk(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    with walking(server, tmp_path) as begun:
        yield begun


def test_every_line_of_the_guide_does_what_it_says(walk: Walk) -> None:
    named = [command for row in proofs() for command in row if not command.startswith(LIVE_ONLY)]
    # What a block has as well is run there.
    more = [one for one in dict.fromkeys(named) if not any(line.startswith(one) for line in TYPED)]
    kept = set()
    for line in [*TYPED, *more]:
        start = next((start for start in CLAIMS if line.startswith(start)), None)
        assert start is not None, f"say in CLAIMS what this promises: {line}"
        kept.add(start)
        walk.follow(line, CLAIMS[start])
    assert kept == set(CLAIMS)


def test_the_dates_of_the_guide_are_those_of_the_main_job() -> None:
    """As `couponflow run` would take them: the drawn shop is that of a demo which does compute."""
    shop, demo = (load_config(DEPLOY / "env" / f"{name}.toml") for name in ("shop", "demo"))
    for section in ("source", "world", "conversions", "examples"):
        assert getattr(shop, section) == getattr(demo, section), section
    assert shop.run.run_date == demo.run.run_date
    stages = {stage.name: stage.dates for stage in pipeline.plan(shop)}
    day, campaign, data = shop.run.run_date, shop.run.campaign_id, stages["clean_events"]
    for command in (
        f"couponflow backfill all --from-date {data.start} --to-date {data.last} --on",
        f"couponflow submit build_vocabulary --env dev --dates {stages['build_vocabulary']}\n",
        f"couponflow submit --workflow train --env dev --dates {stages['evaluate'].last}\n",
        f"couponflow submit --workflow campaign --env dev --dates {day} --campaign {campaign}\n",
    ):
        assert command in GUIDE


def test_each_question_names_a_command() -> None:
    rows = proofs()
    assert len(rows) == 11
    assert [row for row in rows if not row] == []


def test_the_costs_of_the_steps_are_those_of_the_check() -> None:
    dev = environment("dev")
    found = {one.file: one for one in specs.check(dev, "0123456789abcdef", DEPLOY)}
    priced = 0
    for step, what, an_hour, a_run in table("| step | what runs", "Before: a project with billing"):
        for name in re.findall(r"`deploy/(\S+\.yaml)`", what):
            verdict = found[(DEPLOY / name).as_posix()]
            assert verdict.price is not None
            ends = dict.fromkeys(f"{end:.2f}" for end in (verdict.price.least, verdict.price.most))
            assert an_hour == " to ".join(ends), step
            assert a_run == ("" if verdict.run_amount is None else f"{verdict.run_amount:.2f}"), step
            priced += 1
    assert priced == 5
    assert f"list prices of {dev.cloud.prices.read_date}" in GUIDE
    assert f"{dev.cloud.etl.idle_seconds:,} idle seconds" in GUIDE
