"""Workers, executors and attempts that die or double: the rows are those of a quiet run, or exit code 5.

Each case is a job in a process of its own over one prepared lake; ``local[2,4]`` retries a task, ``local[2]``
never does, ``local-cluster`` has executors that can be lost.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_event, make_frame
from pyspark.sql import SparkSession

from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import tables
from jobs import sessionize

DATES = "2024-01-10"
CONFIG = """
[lake]
root_uri = "{root}"
[events]
pseudonymise = false
"""


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with events of 40 users and no sessions yet."""
    folder = tmp_path_factory.mktemp("quiet")
    rows = [make_event(f"u{n % 40}", minute=7 * n) for n in range(200)]
    events = make_frame(spark, "events", rows)
    root, dates = str(folder / "lake"), DateRange.parse(DATES)
    tables.overwrite(events, root, "events", dates, "prepared")
    days = make_frame(spark, "user_days", [])
    tables.overwrite(days, root, "user_days", dates, "prepared")
    return folder / "lake"


@pytest.fixture(scope="module")
def expected(spark: SparkSession, lake: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Content hashes after a run without a fault, over a copy of the lake."""
    root = tmp_path_factory.mktemp("expected") / "lake"
    shutil.copytree(lake, root)
    with record_run("sessionize", _config(root), DateRange.parse(DATES)) as job:
        sessionize.run(spark, job)
    return _hashes(spark, root)


def _config(root: Path) -> Config:
    file = root.parent / "config.toml"
    file.write_text(CONFIG.format(root=root))
    return load_config(file)


def _hashes(spark: SparkSession, root: Path) -> dict[str, str]:
    names = ("session_segments", "sessions")
    return {name: tables.content_hash(tables.read(spark, str(root), name)) for name in names}


def _child(root: Path, fault: str, master: str, *settings: str) -> subprocess.CompletedProcess[str]:
    _config(root)
    command = [sys.executable, "-m", "couponflow.cli", "job", "sessionize", "--dates", DATES]
    command += ["--config", str(root.parent / "config.toml"), "--set", f"spark.master={master}"]
    conf = " ".join(f"--conf {setting}" for setting in settings)
    home = Path(__file__).parents[2]
    added = {
        "COUPONFLOW_FAULT": fault,
        "PYSPARK_SUBMIT_ARGS": f"{conf} pyspark-shell",
        "PYTHONPATH": os.pathsep.join([str(home / "lib"), str(home)]),
    }
    return subprocess.run(command, env=os.environ | added, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("action", "master", "settings"),
    [
        ("kill_worker", "local[2,4]", ()),
        ("kill_executor", "local-cluster[2,1,1024]", ()),
        pytest.param(
            "end_executor",
            "local-cluster[2,1,1024]",
            ("spark.decommission.enabled=true",),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "sleep",
            "local-cluster[2,1,1024]",
            ("spark.speculation=true", "spark.speculation.quantile=0.1"),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_what_is_retried_changes_no_row(
    action: str,
    master: str,
    settings: tuple[str, ...],
    spark: SparkSession,
    lake: Path,
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    root = tmp_path / "lake"
    shutil.copytree(lake, root)
    done = _child(root, f"session_segments:during_write:{action}", master, *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(root.glob(".fault-*")), "the fault did not fire"
    assert _hashes(spark, root) == expected


def test_without_retries_a_lost_worker_ends_with_code_5_and_a_rerun_mends(
    spark: SparkSession, lake: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    root = tmp_path / "lake"
    shutil.copytree(lake, root)
    fault = "session_segments:during_write:kill_worker"
    done = _child(root, fault, "local[2]")
    assert done.returncode == 5, done.stderr[-2000:]
    assert "session_segments" in done.stderr
    assert "run again" in done.stderr
    assert _child(root, fault, "local[2]").returncode == 0
    assert _hashes(spark, root) == expected
