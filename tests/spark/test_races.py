"""Two jobs and one range: Delta lets one commit, the other reads again; three lost races are exit 4."""

import threading
import time
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import SparkSession

from couponflow.dates import DateRange
from couponflow.errors import CommitConflictError, ConflictError
from couponflow.lake import schemas, tables

DAY = DateRange.day(D0)


def race(spark: SparkSession, root_uri: str, folder: Path, days: tuple[date, date]) -> list[SimpleNamespace]:
    """Two jobs add one row each to their day; both hold their snapshot before either commits."""
    schema = tables.struct_type(schemas.TABLES["orders"].columns)
    place = str(folder)
    jobs = [SimpleNamespace(name=name, day=day, facts={}) for name, day in zip("xy", days, strict=True)]

    @tables.retried
    def add(spark: SparkSession, job: Any) -> None:
        def meet(batches: Any) -> Any:
            Path(place, f"{job_name}.here").touch()
            deadline = time.monotonic() + 60
            while len(list(Path(place).glob("*.here"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            yield from batches

        job_name, day = job.name, DateRange.day(job.day)
        present = tables.read(spark, root_uri, "orders", day)
        mine = make_frame(spark, "orders", [make_row("orders", order_id=job.name, ingest_date=job.day)])
        frame = present.unionByName(mine).coalesce(1).mapInPandas(meet, schema)
        tables.overwrite(frame, root_uri, "orders", day, job.name)

    failures: list[Exception] = []

    def work(job: Any) -> None:
        try:
            add(spark, job)
        except Exception as error:  # a thread must not fail unseen
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return jobs


def start(spark: SparkSession, root_uri: str) -> None:
    tables.overwrite(make_frame(spark, "orders", [make_row("orders", order_id="a")]), root_uri, "orders", DAY)


def ids(spark: SparkSession, root_uri: str) -> list[str]:
    return sorted(row.order_id for row in tables.read(spark, root_uri, "orders").collect())


def test_the_loser_reads_again_and_adds_to_what_the_winner_wrote(
    spark: SparkSession, root_uri: str, tmp_path: Path
) -> None:
    start(spark, root_uri)
    jobs = race(spark, root_uri, tmp_path, (D0, D0))
    assert ids(spark, root_uri) == ["a", "x", "y"]  # as if one had come after the other
    assert sorted(job.facts.get("lost_races", 0) for job in jobs) == [0, 1]


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(200))
def test_races_200_times(spark: SparkSession, root_uri: str, tmp_path: Path, number: int) -> None:
    start(spark, root_uri)
    days = (D0, D0 + timedelta(days=number % 2))
    jobs = race(spark, root_uri, tmp_path, days)
    assert ids(spark, root_uri) == ["a", "x", "y"]
    assert sum(job.facts.get("lost_races", 0) for job in jobs) == (number % 2 == 0)


@pytest.mark.parametrize(("num_losses", "is_refused"), [(0, False), (1, False), (2, False), (3, True)])
def test_lost_races_are_counted_and_bounded(
    monkeypatch: pytest.MonkeyPatch, num_losses: int, is_refused: bool
) -> None:
    monkeypatch.setattr(tables, "_PAUSE_SECONDS", 0.0)
    job = SimpleNamespace(facts={}, calls=0)

    @tables.retried
    def run(spark: Any, job: Any) -> None:
        job.calls += 1
        if job.calls <= num_losses:
            raise CommitConflictError("table orders, range D: another run changed it meanwhile; run again")

    if is_refused:
        with pytest.raises(ConflictError, match=r"run again \(lost 3 races in a row\)") as refused:
            run(None, job)  # type: ignore[arg-type]  # no session is needed
        assert refused.value.exit_code == 4
        assert not isinstance(refused.value, CommitConflictError)
    else:
        run(None, job)  # type: ignore[arg-type]  # no session is needed
    assert job.calls == min(num_losses + 1, 3)
    assert job.facts == ({"lost_races": num_losses} if num_losses else {})


def test_other_errors_are_not_repeated() -> None:
    job = SimpleNamespace(facts={}, calls=0)

    @tables.retried
    def run(spark: Any, job: Any) -> None:
        job.calls += 1
        raise ConflictError("events 2024-01-01 is held by run r")

    with pytest.raises(ConflictError, match="held by run r"):
        run(None, job)  # type: ignore[arg-type]  # no session is needed
    assert (job.calls, job.facts) == (1, {})
