"""The faults that the soak draws from: each harms a lake, and says how long it took to be whole again.

Numbers are those of the project's list of faults. A fault that ends the command is followed by the command
that its message names; one that must not end it is asked for exit code 0.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import forgetful_store
from backfill_lake import group, kill
from soak_world import DAYS, SECONDS, Harmed

#: Tables that every backfill of the last three days writes, and the jobs that write them.
TABLES = (
    "events",
    "user_days",
    "orders",
    "session_segments",
    "sessions",
    "conversions",
    "training_examples",
)
JOBS = ("clean_events", "clean_feeds", "sessionize", "attribute_conversions", "build_examples")
_AFTER_CLEANING = ("session_segments", "sessions", "conversions", "training_examples")
_WRITE_POINTS = ("before_write", "during_write", "after_commit")
_RUN_POINTS = ("before_run", "before_record", "after_record")
#: What a disk that is full, or a worker that is lost without a second try, ends with.
_INFRASTRUCTURE, _CONFLICT, _DATA = 5, 4, 3
_KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Kind:
    """One fault: its number, its name, and what does it; returns the seconds to recover."""

    number: int
    name: str
    harm: Callable[[Harmed], float]

    @property
    def title(self) -> str:
        """As the table shows it."""
        return f"{self.number:2} {self.name}"


def _point(rng: random.Random) -> str:
    """A place in a table's write or in a job's run, by day where the job has days."""
    if rng.random() < 0.4:
        stage, point = rng.choice(JOBS), rng.choice(_RUN_POINTS)
        return f"{stage}:{point}"
    return f"{rng.choice(TABLES)}:{rng.choice(_WRITE_POINTS)}"


def _worker(harmed: Harmed) -> float:
    """A Python worker dies where tasks are repeated (nothing is seen of it) or never are (exit code 5)."""
    fault = f"{harmed.rng.choice(TABLES)}:during_write:kill_worker"
    if harmed.rng.random() < 0.5:
        return _unnoticed(harmed, fault, "local[2,4]")
    return _ended(harmed, fault, _INFRASTRUCTURE, "--set", "spark.master=local[2]")


def _executor(harmed: Harmed) -> float:
    fault = f"{harmed.rng.choice(TABLES)}:during_write:kill_executor"
    return _unnoticed(harmed, fault, "local-cluster[2,1,1024]")


def _unnoticed(harmed: Harmed, fault: str, master: str) -> float:
    started = time.monotonic()
    assert harmed.call("--set", f"spark.master={master}", fault=fault) == 0, harmed.tail
    return time.monotonic() - started


def _ended(harmed: Harmed, fault: str, code: int, *more: str) -> float:
    assert harmed.call(*more, fault=fault) == code, f"{fault}: {harmed.tail}"
    return harmed.recover()


def _driver(harmed: Harmed) -> float:
    return _ended(harmed, f"{_point(harmed.rng)}:kill", _KILLED)


def _driver_at_any_moment(harmed: Harmed) -> float:
    """The whole process group, so many seconds after so many runs."""
    records = harmed.lake.num_records() + harmed.rng.randint(0, 3)
    pause = harmed.rng.uniform(0.0, 3.0)
    with group(harmed.lake.child("all", *harmed.chunk, first=DAYS[0], last=DAYS[-1])) as child:
        deadline = time.monotonic() + SECONDS
        while harmed.lake.num_records() < records and time.monotonic() < deadline:
            assert child.poll() is None, child.communicate()[0]
            time.sleep(0.05)
        time.sleep(pause)
        assert child.poll() is None, "the backfill ended before it was to be killed"
        kill(child)
    return harmed.recover()


def _full_disk(harmed: Harmed) -> float:
    point = harmed.rng.choice(_WRITE_POINTS[:2])
    return _ended(harmed, f"{harmed.rng.choice(TABLES)}:{point}:enospc", _INFRASTRUCTURE)


def _corrupt_delivery(harmed: Harmed) -> float:
    """Refused, named, delivered again."""
    path = harmed.delivery(harmed.rng.choice(DAYS), harmed.rng.choice(("events", "orders")))
    content = path.read_bytes()
    path.write_bytes(harmed.rng.randbytes(2_000))
    assert harmed.call() == _DATA, harmed.tail
    assert path.name in harmed.said
    path.write_bytes(content)
    return harmed.recover()


def _cut_delivery(harmed: Harmed) -> float:
    """Nothing tells a file that ends too early from a short day; delivered again, its day is done again."""
    path = harmed.delivery(harmed.rng.choice(DAYS))
    content = path.read_bytes()
    path.write_bytes(content[: harmed.rng.randrange(1, len(content) - 1)])
    assert harmed.call() == 0, harmed.tail
    path.write_bytes(content)
    return harmed.recover("--reprocess-behavior", "completed")


def _drift(harmed: Harmed) -> float:
    """A column is gone."""
    path = harmed.delivery(harmed.rng.choice(DAYS))
    content = path.read_bytes()
    column = harmed.rng.choice(("item_id", "event_time", "event_type"))
    rows = [json.loads(line) for line in content.splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != column}) + "\n" for r in rows))
    assert harmed.call() == _DATA, harmed.tail
    assert column in harmed.said
    path.write_bytes(content)
    return harmed.recover()


def _same_file_twice(harmed: Harmed) -> float:
    """On its day, or on a later one too: at once nothing but ``events`` and ``quarantine`` knows of it."""
    path = harmed.delivery(DAYS[0])
    copy = path.parents[1] / f"ingest_date={harmed.rng.choice(DAYS)}" / "part-0001.jsonl"
    shutil.copyfile(path, copy)
    assert harmed.call() == 0, harmed.tail
    assert harmed.difference(*_AFTER_CLEANING) == (0, 0)
    copy.unlink()
    return harmed.recover("--reprocess-behavior", "completed")


def _missing_delivery(harmed: Harmed) -> float:
    day = harmed.rng.choice(DAYS)
    path = harmed.delivery(day, harmed.rng.choice(("events", "orders")))
    away = path.parent.rename(path.parents[2] / "late")
    assert harmed.call() == _DATA, harmed.tail
    assert day in harmed.said
    away.rename(path.parent)
    return harmed.recover()


def _leftovers(harmed: Harmed) -> float:
    """What a writer that died has left: files that no commit names."""
    table = Path(harmed.lake.root, "tables", harmed.rng.choice(("events", "sessions", "training_examples")))
    data = sorted(path for path in table.rglob("*.parquet") if "_delta_log" not in path.parts)
    orphan = harmed.rng.choice(data)
    shutil.copyfile(orphan, orphan.with_name("part-00000-orphan.parquet"))
    shutil.copyfile(orphan, orphan.with_name("part-00001-half.parquet"))
    os.truncate(orphan.with_name("part-00001-half.parquet"), orphan.stat().st_size // 2)
    (table / "_temporary" / "0").mkdir(parents=True)
    shutil.copyfile(orphan, table / "_temporary" / "0" / orphan.name)
    started = time.monotonic()
    assert harmed.call() == 0, harmed.tail
    return time.monotonic() - started


def _half_commit(harmed: Harmed) -> float:
    """The newest commit of a table is cut; somebody brings the file back."""
    log = Path(harmed.lake.root, "tables", harmed.rng.choice(("events", "user_days")), "_delta_log")
    newest = max(log.glob("*.json"))
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    assert harmed.call() == _DATA, harmed.tail
    assert "its log is damaged" in " ".join(harmed.said.split()), harmed.tail
    newest.write_bytes(content)
    return harmed.recover()


def _overlapping(harmed: Harmed) -> float:
    """Two backfills at once, of the same days or of one in common: one is refused and comes later."""
    second = harmed.rng.choice((DAYS[0], DAYS[1]))
    first_last = DAYS[-1] if second == DAYS[0] else DAYS[1]
    with (
        group(harmed.lake.child("all", *harmed.chunk, first=DAYS[0], last=first_last)) as one,
        group(harmed.lake.child("all", *harmed.chunk, first=second, last=DAYS[-1])) as other,
    ):
        said = [child.communicate(timeout=SECONDS)[0] for child in (one, other)]
    codes = sorted((one.returncode, other.returncode))
    assert codes == [0, _CONFLICT], said
    assert any("is held by run" in " ".join(text.split()) for text in said)
    return harmed.recover()


def _killed_between_days(harmed: Harmed) -> float:
    """In the middle of three days, done one by one."""
    harmed.chunk = ("--chunk-days", "1")
    stage, point = harmed.rng.choice((("events", "before_write"), ("clean_events", "before_record")))
    return _ended(harmed, f"{stage}@{DAYS[1]}:{point}:kill", _KILLED)


def _older_after_newer(harmed: Harmed) -> float:
    """The newest day first, then all of them backwards, killed on the way."""
    assert harmed.call(first=DAYS[-1]) == 0, harmed.tail
    harmed.chunk = ("--chunk-days", "1", "--run-backwards")
    day = date.fromisoformat(DAYS[0]) + timedelta(days=harmed.rng.randint(0, 1))
    return _ended(harmed, f"events@{day}:{harmed.rng.choice(_WRITE_POINTS)}:kill", _KILLED)


def lost_answer(jar: Path) -> Callable[[Harmed], float]:
    """After a drawn number of commits one is written and the writer hears that it failed."""

    def harm(harmed: Harmed) -> float:
        wish = f"{harmed.rng.randint(0, 12)}:{harmed.rng.choice(('lost', 'exists'))}"
        environment = {
            "PYSPARK_SUBMIT_ARGS": forgetful_store.submit_arguments(jar),
            forgetful_store.VARIABLE: wish,
        }
        started = time.monotonic()
        assert harmed.call(environment=environment) == 0, harmed.tail
        assert "answer lost" in harmed.said, harmed.tail
        return time.monotonic() - started

    return harm


KINDS = (
    Kind(1, "Python worker killed", _worker),
    Kind(2, "executor killed", _executor),
    Kind(3, "driver killed at a point of a write or run", _driver),
    Kind(3, "driver, JVM and workers killed at any moment", _driver_at_any_moment),
    Kind(11, "disk full", _full_disk),
    Kind(12, "delivery corrupt", _corrupt_delivery),
    Kind(12, "delivery cut", _cut_delivery),
    Kind(13, "column missing", _drift),
    Kind(14, "file delivered twice", _same_file_twice),
    Kind(17, "delivery missing", _missing_delivery),
    Kind(19, "leftovers of a dead writer", _leftovers),
    Kind(19, "commit cut", _half_commit),
    Kind(20, "overlapping backfills", _overlapping),
    Kind(21, "killed in the middle of days", _killed_between_days),
    Kind(22, "older days after newer, killed", _older_after_newer),
)
