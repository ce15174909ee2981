"""The same models by segment: where a good average hides a group that is ranked or priced badly.

A segment is read off what the stored examples hold, their aggregates and targets. The device of a user is
not stored there, so there is no segment of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from couponflow.lake import layouts
from couponflow.training import feed, metrics
from couponflow.training.feed import Example

#: A user is new for so many days after the first event that is known.
NEW_DAYS = 28
#: Fewer rows than this show nothing about a segment; each calibration bin holds as many.
MIN_ROWS = 50
NUM_DECILES = 10
LEFT_OUT = {"device": "not stored in the examples"}
_ACTIVITY = tuple(f"num_{name}_91_days" for name in ("lines", *layouts.BROWSING))
_TITLES = {"type_a": "Type A", "type_b": "Type B", "type_c": "Type C"}


def assign(rows: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Segment of each row by dimension, texts [N].

    ``user``: new (first known event at most ``NEW_DAYS`` ago, or none) or returning. ``campaign_type``: as
    the aggregates flag it. ``category``: the target's only category by its vocabulary index, or that there
    are several or none. ``activity``: decile of lines and browsing in the last 91 days, users of equal
    activity together, 10 the most active.
    """
    from couponflow.models import tabular

    wide = feed.aggregates(rows).astype(np.float64)

    def column(name: str) -> NDArray[np.float64]:
        return np.asarray(wide[:, layouts.WIDE_FEATURES.index(name)])

    is_new = np.expm1(column("tenure_days")) <= NEW_DAYS + 0.5  # stored as log1p in float32
    activity = np.sum([np.expm1(column(name)) for name in _ACTIVITY], axis=0)
    return {
        "user": np.where(is_new, "new", "returning"),
        "campaign_type": np.array(
            [_TITLES.get(name, name) for name in tabular.campaign_types(wide).tolist()]
        ),
        "category": np.array([_category(row.target) for row in rows], dtype="U32"),
        "activity": deciles(np.rint(activity)),
    }


def _category(target: bytes) -> str:
    members = np.frombuffer(target, "<i4").reshape(-1, len(layouts.TARGET_FIELDS))
    categories = set(members[:, layouts.TARGET_FIELDS.index("category")].tolist()) - {layouts.PAD}
    if len(categories) == 1:
        return f"category {categories.pop()}"
    return "several categories" if categories else "no category"


def deciles(values: NDArray[np.float64]) -> NDArray[Any]:
    """Tenth of the rows below each value, as texts 01 to 10; equal values share one, so some may be empty."""
    below = np.searchsorted(np.sort(values), values, side="left")
    place = 1 + below * NUM_DECILES // max(1, values.size)
    return np.array([f"{number:02}" for number in place.tolist()], dtype="U2")


def judge(
    logit: ArrayLike,
    probability: ArrayLike,
    label: ArrayLike,
    segments: Mapping[str, NDArray[Any]],
    num_bins: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Dimension -> segment -> rows, positives, auc, calibration_ratio, ece and a note on what is missing.

    A segment of fewer than ``MIN_ROWS`` rows has no metric, one of a single class no AUC. The calibration
    error is over fewer bins where a segment is small: a bin of a few rows measures chance.
    """
    scores, chances, labels = (np.asarray(values, np.float64) for values in (logit, probability, label))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for dimension, segment in segments.items():
        found[dimension] = {}
        for name in np.unique(segment).tolist():
            rows = segment == name
            size, positives = int(rows.sum()), int(labels[rows].sum())
            entry: dict[str, Any] = {"rows": size, "positives": positives}
            entry |= dict.fromkeys(("auc", "calibration_ratio", "ece"))
            if size < MIN_ROWS:
                entry["note"] = f"too few rows (fewer than {MIN_ROWS})"
            else:
                bins = min(num_bins, size // MIN_ROWS)
                entry["ece"] = metrics.ece(chances[rows], labels[rows], bins)
                if 0 < positives < size:
                    entry["auc"] = metrics.auc(scores[rows], labels[rows])
                if positives:
                    entry["calibration_ratio"] = metrics.calibration_ratio(chances[rows], labels[rows])
                entry["note"] = "" if 0 < positives < size else "one class only"
            found[dimension][name] = entry
    return found
