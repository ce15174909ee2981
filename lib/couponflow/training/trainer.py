"""The training loop: iterables of batches in, best weights and curves out. Knows no files but its checkpoint.

Losses are global sums over global counts, whatever the ranks: rank r minimises
``local_sum * ranks / global_count`` for the label loss and for the auxiliary loss, so that the average of the
ranks' gradients is the gradient of the global means. Every rank must be given equally many batches; a batch
of zero rows adds nothing.
"""

import copy
import io
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couponflow.errors import DataError, InfraError
from couponflow.models.batch import Batch
from couponflow.sections import TrainingConfig
from couponflow.training import metrics
from couponflow.training.launch import Workers

log = logging.getLogger("couponflow")


class Output(Protocol):
    """What a network returns for a batch; ``models.dien.Output`` is one."""

    @property
    def logits(self) -> Tensor:
        """Float [B]."""

    @property
    def aux_sum(self) -> Tensor:
        """Scalar sum of auxiliary losses."""

    @property
    def aux_count(self) -> Tensor:
        """Scalar number of auxiliary pairs."""


@dataclass(frozen=True)
class Epoch:
    """Curves of one epoch; losses are global means, the label loss unweighted by alpha."""

    epoch: int
    train_loss: float
    auxiliary_loss: float
    valid_log_loss: float
    valid_auc: float


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


def fit(
    network: nn.Module,
    train: Callable[[int], Iterable[Batch]],
    valid: Callable[[], Iterable[Batch]],
    config: TrainingConfig,
    auxiliary_weight: float,
    workers: Workers,
    checkpoint: Path | None = None,
    valid_shift: float = 0.0,
    regulariser: Callable[[Batch], Tensor] | None = None,
) -> Fitted:
    """Train until the validation log loss stops falling and leave the best weights in ``network``.

    ``train(epoch)`` and ``valid()`` give this rank's batches, equally many on every rank. Ties keep the
    earlier epoch. ``checkpoint`` receives the best state (rank 0), replaced whole. ``valid_shift`` is added
    to validation logits before their log loss: what undoes sampled training rows, which validation has not.
    ``regulariser`` gives a term of the loss, the same on all ranks; no curve shows it.
    Collective: all ranks call it with the same arguments but for their batches. Without dropout a run
    repeats bit for bit for one rank and one thread; with it too, given the seed.

    Raises:
        DataError: a loss or gradient is not finite on any rank; raised on all ranks before the step. Or there
            are no validation rows, or one has no finite score.
    """
    workers.broadcast_state(network.state_dict())
    torch.manual_seed(config.seed * 1_000_003 + workers.rank)  # dropout differs between ranks
    optimiser = torch.optim.AdamW(parameter_groups(network, config.weight_decay), lr=config.learning_rate)
    epochs: list[Epoch] = []
    fitted: Fitted | None = None
    start = time.monotonic()
    for number in range(1, config.max_epochs + 1):
        train_loss, auxiliary_loss, rows = _train_epoch(
            network, train(number), optimiser, config, auxiliary_weight, workers, regulariser
        )
        logit, label = score(network, valid(), workers)
        if not logit.size or not np.isfinite(logit).all():  # gathered, so all ranks see it
            raise DataError(
                f"epoch {number}: {logit.size} validation rows, {np.isfinite(logit).sum()} of them with a "
                "finite score; check the valid split or lower training.learning_rate"
            )
        epoch = Epoch(
            number,
            train_loss,
            auxiliary_loss,
            metrics.log_loss(logit + valid_shift, label),
            metrics.auc(logit, label),
        )
        epochs.append(epoch)
        if fitted is None or epoch.valid_log_loss < fitted.best.valid_log_loss:
            state = copy.deepcopy(network.state_dict())
            fitted = Fitted(state, epoch, epochs, logit, label, rows)
            if checkpoint is not None and workers.rank == 0:
                _save(state, checkpoint)
        elapsed = time.monotonic() - start
        _log_epoch(epoch, rows, elapsed, config, fitted.best, workers)
        if number - fitted.best.epoch >= config.patience:
            break
    assert fitted is not None  # max_epochs >= 1
    network.load_state_dict(fitted.state)
    fitted.seconds = time.monotonic() - start
    return fitted


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


