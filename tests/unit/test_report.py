"""The report shows what the records say, flags what disagrees, and never leaves its file."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from couponflow.campaign.pages import charts, formats, modelcard, report
from couponflow.campaign.pages.report import ReportInputs
from couponflow.errors import ConflictError
from couponflow.training import decisions, evaluation

MINUS = charts.MINUS
DIEN, LOGISTIC, BLEND = "dien-3f9ab2c1d4e5", "logistic-81c0ffee90ab", "blend-0d1e2f3a4b5c"


def make_inputs(**changes: Any) -> ReportInputs:
    """A full report in the size of the real data: 2,469 users, 1,460,047 events."""
    return replace(
        ReportInputs(
            campaign={
                "campaign_id": "18",
                "campaign_type": "Type A",
                "start_date": "2017-10-30",
                "end_date": "2017-12-24",
                "num_coupons": 209,
                "categories": ["YOGURT", "CHEESE", "FROZEN PIZZA", "SOFT DRINKS", "COFFEE", "CEREAL"],
            },
            selection=make_selection(),
            export={
                "folder": "var/export/campaign=18/version=1",
                "file": "audience.csv",
                "num_recipients": 412,
                "sha256": "9f2c" * 16,
                "manifest": "manifest.json",
                "already_exported": False,
            },
            score={
                "model_version": DIEN,
                "kind": "dien",
                "num_users": 2469,
                "cold_start_users": 37,
                "users_per_second": 1843.2,
                "mean_probability": 0.1172,
            },
            score_histogram=make_histogram(),
            evaluation=make_evaluation(),
            stages=make_stages(),
            conservation=make_conservation(),
            verdicts=[
                make_verdict("events", "1 day behind", "at most 1 day"),
                make_verdict("sends", "0 days behind", "at most 1 day"),
                make_verdict("consents", "snapshot of 2017-10-30", "at most 24 h old"),
            ],
            table_versions={"events": 12, "training_examples": 3, "predictions": 5},
            run_id="run-20171030T040000-1a2b3c4d",
            config_fingerprint="5d41402abc4b2a76",
            code_version="b6d767d2f8ed",
            data_note="84.51 “Complete Journey” receipts: educational data, figures are no evidence.",
            currency="USD",
            time_zone="America/New_York",
        ),
        **changes,
    )


def make_selection(**changes: Any) -> dict[str, Any]:
    steps = [
        ("user_master", "User master", 0, 2469),
        ("no_consent_record", "No consent record", 143, 2326),
        ("unsubscribe", "Unsubscribed", 31, 2295),
        ("bounce", "Address bounced", 0, 2295),
        ("complaint", "Complained", 0, 2295),
        ("frequency_cap", "Mailed often enough already", 287, 2008),
        ("no_prediction", "No usable score", 0, 2008),
        ("eligible", "Eligible", 0, 2008),
        ("value", "Not worth a mail", 992, 1016),
        ("budget", "Budget used up", 534, 482),
        ("would_select", "Selected", 0, 482),
        ("holdout", "Withheld: global holdout", 24, 458),
        ("control", "Withheld: campaign control", 46, 412),
        ("mailed", "Mailed", 0, 412),
    ]
    return {
        "campaign_id": "18",
        "version": "2017-10-30-dien-3f9ab2c1d4e5-5d4140",
        "run_date": "2017-10-30",
        "model_version": DIEN,
        "objective": "expected_profit",
        "num_users": 2469,
        "waterfall": [
            {"reason": reason, "label": label, "excluded": excluded, "remaining": remaining}
            for reason, label, excluded, remaining in steps
        ],
        "budget_amount": 120.0,
        "expected_cost_amount": 119.74,
        "expected_conversions": 99.1,
        "expected_profit_amount": 276.83,
        "binding_constraint": "budget",
        "shadow_price": 1.42,
        "control_users": 46,
        "holdout_users": 24,
        "mailed_users": 412,
        "consent_source": "constructed",
        "consent_snapshot_date": "2017-10-30",
        "expected_conversions_interval": [81, 117],
        "expected_cost_amount_interval": [101.44, 138.04],
        "expected_profit_amount_interval": [221.3, 332.36],
        "forecast_words": "The 95 % intervals cover chance alone.",
        "reach": make_reach(),
    } | changes


def make_reach(**changes: Any) -> dict[str, Any]:
    """Two ages and the rest, then history: groups as the selection records them."""
    columns = ("attribute", "group", "eligible_users", "selected_users", "mailed_users", "ratio")
    rows = [
        ("age", "unknown", 1408, 280, 240, 0.83),
        ("age", "45-54", 560, 190, 161, 1.41),
        ("age", "smaller groups", 40, 12, 11, 1.25),
        ("history", "with events", 1971, 482, 412, 1.02),
        ("history", "cold start", 37, 0, 0, 0.0),
    ]
    groups = [
        dict(zip(columns, row, strict=True))
        | {
            "selected_share": row[3] / row[2],
            "mean_probability": 0.11,
            "ratio_interval": [max(0.0, row[5] - 0.1), row[5] + 0.1],
        }
        for row in rows
    ]
    whole = {"eligible_users": 2008, "selected_users": 482, "mailed_users": 412, "selected_share": 0.24}
    return whole | {"groups": groups} | changes


def make_histogram() -> dict[str, Any]:
    """2,469 users; the 482 selected ones are the most likely, but for some whom a cap left out."""
    edges = [n / 25 for n in range(26)]
    counts = [700, 520, 330, 215, 150, 118, 96, 78, 61, 50, 40, 32, 25, 18, 12, 9, 6, 4, 2, 1, 1, 1, 0, 0, 0]
    chosen = [0, 0, 0, 0, 44, 84, 79, 66, 52, 43, 34, 27, 21, 14, 9, 6, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    return {"edges": edges, "counts": counts, "selected_counts": chosen}


def make_model(version: str, auc: float, ece: float, sharpness: float) -> dict[str, Any]:
    shares = [n / 20 for n in range(21)]
    points = [0.012, 0.02, 0.03, 0.041, 0.055, 0.07, 0.09, 0.115, 0.14, 0.17, 0.21, 0.27, 0.36, 0.49, 0.68]
    return {
        "model_version": version,
        "metrics": {
            "auc": auc, "gauc": auc - 0.005, "pr_auc": auc - 0.27, "log_loss": 0.3232,
            "normalised_entropy": 0.731,
            "ece": ece, "ece_uncalibrated": ece + 0.018, "brier": 0.0961, "calibration_ratio": 1.04,
            "brier_parts": {
                "reliability": 0.0041, "resolution": 0.0432, "uncertainty": 0.1350,
                "within_bin_variance": 0.0012, "within_bin_covariance": 0.0010,
            },
            "lift": {"0.01": 5.31, "0.05": 4.77, "0.1": 4.14, "0.2": 2.93},
            "captured": {"0.01": 0.053, "0.05": 0.238, "0.1": 0.414, "0.2": 0.586},
        },
        "intervals": {
            "auc": [auc - 0.028, auc + 0.026], "pr_auc": [auc - 0.33, auc - 0.21],
            "log_loss": [0.301, 0.347], "ece": [ece - 0.008, ece + 0.014],
        },
        "reliability": [
            {"predicted": p, "observed": max(0.0, p * (1.1 - 0.25 * math.sin(9 * n))), "rows": 110}
            for n, p in enumerate(points)
        ],
        "gain_curve": [{"share": s, "captured": 1 - (1 - s) ** sharpness} for s in shares],
        "by_campaign": {
            "16": {"rows": 188, "positives": 12, "auc": 0.727},
            "17": {"rows": 202, "positives": 15, "auc": 0.781},
            "18": {"rows": 1133, "positives": 214, "auc": 0.851},
            "19": {"rows": 130, "positives": 25, "auc": None},
        },
        "segments": {
            "user": {
                "new": make_segment(61, 0, None, None, "one class only"),
                "returning": make_segment(1592, 266, auc, 1.02),
            },
            "category": {
                "category 7": make_segment(12, 1, None, None, "too few rows (fewer than 50)"),
                "category 9": make_segment(13, 4, None, None, "too few rows (fewer than 50)"),
                "several categories": make_segment(1628, 261, auc, 0.87),
            },
        },
    }  # fmt: skip


def make_segment(rows: int, positives: int, auc: float | None, ratio: float | None, note: str = "") -> Any:
    return {
        "rows": rows,
        "positives": positives,
        "auc": auc,
        "calibration_ratio": ratio,
        "ece": 0.021,
        "note": note,
    }


def make_evaluation(**changes: Any) -> dict[str, Any]:
    dien = make_model(DIEN, 0.839, 0.047, 4.3)
    dien["reliability_uncalibrated"] = [
        {"predicted": min(1.0, p["predicted"] * 1.5), "observed": p["observed"], "rows": p["rows"]}
        for p in dien["reliability"]
    ]
    losses = [0.412, 0.371, 0.349, 0.341, 0.338, 0.3365, 0.3371, 0.339, 0.344]
    return {
        "run_id": "evaluate-20171030T041000-9f8e7d6c",
        "dates": "2017-10-04:2017-11-16",
        "split": "test",
        "training_examples_version": 3,
        "num_rows": 1653,
        "num_positives": 266,
        "num_users": 1180,
        "models": {
            "blend": make_model(BLEND, 0.848, 0.033, 4.9),
            "dien": dien,
            "logistic": make_model(LOGISTIC, 0.844, 0.031, 4.6),
        },
        "comparisons": [
            make_comparison("dien", -0.005, [-0.017, 0.008], False),
            make_comparison("blend", 0.004, [-0.002, 0.011], False),
        ],
        "gate": {
            "champion": "logistic",
            "challenger": "dien",
            "decision": "keep_champion",
            "reasons": [
                {
                    "condition": "cutoff",
                    "holds": False,
                    "place": 1,
                    "num_cutoffs": 2,
                    **make_cutoff(),
                },
                {
                    "condition": "all_rows",
                    "holds": False,
                    "comparison": make_comparison("dien", -0.005, [-0.017, 0.008], False),
                },
                {
                    "condition": "ece",
                    "holds": False,
                    "challenger": 0.047,
                    "champion": 0.031,
                    "standard_error": 0.008,
                },
                {
                    "condition": "calibration_ratio",
                    "holds": True,
                    "challenger": 1.04,
                    "allowed": [0.9, 1.1],
                },
            ],
            "cutoffs": [
                make_cutoff(),
                {
                    "first_day": "2017-10-30",
                    "last_day": "2017-11-15",
                    "num_rows": 1263,
                    "num_positives": 0,
                    "comparison": None,
                },
            ],
        },
        "segments_left_out": {"device": "not stored in the examples"},
        "backtest": {"folds": [make_fold(), {"cutoff": "2017-01-20", "auc": None, "interval": None}]},
        "attention": {"dien": make_attention()},
        "training": {
            "dien": {
                "epochs": [
                    {
                        "epoch": n,
                        "train_loss": 0.5,
                        "auxiliary_loss": 0.6,
                        "valid_log_loss": v,
                        "valid_auc": 0.8,
                    }
                    for n, v in enumerate(losses, 1)
                ],
                "num_ranks": 2,
            }
        },
    } | changes


def make_attention() -> dict[str, Any]:
    """Sixty events of 40 days; every third shares a category with the coupons, one an item."""
    events = [
        {
            "age_days": 40.0 * (60 - n) / 60,
            "weight": (3.0 if n % 3 == 0 else 1.0) / 100,
            "relation": "item" if n == 59 else "category" if n % 3 == 0 else "other",
        }
        for n in range(60)
    ]
    return {"events": events, "sends": 266}


def make_fold() -> dict[str, Any]:
    """The first month: half as many converted as was expected, in one of its two campaigns."""
    sound = {"rows": 100, "positives": 20, "ratio_before": 1.1, "ratio_after": 0.9, "z_before": 0.5}
    wrong = {"rows": 200, "positives": 30, "ratio_before": 2.0, "ratio_after": 1.3, "z_before": 6.5}
    return {
        "cutoff": "2017-05-08",
        "test_rows": 300,
        "test_positives": 50,
        "auc": 0.78,
        "interval": [0.7, 0.86],
        "ratio_before": 1.64,
        "ratio_after": 1.14,
        "z_before": 4.1,
        "z_after": 1.9,
        "by_campaign": {"10": sound | {"z_after": -0.4}, "9": wrong | {"z_after": 3.1}},
    }


def make_cutoff() -> dict[str, Any]:
    """The first test period; its difference is DIEN's."""
    compared = make_comparison("dien", -0.01, [-0.05, 0.031], False)
    return {
        "first_day": "2017-10-04",
        "last_day": "2017-10-18",
        "num_rows": 390,
        "num_positives": 27,
        "comparison": compared | {"minimum_detectable": 0.058},
    }


