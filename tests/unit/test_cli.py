"""The command line: help as a golden text, plans without Spark, errors as exit codes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from builders import test_config
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import DataError
from couponflow.lake import runs, storage
from couponflow.training import registry

GOLDEN = Path(__file__).parents[1] / "golden"
COMMANDS = (
    "",
    "run",
    "land",
    "job",
    "backfill",
    "status",
    "check",
    "erase",
    "maintain",
    "explain",
    "models list",
    "models show",
    "models promote",
    "models rollback",
    "models recalibrate",
    "campaign plan",
    "campaign create",
    "campaign approve",
    "campaign recall",
    "submit",
    "cancel",
    "campaign readout",
    "campaign report",
)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(f"[lake]\nroot_uri = '{tmp_path / 'lake'}'\n")
    return file


@pytest.mark.parametrize("command", COMMANDS, ids=lambda name: name or "couponflow")
def test_help_is_the_golden_text(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    done = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="couponflow")
    assert done.exit_code == 0
    file = GOLDEN / f"help-{(command or 'couponflow').replace(' ', '-')}.txt"
    if os.environ.get("COUPONFLOW_GOLDEN"):
        file.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == file.read_text(encoding="utf-8"), "run `make golden` and review the difference"
    assert not command or "Example: couponflow" in done.stdout


def test_a_dry_run_prints_the_plan_and_runs_nothing(config_file: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", "--config", str(config_file), "--dry-run"])
    assert done.exit_code == 0
    assert "attribute_conversions" in done.stdout
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "--set", "lake.root_ur=x"], "did you mean root_uri?"),
        (["job", "nonsense", "--dates", "2024-01-01"], "unknown job 'nonsense'"),
        (["job", "sessionize", "--dates", "2024-02-30"], "2024-02-30"),
        (["backfill", "sessionize", "--from-date", "2024-01-02", "--to-date", "2024-01-01"], "reversed"),
        (["land", "elsewhere"], "source.name"),
        (["check"], "give --contract"),
        (["job", "score", "--dates", "2024-01-01"], "job score needs --campaign ID"),
        (["job", "train", "--dates", "2024-01-01"], "job train needs --model KIND"),
        (["status", "--job", "trian"], "unknown job 'trian'"),
        (["run", "--set", "run.last_date=2016-01-01"], "run.last_date"),
        (["models", "promote", "best", "--reason", "x"], "expected champion"),
        (["models", "recalibrate", "--dates", "2024-02-30"], "2024-02-30"),
        (["models", "recalibrate"], "--dates"),
        (["campaign", "plan", "--campaign", "1", "--dates", "2024-01-01:2024-01-02"], "give one day"),
        (
            ["campaign", "plan", "--campaign", "1", "--dates", "2024-01-01", "--control-share", "1.5"],
            "selection.control_share",
        ),
    ],
)
def test_wrong_arguments_end_with_2_and_say_what_to_do(
    config_file: Path, argv: list[str], words: str
) -> None:
    more = [] if argv == ["check"] else ["--config", str(config_file)]
    done = CliRunner().invoke(app, [*argv, *more])
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())


def test_status_shows_runs_and_reasons(config_file: Path, tmp_path: Path) -> None:
    config = test_config(tmp_path)
    with pytest.raises(DataError), record_run("sessionize", config, DateRange.parse("2024-01-01")):
        raise DataError("table events is empty; run clean_events")
    done = CliRunner().invoke(app, ["status", "--config", str(config_file), "--json"])
    (record,) = json.loads(done.stdout)
    assert (record["job"], record["status"]) == ("sessionize", "failed")
    assert "run clean_events" in record["error"]
    assert "failed" in CliRunner().invoke(app, ["status", "--config", str(config_file)]).stdout


def test_status_shows_who_holds_what(config_file: Path, tmp_path: Path) -> None:
    argv = ["status", "--config", str(config_file)]
    with record_run("sessionize", test_config(tmp_path), DateRange.parse("2024-01-01")) as run:
        shown = " ".join(CliRunner().invoke(app, argv).stdout.split())
        assert "session_segments 2024-01-01:2024-01-01" in shown
        assert run.run_id[:20] in shown
        assert "working" in shown
    assert "Leases" not in CliRunner().invoke(app, argv).stdout


def test_models_shows_roles_and_the_last_decision(config_file: Path, tmp_path: Path) -> None:
    root_uri = test_config(tmp_path).lake.root_uri
    for version in ("logistic-000000000001", "dien-000000000002", "dien-000000000003"):
        for name in ("metrics.json", "manifest.json"):
            storage.create(storage.join(root_uri, "models", version, name), b"{}", "r")
    registry.set_champion(root_uri, "logistic-000000000001", "r", "first")
    registry.set_challenger(root_uri, "dien-000000000002", "r", "keep_champion")
    sides = {"champion": {"model_version": "logistic-000000000001"}, "challenger": None}
    decision = json.dumps({"decision": "keep_champion", **sides}).encode()
    storage.create(storage.join(root_uri, "decisions", "evaluate-1.json"), decision, "r")

    def shown(*argv: str) -> Any:
        done = CliRunner().invoke(app, ["models", *argv, "--config", str(config_file)])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert shown("list", "--json") == [
        {"version": "dien-000000000002", "role": "challenger"},
        {"version": "dien-000000000003", "role": ""},
        {"version": "logistic-000000000001", "role": "champion"},
    ]
    assert shown("show", "champion")["last_decision"]["decision"] == "keep_champion"
    assert shown("show", "challenger")["last_decision"] is None


def test_land_twice_lands_once(config_file: Path, tmp_path: Path) -> None:
    small = [
        "source.num_users=5",
        "run.first_date=2024-01-01",
        "run.last_date=2024-01-20",
        "run.run_date=2024-01-20",
    ]
    argv = ["land", "synthetic", "--config", str(config_file)]
    argv += [word for value in small for word in ("--set", value)]
    raw = tmp_path / "lake" / "raw"
    found = []
    for _ in range(2):
        done = CliRunner().invoke(app, argv)
        assert done.exit_code == 0, done.output
        found.append({path: (path.stat().st_mtime_ns, path.read_bytes()) for path in raw.rglob("*.jsonl")})
    assert found[0] == found[1]
    assert found[0]
    done = CliRunner().invoke(app, [*argv, "--set", "source.seed=1"])
    assert done.exit_code == 4
    assert "was landed before with other rows" in done.output


def test_backfill_dry_run_lists_the_dates(config_file: Path, tmp_path: Path) -> None:
    settings = test_config(tmp_path, "events.pseudonymise=true")
    with record_run("sessionize", settings, DateRange.parse("2024-01-02")):
        pass
    argv = ["backfill", "sessionize", "--config", str(config_file), "--dry-run"]
    done = CliRunner().invoke(app, [*argv, "--from-date", "2024-01-01", "--to-date", "2024-01-03"])
    rows = [line.split("│")[1:5] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["sessionize", "2024-01-01:2024-01-01", "run", "never run"],
        ["sessionize", "2024-01-02:2024-01-02", "skip", "finished"],
        ["sessionize", "2024-01-03:2024-01-03", "run", "never run"],
    ]


def test_models_of_an_empty_lake(config_file: Path) -> None:
    assert (
        CliRunner().invoke(app, ["models", "list", "--config", str(config_file), "--json"]).stdout.strip()
        == "[]"
    )
    done = CliRunner().invoke(app, ["models", "show", "champion", "--config", str(config_file)])
    assert done.exit_code == 3
    assert "run the train job first" in done.output


def test_the_contract_names_every_feed() -> None:
    done = CliRunner().invoke(app, ["check", "--contract"])
    for feed in ("events", "orders", "redemptions", "sends", "campaigns", "consents", "users", "catalogue"):
        assert f"raw/{feed}/" in done.stdout


PUBLIC = ["--set", "events.pseudonymise=false"]


def test_verify_lists_the_files_that_hold_a_person(config_file: Path, tmp_path: Path) -> None:
    holding = tmp_path / "lake" / "runs" / "x" / "r.json"
    holding.parent.mkdir(parents=True)
    holding.write_text('{"error": "customer-4711"}')
    export = ["--set", f"export.target_uri='{tmp_path / 'export'}'"]
    argv = ["erase", "--config", str(config_file), *PUBLIC, *export, "--verify"]
    done = CliRunner().invoke(app, [*argv, "--user", "customer-4711"])
    assert done.exit_code == 3
    assert "1 files may still hold this person" in done.output
    assert "r.json (its bytes)" in done.output
    done = CliRunner().invoke(app, [*argv, "--user", "-"], input="customer-4712\n")
    assert done.exit_code == 0, done.output
    assert "no file of lake and export target holds this person" in done.output


def test_erasing_needs_a_key_an_id_and_an_answer(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COUPONFLOW_USER_KEY", raising=False)
    argv = ["erase", "--config", str(config_file)]
    for more, answer, words in (
        (["--user", "customer-4711"], "y\n", "COUPONFLOW_USER_KEY"),
        ([*PUBLIC, "--user", ""], "y\n", "expected one id"),
        ([*PUBLIC, "--user", "customer-4711"], "n\n", "nothing was erased"),
    ):
        done = CliRunner().invoke(app, [*argv, *more], input=answer)
        assert done.exit_code == 2, done.output
        assert words in " ".join(done.output.split())
    assert not (tmp_path / "lake").exists()


def test_status_shows_what_an_erasure_made_impossible_to_repeat(config_file: Path, tmp_path: Path) -> None:
    config = test_config(tmp_path)
    for job in ("sessionize", "monitor"):
        with record_run(job, config, DateRange.parse("2024-01-01")):
            pass
        if job == "sessionize":
            runs.mark_not_reproducible(config.lake.root_uri, "erase-1")
    argv = ["status", "--config", str(config_file)]
    found = json.loads(CliRunner().invoke(app, [*argv, "--json"]).stdout)
    assert {run["job"]: run["is_reproducible"] for run in found} == {"sessionize": False, "monitor": True}
    assert CliRunner().invoke(app, argv).stdout.count("not") == 1
