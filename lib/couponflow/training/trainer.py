"""The training loop: iterables of batches in, best weights and curves out. Knows no files: checkpoints have a
store of their own.

Losses are global sums over global counts, whatever the ranks: rank r minimises
``local_sum * ranks / global_count`` for the label loss and for the auxiliary loss, so that the average of the
ranks' gradients is the gradient of the global means. Every rank must be given equally many batches; a batch
of zero rows adds nothing. Gradients are dense, those of embeddings too: one exchange averages all of them.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couponflow.errors import DataError
from couponflow.modelling import TrainingConfig
from couponflow.models.batch import Batch
from couponflow.training import devices, metrics
from couponflow.training.checkpoints import Store
from couponflow.training.launch import Workers
from couponflow.training.progress import Epoch, Fitted, Progress, restore, snapshot

log = logging.getLogger("couponflow")

#: Called before each phase of a step, with the phase, the epoch and the step: ``load``, ``step``,
#: ``checkpoint`` (once its content is written), ``validate``.
Report = Callable[[str, int, int], None]
#: Where rows of the batch that was fed last are stored; all of them when none is named.
Locate = Callable[[Sequence[int]], str]


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


def fit(
    network: nn.Module,
    train: Callable[[int], Iterable[Batch]],
    valid: Callable[[], Iterable[Batch]],
    config: TrainingConfig,
    auxiliary_weight: float,
    workers: Workers,
    store: Store | None = None,
    valid_shift: float = 0.0,
    resumed: dict[str, Any] | None = None,
    report: Report = lambda phase, epoch, step: None,
    locate: Locate = lambda rows: "rows of unknown place",
    regulariser: Callable[[Batch], Tensor] | None = None,
) -> Fitted:
    """Train until the validation log loss stops falling and leave the best weights in ``network``.

    ``train(epoch)`` and ``valid()`` give this rank's batches, equally many on every rank and the same each
    time that they are asked for. Ties keep the earlier epoch. ``valid_shift`` is added to validation
    logits before their log loss: what undoes sampled training rows, which validation has not.
    ``store`` receives the state at each epoch's end and every ``config.checkpoint_steps`` steps (rank 0);
    ``resumed`` is such a state, from which the run goes on as if it had never stopped: the epoch's batches up
    to there are read and passed over.
    ``regulariser`` gives a term of the loss, the same on all ranks; no curve shows it.
    Collective: all ranks call it with the same arguments but for their batches. On one rank and one thread a
    run repeats bit for bit, resumed or not. The network trains on the device of the config and is left on
    the host.

    Raises:
        ConfigError: a GPU is asked for and there is none.
        DataError: a loss or gradient is not finite on any rank; raised on all ranks before the step, naming
            the rows. Or there are no validation rows, or one has no finite score.
    """
    torch.manual_seed(config.seed * 1_000_003 + workers.rank)  # dropout differs between ranks
    network.to(devices.chosen(config, workers))
    optimiser = torch.optim.AdamW(parameter_groups(network, config.weight_decay), lr=config.learning_rate)
    if resumed is None:
        workers.broadcast_state(network.state_dict())
        progress = Progress()
    else:
        progress = restore(resumed, network, optimiser, workers)
        if not workers.rank:
            log.info("resumed at epoch %d after %d steps of it", progress.epoch, progress.step)
    start = time.monotonic() - progress.seconds

    def save() -> None:
        if store is None:
            return
        progress.seconds = time.monotonic() - start
        tree = snapshot(network, optimiser, progress, workers)
        where = progress.epoch, progress.step
        if not workers.rank:
            store.save(*where, tree, lambda: report("checkpoint", *where))

    def step(batch: Batch) -> tuple[float, ...]:
        half = config.gradient_compression == "fp16"
        is_mixed = config.precision == "bf16"
        sums = backward(network, batch, auxiliary_weight, workers, locate, half, regulariser, is_mixed)
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        rate = learning_rate(config, workers.size, progress.steps + 1, progress.rate_scale)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        return sums

    while not _is_over(progress, config):
        num_rows = _train_epoch(network, train, config, workers, progress, step, save, report)
        report("validate", progress.epoch, 0)
        logit, label = score(network, valid(), workers, lambda: report("validate", progress.epoch, 0))
        _end_epoch(network, config, workers, progress, (logit, label, valid_shift), num_rows)
        elapsed = time.monotonic() - start
        progress.next_epoch()
        save()
        _log_epoch(progress, num_rows, elapsed, config, workers)
    fitted = progress.best
    assert fitted is not None  # max_epochs >= 1
    network.load_state_dict(fitted.state)
    network.cpu()
    fitted.seconds = time.monotonic() - start
    return fitted


def _is_over(progress: Progress, config: TrainingConfig) -> bool:
    if progress.best is None:
        return False
    done = len(progress.epochs)
    return done >= config.max_epochs or done - progress.best.best.epoch >= config.patience


def _end_epoch(
    network: nn.Module,
    config: TrainingConfig,
    workers: Workers,
    progress: Progress,
    validation: tuple[metrics.Floats, metrics.Floats, float],
    num_rows: int,
) -> None:
    """Judge the epoch; collective."""
    logit, label, shift = validation
    number, totals = progress.epoch, progress.totals
    if not logit.size or not np.isfinite(logit).all():  # gathered, so all ranks see it
        raise DataError(
            f"epoch {number}: {logit.size} validation rows, {np.isfinite(logit).sum()} of them with a "
            "finite score; check the valid split or lower training.learning_rate"
        )
    own = progress.own[0] / progress.own[1] if progress.own[1] else 0.0
    epoch = Epoch(
        number,
        float(totals[0] / totals[1]) if totals[1] else float("nan"),
        float(totals[2] / totals[3]) if totals[3] else 0.0,
        metrics.log_loss(logit + shift, label),
        metrics.auc(logit, label),
        tuple(workers.gather([own]).tolist()),
        learning_rate(config, workers.size, progress.steps, progress.rate_scale),
    )
    progress.epochs.append(epoch)
    best = progress.best
    if best is None or epoch.valid_log_loss < best.best.valid_log_loss:
        state = copy.deepcopy(network.state_dict())
        progress.best = best = Fitted(state, epoch, progress.epochs, logit, label, num_rows)
    if (
        config.plateau_epochs
        and number - max(best.best.epoch, progress.halved_epoch) >= config.plateau_epochs
    ):
        progress.rate_scale, progress.halved_epoch = progress.rate_scale / 2, number


def learning_rate(config: TrainingConfig, num_ranks: int, steps: int, rate_scale: float = 1.0) -> float:
    """Of step number ``steps`` (from 1): scaled to the ranks, rising at first, halved at plateaus."""
    match config.lr_scaling:
        case "linear":
            scale = float(num_ranks)
        case "sqrt":
            scale = math.sqrt(num_ranks)
        case _:
            scale = 1.0
    rise = min(1.0, steps / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * scale * rise * rate_scale


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
    locate: Locate = lambda rows: "rows of unknown place",
    half: bool = False,
    regulariser: Callable[[Batch], Tensor] | None = None,
    is_mixed: bool = False,
) -> tuple[float, float, float, float, float, float]:
    """Leave the gradient of the global loss in every parameter, the same on all ranks.

    ``half``: gradients travel in half precision. ``is_mixed``: matrix products of the forward pass are in
    bfloat16, and those of its gradients with them. Returns this step's global label loss sum, label weight,
    auxiliary sum and auxiliary count, then this rank's own label loss sum and label weight.

    Raises:
        DataError: anything is not finite on any rank; raised on all ranks, no parameter has moved.
    """
    network.zero_grad(set_to_none=False)
    batch = batch.to(devices.of(network))
    with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=is_mixed):
        output = cast(Output, network(batch))
    label_sum = (
        F.binary_cross_entropy_with_logits(output.logits, batch.label, reduction="none") * batch.weight
    ).sum()
    parts = (label_sum, batch.weight.sum(), output.aux_sum, output.aux_count)
    local = torch.stack([part.detach().double() for part in parts]).tolist()  # one wait for the device
    sums = [float(value) for value in workers.allreduce_sum(local)]
    if not np.isfinite(sums).all():
        is_sound = bool(np.isfinite(local).all())
        raise _not_finite("loss", "" if is_sound else _suspects(network, batch, locate), workers)
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
    if half and workers.size > 1:
        flat = flat.half()
    is_sound = bool(torch.isfinite(flat).all())
    # After averaging, a value that is not finite anywhere is not finite everywhere: one exchange does both.
    flat = workers.average(flat)
    if not torch.isfinite(flat).all():
        raise _not_finite("gradient", "" if is_sound else _suspects(network, batch, locate), workers)
    place = 0
    for gradient in gradients:
        gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
        place += gradient.numel()
    return sums[0], label_count, sums[2], aux_count, local[0], local[1]


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


def score(
    network: nn.Module,
    batches: Iterable[Batch],
    workers: Workers,
    progress: Callable[[], None] = lambda: None,
) -> tuple[metrics.Floats, metrics.Floats]:
    """Logits and labels of all rows of all ranks, every row once, in eval mode.

    ``progress`` is called after each batch.
    """
    was_training = network.training
    network.eval()
    logits, labels = [np.zeros(0)], [np.zeros(0)]
    with torch.inference_mode():
        for batch in batches:
            if batch.size:
                found = cast(Output, network(batch.to(devices.of(network))))
                logits.append(found.logits.double().cpu().numpy())
                labels.append(batch.label.double().numpy())
            progress()
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


def _train_epoch(
    network: nn.Module,
    train: Callable[[int], Iterable[Batch]],
    config: TrainingConfig,
    workers: Workers,
    progress: Progress,
    step: Callable[[Batch], tuple[float, ...]],
    save: Callable[[], None],
    report: Report,
) -> int:
    """What is left of an epoch, running statistics shared at its end; returns its rows of all ranks.

    ``step`` trains on one batch, of which it returns what ``backward`` does.
    """
    network.train()
    report("load", progress.epoch, progress.step)
    batches = iter(train(progress.epoch))
    for _ in islice(batches, progress.step):  # taken before the run was stopped
        report("load", progress.epoch, progress.step)
    for batch in batches:
        report("step", progress.epoch, progress.step + 1)
        *totals, own_sum, own_weight = step(batch)
        progress.step, progress.steps = progress.step + 1, progress.steps + 1
        progress.totals += totals
        progress.own += (own_sum, own_weight, batch.size)
        if config.checkpoint_steps and progress.step % config.checkpoint_steps == 0:
            save()
        report("load", progress.epoch, progress.step)
    rows = progress.own[2]
    num_rows = int(workers.allreduce_sum(rows)[0])
    if not num_rows:
        raise DataError("training rows: none were fed; widen the dates of the train split")
    average_statistics(network, workers, int(rows))
    return num_rows


def _log_epoch(
    progress: Progress, rows: int, elapsed: float, config: TrainingConfig, workers: Workers
) -> None:
    if workers.rank or progress.best is None:
        return
    epoch = progress.epochs[-1]
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
        progress.best.best.epoch,
        rows / per_epoch if per_epoch else 0.0,
        per_epoch * (config.max_epochs - epoch.epoch),
    )
