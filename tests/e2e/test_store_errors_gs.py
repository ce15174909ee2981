"""The store denies, fails for the moment, or is silent: the same errors and the same patience in both doors.

Spark's connector and the storage library reach a real server through a proxy that spoils what a test names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from object_server import make_bucket, reaching
from pyspark.sql import SparkSession
from store_proxy import Fault, Proxy, running

from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import InfraError
from couponflow.lake import retries, storage, tables

DAY = DateRange.day(D0)
ALWAYS = 10**6
#: The connector's patience, cut short: 10 repeats would take minutes, and a silent answer 20 seconds.
IMPATIENT = {"fs.gs.http.max.retry": "3", "fs.gs.http.read-timeout": "2000"}


@dataclass
class Lake:
    """A lake behind the proxy with one row of ``orders`` and one object."""

    spark: SparkSession
    proxy: Proxy
    root: str

    @property
    def bucket(self) -> str:
        return self.root.removeprefix("gs://").partition("/")[0]

    @property
    def object(self) -> str:
        return f"{self.root}/runs/note.json"

    def orders(self, *names: str) -> Any:
        rows = [make_row("orders", order_id=name, ingest_date=D0) for name in names]
        return make_frame(self.spark, "orders", rows)

    def ids(self) -> list[str]:
        return sorted(row.order_id for row in tables.read(self.spark, self.root, "orders").collect())

    def write(self, *names: str) -> int:
        return tables.overwrite(self.orders(*names), self.root, "orders", DAY, "run")

    def forget(self) -> None:
        """Read logs from the store again, as another process would."""
        self.spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]  # py4j's


@pytest.fixture(scope="module")
def behind(spark: SparkSession, server: str) -> Iterator[Lake]:
    with (
        running(server) as proxy,
        pytest.MonkeyPatch.context() as patch,
        reaching(spark, proxy.url, IMPATIENT),
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        made = Lake(spark, proxy, f"{make_bucket()}/lake")
        storage.create(made.object, b"note", "run")
        made.write("a")
        yield made


@pytest.fixture
def lake(behind: Lake, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lake]:
    monkeypatch.setattr(retries, "PAUSE_SECONDS", 0.0)
    behind.proxy.faults, behind.proxy.spoilt = [], []
    behind.forget()
    yield behind
    behind.proxy.faults = []


def _in_a_job(lake: Lake) -> None:
    """A lazy read inside a job: only the action meets the store."""
    config = load_config(None, (f"lake.root_uri='{lake.root}'", "events.pseudonymise=false"))
    frame = tables.read(lake.spark, lake.root, "orders")
    with record_run("monitor", config, DAY):
        lake.proxy.faults = [Fault(r"\.parquet", 403, ALWAYS)]
        frame.collect()


DENIED: dict[str, Callable[[Lake], object]] = {
    "storage reads": lambda lake: storage.read_bytes(lake.object),
    "storage writes": lambda lake: storage.create(f"{lake.root}/new.json", b"x", "run"),
    "storage lists": lambda lake: storage.list_names(lake.root),
    "Spark opens": lambda lake: tables.read(lake.spark, lake.root, "orders"),
    "Spark looks": lambda lake: tables.exists(lake.spark, lake.root, "orders"),
    "Spark asks the version": lambda lake: tables.version(lake.spark, lake.root, "orders"),
    "Spark writes": lambda lake: lake.write("denied"),
}


@pytest.mark.parametrize("call", DENIED.values(), ids=DENIED)
def test_a_refusal_names_bucket_and_role_at_once(lake: Lake, call: Callable[[Lake], object]) -> None:
    lake.proxy.faults = [Fault(".", 403, ALWAYS)]
    with pytest.raises(InfraError, match=rf"roles/storage\.objectUser on bucket {lake.bucket}") as refused:
        call(lake)
    assert "\n" not in str(refused.value)
    assert len(lake.proxy.spoilt) <= 8  # nobody waits for a permission to appear


@pytest.mark.parametrize("place", [r"\.parquet", "_delta_log"])
def test_a_refused_upload_of_spark_names_bucket_and_role(lake: Lake, place: str) -> None:
    lake.proxy.faults = [Fault(rf"^POST(.|\n)*{place}", 403, ALWAYS)]
    with pytest.raises(InfraError, match=rf"orders.* roles/storage\.objectUser on bucket {lake.bucket}"):
        lake.write("denied")
    lake.proxy.faults = []
    assert lake.ids() == ["a"]


def test_a_refusal_that_only_an_action_meets_is_our_error_too(lake: Lake) -> None:
    with pytest.raises(InfraError, match=rf"^monitor .* roles/storage\.objectUser on bucket {lake.bucket}"):
        _in_a_job(lake)


@pytest.mark.parametrize("status", [503, 429, 0], ids=["503", "429", "reset"])
def test_what_fails_for_the_moment_is_repeated(lake: Lake, status: int) -> None:
    lake.proxy.faults = [Fault("^GET", status, 2), Fault(r"^POST(.|\n)*note-", status, 1)]
    assert storage.read_bytes(lake.object) == b"note"
    storage.create(f"{lake.root}/runs/note-{status}.json", b"x", "run")
    assert len(lake.proxy.spoilt) == 3
    lake.proxy.faults = [Fault("^GET", status, 2)]
    assert lake.ids() == ["a"]
    assert len(lake.proxy.spoilt) == 5
    lake.proxy.faults = [Fault(r"^POST(.|\n)*\.parquet", status), Fault(r"^POST(.|\n)*_delta_log", status)]
    assert lake.write("a") == 1
    assert len(lake.proxy.spoilt) == 7
    assert lake.ids() == ["a"]


def test_a_new_table_is_created_in_spite_of_a_lost_request(lake: Lake) -> None:
    lake.proxy.faults = [Fault(r"^POST(.|\n)*costs/_delta_log"), Fault(r"^POST(.|\n)*costs/.*\.parquet")]
    rows = make_frame(lake.spark, "costs", [make_row("costs", ingest_date=D0)])
    assert tables.overwrite(rows, lake.root, "costs", DAY, "run") == 1
    assert len(lake.proxy.spoilt) == 2
    assert tables.version(lake.spark, lake.root, "costs") == 1


def test_a_silent_store_is_asked_again(lake: Lake) -> None:
    lake.proxy.faults = [Fault("^GET", times=1, hang=True)]
    assert lake.ids() == ["a"]
    lake.proxy.faults = [Fault(r"^POST(.|\n)*_delta_log", times=1, hang=True)]
    assert lake.write("a") == 1
    assert len(lake.proxy.spoilt) == 2


def test_an_answer_that_ends_too_early_is_asked_for_again(lake: Lake) -> None:
    lake.proxy.faults = [Fault("^GET.*alt=media", is_cut=True)]
    assert storage.read_bytes(lake.object) == b"note"
    lake.proxy.faults = [Fault(r"^GET.*_delta_log.*alt=media", is_cut=True)]
    lake.proxy.faults += [Fault(r"^GET.*\.parquet.*alt=media", is_cut=True)]
    assert lake.ids() == ["a"]
    assert len(lake.proxy.spoilt) == 3


def test_patience_ends_and_the_version_before_stays(lake: Lake) -> None:
    lake.proxy.faults = [Fault("^POST", 503, ALWAYS)]
    with pytest.raises(InfraError, match=rf"failed for bucket {lake.bucket} \(status 503\); .*try again"):
        lake.write("b")
    assert retries.MAX_WRITES <= len(lake.proxy.spoilt) <= 8 * retries.MAX_WRITES
    lake.proxy.faults = [Fault("^GET", 503, ALWAYS)]
    lake.forget()
    with pytest.raises(InfraError, match="status 503") as failed:
        tables.read(lake.spark, lake.root, "orders")
    assert failed.value.exit_code == 5
    lake.proxy.faults = []
    assert lake.ids() == ["a"]
