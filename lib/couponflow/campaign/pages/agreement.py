"""Do the records behind a report agree with each other? What does not is listed at the top of the page."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from couponflow.campaign.pages import charts
from couponflow.campaign.pages.formats import decimal, money, number
from couponflow.campaign.readouts.actuals import RATIO_BAND

Facts = Mapping[str, Any]


def waterfall_problems(selection: Facts) -> list[str]:
    """What does not add up between user master, exclusions, control and mailed users; empty if all does."""
    steps = selection.get("waterfall") or []
    if not steps:
        return []
    problems = []
    users = selection.get("num_users")
    started = count(steps[0], "remaining") + count(steps[0], "excluded")
    if users is not None and started != users:
        problems.append(
            f"The waterfall starts with {number(started)} users, the user master has {number(users)}."
        )
    for before, step in pairwise(steps):
        wanted = count(before, "remaining") - count(step, "excluded")
        if wanted != count(step, "remaining"):
            problems.append(
                f"Step “{step.get('label') or step.get('reason')}” says {number(step.get('remaining'))} "
                f"users remain; {number(before.get('remaining'))} less {number(step.get('excluded'))} "
                f"is {number(wanted)}."
            )
    mailed = selection.get("mailed_users")
    if mailed is not None and count(steps[-1], "remaining") != mailed:
        problems.append(
            f"The waterfall ends with {number(steps[-1].get('remaining'))} users, "
            f"the audience has {number(mailed)}."
        )
    for arm in ("control", "holdout"):
        withheld = sum(count(step, "excluded") for step in steps if step.get("reason") == arm)
        told = selection.get(f"{arm}_users")
        if told is not None and withheld != told:
            problems.append(
                f"The waterfall withholds {number(withheld)} users as {arm}, the ledger says {number(told)}."
            )
    return problems


def with_gap(row: Facts) -> dict[str, Any]:
    """A conservation row with what is unaccounted for: in less out, duplicates, refused and left out."""
    parts = ("rows_out", "duplicates", "refused", "left_out")
    gap = count(row, "rows_in") - sum(count(row, part) for part in parts)
    shown = {name: row.get(name) for name in ("door", "rows_in", *parts, "note")}
    return {**shown, "gap": gap, "is_balanced": bool(row.get("is_balanced")) and gap == 0}


def find_problems(
    selection: Facts,
    export: Facts,
    score: Facts,
    verdicts: Sequence[Facts],
    stages: Sequence[Facts],
    doors: Sequence[Facts],
    used: Facts | None,
    currency: str,
) -> list[str]:
    """What the records of one campaign say that cannot all be true, or needs a person's eye."""
    problems = waterfall_problems(selection)
    cost, budget = selection.get("expected_cost_amount"), selection.get("budget_amount")
    if charts.is_number(cost) and charts.is_number(budget) and cost > budget * (1 + 1e-9):
        problems.append(
            f"The expected cost {money(cost, currency)} is above the budget {money(budget, currency)}."
        )
    versions = {facts["model_version"] for facts in (selection, score) if facts.get("model_version")}
    if len(versions) > 1:
        problems.append(
            f"The list was selected from the scores of {selection['model_version']}, "
            f"the scores shown are from {score['model_version']}."
        )
    reached = (selection.get("reach") or {}).get("selected_users")
    told = selection.get("selected_users")
    if reached is not None and told is not None and reached != told:
        problems.append(
            f"“Whom it reaches” counts {number(reached)} selected users, the selection {number(told)}."
        )
    decided, handed_over = selection.get("version"), export.get("version")
    if decided and handed_over and decided != handed_over:
        problems.append(f"The exported list is version {handed_over}, the selection shown is {decided}.")
    mailed, exported = selection.get("mailed_users"), export.get("num_recipients")
    withdrawn = count(export, "num_withdrawn")
    if export and mailed is not None and count(export, "num_recipients") + withdrawn != mailed:
        problems.append(
            f"The exported file has {number(exported)} recipients and {number(withdrawn)} users withdrew, "
            f"the audience has {number(mailed)}."
        )
    problems += [
        f"Rows are missing at “{door['door']}”: {number(abs(door['gap']))} unaccounted for."
        if door["gap"]
        else f"“{door['door']}” is reported as not balanced."
        for door in doors
        if not door["is_balanced"]
    ]
    bad = [row for row in verdicts if row.get("verdict") != "ok"]
    problems += [
        f"Table {row.get('table_name')} is {row.get('verdict')}: {row.get('observed')}." for row in bad
    ]
    problems += [
        f"Stage {stage.get('job')} ended with status {stage.get('status')}."
        for stage in stages
        if stage.get("status") not in ("ok", "skipped", None)
    ]
    ratio = used["metrics"].get("calibration_ratio") if used else None
    if charts.is_number(ratio) and not RATIO_BAND[0] <= ratio <= RATIO_BAND[1]:
        problems.append(
            f"On the test campaigns the model predicted {decimal(ratio, 2)} times the conversions that came; "
            "take the forecast with that factor in mind."
        )
    return problems


def count(row: Facts, name: str) -> int:
    """A whole number of a row; 0 where it is missing."""
    value = row.get(name)
    return int(value) if charts.is_number(value) else 0
