"""The door to Delta: a write replaces its range, all of it and nothing else."""

import shutil
import threading
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from delta.exceptions import ConcurrentAppendException
from pyspark.sql import DataFrameWriter, SparkSession
from pyspark.sql import functions as F

from couponflow import pipeline
from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import CommitConflictError, ConfigError, ConflictError, DataError
from couponflow.lake import schemas, session, tables
from couponflow.sections import SparkConfig

TWO_DAYS = DateRange(D0, D0 + timedelta(days=2))


def order(order_id: str, day: int = 0, **over: Any) -> dict[str, Any]:
    return make_row("orders", order_id=order_id, ingest_date=D0 + timedelta(days=day), **over)


def ids(spark: SparkSession, root_uri: str, dates: DateRange | None = None) -> set[str]:
    return {row.order_id for row in tables.read(spark, root_uri, "orders", dates).collect()}


def test_overwrite_replaces_its_dates_all_and_only(spark: SparkSession, root_uri: str) -> None:
    rows = [order("a"), order("b"), order("c", day=1)]
    assert tables.overwrite(make_frame(spark, "orders", rows), root_uri, "orders", TWO_DAYS) == 3
    before = tables.content_hash(tables.read(spark, root_uri, "orders"))

    assert (
        tables.overwrite(make_frame(spark, "orders", [order("d")]), root_uri, "orders", DateRange.day(D0))
        == 1
    )
    assert ids(spark, root_uri) == {"d", "c"}
    assert ids(spark, root_uri, DateRange.day(D0)) == {"d"}

    empty = make_frame(spark, "orders", [])
    assert (
        tables.overwrite(empty, root_uri, "orders", DateRange.day(D0)) == 0
    )  # an empty frame empties the range
    assert ids(spark, root_uri) == {"c"}

    back = make_frame(spark, "orders", [order("b"), order("a")]).repartition(2)
    tables.overwrite(back, root_uri, "orders", DateRange.day(D0))
    assert (
        tables.content_hash(tables.read(spark, root_uri, "orders")) == before
    )  # order and files do not matter
    assert tables.read(spark, root_uri, "orders", version=1).count() == 3  # the old version stays readable
    assert tables.version(spark, root_uri, "orders") == 4
    assert pipeline.versions(root_uri, ("orders", "sends")) == {"orders": 4}


def test_refused_writes_leave_the_table_as_it_was(spark: SparkSession, root_uri: str) -> None:
    tables.overwrite(make_frame(spark, "orders", [order("a")]), root_uri, "orders", DateRange.day(D0))
    good = make_frame(spark, "orders", [order("b")])
    day = DateRange.day(D0)
    with pytest.raises(DataError, match="outside range"):
        tables.overwrite(make_frame(spark, "orders", [order("b", day=1)]), root_uri, "orders", day)
    with pytest.raises(DataError, match="column total_amount of table orders is not among"):
        tables.overwrite(good.drop("total_amount"), root_uri, "orders", day)
    with pytest.raises(DataError, match="expected double, found string"):
        tables.overwrite(good.withColumn("total_amount", F.lit("1")), root_uri, "orders", day)
    with pytest.raises(DataError, match=r"orders\.user_id is null in range 2024-01-10"):
        tables.overwrite(good.withColumn("user_id", F.lit(None).cast("string")), root_uri, "orders", day)
    with pytest.raises(ConfigError, match="needs a date range"):
        tables.overwrite(good, root_uri, "orders")
    with pytest.raises(ConfigError, match="cannot name a range"):
        tables.overwrite(good, root_uri, "orders", day, order_id="x' OR '1'='1")
    assert ids(spark, root_uri) == {"a"}


def test_reading_what_is_not_there(spark: SparkSession, root_uri: str) -> None:
    with pytest.raises(DataError, match="table orders cannot be read"):
        tables.read(spark, root_uri, "orders")
    with pytest.raises(ConfigError, match="unknown table 'nonsense'"):
        tables.read(spark, root_uri, "nonsense")


