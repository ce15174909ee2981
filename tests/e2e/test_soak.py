"""The soak: a fault drawn at random, the rerun that its message names, and the rows of an undisturbed run.

``make soak-faults`` (SEED, ROUNDS) runs it and prints rounds, lost and surplus rows and seconds per fault. A
round is drawn from the seed and its own number alone, so that one of them runs again by its number:
``COUPONFLOW_SOAK_SEED=3 pytest -s -m nightly tests/e2e/test_soak.py -k round017``.
"""

import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import forgetful_store
import pytest
from backfill_lake import tell
from object_server import MISSING, find_server, running
from pyspark.sql import SparkSession
from soak_faults import KINDS, Kind, lost_answer
from soak_world import Base, Harmed, Store, Training

SEED = int(os.environ.get("COUPONFLOW_SOAK_SEED", "0"))
ROUNDS = int(os.environ.get("COUPONFLOW_SOAK_ROUNDS", "50"))

#: Seconds to recover, and lost and surplus rows.
Result = tuple[float, tuple[int, int]]
Case = Callable[[Path, random.Random], Result]


class Soak:
    """All faults that this machine can have, and what became of the rounds."""

    def __init__(self, folder: Path, spark: SparkSession) -> None:
        self.folder, self.results = folder, dict[str, list[Result]]()
        self.base = cache(lambda: Base(folder / "base", spark))
        self.training = cache(lambda: Training(folder / "training"))
        self.cases: dict[str, Case] = {kind.title: self._of(kind) for kind in KINDS}
        self.cases[" 5 training killed"] = self._training(False)
        self.cases["24 training killed, newest checkpoint cut"] = self._training(True)

    def _of(self, kind: Kind) -> Case:
        def run(folder: Path, rng: random.Random) -> Result:
            harmed = Harmed(self.base(), folder, rng)
            return kind.harm(harmed), harmed.difference()

        return run

    def _training(self, cuts_checkpoint: bool) -> Case:
        return lambda folder, rng: self.training().harm(folder, rng, cuts_checkpoint)

    def add_lost_answers(self) -> None:
        """A commit's answer is lost; needs a Java compiler."""
        kind = Kind(23, "answer of a commit lost", lost_answer(forgetful_store.build(self.folder)))
        self.cases[kind.title] = self._of(kind)

    def add_store(self, spark: SparkSession, server: str) -> None:
        """The store of ``gs://`` fails for the moment; needs the local object server."""
        store = cache(lambda: Store(self.folder / "store", spark, server))
        self.cases["28 store fails, answers lost"] = lambda folder, rng: store().spoil(rng)

    def draw(self, number: int) -> tuple[str, random.Random]:
        """The fault of a round: all of them in a drawn order, then in another one."""
        turn, place = divmod(number, len(self.cases))
        names = sorted(self.cases)
        random.Random(f"{SEED} {turn}").shuffle(names)
        return names[place], random.Random(f"{SEED} {number}")

    def show(self) -> None:
        """One line per fault."""
        tell(f"{'fault':48} {'runs':>4} {'lost':>5} {'duplicates':>10} {'seconds to recover':>19}")
        for name, results in sorted(self.results.items()):
            lost, more = (sum(rows[place] for _, rows in results) for place in (0, 1))
            seconds = sorted(seconds for seconds, _ in results)
            span = f"{seconds[0]:.0f} to {seconds[-1]:.0f}" if len(seconds) > 1 else f"{seconds[0]:.0f}"
            tell(f"{name:48} {len(results):4} {lost:5} {more:10} {span:>19}")
        tell(f"seed {SEED}: {sum(map(len, self.results.values()))} runs\n")


@pytest.fixture(scope="module")
def soak(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    folder = tmp_path_factory.mktemp("soak")
    made = Soak(folder, spark)
    if forgetful_store.is_possible():
        made.add_lost_answers()
    else:
        tell(f"not drawn: {forgetful_store.MISSING}")
    if (program := find_server()) is None:
        tell(f"not drawn: {MISSING}")
        yield made
    else:
        with running(program, folder) as server:
            made.add_store(spark, server)
            yield made
    made.show()


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(ROUNDS), ids=lambda number: f"round{number:03}")
def test_a_round_loses_and_doubles_no_row(soak: Soak, tmp_path: Path, number: int) -> None:
    name, rng = soak.draw(number)
    tell(f"seed {SEED}, round {number}: {name}")
    result = soak.cases[name](tmp_path / "lake", rng)
    soak.results.setdefault(name, []).append(result)
    assert result[1] == (0, 0), "rows lost, rows too many"
