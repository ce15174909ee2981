"""Gradient-boosted trees on the aggregates: fitted by LightGBM, kept as plain arrays.

The number of trees is the one with the best validation log loss, so that the stored trees are those that were
chosen; without any tree a row has the base rate.
"""

import logging
from typing import Any, NamedTuple

import numpy as np

from couponflow.errors import DataError
from couponflow.modelling import BoostingConfig
from couponflow.models.calibration import logit
from couponflow.models.tabular import Trees
from couponflow.training import metrics
from couponflow.training.metrics import Floats

log = logging.getLogger("couponflow")

#: The base rate is given as a score of its own; one thread and one layout give the same trees everywhere.
_FIXED = {
    "objective": "binary",
    "boost_from_average": False,
    "deterministic": True,
    "force_col_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}


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
    import lightgbm

    wide, valid_wide = np.asarray(wide, np.float64), np.asarray(valid_wide, np.float64)
    if not np.isfinite(wide).all() or not np.isfinite(valid_wide).all():
        raise DataError("boosted trees: a feature is not finite; run build_examples again")
    if len(np.unique(label)) < 2 or not len(valid_label):
        raise DataError(
            f"boosted trees: {int(np.sum(label))} positives in {len(label)} training rows and "
            f"{len(valid_label)} validation rows; both classes and some validation rows are needed, "
            "widen the dates of the examples"
        )
    base = logit(float(np.mean(label)))
    rows = lightgbm.Dataset(wide, label, init_score=np.full(len(label), base))
    judges = lightgbm.Dataset(
        valid_wide, valid_label, reference=rows, init_score=np.full(len(valid_label), base + valid_shift)
    )
    model = lightgbm.train(
        _FIXED
        | {
            "learning_rate": config.learning_rate,
            "num_leaves": config.max_leaves,
            "min_data_in_leaf": config.min_leaf_rows,
            "lambda_l2": config.l2,
            "seed": seed,
        },
        rows,
        config.max_trees,
        [judges],
        callbacks=[lightgbm.early_stopping(config.patience, verbose=False)],
    )
    trees = stored(model, wide.shape[1], base)
    kept = best_length(trees, valid_wide, valid_label, valid_shift)
    log.info("boosted trees: %d of %d kept", kept, trees.roots.size)
    return shortened(trees, kept)


class _Node(NamedTuple):
    """A row of ``Trees`` in the making."""

    feature: int = 0
    threshold: float = 0.0
    left: int = -1
    right: int = -1
    missing_left: int = 0
    value: float = 0.0


def stored(model: Any, num_features: int, baseline: float = 0.0) -> Trees:
    """The trees of a LightGBM booster for two classes and numeric features; ``baseline`` is its init score.

    Where training saw no missing value LightGBM reads one as 0, so it goes where 0 goes.
    """
    nodes: list[_Node] = []
    roots = []
    for tree in model.dump_model(num_iteration=-1)["tree_info"]:
        roots.append(len(nodes))
        waiting = [(tree["tree_structure"], -1, "left")]
        while waiting:
            part, parent, side = waiting.pop()
            place = len(nodes)
            if parent >= 0:
                nodes[parent] = nodes[parent]._replace(**{side: place})
            if "left_child" not in part:
                nodes.append(_Node(value=part["leaf_value"]))
                continue
            threshold = part["threshold"]
            is_left = part["default_left"] if part["missing_type"] == "NaN" else threshold >= 0.0
            nodes.append(_Node(part["split_feature"], threshold, missing_left=int(is_left)))
            waiting += [(part["right_child"], place, "right"), (part["left_child"], place, "left")]
    columns = {name: np.array([getattr(node, name) for node in nodes]) for name in _Node._fields}
    return Trees(baseline=baseline, num_features=num_features, roots=np.array(roots), **columns)


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
