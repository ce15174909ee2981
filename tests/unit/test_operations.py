"""What deploy/ tells operators: a page for all that can go wrong, commands that exist, numbers that hold."""

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from deploy_files import ROOT
from typer.core import TyperGroup
from typer.exceptions import TyperException

from bench import capacity
from couponflow import errors
from couponflow.cli import app
from couponflow.lake import leases
from couponflow.monitoring import kpis
from couponflow.sections import MaintenanceConfig

DEPLOY = ROOT / "deploy"
RUNBOOKS = DEPLOY / "runbooks"
PAGES = sorted(path for path in RUNBOOKS.glob("*.md") if path.name != "README.md")
DOCUMENTS = sorted(path for path in DEPLOY.rglob("*.md"))
OPERATIONS = (DEPLOY / "operations.md").read_text(encoding="utf-8")


def alerts() -> dict[str, set[str]]:
    """Check -> verdicts that are not ok, as the code that makes them has them."""
    found = {}
    for check in (kpis.check_freshness, kpis.check_row_count):
        tree = ast.parse(inspect.getsource(check))
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        name = next(str(text) for text in texts if text in ("freshness", "row_count"))
        found[name] = {str(text) for text in texts if text in ("missing", "empty", "stale")}
    return found


def test_every_alert_of_monitor_has_a_page_that_tells_each_verdict() -> None:
    told = alerts()
    assert told == {name: {"missing", "empty", "stale"} for name in ("freshness", "row_count")}
    for name, verdicts in told.items():
        text = (RUNBOOKS / f"alert-{name}.md").read_text(encoding="utf-8")
        for verdict in verdicts:
            assert re.search(rf"^- `{verdict}`: ", text, re.MULTILINE), f"{name} {verdict}"
    source = inspect.getsource(kpis)
    checks = set(re.findall(r'Verdict\(run_date, table, "(\w+)"', source))
    assert checks == set(told)
    assert {path.stem.removeprefix("alert-") for path in RUNBOOKS.glob("alert-*.md")} == checks


