"""What a network is given before its first step, from the training rows of all ranks.

Standardisation of the aggregates, the start of the linear term and of the bias, and how often each id occurs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from couponflow.config import Config
from couponflow.training import feed, metrics
from couponflow.training.workers import Workers

if TYPE_CHECKING:
    from torch import Tensor

    from couponflow.models.batch import Batch
    from couponflow.models.dien import Dien

#: Rows over all ranks that the warm start is fitted on; more would hardly change the coefficients.
_WARM_ROWS = 100_000


@dataclass(frozen=True)
class WideRows:
    """Aggregates of the training rows.

    ``mean``, ``sd`` [F] and ``rate``: of all rows. ``wide`` [N,F], ``label`` [N]: of those that were held,
    the first of each rank in its shuffled order.
    """

    mean: metrics.Floats
    sd: metrics.Floats
    rate: float
    wide: metrics.Floats
    label: metrics.Floats


def wide_rows(train_feed: feed.Feed, workers: Workers) -> WideRows:
    """One pass over all ranks' training rows before the network starts; the same result on every rank."""
    total: metrics.Floats | float = 0.0
    held: list[metrics.Floats] = []
    num_held = 0
    for batch in train_feed.epoch():
        workers.beat("scan")
        wide, label = batch.wide.double().numpy(), batch.label.double().numpy()
        total = total + np.concatenate([wide.sum(0), (wide**2).sum(0), [batch.size, label.sum()]])
        if num_held < _WARM_ROWS / workers.size:
            held.append(np.column_stack([wide, label]))
            num_held += batch.size
    sums = workers.allreduce_sum(total)
    rows, positives = sums[-2:]
    mean, second = np.split(sums[:-2] / rows, 2)
    sd = np.sqrt(np.maximum(second - mean**2, 0.0))
    sd[sd < 1e-6 * (1.0 + np.abs(mean))] = 0.0  # constant but for rounding
    gathered = workers.gather(np.concatenate(held).ravel()).reshape(-1, mean.size + 1)
    return WideRows(mean, sd, float(positives / rows), gathered[:, :-1], gathered[:, -1])


def prepare(network: "Dien", rows: WideRows, config: Config) -> None:
    """Give the network its standardisation and its start: the base rate, or the logistic model.

    With ``training.warm_start`` the linear term of the aggregates and the last bias are those of the logistic
    model of the held rows, so that the sequence part learns what the aggregates do not say.
    """
    import torch

    from couponflow.training import baselines

    network.set_wide_statistics(torch.from_numpy(rows.mean).float(), torch.from_numpy(rows.sd).float())
    network.set_base_rate(rows.rate)
    if config.training.warm_start and network.wide_linear is not None:
        model = baselines.fit_logistic(rows.wide, rows.label, config.training.logistic_c)
        # The model stands on the held rows' mean and sd, the network on those of all rows.
        varies = (model.sd > 0.0) & (rows.sd > 0.0)
        slope = np.divide(model.coef, model.sd, out=np.zeros_like(model.coef), where=varies)
        intercept = model.intercept + float(slope @ (rows.mean - model.mean))
        network.set_wide_linear(torch.from_numpy(slope * rows.sd).float(), intercept)


def embedding_penalty(
    network: "Dien", train_feed: feed.Feed, config: Config, workers: Workers
) -> "Callable[[Batch], Tensor] | None":
    """The regulariser of ``model.mba_weight``, after one more pass over the training rows; None at 0."""
    from couponflow.training import regularisation

    if not config.model.mba_weight:
        return None
    embeddings = network.embeddings()
    sizes = {name: table.num_embeddings for name, table in embeddings.items()}
    counts = regularisation.occurrences(train_feed.epoch(), sizes, workers)
    return regularisation.MiniBatchAware(embeddings, counts, config.model.mba_weight, workers)
