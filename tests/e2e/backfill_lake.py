"""A lake in a folder that the real backfill command fills, here or in a child that may be killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pyspark.sql import SparkSession
from typer.testing import CliRunner

from couponflow import pipeline
from couponflow.cli import app
from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.lake import faults, runs, schemas

CONFIG = """
[lake]
root_uri = "{root}"
time_zone = "America/New_York"
[source]
name = "synthetic"
num_users = {num_users}
[events]
pseudonymise = false
[conversions]
source = "redemptions"
window = "campaign"
[examples]
history_length = 20
train_start = "2024-01-02"
valid_start = "{middle}"
test_start = "{last}"
[vocabulary]
min_count = 2
[run]
first_date = "2024-01-01"
last_date = "{last}"
first_as_of = "2024-01-01"
campaign_id = "1"
run_date = "2024-01-12"
"""
#: What a backfill fills; links need a visitor who logs in, states the history method ``merge``.
TABLES = set(schemas.TABLES) - {
    "identity_links",
    "history_states",
    "predictions",
    "assignments",
    "audience",
    "verdicts",
}


class Lake:
    """A lake in a folder of its own, worked on by the real command."""

    def __init__(self, folder: Path, num_days: int, num_users: int) -> None:
        days = list(DateRange.parse("2024-01-01:2024-03-01").days())[:num_days]
        self.folder, self.first, self.last = folder, str(days[0]), str(days[-1])
        folder.mkdir(parents=True)
        self.root = str(folder / "lake")
        self.config = folder / "config.toml"
        middle = str(days[num_days // 2])
        self.config.write_text(
            CONFIG.format(root=self.root, num_users=num_users, middle=middle, last=self.last)
        )

    def argv(self, name: str, *more: str, first: str = "", last: str = "") -> list[str]:
        dates = ["--from-date", first or self.first, "--to-date", last or self.last]
        return ["backfill", name, "--config", str(self.config), *dates, *more]

    def backfill(self, name: str, *more: str, first: str = "", last: str = "") -> Any:
        """Backfill in this process."""
        return CliRunner().invoke(app, self.argv(name, *more, first=first, last=last))

    def child(
        self,
        name: str,
        *more: str,
        first: str = "",
        last: str = "",
        fault: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> "subprocess.Popen[str]":
        """Backfill in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "couponflow.cli", *self.argv(name, *more, first=first, last=last)],
            env=os.environ | environment | ({faults.VARIABLE: fault} if fault else {}),
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def land(self) -> None:
        pipeline.land(load_config(self.config), lambda what, done, total: None)

    def take(self, other: "Lake", *names: str) -> None:
        """The same raw feeds, or other folders, as another lake."""
        for name in names:
            shutil.copytree(Path(other.root, name), Path(self.root, name))

    def hashes(self, spark: SparkSession) -> dict[str, str]:
        return {table: found for table, _, _, found in pipeline.content(self.root, spark)}

    def ranges(self, job: str) -> list[str]:
        """Dates of the finished runs of a job, oldest run first."""
        return [record.dates for record in runs.load_all(self.root, job) if record.status == "ok"]

    def num_records(self) -> int:
        return len(list(Path(self.root, "runs").rglob("*.json")))


def succeed(done: Any) -> str:
    assert done.exit_code == 0, done.output
    return str(done.output)


def build_scoring(lake: Lake) -> None:
    """A scoring day is a run of its own; a backfill builds again what exists."""
    argv = ["job", "build_examples", "--config", str(lake.config), "--campaign", "1", "--dates", "2024-01-12"]
    succeed(CliRunner().invoke(app, argv))


def clean_pass(lake: Lake) -> None:
    """One backfill of everything in one chunk per stage, its vocabulary built on the way."""
    done = lake.backfill("all", "--chunk-days", "60")
    assert done.exit_code == 3
    assert "blocked, no vocabulary; run `couponflow job build_vocabulary" in done.output
    dates = f"{lake.first}:{lake.last}"
    argv = ["job", "build_vocabulary", "--config", str(lake.config), "--dates", dates]
    succeed(CliRunner().invoke(app, argv))
    succeed(lake.backfill("all", "--chunk-days", "60"))
    build_scoring(lake)


class group:  # noqa: N801 - reads as a statement
    """Ends a process group whatever the test does, and shows that nobody of it is left."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self.child = child

    def __enter__(self) -> "subprocess.Popen[str]":
        return self.child

    def __exit__(self, *error: object) -> None:
        kill(self.child)


def kill(child: "subprocess.Popen[str]") -> None:
    """SIGKILL to Python, its JVM and the workers; returns when all are gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if child.poll() is not None:
            time.sleep(0.05)
    raise AssertionError(f"process group {child.pid} is still alive")


def tell(line: str) -> None:
    sys.stdout.write(f"\n{line}")
