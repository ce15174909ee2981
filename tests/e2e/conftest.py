"""A real object server for the tests of ``gs://``: fake-gcs-server, one per run, a fresh bucket per test."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from object_server import MISSING, find_server, make_bucket, reaching, running

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = find_server()
    if program is None:
        pytest.skip(MISSING)
    with running(program, tmp_path_factory.mktemp("gcs")) as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, as a ``gs://`` prefix."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    return make_bucket()


@pytest.fixture
def gs_spark(spark: "SparkSession", server: str, bucket: str) -> Iterator["SparkSession"]:
    """The shared session, which reaches the buckets of this test."""
    with reaching(spark, server):
        yield spark
