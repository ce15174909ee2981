"""Forecast and reach are shown as recorded, briefly on the terminal, and what is missing is left out."""

from typing import Any

from couponflow.campaign.pages import formats, prospects


def make_facts(**over: Any) -> dict[str, Any]:
    return {
        "campaign_id": "18",
        "expected_conversions": 99.1,
        "expected_conversions_interval": [81, 117],
        "expected_cost_amount": 119.74,
        "expected_cost_amount_interval": [101.0, 138.5],
        "expected_profit_amount": 276.83,
        "expected_profit_amount_interval": None,
        "forecast_words": "Chance alone.",
        "reach": {"groups": [make_row("age", "35-44"), make_row("age", "unknown", ratio=1.0)]},
    } | over


def make_row(attribute: str, group: str, ratio: float | None = 1.5, width: float = 0.2) -> dict[str, Any]:
    return {
        "attribute": attribute,
        "group": group,
        "eligible_users": 400,
        "selected_users": 100,
        "mailed_users": 90,
        "selected_share": 0.25,
        "mean_probability": 0.3,
        "ratio": ratio,
        "ratio_interval": None if ratio is None else [ratio - width, ratio + width],
    }


def shown(facts: dict[str, Any]) -> dict[str, list[list[Any]]]:
    found: dict[str, list[list[Any]]] = {}
    stages = {"score campaign 18": {"num_users": 1}, "select_audience campaign 18": facts}
    prospects.show_all(stages, "USD", lambda title, columns, rows: found.update({title: rows}))
    return found


def test_the_forecast_is_shown_with_its_intervals() -> None:
    rows = shown(make_facts())["Campaign 18: forecast"]
    assert rows == [
        ["expected conversions", "99.1", "81 to 117"],
        ["expected cost", "USD\u00a0119.74", "USD\u00a0101.00 to USD\u00a0138.50"],
        ["expected profit", "USD\u00a0276.83", formats.DASH],
    ]


def test_a_short_reach_is_shown_whole_and_a_long_one_by_interest() -> None:
    rows = shown(make_facts())["Campaign 18: whom it reaches"]
    assert rows == [
        ["age: 35-44", 400, 100, 90, "25.0%", "1.50", "1.30 to 1.70"],
        ["age: unknown", 400, 100, 90, "25.0%", "1.00", "0.80 to 1.20"],
    ]
    ordinary = [make_row("income", f"{n}K", ratio=1.0 + n / 1000) for n in range(20)]
    apart = [make_row("age", "none", ratio=0.0, width=0.1), make_row("age", "few", ratio=0.5)]
    apart[0]["ratio_interval"] = [0.0, 0.3]
    facts = make_facts(reach={"groups": [*ordinary, *reversed(apart)]})
    found = shown(facts)["Campaign 18: whom it reaches (12 of 22 groups, the report has all)"]
    assert [row[0] for row in found[:3]] == ["age: none", "age: few", "income: 19K"]
    assert len(found) == prospects.SHOWN_GROUPS


def test_what_is_not_recorded_is_not_shown() -> None:
    assert shown({}) == {}
    assert list(shown(make_facts(reach={"groups": []}))) == ["Campaign 18: forecast"]
    alone = {"groups": [make_row("history", "smaller groups", ratio=1.0)]}  # everyone against everyone
    assert list(shown(make_facts(reach=alone))) == ["Campaign 18: forecast"]
    assert prospects.reach_context(make_facts(reach=alone)) == []
    assert prospects.reach_context({}) == []
    assert prospects.forecast_context({}, "USD") == dict.fromkeys((*prospects.EXPECTED, "words"), "")


def test_each_attribute_has_its_rows_and_a_picture_where_there_is_something_to_compare() -> None:
    name = "a value that is longer than a picture has room for"
    groups = [
        make_row("age_group", name),
        make_row("age_group", "<b>&", ratio=1.1),
        make_row("age_group", "nobody selected", ratio=None),
        make_row("history", "with events", ratio=1.0),
        make_row("history", "cold start", ratio=None),
    ]
    age, history = prospects.reach_context(make_facts(reach={"groups": groups}))
    assert (age["attribute"], history["attribute"], history["chart"]) == ("age group", "history", "")
    assert [row["is_apart"] for row in age["rows"]] == [True, False, False]
    assert [row["shown_ratio"] for row in age["rows"]] == ["1.50", "1.10", formats.DASH]
    assert "&lt;b&gt;&amp;" in age["chart"]
    assert f">{name[:33]}…</text>" in age["chart"]
    assert "; 1 is the share of all eligible users" in age["chart"]
    assert age["chart"].count('class="axis"') == 1