def make_comparison(
    challenger: str, difference: float, interval: list[float], testable: bool
) -> dict[str, Any]:
    return {
        "challenger": challenger,
        "champion": "logistic",
        "metric": "auc",
        "difference": difference,
        "interval": interval,
        "standard_error": 0.0064,
        "minimum_detectable": 0.018 if challenger == "dien" else 0.0094,
        "is_testable": testable,
    }


def make_stages() -> list[dict[str, Any]]:
    year = "2017-01-01:2017-12-31"
    stages = [
        ("clean_events", year, 71.3, {"events": 1460047, "quarantine": 9260}),
        ("clean_feeds", year, 22.8, {"sends": 6589, "users": 2469}),
        ("sessionize", year, 48.1, {"sessions": 143021}),
        ("attribute_conversions", year, 9.4, {"conversions": 2075}),
        ("build_examples", year, 64.0, {"training_examples": 4003}),
        ("train", year, 143.7, {"rows_read": 2703}),
        ("evaluate", "2017-10-04:2017-11-16", 12.2, {"rows": 1653}),
        ("score", "2017-10-30", 18.9, {"predictions": 2469}),
        ("select_audience", "2017-10-30", 7.7, {"audience": 412}),
        ("export_audience", "2017-10-30", 3.1, {"recipients": 412}),
    ]
    return [
        {"job": job, "dates": dates, "seconds": seconds, "status": "ok", "rows": rows,
         "run_id": f"{job}-20171030T0400{n:02d}-1a2b3c4d", "skipped": job == "clean_feeds"}
        for n, (job, dates, seconds, rows) in enumerate(stages)
    ]  # fmt: skip


