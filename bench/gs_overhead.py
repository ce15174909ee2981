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
from unittest.mock import patch

import object_server
import small_shop
from pyspark.sql import SparkSession

from bench.run import Claim
from couponflow import pipeline
from couponflow.config import Config, load_config
from couponflow.lake import session
from couponflow.sections import SparkConfig

CLAIMS = ("gs_overhead",)
RUNS = 2


def _run(spark: SparkSession, folder: Path, root: str) -> tuple[float, dict[str, tuple[int, str]]]:
    """Seconds of one run of every stage, and the content of all tables."""
    config: Config = load_config(small_shop.write_config(folder, root))
    start = time.perf_counter()
    pipeline.execute(config, pipeline.plan(config), lambda: spark, pipeline.Progress())
    seconds = time.perf_counter() - start
    return seconds, small_shop.content(config, spark)


def measure(names: tuple[str, ...]) -> list[Claim]:
    """Runs on both in turns, after one of each as a warm-up; nothing where there is no server."""
    program = object_server.find_server()
    if program is None:
        sys.stderr.write(f"gs_overhead is not measured: {object_server.MISSING}\n")
        return []
    spark = session.start(SparkConfig(shuffle_partitions=2), "bench")
    ratios = []
    with (
        tempfile.TemporaryDirectory() as folder,
        object_server.running(program, Path(folder)) as url,
        patch.dict(os.environ, STORAGE_EMULATOR_HOST=url),
        object_server.reaching(spark, url),
    ):
        for number in range(RUNS + 1):
            local, expected = _run(spark, Path(folder), f"{folder}/{number}")
            remote, found = _run(spark, Path(folder), object_server.make_bucket())
            assert found == expected, "the tables on gs:// hold other rows than those on local files"
            ratios.append(remote / local)
            sys.stderr.write(f"gs_overhead: {local:.0f} s locally, {remote:.0f} s on gs://\n")
    value = statistics.median(ratios[1:])
    return [Claim(names[0], value, "x its time", None, RUNS, "the same run on local files", "at_most")]
