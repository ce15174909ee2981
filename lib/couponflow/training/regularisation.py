"""Mini-batch aware regularisation: only embeddings that a batch reads are shrunk, rare ones more.

Source: DIN, arXiv 1706.06978, section 5.1.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from couponflow.models.batch import Batch, feature_ids
from couponflow.training.workers import Workers


def penalty(embedding: Tensor, ids: Tensor, count: Tensor) -> Tensor:
    """Sum of ``|E_j|^2 / n_j`` over the different ids j > 0; a scalar, 0 without any.

    ``embedding`` [V,W]; ``count`` [V] says how often an id occurs in all training rows, 0 counts as 1.

    E_1 = (1, 2), E_2 = (3, 0), n_1 = 4, n_2 = 2::

        ids [1 2 1 1 0]   ->  5/4 + 9/2 = 5.75
    """
    present = torch.unique(ids)
    present = present[present > 0]
    return (embedding[present].square().sum(1) / count[present].clamp_min(1)).sum()


def occurrences(batches: Iterable[Batch], sizes: Mapping[str, int], workers: Workers) -> dict[str, Tensor]:
    """How often each id of each vocabulary field occurs in all ranks' rows, float32; collective."""
    totals = {name: np.zeros(size) for name, size in sizes.items()}
    for batch in batches:
        for name, tensors in feature_ids(batch).items():
            for ids in tensors:
                totals[name] += np.bincount(ids.numpy().ravel(), minlength=sizes[name])
    return {name: torch.from_numpy(workers.allreduce_sum(total)).float() for name, total in totals.items()}


class MiniBatchAware:
    """``weight / 2`` times the penalties of all tables for the ids that a step reads on any rank.

    Each rank adds the same number, so that the average of the ranks' gradients is its gradient: were each to
    take its own ids, one that a single rank has seen would count by a share of the ranks.
    """

    def __init__(
        self,
        embeddings: Mapping[str, nn.Embedding],
        counts: Mapping[str, Tensor],
        weight: float,
        workers: Workers,
    ) -> None:
        """``embeddings`` and ``counts`` by field of the vocabulary."""
        self._embeddings, self._counts = embeddings, dict(counts)
        self._weight, self._workers = weight, workers

    def __call__(self, batch: Batch) -> Tensor:
        """The term of one step, a scalar; collective."""
        found = feature_ids(batch)
        # One exchange for all tables: an offset tells their ids apart.
        own, start, starts = [], 0, {}
        for name, embedding in self._embeddings.items():
            starts[name] = start
            own.append(torch.unique(torch.cat([ids.ravel() for ids in found[name]])) + start)
            start += embedding.num_embeddings
        ids = torch.from_numpy(self._workers.gather(torch.cat(own).cpu().numpy())).long()
        terms = []
        for name, embedding in self._embeddings.items():
            weight = embedding.weight
            place = ids.to(weight.device) - starts[name]
            self._counts[name] = self._counts[name].to(weight.device)  # copies once
            is_own = (place >= 0) & (place < embedding.num_embeddings)
            terms.append(penalty(weight, place[is_own], self._counts[name]))
        return torch.stack(terms).sum() * (self._weight / 2)
