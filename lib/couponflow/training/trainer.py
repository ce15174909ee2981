"""The training loop: iterables of batches in, best weights and curves out. Knows no files: checkpoints have a
store of their own.

Every rank must be given equally many batches; a batch of zero rows adds nothing. What a step does is in
``training.steps``.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from couponflow.errors import DataError
from couponflow.modelling import TrainingConfig
from couponflow.models.batch import Batch
from couponflow.training import devices, metrics
from couponflow.training.checkpoints import Store
from couponflow.training.progress import Epoch, Fitted, Progress, restore, snapshot
from couponflow.training.steps import (
    Locate,
    Objective,
    Output,
    average_statistics,
    backward,
    nowhere,
    parameter_groups,
)
from couponflow.training.workers import Workers

log = logging.getLogger("couponflow")

#: Called before each phase of a step, with the phase, the epoch and the step: ``load``, ``step``,
#: ``checkpoint`` (once its content is written), ``validate``.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rows:
    """What a network is fitted on and judged by.

    ``train(epoch)`` and ``valid()`` give this rank's batches, equally many on every rank and the same each
    time that they are asked for. ``valid_shift`` is added to validation logits before their log loss: what
    undoes sampled training rows, which validation has not. ``locate`` says where the rows of the batch that
    was fed last are stored.
    """

    train: Callable[[int], Iterable[Batch]]
    valid: Callable[[], Iterable[Batch]]
    valid_shift: float = 0.0
    locate: Locate = nowhere


def fit(
    network: nn.Module,
    rows: Rows,
    config: TrainingConfig,
    objective: Objective,
    workers: Workers,
    store: Store | None = None,
    resumed: dict[str, Any] | None = None,
    report: Report = lambda phase, epoch, step: None,
) -> Fitted:
    """Train until the validation log loss stops falling and leave the best weights in ``network``.

    Ties keep the earlier epoch. The config decides the precision of the objective. ``store`` receives the
    state at each epoch's end and every ``config.checkpoint_steps`` steps (rank 0); ``resumed`` is such a
    state, from which the run goes on as if it had never stopped: the epoch's batches up to there are read and
    passed over.
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
    is_half, is_mixed = config.gradient_compression == "fp16", config.precision == "bf16"
    objective = replace(objective, is_half=is_half, is_mixed=is_mixed)

    def save() -> None:
        if store is None:
            return
        progress.seconds = time.monotonic() - start
        tree = snapshot(network, optimiser, progress, workers)
        where = progress.epoch, progress.step
        if not workers.rank:
            store.save(*where, tree, lambda: report("checkpoint", *where))

    def step(batch: Batch) -> tuple[float, ...]:
        sums = backward(network, batch, objective, workers, rows.locate)
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        rate = learning_rate(config, workers.size, progress.steps + 1, progress.rate_scale)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        return sums

    while not _is_over(progress, config):
        num_rows = _train_epoch(network, rows.train, config, workers, progress, step, save, report)
        report("validate", progress.epoch, 0)
        logit, label = score(network, rows.valid(), workers, lambda: report("validate", progress.epoch, 0))
        _end_epoch(network, config, workers, progress, (logit, label, rows.valid_shift), num_rows)
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
