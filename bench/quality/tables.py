"""The stored results as Markdown, for the README: ``python -m bench.quality --markdown``."""

from collections.abc import Mapping, Sequence
from typing import Any

#: Columns of a ladder: key of a line, heading, format. A column that no line of a ladder has is left out.
_COLUMNS = (
    ("model", "model", "s"),
    ("auc", "AUC [95 %]", ".3f"),
    ("auc_order_only", "order-only targets", ".3f"),
    ("auc_others", "other targets", ".3f"),
    ("gauc", "GAUC", ".3f"),
    ("gap_share", "share of the gap", ".0%"),
    ("minus_logistic", "minus logistic [95 %]", "+.3f"),
    ("ece", "ECE", ".3f"),
    ("lift_10", "lift at 10 %", ".2f"),
    ("seeds", "seeds", "d"),
)


def markdown(results: Mapping[str, Any]) -> str:
    """All verdicts as one table, then a ladder per experiment."""
    parts = [_table(["verdict", "measured", "required", "holds"], list(_verdicts(results)))]
    for name, found in results.items():
        parts.append(f"**{name}** ({found['seconds']} s)\n\n{ladder(found['ladder'])}")
    return "\n\n".join(parts)


def ladder(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines of one world."""
    shown = [column for column in _COLUMNS if any(column[0] in line for line in lines)]
    rows = [[_cell(line, key, form) for key, _, form in shown] for line in lines]
    return _table([heading for _, heading, _ in shown], rows)


def _verdicts(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for found in results.values():
        for line in found["verdicts"]:
            interval = "" if line["interval"] is None else " [{:+.3f}, {:+.3f}]".format(*line["interval"])
            measured = f"{line['value']:+.3f} {line['unit']}{interval}"
            rows.append([f"`{line['name']}`", measured, line["rule"], "yes" if line["holds"] else "**no**"])
    return rows


def _cell(line: Mapping[str, Any], key: str, form: str) -> str:
    value = line.get(key)
    if value is None:
        return ""
    interval = line.get("interval") if key == "auc" else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        value, interval = value[0], value[1:]
    ends = "" if interval is None else " [{}, {}]".format(*(format(end, form) for end in interval))
    return f"{format(value, form)}{ends}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
