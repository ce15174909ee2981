"""Ranks as tasks of two real executors: the numbers of local ranks, their errors, and no wait without end.

Run as a script, this file is a small application that starts ranks of its own; its module is also what they
run.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_jobs import SECONDS, curves, run_job, survivors, trained
from training_lake import make_lake

from couponflow.errors import CouponflowError, DataError
from couponflow.lake import runs, session
from couponflow.sections import SparkConfig
from couponflow.training import spark_launch
from couponflow.training.workers import Workers

MASTER = "local-cluster[2,1,1024]"
ON_SPARK = ("training.launcher=spark", f"spark.master={MASTER}")
#: What a standalone worker, which the cluster on one machine has two of, finds as its GPUs.
GPUS = '#!/bin/sh\necho \'{"name": "gpu", "addresses": ["5"]}\'\n'


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The facts of a run on two local ranks that nothing disturbed."""
    config, root = make_lake(tmp_path_factory.mktemp("whole"))
    assert run_job(config)[0] == 0
    return trained(root)


def are_gone(root: str) -> bool:
    """Executors end a moment after their application."""
    deadline = time.monotonic() + 60
    while survivors(root) and time.monotonic() < deadline:
        time.sleep(0.2)
    return survivors(root) == []


def test_ranks_on_spark_learn_what_local_ranks_learn(tmp_path: Path, whole: dict[str, Any]) -> None:
    """The version is a digest of weights and calibrator."""
    config, root = make_lake(tmp_path)
    code, line = run_job(config, *ON_SPARK)
    assert code == 0, line
    found = trained(root)
    assert found["num_ranks"] == 2
    assert found["epochs"] == whole["epochs"]
    assert found["model_version"] == whole["model_version"]
    assert not list(Path(root, "work").iterdir())  # published runs leave nothing behind


def test_a_run_whose_rank_is_killed_ends_and_the_next_goes_on(tmp_path: Path, whole: dict[str, Any]) -> None:
    """The next may have another launcher: checkpoints know ranks, not how they were started."""
    config, root = make_lake(tmp_path)
    code, line = run_job(config, *ON_SPARK, fault="train@1-2-2:step:kill")
    assert code == 5, line
    # What a rank did in the two seconds before it was killed or stopped need not be known.
    assert re.search(
        r"rank 1 ended (with code 137 )?without a word (at|before) .*; run again: training res", line
    )
    assert are_gone(root)
    assert [record.status for record in runs.load_all(root, "train")] == ["failed"]
    (folder,) = Path(root, "work").glob("checkpoints-dien-*")
    assert len(list(folder.glob("*.pt"))) == 2
    code, line = run_job(config)
    assert code == 0, line
    assert curves(trained(root)) == pytest.approx(curves(whole), abs=1e-6)


@pytest.mark.nightly  # minutes; a rank that hangs is named below
def test_a_rank_that_stops_is_named_and_takes_all_down(tmp_path: Path) -> None:
    config, root = make_lake(tmp_path)
    begun = time.monotonic()
    code, line = run_job(config, *ON_SPARK, "training.stall_seconds=45", fault="train@1-2-2:load:stop")
    assert code == 5, line
    assert re.search(
        r"rank 1 made no progress for [45]\d s (at|before) .* and all ranks were killed", line
    ), line
    assert time.monotonic() - begun < SECONDS / 2
    assert are_gone(root)


def test_fewer_slots_than_ranks_are_refused(tmp_path: Path) -> None:
    config, _ = make_lake(tmp_path)
    code, line = run_job(config, "training.launcher=spark", "spark.master=local[1]")
    assert code == 2
    assert "training.num_ranks = 2: Spark has slots for 1, each of 1 cores and 0 GPUs; lower it, or" in line


def run_application(folder: Path, *settings: str) -> dict[str, Any]:
    """What the application of this file found; Spark gets the settings."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            "PYSPARK_SUBMIT_ARGS": " ".join([*(f"--conf {one}" for one in settings), "pyspark-shell"]),
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_a_rank_takes_the_gpu_of_its_task_and_its_silence_or_error_comes_back(tmp_path: Path) -> None:
    """Both workers are on this machine and count their GPUs alike, as two machines would."""
    script = tmp_path / "gpus.sh"
    script.write_text(GPUS)
    script.chmod(0o755)
    amounts = [f"spark.{whose}.resource.gpu.amount=1" for whose in ("worker", "executor", "task")]
    scripts = [f"spark.{whose}.resource.gpu.discoveryScript={script}" for whose in ("worker", "executor")]
    found = run_application(tmp_path, *amounts, *scripts)
    assert found["ranks"] == [[0, 2, 5], [1, 2, 5]]
    assert found["hung"].startswith("InfraError: rank 1 made no progress for 1")
    assert "s at epoch 2, step 7 (last phase: load) and all ranks were killed; run again" in found["hung"]
    assert found["class"] == "DataError"
    assert found["message"] == "rank 1: its shard is damaged; restore it"
    assert found["refused"].startswith(
        "training.num_ranks = 3: Spark has slots for 2, each of 1 cores and 1 GPUs"
    )


def rank(uri: str, place: str) -> None:
    """Rank 1 hangs or fails at a place while the other waits for it."""

    def work(workers: Workers) -> None:
        workers.beat("load", 1, 1)
        if place == "load" and workers.rank:
            raise DataError("its shard is damaged; restore it")
        if place == "hang" and workers.rank:
            workers.beat("load", 2, 7)
            time.sleep(SECONDS)
        own = [workers.rank, workers.size, -1 if workers.gpu is None else workers.gpu]
        rows = workers.gather(own).reshape(workers.size, -1)
        Path(uri, "ranks.json").write_text(json.dumps(rows.astype(int).tolist()))

    spark_launch.run_rank(uri, work)


def application(folder: Path) -> dict[str, Any]:
    """Start ranks that succeed, ranks of which one hangs or fails, and more than there are slots."""
    spark = session.start(SparkConfig(master=MASTER, driver_memory="1g"), "ranks")
    target, uri = f"{Path(__file__).stem}:rank", str(folder)
    spark_launch.run(spark, 2, target, (uri, ""), uri, 240)
    found: dict[str, Any] = {"ranks": json.loads((folder / "ranks.json").read_text())}
    try:
        spark_launch.run(spark, 2, target, (uri, "hang"), uri, 240, stall_seconds=10)
    except CouponflowError as error:
        found["hung"] = f"{type(error).__name__}: {error}"
    try:
        spark_launch.run(spark, 2, target, (uri, "load"), uri, 240)
    except CouponflowError as error:
        found |= {"class": type(error).__name__, "message": str(error)}
    try:
        spark_launch.check_slots(spark, 3, 0)
    except CouponflowError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    Path(sys.argv[1], "found.json").write_text(json.dumps(application(Path(sys.argv[1]))))
