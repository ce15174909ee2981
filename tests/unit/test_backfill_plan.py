"""Backfill plans and their execution. No Spark: small jobs stand in."""

import hashlib
import sys
import threading
import types
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders import test_config
from typer.testing import CliRunner

from couponflow import backfill, backfill_plan, pipeline, scopes
from couponflow.cli import app
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import ConfigError, ConflictError, CouponflowError, DataError, InfraError
from couponflow.lake import contracts, leases, runs, storage
from couponflow.sequences import vocabulary

DATES = DateRange.parse("2024-01-04:2024-01-06")
SMALL = ("run.first_date=2024-01-01", "run.first_as_of=2024-01-01", "run.last_date=2024-03-01")
SMALL = (*SMALL, "examples.train_start=2024-01-02", "examples.valid_start=2024-02-01")
SMALL = (*SMALL, "examples.test_start=2024-02-10", "run.run_date=2024-02-20", "conversions.label_days=2")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return test_config(tmp_path, *SMALL)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every job in miniature: it notes its call."""
    made: list[tuple[str, str]] = []

    def stand_in(name: str) -> Callable[[Any, Any], None]:
        return lambda spark, run: made.append((name, str(run.dates)))

    for name in backfill_plan.JOBS:
        replace_job(monkeypatch, name, stand_in(name))
    return made


def replace_job(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[[Any, Any], None]) -> None:
    module = types.ModuleType(f"jobs.{name}")
    module.run = function  # type: ignore[attr-defined]  # a job module in miniature
    monkeypatch.setitem(sys.modules, f"jobs.{name}", module)


def deliver(config: Config, dates: str = "2024-01-01:2024-02-20") -> None:
    for feed in contracts.FEEDS.values():
        for day in DateRange.parse(dates).days() if feed.daily else ():
            folder = storage.join(config.lake.root_uri, "raw", feed.name, f"ingest_date={day}")
            storage.create(storage.join(folder, "part-0000.jsonl"), b"{}\n" * 10, "r")


def give_vocabulary(config: Config, version: str = "v1") -> None:
    vocabulary.publish(config.lake.root_uri, vocabulary.Current(version, "2024-01-01:2024-01-31", "f"))


def fates(config: Config, name: str, dates: DateRange = DATES, reprocess: str = "none") -> dict[str, str]:
    """Action and reason of every date, by stage."""
    planned = backfill_plan.plan(config, name, dates, reprocess)
    return {f"{part.name} {part.dates}": f"{part.action}: {part.why}" for part in planned.parts}


def days(config: Config, job: str, dates: DateRange, reprocess: str = "none") -> dict[str, str]:
    planned = backfill_plan.plan(config, job, dates, reprocess)
    return {str(day)[-2:]: part.action for part in planned.parts for day in part.dates.days()}


def run_all(
    config: Config, dates: DateRange = DATES, order: backfill.Order | None = None, **options: Any
) -> list[str]:
    planned = backfill_plan.plan(config, "all", dates, **options)
    done = backfill.execute(config, planned, order or backfill.Order(), lambda: None, pipeline.Progress())
    return [f"{outcome.stage.name} {outcome.stage.dates}" for outcome in done]


def tree(root_uri: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(root_uri).rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def test_each_date_has_one_fate(config: Config) -> None:
    with record_run("sessionize", config, DateRange.parse("2024-01-02:2024-01-03")):
        pass
    with pytest.raises(DataError), record_run("sessionize", config, DateRange.parse("2024-01-03")):
        raise DataError("broken; mend it")
    dates = DateRange.parse("2024-01-01:2024-01-04")
    assert days(config, "sessionize", dates) == {"01": "run", "02": "skip", "03": "skip", "04": "run"}
    assert days(config, "sessionize", dates, "failed") == {
        "01": "run",
        "02": "skip",
        "03": "run",
        "04": "run",
    }
    assert set(days(config, "sessionize", dates, "completed").values()) == {"run"}
    assert fates(config, "sessionize", dates) == {
        "sessionize 2024-01-01:2024-01-01": "run: never run",
        "sessionize 2024-01-02:2024-01-02": "skip: finished",
        "sessionize 2024-01-03:2024-01-03": "skip: failed",
        "sessionize 2024-01-04:2024-01-04": "run: never run",
    }
    assert "1 dates stay as they are (failed)" in backfill_plan.plan(config, "sessionize", dates).notes[0]


@pytest.mark.parametrize(
    ("name", "reprocess", "words"),
    [
        ("nonsense", "none", "jobs are all, clean"),
        ("score", "none", "couponflow job"),
        ("all", "x", "behaviours"),
    ],
)
def test_unknown_jobs_and_behaviours_are_named(config: Config, name: str, reprocess: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        backfill_plan.plan(config, name, DATES, reprocess)


@pytest.mark.parametrize("options", [{"chunk_days": 0}, {"max_active_runs": 0}, {"max_active_runs": 65}])
def test_orders_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected 1 to"):
        backfill.Order(**options)


def test_all_follows_the_ingest_dates(config: Config) -> None:
    give_vocabulary(config)
    assert fates(config, "all") == {
        "clean_events 2024-01-04:2024-01-06": "run: never run",
        "clean_feeds 2024-01-04:2024-01-06": "run: never run",
        "sessionize 2024-01-01:2024-01-07": "run: never run",  # three days late, or a fast clock
        "attribute_conversions 2024-01-01:2024-01-06": "run: never run",
        "build_examples 2024-01-01:2024-01-06": "run: never run",
    }


def test_windows_reach_back_by_config(tmp_path: Path) -> None:
    later = DateRange.parse("2024-02-15")
    by_days = test_config(tmp_path, *SMALL)
    assert "attribute_conversions 2024-02-09:2024-02-15" in fates(by_days, "all", later)  # 2 + 3 days, and 1
    by_campaign = test_config(tmp_path, *SMALL, "conversions.window=campaign")
    assert "attribute_conversions 2024-01-01:2024-02-15" in fates(by_campaign, "all", later)


def test_a_dry_run_writes_nothing(config: Config, tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    deliver(config)
    give_vocabulary(config)
    run_all(config, DateRange.parse("2024-01-01:2024-01-05"))
    file = tmp_path / "c.toml"
    file.write_text(f"[lake]\nroot_uri = '{config.lake.root_uri}'\n[events]\npseudonymise = false\n")
    argv = ["backfill", "all", "--config", str(file), "--dry-run", "--from-date", "2024-01-04"]
    argv += [word for value in SMALL for word in ("--set", value)]
    calls.clear()
    before = tree(config.lake.root_uri)
    done = CliRunner().invoke(app, [*argv, "--to-date", "2024-01-06"])
    assert done.exit_code == 0, done.output
    assert tree(config.lake.root_uri) == before
    assert calls == []
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line
    ]
    assert rows[:2] == [
        ["clean_events", "2024-01-04:2024-01-05", "skip", "finished", "", ""],
        ["clean_events", "2024-01-06:2024-01-06", "run", "never run", "6", "0.0 MB"],
    ]


def test_bytes_are_those_of_the_dates_that_run(config: Config) -> None:
    deliver(config)
    table = storage.join(config.lake.root_uri, "tables", "events", "event_date=2024-01-05", "ingest_date=x")
    storage.create(storage.join(table, "part-0.parquet"), b"x" * 500, "r")
    planned = backfill_plan.plan(config, "all", DATES)
    sizes = {part.job: part.input_bytes for part in planned.parts}
    daily = sum(feed.daily for feed in contracts.FEEDS.values()) - 1  # events apart
    assert sizes["clean_events"] == 3 * 30
    assert sizes["clean_feeds"] == 3 * 30 * daily
    assert sizes["sessionize"] == 500
    partitions = {part.job: part.partitions for part in planned.parts}
    assert partitions["clean_events"] == 3 + 7  # user_days of the dates touched
    assert partitions["sessionize"] == 7 + 10


def test_a_missing_delivery_stops_before_any_date(config: Config, calls: list[tuple[str, str]]) -> None:
    deliver(config, "2024-01-04:2024-01-05")
    with pytest.raises(DataError, match=r"feed events has no delivery for 2024-01-06"):
        run_all(config)
    assert calls == []


def test_a_second_call_runs_nothing_and_writes_nothing(config: Config, calls: list[tuple[str, str]]) -> None:
    deliver(config)
    give_vocabulary(config)
    assert len(run_all(config)) == 5
    before = tree(config.lake.root_uri)
    assert run_all(config) == []
    assert tree(config.lake.root_uri) == before
    assert set(fates(config, "all").values()) == {"skip: finished"}
    assert len(run_all(config, reprocess="completed")) == 5


def test_a_new_day_reopens_what_it_touches(config: Config, calls: list[tuple[str, str]]) -> None:
    deliver(config)
    give_vocabulary(config)
    run_all(config, DateRange.parse("2024-01-01:2024-01-20"))
    found = fates(config, "all", DateRange.parse("2024-01-21"))
    assert found == {
        "clean_events 2024-01-21:2024-01-21": "run: never run",
        "clean_feeds 2024-01-21:2024-01-21": "run: never run",
        "sessionize 2024-01-18:2024-01-21": "run: clean_events runs",
        "sessionize 2024-01-22:2024-01-22": "run: never run",
        "attribute_conversions 2024-01-15:2024-01-20": "run: clean_feeds runs",
        "attribute_conversions 2024-01-21:2024-01-21": "run: never run",
        "build_examples 2024-01-15:2024-01-21": "run: attribute_conversions runs",
    }


def test_an_older_day_reaches_the_examples_of_later_ones(
    config: Config, calls: list[tuple[str, str]]
) -> None:
    deliver(config)
    give_vocabulary(config)
    run_all(config, DateRange.parse("2024-01-10:2024-01-20"))
    calls.clear()
    run_all(config, DateRange.parse("2024-01-09"))
    assert calls == [
        ("clean_events", "2024-01-09:2024-01-09"),
        ("clean_feeds", "2024-01-09:2024-01-09"),
        ("sessionize", "2024-01-06:2024-01-10"),
        ("attribute_conversions", "2024-01-03:2024-01-09"),
        ("build_examples", "2024-01-03:2024-01-20"),  # histories of all later days hold that day
    ]


def test_what_was_killed_between_two_stages_goes_on(
    config: Config, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(config)
    give_vocabulary(config)
    run_all(config)
    kept = sys.modules["jobs.sessionize"]

    def fail(spark: Any, run: Any) -> None:
        raise InfraError("power cut; run again")

    replace_job(monkeypatch, "sessionize", fail)
    with pytest.raises(InfraError):
        run_all(config, reprocess="completed")
    (path,) = [
        p for p in Path(config.lake.root_uri, "runs/sessionize").iterdir() if "failed" in p.read_text()
    ]
    path.unlink()  # a killed run would have left none
    found = fates(config, "all")
    assert found["clean_events 2024-01-04:2024-01-06"] == "skip: finished"
    assert found["sessionize 2024-01-01:2024-01-07"] == "run: clean_events ran since"
    monkeypatch.setitem(sys.modules, "jobs.sessionize", kept)
    calls.clear()
    assert run_all(config)
    assert "clean_events" not in dict(calls)
    assert run_all(config) == []


def test_a_date_whose_rerun_was_killed_runs_again(
    config: Config, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was finished before, and may be half replaced now."""
    deliver(config)
    give_vocabulary(config)
    run_all(config)
    root_uri, dates = config.lake.root_uri, DateRange.parse("2024-01-05")
    died = runs.start("clean_events", str(dates), {}, "f")
    monkeypatch.setattr(leases, "_this_process", lambda: f"{leases._machine()} 999999999 1")
    leases._acquire(root_uri, died, scopes.writes("clean_events", dates, config), "", runs.utc_now)
    monkeypatch.undo()
    before = tree(root_uri)
    assert fates(config, "all")["clean_events 2024-01-05:2024-01-05"] == "run: killed"
    assert tree(root_uri) == before  # a plan does not even write the dead run's record
    with record_run("sessionize", config, DATES):
        assert len(leases.claims(root_uri)) == 2  # other tables: nobody took the dead lease over yet
    with (
        pytest.raises(DataError),
        record_run("clean_events", config, DateRange.parse("2024-01-04:2024-01-05")),
    ):
        raise DataError("broken; mend it")
    found = [(r.run_id == died.run_id, r.status) for r in runs.load_all(root_uri, "clean_events")]
    assert found == [(False, "ok"), (True, "killed"), (False, "failed")]


