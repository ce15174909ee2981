"""Training and scoring speed of the network against the DIEN of public packages.

Run in an environment of its own (`make bench-peers`): the packages' pins exclude ours. Protocol: the cell of
``bench.widths`` (1024 rows, 100 steps, hidden width 36, 100,000 items), one thread, Adam, default allocator;
batches are collated before the clock; all implementations are stepped in turn in one process, a warm-up each,
then the rounds. A figure is the median of the rounds' ratios. Ours is stepped by the trainer's own functions,
finiteness checks and clipping included. ``bench.peer_models`` says how the peers differ. The best peer in
training is the fastest of those that have an auxiliary loss, in scoring the fastest of all.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.run import Claim, in_turns, median_ratio

CLAIMS = (
    "dien_train_vs_deepctr_padded",
    "dien_train_vs_deepctr_ragged",
    "dien_train_vs_best_peer_padded",
    "dien_train_vs_best_peer_ragged",
    "dien_infer_vs_deepctr_padded",
    "dien_infer_vs_deepctr_ragged",
    "dien_infer_vs_best_peer_padded",
    "dien_infer_vs_best_peer_ragged",
)
BOUNDS = dict(zip(CLAIMS, (3.0, 5.0, 1.3, 2.0, 4.0, 8.0, 1.4, 2.0), strict=True))
ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".tools" / "peers" / "bin" / "python"
RUNS, BATCHES = 7, 2
OURS, REFERENCE, WITHOUT_AUXILIARY = "couponflow", "deepctr-torch", "fuxictr"
Rounds = list[dict[str, float]]


def measure(names: tuple[str, ...]) -> list[Claim]:
    """Claims of one mode and shape come from the same rounds."""
    if not PYTHON.exists():
        sys.exit(f"bench: {PYTHON.relative_to(ROOT)} does not exist; run `make bench-peers` first")
    return [claim for cell in cells(names) for claim in claims_of(cell, _in_their_environment(cell), names)]


def cells(names: tuple[str, ...]) -> list[str]:
    """The rounds that some claims need: ``<train|infer>_<padded|ragged>``."""
    return list(dict.fromkeys(f"{name.split('_')[1]}_{name.rsplit('_', 1)[1]}" for name in names))


def claims_of(cell: str, rounds: Rounds, names: tuple[str, ...]) -> list[Claim]:
    """The named claims of one cell."""
    mode, shape = cell.split("_")
    speeds = {name: 1024 / median(seconds[name] for seconds in rounds) for name in rounds[0]}
    counted = [name for name in speeds if name != OURS and (mode, name) != ("train", WITHOUT_AUXILIARY)]
    found = []
    for kind, peer in (("deepctr", REFERENCE), ("best_peer", max(counted, key=speeds.__getitem__))):
        if (name := f"dien_{mode}_vs_{kind}_{shape}") in names:
            rival = f"{peer}, {speeds[peer]:,.0f} rows/s against {speeds[OURS]:,.0f}"
            value = median_ratio(rounds, peer, OURS)
            found.append(Claim(name, value, "x faster", BOUNDS[name], len(rounds), rival))
    return found


def _in_their_environment(cell: str) -> Rounds:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'lib'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), "-m", "bench.peers", cell]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rounds: Rounds = json.loads(done.stdout.splitlines()[-1])  # a package may greet first
    return rounds


def rounds_of(cell: str, runs: int = RUNS) -> Rounds:
    """Seconds per step of every implementation in each round; for the peers' environment."""
    import torch

    from bench.peer_models import MAKERS
    from bench.widths import make_rows

    torch.set_num_threads(1)
    mode, shape = cell.split("_")
    batches = [make_rows(shape == "ragged", seed) for seed in range(BATCHES)]
    made = {name: make(batches) for name, make in MAKERS.items()}

    def action(one: Any) -> Callable[[], None]:
        turn = iter(range(sys.maxsize))

        def train() -> None:
            one.step(next(turn) % BATCHES)

        @torch.inference_mode()
        def infer() -> None:
            one.score(next(turn) % BATCHES)

        return train if mode == "train" else infer

    return in_turns({name: action(one) for name, one in made.items()}, runs)


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(rounds_of(sys.argv[1])) + "\n")
