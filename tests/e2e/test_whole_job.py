"""All jobs' own ``main`` over the synthetic shop, in one JVM, training on two real Horovod ranks."""

import csv
import importlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium
from page_audit import WIDTHS, look_at, png_size
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from typer.testing import CliRunner

from couponflow import cli, pipeline
from couponflow.campaign import explain, overview
from couponflow.campaign.pages import report
from couponflow.config import Config, load_config
from couponflow.lake import layouts, runs, schemas, storage, tables
from couponflow.sources.synthetic_dirt import REASONS

CONFIG = """
[lake]
root_uri = "{root}"
time_zone = "America/New_York"
[source]
name = "synthetic"
num_users = 300
[world]
rate = 0.6
recency = 1.0
[events]
pseudonymise = false
staff_user_ids = ["u000031"]
[conversions]
source = "redemptions"
window = "campaign"
[examples]
history_length = 30
train_start = "2024-01-11"
valid_start = "2024-02-10"
test_start = "2024-02-20"
[model]
hidden_dim = 8
[training]
max_epochs = 2
[evaluation]
num_draws = 50
[scoring]
model = "dien"
[export]
target_uri = "{export}"
auto_approve = true
[run]
first_date = "2024-01-01"
last_date = "2024-02-29"
first_as_of = "2024-01-01"
campaign_id = "5"
run_date = "2024-02-20"
"""


class World:
    """One finished run of every job."""

    def __init__(self, folder: Path, spark: SparkSession) -> None:
        self.file = folder / "config.toml"
        self.file.write_text(CONFIG.format(root=folder / "lake", export=folder / "export"))
        self.config: Config = load_config(self.file)
        self.root = self.config.lake.root_uri
        self.spark = spark
        self.landed = pipeline.land(self.config, lambda what, done, total: None)

    def call(self, stage: pipeline.Stage) -> None:
        argv = ["--config", str(self.file), "--dates", str(stage.dates)]
        argv += ["--campaign", stage.campaign] if stage.campaign else []
        argv += ["--model", stage.model] if stage.model else []
        job: Any = importlib.import_module(f"jobs.{stage.job}")
        job.app(argv, standalone_mode=False)

    def records(self) -> dict[str, runs.RunRecord]:
        stages = pipeline.plan(self.config)
        return {outcome.stage.name: outcome.record for outcome in pipeline.recorded(self.config, stages)}

    def hashes(self) -> dict[str, str]:
        return {table: found for table, _, _, found in pipeline.content(self.root, self.spark)}


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"), spark)
    for stage in pipeline.plan(made.config):
        if stage.job != "land":
            made.call(stage)
    return made


def test_every_stage_ran_and_every_table_has_rows(world: World) -> None:
    assert set(world.records()) == {stage.name for stage in pipeline.plan(world.config)} - {"land"}
    only_by_merge = {"history_states"}  # examples.history_method = "merge"
    assert set(world.hashes()) == set(schemas.TABLES) - only_by_merge


def test_the_dien_was_trained_on_two_ranks(world: World) -> None:
    facts = world.records()["train dien"].facts
    assert facts["num_ranks"] == 2
    assert facts["model_version"].startswith("dien-")


def test_rows_are_conserved_at_every_door(world: World) -> None:
    records = world.records()
    doors = overview.conservation(world.config, records)
    assert [door for door in doors if not door["is_balanced"]] == []
    assert len(doors) > 12
    assert records["clean_events"].rows["raw_rows"] == world.landed["events"]
    assert records["clean_events"].rows["quarantine"] > 0
    assert records["clean_events"].rows["duplicates"] > 0


def test_dirt_is_counted_exactly(world: World) -> None:
    """Refused and duplicate rows equal what the source says it spoiled."""
    lines = (Path(world.root) / "truth" / "dirt" / "part-0000.jsonl").read_text().splitlines()
    truth: Counter[str] = Counter()
    for line in map(json.loads, lines):
        truth[line["kind"]] += line["rows"]
    rows = world.records()["clean_events"].rows
    assert rows["quarantine"] == sum(truth[kind] for kind in REASONS)
    assert rows["duplicates"] == truth["duplicate"] + truth["double_load"] + truth["retry_same_day"]


