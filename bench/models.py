"""Costs of the network by itself: the AUGRU against torch's own GRU, and memory over many epochs."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from bench.run import Claim, in_turns, median_ratio
from couponflow.modelling import ModelConfig, TrainingConfig
from couponflow.models.batch import RANDOM_SIZES, Batch, random_batch
from couponflow.models.dien import Dien
from couponflow.models.layers import GruCell, packing
from couponflow.training import steps, trainer
from couponflow.training.workers import Workers

CLAIMS = ("augru_vs_gru", "memory")
ROWS, STEPS, WIDTH, RUNS = 1024, 100, 36, 7
EPOCHS, WARM_EPOCHS, BATCHES, BATCH, NUM_WIDE = 20, 2, 8, 256, 10


def augru_vs_gru(rows: int = ROWS, steps: int = STEPS) -> Claim:
    """Forward and backward to weights and inputs over full histories, one thread; torch fuses its gates."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cell, gru = GruCell(WIDTH, WIDTH, "augru_paper"), nn.GRU(WIDTH, WIDTH)
    x_TBD = torch.randn(steps, rows, WIDTH, requires_grad=True)
    attention_N = (torch.rand(steps * rows) / steps).requires_grad_()
    layout = packing(torch.full((rows,), steps), steps)

    def ours() -> None:
        states = cell(x_TBD.flatten(0, 1), layout, attention_N)
        torch.autograd.grad(states.square().sum(), [*cell.parameters(), x_TBD, attention_N])

    def theirs() -> None:
        states, _ = gru(x_TBD)
        torch.autograd.grad(states.square().sum(), [*gru.parameters(), x_TBD])

    rounds = in_turns({"ours": ours, "theirs": theirs}, RUNS)
    value = median_ratio(rounds, "ours", "theirs")
    return Claim("augru_vs_gru", value, "x its time", 1.5, RUNS, "torch.nn.GRU", "at_most")


def memory() -> Claim:
    """Growth of the peak from the second epoch to the last, in a process of its own."""
    command = [sys.executable, "-m", "bench.models"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    early, late = map(int, done.stdout.split())
    growth = 100 * (late / early - 1)
    rival = f"its own peak after {WARM_EPOCHS} of {EPOCHS} epochs, {early / 1024:.0f} MiB"
    return Claim("memory", growth, "% growth", 5.0, 1, rival, "at_most")


def peaks(epochs: int = EPOCHS) -> tuple[int, int]:
    """Peak resident KiB of this process after the warm epochs and at the end of a training run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    held = [random_batch(generator, BATCH, max_length=60, num_wide=NUM_WIDE) for _ in range(BATCHES)]
    early = 0

    def train(epoch: int) -> Iterator[Batch]:
        nonlocal early
        if epoch == WARM_EPOCHS + 1:
            early = _peak()
        yield from held

    config = TrainingConfig(max_epochs=epochs, patience=epochs)
    network = Dien(ModelConfig(), RANDOM_SIZES, NUM_WIDE)
    trainer.fit(network, trainer.Rows(train, lambda: held[:2]), config, steps.Objective(1.0), Workers())
    return early, _peak()


def _peak() -> int:
    """Of this program alone: the figure of getrusage starts at that of the process which started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None, "Linux only"
    return int(found[1])


def measure(names: tuple[str, ...]) -> list[Claim]:
    """The named claims."""
    both = {"augru_vs_gru": augru_vs_gru, "memory": memory}
    return [both[name]() for name in names]


if __name__ == "__main__":
    sys.stdout.write(" ".join(map(str, peaks())))
