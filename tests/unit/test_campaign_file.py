"""A declared campaign: what it may change, what is refused by name, and when it may not change any more."""

from pathlib import Path

import pytest

from couponflow import campaign_file
from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import ConfigError, ConflictError
from couponflow.lake import storage

FILE = b"""
[campaign]
campaign_id = "autumn"
name = "Autumn coats"
[selection]
budget_amount = 12.5
objective = "top_k"
[scoring]
model = "logistic"
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, (f"lake.root_uri={tmp_path / 'lake'}", "selection.max_recipients=7"))


def test_a_campaign_changes_what_it_names_and_nothing_else(config: Config) -> None:
    made = campaign_file.declare(config, FILE, "autumn.toml", "run")
    assert (made.selection.budget_amount, made.selection.objective, made.scoring.model) == (
        12.5,
        "top_k",
        "logistic",
    )
    assert made.selection.max_recipients == 7
    changed = {"selection": made.selection, "scoring": made.scoring}
    assert made == config.model_copy(update=changed)
    assert campaign_file.applied(config, "autumn") == made
    assert campaign_file.applied(config, "other") == config
    assert campaign_file.applied(config, "") == config


def test_a_job_of_the_campaign_runs_under_its_declaration(config: Config) -> None:
    campaign_file.declare(config, FILE, "autumn.toml", "run")
    day = DateRange.parse("2024-02-20")
    with record_run("score", config, day, "autumn") as job:
        assert job.config.scoring.model == "logistic"
        assert job.record.config["selection"]["budget_amount"] == 12.5
    with record_run("score", config, day, "other") as job:
        assert job.config == config


def test_the_last_declaration_counts_until_one_is_settled(config: Config) -> None:
    root = config.lake.root_uri
    campaign_file.declare(config, FILE, "autumn.toml", "run")
    richer = FILE.replace(b"12.5", b"99.0")
    assert campaign_file.declare(config, richer, "autumn.toml", "run").selection.budget_amount == 99.0
    storage.create(storage.join(root, "approvals", "autumn", "v1.json"), b"{}", "run")
    with pytest.raises(ConflictError, match="campaign autumn was declared otherwise"):
        campaign_file.declare(config, FILE, "autumn.toml", "run")
    assert campaign_file.declare(config, richer, "autumn.toml", "run").selection.budget_amount == 99.0
    assert campaign_file.applied(config, "autumn").selection.budget_amount == 99.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[campaign", "campaign file x.toml: not valid TOML"),
        (b"[lake]\n", r"unknown section \[lake\]; a campaign has \[campaign\]"),
        (b"[selection]\n", "campaign.campaign_id"),
        (b"[campaign]\ncampaign_id = 'a b'\n", "campaign.campaign_id = 'a b'"),
        (b"[campaign]\ncampaign_id = 'a'\nbudget = 1\n", "unknown config name campaign.budget"),
        (FILE.replace(b"12.5", b"-1.0"), "selection.budget_amount = -1.0"),
        (FILE.replace(b"budget_amount", b"budgets_amount"), "did you mean budget_amount"),
        (b"selection = 3\n[campaign]\ncampaign_id = 'a'\n", "selection is a value, not a section"),
    ],
)
def test_what_is_wrong_is_named(config: Config, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        campaign_file.declare(config, content, "x.toml", "run")
    assert storage.list_names(storage.join(config.lake.root_uri, "campaigns")) == []


def test_the_example_is_a_campaign(config: Config) -> None:
    example = Path(__file__).parents[2] / "deploy" / "campaigns" / "example.toml"
    made = campaign_file.declare(config, example.read_bytes(), str(example), "run")
    assert made.selection.control_share == 0.2
