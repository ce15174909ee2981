"""A Spark task that runs Python: the product's door to ``mapInArrow`` against ``mapInArrow`` itself.

Each side is a process with a session of its own on one core, whose workers have imported what scoring imports
and pass 40 partitions of one row on; a round is one such pass of each. Value: the rival's seconds over ours.

Runs as a program for a side: ``python -m bench.python_tasks ours`` or ``plain``.
"""

import statistics
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bench.run import Claim, in_turns, median_ratio
from bench.served import Served, serve

if TYPE_CHECKING:
    import pyarrow as pa

CLAIMS = ("python_task",)
TASKS, RUNS = 40, 7


def measure(names: tuple[str, ...], runs: int = RUNS) -> list[Claim]:
    """Both sides in turns."""
    sides = {name: Served("bench.python_tasks", name) for name in ("plain", "ours")}
    try:
        rounds = in_turns({name: side.run for name, side in sides.items()}, runs)
    finally:
        for side in sides.values():
            side.end()
    plain, ours = (statistics.median(one[name] for one in rounds) / TASKS * 1e3 for name in sides)
    rival = f"mapInArrow, {plain:.0f} ms a task against {ours:.0f} ms"
    return [Claim(names[0], median_ratio(rounds, "plain", "ours"), "x faster", 2.5, runs, rival)]


def _passed(batches: "Iterable[pa.RecordBatch]") -> "Iterable[pa.RecordBatch]":
    from couponflow.campaign import scoring  # noqa: F401  # what a scoring worker has imported
    from couponflow.models import bundle  # noqa: F401  # torch, too

    yield from batches


def run_side(name: str) -> None:
    """One side."""
    from pyspark.sql import DataFrame

    from couponflow.lake import python_tasks, session
    from couponflow.sections import SparkConfig

    spark = session.start(SparkConfig(master="local[1]"), "bench python_tasks")
    rows = spark.range(0, TASKS, 1, TASKS)
    make = DataFrame.mapInArrow if name == "plain" else python_tasks.map_in_arrow
    frame = make(rows, _passed, "id long")
    serve(frame.write.format("noop").mode("overwrite").save)


if __name__ == "__main__":
    run_side(sys.argv[1])
