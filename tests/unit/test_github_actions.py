"""The workflows of GitHub Actions: what is pinned, who may do what, and that linters run on all of it."""

import re
from typing import Any

import pytest
import yaml
from deploy_files import ROOT

FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))


def tree(name: str) -> dict[Any, Any]:
    return dict(yaml.safe_load((FOLDER / f"{name}.yml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_action_is_pinned_by_commit_and_says_its_version(file: Any) -> None:
    uses = re.findall(r"uses: (.*)", file.read_text(encoding="utf-8"))
    assert uses
    for one in uses:
        assert re.fullmatch(r"[a-z-]+/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one), one


def test_one_action_has_one_pin() -> None:
    pins: dict[str, set[str]] = {}
    for file in FILES:
        for name, pin in re.findall(r"uses: ([^@]+)@(\S+)", file.read_text(encoding="utf-8")):
            pins.setdefault(name, set()).add(pin)
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_secret_and_no_input_inside_a_shell_line(file: Any) -> None:
    text = file.read_text(encoding="utf-8")
    assert "secrets." not in text
    assert "credentials_json" not in text
    assert [line for line in re.findall(r"run: .*", text) if "${{" in line] == []
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_only_the_job_that_submits_may_ask_for_a_token() -> None:
    assert tree("ci")["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in tree("ci")["jobs"].values())
    published = tree("publish")
    assert published["permissions"] == {}
    (job,) = published["jobs"].values()
    assert job["permissions"] == {"contents": "read", "id-token": "write"}
    assert job["if"] == "github.ref == 'refs/heads/main'"


def test_publishing_checks_first_and_does_not_wait() -> None:
    """The token lives ten minutes: it is fetched last, and the command returns at once."""
    steps = tree("publish")["jobs"]["submit"]["steps"]
    lines = [step.get("run", step.get("uses", "")) for step in steps]
    order = [
        "actions/checkout@",
        "make submit-env",
        "check --deploy",
        "google-github-actions/auth@",
        " submit ",
    ]
    found = [next(n for n, line in enumerate(lines) if words in line) for words in order]
    assert found == sorted(found)
    assert lines[-1].endswith(" --async")
    with_auth = steps[found[3]]["with"]
    assert set(with_auth) == {"workload_identity_provider", "service_account"}


def test_the_environments_that_may_be_chosen_exist() -> None:
    inputs = tree("publish")[True]["workflow_dispatch"]["inputs"]  # YAML reads the key `on` so
    assert [
        name for name in inputs["environment"]["options"] if not (ROOT / f"deploy/env/{name}.toml").exists()
    ] == []
    for name in inputs["workflow"]["options"]:
        assert (ROOT / f"deploy/workflows/{name}.yaml").exists()


def test_check_lints_workflows_yaml_and_shell() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    check = makefile[makefile.index("\ncheck:") : makefile.index(".PHONY: fmt")]
    for linter in ("yamllint --strict", "actionlint", "zizmor --offline", "shellcheck", "shfmt"):
        assert f".venv/bin/{linter}" in check
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "deploy").rglob("*.sh")}
    assert scripts == {path.relative_to(ROOT).as_posix() for path in (ROOT / "deploy").glob("*/*.sh")}
