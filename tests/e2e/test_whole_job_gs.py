"""The whole job with everything on ``gs://``: every table holds what the same run on local files leaves.

Spark and Delta go through the Cloud Storage connector, objects through the storage library, training on two
Horovod ranks through Petastorm; the store is a real server.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_shop
from object_server import make_bucket, reaching
from pyspark.sql import SparkSession

from couponflow import pipeline
from couponflow.campaign import overview
from couponflow.config import Config, load_config
from couponflow.lake import leases, schemas, storage


class Shop:
    """One finished run under a root, and what it left."""

    def __init__(self, root: str, folder: Path, spark: SparkSession) -> None:
        self.root, self.spark = root, spark
        self.config = load_config(small_shop.write_config(folder, root))
        self.outcomes = self.execute()

    def execute(self) -> list[pipeline.Outcome]:
        config: Config = self.config
        return pipeline.execute(config, pipeline.plan(config), lambda: self.spark, pipeline.Progress())

    def exported(self) -> bytes:
        (facts,) = [one.record.facts for one in self.outcomes if one.stage.job == "export_audience"]
        return storage.read_bytes(storage.join(facts["folder"], "audience.csv"))


@pytest.fixture(scope="module")
def local(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("local")
    return Shop(str(folder), folder, spark)


@pytest.fixture(scope="module")
def remote(spark: SparkSession, server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with pytest.MonkeyPatch.context() as patch, reaching(spark, server):
        patch.setenv("STORAGE_EMULATOR_HOST", server)
        yield Shop(make_bucket(), tmp_path_factory.mktemp("remote"), spark)


def test_every_table_holds_what_it_holds_on_local_files(remote: Shop, local: Shop) -> None:
    expected = small_shop.content(local.config, local.spark)
    assert small_shop.content(remote.config, remote.spark) == expected
    only_by_merge = {"history_states"}
    assert set(expected) == set(schemas.TABLES) - only_by_merge
    assert all(rows for table, (rows, _) in expected.items() if table != "verdicts"), expected


def test_the_list_handed_over_is_the_same(remote: Shop, local: Shop) -> None:
    content = remote.exported()
    assert content == local.exported()
    assert len(list(csv.DictReader(io.StringIO(content.decode())))) > 10


def test_the_ranks_read_the_lake_on_gs(remote: Shop) -> None:
    facts = next(one.record.facts for one in remote.outcomes if one.stage.name == "train dien")
    assert facts["num_ranks"] == 2
    dataset = storage.read_bytes(
        storage.join(remote.config.lake.root_uri, "datasets", "training_examples.json")
    )
    assert f'"{remote.root}/lake/tables/training_examples/'.encode() in dataset


def test_the_report_lies_on_the_lake(remote: Shop) -> None:
    records = {outcome.stage.name: outcome.record for outcome in remote.outcomes}
    (uri,) = overview.write_reports(remote.config, records, set(), remote.spark)
    assert uri == f"{remote.root}/lake/reports/campaign-3.html"
    mailed = records["select_audience campaign 3"].facts["mailed_users"]
    assert f"{mailed:,}" in storage.read_bytes(uri).decode()


def test_a_second_run_skips_every_stage_and_nothing_is_held(remote: Shop) -> None:
    assert [outcome.stage.name for outcome in remote.execute() if not outcome.is_skipped] == []
    assert leases.claims(remote.config.lake.root_uri) == []
