"""One master and two workers of Spark as processes of their own: what submitted jobs need reaches them.

No process of this cluster can import the package but from the zip that is submitted.
"""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyspark
import pytest
import small_shop
import torch
from builders import D0, make_frame, make_row
from object_server import free_port
from packed_users import packed_users
from pyspark.sql import SparkSession

from couponflow import pipeline
from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import layouts, runs, tables
from couponflow.modelling import ModelConfig
from couponflow.models.batch import RANDOM_SIZES
from couponflow.models.bundle import Bundle, save_bundle
from couponflow.models.calibration import Calibrator
from couponflow.models.dien import Dien
from couponflow.training import registry
from jobs import score

HOME = Path(__file__).parents[2]
SPARK = Path(pyspark.__file__).parent
SECONDS = 1_800  # a bound for what hangs, on a machine that does other work too


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file beside a lake with 60 users to score and a registered network."""
    folder = tmp_path_factory.mktemp("standalone")
    root = str(folder / "lake")
    (folder / "test.toml").write_text(f"[lake]\nroot_uri = '{root}'\n[scoring]\npart_users = 25\n")
    users, dates = packed_users(60), DateRange.day(D0)
    ids = [make_row("users", user_id=user["user_id"], snapshot_date=D0) for user in users]
    tables.overwrite(make_frame(spark, "users", ids), root, "users", dates, "prepared")
    over = {"vocabulary_version": "v1", "as_of_date": D0}
    rows = [make_row("scoring_examples", **user, **over) for user in users]
    tables.overwrite(make_frame(spark, "scoring_examples", rows), root, "scoring_examples", dates, "prepared")
    torch.manual_seed(0)
    network = Dien(ModelConfig(hidden_dim=8), dict(RANDOM_SIZES), len(layouts.WIDE_FEATURES))
    calibrator = Calibrator("platt", slope=0.8, intercept=-1.0)
    save_bundle(Bundle(network.eval(), "v1", dict(RANDOM_SIZES), calibrator=calibrator), folder / "bundle")
    registry.register(root, folder / "bundle", "prepared")
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the environment's packages, but for those that are only pointed to: ours."""
    path = tmp_path_factory.mktemp("python") / "python"
    packages = site.getsitepackages()[0]
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{packages}" exec {sys.executable} -S "$@"\n', encoding="utf-8"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def cluster(python: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a master with two registered workers of one core each."""
    host, port = "127.0.0.1", free_port()
    address = f"spark://{host}:{port}"
    place = ["--host", host, "--webui-port", str(free_port())]
    worker = [*place, "--cores", "1", "--memory", "1g", "--work-dir", str(tmp_path / "work"), address]
    launched = {
        "master": ["org.apache.spark.deploy.master.Master", *place, "--port", str(port)],
        "worker-1": ["org.apache.spark.deploy.worker.Worker", *worker],
        "worker-2": ["org.apache.spark.deploy.worker.Worker", *worker],
    }
    with ExitStack() as stack:
        for name, command in launched.items():
            # To a file: nobody drains a pipe.
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            full = [str(SPARK / "bin" / "spark-class"), *command]
            process = subprocess.Popen(full, env=_environment(python), stdout=log, stderr=log)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        yield address


def _environment(python: Path) -> dict[str, str]:
    """Nothing of this process' own path: the cluster must not find the package on it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYSPARK"))}
    return kept | {
        "PYSPARK_PYTHON": str(python),
        "SPARK_HOME": str(SPARK),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "256m",
    }


def _package(path: Path) -> Path:
    """The zip that a release holds: the package and its jobs."""
    with zipfile.ZipFile(path, "w") as archive:
        for base, folder in ((HOME / "lib", "couponflow"), (HOME, "jobs")):
            for file in sorted((base / folder).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    archive.write(file, file.relative_to(base))
    return path


def submit(folder: Path, cluster: str, python: Path, program: Path, *arguments: str) -> None:
    """One application by spark-submit, which has to end with 0; ``folder`` gets what is sent."""
    jar = next(SPARK.glob("jars/delta-storage-*.jar"))
    # Under another name than the one that lies beside Spark's own.
    sent = shutil.copyfile(jar, folder / "sent.jar")
    command = [str(SPARK / "bin" / "spark-submit"), "--master", cluster, "--deploy-mode", "client"]
    command += ["--py-files", str(_package(folder / "couponflow.zip")), "--jars", str(sent)]
    command += ["--conf", "spark.executor.memory=512m", "--conf", "spark.sql.shuffle.partitions=2"]
    command += ["--conf", "spark.scheduler.minRegisteredResourcesRatio=1.0", "--conf", "spark.cores.max=2"]
    # The defaults are for tables of many files: 50 tasks to read a log of three.
    command += ["--conf", "spark.databricks.delta.snapshotPartitions=2", str(program), *arguments]
    done = subprocess.run(
        command, env=_environment(python), cwd=folder, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_submitted_job_takes_package_bundle_and_jars_to_other_processes(
    spark: SparkSession, lake: Path, cluster: str, python: Path, tmp_path: Path
) -> None:
    alone = subprocess.run([python, "-c", "import couponflow"], env=_environment(python), capture_output=True)
    assert b"No module named 'couponflow'" in alone.stderr
    expected = tmp_path / "expected"
    shutil.copytree(lake, expected)
    config = load_config(lake / "test.toml", (f"lake.root_uri='{expected / 'lake'}'", "scoring.model='dien'"))
    with record_run("score", config, DateRange.day(D0), "18") as job:
        score.run(spark, job)
    job_file = shutil.copyfile(HOME / "jobs" / "score.py", tmp_path / "score.py")
    arguments = ["--config", str(lake / "test.toml"), "--dates", str(D0)]
    submit(tmp_path, cluster, python, job_file, *arguments, "--campaign", "18", "--model", "dien")
    (record,) = runs.load_all(str(lake / "lake"), "score")
    assert (record.status, record.rows) == ("ok", {"predictions": 60})
    executors = sorted(tmp_path.glob("work/app-*/*"))
    assert len(executors) == 2
    for executor in executors:
        names = {path.name for path in executor.iterdir()}
        assert {"couponflow.zip", "sent.jar"} <= names
    assert [path for executor in executors for path in executor.glob("bundle-*.tar")]
    hashes = [
        tables.content_hash(tables.read(spark, str(folder / "lake"), "predictions"))
        for folder in (lake, expected)
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.nightly
def test_the_whole_job_on_other_processes_leaves_what_it_leaves_in_one(
    spark: SparkSession, cluster: str, python: Path, tmp_path: Path
) -> None:
    """Landing to hand-over, the ranks of the training as tasks of the two workers."""
    configs = {}
    for name in ("local", "cluster"):
        (tmp_path / name).mkdir()
        configs[name] = small_shop.write_config(tmp_path / name, str(tmp_path / name))
    local = load_config(configs["local"])
    pipeline.execute(local, pipeline.plan(local), lambda: spark, pipeline.Progress())
    program = tmp_path / "run.py"
    program.write_text("from couponflow.cli import app\n\napp()\n", encoding="utf-8")
    arguments = ["run", "--config", str(configs["cluster"]), "--set", "training.launcher=spark"]
    submit(tmp_path, cluster, python, program, *arguments)
    found = small_shop.content(load_config(configs["cluster"]), spark)
    assert found == small_shop.content(local, spark)
    assert all(rows for table, (rows, _) in found.items() if table != "verdicts"), found
    assert len(list(tmp_path.glob("work/app-*/*"))) == 2
