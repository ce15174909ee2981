"""Leases: all or nothing, named holders, dead holders taken over, and a clock that tests turn."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from builders import test_config

from couponflow import scopes
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import ConflictError, DataError
from couponflow.lake import leases, runs, storage
from couponflow.sequences import events, sessions

DAY = DateRange.parse("2024-01-10")
WEEK = DateRange.parse("2024-01-08:2024-01-14")


class Clock:
    """A clock that stands until it is turned."""

    def __init__(self) -> None:
        self.now = datetime(2024, 6, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def record(job: str = "clean_events", dates: DateRange = DAY) -> runs.RunRecord:
    return runs.start(job, str(dates), {}, "f")


def holders(root_uri: str) -> list[str]:
    return [claim.run_id for claim in leases.claims(root_uri)]


def test_a_held_range_names_its_holder_and_frees_it_at_the_end(root_uri: str) -> None:
    first, second = record(), record()
    with leases.held(root_uri, first, (("events", WEEK),)):
        with pytest.raises(ConflictError) as refused:
            leases.held(root_uri, second, (("events", DAY), ("user_days", DAY))).__enter__()
        for word in (first.run_id, "events 2024-01-10", "since 20", "run again when it has ended"):
            assert word in str(refused.value)
        assert holders(root_uri) == [first.run_id]  # all or nothing: user_days is not held either
        for free in (("user_days", DAY), ("events", DateRange.parse("2024-01-15"))):
            with leases.held(root_uri, record(), (free,)):
                pass
    with leases.held(root_uri, second, (("events", DAY),)):
        pass
    assert holders(root_uri) == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (("events", DAY), ("events", WEEK), True),
        (("events", DAY), ("events", DateRange.parse("2024-01-11")), False),
        (("events", DAY), ("sessions", DAY), False),
        (("assignments", None), ("assignments", None), True),
        (("assignments", None), ("assignments", DAY), True),
        ((leases.WHOLE_LAKE, None), ("sessions", DAY), True),
    ],
)
def test_clash(one: leases.Scope, other: leases.Scope, expected: bool) -> None:
    assert leases.clash(one, other) is expected
    assert leases.clash(other, one) is expected


def test_no_scope_touches_no_object(root_uri: str) -> None:
    with leases.held(root_uri, record("train"), ()):
        assert not Path(root_uri).exists()


def test_a_run_inside_another_is_covered_by_its_lease(root_uri: str) -> None:
    outer = record("backfill", WEEK)
    with leases.held(root_uri, outer, (("events", WEEK),)):
        inner = leases.held(root_uri, record(), (("events", DAY),), outer.run_id)
        with inner, pytest.raises(ConflictError):  # beside it, a second run of the same backfill
            leases.held(root_uri, record(), (("events", DAY),), outer.run_id).__enter__()
        with pytest.raises(ConflictError, match=outer.run_id):
            leases.held(root_uri, record(), (("events", DAY),)).__enter__()


def test_a_silent_run_is_overtaken_and_may_not_call_itself_finished(
    root_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.02)
    clock, first, second = Clock(), record(), record()
    silent = threading.Event()
    change = leases._change

    def slow_heart(root: str, body: object) -> None:
        if threading.current_thread().name.endswith(first.run_id) and not silent.is_set():
            return
        change(root, body)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(leases, "_change", slow_heart)
    with leases.held(root_uri, first, (("events", DAY),), clock=clock) as lease:
        clock.now += timedelta(seconds=leases.EXPIRY_SECONDS - 1)
        with pytest.raises(ConflictError, match=first.run_id):
            leases.held(root_uri, second, (("events", DAY),), clock=clock).__enter__()
        clock.now += timedelta(seconds=2)
        assert [claim.run_id for claim in leases.dead(root_uri, clock)] == [first.run_id]
        with leases.held(root_uri, second, (("events", DAY),), clock=clock) as taken:
            assert taken.taken_over == [first.run_id]
            silent.set()
            for _ in range(200):
                if lease.lost_to:
                    break
                time.sleep(0.02)
            with pytest.raises(ConflictError, match=f"lost its lease to {second.run_id}"):
                lease.check()
    (buried,) = runs.load_all(root_uri)
    assert (buried.run_id, buried.status) == (first.run_id, "killed")


def test_a_heartbeat_keeps_a_lease(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.02)
    clock = Clock()
    with leases.held(root_uri, record(), (("events", DAY),), clock=clock) as lease:
        for _ in range(3):
            clock.now += timedelta(seconds=leases.EXPIRY_SECONDS - 1)
            wanted = clock.now + timedelta(seconds=leases.EXPIRY_SECONDS)
            for _ in range(200):
                if leases.claims(root_uri)[0].expires == wanted:
                    break
                time.sleep(0.02)
            assert leases.claims(root_uri)[0].expires == wanted
        lease.check()


CHILD = """
import os, signal, sys
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.config import load_config
config = load_config(None, ("lake.root_uri='%s'" % sys.argv[1],))
with record_run("clean_events", config, DateRange.parse("2024-01-09:2024-01-10")) as run:
    print(run.run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_of_this_machine_is_overtaken_at_once(config: Config, root_uri: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, root_uri], capture_output=True, text=True)
    killed = done.stdout.strip()
    assert done.returncode == -9
    assert runs.load_all(root_uri) == []
    assert [claim.run_id for claim in leases.dead(root_uri)] == [killed]
    with record_run("clean_events", config, DAY) as run:
        assert run.facts["leases_taken_over"] == [killed]
    first, second = runs.load_all(root_uri)
    assert (first.run_id, first.status, first.dates) == (killed, "killed", "2024-01-09:2024-01-10")
    assert (second.status, second.facts["leases_taken_over"]) == ("ok", [killed])


