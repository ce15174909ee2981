"""Gradient-boosted trees on the aggregates: fitted by scikit-learn, kept as plain arrays.

scikit-learn's histogram boosting is of LightGBM's family (leaf-wise growth on binned features). The number of
trees is the one with the best validation log loss, so that the stored trees are those that were chosen.
"""

import logging
from typing import Any

import numpy as np

from couponflow.errors import DataError
from couponflow.modelling import BoostingConfig
from couponflow.models.tabular import Trees
from couponflow.training import metrics
from couponflow.training.metrics import Floats

log = logging.getLogger("couponflow")


def fit_trees(
    wide: Floats,
    label: Floats,
    valid_wide: Floats,
    valid_label: Floats,
    config: BoostingConfig,
    seed: int,
    valid_shift: float = 0.0,
) -> Trees:
    """Boost on ``wide`` [N,F] and ``label`` [N]; stop by the validation rows; repeats bit for bit.

    ``valid_shift`` is added to validation logits before their log loss: what undoes sampled training rows,
    which validation has not.

    Raises:
        DataError: one class only, no validation rows, or a value that is not finite.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    wide, valid_wide = np.asarray(wide, np.float64), np.asarray(valid_wide, np.float64)
    if not np.isfinite(wide).all() or not np.isfinite(valid_wide).all():
        raise DataError("boosted trees: a feature is not finite; run build_examples again")
    if len(np.unique(label)) < 2 or not len(valid_label):
        raise DataError(
            f"boosted trees: {int(np.sum(label))} positives in {len(label)} training rows and "
            f"{len(valid_label)} validation rows; both classes and some validation rows are needed, "
            "widen the dates of the examples"
        )
    model = HistGradientBoostingClassifier(
        learning_rate=config.learning_rate,
        max_iter=config.max_trees,
        max_leaf_nodes=config.max_leaves,
        min_samples_leaf=config.min_leaf_rows,
        l2_regularization=config.l2,
        early_stopping=True,
        n_iter_no_change=config.patience,
        tol=0.0,
        scoring="loss",
        random_state=seed,
    )
    model.fit(wide, label, X_val=valid_wide, y_val=valid_label)
    trees = stored(model, wide.shape[1])
    kept = best_length(trees, valid_wide, valid_label, valid_shift)
    log.info("boosted trees: %d of %d kept", kept, trees.roots.size)
    return shortened(trees, kept)


def stored(model: Any, num_features: int) -> Trees:
    """The trees of a fitted HistGradientBoostingClassifier for two classes and numeric features.

    A threshold of infinity (all that is not missing goes left) becomes the largest float.
    """
    nodes = [predictors[0].nodes for predictors in model._predictors]
    sizes = [len(part) for part in nodes]
    first = np.cumsum([0, *sizes[:-1]]) if sizes else np.zeros(0, np.int64)
    flat = np.concatenate(nodes)
    offset = np.repeat(first, sizes)
    is_leaf = flat["is_leaf"].astype(bool)
    return Trees(
        baseline=float(np.ravel(model._baseline_prediction)[0]),
        num_features=num_features,
        roots=first,
        feature=np.where(is_leaf, 0, flat["feature_idx"]),
        threshold=np.nan_to_num(np.where(is_leaf, 0.0, flat["num_threshold"])),
        left=np.where(is_leaf, -1, flat["left"].astype(np.int64) + offset),
        right=np.where(is_leaf, -1, flat["right"].astype(np.int64) + offset),
        missing_left=np.where(is_leaf, 0, flat["missing_go_to_left"]),
        value=np.where(is_leaf, flat["value"], 0.0),
    )


def best_length(trees: Trees, wide: Floats, label: Floats, shift: float = 0.0) -> int:
    """How many trees give the best log loss on these rows; of equally good numbers the smallest."""
    logit = np.full(len(wide), trees.baseline)
    losses = [metrics.log_loss(logit + shift, label)]
    for number in range(trees.roots.size):
        logit = logit + _one(trees, number).raw(wide)
        losses.append(metrics.log_loss(logit + shift, label))
    return int(np.argmin(losses))


def shortened(trees: Trees, length: int) -> Trees:
    """The first ``length`` trees."""
    end = int(trees.roots[length]) if length < trees.roots.size else trees.feature.size
    return _part(trees, 0, end, trees.roots[:length], trees.baseline)


def _one(trees: Trees, number: int) -> Trees:
    start = int(trees.roots[number])
    end = int(trees.roots[number + 1]) if number + 1 < trees.roots.size else trees.feature.size
    return _part(trees, start, end, np.zeros(1, np.int64), 0.0)


def _part(trees: Trees, start: int, end: int, roots: Any, baseline: float) -> Trees:
    def moved(children: Any) -> Any:
        return np.where(children[start:end] >= 0, children[start:end] - start, -1)

    return Trees(
        baseline=baseline,
        num_features=trees.num_features,
        roots=roots,
        feature=trees.feature[start:end],
        threshold=trees.threshold[start:end],
        left=moved(trees.left),
        right=moved(trees.right),
        missing_left=trees.missing_left[start:end],
        value=trees.value[start:end],
    )
