"""Run the verdicts: ``python -m bench.quality [NAME ...] [--set section.name=value ...]``.

Names are experiments: rolling, and those of ``synthetic.EXPERIMENTS``; all without names. Results of what was
run replace their lines in ``bench/quality.json``; a run with ``--set`` of anything but ``lake.root_uri`` is a
trial, whose figures are only printed.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.quality import rolling, synthetic, tables
from bench.quality.synthetic import Plan
from bench.quality.verdicts import Found
from bench.run import machine
from couponflow.config import load_config
from couponflow.errors import CouponflowError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "quality.json"
ROLLING = "rolling"
NAMES = (ROLLING, *synthetic.EXPERIMENTS)


def main(argv: list[str]) -> int:
    """Run the named experiments; 0 when all their verdicts hold, 1 when one does not."""
    parser = argparse.ArgumentParser(prog="bench.quality", description="Verdicts on data nobody tuned on.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the headline difference (3)")
    parser.add_argument("--brief", action="store_true", help="only the models that a verdict needs")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="section.name=value")
    parser.add_argument("--markdown", action="store_true", help="print the stored results as Markdown")
    asked = parser.parse_args(argv)
    if unknown := [name for name in asked.names if name not in NAMES]:
        parser.error(f"{unknown[0]!r} is no experiment; one of {', '.join(NAMES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    console = Console()
    if asked.markdown:
        console.print(tables.markdown(json.loads(RESULTS.read_text(encoding="utf-8"))), soft_wrap=True)
        return 0
    torch.set_num_threads(1)  # a run repeats bit for bit
    is_trial = any(not text.startswith("lake.root_uri=") for text in asked.overrides)
    holds = True
    for name in asked.names or NAMES:
        start = time.monotonic()
        try:
            found = experiment(name, Plan(asked.seeds, tuple(asked.overrides), asked.brief))
        except CouponflowError as error:
            console.print(f"{name}: {error}")
            return error.exit_code
        seconds = time.monotonic() - start
        show(console, name, found, seconds)
        holds = holds and all(verdict.holds for verdict in found.verdicts)
        if not is_trial:
            store(name, found, seconds)  # what is measured stays, whatever comes after
    return 0 if holds else 1


def experiment(name: str, plan: Plan) -> Found:
    """What an experiment finds.

    Raises:
        CouponflowError: ``rolling`` without the examples of a finished run.
    """
    if name == ROLLING:
        return rolling.run(load_config(synthetic.ENVIRONMENTS / "local.toml", plan.overrides))
    return synthetic.EXPERIMENTS[name](plan)


def store(name: str, found: Found, seconds: float, path: Path = RESULTS) -> None:
    """Put an experiment's lines into the file, in place of its old ones."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    held[name] = {
        "verdicts": [verdict.line(machine(), commit) for verdict in found.verdicts],
        "ladder": found.ladder_lines(),
        "seconds": round(seconds),
    }
    ordered = {key: held[key] for key in NAMES if key in held}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def show(console: Console, name: str, found: Found, seconds: float) -> None:
    """The verdicts and the ladder of an experiment as tables."""
    table = Table(
        "verdict", "measured", "interval", "required", "holds", "rival", title=f"{name}, {seconds:.0f} s"
    )
    for verdict in found.verdicts:
        low, high = verdict.interval or (float("nan"), float("nan"))
        table.add_row(
            verdict.name,
            f"{verdict.value:+.4f} {verdict.unit}",
            f"[{low:+.4f}, {high:+.4f}]" if verdict.interval else "",
            verdict.rule,
            "yes" if verdict.holds else "NO",
            verdict.rival,
        )
    console.print(table)
    for line in found.ladder_lines():
        console.print(json.dumps(line), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
