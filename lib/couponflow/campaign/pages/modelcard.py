"""What the report says about the models: the evaluation record as rows, words and curves. Computes no metric.

A row of ``model_rows`` is what templates and charts know of a model; the other functions name models by it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from couponflow.campaign.pages import charts, formats

Facts = Mapping[str, Any]

KINDS = {  # label, what it is, colour class, dash pattern
    "rate": ("Base rate", "one probability for all", "c4", "1 3"),
    "rule": ("Rule", "recency and frequency", "c3", "9 3"),
    "boosted": ("Boosted trees", "on aggregates", "c4", "9 3 2 3"),
    "logistic": ("Logistic regression", "on aggregates", "c2", "7 4"),
    "dien": ("DIEN", "sequences and aggregates", "c1", ""),
    "blend": ("Blend", "of DIEN and logistic regression", "c3", "2 4"),
}
LOWER_IS_BETTER = {"log_loss", "normalised_entropy", "ece", "brier"}
METRICS = {
    "auc": "AUC",
    "gauc": "grouped AUC",
    "pr_auc": "PR-AUC",
    "log_loss": "log loss",
    "ece": "calibration error",
}
#: Ways to cut the test rows, as ``segments`` names them.
DIMENSIONS = {
    "user": "User",
    "campaign_type": "Campaign type",
    "category": "Target category (number in the vocabulary)",
    "activity": "Activity (tenths of the sends, 10 the most active users)",
}
RELATIONS = {  # what an event shares with the coupons of the mail: words, colour class
    "item": ("an item of the coupons", "c2"),
    "category": ("a category of the coupons", "c1"),
    "shop": ("a shop of the coupons", "c3"),
    "other": ("nothing of the coupons", "rest"),
}
#: Standard deviations beyond which expected and observed conversions differ by more than chance.
_CHANCE_SDS = 3.0
_RANK_DASHES = ("", "7 4", "2 4", "9 3 2 3")


def pair(values: Any) -> tuple[float, float] | None:
    """Both ends of an interval, if they are numbers."""
    if isinstance(values, list | tuple) and len(values) == 2 and all(charts.is_number(v) for v in values):
        return float(values[0]), float(values[1])
    return None


def style(kind: str) -> tuple[str, str, str]:
    """Label, colour class and dash pattern of a kind of model."""
    if kind in KINDS:
        label, _, colour, dash = KINDS[kind]
        return label, colour, dash
    return kind.replace("_", " "), "c4", "9 3 2 3"


def model_rows(evaluation: Facts, scored_version: str, scored_kind: str) -> list[dict[str, Any]]:
    """Each evaluated model, best AUC first; the one that scored the list is marked by version, or by kind."""
    rows = []
    for kind, record in sorted((evaluation.get("models") or {}).items()):
        label, colour, dash = style(kind)
        metrics = record.get("metrics") or {}
        intervals = record.get("intervals") or {}
        is_used = record.get("model_version") == scored_version if scored_version else kind == scored_kind
        rows.append(
            {
                "kind": kind,
                "label": label,
                "about": KINDS[kind][1] if kind in KINDS else "",
                "colour": colour,
                "dash": dash,
                "version": record.get("model_version", ""),
                "is_used": is_used,
                "metrics": metrics,
                "lift": metrics.get("lift") or {},
                "captured": metrics.get("captured") or {},
                "brier_parts": metrics.get("brier_parts") or {},
                "intervals": {name: pair(values) for name, values in intervals.items()},
                "reliability": record.get("reliability") or [],
                "reliability_uncalibrated": record.get("reliability_uncalibrated") or [],
                "gain_curve": record.get("gain_curve") or [],
                "by_campaign": record.get("by_campaign") or {},
                "segments": record.get("segments") or {},
            }
        )
    return sorted(rows, key=lambda row: (-_sortable(row["metrics"].get("auc")), row["kind"]))


def _sortable(value: Any) -> float:
    return float(value) if charts.is_number(value) else -math.inf


def _find(models: Sequence[Facts], name: Any) -> Facts:
    """The model of a kind or version; an unknown one keeps its name."""
    for model in models:
        if name in (model["kind"], model["version"]):
            return model
    label, colour, _ = style(str(name or "none"))
    return {"kind": name, "label": label, "colour": colour}


def gate(evaluation: Facts, models: Sequence[Facts]) -> dict[str, Any] | None:
    """What the gate would choose and why; None without a decision."""
    found = evaluation.get("gate") or {}
    if not found:
        return None
    champion, challenger = (_find(models, found.get(side)) for side in ("champion", "challenger"))
    is_promoted = found.get("decision") == "promote"
    choice, other = (challenger, champion) if is_promoted else (champion, challenger)
    used = next((model for model in models if model["is_used"]), None)
    sides = {champion["kind"], challenger["kind"]}
    tested: Facts = next(
        (
            row
            for row in evaluation.get("comparisons") or []
            if {_find(models, row.get(side))["kind"] for side in ("champion", "challenger")} == sides
        ),
        {},
    )
    return {
        "is_promoted": is_promoted,
        "choice": choice["label"],
        "other": other["label"] if found.get("challenger") else "",
        "reasons": [reason(record) for record in found.get("reasons") or []],
        "cutoffs": [_cut_off(row) for row in found.get("cutoffs") or []],
        "metric": METRICS.get(tested.get("metric", ""), tested.get("metric", "")),
        "detectable": tested.get("minimum_detectable"),
        "used_label": used["label"] if used else None,
        "is_used_choice": used is not None and used["kind"] == choice["kind"],
    }


def _cut_off(row: Facts) -> dict[str, Any]:
    compared = row.get("comparison") or {}
    return {
        **{name: row.get(name) for name in ("first_day", "last_day", "num_rows", "num_positives")},
        "difference": compared.get("difference"),
        "interval": pair(compared.get("interval")),
        "detectable": compared.get("minimum_detectable"),
    }


def reason(record: Facts) -> tuple[str, str]:
    """Mark and plain words of a condition of the gate; one without words of its own keeps its text."""
    words = _WORDS.get(record.get("condition", ""), _text)
    return "✓" if record.get("holds") else "✗", words(record)


def _text(record: Facts) -> str:
    return str(record.get("text", ""))


def _cut_off_in_words(record: Facts) -> str:
    days = f"{record['first_day']} to {record['last_day']}"
    period = f"test period {record['place']} of {record['num_cutoffs']}"
    if record["comparison"] is None:
        return f"{period} ({days}) shows nothing: all or none converted"
    sends, positives = (formats.number(record[name]) for name in ("num_rows", "num_positives"))
    where = f"on {period} ({days}, {sends} sends, {positives} conversions)"
    return _difference_in_words(record["comparison"], where)


def _difference_in_words(compared: Facts, where: str) -> str:
    numbers = (compared["difference"], *compared["interval"])
    difference, low, high = (formats.decimal(number, is_signed=True) for number in numbers)
    return (
        f"{METRICS.get(compared['metric'], compared['metric'])} differs from the champion's by {difference} "
        f"{where}, with chance between {low} and {high}, where both ends have to be above 0; the smallest "
        f"difference that would be found there is about {formats.decimal(compared['minimum_detectable'])}"
    )


def _ratio_in_words(record: Facts) -> str:
    low, high = record["allowed"]
    ratio = formats.decimal(record["challenger"], 2)
    return f"it predicted {ratio} times the conversions that came; {low:g} to {high:g} is allowed"


def _error_in_words(record: Facts) -> str:
    names = ("challenger", "champion", "standard_error")
    own, champion, error = (formats.decimal(record[name], 4) for name in names)
    return (
        f"its calibration error is {own}; the champion's {champion} must not be exceeded by more than "
        f"chance easily does, {error}"
    )


#: Words for the conditions of the gate, by the names that ``training.decisions`` gives them.
_WORDS: dict[str, Callable[[Facts], str]] = {
    "cutoff": _cut_off_in_words,
    "all_rows": lambda record: _difference_in_words(record["comparison"], "on all test sends together"),
    "calibration_ratio": _ratio_in_words,
    "ece": _error_in_words,
}


def comparisons(evaluation: Facts, models: Sequence[Facts]) -> list[dict[str, Any]]:
    """Paired differences with what they mean; the smallest detectable one stands beside each."""
    rows = []
    for record in evaluation.get("comparisons") or []:
        challenger, champion = (_find(models, record.get(side)) for side in ("challenger", "champion"))
        metric, interval = record.get("metric", "auc"), pair(record.get("interval"))
        smallest, difference = record.get("minimum_detectable"), record.get("difference")
        verdict = "No interval, so nothing is claimed."
        if interval:
            sign = -1 if metric in LOWER_IS_BETTER else 1
            low, high = sorted((sign * interval[0], sign * interval[1]))
            if low > 0:
                verdict = f"{challenger['label']} is better: the whole interval is in its favour."
            elif high < 0:
                verdict = f"{challenger['label']} is worse: the whole interval is against it."
            else:
                verdict = "No difference is shown: the interval includes zero."
        if charts.is_number(smallest):
            verdict += f" A true difference below about {formats.decimal(smallest)} would easily go unseen."
        rows.append(
            {
                "name": f"{challenger['label']} {charts.MINUS} {champion['label']}",
                "metric": METRICS.get(metric, metric),
                "difference": difference,
                "interval": interval,
                "detectable": smallest,
                "verdict": verdict,
                "colour": challenger["colour"],
            }
        )
    return rows


def backtest(evaluation: Facts) -> list[dict[str, Any]]:
    """Cut-offs of the back-test, oldest first, each with the campaigns that followed it."""
    rows = []
    for fold in (evaluation.get("backtest") or {}).get("folds") or []:
        campaigns = fold.get("by_campaign") or {}
        rows.append(
            {
                "cutoff": fold.get("cutoff"),
                "auc": fold.get("auc"),
                "interval": pair(fold.get("interval")),
                **_expectation(fold),
                "campaigns": [
                    {"campaign": name, **_expectation(campaigns[name])}
                    for name in sorted(campaigns, key=lambda name: (len(name), name))  # 9 before 10
                ],
            }
        )
    return rows


def _expectation(found: Facts) -> dict[str, Any]:
    """Sends, conversions, and expected over observed ones as fitted and moved; marked beyond chance."""
    z_scores = {name: found.get(f"z_{name}") for name in ("before", "after")}
    return {
        "rows": found.get("test_rows", found.get("rows")),
        "positives": found.get("test_positives", found.get("positives")),
        "before": found.get("ratio_before"),
        "after": found.get("ratio_after"),
        **{f"is_off_{n}": charts.is_number(z) and abs(z) > _CHANCE_SDS for n, z in z_scores.items()},
    }


def segments(used: Facts | None) -> list[dict[str, Any]]:
    """Dimensions with a row per segment of the model in use; segments of too few rows share one row."""
    found = []
    for dimension, by_name in (used or {}).get("segments", {}).items():
        small = [entry for entry in by_name.values() if str(entry.get("note", "")).startswith("too few")]
        rows = [{"name": name, **by_name[name]} for name in sorted(by_name) if by_name[name] not in small]
        if small:
            total = {key: sum(entry.get(key) or 0 for entry in small) for key in ("rows", "positives")}
            rows.append({"name": f"{len(small)} more", **total, "note": f"{small[0]['note']} in each"})
        found.append({"title": DIMENSIONS.get(dimension, dimension.replace("_", " ")), "rows": rows})
    return found


def validation_losses(evaluation: Facts) -> list[charts.Series]:
    """Validation log loss per epoch of every model that was trained in epochs."""
    made = []
    for kind, record in sorted((evaluation.get("training") or {}).items()):
        points = _epoch_points((record or {}).get("epochs") or [], "valid_log_loss")
        label, colour, dash = style(kind)
        made += [charts.Series(label, points, colour, dash)] if len(points) > 1 else []
    return made


def learning(evaluation: Facts, used: Facts | None) -> dict[str, Any]:
    """Loss per epoch of the model in use, or else of the first one trained in epochs.

    One training curve per rank where the record has them, the global one otherwise, and validation beside.
    """
    trained = {
        kind: record.get("epochs") or [] for kind, record in (evaluation.get("training") or {}).items()
    }
    kinds = [kind for kind in sorted(trained) if len(trained[kind]) > 1]
    kinds.sort(key=lambda kind: used is None or kind != used["kind"])
    if not kinds:
        return {"label": "", "series": [], "num_ranks": 0}
    epochs = trained[kinds[0]]
    num_ranks = min(len(epoch.get("train_loss_by_rank") or ()) for epoch in epochs)
    curves = [
        charts.Series(
            f"Training, rank {rank}",
            [
                (epoch["epoch"], epoch["train_loss_by_rank"][rank])
                for epoch in epochs
                if charts.is_number(epoch["train_loss_by_rank"][rank])
            ],
            ("c1", "c2", "c3")[rank % 3],
            _RANK_DASHES[rank % len(_RANK_DASHES)],
        )
        for rank in range(num_ranks)
    ] or [charts.Series("Training, all ranks", _epoch_points(epochs, "train_loss"), "c1")]
    curves.append(charts.Series("Validation", _epoch_points(epochs, "valid_log_loss"), "c4", "1 4"))
    kept = [curve for curve in curves if len(curve.points) > 1]
    return {"label": style(kinds[0])[0], "series": kept, "num_ranks": num_ranks}


def _epoch_points(epochs: Sequence[Facts], name: str) -> list[tuple[float, float]]:
    return [(epoch["epoch"], epoch[name]) for epoch in epochs if charts.is_number(epoch.get(name))]


def attention(evaluation: Facts, used: Facts | None) -> dict[str, Any] | None:
    """Events of one send with their weights, and what each relation weighs together; None without any.

    Of the model in use, or else of the first one that has an attention.
    """
    found = {kind: sample for kind, sample in (evaluation.get("attention") or {}).items() if sample}
    kinds = sorted(found, key=lambda kind: (used is None or kind != used["kind"], kind))
    if not kinds:
        return None
    events = found[kinds[0]]["events"]
    whole = sum(event["weight"] for event in events) or 1.0
    shares = []
    for relation, (name, colour) in RELATIONS.items():
        weights = [event["weight"] for event in events if event["relation"] == relation]
        if weights:
            row = {"name": name, "colour": colour, "events": len(weights), "share": sum(weights) / whole}
            shares.append(row)
    bars = [(event["weight"] / whole, RELATIONS[event["relation"]][1]) for event in events]
    return {
        "label": style(kinds[0])[0],
        "sends": found[kinds[0]].get("sends"),
        "oldest_days": events[0]["age_days"],
        "newest_days": events[-1]["age_days"],
        "bars": bars,
        "shares": shares,
    }


def gain_rows(used: Facts | None) -> dict[str, Any] | None:
    """The gain curve of the model in use, thinned to about twenty rows."""
    if not used or not used["gain_curve"]:
        return None
    step = -(-len(used["gain_curve"]) // 21)
    return {"label": used["label"], "points": used["gain_curve"][::step]}
