"""The progressive back-test: per cut-off a logistic model of what was known then, judged on what followed.

A row trains a cut-off iff its label was final by it, and tests it iff its as_of lies between it and the next:
no row's label window reaches over a cut-off that it trains (purge), and every test row is judged once.
Intervals are those of ``evaluation``: users are drawn, not rows.

Expected over observed conversions stand beside, by campaign too: as fitted, and moved by the shift of priors
to the rates of the latest campaigns that were final at the cut-off (``calibrators``). A first month, with few
campaigns behind it, shows there.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from couponflow.config import Config
from couponflow.errors import DataError
from couponflow.training import calibrators, evaluation, feed, manifests, metrics

if TYPE_CHECKING:
    from couponflow.models.tabular import Logistic

log = logging.getLogger("couponflow")


def run(config: Config, dataset: manifests.Dataset) -> dict[str, Any]:
    """Judge each cut-off of the dataset's manifest, and all of them together; empty without cut-offs.

    A cut-off whose training or test rows hold one class only has no AUC (null). There are no ratios without a
    model, and none of sampled negatives, whose rates are not those of the world.

    Raises:
        DataError: the rows of a fold differ from the manifest, or as ``feed.read_dated``.
    """
    from couponflow.training import baselines

    if not dataset.folds:
        return {}
    rows = feed.read_dated(dataset)
    wide = feed.aggregates(rows)
    label = np.array([row.label for row in rows])
    user = np.array([row.user_id for row in rows])
    types = calibrators.row_types(rows)
    found, tested, scored = [], [], []
    for fold in dataset.folds:
        train, test = fold_rows(rows, fold)
        _check_fold(dataset, fold, label, train, test)
        logit = np.full(test.size, np.nan)
        expected = {}
        if len(set(label[train])) == 2:
            model = baselines.fit_logistic(wide[train], label[train], config.training.logistic_c)
            held = [rows[place] for place in test]
            logit = _logits(model, held)
            if dataset.sampling_rate == 1.0:
                priors = calibrators.latest_matured([rows[place] for place in train], _micros(fold["start"]))
                shifts = calibrators.prior_shifts(types[train], label[train], priors)
                expected = _expected(logit, label[test], types[test], [row.target_id for row in held], shifts)
            tested.append(test)
            scored.append(logit)
        judged = _judged(logit, label[test], user[test], config)
        found.append({**_without_times(fold), **judged, **expected})
        _log(found[-1])
    pooled: dict[str, Any] = {"auc": None, "interval": None}
    if tested:
        together = np.concatenate(tested)
        pooled = _judged(np.concatenate(scored), label[together], user[together], config)
        pooled |= {"test_rows": int(together.size), "test_positives": int(label[together].sum())}
    _log({"cutoff": "all", **pooled})
    return {"folds": found, "pooled": pooled}


def _logits(model: "Logistic", rows: Sequence[feed.Example]) -> metrics.Floats:
    return np.concatenate([model.logits(batch) for batch in feed.batches(rows)] or [np.zeros(0)])


def _expected(
    logit: metrics.Floats, label: Any, types: Any, campaigns: Sequence[str], shifts: Mapping[str, float]
) -> dict[str, Any]:
    """Expected over observed conversions before and after the shift of priors, in all and by campaign."""
    from couponflow.models.calibration import Calibrator

    found = calibrators.ratios(
        Calibrator().apply(logit, types),
        Calibrator(shifts=dict(shifts)).apply(logit, types),
        label,
        np.array(campaigns),
    )
    return {"prior_shifts": dict(shifts), **found}


def fold_rows(rows: Sequence[feed.Example], fold: dict[str, Any]) -> tuple[Any, Any]:
    """Places of the rows that train and test a fold of the manifest."""
    as_of, mature = (np.array([getattr(row, name) for row in rows]) for name in ("as_of", "mature_time"))
    start, end = (_micros(fold[name]) for name in ("start", "end"))
    return np.flatnonzero(mature <= start), np.flatnonzero((as_of >= start) & (as_of < end))


def _micros(text: str) -> int:
    """UTC microseconds since 1970 of an ISO instant; '' is later than any."""
    if not text:
        return int(np.iinfo(np.int64).max)
    return round(datetime.fromisoformat(text).timestamp()) * 1_000_000


def _check_fold(dataset: manifests.Dataset, fold: dict[str, Any], label: Any, train: Any, test: Any) -> None:
    for part, places in (("train", train), ("test", test)):
        expected = fold[f"{part}_rows"], fold[f"{part}_positives"]
        if (counted := (places.size, int(label[places].sum()))) != expected:
            raise DataError(
                f"cut-off {fold['cutoff']} of {manifests.TABLE} version {dataset.table_version}: expected "
                f"{expected[0]} {part} rows, {expected[1]} positive, found {counted[0]}, {counted[1]}; "
                "run build_examples again"
            )


def _judged(logit: Any, label: Any, user: Any, config: Config) -> dict[str, Any]:
    """AUC with its interval; null where a class is missing."""
    if np.isnan(logit).any() or len(set(label)) < 2:
        return {"auc": None, "interval": None}
    ranked = metrics.Ordered(logit, label)
    section = config.evaluation
    draws = np.concatenate(
        [ranked.auc(weights) for weights in evaluation.draw_weights(user, section.num_draws, section.seed)]
    )
    return {"auc": metrics.auc(logit, label), "interval": list(evaluation.interval(draws))}


def _without_times(fold: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fold.items() if key not in ("start", "end")}


def _log(found: dict[str, Any]) -> None:
    auc = "no AUC"
    if found["auc"] is not None:
        low, high = found["interval"]
        auc = f"AUC {found['auc']:.3f} [{low:.3f}, {high:.3f}]"
    tested = f"test {found.get('test_rows', 0)} rows, {found.get('test_positives', 0)} positives"
    trained = f", train {found['train_rows']} rows" if "train_rows" in found else ""
    log.info("back-test %s: %s; %s%s", found["cutoff"], auc, tested, trained)