def make_conservation() -> list[dict[str, Any]]:
    doors = [
        ("raw receipts to events", 1469307, 1460047, 9260, 0, 0, "till artefacts"),
        ("raw sends to sends", 6589, 6589, 0, 0, 0, ""),
        ("sends to training examples", 6589, 5657, 0, 0, 932, "147 without history, 785 not mature"),
        ("users to predictions", 2469, 2469, 0, 0, 0, "37 without history are scored too"),
        ("predictions to audience", 2469, 412, 0, 0, 2057, "see the waterfall"),
        ("audience to exported file", 412, 412, 0, 0, 0, ""),
    ]
    names = ("door", "rows_in", "rows_out", "refused", "duplicates", "left_out", "note")
    return [dict(zip(names, door, strict=True)) | {"is_balanced": True} for door in doors]


def make_verdict(table: str, observed: str, expected: str, verdict: str = "ok") -> dict[str, Any]:
    return {
        "table_name": table,
        "check_name": "freshness",
        "verdict": verdict,
        "observed": observed,
        "expected": expected,
    }


class _Page(HTMLParser):
    """Text, attributes and nesting of a page; void elements are the only ones left open."""

    VOID = frozenset({"meta", "link", "br", "line", "rect", "circle", "polyline"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.errors: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def test_headline_says_who_is_mailed_what_it_costs_and_who_is_withheld() -> None:
    text = _Page(report.render(make_inputs())).text
    assert "412 of 2,469 users get the mail of campaign 18" in text
    assert "About 99 of them are expected to convert, at an expected cost of USD 119.74" in text
    assert "budget of USD 120.00" in text
    assert "Another 46 selected users are withheld as a control group and 24 belong to the holdout" in text
    assert "one more USD of budget would add about USD 1.42 of expected profit" in text


def test_every_waterfall_line_is_shown_with_its_numbers() -> None:
    text = _Page(report.render(make_inputs())).text
    for step in make_selection()["waterfall"]:
        lost = "0 " if step["reason"] not in report.MILESTONES else ""
        lost = f"{formats.number(-step['excluded'])} " if step["excluded"] else lost
        assert f"{step['label']} {step['reason']} {lost}{step['remaining']:,}" in text
    assert "Adds up: every user" in text


@pytest.mark.parametrize(
    ("index", "name", "value", "message"),
    [
        (5, "excluded", 286, "Mailed often enough already” says 2,008 users remain; 2,295 less 286 is 2,009"),
        (0, "remaining", 2470, "starts with 2,470 users, the user master has 2,469"),
        (13, "remaining", 411, "ends with 411 users, the audience has 412"),
        (12, "excluded", 45, "withholds 45 users as control, the ledger says 46"),
        (11, "excluded", 23, "withholds 23 users as holdout, the ledger says 24"),
    ],
)
def test_a_waterfall_that_does_not_add_up_is_flagged(index: int, name: str, value: int, message: str) -> None:
    selection = make_selection()
    selection["waterfall"][index][name] = value
    text = _Page(report.render(make_inputs(selection=selection))).text
    assert message in text
    assert "This waterfall does not add up." in text
    assert "Waterfall does not add up" in text
    assert "Adds up: every user" not in text


def test_disagreeing_records_are_listed_at_the_top() -> None:
    doors = make_conservation()
    doors[0]["rows_out"] -= 47
    evaluation = make_evaluation()
    evaluation["models"]["dien"]["metrics"]["calibration_ratio"] = 1.8
    stages = make_stages()
    stages[5]["status"] = "failed"
    text = _Page(
        report.render(
            make_inputs(
                selection=make_selection(expected_cost_amount=130.0),
                score={"model_version": LOGISTIC, "kind": "logistic", "num_users": 2469},
                export={"num_recipients": 413, "file": "a.csv", "version": "2017-10-30-other"},
                conservation=doors,
                evaluation=evaluation,
                stages=stages,
                verdicts=[make_verdict("events", "4 days behind", "at most 1 day", "stale")],
            )
        )
    ).text
    top = text[text.index("Look at this before") : text.index("Who gets the mail, and who does not")]
    assert "expected cost USD 130.00 is above the budget USD 120.00" in top
    assert "exported list is version 2017-10-30-other, the selection shown is 2017-10-30-dien" in top
    assert "exported file has 413 recipients and 0 users withdrew, the audience has 412" in top
    assert "“raw receipts to events”: 47 unaccounted for" in top
    assert "Table events is stale: 4 days behind." in top
    assert "predicted 1.80 times the conversions that came" in top
    assert f"selected from the scores of {DIEN}, the scores shown are from {LOGISTIC}" in top
    assert "Stage train ended with status failed." in top
    assert "off by 47" in text
    assert "Look at this before" not in _Page(report.render(make_inputs())).text


def test_model_section_shows_metrics_gate_and_what_cannot_be_seen() -> None:
    text = _Page(report.render(make_inputs())).text
    assert "0.844 [0.816, 0.870]" in text
    assert "10% 36.4%" in text  # gain curve of the model in use: 1 - 0.9 ** 4.3
    assert "The gate keeps Logistic regression; DIEN is not promoted." in text
    assert "smallest true difference in AUC that would be found in four of five cases is about 0.018" in text
    assert "This list was scored with DIEN , because the configuration names it." in text
    assert "No difference is shown: the interval includes zero. A true difference below about 0.018" in text
    assert f"✗ Fails: AUC differs from the champion's by {MINUS}0.005 on all test sends together" in text
    assert f"with chance between {MINUS}0.017 and +0.008, where both ends have to be above 0" in text
    assert "on test period 1 of 2 (2017-10-04 to 2017-10-18, 390 sends, 27 conversions)" in text
    assert "the smallest difference that would be found there is about 0.058" in text
    assert f"2017-10-04 to 2017-10-18 390 27 {MINUS}0.010 [{MINUS}0.050, +0.031] 0.058" in text
    assert f"2017-10-30 to 2017-11-15 1,263 0 {formats.DASH} {formats.DASH}" in text
    assert "0.0961 0.0041 0.0432 0.1350 +0.0002" in text  # Brier and its parts
    assert "✗ Fails: its calibration error is 0.0470; the champion's 0.0310 must not be exceeded by" in text
    assert "by more than chance easily does, 0.0080" in text
    assert "✓ Holds: it predicted 1.04 times the conversions that came; 0.9 to 1.1 is allowed" in text
    assert "Its best 10% of the sends hold 41% of the conversions, 4.1 times as many" in text


@pytest.mark.parametrize(
    ("metric", "interval", "verdict"),
    [
        ("auc", [0.002, 0.01], "is better:"),
        ("auc", [-0.03, -0.002], "is worse:"),
        ("log_loss", [-0.03, -0.002], "is better:"),
        ("log_loss", [0.002, 0.01], "is worse:"),
        ("auc", [0.0, 0.01], "No difference is shown:"),
        ("auc", None, "nothing is claimed."),
    ],
)
def test_a_difference_is_named_only_when_its_interval_leaves_zero_out(
    metric: str, interval: list[float] | None, verdict: str
) -> None:
    row = make_comparison("blend", 0.005, interval or [], True) | {"metric": metric, "interval": interval}
    text = _Page(report.render(make_inputs(evaluation=make_evaluation(comparisons=[row])))).text
    found = [
        word
        for word in ("is better:", "is worse:", "No difference is shown:", "nothing is claimed.")
        if word in text
    ]
    assert found == [verdict]


def test_a_skipped_stage_shows_its_time_and_counts_as_no_work() -> None:
    text = _Page(report.render(make_inputs())).text
    assert "10 stages, 6 min 18 s of work this time; 1 skipped" in text  # 401.2 s less the 22.8 s
    assert "clean_feeds 2017-01-01:2017-12-31 22.8 s skipped" in text
    again = [stage | {"skipped": True} for stage in make_stages()]
    text = _Page(report.render(make_inputs(stages=again))).text
    assert "10 stages, all with the results of earlier runs, which took 6 min 41 s; nothing had" in text
    assert "score 2017-10-30 18.9 s skipped" in text
    anew = [stage | {"skipped": False} for stage in make_stages()]
    text = _Page(report.render(make_inputs(stages=anew))).text
    assert "10 stages, 6 min 41 s of work." in text
    assert "skipped" not in text


def test_the_gate_s_words_are_those_that_the_gate_writes() -> None:
    """The reasons of the real gate have words; a condition without words keeps its text."""
    found = evaluation.Comparison("dien", "logistic", -0.005, (-0.017, 0.008), 0.0064, 0)
    points = {"calibration_ratio": 1.2, "ece": 0.047}
    cutoffs = [decisions.CutOff("2017-10-04", "2017-10-18", 390, 27, one) for one in (found, None)]
    reasons = decisions.judge(found, cutoffs, points, {"ece": 0.031}, 0.008)["reasons"]
    words = [modelcard.reason(reason)[1] for reason in reasons]
    assert len(words) == 5
    assert not {reason["text"] for reason in reasons} & set(words)
    assert "on test period 1 of 2 (2017-10-04 to 2017-10-18, 390 sends, 27 conversions)" in words[0]
    assert words[1] == "test period 2 of 2 (2017-10-04 to 2017-10-18) shows nothing: all or none converted"
    assert words[0].endswith("difference that would be found there is about 0.018")
    assert modelcard.reason({"condition": "weather", "text": "it rains"}) == ("✗", "it rains")


def test_the_back_test_marks_a_month_that_was_expected_to_convert_twice_as_often() -> None:
    text = _Page(report.render(make_inputs())).text
    dash = formats.DASH
    assert "2017-05-08 all 300 50 0.780 [0.700, 0.860] 1.64 ! 1.14" in text
    assert f"9 200 30 {dash} 2.00 ! 1.30 ! 10 100 20 {dash} 1.10 0.90" in text  # 9 before 10
    assert f"2017-01-20 all {dash} {dash} {dash} {dash} {dash}" in text  # no model yet
    assert (
        "Would it have been right before?"
        not in _Page(report.render(make_inputs(evaluation=make_evaluation(backtest={})))).text
    )


def test_segments_say_what_they_cannot_show() -> None:
    text = _Page(report.render(make_inputs())).text
    dash = formats.DASH
    assert f"new 61 0 {dash} {dash} 0.021 one class only returning 1,592 266 0.839 1.02 0.021" in text
    assert "several categories 1,628 261 0.839 0.87 0.021" in text
    assert f"2 more 25 5 {dash} {dash} {dash} too few rows (fewer than 50) in each" in text
    assert "Device is left out: not stored in the examples." in text
    evaluation = make_evaluation()
    del evaluation["models"]["dien"]["segments"]
    assert "Segment by segment" not in _Page(report.render(make_inputs(evaluation=evaluation))).text


def test_learning_curves_are_drawn_by_rank_where_the_record_has_them() -> None:
    html = report.render(make_inputs())
    text = _Page(html).text
    assert "Learning curves of DIEN" in text
    assert "Training loss over all processes, and validation loss." in text
    assert "Training, all ranks" in text
    evaluation = make_evaluation()
    for epoch in evaluation["training"]["dien"]["epochs"]:
        epoch["train_loss_by_rank"] = [0.4 / epoch["epoch"], 0.41 / epoch["epoch"]]
    text = _Page(report.render(make_inputs(evaluation=evaluation))).text
    assert "Training loss of each of the 2 processes" in text
    assert (
        "Training, rank 0: lowest 0.0444; Training, rank 1: lowest 0.0456; Validation: lowest 0.3365" in text
    )
    assert "Training, all ranks" not in text
    used = {"kind": "logistic"}  # learned in one step: the first model with epochs stands in
    assert modelcard.learning(evaluation, used)["label"] == "DIEN"
    assert modelcard.learning({}, None)["series"] == []
    del evaluation["training"]["dien"]["epochs"][0]["train_loss_by_rank"]  # one epoch of older code
    assert modelcard.learning(evaluation, used)["num_ranks"] == 0


def test_attention_is_drawn_as_shares_with_what_each_relation_weighs() -> None:
    html = report.render(make_inputs())
    text = _Page(html).text
    assert "What DIEN looks at" in text
    assert "among the 266 test sends that converted, from 40 to 1 days before the mail" in text
    assert "an item of the coupons: 1% on 1 event a category of the coupons: 60% on 20 events" in text
    assert "nothing of the coupons: 39% on 39 events" in text
    drawn = html.partition('aria-labelledby="attention-title')[2].partition("</svg>")[0]
    assert [drawn.count(f'<rect class="{colour}"') for colour in ("c1", "c2", "c3", "rest")] == [20, 1, 0, 39]
    kept = make_evaluation(attention={"dien": None, "static": None})
    assert "looks at" not in _Page(report.render(make_inputs(evaluation=kept))).text
    first = modelcard.attention({"attention": {"a": make_attention(), "b": make_attention()}}, {"kind": "b"})
    assert first is not None
    assert first["label"] == "b"


@pytest.mark.parametrize(
    ("name", "price", "sentence"),
    [
        ("max_recipients", 0.4, "one more recipient would add about EUR 0.40 of expected profit."),
        (
            "stock",
            1.5,
            "The stock of a coupon limits the list: one more coupon of it would add about EUR 1.50",
        ),
        ("segment_max", 0.0, "The upper bound of a segment limits the list."),
        ("value", 0.0, "No limit binds: everyone worth a mail was selected."),
        ("none", None, "No limit binds: all eligible users were selected."),
        ("stock_of_coupon", 2, "binds is “stock of coupon”: one more unit of it would add about EUR 2.00"),
    ],
)
def test_the_binding_constraint_is_put_in_words(name: str, price: float | None, sentence: str) -> None:
    selection = make_selection(binding_constraint=name, shadow_price=price)
    assert sentence in _Page(report.render(make_inputs(selection=selection, currency="EUR"))).text


def test_the_gate_without_a_challenger_keeps_the_champion() -> None:
    gate: dict[str, Any] = {"champion": "logistic", "challenger": None, "decision": "keep_champion"}
    gate["reasons"] = [{"condition": "no_rival", "holds": False, "text": "no rival"}]
    text = _Page(report.render(make_inputs(evaluation=make_evaluation(gate=gate, comparisons=[])))).text
    assert "The gate keeps Logistic regression. ✗ Fails: no rival" in text
    promoted = gate | {"challenger": "blend", "decision": "promote"}
    scored = make_selection(model_version=BLEND)
    inputs = make_inputs(evaluation=make_evaluation(gate=promoted), selection=scored, score={"kind": "blend"})
    text = _Page(report.render(inputs)).text
    assert "The gate promotes Blend over Logistic regression." in text
    assert "Gate chose this model" in text
    assert "The gate would have chosen" not in text


def test_values_are_escaped_in_text_and_charts() -> None:
    evil = '<script>alert(1)</script>"&'
    selection = make_selection()
    selection["waterfall"][1]["label"] = evil
    evaluation = make_evaluation(gate={"champion": evil, "challenger": "dien", "reasons": [{"text": evil}]})
    evaluation["models"][evil] = make_model(evil, 0.8, 0.03, 3.0)
    html = report.render(
        make_inputs(selection=selection, evaluation=evaluation, data_note=evil, run_id=evil, currency="<b>")
    )
    assert "<script" not in html
    assert "<b>" not in html
    assert html.count("&lt;script&gt;alert(1)") >= 8


def test_the_file_refers_to_nothing_outside() -> None:
    html = report.render(make_inputs())
    assert not re.search(r"https?://|url\(|@import|<script|<iframe|<img", html)
    for tag, name, value in _Page(html).attributes:
        if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert value == "data:," if tag == "link" else value.startswith("#")
        assert not name.startswith("on")
    assert len(html.encode()) < 600_000


def test_the_page_is_well_formed_and_its_links_and_labels_exist() -> None:
    page = _Page(report.render(make_inputs()))
    assert page.errors == []
    assert page.open == []
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in page.attributes:
        if name == "href" and value.startswith("#"):
            assert value[1:] in ids
        if name == "aria-labelledby":
            assert set(value.split()) <= set(ids)


def test_the_forecast_carries_its_intervals_and_what_they_do_not_cover() -> None:
    text = _Page(report.render(make_inputs())).text
    assert "95% interval 81 to 117" in text
    assert "95% interval USD 101.44 to USD 138.04" in text
    assert "95% interval USD 221.30 to USD 332.36" in text
    assert "The 95 % intervals cover chance alone." in text
    assert "do not hold that error: they take every probability as true" in text
    bare = make_selection(expected_profit_amount_interval=None)
    text = _Page(report.render(make_inputs(selection=bare))).text
    assert "USD 276.83 a forecast, after mail and coupon cost The 95 % intervals" in text


def test_whom_it_reaches_is_told_by_group_with_a_picture() -> None:
    page = _Page(report.render(make_inputs()))
    assert page.errors == []
    text = page.text
    assert "against all 2,008 eligible users, of whom 24.0% are selected" in text
    assert "By age" in text
    assert "45-54 560 190 161 33.9% 11.0% ! 1.41 1.31 to 1.51" in text
    assert "cold start 37 0 0 0.0% 11.0% ! 0.00 0.00 to 0.10" in text
    assert "with events 1,971 482 412 24.5% 11.0% 1.02 0.92 to 1.12" in text
    titles = [value for tag, name, value in page.attributes if name == "id" and value.startswith("reach-")]
    assert titles == ["reach-title", "reach-0-title", "reach-0-text", "reach-1-title", "reach-1-text"]
    few = make_selection(reach=make_reach(groups=[]))
    assert (
        "No attribute has two groups of at least 30 eligible users"
        in _Page(report.render(make_inputs(selection=few))).text
    )
    other = make_selection(selected_users=481)
    assert (
        "counts 482 selected users, the selection 481"
        in _Page(report.render(make_inputs(selection=other))).text
    )


def test_missing_parts_become_notices() -> None:
    page = _Page(report.render(ReportInputs()))
    assert page.errors == []
    for notice in (
        "No audience has been selected",
        "No waterfall yet",
        "Not recorded yet: the select_audience stage tells",
        "No scores yet",
        "No evaluation yet",
        "No row counts were recorded",
        "No data checks were recorded",
        "No stages were recorded",
        "not exported yet",
    ):
        assert notice in page.text


def test_nobody_mailed_is_said_plainly() -> None:
    selection = make_selection(
        mailed_users=0,
        control_users=0,
        holdout_users=0,
        expected_conversions=0.0,
        expected_cost_amount=0.0,
        binding_constraint=None,
        waterfall=[
            {"reason": "user_master", "label": "All users", "excluded": 0, "remaining": 2469},
            {"reason": "no_consent", "label": "No consent", "excluded": 2469, "remaining": 0},
        ],
    )
    text = _Page(report.render(make_inputs(selection=selection, export={}))).text
    assert "Nobody gets the mail of campaign 18" in text
    assert "None of the 2,469 users is left" in text
    assert f"{MINUS}2,469 0" in text


def test_a_record_with_holes_still_renders() -> None:
    evaluation = make_evaluation(comparisons=[{"challenger": "dien", "champion": "logistic"}], gate={})
    evaluation["models"] = {"dien": {"model_version": DIEN, "metrics": {"auc": float("nan"), "ece": None}}}
    page = _Page(
        report.render(make_inputs(evaluation=evaluation, score_histogram={"edges": [0], "counts": [1]}))
    )
    assert page.errors == []
    assert "nan" not in page.text.lower().split()
    assert "No gate decision" in page.text
    assert "No histogram" in page.text


def make_readout(**over: Any) -> dict[str, Any]:
    decile = {
        "decile": 1,
        "num_users": 120,
        "expected_conversions": 9.6,
        "actual_conversions": 31,
        "expected_rate": 0.08,
        "actual_rate": 31 / 120,
        "actual_interval": [0.19, 0.34],
        "is_inside": False,
    }
    effect = {"difference": 0.021, "interval": [0.004, 0.038], "total": 8.7}
    base: dict[str, Any] = {
        "effects": {"conversion": effect, "margin": effect | {"difference": 0.5, "total": 206.0}},
        "refusal": "",
        "verdict": "The mail caused conversions.",
        "expected_actual": {"deciles": [decile], "words": "9.6 conversions were expected."},
    }
    return base | over


def test_the_readout_shows_effects_or_why_there_are_none() -> None:
    text = _Page(report.render(make_inputs(readout=make_readout()))).text
    assert "conversion 2.10% 0.40% to 3.80%" in text
    assert "The mail caused conversions." in text
    assert "1 120 9.6 31" in text
    assert "! " in text
    assert "no score rests on it" in text
    refused = make_readout(effects={}, verdict="Nobody was withheld, so nothing is said of effects.")
    page = _Page(report.render(make_inputs(readout=refused)))
    assert page.errors == []
    assert "Nobody was withheld" in page.text
    assert "Caused by the mail" not in page.text
    assert "9.6 conversions were expected." in page.text
    assert "Not read out yet" in _Page(report.render(make_inputs())).text


def test_calibration_from_campaign_to_campaign_is_shown_from_the_second_on() -> None:
    row = {
        "mail_date": "2017-05-08",
        "campaign_id": "8",
        "model_version": "dien-1",
        "num_users": 900,
        "expected_conversions": 120.3,
        "actual_conversions": 80,
        "ratio": 1.5031,
        "ratio_interval": [1.2, 1.88],
        "ece": 0.0447,
        "is_drifted": True,
    }
    later = row | {"mail_date": "2017-10-30", "campaign_id": "18", "ratio": None, "is_drifted": False}
    text = _Page(report.render(make_inputs(readout=make_readout(), calibration=[row, later]))).text
    assert "Calibration from campaign to campaign" in text
    assert "2017-05-08 8 dien-1 900 120.3 80 1.50 ! 1.20 to 1.88 0.045" in text
    assert f"2017-10-30 18 dien-1 900 120.3 80 {formats.DASH} 1.20 to 1.88 0.045" in text
    alone = _Page(report.render(make_inputs(readout=make_readout(), calibration=[row]))).text
    assert "Calibration from campaign" not in alone


def test_a_choice_is_judged_by_the_truth_where_it_is_known() -> None:
    truth = {
        "num_eligible": 900,
        "num_chosen": 100,
        "num_best": 104,
        "random_profit_amount": -3.25,
        "chosen_profit_amount": 40.5,
        "best_profit_amount": 54.0,
        "share_of_best": 0.75,
        "share_of_gain": 0.7642,
    }
    page = _Page(report.render(make_inputs(hindsight=truth)))
    assert page.errors == []
    assert "This list, withheld users included 100 USD 40.50" in page.text
    assert "The best list, had the chances been known 104 USD 54.00" in page.text
    assert "earns 75.0% of what the best one would, and closes 76.4% of the way" in page.text
    nobody = truth | {"share_of_best": None, "share_of_gain": None}
    assert "of what the best one would" not in _Page(report.render(make_inputs(hindsight=nobody))).text
    assert "Against the truth" not in _Page(report.render(make_inputs())).text


def test_honesty_notes_follow_the_facts() -> None:
    text = _Page(report.render(make_inputs(notes=("Type A exposure is pooled.",)))).text
    assert "figures are no evidence" in text
    assert "Consent is constructed." in text
    assert "No uplift is claimed." in text
    assert "Type A exposure is pooled." in text
    real = make_selection(consent_source="preference centre")
    for known, claim in (
        (True, "users of past mails were drawn at random, but nothing on this page makes use of that"),
        (False, "Past mails were not sent at random"),
        (None, "Whether past mails were sent at random is not on record"),
    ):
        text = _Page(report.render(make_inputs(selection=real, has_randomised_control=known))).text
        assert "Consent is constructed." not in text
        assert "No uplift is claimed." in text
        assert [claim in text, text.count("at random")] == [True, 1]
    withheld = make_selection(control_users=0)
    assert (
        "Another 24 selected users belong to the holdout"
        in _Page(report.render(make_inputs(selection=withheld))).text
    )


def test_equal_inputs_give_equal_bytes() -> None:
    shuffled = make_evaluation()
    shuffled["models"] = dict(reversed(shuffled["models"].items()))
    assert report.render(make_inputs()) == report.render(make_inputs())
    assert report.render(make_inputs()) == report.render(make_inputs(evaluation=shuffled))


def test_write_publishes_once_per_run_and_replaces_a_named_file(tmp_path: Path) -> None:
    uri = report.write(str(tmp_path), "<p>one</p>", "run-1")
    assert uri == f"{tmp_path}/reports/run-1.html"
    assert Path(uri).read_text() == "<p>one</p>"
    assert report.write(str(tmp_path), "<p>one</p>", "run-1") == uri
    with pytest.raises(ConflictError, match=r"run-1\.html"):
        report.write(str(tmp_path), "<p>two</p>", "run-1")
    named = str(tmp_path / "out.html")
    report.write(named, "<p>one</p>", "run-1")
    assert report.write(named, "<p>two</p>", "run-2") == named
    assert Path(named).read_text() == "<p>two</p>"


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.017, 0.011, [-0.01, 0, 0.01]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_and_inside(lower: float, upper: float, expected: list[float]) -> None:
    assert charts.ticks(lower, upper) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tallest", "name", "highest"),
    [
        (700, "Users", "600"),
        (9_500, "Users", "8,000"),
        (9_999, "Users, thousands", "10"),
        (9_500_000, "Users, thousands", "8,000"),
        (9_999_999, "Users, millions", "10"),
        (40_000_000, "Users, millions", "40"),
    ],
)
def test_an_axis_of_users_counts_in_units_that_fit_beside_it(tallest: int, name: str, highest: str) -> None:
    drawn = charts.histogram("h", "Users", "", [0, 0.5, 1], [tallest, 1], [1, 0])
    marks = re.findall(r'class="tick"[^>]*end">([^<]*)<', drawn)
    assert [f">{name}<" in drawn, marks[-2]] == [True, highest]  # the last is the 100% of the other axis
    assert max(map(len, marks)) <= 5


def test_a_name_too_long_for_its_line_is_cut_and_whole_in_the_description() -> None:
    name = "a network with a name that no phone has room for"
    drawn = charts.forest("f", "AUC", name, [charts.Whisker(name, 0.8, 0.7, 0.9, "c1")])
    assert f">{name[: charts.LONGEST_NAME - 1]}…<" in drawn
    assert f">{name}</desc>" in drawn


def test_wilson_interval_equals_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, Wilson score without continuity correction
    assert charts.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert charts.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1460047, "1,460,047"),
        (99.14, "99.1"),
        (-46, f"{MINUS}46"),
        (None, formats.DASH),
        (float("nan"), formats.DASH),
        (0, "0"),
    ],
)
def test_numbers_are_readable(value: Any, text: str) -> None:
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0%"), (0.064, "6.4%"), (0.0996, "10%"), (0.414, "41%"), (1, "100%"), (None, formats.DASH)],
)
def test_percentages_keep_sensible_digits(value: Any, text: str) -> None:
    assert formats.percent(value) == text
