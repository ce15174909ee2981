"""deploy/iam/setup.sh against a gcloud that remembers: an empty project, a half-done one, a finished one."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recording_gcloud
from deploy_files import ROOT, environment
from typer.testing import CliRunner

from couponflow.cli import app

SCRIPT = ROOT / "deploy" / "iam" / "setup.sh"
GOLDEN = ROOT / "tests" / "golden" / "setup-dev.txt"
REPOSITORY = ("--repository-id", "987654321")


class Project:
    """A project behind the recording gcloud, in a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copyfile(recording_gcloud.__file__, folder / "gcloud.py")
        self.program("gcloud", f'exec {sys.executable} -I -S {folder}/gcloud.py "$@"')
        self.program("couponflow", f'exec {sys.executable} -m couponflow.cli "$@"')
        self.program("python3", f'exec {sys.executable} "$@"')

    def program(self, name: str, line: str) -> None:
        """Put a program on the PATH of the script."""
        (self.folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.folder / name).chmod(0o755)

    def setup(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            cwd=ROOT,
            env={"PATH": f"{self.folder}:/usr/bin:/bin", "PYTHONPATH": f"{ROOT / 'lib'}:{ROOT}"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def remember(self, **state: Any) -> None:
        """Put something into the state of the recording gcloud."""
        (self.folder / "gcloud.json").write_text(json.dumps({**self.state, **state}))

    @property
    def state(self) -> dict[str, Any]:
        """What the recording gcloud knows."""
        file = self.folder / "gcloud.json"
        empty: dict[str, Any] = {"made": [], "granted": [], "changes": []}
        return dict(json.loads(file.read_text())) if file.exists() else empty


@pytest.fixture(scope="module")
def answer() -> str:
    """What `couponflow check --deploy dev --json` prints."""
    with contextlib.chdir(ROOT):
        done = CliRunner().invoke(app, ["check", "--deploy", "dev", "--json"])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def project(tmp_path: Path, answer: str) -> Project:
    """An empty project; the command that tells the names answers at once."""
    made = Project(tmp_path)
    (tmp_path / "answer.json").write_text(answer)
    made.program("couponflow", f'[ "$*" = "check --deploy dev --json" ] && cat {tmp_path}/answer.json')
    return made


@pytest.fixture
def real(tmp_path: Path) -> Project:
    """An empty project, and the command itself."""
    return Project(tmp_path)


def commands(text: str) -> list[list[str]]:
    """The printed commands as argument lists, without the word gcloud."""
    lines = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    assert all(line[0] == "gcloud" for line in lines)
    return [line[1:] for line in lines]


def test_a_dry_run_is_the_golden_text_and_asks_nobody(project: Project) -> None:
    project.program("gcloud", f"touch {project.folder}/asked")
    done = project.setup("dev", *REPOSITORY, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (project.folder / "asked").exists()
    if os.environ.get("COUPONFLOW_GOLDEN"):
        GOLDEN.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == GOLDEN.read_text(encoding="utf-8"), "run `make golden` and review the difference"


def planned() -> list[list[str]]:
    """The commands of the golden text, with the number that the recording gcloud gives."""
    text = GOLDEN.read_text(encoding="utf-8")
    return commands(text.replace("PROJECT_NUMBER", recording_gcloud.PROJECT_NUMBER))


def test_a_run_does_what_the_dry_run_said_and_a_second_changes_nothing(project: Project) -> None:
    first = project.setup("dev", *REPOSITORY)
    assert first.returncode == 0, first.stderr
    assert project.state["changes"] == planned()
    assert commands(first.stdout) == planned()
    before = project.state
    second = project.setup("dev", *REPOSITORY)
    assert second.returncode == 0, second.stderr
    assert commands(second.stdout) == []
    assert project.state == before


@pytest.mark.parametrize("cut", [1, 13, 28])
def test_a_run_that_was_cut_off_is_finished_by_the_next(project: Project, cut: int) -> None:
    project.remember(fail_at=cut)
    assert project.setup("dev", *REPOSITORY).returncode == 1
    assert len(project.state["changes"]) == cut - 1
    assert project.setup("dev", *REPOSITORY).returncode == 0
    assert project.state["changes"] == planned()


def test_every_name_is_of_the_environment(real: Project) -> None:
    text = real.setup("prod", "--dry-run").stdout
    cloud = environment("prod").cloud
    for bucket in cloud.buckets.model_dump().values():
        assert f"buckets create gs://{bucket} " in text
    for email in cloud.service_accounts.model_dump().values():
        assert f"service-accounts create {email.partition('@')[0]} " in text
    assert "couponflow-dev" not in text
    assert "workload-identity" not in text
    assert all(command[command.index("--project") + 1] == cloud.project for command in commands(text))


def test_no_account_reaches_a_bucket_by_the_project() -> None:
    """Roles on objects are given bucket by bucket; nothing makes a key, nothing deletes."""
    for command in planned():
        assert not {"delete", "keys", "remove-iam-policy-binding"} & set(command)
        if command[:2] == ["projects", "add-iam-policy-binding"]:
            role = command[command.index("--role") + 1]
            assert role in ("projects/couponflow-dev/roles/couponflowNode", "roles/dataproc.editor")
        if command[:3] == ["iam", "roles", "create"]:
            assert "storage." not in command[command.index("--permissions") + 1]
        if command[:3] == ["storage", "buckets", "create"]:
            assert {"--uniform-bucket-level-access", "--public-access-prevention"} < set(command)
            file = ROOT / command[command.index("--lifecycle-file") + 1]
            assert json.loads(file.read_text())["rule"]


def test_nothing_deletes_objects_of_releases_or_of_the_lake() -> None:
    """Delta's files are deleted by VACUUM alone, and a release is what a roll-back needs."""
    for name in ("code", "lake"):
        rules = json.loads((SCRIPT.parent / f"lifecycle-{name}.json").read_text())["rule"]
        assert [rule["action"]["type"] for rule in rules] == ["AbortIncompleteMultipartUpload"]


def test_an_open_bucket_stops_the_run(project: Project) -> None:
    project.remember(made=["storage buckets gs://couponflow-dev-code"], access="False,inherited")
    done = project.setup("dev")
    assert done.returncode == 3
    assert "found 'False,inherited'" in done.stderr
    assert "gcloud storage buckets update gs://couponflow-dev-code" in done.stderr
    assert not [change for change in project.state["changes"] if change[0] == "projects"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no environment"),
        (["dev", "--repository-id", "owner/name"], "expected a number"),
        (["dev", "--force"], "unknown option --force"),
        (["stage"], "no file deploy/env/stage.toml"),
        (["local"], "has no [cloud]"),
    ],
)
def test_wrong_arguments_end_with_2(real: Project, arguments: list[str], words: str) -> None:
    done = real.setup(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert real.state["changes"] == []