def test_a_changed_config_is_stale_and_waits_to_be_asked(config: Config, tmp_path: Path, calls: Any) -> None:
    deliver(config)
    give_vocabulary(config)
    run_all(config)
    changed = test_config(tmp_path, *SMALL, "sessions.gap_minutes=20", "training.seed=3")
    found = fates(changed, "all")
    assert found["sessionize 2024-01-01:2024-01-07"] == "skip: config changed"
    assert found["clean_events 2024-01-04:2024-01-06"] == "skip: finished"
    assert found["build_examples 2024-01-01:2024-01-06"] == "skip: finished"
    assert run_all(changed) == []
    planned = backfill_plan.plan(changed, "sessionize", DateRange.parse("2024-01-03"))
    assert "6 dates from 2024-01-01 to 2024-01-07, outside this backfill" in planned.notes[1]
    assert run_all(changed, reprocess="failed") == ["sessionize 2024-01-01:2024-01-07"]
    assert run_all(changed, reprocess="failed") == []


def test_closed_days_and_the_place_of_the_lake_make_nothing_stale(
    config: Config, tmp_path: Path, calls: Any
) -> None:
    deliver(config)
    give_vocabulary(config)
    run_all(config)
    changed = test_config(tmp_path, *SMALL, "lake.closed_days=['2024-01-01']", "lake.currency=EUR")
    assert set(fates(changed, "all").values()) == {"skip: finished"}


