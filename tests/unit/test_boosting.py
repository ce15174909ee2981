"""Boosted trees: what is stored scores as LightGBM does, stops by validation, repeats bit for bit."""

from itertools import pairwise

import numpy as np
import pytest

from couponflow.errors import DataError
from couponflow.modelling import BoostingConfig
from couponflow.models.calibration import sigmoid
from couponflow.models.tabular import Trees
from couponflow.training import boosting, metrics

SMALL = BoostingConfig(max_trees=40, patience=5, learning_rate=0.2, max_leaves=5)


def planted(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An interaction that no linear model finds."""
    generator = np.random.default_rng(seed)
    wide = generator.normal(size=(size, 4)).astype(np.float32).astype(np.float64)
    truth = np.where((wide[:, 0] > 0) == (wide[:, 1] > 0), 1.5, -1.5)
    return wide, (generator.random(size) < sigmoid(truth)).astype(float)


@pytest.mark.parametrize("has_missing", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_stored_trees_score_as_the_library_does(seed: int, has_missing: bool) -> None:
    import lightgbm

    wide, label = planted(600, seed)
    if has_missing:
        wide[np.random.default_rng(9).random(wide.shape) < 0.2] = np.nan
        wide[label == 1, 2] = np.nan  # a split between missing and all else
    settings = {"objective": "binary", "num_leaves": 7, "seed": seed, "verbosity": -1, "num_threads": 1}
    model = lightgbm.train(settings, lightgbm.Dataset(wide, label), 25)
    trees = boosting.stored(model, 4)
    other, _ = planted(500, seed + 10)
    other[::7, 3] = np.nan
    other[0] = [np.inf, -np.inf, 1e300, 0.0]
    for rows in (wide, other, other[:1], other[:0]):
        found = trees.raw(rows)
        expected = model.predict(rows, raw_score=True) if len(rows) else np.zeros(0)
        assert np.abs(found - expected).max(initial=0.0) < 1e-12
    assert trees.roots.size == 25


def test_the_trees_kept_are_those_of_the_best_validation_loss() -> None:
    wide, label = planted(400, 2)
    valid_wide, valid_label = planted(300, 3)
    trees = boosting.fit_trees(wide, label, valid_wide, valid_label, SMALL, 0)
    kept = trees.roots.size
    assert 0 < kept < 40
    losses = [
        metrics.log_loss(boosting.shortened(trees, n).raw(valid_wide), valid_label) for n in range(kept + 1)
    ]
    assert np.argmin(losses) == kept
    assert losses[-1] == pytest.approx(metrics.log_loss(trees.raw(valid_wide), valid_label))
    assert metrics.auc(trees.raw(valid_wide), valid_label) > 0.7
    assert all(a < b for a, b in pairwise(trees.roots.tolist()))


def test_the_shift_of_sampled_rows_decides_when_to_stop() -> None:
    """Trees of sampled negatives are judged where validation lies, at the rate of the world."""
    leaves = {name: [0, 0] for name in ("feature", "threshold", "missing_left")}
    trees = Trees(0.0, 1, [0, 1], left=[-1, -1], right=[-1, -1], value=[1.0, 1.0], **leaves)
    wide, label = np.zeros((4, 1)), np.array([1.0, 0.0, 1.0, 0.0])
    found = [boosting.best_length(trees, wide, label, shift) for shift in (0.0, -1.0, -2.0, -9.0)]
    assert found == [0, 1, 2, 2]


def test_trees_that_help_nobody_leave_the_base_rate() -> None:
    wide, valid_wide = (np.random.default_rng(seed).normal(size=(200, 2)) for seed in (0, 1))
    label, reversed_label = (wide[:, 0] > 0).astype(float), (valid_wide[:, 0] < 0).astype(float)
    trees = boosting.fit_trees(wide, label, valid_wide, reversed_label, SMALL, 0)
    assert trees.roots.size == 0
    assert np.ptp(trees.raw(valid_wide)) == 0.0


def test_training_repeats_bit_for_bit() -> None:
    rows = (*planted(400, 4), *planted(200, 5))
    one, two = (boosting.fit_trees(*rows, SMALL, 3).to_dict() for _ in range(2))
    assert one == two


def test_unfit_rows_are_refused() -> None:
    wide, label = planted(60, 0)
    valid = planted(30, 1)
    with pytest.raises(DataError, match="0 positives in 60 training rows"):
        boosting.fit_trees(wide, np.zeros(60), *valid, SMALL, 0)
    with pytest.raises(DataError, match="0 validation rows"):
        boosting.fit_trees(wide, label, valid[0][:0], valid[1][:0], SMALL, 0)
    wide[0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        boosting.fit_trees(wide, label, *valid, SMALL, 0)
