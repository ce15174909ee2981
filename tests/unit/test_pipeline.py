"""The plan of the main job and skipping by fingerprint. No Spark: small jobs stand in."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from builders import test_config

from couponflow import pipeline
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.lake import storage
from couponflow.training import registry

DAY = DateRange.parse("2024-01-10")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two jobs: ``clean_events`` writes a commit to table events, ``sessionize`` reads it."""
    made: list[str] = []

    def writer(spark: Any, run: Any) -> None:
        made.append("clean_events")
        commits = storage.list_names(storage.join(run.root_uri, "tables", "events", "_delta_log"))
        commit(run.config, len(commits))

    def reader(spark: Any, run: Any) -> None:
        made.append("sessionize")

    for name, function in (("clean_events", writer), ("sessionize", reader)):
        module = types.ModuleType(f"jobs.{name}")
        module.run = function  # type: ignore[attr-defined]  # a job module in miniature
        monkeypatch.setitem(sys.modules, f"jobs.{name}", module)
    return made


def commit(config: Config, number: int) -> None:
    uri = storage.join(config.lake.root_uri, "tables", "events", "_delta_log", f"{number:020d}.json")
    storage.create(uri, json.dumps({"n": number}).encode(), "r")


def stages() -> list[pipeline.Stage]:
    return [
        pipeline.Stage("clean_events", DAY, ("events",), (), ("events",)),
        pipeline.Stage("sessionize", DAY, ("sessions",), ("clean_events",)),
    ]


def execute(config: Config) -> list[bool]:
    outcomes = pipeline.execute(config, stages(), lambda: None, pipeline.Progress())
    return [outcome.is_skipped for outcome in outcomes]


def test_a_second_run_skips_and_writes_nothing(config: Config, calls: list[str]) -> None:
    assert execute(config) == [False, False]
    before = sorted(Path(config.lake.root_uri).rglob("*"))
    assert execute(config) == [True, True]
    assert sorted(Path(config.lake.root_uri).rglob("*")) == before
    assert calls == ["clean_events", "sessionize"]


def test_a_changed_section_reruns_its_stage_only(config: Config, calls: list[str], tmp_path: Path) -> None:
    execute(config)
    assert execute(test_config(tmp_path, "sessions.gap_minutes=20")) == [True, False]
    assert execute(test_config(tmp_path, "training.seed=7")) == [True, False]  # the newest run was another


def test_a_table_written_by_others_reruns_it_and_what_follows(config: Config, calls: list[str]) -> None:
    execute(config)
    commit(config, 1)
    assert execute(config) == [False, False]