def test_a_refused_run_leaves_no_record(config: Config, root_uri: str) -> None:
    holder = record("backfill", WEEK)
    scope = scopes.writes("clean_events", WEEK, config)
    refused = pytest.raises(ConflictError, match=holder.run_id)
    with leases.held(root_uri, holder, scope), refused, record_run("clean_events", config, DAY):
        pytest.fail("it must not start")
    assert runs.load_all(root_uri) == []


def test_many_runs_at_once_never_share_a_range(root_uri: str) -> None:
    """Eight threads, three ranges: a counter per range shows whether two were ever inside."""
    inside: dict[str, int] = {}
    wrong: list[str] = []
    done: list[str] = []

    def one(number: int) -> None:
        day = DateRange.parse(f"2024-01-{10 + number % 3}")
        for _ in range(30):
            try:
                with leases.held(root_uri, record(), (("events", day), ("user_days", day))):
                    inside[str(day)] = inside.get(str(day), 0) + 1
                    if inside[str(day)] > 1:
                        wrong.append(str(day))
                    time.sleep(0.001)
                    inside[str(day)] -= 1
                    done.append(str(day))
            except ConflictError:
                time.sleep(0.002)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert wrong == []
    assert len(set(done)) == 3
    assert holders(root_uri) == []


def test_a_year_of_two_tables_is_one_object(root_uri: str, config: Config) -> None:
    year = DateRange.parse("2024-01-01:2024-12-31")
    with leases.held(root_uri, record(), scopes.writes("clean_events", year, config)):
        assert storage.list_names(storage.join(root_uri, "leases")) == ["held.json"]


@pytest.mark.parametrize(
    ("job", "campaign", "other", "is_refused"),
    [
        ("select_audience", "18", "19", True),  # one ledger per lake: campaigns share their caps
        ("score", "18", "19", False),
        ("score", "18", "18", True),
        ("export_audience", "18", "18", False),  # claims of its own see to it
    ],
)
def test_campaigns_side_by_side(
    config: Config, job: str, campaign: str, other: str, is_refused: bool
) -> None:
    with record_run(job, config, DAY, campaign):
        if is_refused:
            with pytest.raises(ConflictError, match=f"is held by run {job}"):
                record_run(job, config, DAY, other).__enter__()
        else:
            with record_run(job, config, DAY, other):
                pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"claims": [{}]}'])
def test_a_damaged_object_is_named(root_uri: str, content: str) -> None:
    storage.create(storage.join(root_uri, "leases", "held.json"), content.encode(), "r")
    with pytest.raises(DataError, match=r"held\.json is damaged .* delete it when no run"):
        leases.claims(root_uri)


def test_claims_come_back_as_written(root_uri: str) -> None:
    own = record()
    with leases.held(root_uri, own, (("events", DAY), ("assignments", None))):
        (claim,) = leases.claims(root_uri)
        assert claim.scopes == (("events", DAY), ("assignments", None))
        assert asdict(claim.record) == asdict(own)
        path = Path(root_uri) / "leases" / "held.json"
        tree = json.loads(path.read_text())
        tree["claims"][0]["record"]["of_newer_code"] = 1
        path.write_text(json.dumps(tree))
        assert holders(root_uri) == [own.run_id]


@pytest.mark.parametrize("lateness_days", [0, 3, 7])
def test_scopes_are_as_wide_as_the_jobs(tmp_path: Path, lateness_days: int) -> None:
    config = test_config(tmp_path, f"lake.lateness_days={lateness_days}")
    touched = dict(scopes.writes("clean_events", WEEK, config))["user_days"]
    assert touched == events.touched_dates(WEEK, lateness_days)
    assert dict(scopes.writes("sessionize", WEEK, config))["sessions"] == sessions.affected_dates(WEEK)
