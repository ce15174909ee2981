"""A selection's prospects as people read them: the forecast with its intervals, and whom the mail reaches.

Works on the facts of ``select_audience`` alone; any of them may be missing. The report and the terminal show
the same words.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from couponflow.campaign.pages import charts, formats

Facts = Mapping[str, Any]
Show = Callable[[str, list[str], list[list[Any]]], None]

#: Expected value -> what it is called; amounts of money but for the first.
EXPECTED = {
    "expected_conversions": "expected conversions",
    "expected_cost_amount": "expected cost",
    "expected_profit_amount": "expected profit",
}
SHOWN_GROUPS = 12  # on the terminal; the report has all of them
_CHART_NAME = 34  # characters of a group's name beside its numbers in a chart
_INTERVAL = "95 % interval"


def interval(facts: Facts, name: str, currency: str) -> str:
    """The interval of an expected value in the reader's units; empty where there is none."""
    ends = facts.get(f"{name}_interval")
    if not ends:
        return ""
    is_count = name == "expected_conversions"
    return " to ".join(formats.number(end) if is_count else formats.money(end, currency) for end in ends)


def forecast_rows(facts: Facts, currency: str) -> list[list[Any]]:
    """Name, expected value and interval of what a selection expects; a missing one is a dash."""
    rows: list[list[Any]] = []
    for name, label in EXPECTED.items():
        value = facts.get(name)
        is_count = name == "expected_conversions"
        shown = formats.number(value) if is_count else formats.money(value, currency)
        rows.append([label, shown, interval(facts, name, currency) or formats.DASH])
    return rows


def forecast_context(facts: Facts, currency: str) -> dict[str, str]:
    """What the report says of a forecast: the interval of each expected value, and what they cover."""
    found = {name: interval(facts, name, currency) for name in EXPECTED}
    return found | {"words": facts.get("forecast_words") or ""}


def by_attribute(facts: Facts) -> list[tuple[str, list[Facts]]]:
    """The rows of ``reach`` by attribute, both in their order; one group alone compares with nothing."""
    found: dict[str, list[Facts]] = {}
    for row in (facts.get("reach") or {}).get("groups") or []:
        found.setdefault(row["attribute"], []).append(row)
    return [(attribute, rows) for attribute, rows in found.items() if len(rows) > 1]


def reach_context(facts: Facts) -> list[dict[str, Any]]:
    """Per attribute its name, its rows, and a picture of the ratios with their intervals as SVG, if any."""
    return [
        {
            "attribute": attribute.replace("_", " "),
            "rows": [
                row | {"is_apart": is_apart(row), "shown_ratio": ratio(row), "shown_interval": ends(row)}
                for row in map(dict, rows)
            ],
            "chart": _chart(f"reach-{place}", attribute.replace("_", " "), rows),
        }
        for place, (attribute, rows) in enumerate(by_attribute(facts))
    ]


def is_apart(row: Facts) -> bool:
    """Whether the interval of a group's ratio leaves out 1: chance alone would hardly do that."""
    low, high = row.get("ratio_interval") or (1.0, 1.0)
    return bool(high < 1.0 or low > 1.0)


def ratio(row: Facts) -> str:
    """A group's ratio, or a dash."""
    return formats.decimal(row.get("ratio"), 2)


def ends(row: Facts) -> str:
    """The interval of a group's ratio, or nothing."""
    return " to ".join(formats.decimal(end, 2) for end in row.get("ratio_interval") or ())


def show_all(facts_by_stage: Mapping[str, Facts], currency: str, show: Show) -> None:
    """Print forecast and reach of each campaign that was selected for."""
    for stage, facts in facts_by_stage.items():
        if not stage.startswith("select_audience"):
            continue
        title = f"Campaign {facts.get('campaign_id', '')}"
        if "forecast_words" in facts:
            about = "chance alone, without the model's error"
            columns = ["mailed users", "expected", f"{_INTERVAL}: {about}"]
            show(f"{title}: forecast", columns, forecast_rows(facts, currency))
        groups = [row for _, rows in by_attribute(facts) for row in rows]
        if groups:
            chosen = sorted(groups, key=_distance)[:SHOWN_GROUPS] if len(groups) > SHOWN_GROUPS else groups
            which = (
                "" if chosen is groups else f" ({len(chosen)} of {len(groups)} groups, the report has all)"
            )
            show(
                f"{title}: whom it reaches{which}",
                ["group", "eligible", "selected", "mailed", "share", "against all", _INTERVAL],
                [
                    [
                        f"{row['attribute']}: {row['group']}",
                        row["eligible_users"],
                        row["selected_users"],
                        row["mailed_users"],
                        formats.percent(row["selected_share"], 1),
                        ratio(row),
                        ends(row) or formats.DASH,
                    ]
                    for row in chosen
                ],
            )


def _distance(row: Facts) -> tuple[bool, float, str, str]:
    """Order of interest: apart from all by more than chance, then the furthest; ties by name."""
    value = row.get("ratio")
    far = 0.0 if value is None else math.inf if value <= 0.0 else abs(math.log(value))
    return not is_apart(row), -far, row["attribute"], row["group"]


def _chart(ident: str, attribute: str, rows: Sequence[Facts]) -> str:
    whiskers = [
        charts.Whisker(_cut(row["group"]), row["ratio"], lower, upper, "c1")
        for row in rows
        if row.get("ratio_interval")
        for lower, upper in [row["ratio_interval"]]
    ]
    if len(whiskers) < 2:
        return ""
    text = "; ".join(f"{w.name} {w.value:.2f}, {w.lower:.2f} to {w.upper:.2f}" for w in whiskers)
    text += "; 1 is the share of all eligible users"
    return charts.forest(ident, f"Share selected against all, by {attribute}", text, whiskers, axis=1.0)


def _cut(name: str) -> str:
    return name if len(name) <= _CHART_NAME else f"{name[: _CHART_NAME - 1]}…"