def test_a_lost_list_is_handed_over_again(config: Config, calls: list[str], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"

    def publish(spark: Any, run: Any) -> None:
        manifest.write_text("{}")
        run.facts["manifest"] = str(manifest)

    sys.modules["jobs.sessionize"].run = publish  # type: ignore[attr-defined]  # a job module in miniature
    assert execute(config) == [False, False]
    assert execute(config) == [True, True]
    manifest.unlink()
    assert execute(config) == [True, False]


def test_a_failed_stage_runs_again(config: Config, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(spark: Any, run: Any) -> None:
        raise DataError("broken; mend it")

    broken = types.ModuleType("jobs.sessionize")
    broken.run = fail  # type: ignore[attr-defined]  # a job module in miniature
    good = sys.modules["jobs.sessionize"]
    monkeypatch.setitem(sys.modules, "jobs.sessionize", broken)
    with pytest.raises(DataError):
        execute(config)
    monkeypatch.setitem(sys.modules, "jobs.sessionize", good)
    assert execute(config) == [True, False]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs train, evaluate and score in miniature; a training makes its bundle the newest of its kind."""
    made: list[str] = []

    def train(run: Any) -> None:
        made.append("train")
        run.facts["model_version"] = bundle(run.root_uri, "dien-0123456789ab")
        if registry.pointed(run.root_uri, "champion") is None:
            registry.set_champion(run.root_uri, "dien", run.run_id, "first")

    functions: dict[str, Any] = {
        "train": train,
        "evaluate": lambda run: made.append("evaluate"),
        "score": lambda spark, run: made.append("score"),
    }
    for name, function in functions.items():
        module = types.ModuleType(f"jobs.{name}")
        module.run = function  # type: ignore[attr-defined]  # a job module in miniature
        monkeypatch.setitem(sys.modules, f"jobs.{name}", module)
    return made


def bundle(root_uri: str, version: str) -> str:
    uri = storage.join(root_uri, "models", version, "manifest.json")
    if not storage.exists(uri):
        storage.create(uri, b"{}", "r")
    registry._move(root_uri, "newest-dien", version, "r", "registered")
    return version


@pytest.mark.parametrize("name", ["dien", "champion"])
def test_another_model_behind_a_name_is_a_changed_input(
    tmp_path: Path, trained: list[str], name: str
) -> None:
    config = test_config(tmp_path, f"scoring.model={name}")
    root_uri = config.lake.root_uri
    models = [
        pipeline.Stage("train", DAY, ("training",), model="dien", uses_spark=False),
        pipeline.Stage("evaluate", DAY, (), ("train dien",), uses_spark=False),
        pipeline.Stage("score", DAY, ("scoring",), ("train dien",), campaign="18"),
    ]

    def called() -> list[str]:
        trained.clear()
        pipeline.execute(config, models, lambda: None, pipeline.Progress())
        return list(trained)

    assert called() == ["train", "evaluate", "score"]
    assert called() == []
    bundle(root_uri, "dien-ba9876543210")  # trained by hand, over other dates
    assert called() == ["train"]  # which makes its own model the newest again
    assert called() == []
    bundle(root_uri, "dien-ba9876543210")
    registry.set_champion(root_uri, "dien", "r", "promoted")
    assert called() == ["train", "evaluate", *(["score"] if name == "champion" else [])]
    Path(root_uri, "models", "dien-0123456789ab", "manifest.json").unlink()
    assert called() == ["train"]  # a lost bundle is made again


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("build_examples", "training.num_ranks=7"),  # files per split
        (
            "select_audience campaign 18",
            "export.target_uri=elsewhere",
        ),  # where a handed-over list is looked for
        ("export_audience campaign 18", "selection.consent_max_age_hours=7"),
    ],
)
def test_a_stage_names_the_values_that_it_reads(tmp_path: Path, stage: str, override: str) -> None:
    plain, changed = test_config(tmp_path), test_config(tmp_path, override)
    sections = {planned.name: planned.sections for planned in pipeline.plan(plain)}[stage]
    assert plain.fingerprint(*sections) != changed.fingerprint(*sections)


def test_a_new_learning_rate_keeps_the_examples(tmp_path: Path) -> None:
    plain, changed = test_config(tmp_path), test_config(tmp_path, "training.learning_rate=0.5")
    stale = {
        s.name
        for s in pipeline.plan(plain)
        if plain.fingerprint(*s.sections) != changed.fingerprint(*s.sections)
    }
    assert stale == {"train logistic", "train dien", "train blend"}


def test_a_new_calibration_retrains_every_kind_and_each_kind_is_planned(tmp_path: Path) -> None:
    plain, changed = test_config(tmp_path), test_config(tmp_path, "calibration.method=temperature")
    planned = pipeline.plan(plain)
    kinds = {stage.model for stage in planned if stage.job == "train"}
    assert kinds == set(registry.KINDS)
    stale = {s.name for s in planned if plain.fingerprint(*s.sections) != changed.fingerprint(*s.sections)}
    assert stale == {f"train {kind}" for kind in kinds}
    (evaluate,) = [stage for stage in planned if stage.job == "evaluate"]
    assert stale <= set(evaluate.after)


def test_versions_of_a_campaign_are_those_that_touch_its_rows(config: Config) -> None:
    def write(number: int, *actions: dict[str, Any]) -> None:
        log = storage.join(config.lake.root_uri, "tables", "predictions", "_delta_log")
        content = "".join(json.dumps(action, separators=(",", ":")) + "\n" for action in actions).encode()
        storage.create(storage.join(log, f"{number:020d}.json"), content, "r")

    def file(kind: str, **values: str) -> dict[str, Any]:
        return {kind: {"path": "p", "partitionValues": values}}

    write(0, {"commitInfo": {"operation": "CREATE TABLE"}}, {"metaData": {}})
    write(1, {"commitInfo": {"operation": "WRITE"}}, file("add", campaign_id="9", run_date="2024-02-20"))
    write(2, {"commitInfo": {"operation": "WRITE"}}, file("add", campaign_id="10", run_date="2024-02-20"))
    write(3, {"commitInfo": {"operation": "OPTIMIZE"}}, file("add", campaign_id="9", run_date="2024-02-20"))
    root = config.lake.root_uri

    def found(campaign: str) -> dict[str, int]:
        return pipeline.versions(root, ("predictions",), campaign)

    assert [found(campaign) for campaign in ("9", "10", "11", "")] == [
        {"predictions": number} for number in (1, 2, 0, 2)
    ]
    write(4, {"commitInfo": {"operation": "DELETE"}}, file("remove", campaign_id="9", run_date="2024-02-20"))
    write(5, {"commitInfo": {"operation": "WRITE"}}, file("add", run_date="2024-02-21"))
    assert [found(campaign) for campaign in ("9", "10")] == [{"predictions": 5}] * 2  # of no one campaign


def test_campaigns_of_a_day_share_their_examples_and_are_decided_in_turn(tmp_path: Path) -> None:
    config = test_config(tmp_path, "run.campaign_id='9'", "run.more_campaign_ids=['10', '11']")
    stages = {stage.name: stage for stage in pipeline.plan(config)}
    assert stages["build_examples campaign 9,10,11"].writes == ("scoring_examples", "histories")
    for number, campaign in enumerate(("9", "10", "11")):
        assert "build_examples campaign 9,10,11" in stages[f"score campaign {campaign}"].after
        earlier = {name for name in stages[f"select_audience campaign {campaign}"].after if "select" in name}
        assert earlier == {f"select_audience campaign {one}" for one in ("9", "10", "11")[:number]}
        assert f"export_audience campaign {campaign}" in stages["monitor"].after
    with pytest.raises(ConfigError, match="name a campaign twice"):
        test_config(tmp_path, "run.campaign_id='9'", "run.more_campaign_ids=['10', '9']")


def test_checkpoints_beside_the_commits_are_no_versions(config: Config) -> None:
    commit(config, 3)
    for name in (
        "00000000000000000003.checkpoint.0a1b.json",
        "00000000000000000001.00000000000000000003.compacted.json",
    ):
        storage.create(storage.join(config.lake.root_uri, "tables", "events", "_delta_log", name), b"{}", "r")
    assert pipeline.versions(config.lake.root_uri, ("events",)) == {"events": 3}


@pytest.mark.parametrize(
    "override", ["run.last_date=2017-01-31", "run.first_date=2017-09-01", "run.first_as_of=2018-01-01"]
)
def test_contradicting_dates_are_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.last_date \d.* must hold"):
        pipeline.plan(test_config(tmp_path, override))


def test_the_plan_is_in_order_and_every_job_exists(config: Config) -> None:
    planned = pipeline.plan(config)
    names = [stage.name for stage in planned]
    assert len(set(names)) == len(names)
    for number, stage in enumerate(planned):
        assert set(stage.after) <= set(names[:number]), stage.name
    assert {stage.job for stage in planned} - {"land"} == set(pipeline.JOBS)
    written = [table for stage in planned for table in stage.writes]
    assert len(set(written)) == len(written)
    jobs = Path(__file__).parents[2] / "jobs"
    assert {path.stem for path in jobs.glob("*.py")} - {"__init__"} == {*pipeline.JOBS, *pipeline.UPKEEP}
