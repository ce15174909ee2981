"""Two campaigns of one day on the synthetic shop: three coupons, a cap, holdout, exploration, one truth.

Then score, choice and hand-over of one of them, killed at every step in a process of its own: the next run
leaves what an unharmed one would have left.
"""

import csv
import importlib
import io
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from couponflow import pipeline
from couponflow.campaign import overview
from couponflow.campaign.choice import assignment
from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import storage, tables

CONFIG = """
[lake]
root_uri = "{root}"
time_zone = "America/New_York"
[source]
name = "synthetic"
num_users = 400
[world]
rate = 0.6
recency = 1.0
campaigns_at_once = 2
is_dirty = false
[events]
pseudonymise = false
[conversions]
source = "redemptions"
window = "campaign"
[examples]
history_length = 20
train_start = "2024-01-11"
valid_start = "2024-01-31"
test_start = "2024-02-10"
[model]
hidden_dim = 8
[training]
max_epochs = 1
num_ranks = 1
[evaluation]
num_draws = 50
[scoring]
model = "logistic"
[selection]
budget_amount = 60.0
max_recipients = 120
mail_cost_amount = 0.05
margin_amount = 4.0
control_share = 0.1
holdout_share = 0.1
explore_share = 0.05
max_sends = 1
[[selection.coupons]]
coupon_id = "small"
discount_amount = 0.5
response_scale = 0.8
[[selection.coupons]]
coupon_id = "usual"
discount_amount = 1.0
[[selection.coupons]]
coupon_id = "other"
discount_amount = 1.0
target_id = "8"
stock = 30
[[selection.segments]]
name = "cheap"
where = "attributes['price_tier'] = '0'"
max_recipients = 25
[export]
target_uri = "{export}"
auto_approve = true
[run]
first_date = "2024-01-01"
last_date = "2024-02-20"
first_as_of = "2024-01-01"
campaign_id = "7"
more_campaign_ids = ["8"]
run_date = "2024-02-10"
"""


class Shop:
    """One finished run, and what it left."""

    def __init__(self, folder: Path, spark: SparkSession) -> None:
        path = folder / "config.toml"
        path.write_text(CONFIG.format(root=folder / "lake", export=folder / "export"))
        self.spark, self.file, self.config = spark, path, load_config(path)
        self.outcomes = self.execute(self.config)
        self.records = {outcome.stage.name: outcome.record for outcome in self.outcomes}
        rows = tables.read(spark, self.config.lake.root_uri, "assignments").collect()
        self.ledger: dict[str, dict[str, Any]] = {"7": {}, "8": {}}
        for row in rows:
            self.ledger[row.campaign_id][row.user_id] = row

    def execute(self, config: Config) -> list[pipeline.Outcome]:
        return pipeline.execute(config, pipeline.plan(config), lambda: self.spark, pipeline.Progress())

    def facts(self, job: str, campaign: str) -> dict[str, Any]:
        return self.records[f"{job} campaign {campaign}"].facts

    def listed(self, campaign: str) -> dict[str, dict[str, str]]:
        folder = self.facts("export_audience", campaign)["folder"]
        content = storage.read_bytes(storage.join(folder, "audience.csv")).decode()
        return {row["user_id"]: row for row in csv.DictReader(io.StringIO(content))}


@pytest.fixture(scope="module")
def shop(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("two"), spark)


@pytest.mark.parametrize("campaign", ["7", "8"])
def test_selected_and_drawn_users_keep_every_limit(shop: Shop, campaign: str) -> None:
    rows = shop.ledger[campaign].values()
    held = [row for row in rows if row.would_select or row.arm == "explore"]
    coupons = Counter(row.coupon_id for row in held)
    assert set(coupons) <= {"small", "usual", "other"}
    assert campaign == "8" or len(coupons) == 3  # there "other" is as good as "usual"
    assert coupons["other"] <= 30
    assert len(held) <= 120
    facts = shop.facts("select_audience", campaign)
    assert facts["explore_users"] == sum(row.arm == "explore" for row in rows) > 0
    assert max(facts["expected_cost_amount"], facts["selected_cost_amount"]) <= 60.0
    users = tables.read(shop.spark, shop.config.lake.root_uri, "users").collect()
    cheap = {row.user_id for row in users if (row.attributes or {}).get("price_tier") == "0"}
    assert 0 < sum(row.user_id in cheap for row in held) <= 25
    assert {row.arm for row in rows} == set(assignment.ARMS)