def test_every_user_has_one_prediction(world: World) -> None:
    users = {row.user_id for row in tables.read(world.spark, world.root, "users").collect()}
    predicted = [row.user_id for row in tables.read(world.spark, world.root, "predictions").collect()]
    assert sorted(predicted) == sorted(users)


def test_the_exported_list_is_the_audience(world: World) -> None:
    facts = world.records()["export_audience campaign 5"].facts
    content = storage.read_bytes(storage.join(facts["folder"], "audience.csv"))
    listed = [row["user_id"] for row in csv.DictReader(io.StringIO(content.decode()))]
    audience = tables.read(world.spark, world.root, "audience").orderBy("rank").collect()
    assert listed == [row.user_id for row in audience]
    ledger = {row.user_id: row.arm for row in tables.read(world.spark, world.root, "assignments").collect()}
    assert {ledger[user] for user in listed} <= {"treat"}
    denied = (
        tables.read(world.spark, world.root, "consents")
        .where("state = 'denied'")
        .select("user_id", "snapshot_date")
    )
    refused = {row.user_id for row in denied.collect() if row.snapshot_date == world.config.run.run_date}
    assert refused
    assert not refused & set(listed)


def test_every_decision_can_be_explained(world: World) -> None:
    """One user of each outcome, by the command itself: the words and the JSON agree with the tables."""
    ledger = tables.read(world.spark, world.root, "assignments").collect()
    scores = {row.user_id: row for row in tables.read(world.spark, world.root, "predictions").collect()}
    for reason in ("selected", "control", "unsubscribe"):
        row = next(row for row in ledger if row.reason == reason)
        argv = ["explain", "--user", row.user_id, "--campaign", "5", "--config", str(world.file)]
        found = json.loads(CliRunner().invoke(cli.app, [*argv, "--json"]).stdout)
        score = scores[row.user_id]
        assert (found["reason"], found["arm"], found["is_mailed"]) == (reason, row.arm, reason == "selected")
        assert found["is_eligible"] == (reason != "unsubscribe")
        assert found["conversion_probability"] == score.conversion_probability
        better = sum(one.conversion_probability > score.conversion_probability for one in scores.values())
        assert (found["score_rank"], found["num_scored"]) == (better + 1, len(scores))
        history = tables.read(world.spark, world.root, "histories").where(F.col("user_id") == row.user_id)
        assert len(found["events"]) == history.where("as_of_date = '2024-02-20'").first().length
        assert set(found["aggregates"]) == set(layouts.WIDE_FEATURES)
        assert all(event["event_type"] in layouts.EVENT_TYPES for event in found["events"])
    words = explain.in_words(found)
    assert words[0] == "Gets no mail of campaign 5 on 2024-02-20: unsubscribed."
    lost = CliRunner().invoke(cli.app, ["explain", "--user", "nobody", *argv[3:]])
    assert (lost.exit_code, "no row for this user" in lost.stderr) == (3, True)


def test_the_report_is_self_contained(world: World) -> None:
    page = report.render(overview.collect(world.config, world.records(), set(), world.spark))
    selection = world.records()["select_audience campaign 5"].facts
    assert f"{selection['mailed_users']:,}" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_is_sound_in_a_browser(world: World, browser: Chromium, width: int) -> None:
    (uri,) = overview.write_reports(world.config, world.records(), set(), world.spark)
    file = Path(uri)
    look = look_at(browser, file, width)
    look.keep(f"whole-job-{width}")
    assert look.faults == []
    assert {png_size(picture)[0] for picture in look.pictures} == {width}


def test_a_rerun_changes_no_content(world: World) -> None:
    """Jobs of every kind once more: the tables' contents stay, and the list is handed over once."""
    before = world.hashes()
    again = {
        "clean_events",
        "sessionize",
        "attribute_conversions",
        "build_examples",
        "score",
        "export_audience",
    }
    for stage in pipeline.plan(world.config):
        if stage.job in again:
            world.call(stage)
    assert world.hashes() == before
    assert world.records()["export_audience campaign 5"].facts["already_exported"] is True
