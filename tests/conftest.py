"""Shared fixtures: one Spark session per run, one lake folder per test."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import test_config
from chromium import MISSING, Chromium, find_program

from couponflow.config import Config
from couponflow.lake import python_tasks

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The one local Spark session: UTC, Delta; hundreds of tests share its heap."""
    from couponflow.lake import session
    from couponflow.sections import SparkConfig

    made = session.start(SparkConfig(driver_memory="6g", shuffle_partitions=2), "tests")
    # Small data and thousands of plans: to compile each of them, or to plan it anew after each of its
    # shuffles, would take longer than to run it. The end-to-end tests run the jobs as they are.
    made.conf.set("spark.sql.adaptive.enabled", "false")
    made.conf.set("spark.sql.codegen.wholeStage", "false")
    made.conf.set("spark.sql.codegen.factoryMode", "NO_CODEGEN")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One headless browser for the tests of a module, which are skipped where none is installed."""
    program = find_program()
    if program is None:
        pytest.skip(MISSING)
    with Chromium(program, tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(autouse=True)
def _frames_are_forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """The shared JVM keeps no plan of a frame that a test has left in a cycle."""
    yield
    if request.path.parent.name == "unit":
        return  # no frames there, and a collection takes longer than most of those tests
    gc.collect()
    python_tasks.settle()  # what packages have made is not looked through after every test


@pytest.fixture(autouse=True, scope="module")
def _logs_are_forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """The shared JVM keeps no log of a table of a module's lakes: a hundred lakes would fill its heap."""
    yield
    session = None if request.path.parent.name == "unit" else _running_session()
    if session is not None and session._jvm is not None:
        session._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()


def _running_session() -> "SparkSession | None":
    """The session that is running, without starting one for a test that needs none."""
    if (module := sys.modules.get("pyspark.sql")) is None:
        return None
    found: SparkSession | None = module.SparkSession.getActiveSession()
    return found


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Config of a small lake in a folder of this test."""
    return test_config(tmp_path)


@pytest.fixture
def root_uri(config: Config) -> str:
    """Root of this test's lake."""
    return config.lake.root_uri