def backward(
    network: nn.Module,
    batch: Batch,
    auxiliary_weight: float,
    workers: Workers,
    regulariser: Callable[[Batch], Tensor] | None = None,
) -> tuple[float, float, float, float]:
    """Leave the gradient of the global loss in every parameter, the same on all ranks.

    Returns this step's global label loss sum, label weight, auxiliary sum and auxiliary count.

    Raises:
        DataError: anything is not finite on any rank; raised on all ranks, no parameter has moved.
    """
    network.zero_grad(set_to_none=False)
    output = cast(Output, network(batch))
    label_sum = (
        F.binary_cross_entropy_with_logits(output.logits, batch.label, reduction="none") * batch.weight
    ).sum()
    local = [label_sum.item(), batch.weight.sum().item(), output.aux_sum.item(), output.aux_count.item()]
    sums = [float(value) for value in workers.allreduce_sum(local)]
    if not np.isfinite(sums).all():
        raise _not_finite("loss", bool(np.isfinite(local).all()), workers)
    _, label_count, _, aux_count = sums
    loss = label_sum * (workers.size / label_count) if label_count else label_sum * 0.0
    if auxiliary_weight and aux_count:
        loss = loss + output.aux_sum * (auxiliary_weight * workers.size / aux_count)
    if regulariser is not None:
        loss = loss + regulariser(batch)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    parameters = list(network.parameters())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    is_sound = bool(torch.isfinite(flat).all())
    # After averaging, a value that is not finite anywhere is not finite everywhere: one exchange does both.
    flat = workers.average(flat)
    if not torch.isfinite(flat).all():
        raise _not_finite("gradient", is_sound, workers)
    place = 0
    for gradient in gradients:
        gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
        place += gradient.numel()
    return sums[0], label_count, sums[2], aux_count


def _not_finite(what: str, is_sound: bool, workers: Workers) -> DataError:
    """The same error on every rank, naming the ranks it came from; collective."""
    wrong = workers.gather([] if is_sound else [workers.rank]).astype(int).tolist()
    return DataError(
        f"{what} is not finite on rank {', '.join(map(str, wrong)) or 'none alone'}; no step was taken, "
        "check the examples or lower training.learning_rate"
    )


def score(
    network: nn.Module, batches: Iterable[Batch], workers: Workers
) -> tuple[metrics.Floats, metrics.Floats]:
    """Logits and labels of all rows of all ranks, every row once, in eval mode."""
    was_training = network.training
    network.eval()
    logits, labels = [np.zeros(0)], [np.zeros(0)]
    with torch.inference_mode():
        for batch in batches:
            if batch.size:
                logits.append(cast(Output, network(batch)).logits.double().numpy())
                labels.append(batch.label.double().numpy())
    network.train(was_training)
    return workers.gather(np.concatenate(logits)), workers.gather(np.concatenate(labels))


def average_statistics(network: nn.Module, workers: Workers, num_rows: int) -> None:
    """Give every rank the running statistics of all, so that what is saved is not rank 0's alone.

    A rank counts by its rows of the epoch, ``num_rows``: one without data has learnt nothing. The variance of
    the mixture is mean(var + mean^2) - mean(mean)^2. Collective.
    """
    if workers.size == 1:
        return
    share = num_rows * workers.size / workers.allreduce_sum(num_rows)[0]
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            continue
        moments = torch.stack([mean, variance + mean**2]).double()
        mixed = workers.average(moments * share)
        mean.copy_(mixed[0])
        variance.copy_((mixed[1] - mixed[0] ** 2).clamp_min(0.0))


def _train_epoch(
    network: nn.Module,
    batches: Iterable[Batch],
    optimiser: torch.optim.Optimizer,
    config: TrainingConfig,
    auxiliary_weight: float,
    workers: Workers,
    regulariser: Callable[[Batch], Tensor] | None,
) -> tuple[float, float, int]:
    """One pass, running statistics shared at its end.

    Returns the global mean label loss, the global mean auxiliary loss and the rows of all ranks.
    """
    network.train()
    totals = np.zeros(4)
    rows = 0
    for batch in batches:
        totals += backward(network, batch, auxiliary_weight, workers, regulariser)
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimiser.step()
        rows += batch.size
    num_rows = int(workers.allreduce_sum(rows)[0])
    if not num_rows:
        raise DataError("training rows: none were fed; widen the dates of the train split")
    average_statistics(network, workers, rows)
    loss = totals[0] / totals[1] if totals[1] else float("nan")
    auxiliary = totals[2] / totals[3] if totals[3] else 0.0
    return float(loss), float(auxiliary), num_rows


def _log_epoch(
    epoch: Epoch, rows: int, elapsed: float, config: TrainingConfig, best: Epoch, workers: Workers
) -> None:
    if workers.rank:
        return
    per_epoch = elapsed / epoch.epoch
    log.info(
        "epoch %d/%d: train %.4f, auxiliary %.4f, valid log loss %.4f, valid AUC %.4f (best epoch %d); "
        "%.0f rows/s, at most %.0f s left",
        epoch.epoch,
        config.max_epochs,
        epoch.train_loss,
        epoch.auxiliary_loss,
        epoch.valid_log_loss,
        epoch.valid_auc,
        best.epoch,
        rows / per_epoch if per_epoch else 0.0,
        per_epoch * (config.max_epochs - epoch.epoch),
    )


def _save(state: dict[str, Tensor], path: Path) -> None:
    """Replace the checkpoint whole: a reader sees the old or the new one."""
    stream = io.BytesIO()
    torch.save(state, stream)
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(stream.getvalue())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InfraError(
            f"{path} cannot be written ({error.strerror}, {stream.tell()} bytes needed); free "
            "space and run again"
        ) from error
