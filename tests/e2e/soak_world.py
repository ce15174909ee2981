"""The worlds of the soak: lakes to be harmed, what an unharmed run leaves, and how rows are compared."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from backfill_lake import Lake, clean_pass, group, succeed
from builders import D0
from object_server import make_bucket, reaching
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from store_proxy import Fault, running
from training_jobs import run_job, trained
from training_lake import make_lake
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.lake import storage, tables

#: The eleven days before these are done before a round; the round backfills these.
DAYS = ("2024-01-12", "2024-01-13", "2024-01-14")
_NUM_DAYS = 14
SECONDS = 400
#: How a plan or an error names what has to be added to the same command.
_FAILED = "--reprocess-behavior failed"
#: Calls after which a person would ask for help.
_MAX_CALLS = 4


def difference(expected: DataFrame, found: DataFrame | None) -> tuple[int, int]:
    """Rows that are lost and rows that are too many, in any order, duplicates counted."""
    if found is not None and tables.content_hash(expected) == tables.content_hash(found):
        return 0, 0
    wanted, there = _rows(expected), _rows(found) if found is not None else Counter()
    return (wanted - there).total(), (there - wanted).total()


def _rows(frame: DataFrame) -> "Counter[str]":
    texts = frame.select(F.to_json(F.struct(*sorted(frame.columns))).alias("row")).collect()
    return Counter(row["row"] for row in texts)


class Base:
    """A shop of which the last three days are not done, and a copy in which they are, undisturbed."""

    def __init__(self, folder: Path, spark: SparkSession) -> None:
        self.spark = spark
        self.begun = Lake(folder / "begun", num_days=_NUM_DAYS, num_users=30)
        self.begun.land()
        self.begun.last = "2024-01-11"
        clean_pass(self.begun)
        self.whole = self.copy(folder / "whole")
        succeed(self.whole.backfill("all", first=DAYS[0], last=DAYS[-1]))
        self.names = sorted(self.whole.hashes(spark))

    def copy(self, folder: Path) -> Lake:
        """A lake of its own in which the last three days are not done."""
        lake = Lake(folder, num_days=_NUM_DAYS, num_users=30)
        shutil.copytree(self.begun.root, lake.root)
        return lake

    def difference(self, lake: Lake, names: Iterable[str] = ()) -> tuple[int, int]:
        """Lost and surplus rows over these tables, or all."""
        sums = [0, 0]
        for name in names or self.names:
            there = tables.exists(self.spark, lake.root, name)
            found = tables.read(self.spark, lake.root, name) if there else None
            for place, number in enumerate(difference(tables.read(self.spark, self.whole.root, name), found)):
                sums[place] += number
        return sums[0], sums[1]


class Harmed:
    """One round: a lake, a generator of its own, and the commands of whoever looks after it."""

    def __init__(self, base: Base, folder: Path, rng: random.Random) -> None:
        self.base, self.lake, self.rng = base, base.copy(folder), rng
        self.chunk = ("--chunk-days", str(rng.choice((1, 3))))
        self.said = ""

    def delivery(self, day: str, feed: str = "events") -> Path:
        """The one file of a day's delivery."""
        (path,) = Path(self.lake.root, "raw", feed, f"ingest_date={day}").glob("*.jsonl")
        return path

    def call(
        self,
        *more: str,
        first: str = DAYS[0],
        last: str = DAYS[-1],
        fault: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> int:
        """The exit code of the backfill in a process of its own; what it printed is kept."""
        options = (*self.chunk, *more)
        with group(
            self.lake.child("all", *options, first=first, last=last, fault=fault, environment=environment)
        ) as child:
            self.said, _ = child.communicate(timeout=SECONDS)
        assert not fault or list(Path(self.lake.root).glob(".fault-*")), f"{fault} did not fire: {self.tail}"
        return int(child.returncode)

    @property
    def tail(self) -> str:
        """The last words of the last command."""
        return self.said[-3000:]

    def recover(self, *options: str) -> float:
        """Repeat the command, with what its words ask for, until it ends well; the seconds of that."""
        started = time.monotonic()
        for _ in range(_MAX_CALLS):
            done = self.lake.backfill("all", *self.chunk, *options, first=DAYS[0], last=DAYS[-1])
            words = " ".join(done.output.split())
            if done.exit_code == 0 and _FAILED not in words:
                return time.monotonic() - started
            assert done.exit_code in (0, 3), done.output
            assert _FAILED in words, done.output
            options = tuple(_FAILED.split())
        raise AssertionError(f"{_MAX_CALLS} calls did not end it: {done.output}")

    def difference(self, *names: str) -> tuple[int, int]:
        """Lost and surplus rows over these tables, or all."""
        return self.base.difference(self.lake, names)


#: A day of a shop on ``gs://``: few objects, as each costs requests.
_STORE_TABLES = ("events", "user_days", "session_segments", "sessions")
_STORE_CONFIG = '[lake]\nroot_uri = "{root}"\n[events]\npseudonymise = false\n'
#: What fails for the moment, or whose answer is lost.
_STATUSES = (503, 429, 0)
_PLACES = ("^GET", r"^POST(.|\n)*\.parquet", r"^POST(.|\n)*_delta_log", r"^POST(.|\n)*runs/")


class Store:
    """A day cleaned and cut into sessions: once in a folder in peace, and per round on a spoilt ``gs://``."""

    def __init__(self, folder: Path, spark: SparkSession, server: str) -> None:
        self.folder, self.spark, self.server = folder, spark, server
        folder.mkdir()
        self.quiet = str(folder / "quiet")
        self._deliver(self.quiet)
        for job in ("clean_events", "sessionize"):
            succeed(self._job(self.quiet, job))

    def _deliver(self, root: str) -> None:
        lines = "".join(json.dumps(event) + "\n" for event in _events())
        place = storage.join(root, "raw", "events", f"ingest_date={D0}", "part-0000.jsonl")
        storage.create(place, lines.encode(), "soak")

    def _job(self, root: str, job: str) -> Any:
        config = self.folder / "config.toml"
        config.write_text(_STORE_CONFIG.format(root=root))
        return CliRunner().invoke(app, ["job", job, "--dates", str(D0), "--config", str(config)])

    def spoil(self, rng: random.Random) -> tuple[float, tuple[int, int]]:
        """Both jobs on a store that fails at three to six requests; seconds, and lost and surplus rows."""
        with (
            running(self.server) as proxy,
            pytest.MonkeyPatch.context() as patch,
            reaching(self.spark, proxy.url),
        ):
            patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            root = f"{make_bucket()}/lake"
            self._deliver(root)
            proxy.faults = [
                Fault(rng.choice(_PLACES), rng.choice(_STATUSES), is_done=rng.random() < 0.5)
                for _ in range(rng.randint(3, 6))
            ]
            started = time.monotonic()
            for job in ("clean_events", "sessionize"):
                done = self._job(root, job)
                if done.exit_code == 5:  # the store was refused too often in a row: "run again"
                    done = self._job(root, job)
                succeed(done)
            seconds = time.monotonic() - started
            assert proxy.spoilt, "no request met a fault"
            found = [self._difference(root, name) for name in _STORE_TABLES]
        return seconds, (sum(lost for lost, _ in found), sum(more for _, more in found))

    def _difference(self, root: str, name: str) -> tuple[int, int]:
        return difference(tables.read(self.spark, self.quiet, name), tables.read(self.spark, root, name))


#: One rank and one thread: what goes on after a kill ends bit for bit as if nothing had been.
_ALONE = "training.num_ranks=1"


class Training:
    """A training that nobody disturbs, and per round one that is killed and called again."""

    def __init__(self, folder: Path) -> None:
        config, root = make_lake(folder)
        code, line = run_job(config, _ALONE)
        assert code == 0, line
        self.whole = trained(root)

    def harm(self, folder: Path, rng: random.Random, cuts_checkpoint: bool) -> tuple[float, tuple[int, int]]:
        """Seconds to recover, and whether an epoch or the weights differ (as one lost row).

        ``cuts_checkpoint``: the newest one is damaged too, so that the one before it serves.
        """
        config, root = make_lake(folder)
        epoch = 2 if cuts_checkpoint else rng.randint(1, 2)
        fault = f"train@0-{epoch}-{rng.randint(0, 6)}:{rng.choice(('load', 'step'))}:kill"
        code, line = run_job(config, _ALONE, fault=fault)
        assert code == -signal.SIGKILL, f"{fault}: {line}"
        if cuts_checkpoint:
            newest = max(Path(root, "work").glob("checkpoints-dien-*/*.pt"))
            newest.write_bytes(newest.read_bytes()[: rng.randint(0, 1_000)])
        started = time.monotonic()
        code, line = run_job(config, _ALONE)
        assert code == 0, line
        seconds, found = time.monotonic() - started, trained(root)
        same = all(found[name] == self.whole[name] for name in ("model_version", "epochs"))
        return seconds, (0 if same else 1, 0)


def _events() -> Iterable[dict[str, Any]]:
    nothing = ("visitor_id", "order_id", "user_agent")
    amounts = ("discount_amount", "coupon_amount", "coupon_match_amount")
    for number in range(60):
        when = f"{D0}T{number % 20 + 1:02d}:{7 * number % 60:02d}:00Z"
        names = {"item_id": f"i{number % 9}", "category_id": "c1", "shop_id": "s1"}
        yield {
            "event_id": f"e{number}",
            "user_id": f"u{number % 7}",
            "event_type": "view",
            "event_time": when,
            "ingest_time": when,
            **names,
            "price": 1.5,
            "quantity": 1,
            "device": "web",
            "channel": "site",
            **dict.fromkeys(nothing),
            **dict.fromkeys(amounts, 0.0),
        }
