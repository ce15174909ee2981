"""How many cores a shop of a size takes: arithmetic on measured rates, ``python -m bench.capacity``.

Prints the table of ``deploy/operations.md`` from ``bench/results.json``; ``tests/unit/test_operations.py``
holds the two together. Nothing is measured here, and nothing was measured at these sizes: every figure is a
number of rows over a rate of two cores, as the formulas beside the table say.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import one_day, raw_to_examples, run, selection

#: What is assumed of a shop and of a cluster; change them and print the table anew.
EVENTS_PER_USER_DAY, LOOK_BACK_DAYS, EPOCHS = 2, 91, 5
EFFICIENCY, WINDOW_HOURS, VCPUS = 0.5, 3, 8
SIZES = (1_000_000, 10_000_000, 100_000_000)


@dataclass(frozen=True)
class Rates:
    """Measured, per core and second; ``reopening`` is what a day costs over its share of a full pass."""

    delivered_events: float
    look_back_events: float
    scored_users: float
    chosen_users: float
    trained_rows: float
    reopening: float


def rates(lines: Sequence[Mapping[str, Any]]) -> Rates:
    """Rates off the lines of ``bench/results.json``."""
    by_name = {line["name"]: line for line in lines}

    def value(name: str) -> float:
        return float(by_name[name]["value"])

    def ours(name: str) -> float:
        """Our side of a comparison, the number after `against`."""
        return float(re.sub(",", "", re.search(r"against ([\d,.]+)", by_name[name]["rival"])[1]))  # type: ignore[index]  # the benchmark writes it so

    cores = raw_to_examples.CORES
    seconds = sum(value(name) for name in raw_to_examples.CLAIMS[1:])
    events = value("raw_to_examples") * cores * seconds
    return Rates(
        delivered_events=value("raw_to_examples"),
        look_back_events=events / (cores * value("raw_to_examples_build_examples")),
        scored_users=ours("scoring_vs_padded_pandas_udf") / cores,
        chosen_users=selection.NUM_USERS / (cores * value("selection_scaling")),
        trained_rows=ours("dien_train_vs_best_peer_ragged"),
        reopening=value("one_day_vs_full") * one_day.DAYS,
    )


def core_hours(measured: Rates, users: int) -> dict[str, float]:
    """Core-hours of one day with one campaign, by part; and of one training."""
    events = users * EVENTS_PER_USER_DAY
    return {
        "delivery": measured.reopening * events / measured.delivered_events / 3600,
        "histories": events * LOOK_BACK_DAYS / measured.look_back_events / 3600,
        "scores": users / measured.scored_users / 3600,
        "choice": users / measured.chosen_users / 3600,
        "training": users * EPOCHS / measured.trained_rows / 3600,
    }


def workers(hours: float) -> int:
    """Workers that do so many core-hours inside the window."""
    return math.ceil(hours / (EFFICIENCY * WINDOW_HOURS * VCPUS))


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    measured = rates(lines)
    shown = [
        "| users | delivery | histories | scores | choice | a day | workers | a training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for users in SIZES:
        hours = core_hours(measured, users)
        day = sum(spent for part, spent in hours.items() if part != "training")
        cells = [f"{users:,}", *(f"{spent:,.2f}" for part, spent in hours.items() if part != "training")]
        cells += [f"{day:,.2f}", f"{workers(day)}", f"{hours['training']:,.2f}"]
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown) + "\n"


if __name__ == "__main__":
    stored = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    sys.stdout.write(f"{rates(stored)}\n{table(stored)}")
