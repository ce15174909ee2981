"""The state of a training run between two steps, and its form in a checkpoint.

Weights, optimiser and curves are the same on all ranks. What is a rank's own (its running statistics until
the epoch ends, its random state, its sums of the epoch) is gathered, so that each rank gets its own back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from couponflow.errors import DataError
from couponflow.training import devices, metrics
from couponflow.training.workers import Workers


@dataclass(frozen=True)
class Epoch:
    """Curves of one epoch; losses are global means, the label loss unweighted by alpha.

    ``train_loss_by_rank``: each rank's own sum over its own weight, 0 for a rank without rows.
    ``learning_rate``: that of the epoch's last step.
    """

    epoch: int
    train_loss: float
    auxiliary_loss: float
    valid_log_loss: float
    valid_auc: float
    train_loss_by_rank: tuple[float, ...] = ()
    learning_rate: float = 0.0


@dataclass
class Fitted:
    """The best epoch of a run: its weights and its validation rows as scored then.

    ``valid_logit``, ``valid_label`` hold every rank's rows, by rank and in the order fed.
    """

    state: dict[str, Tensor]
    best: Epoch
    epochs: list[Epoch]
    valid_logit: metrics.Floats
    valid_label: metrics.Floats
    train_rows: int
    seconds: float = field(default=0.0, compare=False)

    def curves(self) -> list[dict[str, Any]]:
        """The epochs as plain dicts."""
        return [asdict(epoch) for epoch in self.epochs]


@dataclass
class Progress:
    """How far a run is: ``step`` steps of ``epoch`` are taken, ``steps`` in all.

    ``totals``: label loss sum, label weight, auxiliary sum, auxiliary count of this epoch over all ranks;
    ``own``: label loss sum, label weight, rows of this rank. ``rate_scale`` is what plateaus have left of the
    learning rate, ``halved_epoch`` when it was last halved.
    """

    epoch: int = 1
    step: int = 0
    steps: int = 0
    rate_scale: float = 1.0
    halved_epoch: int = 0
    seconds: float = 0.0
    totals: metrics.Floats = field(default_factory=lambda: np.zeros(4))
    own: metrics.Floats = field(default_factory=lambda: np.zeros(3))
    epochs: list[Epoch] = field(default_factory=list)
    best: Fitted | None = None

    def next_epoch(self) -> None:
        """Begin the epoch after this one."""
        self.epoch, self.step = self.epoch + 1, 0
        self.totals, self.own = np.zeros(4), np.zeros(3)


def snapshot(
    network: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, workers: Workers
) -> dict[str, Any]:
    """All that a run continues from, as plain values and tensors; collective."""
    own = np.concatenate(
        [progress.own, _buffers(network).numpy(), devices.random_state(network).double().numpy()]
    )
    ranks = workers.gather(own).reshape(workers.size, -1)
    best = progress.best
    return {
        "epoch": progress.epoch,
        "step": progress.step,
        "steps": progress.steps,
        "rate_scale": progress.rate_scale,
        "halved_epoch": progress.halved_epoch,
        "seconds": progress.seconds,
        "totals": torch.from_numpy(progress.totals),
        "ranks": torch.from_numpy(ranks),
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
        "epochs": [asdict(epoch) for epoch in progress.epochs],
        "best": None
        if best is None
        else {
            "number": best.best.epoch,
            "state": best.state,
            "logit": torch.from_numpy(best.valid_logit),
            "label": torch.from_numpy(best.valid_label),
            "rows": best.train_rows,
        },
    }


def restore(
    tree: Mapping[str, Any], network: nn.Module, optimiser: torch.optim.Optimizer, workers: Workers
) -> Progress:
    """Put network, optimiser and random state where ``snapshot`` found them; collective.

    Raises:
        DataError: the tree is of another network, or ranks read different ones; nothing can be trusted then.
    """
    try:
        network.load_state_dict(tree["network"])
        optimiser.load_state_dict(tree["optimiser"])
        totals = tree["totals"].numpy().copy()
        own = tree["ranks"][workers.rank]
        held = _buffers(network).numel()
        _set_buffers(network, own[3 : 3 + held])
        devices.set_random_state(network, own[3 + held :].to(torch.uint8))
        epochs = [
            Epoch(**{**found, "train_loss_by_rank": tuple(found["train_loss_by_rank"])})
            for found in tree["epochs"]
        ]
        progress = Progress(
            int(tree["epoch"]),
            int(tree["step"]),
            int(tree["steps"]),
            float(tree["rate_scale"]),
            int(tree["halved_epoch"]),
            float(tree["seconds"]),
            totals,
            own[:3].numpy().copy(),
            epochs,
        )
        if (best := tree["best"]) is not None:
            progress.best = Fitted(
                best["state"],
                epochs[int(best["number"]) - 1],
                epochs,
                best["logit"].numpy().copy(),
                best["label"].numpy().copy(),
                int(best["rows"]),
            )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the checkpoint is of another network or of other code ({type(error).__name__}: {reason}); "
            "pass --from-scratch to job train to begin again"
        ) from error
    _agree(network, progress, workers)
    return progress


def _agree(network: nn.Module, progress: Progress, workers: Workers) -> None:
    """Ranks that stand on different checkpoints would train on without an error."""
    weights = sum(float(parameter.detach().double().abs().sum()) for parameter in network.parameters())
    own = [float(progress.epoch), float(progress.step), weights]
    found = workers.gather(own).reshape(workers.size, -1)
    if not (found == found[0]).all():
        raise DataError(
            f"ranks resume from different checkpoints (epoch, step and weights {found.tolist()}); ranks must "
            "read the same lake, or pass --from-scratch to job train to begin again"
        )


def _buffers(network: nn.Module) -> Tensor:
    """All buffers one after another, float64 on the host: exact for single precision and counters."""
    held = [buffer.detach().cpu().reshape(-1).double() for buffer in network.buffers()]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *held])


def _set_buffers(network: nn.Module, values: Tensor) -> None:
    place = 0
    for buffer in network.buffers():
        buffer.copy_(values[place : place + buffer.numel()].view_as(buffer))
        place += buffer.numel()
