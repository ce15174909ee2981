"""The calibrator of a model: the configured map on rows it was not trained on, then the shift of priors.

The rate at which campaigns of one type convert moves from campaign to campaign. With
``calibration.prior = 'latest_matured'`` each type is moved from the rate of its calibration rows to that of
its latest campaign whose labels were all final by then, and by nothing newer.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from couponflow.config import Config
from couponflow.dates import day_start
from couponflow.errors import DataError
from couponflow.training import feed, manifests, metrics
from couponflow.training.metrics import Floats

if TYPE_CHECKING:
    from couponflow.models.bundle import Bundle
    from couponflow.models.calibration import Calibrator

log = logging.getLogger("couponflow")

#: Splits beside the training rows whose labels are final before the test range begins.
_MATURED_SPLITS = ("train_late", "valid")


@dataclass(frozen=True)
class Prior:
    """A campaign whose labels are final: its type, id and conversion rate."""

    campaign_type: str
    campaign_id: str
    rate: float


def fit(
    config: Config,
    dataset: manifests.Dataset,
    logit: Floats,
    label: Floats,
    types: NDArray[Any],
    base: "Calibrator",
) -> "Calibrator":
    """The calibrator of a model that has just been trained; all arrays are [N] over validation rows.

    Priors come from rows outside ``train`` whose labels were final when the test range began; the test range
    itself is not opened.

    Raises:
        DataError: as ``calibration.fit``, or the rows differ from the manifest.
    """
    from couponflow.models import calibration

    fitted = calibration.fit(logit, label, types, config.calibration, base)
    if config.calibration.prior == "none":
        return fitted
    rows = [
        row
        for split in _MATURED_SPLITS
        if dataset.rows(split)
        for row in feed.read_all(dataset, split, feed.DATED_COLUMNS)
    ]
    known_by = instant(config, "test_start")
    return replace(fitted, shifts=prior_shifts(types, label, latest_matured(rows, known_by)))


def instant(config: Config, name: str) -> int:
    """Start of a business day of section ``examples``, as UTC microseconds since 1970."""
    return day_micros(config, getattr(config.examples, name))


def day_micros(config: Config, day: date) -> int:
    """Start of a business day, as UTC microseconds since 1970."""
    return round(day_start(day, config.lake.time_zone).timestamp()) * 1_000_000


def latest_matured(rows: Sequence[feed.Example], known_by: int) -> dict[str, Prior]:
    """The latest campaign of each type all of whose rows were final by ``known_by``, microseconds.

    A campaign is as old as its last as_of; of two of one day the greater id counts.
    """
    if not rows:
        return {}
    types = row_types(rows)
    found: dict[str, tuple[tuple[int, str], Prior]] = {}
    campaigns: dict[tuple[str, str], list[feed.Example]] = {}
    for kind, row in zip(types.tolist(), rows, strict=True):
        campaigns.setdefault((kind, row.target_id), []).append(row)
    for (kind, campaign), members in campaigns.items():
        if max(row.mature_time for row in members) > known_by:
            continue
        age = max(row.as_of for row in members), campaign
        if kind not in found or age > found[kind][0]:
            rate = float(np.mean([row.label for row in members]))
            found[kind] = age, Prior(kind, campaign, rate)
    return {kind: prior for kind, (_, prior) in found.items()}


def prior_shifts(types: NDArray[Any], label: Floats, priors: Mapping[str, Prior]) -> dict[str, float]:
    """Type -> logit(rate of its latest matured campaign) - logit(rate of its calibration rows).

    ``types`` and ``label`` [N] are the calibration rows. A type without calibration rows or without a matured
    campaign, or with a rate of 0 or 1, is not moved; that is logged.
    """
    from couponflow.models import calibration

    shifts = {}
    for kind in sorted({*types.tolist(), *priors}):
        trained = float(label[types == kind].mean()) if (types == kind).any() else None
        prior = priors.get(kind)
        if trained is None or prior is None or not (0 < trained < 1 and 0 < prior.rate < 1):
            lacking = "no rate between 0 and 1 in its calibration rows"
            if prior is None:
                lacking = "no matured campaign"
            elif not 0 < prior.rate < 1:
                lacking = f"campaign {prior.campaign_id} has a rate of {prior.rate:g}"
            log.info("prior of campaigns of %s: not moved, %s", kind, lacking)
            continue
        shifts[kind] = calibration.prior_shift(trained, prior.rate)
        log.info(
            "prior of campaigns of %s: %.4f to %.4f of campaign %s, logit %+.3f",
            kind,
            trained,
            prior.rate,
            prior.campaign_id,
            shifts[kind],
        )
    return shifts


def row_types(rows: Sequence[feed.Example]) -> NDArray[Any]:
    """The campaign type of each stored row, [N]."""
    from couponflow.lake import layouts
    from couponflow.models import tabular

    if not rows:
        return np.zeros(0, "U1")
    wide = feed.aggregates(rows)
    if wide.shape[1] != len(layouts.WIDE_FEATURES):
        raise DataError(f"{wide.shape[1]} aggregates, expected {len(layouts.WIDE_FEATURES)}; rebuild them")
    return np.asarray(tabular.campaign_types(wide))


def described(
    bundle: "Bundle", logit: Floats, label: Floats, types: NDArray[Any], campaigns: NDArray[Any]
) -> dict[str, Any]:
    """What an evaluation keeps of a calibrator: its map, and expected over observed conversions without and
    with the shift of priors, in all and by campaign.
    """
    calibrator = bundle.calibrator
    found: dict[str, Any] = {
        "method": calibrator.method,
        "segments": sorted(calibrator.segments),
        "prior_shifts": dict(sorted(calibrator.shifts.items())),
    }
    if calibrator.shifts:
        unmoved = replace(calibrator, shifts={}).apply(logit, types)
        moved = calibrator.apply(logit, types)
        found["prior"] = ratios(unmoved, moved, label, campaigns)
    return found


def ratios(unmoved: Floats, moved: Floats, label: Floats, campaigns: NDArray[Any]) -> dict[str, Any]:
    """Rows, conversions, and expected over observed conversions before and after a shift, [N] each.

    In all and by campaign; a ratio is null where no conversion was observed. ``z_*`` is expected minus
    observed in standard deviations of independent rows, ``(sum p - sum y) / sqrt(sum p (1 - p))``: beyond 3,
    chance is no explanation.
    """

    def both(rows: NDArray[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": int(rows.sum()), "positives": int(label[rows].sum())}
        for name, values in (("before", unmoved[rows]), ("after", moved[rows])):
            has_ratio = found["positives"] > 0
            found[f"ratio_{name}"] = metrics.calibration_ratio(values, label[rows]) if has_ratio else None
            sd = float(np.sqrt((values * (1.0 - values)).sum()))
            found[f"z_{name}"] = float((values - label[rows]).sum()) / sd if sd else None
        return found

    by_campaign = {str(campaign): both(campaigns == campaign) for campaign in np.unique(campaigns)}
    return {**both(np.ones(label.size, dtype=bool)), "by_campaign": by_campaign}
