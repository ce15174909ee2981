"""Run the benchmarks and write ``bench/results.json``: ``python -m bench.run [NAME ...]``.

Each module beside this one that declares ``CLAIMS`` has ``measure(names) -> list[Claim]``. A claim is a
figure of one run, most often a ratio against a named rival that ran in turns with ours; it holds or not.
A NAME is a module or a claim; claims that are not measured keep their old lines in the file.
"""

import ast
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
Action = Callable[[], object]
Direction = Literal["at_least", "at_most"]


@dataclass(frozen=True)
class Claim:
    """One measured figure.

    ``bound`` is what it has to reach (``at_least``) or to stay within (``at_most``); without a bound it is
    reported only and holds.
    """

    name: str
    value: float
    unit: str
    bound: float | None
    runs: int
    rival: str
    direction: Direction = "at_least"

    @property
    def holds(self) -> bool:
        """Whether the measured value is within the bound."""
        if self.bound is None:
            return True
        return self.value >= self.bound if self.direction == "at_least" else self.value <= self.bound

    @property
    def required(self) -> str:
        """The bound as text."""
        if self.bound is None:
            return "reported"
        return f"{'>=' if self.direction == 'at_least' else '<='} {self.bound:g}"

    def line(self, machine: str, commit: str) -> dict[str, object]:
        """The claim as it is stored."""
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "bound": self.bound,
            "holds": self.holds,
            "runs": self.runs,
            "rival": self.rival,
            "machine": machine,
            "commit": commit,
        }


def ratio(rival: Action, ours: Action, runs: int) -> float:
    """Median over rounds of rival seconds / our seconds; both run in turn, after one warm-up each."""
    rounds = in_turns({"rival": rival, "ours": ours}, runs)
    return median_ratio(rounds, "rival", "ours")


def in_turns(
    actions: dict[str, Action], runs: int, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, float]]:
    """Seconds of each action in each round, after one warm-up each; ``clock`` says seconds of what."""
    for action in actions.values():
        action()
    return [{name: _seconds(action, clock) for name, action in actions.items()} for _ in range(runs)]


def median_ratio(rounds: list[dict[str, float]], above: str, below: str) -> float:
    """Median over rounds of one action's seconds divided by another's."""
    return statistics.median(seconds[above] / seconds[below] for seconds in rounds)


def _seconds(action: Action, clock: Callable[[], float]) -> float:
    start = clock()
    action()
    return clock() - start


def declared() -> dict[str, tuple[str, ...]]:
    """The claims of each module, read off its text: nothing heavy is imported."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CLAIMS":
                found[path.stem] = tuple(ast.literal_eval(node.value))
    return found


def chosen(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The claims to measure, by module; all without names.

    Raises:
        SystemExit: a name is neither a module nor a claim.
    """
    modules = declared()
    wanted = list(names) or list(modules)
    known = set(modules).union(*modules.values())
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(
            f"bench: {unknown[0]!r} is neither a benchmark nor a claim; one of {', '.join(sorted(known))}"
        )
    return {
        module: kept
        for module, claims in modules.items()
        if (kept := tuple(claim for claim in claims if module in wanted or claim in wanted))
    }


def machine() -> str:
    """Processor, cores and Python, as one line."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    name = model[1] if model else platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def store(claims: list[Claim]) -> None:
    """Put the measured claims into the file, in place of their old lines."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True
    ).stdout.strip()
    known = {name for names in declared().values() for name in names}
    held = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    lines = {line["name"]: line for line in held if line["name"] in known}
    lines |= {claim.name: claim.line(machine(), commit) for claim in claims}
    ordered = [lines[name] for name in sorted(lines)]
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def measured(module: str, names: tuple[str, ...]) -> list[Claim]:
    """The claims of a benchmark, measured in a process of its own: with a heap and caches of its own, too.

    Raises:
        Exception: what the benchmark raised.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(_measure, module, names).result()


def _measure(module: str, names: tuple[str, ...]) -> list[Claim]:
    sys.path.append(str(FOLDER.parent / "tests"))  # the stand-ins of the cloud's services
    found: list[Claim] = importlib.import_module(f"bench.{module}").measure(names)
    return found


def main(names: list[str]) -> int:
    """Run the named benchmarks or claims, or all; returns 1 when one fails or a claim does not hold."""
    console = Console()
    claims: list[Claim] = []
    failed: list[str] = []
    for module, wanted in chosen(names).items():
        start = time.perf_counter()
        try:
            with console.status(f"measuring {module}: {', '.join(wanted)}"):
                claims += measured(module, wanted)
        except Exception:  # the others are still worth measuring
            console.print_exception()
            failed.append(module)
        console.print(f"{module}: {time.perf_counter() - start:.0f} s")
        store(claims)  # what is measured stays, whatever comes after
    table = Table("claim", "measured", "required", "holds", "rival")
    for claim in claims:
        holds = "yes" if claim.holds else "NO"
        table.add_row(claim.name, f"{claim.value:.2f} {claim.unit}", claim.required, holds, claim.rival)
    console.print(table)
    if failed:
        console.print(f"failed, so nothing is said of them: {', '.join(failed)}")
    return 0 if not failed and all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
