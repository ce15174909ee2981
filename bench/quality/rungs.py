"""The rungs of the ladder, each from a sample to scores of its validation and test rows.

Networks are the product's, trained by the product's trainer; boosted trees are its LightGBM on counts. All
of them choose their length of training on validation rows and see the test rows once.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from couponflow.config import Config
from couponflow.modelling import BoostingConfig
from couponflow.models.batch import Batch
from couponflow.models.dien import Dien
from couponflow.training import baselines, boosting, feed, preparation, steps, trainer
from couponflow.training.workers import Workers

log = logging.getLogger("couponflow")

Array = NDArray[Any]

#: Rows that train, that validate, and that are scored.
Splits = tuple[Sequence[feed.Example], Sequence[feed.Example], Sequence[feed.Example]]

_SCORE_ROWS = 1_024
#: Of the boosted trees; fixed beforehand, but for the number of trees.
_TREES = BoostingConfig(
    max_trees=300, patience=300, learning_rate=0.05, max_leaves=31, min_leaf_rows=50, l2=0.0
)


@dataclass(frozen=True)
class Scored:
    """Logits of one fitted model, and what the fitting took."""

    valid: Array
    test: Array
    epochs: int
    seconds: float


def boosted(train: tuple[Array, Array], valid: tuple[Array, Array], test: Array) -> Scored:
    """Boosted trees on (features, label); the number of trees is that of the best validation log loss."""
    start = time.monotonic()
    trees = boosting.fit_trees(*train, *valid, _TREES, seed=0)
    found, scored = trees.raw(valid[0]), trees.raw(test)
    return Scored(found, scored, trees.roots.size, time.monotonic() - start)


def logistic(train: Array, label: Array, valid: Array, test: Array, config: Config) -> Scored:
    """The product's logistic regression on the counts, in logs; what is negative is a log already."""
    start = time.monotonic()
    features = [np.log1p(np.maximum(part, 0.0)) + np.minimum(part, 0.0) for part in (train, valid, test)]
    model = baselines.fit_logistic(features[0], label, config.training.logistic_c)
    sd = np.where(model.sd == 0.0, 1.0, model.sd)
    found = [((part - model.mean) / sd) @ model.coef + model.intercept for part in features[1:]]
    return Scored(found[0], found[1], 0, time.monotonic() - start)


def network(
    config: Config,
    sizes: dict[str, int],
    splits: Splits,
    seed: int,
    encoder: str,
    **options: Any,
) -> Scored:
    """One network of the product: ``config.model`` with this encoder and these options.

    ``seed`` decides initialisation, order of rows and dropout.
    """
    train, valid, test = splits
    model = config.model.model_copy(update={"encoder": encoder, **options})
    section = config.training.model_copy(update={"seed": seed})
    config = config.model_copy(update={"model": model, "training": section})
    wide, label = feed.aggregates(train).astype(np.float64), np.array([row.label for row in train])
    torch.manual_seed(seed)
    built = Dien(model, sizes, wide.shape[1])
    mean, sd = wide.mean(0), wide.std(0)
    preparation.prepare(built, preparation.WideRows(mean, sd, float(label.mean()), wide, label), config)
    fitted = trainer.fit(
        built,
        trainer.Rows(
            lambda epoch: shuffled(train, section.batch_size, [seed, epoch]),
            lambda: feed.batches(valid, _SCORE_ROWS),
        ),
        section,
        steps.Objective(model.auxiliary_weight),
        Workers(),
    )
    found, _ = trainer.score(built, feed.batches(test, _SCORE_ROWS), Workers())
    log.info("%s, seed %d: best of %d epochs is %d", encoder, seed, len(fitted.epochs), fitted.best.epoch)
    return Scored(fitted.valid_logit, found, fitted.best.epoch, fitted.seconds)


def shuffled(rows: Sequence[feed.Example], size: int, seed: Sequence[int]) -> Iterator[Batch]:
    """One epoch of batches in random order."""
    order = np.random.default_rng(list(seed)).permutation(len(rows))
    for start in range(0, len(rows), size):
        yield feed.decode([rows[place] for place in order[start : start + size]])


def logit_of(probability: Array) -> Array:
    """Log-odds, finite for 0 and 1 too."""
    kept = np.clip(probability, 1e-9, 1.0 - 1e-9)
    return np.asarray(np.log(kept) - np.log1p(-kept))
