"""AUGRU: packed loop with a hand-written backward against a masked loop under autograd."""

import numpy as np
import torch
from torch import Tensor

from bench.run import Claim, ratio
from couponflow.models.layers import GruCell, packing

ROWS, STEPS, INPUT, HIDDEN, RUNS = 512, 100, 36, 36, 5


def masked_loop(cell: GruCell, x_BTD: Tensor, attention_BT: Tensor, length_B: Tensor) -> Tensor:
    """Step over every padded position and keep the old state beyond a row's length, [B,H]."""
    state = x_BTD.new_zeros(len(x_BTD), HIDDEN)
    for step in range(x_BTD.shape[1]):
        moved = cell.step(x_BTD[:, step], state, attention_BT[:, step])
        state = torch.where((step < length_B)[:, None], moved, state)
    return state


def compare(name: str, length_B: Tensor, bound: float) -> Claim:
    """One training step (forward and backward) of the last state, both ways, one thread."""
    torch.manual_seed(0)
    cell = GruCell(INPUT, HIDDEN, "augru_paper")
    x_BTD = torch.randn(ROWS, STEPS, INPUT)
    attention_BT = torch.rand(ROWS, STEPS) / STEPS

    def ours() -> Tensor:
        layout = packing(length_B, STEPS)
        state = layout.final(cell(layout.pack(x_BTD), layout, layout.pack(attention_BT)))
        torch.autograd.grad(state.square().sum(), list(cell.parameters()))
        return state.detach()

    def rival() -> Tensor:
        state = masked_loop(cell, x_BTD, attention_BT, length_B)
        torch.autograd.grad(state.square().sum(), list(cell.parameters()))
        return state.detach()

    assert torch.allclose(ours(), rival(), atol=1e-5), "both ways must give one state"
    return Claim(
        f"AUGRU training step, {name}", ratio(rival, ours, RUNS), "x faster", bound, RUNS, "masked loop"
    )


def measure() -> list[Claim]:
    """Full and ragged histories (geometric length, mean about a third of the cap)."""
    torch.set_num_threads(1)
    drawn = np.random.default_rng(0).geometric(3 / STEPS, ROWS)
    ragged = torch.from_numpy(drawn.clip(2, STEPS))
    full = torch.full((ROWS,), STEPS)
    return [compare("full histories", full, 1.2), compare("ragged histories", ragged, 3.0)]
