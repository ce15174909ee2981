"""The whole pipeline with everything on ``gs://``, against the same on local files.

A synthetic shop of 150 users and 25 days, from landing to hand-over, on a fresh root each time, in turns in
one warm session. The store is a local server on the same cores (fake-gcs-server): it has no network and a
cost of its own, so the figure says what the code asks of a store, not what Cloud Storage answers. Nearly all
objects are small here, which is the worst case. Both must hold the same rows.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import object_server
from pyspark.sql import SparkSession

from bench.run import Claim
from couponflow import pipeline
from couponflow.config import Config, load_config
from couponflow.lake import session, tables
from couponflow.sections import SparkConfig

CLAIMS = ("gs_overhead",)
RUNS = 2
CONFIG = """
[lake]
root_uri = "{root}/lake"
time_zone = "America/New_York"
[events]
pseudonymise = false
[training]
max_epochs = 1
[evaluation]
num_draws = 50
[export]
target_uri = "{root}/export"
auto_approve = true
"""


def _run(spark: SparkSession, folder: Path, root: str) -> tuple[float, dict[str, str]]:
    """Seconds of one run of every stage, and the content of the tables that name neither run nor bundle."""
    path = folder / "config.toml"
    path.write_text(CONFIG.format(root=root) + object_server.SMALL_SHOP, encoding="utf-8")
    config: Config = load_config(path)
    start = time.perf_counter()
    pipeline.execute(config, pipeline.plan(config), lambda: spark, pipeline.Progress())
    seconds = time.perf_counter() - start
    unnamed = ("events", "sessions", "conversions", "training_examples", "scoring_examples")
    hashes = {name: tables.content_hash(tables.read(spark, config.lake.root_uri, name)) for name in unnamed}
    return seconds, hashes


def measure(names: tuple[str, ...]) -> list[Claim]:
    """Runs on both in turns, after one of each as a warm-up; nothing where there is no server."""
    program = object_server.find_server()
    if program is None:
        sys.stderr.write(f"gs_overhead is not measured: {object_server.MISSING}\n")
        return []
    spark = session.start(SparkConfig(shuffle_partitions=2), "bench")
    ratios = []
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    with tempfile.TemporaryDirectory() as folder, object_server.running(program, Path(folder)) as url:
        os.environ["STORAGE_EMULATOR_HOST"] = url
        try:
            with object_server.reaching(spark, url):
                for number in range(RUNS + 1):
                    local, expected = _run(spark, Path(folder), f"{folder}/{number}")
                    remote, found = _run(spark, Path(folder), object_server.make_bucket())
                    assert found == expected, "the tables on gs:// hold other rows than those on local files"
                    ratios.append(remote / local)
                    sys.stderr.write(f"gs_overhead: {local:.0f} s locally, {remote:.0f} s on gs://\n")
        finally:
            if before is None:
                del os.environ["STORAGE_EMULATOR_HOST"]
            else:
                os.environ["STORAGE_EMULATOR_HOST"] = before
    value = statistics.median(ratios[1:])
    return [Claim(names[0], value, "x its time", None, RUNS, "the same run on local files", "at_most")]