def test_what_a_stage_reads_is_what_the_pipeline_says(config: Config) -> None:
    harmless = {"lake"}  # root, currency and closed days change no row
    for stage in pipeline.plan(config):
        if stage.job not in backfill_plan.JOBS or stage.campaign:
            continue
        named = {name for read in scopes.READS[stage.job] for name in (read, read.partition(".")[0])}
        assert set(stage.sections) - harmless - named == set(), stage.job


def test_after_the_main_job_nothing_is_left_to_do(config: Config) -> None:
    deliver(config, "2024-01-01:2024-03-01")
    give_vocabulary(config)
    stages = [stage for stage in pipeline.plan(config) if stage.job in backfill_plan.JOBS]
    for stage in stages:
        with record_run(stage.job, config, stage.dates, stage.campaign):
            pass
    dates = DateRange.parse("2024-01-01:2024-03-01")
    found = fates(config, "all", dates)
    assert set(found.values()) == {"skip: finished"}
    assert len(found) == len(stages)


def test_failed_dates_block_what_follows(
    config: Config, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(config)
    give_vocabulary(config)

    def fail(spark: Any, run: Any) -> None:
        raise DataError("column price: expected double; correct the delivery")

    good = sys.modules["jobs.clean_events"]
    replace_job(monkeypatch, "clean_events", fail)
    with pytest.raises(DataError, match="column price"):
        run_all(config)
    monkeypatch.setitem(sys.modules, "jobs.clean_events", good)
    calls.clear()
    with pytest.raises(DataError, match=r"sessionize .* blocked, clean_events failed; repeat this command"):
        run_all(config)
    assert [name for name, _ in calls] == ["clean_feeds", "attribute_conversions"]
    assert [name.split()[0] for name in run_all(config, reprocess="failed")] == [
        "clean_events",
        "sessionize",
        "build_examples",
    ]


def test_without_a_vocabulary_all_else_runs_and_the_step_is_named(config: Config, calls: Any) -> None:
    deliver(config)
    with pytest.raises(
        DataError, match=r"build_examples .*: blocked, no vocabulary; run `couponflow job build_v"
    ):
        run_all(config)
    assert [name for name, _ in calls] == [
        "clean_events",
        "clean_feeds",
        "sessionize",
        "attribute_conversions",
    ]
    give_vocabulary(config)
    assert run_all(config) == ["build_examples 2024-01-01:2024-01-06"]


def test_another_vocabulary_rebuilds_all_examples_or_none(
    config: Config, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(spark: Any, run: Any) -> None:
        calls.append(("build_examples", str(run.dates)))
        run.facts["vocabulary_version"] = vocabulary.current(run.root_uri).version

    replace_job(monkeypatch, "build_examples", build)
    deliver(config)
    give_vocabulary(config)
    run_all(config, DateRange.parse("2024-01-01:2024-01-20"))
    give_vocabulary(config, "v2")
    assert fates(config, "all", DateRange.parse("2024-01-20"))["build_examples 2024-01-14:2024-01-20"] == (
        "skip: vocabulary changed"
    )
    calls.clear()
    run_all(config, DateRange.parse("2024-01-21"))
    assert calls[-1] == ("build_examples", "2024-01-01:2024-01-21")


def test_scoring_days_that_exist_are_built_again(config: Config, calls: list[tuple[str, str]]) -> None:
    deliver(config)
    give_vocabulary(config)
    with record_run("build_examples", config, DateRange.parse("2024-01-05"), campaign="7"):
        pass
    assert run_all(config)[-1] == "build_examples campaign 7 2024-01-05:2024-01-05"
    assert run_all(config) == []
    with pytest.raises(ConfigError), record_run("build_examples", config, DateRange.parse("2024-01-06"), "8"):
        raise ConfigError("campaign '8' is not in table campaigns; check --campaign")
    own = fates(config, "all", DateRange.parse("2024-02-19"))  # the config's run_date follows
    assert not [name for name in own if "campaign" in name]
    assert run_all(config) == []


def test_chunks_and_orders(config: Config) -> None:
    month = [DateRange.parse("2024-01-01:2024-01-10"), DateRange.parse("2024-01-20:2024-01-21")]

    def starts(job: str = "sessionize", **options: Any) -> list[int]:
        return [dates.start.day for dates in backfill.Order(**options).cut(job, month)]

    assert starts(chunk_days=4) == [1, 5, 9, 20]
    assert starts(chunk_days=4, run_backwards=True) == [20, 9, 5, 1]
    assert sorted(starts(chunk_days=1)) == [*range(1, 11), 20, 21]
    drawn = starts(chunk_days=1, order_seed=3)
    assert drawn == starts(chunk_days=1, order_seed=3) != starts(chunk_days=1)
    assert sorted(drawn) == [*range(1, 11), 20, 21]
    assert starts("attribute_conversions", chunk_days=1) == [1, 20]
    assert [len(dates) for dates in backfill.Order(chunk_days=4).cut("sessionize", month)] == [4, 4, 2, 2]


def test_runs_at_once_never_replace_the_same_dates(
    config: Config, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    active: list[DateRange] = []
    together: list[tuple[DateRange, ...]] = []
    barrier = threading.Barrier(2)

    def work(spark: Any, run: Any) -> None:
        active.append(run.dates)
        together.append(tuple(active))
        if run.dates.start in (date(2024, 1, 1), date(2024, 1, 8)):
            barrier.wait(timeout=20)  # both are inside at once: neither waits for the other's end
        active.remove(run.dates)

    replace_job(monkeypatch, "sessionize", work)
    planned = backfill_plan.plan(config, "sessionize", DateRange.parse("2024-01-01:2024-01-14"))
    order = backfill.Order(chunk_days=1, max_active_runs=4)
    # sessions are replaced two days beyond: 01 lets 05, 09 and 13 beside it, never 02 to 04
    monkeypatch.setattr(
        backfill.Order,
        "cut",
        lambda *_: [DateRange.parse(f"2024-01-{day:02}") for day in (1, 2, 8, *range(3, 8), *range(9, 15))],
    )
    done = backfill.execute(config, planned, order, lambda: None, pipeline.Progress())
    assert len(done) == 14
    scope = {
        day: scopes.writes("sessionize", DateRange.day(day), config) for day in planned.parts[0].dates.days()
    }
    for group in together:
        for one in group:
            for other in group:
                met = any(leases.clash(a, b) for a in scope[one.start] for b in scope[other.start])
                assert one == other or not met


def test_the_first_failure_stops_new_runs(
    config: Config, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on_the_fifth(spark: Any, run: Any) -> None:
        calls.append(run.dates.start.day)
        if run.dates.start.day == 5:
            raise DataError("broken; mend it")

    replace_job(monkeypatch, "clean_events", fail_on_the_fifth)
    deliver(config)
    with pytest.raises(DataError, match="broken"):
        run_all(config, DateRange.parse("2024-01-03:2024-01-08"), backfill.Order(chunk_days=1))
    assert calls == [3, 4, 5]
    assert days(config, "clean_events", DateRange.parse("2024-01-03:2024-01-06")) == {
        "03": "skip",
        "04": "skip",
        "05": "skip",  # failed, and not asked to run again
        "06": "run",
    }


def test_overlapping_backfills_one_is_refused_disjoint_ones_run(
    config: Config, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first backfill stands inside its first day while the others are tried."""
    inside, go_on = threading.Event(), threading.Event()
    ids: list[str] = []

    def work(spark: Any, run: Any) -> None:
        if run.dates.start == date(2024, 1, 2):
            ids.extend(
                claim.run_id for claim in leases.claims(run.root_uri) if claim.record.job == "backfill"
            )
            inside.set()
            go_on.wait(20)

    replace_job(monkeypatch, "clean_events", work)
    deliver(config)

    def start(dates: str) -> list[pipeline.Outcome]:
        planned = backfill_plan.plan(config, "clean_events", DateRange.parse(dates))
        return backfill.execute(
            config, planned, backfill.Order(chunk_days=1), lambda: None, pipeline.Progress()
        )

    first = threading.Thread(target=start, args=("2024-01-02:2024-01-06",))
    first.start()
    assert inside.wait(20)
    refused: list[CouponflowError] = []
    for dates in ("2024-01-02:2024-01-06", "2024-01-06:2024-01-10"):  # equal; one day in common
        with pytest.raises(ConflictError) as error:
            start(dates)
        refused.append(error.value)
    with (
        pytest.raises(ConflictError) as error,
        record_run("clean_events", config, DateRange.parse("2024-01-05")),
    ):
        pytest.fail("the daily run must not start")
    refused.append(error.value)
    assert all(f"held by run {ids[0]} since" in str(error) for error in refused)
    assert {error.exit_code for error in refused} == {4}
    assert len(start("2024-01-20:2024-01-22")) == 3
    go_on.set()
    first.join()
    assert len(start("2024-01-06:2024-01-10")) == 4  # the 6th is finished
    assert all(record.status == "ok" for record in runs.load_all(config.lake.root_uri))
