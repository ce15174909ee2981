"""One step of training: losses, the same gradients on all ranks, and what to say when one is not finite.

Losses are global sums over global counts, whatever the ranks: rank r minimises
``local_sum * ranks / global_count`` for the label loss and for the auxiliary loss, so that the average of the
ranks' gradients is the gradient of the global means. Gradients are dense, those of embeddings too: one
exchange averages all of them. It is the only one a step waits for: the counts travel during the forward pass,
the sums during the backward pass.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couponflow.errors import DataError
from couponflow.models.batch import Batch
from couponflow.training import devices
from couponflow.training.workers import Workers

#: Where rows of the batch that was fed last are stored; all of them when none is named.
Locate = Callable[[Sequence[int]], str]


def nowhere(rows: Sequence[int]) -> str:
    """For rows that come from no file."""
    return "rows of unknown place"


class Output(Protocol):
    """What a network returns for a batch; ``models.dien.Output`` is one."""

    @property
    def logits(self) -> Tensor:
        """Float [B]."""

    @property
    def aux_sum(self) -> Tensor:
        """Scalar sum of auxiliary losses over the batch's ``num_pairs``."""


@dataclass(frozen=True)
class Objective:
    """What a step minimises, and how exactly.

    ``auxiliary_weight`` is alpha of the auxiliary loss. ``regulariser`` gives a term of the loss, the same on
    all ranks; no curve shows it. ``is_half``: gradients travel in half precision. ``is_mixed``: matrix
    products of the forward pass are in bfloat16, and those of its gradients with them.
    """

    auxiliary_weight: float
    regulariser: Callable[[Batch], Tensor] | None = None
    is_half: bool = False
    is_mixed: bool = False


def backward(
    network: nn.Module,
    batch: Batch,
    objective: Objective,
    workers: Workers,
    locate: Locate = nowhere,
) -> tuple[float, float, float, float, float, float]:
    """Leave the gradient of the global loss in every parameter, the same on all ranks.

    Returns this step's global label loss sum, label weight, auxiliary sum and auxiliary count, then this
    rank's own label loss sum and label weight.

    Raises:
        DataError: anything is not finite on any rank; raised on all ranks, no parameter has moved.
    """
    network.zero_grad(set_to_none=False)
    own_weight = float(batch.weight.sum())
    counting = workers.start_sum("counts", [own_weight, batch.num_pairs])
    batch = batch.to(devices.of(network))
    with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=objective.is_mixed):
        output = cast(Output, network(batch))
    label_sum = (
        F.binary_cross_entropy_with_logits(output.logits, batch.label, reduction="none") * batch.weight
    ).sum()
    # One wait for the device.
    local = torch.stack([part.detach().double() for part in (label_sum, output.aux_sum)]).tolist()
    summing = workers.start_sum("losses", local)
    label_count, aux_count = counting().tolist()
    loss = label_sum * (workers.size / label_count) if label_count else label_sum * 0.0
    if objective.auxiliary_weight and aux_count:
        loss = loss + output.aux_sum * (objective.auxiliary_weight * workers.size / aux_count)
    if objective.regulariser is not None:
        loss = loss + objective.regulariser(batch)
    if loss.requires_grad:
        loss.backward()
    parameters = list(network.parameters())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    if objective.is_half and workers.size > 1:
        flat = flat.half()
    is_sound = bool(torch.isfinite(flat).all())
    # After averaging, a value that is not finite anywhere is not finite everywhere: one exchange does both.
    flat = workers.average(flat)
    sums = summing().tolist()
    if not np.isfinite(sums).all():
        is_sound = bool(np.isfinite(local).all())
        raise _not_finite("loss", "" if is_sound else _suspects(network, batch, locate), workers)
    if not torch.isfinite(flat).all():
        raise _not_finite("gradient", "" if is_sound else _suspects(network, batch, locate), workers)
    place = 0
    for gradient in gradients:
        gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
        place += gradient.numel()
    return sums[0], label_count, sums[1], aux_count, local[0], own_weight


def _suspects(network: nn.Module, batch: Batch, locate: Locate) -> str:
    """Where the rows without a finite score are stored, or all of the batch if each row alone has one.

    Scored in eval mode, in which rows do not touch each other, and with neutral running statistics: a bad row
    has spoilt those of the step.
    """
    was_training = network.training
    network.eval()
    norms = _norms(network)
    spoilt = [copy.deepcopy(norm.state_dict()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    with torch.no_grad():
        logits = cast(Output, network(batch)).logits
    for norm, state in zip(norms, spoilt, strict=True):
        norm.load_state_dict(state)
    network.train(was_training)
    return locate(torch.nonzero(~torch.isfinite(logits)).reshape(-1).tolist())


def _not_finite(what: str, suspects: str, workers: Workers) -> DataError:
    """The same error on every rank, naming the ranks and rows it came from; collective."""
    own = f"rank {workers.rank} ({suspects})\n" if suspects else ""
    wrong = bytes(workers.gather(list(own.encode())).astype(np.uint8)).decode().splitlines()
    return DataError(
        f"{what} is not finite on {', '.join(wrong) or 'no rank alone'}; no step was taken and the last "
        "checkpoint stays: check these rows, or lower training.learning_rate"
    )


def average_statistics(network: nn.Module, workers: Workers, num_rows: int) -> None:
    """Give every rank the running statistics of all, so that what is saved is not rank 0's alone.

    A rank counts by its rows of the epoch, ``num_rows``: one without data has learnt nothing. The variance of
    the mixture is mean(var + mean^2) - mean(mean)^2. Collective.
    """
    if workers.size == 1:
        return
    share = num_rows * workers.size / workers.allreduce_sum(num_rows)[0]
    for norm in _norms(network):
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            continue
        moments = torch.stack([mean, variance + mean**2]).double()
        mixed = workers.average(moments * share)
        mean.copy_(mixed[0])
        variance.copy_((mixed[1] - mixed[0] ** 2).clamp_min(0.0))


def _norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: matrices decay; embeddings, biases, norms and scalars do not."""
    embeddings = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in network.parameters():
        (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
