"""A registered model with a new calibrator: the same weights, another version. Never retrains.

Rows are those of the stored examples whose as_of lies in the range and whose label was final at the start of
``run.run_date``, the day whose users are to be scored. None of them may have trained the model.
"""

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.training import baselines, calibrators, feed, fitting, manifests, metrics, registry
from couponflow.training.metrics import Floats

if TYPE_CHECKING:
    from couponflow.models.bundle import Bundle
    from couponflow.models.calibration import Calibrator

log = logging.getLogger("couponflow")

#: What every kind of model is scored from, and when it was known.
_COLUMNS = (*feed.ALL_COLUMNS, "as_of", "mature_time")


@dataclass(frozen=True)
class Quality:
    """Calibration error and expected over observed conversions on the rows."""

    ece: float
    ratio: float


@dataclass(frozen=True)
class Recalibrated:
    """What a recalibration found. ``after`` is of calibrators fitted on the other half of the users each, so
    that no row judges the map that it shaped; without a fitted map it equals the new calibrator's.
    """

    parent: str
    version: str
    rows: int
    positives: int
    before: Quality
    after: Quality


def recalibrate(config: Config, name: str, dates: DateRange, run_id: str, dry_run: bool) -> Recalibrated:
    """Refit the calibrator of model ``name`` on the as_of days ``dates``; register it unless ``dry_run``.

    Raises:
        ConfigError: rows of the range trained the model, or the model is of another vocabulary.
        DataError: no such model, no rows with a final label, or rows that no calibrator can be fitted on.
    """
    from couponflow.models.bundle import load_bundle, save_bundle

    root_uri = config.lake.root_uri
    dataset = manifests.load(root_uri)
    parent = registry.resolve(root_uri, name)
    with tempfile.TemporaryDirectory() as folder:
        bundle = load_bundle(registry.fetch(root_uri, parent, Path(folder)), dataset.vocabulary_version)
        every = feed.read_dated(dataset, _COLUMNS)
        rows = matured_rows(config, bundle, parent, every, dates)
        made, before, after = refit(config, bundle, rows, every)
        label = [row.label for row in rows]
        made = replace(made, metrics={**bundle.metrics, "recalibrated": _origin(config, parent, dates, rows)})
        if not dry_run:
            save_bundle(made, Path(folder) / "recalibrated")
            registry.register(root_uri, Path(folder) / "recalibrated", run_id)
    return Recalibrated(parent, made.model_version, len(rows), int(sum(label)), before, after)


def matured_rows(
    config: Config, bundle: "Bundle", parent: str, every: list[feed.Example], dates: DateRange
) -> list[feed.Example]:
    """The rows of the range whose labels were final by ``run.run_date``.

    Raises:
        ConfigError: the model was fitted on one of them, or does not say what it was fitted on.
        DataError: there is none.
    """
    fitted_on = bundle.metrics.get("fitted_on") or {}
    if not {"from", "final_by"} <= set(fitted_on):
        raise ConfigError(f"model {parent} does not say which rows trained it; train it again")
    start, end = (calibrators.day_micros(config, day) for day in (dates.start, dates.end))
    found = [row for row in every if start <= row.as_of < end]
    trained = [
        row for row in found if fitted_on["from"] <= row.as_of and row.mature_time <= fitted_on["final_by"]
    ]
    if trained:
        raise ConfigError(
            f"--dates {dates}: model {parent} was fitted on {len(trained)} of {len(found)} rows; name days "
            "after those of its training"
        )
    known_by = calibrators.day_micros(config, config.run.run_date)
    rows = [row for row in found if row.mature_time <= known_by]
    if not rows:
        raise DataError(
            f"--dates {dates}: none of {len(found)} rows has a label that was final on run.run_date "
            f"{config.run.run_date}; name earlier days, or set run.run_date"
        )
    log.info("%d of %d rows have labels final by %s", len(rows), len(found), config.run.run_date)
    if judged := sum(row.as_of >= calibrators.instant(config, "test_start") for row in rows):
        log.warning(
            "%d of these rows are of split test: an evaluation of this model judges its calibration on rows "
            "that shaped it",
            judged,
        )
    return rows


def refit(
    config: Config, bundle: "Bundle", rows: list[feed.Example], every: list[feed.Example]
) -> tuple["Bundle", Quality, Quality]:
    """The bundle with a calibrator of ``rows``, and its quality before and after.

    Priors come from the rows in ``every`` that are final by ``run.run_date`` and did not train the model.

    Raises:
        DataError: as ``calibration.fit``.
    """
    from couponflow.models import calibration
    from couponflow.models.calibration import Calibrator

    logit, types = fitting.score_rows(bundle, rows), calibrators.row_types(rows)
    label = np.array([row.label for row in rows])
    held = bundle.calibrator
    base = Calibrator(sampling_rate=held.sampling_rate, positive_weight=held.positive_weight)
    fitted = calibration.fit(logit, label, types, config.calibration, base)
    shifts = _shifts(config, bundle, types, label, every)
    num_bins = config.evaluation.num_bins
    crossed = _crossed(config, base, shifts, logit, label, types, [row.user_id for row in rows])
    before = _quality(bundle.probabilities(logit, types), label, num_bins)
    made = replace(bundle, calibrator=replace(fitted, shifts=shifts))
    return made, before, _quality(crossed, label, num_bins)


def _shifts(
    config: Config, bundle: "Bundle", types: NDArray[Any], label: Floats, every: list[feed.Example]
) -> dict[str, float]:
    if config.calibration.prior == "none":
        return {}
    final_by = bundle.metrics["fitted_on"]["final_by"]
    rows = [row for row in every if row.mature_time > final_by]  # training rows may be a sample
    known_by = calibrators.day_micros(config, config.run.run_date)
    return calibrators.prior_shifts(types, label, calibrators.latest_matured(rows, known_by))


def _crossed(
    config: Config,
    base: "Calibrator",
    shifts: dict[str, float],
    logit: Floats,
    label: Floats,
    types: NDArray[Any],
    user_id: list[str],
) -> Floats:
    """Probabilities of each half of the users under a calibrator of the other half."""
    from couponflow.models import calibration

    # The whole has passed the bound of the isotonic map; halves of it need not.
    section = config.calibration.model_copy(update={"isotonic_positives": 2})
    fold = baselines.user_fold(user_id)
    probability = np.empty(label.size)
    for held_out in (0, 1):
        rows = fold == held_out
        fitted = calibration.fit(logit[~rows], label[~rows], types[~rows], section, base)
        probability[rows] = replace(fitted, shifts=shifts).apply(logit[rows], types[rows])
    return probability


def _quality(probability: Floats, label: Floats, num_bins: int) -> Quality:
    return Quality(metrics.ece(probability, label, num_bins), metrics.calibration_ratio(probability, label))


def _origin(config: Config, parent: str, dates: DateRange, rows: list[feed.Example]) -> dict[str, Any]:
    return {
        "parent": parent,
        "dates": str(dates),
        "rows": len(rows),
        "positives": int(sum(row.label for row in rows)),
        "known_by": str(config.run.run_date),
    }
