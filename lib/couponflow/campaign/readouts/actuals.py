"""Expected against actual: what was predicted for mailed users, and what they did.

Shows calibration, never what a mail caused. Works on the cells of a readout, so for mails without any control
too. A cell holds users of nearly equal odds and is never cut: bins of equal mass are as equal as that allows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from couponflow.campaign.readouts import intervals
from couponflow.campaign.readouts.effects import Cell
from couponflow.campaign.readouts.intervals import NAN

NUM_DECILES = 10
#: Predicted over observed conversions; outside, a budget built on them is off.
RATIO_BAND = (0.9, 1.1)


@dataclass(frozen=True)
class Evaluated:
    """What the evaluation of the same model said: its record, and calibration on the test campaigns."""

    run_id: str
    model_version: str
    ratio: float | None
    ece: float | None


@dataclass(frozen=True)
class Group:
    """Mailed users together: how many, expected and actual conversions."""

    num_users: int
    expected: float
    actual: int


def by_score(cells: Iterable[Cell]) -> list[Group]:
    """Mailed users by bucket, lowest probability first, whatever their arm."""
    found: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.num_mailed:
            found.setdefault(cell.bucket, []).append(cell)
    return [_joined(_groups(found[bucket])) for bucket in sorted(found)]


def _groups(cells: Iterable[Cell]) -> list[Group]:
    return [Group(cell.num_mailed, cell.mailed_probability, cell.mailed_conversions) for cell in cells]


def _joined(groups: Iterable[Group]) -> Group:
    rows = list(groups)
    return Group(
        sum(group.num_users for group in rows),
        math.fsum(group.expected for group in rows),
        sum(group.actual for group in rows),
    )


def in_bins(groups: Sequence[Group], num_bins: int) -> dict[int, Group]:
    """Groups in ``num_bins`` bins of about equal users, by number from 1.

    A group belongs to the bin in which the share of users before it lies; a bin that a large group skips is
    absent.
    """
    total = sum(group.num_users for group in groups)
    bins: dict[int, list[Group]] = {}
    before = 0
    for group in groups:
        bins.setdefault(1 + before * num_bins // total, []).append(group)
        before += group.num_users
    return {number: _joined(rows) for number, rows in bins.items()}


def expected_against_actual(
    cells: Iterable[Cell], num_bins: int, evaluated: Evaluated | None
) -> dict[str, Any]:
    """Totals, table by decile of probability, calibration error, and how calibration moved since evaluation.

    ``ratio`` is expected over actual conversions, its interval by the delta method on the log with the
    binomial spread of the actual ones. ``is_drifted``: the interval excludes 1 and the ratio lies outside the
    band in which a budget may rest on it.
    """
    groups = by_score(cells)
    whole = _joined(groups)
    ratio, ends = _ratio(whole)
    gaps = [abs(group.expected - group.actual) for group in in_bins(groups, num_bins).values()]
    is_drifted = not RATIO_BAND[0] <= ratio <= RATIO_BAND[1] and not ends[0] <= 1.0 <= ends[1]
    if math.isnan(ratio):
        is_drifted = whole.expected > intervals.Z**2 + 1.0  # nobody came where 5 or more were expected
    return {
        "num_users": whole.num_users,
        "expected_conversions": whole.expected,
        "actual_conversions": whole.actual,
        "ratio": ratio,
        "ratio_interval": list(ends),
        "ece": math.fsum(gaps) / whole.num_users if whole.num_users else NAN,
        "deciles": [_decile(number, group) for number, group in in_bins(groups, NUM_DECILES).items()],
        "evaluation": _described(evaluated),
        "is_drifted": is_drifted,
        "words": _words(whole, ratio, is_drifted, evaluated),
    }


def _ratio(whole: Group) -> tuple[float, intervals.Interval]:
    if not (whole.actual and whole.expected):
        return NAN, intervals.NONE
    ratio = whole.expected / whole.actual
    width = intervals.Z * math.sqrt((1.0 - whole.actual / whole.num_users) / whole.actual)
    return ratio, (ratio * math.exp(-width), ratio * math.exp(width))


def _decile(number: int, group: Group) -> dict[str, Any]:
    low, high = intervals.wilson(group.actual, group.num_users)
    return {
        "decile": number,
        "num_users": group.num_users,
        "expected_conversions": group.expected,
        "actual_conversions": group.actual,
        "expected_rate": group.expected / group.num_users,
        "actual_rate": group.actual / group.num_users,
        "actual_interval": [low, high],
        "is_inside": low <= group.expected / group.num_users <= high,
    }


def _described(evaluated: Evaluated | None) -> dict[str, Any] | None:
    return None if evaluated is None else dict(vars(evaluated))


def _words(whole: Group, ratio: float, is_drifted: bool, evaluated: Evaluated | None) -> str:
    if not whole.num_users:
        return "No mailed user has a prediction."
    told = (
        f"{whole.expected:,.1f} conversions were expected of {whole.num_users:,} mailed users, "
        f"{whole.actual:,} came"
    )
    if not math.isnan(ratio):
        told += f": {ratio:.2f} times"
    if evaluated is not None and evaluated.ratio is not None:
        told += f", {evaluated.ratio:.2f} times when the model was evaluated"
    if is_drifted:
        return f"{told}. Calibration has drifted; run `couponflow models recalibrate` before the next budget."
    return f"{told}."


def find_evaluated(records: Iterable[Mapping[str, Any]], model_version: str) -> Evaluated | None:
    """The first of the evaluation records, oldest first, that judged this model; later ones do not count."""
    for record in records:
        for judged in record.get("models", {}).values():
            if judged.get("model_version") == model_version:
                found = judged.get("metrics", {})
                return Evaluated(
                    str(record.get("run_id", "")),
                    model_version,
                    found.get("calibration_ratio"),
                    found.get("ece"),
                )
    return None
