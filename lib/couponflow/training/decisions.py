"""Whether a challenger replaces the champion: the rule, and the record that every decision leaves.

Superiority, not equality: a challenger is promoted only where it ranks better than the champion by more than
chance on each of several successive cut-offs, all test rows together can show a difference of that size, and
its probabilities are as good. Records are objects ``decisions/<run_id>.json``, written once.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from couponflow.errors import DataError
from couponflow.lake import storage
from couponflow.sections import EvaluationConfig
from couponflow.training import evaluation
from couponflow.training.evaluation import Comparison, Judged, LabelledRows, ScoredModel

#: Promotion needs the expected over the observed conversions inside this range.
RATIO_RANGE = (0.9, 1.1)
#: One good period may be luck.
MIN_CUTOFFS = 2
PROMOTE, KEEP = "promote", "keep_champion"
_METRICS = ("auc", "pr_auc", "log_loss", "ece", "calibration_ratio")


@dataclass(frozen=True)
class CutOff:
    """Successive test rows from one cut-off to the next; no comparison where one class only follows it."""

    first_day: str
    last_day: str
    num_rows: int
    num_positives: int
    comparison: Comparison | None

    @property
    def title(self) -> str:
        """Its days and size, as reasons name it."""
        rows = f"{self.num_rows} rows, {self.num_positives} positive"
        return f"({self.first_day} to {self.last_day}, {rows})"

    def as_dict(self) -> dict[str, Any]:
        """The cut-off as records keep it."""
        return {
            "first_day": self.first_day,
            "last_day": self.last_day,
            "num_rows": self.num_rows,
            "num_positives": self.num_positives,
            "comparison": self.comparison.as_dict() if self.comparison else None,
        }


def cut_offs(day: NDArray[Any], label: NDArray[Any], number: int) -> list[NDArray[np.intp]]:
    """Places of the rows that follow each cut-off, in time order; every row belongs to one.

    ``day`` and ``label`` [N]. Cut-offs lie between two days, where the shares of positives come closest to
    equal; days that are too few give fewer cut-offs.
    """
    days, place = np.unique(day, return_inverse=True)
    known = np.cumsum(np.bincount(place, weights=label, minlength=days.size))
    edges = {0, int(days.size)}
    for share in np.arange(1, number) / number if days.size > 1 else ():
        edges.add(1 + int(np.argmin(np.abs(known[:-1] - share * known[-1]))))
    ordered = sorted(edges)
    return [np.flatnonzero((place >= first) & (place < end)) for first, end in itertools.pairwise(ordered)]


def judge(
    overall: Comparison,
    cutoffs: Sequence[CutOff],
    challenger_metrics: dict[str, Any],
    champion_metrics: dict[str, Any],
    ece_error: float,
    is_identical: bool = False,
) -> dict[str, Any]:
    """Whether a challenger replaces the champion, with a reason for each condition.

    A reason is the condition's name, whether it holds, a text, and the values that the text is about.

    ``overall`` compares the two on all rows; ``ece_error`` is the standard error of the difference of their
    calibration errors. Promotion needs: other scores than the champion; at least ``MIN_CUTOFFS`` cut-offs; a
    lower bound of the paired difference above 0 on every one of them and on all rows; a difference on all
    rows that is testable; expected over observed conversions in ``RATIO_RANGE``; a calibration error that is
    not above the champion's by more than one ``ece_error``: of two models that are calibrated alike each has
    the higher error half of the time, so that a bare comparison would be a coin.
    """
    reasons: list[dict[str, Any]] = []

    def condition(name: str, holds: bool, text: str, **values: Any) -> None:
        reasons.append({"condition": name, "holds": holds, "text": text, **values})

    if is_identical:
        condition("identical", False, "challenger and champion score every row alike")
    if len(cutoffs) < MIN_CUTOFFS:
        text = f"{len(cutoffs)} of {MIN_CUTOFFS} cut-offs: the test rows lie on too few days"
        condition("num_cutoffs", False, text)
    for place, found in enumerate(cutoffs, start=1):
        where = f"cut-off {place} of {len(cutoffs)} {found.title}"
        values = {"place": place, "num_cutoffs": len(cutoffs), **found.as_dict()}
        if found.comparison is None:
            condition("cutoff", False, f"{where}: one class only, no verdict", **values)
            continue
        is_better = found.comparison.interval[0] > 0.0
        condition("cutoff", is_better, f"{where}: {_difference(found.comparison)}", **values)
    is_better, text = overall.interval[0] > 0.0, f"all test rows: {_difference(overall)}"
    condition("all_rows", is_better, text, comparison=overall.as_dict())
    if is_better and not overall.is_testable:
        text = "all test rows: a difference below the minimum detectable one is no claim"
        condition("testable", False, text)
    ratio = challenger_metrics["calibration_ratio"]
    text = f"expected over observed conversions {ratio:.3f}, allowed {RATIO_RANGE[0]} to {RATIO_RANGE[1]}"
    known = ratio if math.isfinite(ratio) else None
    is_in_range = RATIO_RANGE[0] <= ratio <= RATIO_RANGE[1]
    condition("calibration_ratio", is_in_range, text, challenger=known, allowed=list(RATIO_RANGE))
    own, other = challenger_metrics["ece"], champion_metrics["ece"]
    text = f"calibration error {own:.4f}, champion {other:.4f}, standard error {ece_error:.4f}"
    values = {"challenger": own, "champion": other, "standard_error": ece_error}
    condition("ece", own <= other + ece_error, text, **values)
    reasons.sort(key=lambda reason: bool(reason["holds"]))  # what fails stands first
    return {"decision": PROMOTE if all(reason["holds"] for reason in reasons) else KEEP, "reasons": reasons}


def _difference(found: Comparison) -> str:
    low, high = found.interval
    return (
        f"{found.metric} difference {found.difference:+.4f} [{low:+.4f}, {high:+.4f}], "
        f"minimum detectable {found.minimum_detectable:.4f}"
    )


def decide(
    rows: LabelledRows, models: Sequence[ScoredModel], judged: Judged, config: EvaluationConfig
) -> dict[str, Any]:
    """The gate over all challengers: names the one that may be promoted, or else the best of them.

    The order among equals: promoted ones first, then the larger difference.
    """
    by_name = {model.name: model for model in models}
    champion = by_name[judged.champion]
    parts = cut_offs(rows.day, rows.label, config.num_cutoffs)
    verdicts: list[dict[str, Any]] = []
    for overall in judged.comparisons:
        challenger = by_name[overall.challenger]
        found = [_cut_off(rows, challenger, champion, places, config) for places in parts]
        verdict = judge(
            overall,
            found,
            judged.points[challenger.name],
            judged.points[champion.name],
            judged.ece_errors[challenger.name],
            bool(np.array_equal(challenger.logit, champion.logit)),
        )
        verdicts.append(
            {
                "challenger": challenger.name,
                "challenger_version": challenger.model_version,
                **verdict,
                "comparison": overall.as_dict(),
                "cutoffs": [cutoff.as_dict() for cutoff in found],
            }
        )
    no_rival: dict[str, Any] = {
        "challenger": None,
        "challenger_version": None,
        "decision": KEEP,
        "reasons": [{"condition": "no_rival", "holds": False, "text": "there is no challenger"}],
        "comparison": None,
        "cutoffs": [],
    }
    best = min(
        verdicts,
        key=lambda v: (v["decision"] != PROMOTE, -v["comparison"]["difference"]),
        default=no_rival,
    )
    return {"champion": champion.name, "champion_version": champion.model_version, **best}


def _cut_off(
    rows: LabelledRows,
    challenger: ScoredModel,
    champion: ScoredModel,
    places: NDArray[np.intp],
    config: EvaluationConfig,
) -> CutOff:
    days, label = np.unique(rows.day[places]), rows.label[places]
    has_both = 0 < label.sum() < label.size
    compared = evaluation.compare_on(rows, challenger, champion, places, config) if has_both else None
    return CutOff(str(days[0]), str(days[-1]), int(label.size), int(label.sum()), compared)


def write(root_uri: str, run_id: str, evaluated: dict[str, Any], evaluation_uri: str) -> str:
    """Keep what was decided and on which evidence: ``decisions/<run_id>.json``; returns its URI.

    ``evaluated`` is the evaluation record.

    Raises:
        ConflictError: the run has written another decision.
    """
    gate = evaluated["gate"]

    def side(name: str) -> dict[str, Any] | None:
        if gate[name] is None:
            return None
        model = evaluated["models"][gate[name]]
        return {
            "name": gate[name],
            "model_version": model["model_version"],
            "metrics": {key: model["metrics"][key] for key in _METRICS},
            "intervals": model["intervals"],
        }

    kept = ("dates", "split", "training_examples_version", "vocabulary_version")
    sizes = ("num_rows", "num_positives", "num_users")
    record = {
        "run_id": run_id,
        "decision": gate["decision"],
        "reasons": gate["reasons"],
        "champion": side("champion"),
        "challenger": side("challenger"),
        "comparison": gate["comparison"],
        "cutoffs": gate["cutoffs"],
        "data": {key: evaluated[key] for key in (*kept, *sizes)},
        "evaluation": evaluation_uri,
    }
    uri = storage.join(root_uri, "decisions", f"{run_id}.json")
    storage.create(uri, json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode(), run_id)
    return uri


def last(root_uri: str, model_version: str = "") -> dict[str, Any] | None:
    """The newest decision, or the newest that judged this model; None where there is none.

    Raises:
        DataError: a record is damaged.
    """
    folder = storage.join(root_uri, "decisions")
    for name in reversed(storage.list_names(folder)):  # run ids begin with job and time
        uri = storage.join(folder, name)
        try:
            record = dict(json.loads(storage.read_bytes(uri)))
            sides = {side["model_version"] for side in (record["champion"], record["challenger"]) if side}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{uri} is no decision record ({error!r}); restore it") from error
        if not model_version or model_version in sides:
            return record
    return None