def test_nobody_gets_two_mails_and_the_holdout_gets_none(shop: Shop) -> None:
    first, second = shop.listed("7"), shop.listed("8")
    assert first
    assert second
    assert set(first).isdisjoint(second)
    capped = [row.user_id for row in shop.ledger["8"].values() if row.reason == "frequency_cap"]
    assert set(capped) <= set(first)
    assert capped
    section = shop.config.selection
    for listed in (first, second):
        assert not [
            user
            for user in listed
            if assignment.unit_hash(f"{section.salt}|holdout", user) < section.holdout_share
        ]


def test_the_list_carries_the_coupon_of_the_ledger(shop: Shop) -> None:
    for campaign, rows in shop.ledger.items():
        listed = shop.listed(campaign)
        mailed = {user: row for user, row in rows.items() if row.arm in assignment.MAILED}
        assert {user: row["coupon_id"] for user, row in listed.items()} == {
            user: row.coupon_id for user, row in mailed.items()
        }


def test_the_coupon_for_another_target_counts_its_probability(shop: Shop) -> None:
    root = shop.config.lake.root_uri
    scores = tables.read(shop.spark, root, "predictions").where("campaign_id = '7'").collect()
    of_target = {target: {r.user_id: r for r in scores if r.target_id == target} for target in ("7", "8")}
    assert len(of_target["7"]) == len(of_target["8"]) == shop.records["score campaign 7"].facts["num_users"]
    assert shop.records["score campaign 7"].facts["target_ids"] == ["7", "8"]
    held = [row for row in shop.ledger["7"].values() if row.coupon_id]
    for row in held:
        target = "8" if row.coupon_id == "other" else "7"
        scale = 0.8 if row.coupon_id == "small" else 1.0
        expected = of_target[target][row.user_id].conversion_probability * scale
        assert row.conversion_probability == pytest.approx(expected, abs=1e-12)
    assert {row.coupon_id for row in held} == {"small", "usual", "other"}


def test_every_door_balances_for_both_campaigns(shop: Shop) -> None:
    doors = overview.conservation(shop.config, shop.records)
    assert [door for door in doors if not door["is_balanced"]] == []
    named = {door["door"] for door in doors}
    for campaign in ("7", "8"):
        for door in ("users to predictions", "predictions to audience", "audience to exported file"):
            assert f"{door}, campaign {campaign}" in named


def test_both_reports_compare_the_choice_with_the_best_one(shop: Shop) -> None:
    shown: list[tuple[str, list[list[Any]]]] = []
    found = overview.look_back(
        shop.config, shop.records, shop.spark, lambda title, names, rows: shown.append((title, rows))
    )
    assert set(found) == {"7", "8"}
    (table,) = shown
    assert [row[0] for row in table[1]] == ["7", "8"]
    uris = overview.write_reports(shop.config, shop.records, set(), shop.spark, found)
    for campaign, uri in zip(("7", "8"), uris, strict=True):
        facts = found[campaign]
        assert facts["num_chosen"] == shop.facts("select_audience", campaign)["selected_users"]
        assert 0 < facts["chosen_profit_amount"] < facts["best_profit_amount"]
        assert facts["share_of_best"] > 0.3
        assert facts["random_profit_amount"] < facts["chosen_profit_amount"]
        page = storage.read_bytes(uri).decode()
        assert uri.endswith(f"campaign-{campaign}.html")
        assert "Against the truth" in page
        assert f"{facts['chosen_profit_amount']:,.2f}" in page


def test_a_second_run_has_nothing_to_do(shop: Shop) -> None:
    outcomes = shop.execute(shop.config)
    assert [outcome.stage.name for outcome in outcomes if not outcome.is_skipped] == []


JOBS = ("score", "select_audience", "export_audience")
RESULTS = ("predictions", "assignments", "audience")
DAY = "2024-02-10"