def test_every_exit_code_has_a_page() -> None:
    codes = {
        one.exit_code
        for _, one in inspect.getmembers(errors, inspect.isclass)
        if issubclass(one, errors.CouponflowError) and one is not errors.CouponflowError
    }
    assert codes == {2, 3, 4, 5}
    assert {path.name for path in RUNBOOKS.glob("exit-*.md")} == {f"exit-{code}.md" for code in codes}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_says_four_things(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["Symptom", "Confirm", "Do", "Over when"]
    assert len(text.splitlines()) <= 60
    confirm = text[text.index("## Confirm") : text.index("## Do")]
    assert re.search(r"^(couponflow|gcloud) ", confirm, re.MULTILINE)
    pages = set(re.findall(r"`((?:exit|alert|[a-z]+-)[a-z0-9_-]*\.md)`", text))
    assert {name for name in pages if not (RUNBOOKS / name).exists()} == set()


def test_the_index_names_every_page() -> None:
    text = (RUNBOOKS / "README.md").read_text(encoding="utf-8")
    named = {"exit-3.md", "exit-4.md", *re.findall(r"`([a-z0-9_-]+\.md)`", text)}  # "exit-2.md … exit-5.md"
    assert {page.name for page in PAGES} == named


def commands(text: str) -> Iterator[str]:
    """Commands of this program in code blocks and in line."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in (line.strip() for block in blocks for line in block.splitlines()):
        if line.startswith("couponflow "):
            yield line
    prose = re.sub(r"```sh\n.*?```", "", text, flags=re.DOTALL)
    for quoted in re.findall(r"`(couponflow\s[^`]*)`", prose):
        yield " ".join(quoted.split())


def own_arguments(command: str) -> list[str]:
    """The words of a command up to a pipe, a redirection or a comment, without the program's name."""
    words = shlex.split(command, comments=True)
    end = next((n for n, word in enumerate(words) if word in ("|", ">", ">>", "&&")), len(words))
    return words[1:end]


def parsed(words: list[str], is_whole: bool) -> None:
    """Let the command line take the words, without running anything.

    In running text a command may be named without what it needs; its name and flags have to exist.
    """
    command: Any = typer.main.get_command(app)
    while isinstance(command, TyperGroup):
        if not words and not is_whole:
            return
        name, *words = words
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    try:
        command.make_context(command.name, words)
    except TyperException as error:
        if is_whole or not error.format_message().startswith("Missing "):
            raise


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_every_command_that_is_named_exists_with_its_flags(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    for command in commands(text):
        try:
            parsed(own_arguments(command), is_whole=command in blocks)
        except (TyperException, AssertionError) as error:
            pytest.fail(f"{document.name}: {command}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "couponflow models rollbak",
        "couponflow status --jobs train",
        "couponflow models rollback --config a.toml",
        "couponflow job monitor --dates 2024-02-30",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    with pytest.raises((TyperException, AssertionError)):
        parsed(own_arguments(command), is_whole=True)


def test_the_capacity_table_is_what_the_benchmarks_give() -> None:
    lines = json.loads((ROOT / "bench" / "results.json").read_text(encoding="utf-8"))
    marked = re.search(r"<!-- bench.capacity -->\n(.*?)<!-- end -->", OPERATIONS, re.DOTALL)
    assert marked
    assert marked[1] == capacity.table(lines), "print it anew: python -m bench.capacity"
    measured = capacity.rates(lines)
    for rate in (
        measured.delivered_events,
        measured.look_back_events,
        measured.scored_users,
        measured.chosen_users,
        measured.trained_rows,
    ):
        assert f"{rate:,.0f}" in OPERATIONS
    assert f"{measured.reopening:.2f}" in OPERATIONS


def test_capacity_is_arithmetic() -> None:
    """By hand, from rates that a person can divide by."""
    measured = capacity.Rates(1_000, 2_000, 500, 250, 100, 3.0)
    assert capacity.core_hours(measured, 1_800_000) == pytest.approx(
        {
            "delivery": 3.0,  # 3 x 3.6 million events / 1,000 = 10,800 s
            "histories": 45.5,  # 3.6 million x 91 days / 2,000 = 163,800 s
            "scores": 1.0,
            "choice": 2.0,
            "training": 25.0,  # 5 epochs of 1.8 million rows / 100 = 90,000 s
        }
    )
    assert [capacity.workers(hours) for hours in (0.0, 0.1, 12.0, 12.1)] == [0, 1, 1, 2]


def test_the_numbers_of_the_retention_table_are_those_of_the_code() -> None:
    table = OPERATIONS[OPERATIONS.index("## Retention") : OPERATIONS.index("## Capacity")]
    assert f"{MaintenanceConfig().retention_hours} hours" in table
    assert f"{leases.EXPIRY_SECONDS:.0f} seconds" in table
    rules = json.loads((DEPLOY / "iam" / "lifecycle-staging.json").read_text())["rule"]
    (age,) = [rule["condition"]["age"] for rule in rules if rule["action"]["type"] == "Delete"]
    assert f"{age} days, no soft delete" in table
    setup = (DEPLOY / "iam" / "setup.sh").read_text(encoding="utf-8")
    assert re.findall(r"^create_bucket .* (\w+) (\w+)$", setup, re.MULTILINE) == [
        ("code", "7d"),
        ("lake", "7d"),
        ("staging", "0"),
    ]
    uploaded = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "retention-days: 30" in uploaded
    lease = (RUNBOOKS / "stuck-lease.md").read_text(encoding="utf-8")
    assert f"every {leases.HEARTBEAT_SECONDS:.0f} seconds" in lease
    assert f"silent for {leases.EXPIRY_SECONDS:.0f} seconds" in lease