def test_a_table_of_other_code_is_refused(spark: SparkSession, root_uri: str) -> None:
    day = DateRange.day(D0)
    tables.overwrite(make_frame(spark, "orders", [order("a")]), root_uri, "orders", day)
    place = f"delta.`{tables.table_uri(root_uri, 'orders')}`"
    for change, found in (
        ("SET TBLPROPERTIES ('couponflow.schema_version' = '0')", "schema version 0"),
        ("UNSET TBLPROPERTIES ('couponflow.schema_version')", "schema version none"),
    ):
        spark.sql(f"ALTER TABLE {place} {change}")
        with pytest.raises(
            DataError, match=f"orders .* has {found}, this code knows {schemas.SCHEMA_VERSION};"
        ):
            tables.read(spark, root_uri, "orders")
        with pytest.raises(DataError, match=found):
            tables.overwrite(make_frame(spark, "orders", [order("b")]), root_uri, "orders", day)
    spark.sql(
        f"ALTER TABLE {place} SET TBLPROPERTIES ('couponflow.schema_version' = '{schemas.SCHEMA_VERSION}')"
    )
    assert ids(spark, root_uri) == {"a"}


def test_a_lost_answer_of_our_commit_is_success(
    spark: SparkSession, root_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = DateRange.day(D0)
    tables.overwrite(make_frame(spark, "orders", [order("a")]), root_uri, "orders", day)
    save = DataFrameWriter.save

    def lose_answer(writer: Any, path: str) -> None:
        save(writer, path)
        raise ConcurrentAppendException("against our own commit", "")

    def fail(writer: Any, path: str) -> None:
        raise ConcurrentAppendException("against another one", "")

    monkeypatch.setattr(DataFrameWriter, "save", lose_answer)
    frame = make_frame(spark, "orders", [order("b"), order("c")])
    assert tables.overwrite(frame, root_uri, "orders", day, "run-1") == 2
    monkeypatch.setattr(DataFrameWriter, "save", fail)
    with pytest.raises(ConflictError, match="run again"):
        tables.overwrite(
            frame, root_uri, "orders", day, "run-1"
        )  # the earlier commit of the run is not this one
    assert ids(spark, root_uri) == {"b", "c"}
    assert tables.version(spark, root_uri, "orders") == 2


def test_versions_that_are_not_there(spark: SparkSession, root_uri: str) -> None:
    tables.overwrite(make_frame(spark, "orders", [order("a")]), root_uri, "orders", DateRange.day(D0))
    with pytest.raises(DataError, match=r"table orders .* version 99"):
        tables.read(spark, root_uri, "orders", version=99)


@pytest.mark.parametrize("is_cut", [False, True], ids=["lost", "cut"])
def test_a_lost_or_cut_commit_is_a_damaged_log(
    spark: SparkSession, root_uri: str, tmp_path: Path, is_cut: bool
) -> None:
    """For a reader and for a writer, whom another attempt would not help."""
    spare, day = str(tmp_path / "spare"), DateRange.day(D0)
    for name in "ab":
        tables.overwrite(make_frame(spark, "orders", [order(name)]), spare, "orders", day)
    shutil.copytree(spare, root_uri)  # a place whose log this process has not seen
    log = Path(root_uri, "tables", "orders", "_delta_log")
    if is_cut:
        newest = max(log.glob("*.json"))
        newest.write_bytes(newest.read_bytes()[:100])
    else:
        (log / f"{1:020d}.json").unlink()
    with pytest.raises(DataError, match=r"orders.* (damaged|cannot be read)"):
        tables.overwrite(make_frame(spark, "orders", [order("c")]), root_uri, "orders", day)
    config = load_config(None, (f"lake.root_uri='{root_uri}'", "events.pseudonymise=false"))
    # Of a cut commit only an action may hear: Delta keeps a summary of each version beside it.
    with (
        pytest.raises(DataError, match=r"orders.* (damaged|cannot be read)"),
        record_run("monitor", config, day),
    ):
        tables.read(spark, root_uri, "orders").collect()


class Builder:
    """Notes what a session would be built with, and is that session."""

    def __init__(self) -> None:
        self.settings: dict[str, str] = {}
        self.builder = self.sparkContext = self

    def getConf(self) -> dict[str, str]:  # noqa: N802 - Spark's name
        return self.settings

    def config(self, name: str, value: str) -> "Builder":
        self.settings[name] = value
        return self

    def appName(self, name: str) -> "Builder":  # noqa: N802 - Spark's name
        return self.config("name", name)

    def master(self, name: str) -> "Builder":
        return self.config("master", name)

    def setLogLevel(self, level: str) -> None:  # noqa: N802 - Spark's name
        self.config("level", level)

    def getOrCreate(self) -> "Builder":  # noqa: N802 - Spark's name
        return self


@pytest.mark.parametrize("is_submitted", [True, False])
def test_a_cluster_keeps_its_own_settings(monkeypatch: pytest.MonkeyPatch, is_submitted: bool) -> None:
    monkeypatch.delenv("SPARK_ENV_LOADED", raising=False)  # a driver inside YARN has not got it
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    if is_submitted:
        monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "40000")
    monkeypatch.setattr(session, "SparkSession", Builder())
    made: Any = session.start(SparkConfig(master="local[3]", shuffle_partitions=5), "x")
    ours = {"master", "spark.driver.memory", "spark.sql.shuffle.partitions", "level"}
    assert ours & set(made.settings) == (set() if is_submitted else ours)
    assert made.settings["spark.sql.session.timeZone"] == "UTC"
    assert "DeltaSparkSessionExtension" in made.settings["spark.sql.extensions"]


