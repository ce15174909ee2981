"""Mini-batch aware regularisation against hand-made numbers and a slow count."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from couponflow.config import Config
from couponflow.modelling import ModelConfig
from couponflow.models.batch import RANDOM_SIZES, Batch, empty_batch, feature_ids, random_batch
from couponflow.models.dien import Dien
from couponflow.training import preparation, steps
from couponflow.training.regularisation import MiniBatchAware, occurrences, penalty
from couponflow.training.workers import Workers

WIDE = 3
SMALL = ModelConfig(hidden_dim=4, attention_dims=(4,), auxiliary_dims=(4,), head_dims=(4,), dropout=0.0)
FIELDS = ("item", "category", "shop", "event_type")


class OneOfTwo(Workers):
    """A rank whose neighbour always sends the same."""

    size = 2

    def __init__(self, other: ArrayLike) -> None:
        self.other = np.asarray(other, np.float64)

    def gather(self, values: ArrayLike) -> NDArray[np.float64]:
        return np.concatenate([np.asarray(values, np.float64), self.other])

    def allreduce_sum(self, values: ArrayLike) -> NDArray[np.float64]:
        return 2.0 * np.asarray(values, np.float64)


class Batches:
    """A feed of batches in memory."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def epoch(self) -> list[Batch]:
        return self._batches


def rows(size: int, seed: int = 0) -> Batch:
    return random_batch(torch.Generator().manual_seed(seed), size, num_wide=WIDE)


def test_golden_value_and_gradient() -> None:
    embedding = torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    found = penalty(embedding, torch.tensor([[1, 2], [1, 1], [0, 0]]), torch.tensor([50.0, 4.0, 2.0]))
    assert found.item() == pytest.approx(5.75)
    (0.01 / 2 * found).backward()
    assert (0.01 / 2 * found).item() == pytest.approx(0.02875)
    assert embedding.grad is not None
    expected = [[0.0, 0.0], [0.0025, 0.005], [0.015, 0.0]]
    assert embedding.grad.tolist() == [pytest.approx(row) for row in expected]


def test_an_id_that_was_never_counted_counts_as_once_and_no_id_costs_nothing() -> None:
    embedding = torch.tensor([[9.0], [3.0]], requires_grad=True)
    assert penalty(embedding, torch.tensor([1]), torch.zeros(2)).item() == 9.0
    nothing = penalty(embedding, torch.tensor([0, 0]), torch.ones(2))
    assert nothing.item() == 0.0
    nothing.backward()


def test_occurrences_equal_a_slow_count_over_all_ranks() -> None:
    batches = [rows(7, 1), empty_batch(WIDE), rows(5, 2)]
    found = occurrences(batches, RANDOM_SIZES, Workers())
    for name in FIELDS:
        slow: Counter[int] = Counter()
        for batch in batches:
            for ids in feature_ids(batch)[name]:
                slow.update(ids.ravel().tolist())
        assert found[name].tolist() == [float(slow[n]) for n in range(RANDOM_SIZES[name])], name
    both = occurrences(batches, RANDOM_SIZES, OneOfTwo([]))
    assert torch.equal(both["item"], 2 * found["item"])


def test_negatives_are_no_occurrence() -> None:
    batch = rows(6)
    other = replace(batch, neg_item=batch.neg_item.flip(0), neg_category=batch.neg_category * 0)
    one, two = (occurrences([b], RANDOM_SIZES, Workers()) for b in (batch, other))
    assert all(torch.equal(one[name], two[name]) for name in FIELDS)


def tables(seed: int = 0) -> dict[str, nn.Embedding]:
    torch.manual_seed(seed)
    return {name: nn.Embedding(RANDOM_SIZES[name], 2, padding_idx=0) for name in FIELDS}


def test_the_term_is_the_sum_over_all_tables() -> None:
    batch, made = rows(6), tables()
    counts = occurrences([batch, rows(9, 4)], RANDOM_SIZES, Workers())
    expected = 0.0
    for name, table in made.items():
        for j in {int(j) for ids in feature_ids(batch)[name] for j in ids.ravel()} - {0}:
            expected += 0.05 * float((table.weight[j].detach() ** 2).sum()) / float(counts[name][j])
    assert MiniBatchAware(made, counts, 0.1, Workers())(batch).item() == pytest.approx(expected, rel=1e-5)


def test_two_ranks_regularise_the_ids_of_both() -> None:
    """The averaged gradient is that of one rank with all rows, whichever rank has seen an id."""
    left, right, made = rows(4, 1), rows(5, 2), tables()
    counts = occurrences([left, right], RANDOM_SIZES, Workers())
    starts = np.cumsum([0] + [RANDOM_SIZES[name] for name in FIELDS])[:-1]

    def ids(batch: Batch) -> list[int]:
        found = feature_ids(batch)
        return [
            int(j) + int(start)
            for name, start in zip(FIELDS, starts, strict=True)
            for part in found[name]
            for j in part.ravel()
        ]

    terms = [
        MiniBatchAware(made, counts, 0.1, OneOfTwo(ids(other)))(own).item()
        for own, other in ((left, right), (right, left), (empty_batch(WIDE), left))
    ]
    alone = MiniBatchAware(made, counts, 0.1, Workers())
    sums = {name: float(penalty(made[name].weight.detach(), torch.cat([
        part.ravel() for batch in (left, right) for part in feature_ids(batch)[name]
    ]), counts[name])) for name in FIELDS}  # fmt: skip
    assert terms[0] == pytest.approx(terms[1]) == pytest.approx(0.05 * sum(sums.values()), rel=1e-5)
    assert terms[2] == pytest.approx(alone(left).item())
    assert alone(empty_batch(WIDE)).item() == 0.0


def test_the_trainer_adds_its_gradient() -> None:
    batch = rows(8)
    plain, shrunk = (network() for _ in range(2))
    counts = occurrences([batch], RANDOM_SIZES, Workers())
    steps.backward(plain, batch, steps.Objective(1.0), Workers())
    regulariser = MiniBatchAware(shrunk.embeddings(), counts, 0.1, Workers())
    steps.backward(shrunk, batch, steps.Objective(1.0, regulariser=regulariser), Workers())
    for name, table in shrunk.embeddings().items():
        share = torch.zeros(RANDOM_SIZES[name])
        seen = counts[name] > 0
        share[seen] = 0.1 / counts[name][seen]
        share[0] = 0.0
        before = plain.embeddings()[name].weight.grad
        assert before is not None
        torch.testing.assert_close(table.weight.grad, before + share[:, None] * table.weight.detach())
    assert torch.equal(shrunk.last.weight.grad, plain.last.weight.grad)


def network() -> Dien:
    torch.manual_seed(0)
    return Dien(SMALL, RANDOM_SIZES, WIDE).train()


def test_the_weight_switches_it_on(config: Config) -> None:
    feed, made = Batches([rows(8), rows(3, 1)]), network()
    assert preparation.embedding_penalty(made, feed, config, Workers()) is None
    on = config.model_copy(update={"model": SMALL.model_copy(update={"mba_weight": 0.01})})
    term = preparation.embedding_penalty(made, feed, on, Workers())
    assert term is not None
    counts = occurrences(feed.epoch(), RANDOM_SIZES, Workers())
    expected = MiniBatchAware(made.embeddings(), counts, 0.01, Workers())(rows(8))
    assert term(rows(8)).item() == pytest.approx(expected.item()) != 0.0
