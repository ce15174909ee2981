"""Run the benchmarks and write ``bench/results.json``: ``python -m bench.run [NAME ...]``.

Each module beside this one has ``measure() -> list[Claim]``. A claim is a ratio against a named rival that
ran in the same process, in turns; it holds or it does not.
"""

import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Claim:
    """One measured ratio; ``bound`` is what it has to reach for the claim to hold."""

    name: str
    value: float
    unit: str
    bound: float
    runs: int
    rival: str

    @property
    def holds(self) -> bool:
        """Whether the measured value reaches the bound."""
        return self.value >= self.bound


def ratio(rival: Callable[[], object], ours: Callable[[], object], runs: int) -> float:
    """Median over rounds of rival seconds / our seconds; both run in turn, after one warm-up each."""
    rival()
    ours()
    return statistics.median(_seconds(rival) / _seconds(ours) for _ in range(runs))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; returns 1 when a claim does not hold."""
    everything = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "run"))
    console = Console()
    claims: list[Claim] = []
    for name in names or everything:
        with console.status(f"measuring {name}"):
            claims += importlib.import_module(f"bench.{name}").measure()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True
    ).stdout.strip()
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    rows = [asdict(claim) | {"holds": claim.holds, "machine": machine, "commit": commit} for claim in claims]
    (FOLDER / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = Table("claim", "measured", "required", "holds", "rival")
    for claim in claims:
        measured = f"{claim.value:.2f} {claim.unit}"
        table.add_row(claim.name, measured, f"{claim.bound:.2f}", "yes" if claim.holds else "NO", claim.rival)
    console.print(table)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