def test_tables_are_created_as_declared(spark: SparkSession, root_uri: str, tmp_path: Path) -> None:
    tables.overwrite(make_frame(spark, "sends", []), root_uri, "sends", DateRange.day(D0))
    log = (tmp_path / "lake" / "tables" / "sends" / "_delta_log" / f"{0:020d}.json").read_text()
    assert '"delta.enableDeletionVectors":"false"' in log
    assert "pseudonymous user id" in log
    assert '"delta.dataSkippingStatsColumns"' in log
    assert "user_id" not in log.split('"delta.dataSkippingStatsColumns":"')[1].split('"')[0]


def test_petastorm_files_come_from_the_snapshot(spark: SparkSession, root_uri: str) -> None:
    rows = [make_row("training_examples", example_id=str(n), as_of_date=D0, split="train") for n in range(50)]
    frame = make_frame(spark, "training_examples", rows).coalesce(1)
    tables.overwrite(frame, root_uri, "training_examples", DateRange.day(D0), rows_per_file=8)
    tables.overwrite(frame.limit(20), root_uri, "training_examples", DateRange.day(D0), rows_per_file=8)
    files = tables.snapshot_files(tables.read(spark, root_uri, "training_examples"))
    assert sorted(files.values()) == [4, 8, 8]  # dead files of the first write are not among them


@pytest.mark.parametrize("same_day", [True, False])
def test_racing_writers(spark: SparkSession, root_uri: str, tmp_path: Path, same_day: bool) -> None:
    """Both writers hold their snapshot before either commits: each source waits for the other's marker."""
    tables.overwrite(make_frame(spark, "orders", []), root_uri, "orders", DateRange.day(D0))
    schema = tables.struct_type(schemas.TABLES["orders"].columns)
    folder = str(tmp_path)
    failures: list[Exception] = []  # of any kind: a thread must not fail unseen

    def write(name: str, day: date) -> None:
        def meet(batches: Any) -> Any:
            Path(folder, f"{name}.here").touch()
            deadline = time.monotonic() + 30
            while len(list(Path(folder).glob("*.here"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            yield from batches

        rows = [order(f"{name}{n}", day=(day - D0).days) for n in range(3)]
        frame = make_frame(spark, "orders", rows).coalesce(1).mapInPandas(meet, schema)
        try:
            tables.overwrite(frame, root_uri, "orders", DateRange.day(day), name)
        except Exception as error:
            failures.append(error)

    days = (D0, D0 if same_day else D0 + timedelta(days=1))
    threads = [threading.Thread(target=write, args=(name, day)) for name, day in zip("xy", days, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {name[0] for name in ids(spark, root_uri)}
    if same_day:  # exactly one wins, the other is told so: never a mix
        assert len(found) == 1
        assert [type(error) for error in failures] == [CommitConflictError]
        assert "run again" in str(failures[0])
    else:
        assert found == {"x", "y"}
        assert not failures