class Steps:
    """Copies of the lake before each job of campaign 7, and what all three leave when nobody harms them."""

    def __init__(self, shop: Shop, folder: Path) -> None:
        self.shop, self.before = shop, {}
        whole = folder / "whole"
        shutil.copytree(shop.config.lake.root_uri, whole / "lake")
        for name in (*(f"tables/{table}" for table in RESULTS), "handovers", "reports", "work"):
            shutil.rmtree(whole / "lake" / name, ignore_errors=True)
        for job in JOBS:
            self.before[job] = folder / job
            shutil.copytree(whole, self.before[job])
            self.run(job, whole)
        self.expected = self.left(whole)

    def settings(self, folder: Path) -> list[str]:
        return [
            f"lake.root_uri={folder / 'lake'}",
            f"export.target_uri={folder / 'export'}",
            "scoring.part_users=150",
        ]

    def run(self, job: str, folder: Path) -> None:
        config = load_config(self.shop.file, tuple(self.settings(folder)))
        with record_run(job, config, DateRange.parse(DAY), "7") as run:
            importlib.import_module(f"jobs.{job}").run(self.shop.spark, run)

    def left(self, folder: Path) -> dict[str, Any]:
        root = str(folder / "lake")
        found: dict[str, Any] = {}
        for table in RESULTS:
            frame = tables.read(self.shop.spark, root, table)
            found[table] = tables.content_hash(frame.drop("run_id"))
        lists = sorted((folder / "export").rglob("audience.csv"))
        found["lists"] = [path.read_bytes() for path in lists]
        found["manifests"] = len(list((folder / "export").rglob("manifest.json")))
        return found

    def harmed(self, job: str, fault: str, master: str, folder: Path) -> int:
        """The exit code of a job in a process of its own, with a fault."""
        shutil.copytree(self.before[job], folder)
        command = [sys.executable, "-m", "couponflow.cli", "job", job, "--dates", DAY, "--campaign", "7"]
        command += ["--config", str(self.shop.file), "--set", f"spark.master={master}"]
        for setting in self.settings(folder):
            command += ["--set", setting]
        home = Path(__file__).parents[2]
        path = os.pathsep.join([str(home / "lib"), str(home)])
        environment = os.environ | {"COUPONFLOW_FAULT": fault, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert list((folder / "lake").glob(".fault-*")), done.stderr[-2000:]
        return done.returncode


@pytest.fixture(scope="module")
def steps(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    return Steps(shop, tmp_path_factory.mktemp("steps"))


def nightly(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("job", "fault"),
    [
        nightly("score", "score:before_run:kill"),
        ("score", "score@1:part:kill"),
        nightly("score", "predictions:before_write:kill"),
        nightly("score", "predictions:during_write:kill"),
        nightly("score", "predictions:after_commit:kill"),
        nightly("score", "score:before_record:kill"),
        nightly("score", "score:after_record:kill"),
        nightly("select_audience", "assignments:during_write:kill"),
        ("select_audience", "assignments:after_commit:kill"),
        nightly("select_audience", "audience:during_write:kill"),
        nightly("select_audience", "audience:after_commit:kill"),
        nightly("select_audience", "select_audience:before_record:kill"),
        nightly("export_audience", "export_audience:before_run:kill"),
        nightly("export_audience", "export_audience:after_claim:kill"),
        ("export_audience", "export_audience:after_list:kill"),
        nightly("export_audience", "export_audience:after_manifest:kill"),
        nightly("export_audience", "export_audience:before_record:kill"),
    ],
)
def test_a_killed_job_is_finished_by_the_next_run(steps: Steps, job: str, fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    assert steps.harmed(job, fault, "local[2,4]", folder) == -9
    if job == "export_audience":
        manifests = len(list((folder / "export").rglob("manifest.json")))
        assert manifests == (fault.split(":")[1] in ("after_manifest", "before_record"))
    for name in JOBS[JOBS.index(job) :]:
        steps.run(name, folder)
    assert steps.left(folder) == steps.expected


@pytest.mark.parametrize(
    ("fault", "master"),
    [
        nightly("predictions:during_write:kill_worker", "local[2,4]"),
        nightly("predictions:during_write:kill_executor", "local-cluster[2,1,1024]"),
        nightly("assignments:during_write:kill_executor", "local-cluster[2,1,1024]"),
    ],
)
def test_a_lost_worker_or_executor_changes_no_row(
    steps: Steps, fault: str, master: str, tmp_path: Path
) -> None:
    folder = tmp_path / "case"
    job = "score" if fault.startswith("predictions") else "select_audience"
    assert steps.harmed(job, fault, master, folder) == 0
    for name in JOBS[JOBS.index(job) + 1 :]:
        steps.run(name, folder)
    assert steps.left(folder) == steps.expected
