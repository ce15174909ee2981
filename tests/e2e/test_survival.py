"""Ranks that are killed, stopped or refused: message, exit code, and a rerun that ends as if nothing was.

Each case trains on two real Gloo ranks (or one process), is hit by ``COUPONFLOW_FAULT`` and started again.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_jobs import JOB, SECONDS, arguments, curves, run_job, survivors, trained
from training_lake import make_lake
from typer.testing import CliRunner

from couponflow.lake import faults, runs
from jobs import train

SHORT_STALL = "training.stall_seconds=45"  # no part of a run's identity; a slow machine needs some of it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The facts of a run on two ranks that nothing disturbed."""
    config, root = make_lake(tmp_path_factory.mktemp("whole"))
    code, line = run_job(config)
    assert code == 0, line
    facts = trained(root)
    assert len(facts["epochs"]) == facts["num_ranks"] == 2
    assert len(facts["epochs"][0]["train_loss_by_rank"]) == 2
    return facts


KILLED = "ended (with code (137|-9) )?without a word"
CASES = [
    ("train@0-2-0:checkpoint:kill", rf"rank 0 {KILLED} at epoch 2, step 0 \(last phase: checkpoint\)"),
    ("train@1-2-2:load:stop", r"rank 1 made no progress for 4\d s at epoch 2, step 2 \(last phase: load\)"),
]
MORE = [
    ("train@1-1-4:step:kill", rf"rank 1 {KILLED} at epoch 1, step 4 \(last phase: step\)"),
    ("train@0-1-0:load:kill", rf"rank 0 {KILLED} at epoch 1, step 0"),
    ("train@1-1-0:load:kill", rf"rank 1 {KILLED} at epoch 1, step 0"),
    ("train@0-1-3:step:kill", rf"rank 0 {KILLED} at epoch 1, step 3"),
    ("train@0-1-2:checkpoint:kill", rf"rank 0 {KILLED} at epoch 1, step 2 \(last phase: checkpoint\)"),
    ("train@1-1-0:validate:kill", rf"rank 1 {KILLED} at epoch 1, step 0 \(last phase: validate\)"),
    ("train@0-2-3:step:stop", r"rank 0 made no progress for 4\d s at epoch 2, step 3"),
    ("train@0-1-4:checkpoint:enospc", r"\[Errno 28\] No space left on device"),
    ("train@1-2-1:step:exc", "rank 1: fault .* an error on purpose; run again"),
]


@pytest.mark.parametrize(
    ("fault", "message"), [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in MORE)]
)
def test_a_run_that_was_hit_goes_on_and_ends_as_if_nothing_had_been(
    tmp_path: Path, whole: dict[str, Any], fault: str, message: str
) -> None:
    config, root = make_lake(tmp_path)
    code, line = run_job(config, *([SHORT_STALL] if fault.endswith(":stop") else []), fault=fault)
    assert code == 5, line
    assert re.search(message, line), line
    assert survivors(root) == []
    assert [record.status for record in runs.load_all(root, "train")] == ["failed"]
    code, line = run_job(config)
    assert code == 0, line
    found = trained(root)
    assert curves(found) == pytest.approx(curves(whole), abs=1e-5)
    assert found["best_epoch"] == whole["best_epoch"]
    left = [path.name for path in Path(root, "work").iterdir()]
    assert not [name for name in left if name.startswith("checkpoints")]


def test_one_process_resumes_bit_for_bit_and_other_ranks_or_damage_are_refused(tmp_path: Path) -> None:
    """The bundle's version is a digest of its weights and calibrator."""
    alone = "training.num_ranks=1"
    config, root = make_lake(tmp_path / "whole")
    assert run_job(config, alone)[0] == 0
    whole = trained(root)
    config, root = make_lake(tmp_path / "hit")
    assert run_job(config, alone, fault="train@0-2-3:step:kill")[0] == -signal.SIGKILL
    (folder,) = Path(root, "work").glob("checkpoints-dien-*")
    contents = {path: path.read_bytes() for path in sorted(folder.glob("*.pt"))}
    assert len(contents) == 2
    code, line = run_job(config)
    assert code == 2
    assert "is of 1 ranks and this run has 2: set training.num_ranks = 1 to resume" in line
    for path, content in contents.items():
        path.write_bytes(content[:-100])
    code, line = run_job(config, alone)
    assert code == 3
    assert "none of the 2 checkpoints" in line
    assert "--from-scratch" in line
    older, _ = contents
    older.write_bytes(contents[older])  # the newest is cut: the one before it serves
    assert run_job(config, alone)[0] == 0
    assert trained(root)["model_version"] == whole["model_version"]
    assert trained(root)["epochs"] == whole["epochs"]
    assert not folder.exists()


@pytest.mark.nightly
def test_from_scratch_leaves_damaged_checkpoints(tmp_path: Path, whole: dict[str, Any]) -> None:
    config, root = make_lake(tmp_path)
    assert run_job(config, fault="train@0-2-1:step:kill")[0] == 5
    (folder,) = Path(root, "work").glob("checkpoints-dien-*")
    for path in folder.glob("*.pt"):
        path.write_bytes(b"")
    assert run_job(config)[0] == 3
    assert run_job(config, options=("--from-scratch",))[0] == 0
    assert curves(trained(root)) == pytest.approx(curves(whole), abs=1e-5)


@pytest.mark.nightly
def test_ranks_end_when_the_job_that_started_them_is_killed(tmp_path: Path, whole: dict[str, Any]) -> None:
    config, root = make_lake(tmp_path)
    fault = {faults.VARIABLE: "train@0-1-2:checkpoint:sleep"}
    job = subprocess.Popen(
        [sys.executable, str(JOB), *arguments(config)], env=os.environ | fault, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + SECONDS
    while not list(Path(root).glob(".fault-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    job.kill()
    job.wait()
    while survivors(root) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert survivors(root) == []
    assert run_job(config)[0] == 0
    assert curves(trained(root)) == pytest.approx(curves(whole), abs=1e-5)


def test_fewer_row_groups_than_ranks_are_refused_before_any_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.fitting.launch, "run", lambda *given: pytest.fail("ranks were started"))
    config, _ = make_lake(tmp_path)
    done = CliRunner().invoke(train.app, arguments(config, "training.num_ranks=4"))
    assert done.exit_code == 2
    assert "has 3 row groups, need >= 4 for 4 ranks" in done.output
