"""Delta commits on ``gs://``: twenty writers, two drivers, a lost answer. One version has one winner."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import D0, make_event, make_frame, make_row
from object_server import make_bucket, reaching
from pyspark.sql import SparkSession
from store_proxy import Fault, running

from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.lake import storage, tables

NUM_WRITERS = 20
#: Of the nightly build.
RACES = int(os.environ.get("COUPONFLOW_RACES", "200"))
DAY = DateRange.day(D0)

#: One of two drivers: per race a table that both have read before either commits.
DRIVER = """
import sys, time
from datetime import date
from couponflow.dates import DateRange
from couponflow.errors import CouponflowError
from couponflow.lake import session, storage, tables
from couponflow.sections import SparkConfig
from builders import D0, make_frame, make_row

root, name, races = sys.argv[1], sys.argv[2], int(sys.argv[3])
spark = session.start(SparkConfig(master="local[1]", shuffle_partitions=1), name)
day = DateRange.day(D0)
code = 0
for number in range(races):
    lake = f"{root}/{number}"

    def meet(batches, lake=lake):
        storage.create(f"{lake}/here/{name}", b"", name)
        deadline = time.monotonic() + 120
        while len(storage.list_names(f"{lake}/here")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        yield from batches

    frame = make_frame(spark, "orders", [make_row("orders", order_id=name, ingest_date=D0)]).coalesce(1)
    try:
        tables.overwrite(frame.mapInArrow(meet, frame.schema), lake, "orders", day, name)
        end = "ok"
    except CouponflowError as error:
        code, end = error.exit_code, f"{error.exit_code} {error}"
    storage.create(f"{lake}/ended/{name}", end.encode(), name)
spark.stop()
sys.exit(code)
"""


def orders(spark: SparkSession, *names: str, day: int = 0) -> Any:
    rows = [make_row("orders", order_id=name, ingest_date=D0 + timedelta(days=day)) for name in names]
    return make_frame(spark, "orders", rows)


def ids(spark: SparkSession, root_uri: str) -> list[str]:
    return sorted(row.order_id for row in tables.read(spark, root_uri, "orders").collect())


def environment() -> dict[str, str]:
    here = Path(__file__).parents[1]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "lib"), str(here.parent)])
    }


def test_twenty_writers_of_one_version_have_one_winner(gs_spark: SparkSession, bucket: str) -> None:
    """The log store itself, asked at the same moment by as many threads of the JVM's clients."""
    jvm: Any = gs_spark._jvm
    conf = gs_spark._jsparkSession.sessionState().newHadoopConf()
    store = jvm.io.delta.storage.GCSLogStore(conf)
    for version in range(3):
        path = jvm.org.apache.hadoop.fs.Path(f"{bucket}/table/_delta_log/{version:020d}.json")

        def write(number: int, path: Any = path) -> str:
            lines = jvm.java.util.ArrayList()
            lines.add(f"writer {number}")
            try:
                store.write(path, lines.iterator(), False, conf)
                return "won"
            except Exception as error:
                return str(error.java_exception.getClass().getSimpleName())  # type: ignore[attr-defined]  # py4j's

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            ends = list(pool.map(write, range(NUM_WRITERS)))
        assert ends.count("won") == 1, ends
        assert set(ends) == {"won", "FileAlreadyExistsException"}
        written = storage.read_bytes(f"{bucket}/table/_delta_log/{version:020d}.json").decode().strip()
        assert written == f"writer {ends.index('won')}"


def test_twenty_writers_of_twenty_days_lose_no_row(gs_spark: SparkSession, bucket: str) -> None:
    tables.overwrite(orders(gs_spark, "first", day=NUM_WRITERS), bucket, "orders", _day(NUM_WRITERS), "first")

    def write(number: int) -> int:
        frame = orders(gs_spark, f"w{number:02}", day=number).coalesce(1)
        return tables.overwrite(frame, bucket, "orders", _day(number), f"w{number:02}")

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        assert list(pool.map(write, range(NUM_WRITERS))) == [1] * NUM_WRITERS
    names = [f"w{number:02}" for number in range(NUM_WRITERS)]
    assert ids(gs_spark, bucket) == sorted(["first", *names])
    history = gs_spark.sql(f"DESCRIBE HISTORY delta.`{tables.table_uri(bucket, 'orders')}`")
    marks = [(row.version, (row.userMetadata or "").split(" ")[0]) for row in history.collect()]
    assert sorted(mark for _, mark in marks if mark) == sorted(["first", *names])  # each once
    assert sorted(version for version, _ in marks) == list(range(NUM_WRITERS + 2))


def _day(number: int) -> DateRange:
    return DateRange.day(D0 + timedelta(days=number))


@pytest.mark.parametrize("races", [1, pytest.param(RACES, marks=pytest.mark.nightly)])
def test_of_two_drivers_on_one_range_one_commits(gs_spark: SparkSession, bucket: str, races: int) -> None:
    """Two processes hold their snapshot before either commits; the loser's exit code is 4, and no mix."""
    for number in range(races):
        tables.overwrite(orders(gs_spark, "before"), f"{bucket}/{number}", "orders", DAY, "before")
    drivers = {
        name: subprocess.Popen(
            [sys.executable, "-c", DRIVER, bucket, name, str(races)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "xy"
    }
    said = {name: driver.communicate(timeout=300 + 60 * races)[1] for name, driver in drivers.items()}
    for number in range(races):
        lake = f"{bucket}/{number}"
        ends = {name: storage.read_bytes(f"{lake}/ended/{name}").decode() for name in "xy"}
        (winner,) = [name for name, end in ends.items() if end == "ok"]
        (loser,) = set("xy") - {winner}
        assert ends[loser].startswith("4 table orders"), said
        assert "another run changed it meanwhile; run again" in ends[loser]
        assert ids(gs_spark, lake) == [winner]
    if races == 1:
        assert sorted(driver.returncode for driver in drivers.values()) == [0, 4], said


def test_an_overlapping_backfill_is_refused_while_the_first_one_works(
    gs_spark: SparkSession, bucket: str, tmp_path: Path
) -> None:
    """The lease on ``gs://``: the second process ends with code 4 before it starts Spark, then may run."""
    file = tmp_path / "config.toml"
    file.write_text(f'[lake]\nroot_uri = "{bucket}/lake"\n[events]\npseudonymise = false\n')
    config = load_config(file)
    rows = [make_event(f"u{n % 5}", minute=7 * n) for n in range(40)]
    tables.overwrite(make_frame(gs_spark, "events", rows), f"{bucket}/lake", "events", DAY, "prepared")
    tables.overwrite(make_frame(gs_spark, "user_days", []), f"{bucket}/lake", "user_days", DAY, "prepared")
    command = [sys.executable, "-m", "couponflow.cli", "job", "sessionize", "--config", str(file)]
    from jobs import sessionize

    with record_run("sessionize", config, DAY) as run:
        done = subprocess.run(
            [*command, "--dates", f"{D0}:{D0 + timedelta(days=1)}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        sessionize.run(gs_spark, run)
    assert done.returncode == 4, done.stderr
    assert f"held by run {run.run_id}" in done.stderr
    assert tables.read(gs_spark, f"{bucket}/lake", "sessions").count() > 0


@pytest.mark.parametrize("status", [503, 412, 0])
def test_a_commit_whose_answer_is_lost_counts_once(
    spark: SparkSession, server: str, bucket: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The commit lies there, its writer hears 503, its own object's 412, or nothing: one commit, ours."""
    with running(server) as proxy, reaching(spark, proxy.url):
        root = make_bucket()
        tables.overwrite(orders(spark, "before"), root, "orders", DAY, "run-1")
        proxy.faults = [Fault(r"^POST(.|\n)*_delta_log", status, is_done=True)]
        assert tables.overwrite(orders(spark, "a", "b", "c"), root, "orders", DAY, "run-2") == 3
        assert len(proxy.spoilt) == 1
        assert ids(spark, root) == ["a", "b", "c"]
        history = spark.sql(f"DESCRIBE HISTORY delta.`{tables.table_uri(root, 'orders')}`").collect()
    ours = [row.version for row in history if (row.userMetadata or "").startswith("run-2 ")]
    assert ours == [2]
