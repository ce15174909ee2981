"""Shared fixtures: one Spark session per run, one lake folder per test."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import test_config

from couponflow.config import Config


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The one local Spark session: UTC, Delta; hundreds of tests share its heap."""
    from couponflow.lake import tables
    from couponflow.sections import SparkConfig

    session = tables.spark_session(SparkConfig(driver_memory="3g"), "tests")
    yield session
    session.stop()


@pytest.fixture(autouse=True)
def _frames_are_forgotten() -> Iterator[None]:
    """A frame in a reference cycle would keep its plan and broadcasts in the JVM until some later test."""
    yield
    gc.collect()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Config of a small lake in a folder of this test."""
    return test_config(tmp_path)


@pytest.fixture
def root_uri(config: Config) -> str:
    """Root of this test's lake."""
    return config.lake.root_uri
