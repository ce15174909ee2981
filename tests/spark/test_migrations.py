"""Tables that were written under an older schema version: refused, and brought up without writing a row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import SparkSession

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import DataError
from couponflow.lake import migrations, runs, schemas, tables
from jobs import maintain

DAY = DateRange.day(D0)
Written = Callable[[int], None]


@contextmanager
def code_of(version: int, *lacking: str) -> Iterator[None]:
    """Declarations as they were then: the ledger without the columns that came later."""
    with pytest.MonkeyPatch.context() as patch:
        ledger = schemas.TABLES["assignments"]
        columns = tuple(column for column in ledger.columns if column.name not in lacking)
        patch.setattr(schemas, "SCHEMA_VERSION", version)
        patch.setitem(schemas.TABLES, "assignments", replace(ledger, columns=columns))
        yield


@pytest.fixture
def written(spark: SparkSession, root_uri: str) -> Written:
    """Two tables of one lake, as the code of a version has laid them out."""

    def write(version: int) -> None:
        with code_of(version, "coupon_id"):
            rows = [make_row("assignments", campaign_id="18", version="1", user_id=f"u{n}") for n in range(3)]
            frame = make_frame(spark, "assignments", rows)
            tables.overwrite(frame, root_uri, "assignments", campaign_id="18")
            days = make_frame(spark, "user_days", [make_row("user_days", event_date=D0)])
            tables.overwrite(days, root_uri, "user_days", DAY)

    return write


def data_files(root_uri: str) -> dict[str, int]:
    files = (path for path in Path(root_uri).rglob("*.parquet") if "_delta_log" not in path.parts)
    return {str(path): path.stat().st_mtime_ns for path in files}


def migrate(spark: SparkSession, config: Config, dry_run: bool = False) -> dict[str, int]:
    with record_run("migrate", config, DAY) as job:
        maintain.run(spark, job, dry_run=dry_run, migrate=True)
    return job.rows


def test_an_older_table_is_refused_until_it_is_migrated(
    spark: SparkSession, config: Config, root_uri: str, written: Written
) -> None:
    written(3)
    refusal = "has schema version 3, this code knows 4; run `couponflow maintain --migrate` if it is older"
    for table in ("assignments", "user_days"):
        with pytest.raises(DataError, match=refusal):
            tables.read(spark, root_uri, table)
    files = data_files(root_uri)
    expected = {"migrated assignments": 1, "migrated user_days": 0}
    assert migrate(spark, config, dry_run=True) == expected
    with pytest.raises(DataError, match=refusal):
        tables.read(spark, root_uri, "assignments")
    assert migrate(spark, config) == expected
    assert data_files(root_uri) == files
    rows = tables.read(spark, root_uri, "assignments").collect()
    assert [(row["user_id"], row["coupon_id"]) for row in sorted(rows)] == [(f"u{n}", None) for n in range(3)]
    assert tables.read(spark, root_uri, "user_days").count() == 1
    assert migrate(spark, config) == {}
    statuses = [(record.status, record.facts["is_dry_run"]) for record in runs.load_all(root_uri, "migrate")]
    assert sorted(statuses) == [("ok", False), ("ok", False), ("ok", True)]


def test_a_migrated_table_takes_rows_of_this_code_as_a_new_one_does(
    spark: SparkSession, config: Config, root_uri: str, written: Written, tmp_path: Path
) -> None:
    written(3)
    migrate(spark, config)
    row = make_row("assignments", campaign_id="18", version="1", user_id="u9", coupon_id="usual")
    fresh = str(tmp_path / "fresh")
    hashes = []
    for lake in (root_uri, fresh):
        tables.overwrite(make_frame(spark, "assignments", [row]), lake, "assignments", campaign_id="18")
        hashes.append(tables.content_hash(tables.read(spark, lake, "assignments")))
    assert hashes[0] == hashes[1]
    uris = [tables.table_uri(lake, "assignments") for lake in (root_uri, fresh)]
    found, new = (spark.read.format("delta").load(uri).schema for uri in uris)
    assert {field.name: field for field in found} == {field.name: field for field in new}


def test_a_migration_that_was_stopped_midway_goes_on(
    spark: SparkSession, config: Config, root_uri: str, written: Written
) -> None:
    """The columns are there and the version is not: the code before still reads and writes."""
    written(3)
    spark.sql(f"ALTER TABLE {tables.sql_name(root_uri, 'assignments')} ADD COLUMNS (coupon_id string)")
    with code_of(3, "coupon_id"):
        rows = [make_row("assignments", campaign_id="19", version="1")]
        tables.overwrite(make_frame(spark, "assignments", rows), root_uri, "assignments", campaign_id="19")
        assert tables.read(spark, root_uri, "assignments").count() == 4
    assert migrate(spark, config) == {"migrated assignments": 0, "migrated user_days": 0}
    assert tables.read(spark, root_uri, "assignments").where("coupon_id IS NULL").count() == 4


@pytest.mark.parametrize("version", [1, 5])
def test_what_cannot_be_migrated_is_left_alone(
    version: int, spark: SparkSession, config: Config, root_uri: str, written: Written
) -> None:
    written(version)
    with pytest.raises(DataError, match=f"table user_days has schema version {version}; only 2 to 3 can be"):
        migrate(spark, config)
    for table in ("assignments", "user_days"):
        layout = tables.layout(spark, root_uri, table)
        assert layout is not None
        assert layout.version == version


def test_a_column_that_no_version_brought_is_not_made_up(
    spark: SparkSession, config: Config, root_uri: str
) -> None:
    with code_of(3, "coupon_id", "reason"):
        frame = make_frame(spark, "assignments", [make_row("assignments", campaign_id="18")])
        tables.overwrite(frame, root_uri, "assignments", campaign_id="18")
    with pytest.raises(DataError, match="of schema version 3 lacks column reason, which every version had"):
        migrate(spark, config)


def test_what_versions_brought_is_declared_and_may_be_null() -> None:
    assert max(migrations.ADDED) == schemas.SCHEMA_VERSION
    for added in migrations.ADDED.values():
        for table, names in added.items():
            columns = {column.name: column for column in schemas.TABLES[table].columns}
            assert all(columns[name].nullable for name in names)
