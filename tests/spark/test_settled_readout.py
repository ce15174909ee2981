"""The readout of a small campaign, from ledger, sends and orders to the stored record and the exit code."""

import json
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import D0, T0, make_event, make_frame, make_row
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from couponflow.campaign.readouts import intervals, settled
from couponflow.cli import app
from couponflow.lake import session, storage, tables

V, MODEL = "2024-01-10-dien-0123456789ab-abcdef", "dien-0123456789ab"
LAST = D0 + timedelta(days=5)  # three days of window and two of returns, from 08:00 of the 10th
LABEL_END = T0 + timedelta(days=3)
SHARES = {"treat": 0.6, "control": 0.24, "holdout": 0.16}
SIZES = {"treat": 300, "control": 120, "holdout": 80}
ORDERING = {"treat": 90, "control": 12, "holdout": 8}


def user(arm: str, number: int) -> str:
    return f"{arm}-{number}"


def ledger_row(arm: str, number: int, **over: Any) -> dict[str, Any]:
    base = {"campaign_id": "7", "version": V, "user_id": user(arm, number), "arm": arm}
    base |= {
        "would_select": arm in SHARES,
        "propensity": SHARES.get(arm, 1.0),
        "conversion_probability": 0.25,
    }
    return make_row("assignments", **(base | over))


def order(who: str, time: datetime = T0 + timedelta(hours=9), **over: Any) -> dict[str, Any]:
    base = {"order_id": f"{who}@{time}", "user_id": who, "order_time": time, "total_amount": 10.0}
    return make_row("orders", **(base | {"ingest_date": time.date()} | over))


def send(who: str, campaign: str = "7", day: date = D0, **over: Any) -> dict[str, Any]:
    base = {"send_id": f"{campaign}:{who}:{day}", "campaign_id": campaign, "user_id": who, "send_date": day}
    base |= {"delivered_time": T0 + (day - D0) + timedelta(hours=8), "ingest_date": day}
    return make_row("sends", **(base | over))


def world() -> dict[str, list[dict[str, Any]]]:
    """Campaign 7 with a ledger, 8 mailed without one. 30 % of the mailed order, 10 % of the withheld."""
    ledger = [ledger_row(arm, n) for arm, size in SIZES.items() for n in range(size)]
    ledger += [ledger_row("explore", n, would_select=False, propensity=0.01) for n in range(20)]
    ledger += [ledger_row("none", n, conversion_probability=0.0) for n in range(5)]
    ledger += [ledger_row("treat", 999, user_id="erased:4711")]
    week = D0 + timedelta(days=7)
    ledger += [ledger_row("treat", n, version="next", run_date=week) for n in range(3)]
    sends = [send(user("treat", n)) for n in range(290)] + [send(user("explore", n)) for n in range(20)]
    sends += [send(user("control", 0), day=week)]  # the mail of the next version
    sends += [send(user("control", 1), day=D0 - timedelta(days=9))]  # an older one
    sends += [send(f"old-{n}", "8") for n in range(200)]
    orders = [order(user(arm, n)) for arm, size in ORDERING.items() for n in range(size - 1)]
    orders += [
        order(user(arm, size - 1), T0) for arm, size in ORDERING.items()
    ]  # the first moment of the window
    orders += [order(user("treat", 0), LABEL_END - timedelta(microseconds=1), total_amount=2.5)]
    back = order("treat-250", order_id="back")
    orders += [back, back | {"order_status": "returned", "status_time": T0 + timedelta(days=2)}]
    orders[-1]["ingest_date"] = D0 + timedelta(days=2)
    orders += [order("treat-251", ingest_date=LAST + timedelta(days=1))]  # known too late
    orders += [order("treat-252", LABEL_END), order("control-50", T0 - timedelta(microseconds=1))]
    again = order("treat-1") | {"total_amount": 99.0, "ingest_date": D0 + timedelta(days=1)}
    orders += [again, order("somebody", T0 + timedelta(days=5)), order("explore-1")]
    events = [make_event("somebody", ingest_date=LAST)]
    events += [make_event(user("treat", n), event_type="mail_click", item_id=None) for n in range(200)]
    hits = [row for row in sends if row["user_id"] in {user("treat", n) for n in range(90)} | {"explore-1"}]
    hits += [row for row in sends if row["campaign_id"] == "8" and int(row["user_id"][4:]) < 30]
    converted = [
        make_row(
            "conversions", **{name: row[name] for name in ("send_id", "campaign_id", "user_id", "send_date")}
        )
        for row in hits
    ]
    costs = [make_row("costs", campaign_id="7", cost_date=D0, cost_type="mail", cost_amount=20.0)]
    costs += [costs[0] | {"cost_amount": 25.0, "ingest_date": D0 + timedelta(days=1)}]
    costs += [costs[0] | {"cost_type": "redemption", "cost_amount": 60.5}, costs[0] | {"campaign_id": "8"}]
    costs += [costs[0] | {"cost_date": D0 - timedelta(days=1), "cost_amount": 1e6}]
    scored = {"campaign_id": "8", "run_date": D0, "target_id": "8", "model_version": MODEL}
    chances = [0.3] * 100 + [0.1] * 50
    predictions = [
        make_row("predictions", user_id=f"old-{n}", conversion_probability=chance, **scored)
        for n, chance in enumerate(chances)
    ]
    days = {"campaign_type": "a", "start_date": D0, "end_date": D0 + timedelta(days=2), "coupons": []}
    return {
        "assignments": ledger,
        "sends": sends,
        "orders": orders,
        "events": events,
        "conversions": converted,
        "costs": costs,
        "predictions": predictions,
        "campaigns": [make_row("campaigns", campaign_id=name, **days) for name in ("7", "8", "9")],
    }


@pytest.fixture
def told(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on frames in place of tables; gives exit code and what it printed."""
    monkeypatch.setattr(session, "start", lambda *_: spark)
    rules = ["conversions.label_days=3", "conversions.return_days=2", "selection.margin_amount=5.0"]
    base = ["--set", f"lake.root_uri={str(tmp_path / 'lake')!r}"]
    base += [part for rule in rules for part in ("--set", rule)]
    config = tmp_path / "config.toml"
    config.write_text("")

    def run(rows: dict[str, list[dict[str, Any]]], *argv: str) -> Any:
        frames = {name: make_frame(spark, name, held) for name, held in rows.items()}
        with tables.stand_ins(frames):
            return CliRunner().invoke(app, ["campaign", argv[0], "--config", str(config), *base, *argv[1:]])

    return run


def readout_of(root: Path, campaign: str, version: str) -> Any:
    return json.loads(Path(settled.uri_of(str(root / "lake"), campaign, version)).read_bytes())


def test_a_campaign_is_read_out_once_its_windows_are_over(told: Any, tmp_path: Path) -> None:
    rows = world()
    argv = ("readout", "--campaign", "7", "--version", V)
    early = {name: list(held) for name, held in rows.items()}
    early["events"] = [row | {"ingest_date": LAST - timedelta(days=1)} for row in rows["events"]]
    done = told(early, *argv)
    assert done.exit_code == 3
    assert "it can be read from 2024-01-16 on, when the deliveries of 2024-01-15 are cleaned" in done.output
    assert not (tmp_path / "lake").exists()

    evaluated = {"calibration_ratio": 0.99, "ece": 0.01}
    judged = {"run_id": "evaluate-1", "models": {"dien": {"model_version": MODEL, "metrics": evaluated}}}
    storage.create(f"{tmp_path}/lake/evaluations/evaluate-1.json", json.dumps(judged).encode(), "r")
    done = told(rows, *argv)
    assert done.exit_code == 0, done.output
    assert "The mail caused 60 conversions: +20.00 points" in " ".join(done.output.split())
    record = readout_of(tmp_path, "7", V)
    arms = {name: (arm["num_users"], arm["num_converted"]) for name, arm in record["arms"].items()}
    pairs = {name: (SIZES[name], ORDERING[name]) for name in SIZES}
    assert arms == pairs | {"withheld": (200, 20), "explore": (20, 1)}
    assert record["arms"]["treat"]["num_mailed"] == 290
    # 90 orders of 10, one more of 2.50 in the last moment; no copy, no return, nothing late or outside.
    assert record["arms"]["treat"]["revenue_amount"] == 902.5
    assert record["arms"]["withheld"]["revenue_amount"] == 200.0
    effect = record["effects"]["conversion"]
    assert effect["interval"] == pytest.approx(list(intervals.share_difference(90, 300, 20, 200)))
    assert record["cost"] == {
        "amount": 85.5,
        "source": "costs",
        "by_type": {"mail": 25.0, "redemption": 60.5},
    }
    assert record["effects"]["profit"]["total"] == pytest.approx(300 * 0.2 * 5.0 - 85.5)
    assert record["num_erased"] == 1
    assert (record["mail_date"], record["label_end"]) == ("2024-01-10", "2024-01-13T00:00:00+00:00")
    actual = record["expected_actual"]
    assert (actual["num_users"], actual["actual_conversions"]) == (310, 91)
    assert actual["expected_conversions"] == pytest.approx(310 * 0.25)
    assert not {"click", "open"} & set(json.dumps(record).replace('"', " ").split()), (
        "clicks are not compared"
    )

    # Kept for good: what is delivered or set later changes nothing, and made anew it has the same bytes.
    uri = Path(settled.uri_of(f"{tmp_path}/lake", "7", V))
    first = uri.read_bytes()
    assert told({"orders": []}, *argv, "--json").exit_code == 0
    done = told(rows, *argv, "--set", "selection.margin_amount=9.0")
    assert done.exit_code == 2
    assert "was made with selection.margin_amount = 5.0, the config says 9.0" in " ".join(done.output.split())
    uri.unlink()
    later = {name: list(reversed(held)) for name, held in rows.items()}
    later["orders"] = [
        *later["orders"],
        order("control-7", T0, order_id="x", ingest_date=LAST + timedelta(9)),
    ]
    assert told(later, *argv).exit_code == 0
    assert uri.read_bytes() == first


def test_without_control_it_is_refused_and_expected_against_actual_is_kept(told: Any, tmp_path: Path) -> None:
    rows = world()
    done = told(rows, "readout", "--campaign", "8")
    assert done.exit_code == 3
    assert "no randomised control: campaign 8 has no ledger" in done.output
    assert "the propensity of 200 of 200 sends is unknown" in " ".join(done.output.split())
    record = readout_of(tmp_path, "8", "")
    assert (record["effects"], record["arms"]) == ({}, {})
    actual = record["expected_actual"]
    assert (actual["num_users"], actual["actual_conversions"]) == (150, 30)
    assert actual["expected_conversions"] == pytest.approx(100 * 0.3 + 50 * 0.1)
    shown = [(row["num_users"], row["actual_conversions"]) for row in actual["deciles"]]
    assert shown == [(50, 0), (100, 30)]

    # A ledger that the mails did not follow is no control either.
    rows["sends"] += [send(user("control", n)) for n in range(60)]
    done = told(rows, "readout", "--campaign", "7", "--version", V)
    assert done.exit_code == 3
    assert "60 of 200 withheld users got the mail" in " ".join(done.output.split())
    record = readout_of(tmp_path, "7", V)
    assert record["effects"] == {}
    assert record["expected_actual"]["num_users"] == 370
    history = settled.calibration_by_campaign(f"{tmp_path}/lake")
    assert [(row["campaign_id"], row["num_users"]) for row in history] == [("7", 370), ("8", 150)]
    assert history[1]["ratio"] == pytest.approx((100 * 0.3 + 50 * 0.1) / 30)


def test_what_cannot_be_read_out_says_why(told: Any, tmp_path: Path) -> None:
    rows = world()
    done = told(rows, "readout", "--campaign", "7")
    assert done.exit_code == 3
    assert f"name one of its versions: --version {'next'}" in done.output
    done = told(rows, "readout", "--campaign", "7", "--version", "typo")
    assert (done.exit_code, f"'typo'; it has {V}, next" in done.output) == (3, True)
    done = told(rows, "readout", "--campaign", "9")
    assert (done.exit_code, "campaign 9: no mail is delivered" in done.output) == (3, True)
    claim = json.dumps({"version": "other", "folder": "f"}).encode()
    storage.create(f"{tmp_path}/lake/handovers/7/2024-01-10.json", claim, "r")
    done = told(rows, "readout", "--campaign", "7", "--version", V)
    assert (done.exit_code, "version other was mailed" in done.output) == (3, True)
    assert not (tmp_path / "lake" / "readouts").exists()


def test_a_plan_tells_what_could_be_shown_and_writes_nothing(told: Any, tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {"assignments": [], "sends": []}
    names = [f"u{n}" for n in range(600)]
    rows["users"] = [make_row("users", user_id=name, snapshot_date=D0) for name in names]
    consent = {"channel": "mail", "purpose": "marketing", "state": "granted", "snapshot_date": D0}
    rows["consents"] = [make_row("consents", user_id=name, **consent) for name in names]
    base = {"campaign_id": "9", "run_date": D0, "target_id": "9", "model_version": MODEL}
    rows["predictions"] = [
        make_row("predictions", user_id=name, conversion_probability=0.2, score=0.2, **base) for name in names
    ]
    rows["campaigns"] = world()["campaigns"]
    argv = ("plan", "--campaign", "9", "--dates", "2024-01-10", "--control-share", "0.3", "--effect", "0.15")
    done = told(rows, *argv, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["selected_users"] == 600
    assert found["mailed_users"] + found["control_users"] == 600
    assert 140 <= found["control_users"] <= 220
    assert found["base_rate"] == pytest.approx(0.2)
    assert found["base_rate_source"] == f"predictions of 2024-01-10 by {MODEL}"
    effect, treat, control = (found[name] for name in ("smallest_effect", "mailed_users", "control_users"))
    variance = (0.2 + effect) * (0.8 - effect) / treat + 0.16 / control
    assert effect == pytest.approx(2.801585 * variance**0.5, rel=1e-6)
    assert found["smallest_margin_amount"] == pytest.approx(effect * 5.0)
    assert found["expected_cost_amount"] == pytest.approx(treat * (0.02 + 0.2 * 1.0))
    assert found["wanted_effect_power"] > 0.8
    assert found["wanted_effect_users"] < 600
    assert not (tmp_path / "lake").exists(), "a plan writes nothing"

    # The last campaign of the type that had a control knows better.
    arms = {"withheld": {"conversion_rate": 0.08, "revenue_deviation": 4.0}}
    known = {"campaign_id": "7", "campaign_type": "a", "version": V, "run_date": "2023-12-01", "refusal": ""}
    for name, over in {
        V: {"arms": arms},
        "refused": {"refusal": "no control", "run_date": "2023-12-31"},
        "other": {"campaign_type": "b", "run_date": "2023-12-30"},
        "later": {"run_date": "2024-01-10"},
    }.items():
        storage.create(settled.uri_of(f"{tmp_path}/lake", "7", name), json.dumps(known | over).encode(), "r")
    shown = " ".join(told(rows, *argv).output.replace("│", " ").split())
    assert f"8.00% (withheld users of campaign 7, version {V})" in shown
    amount = 2.801585 * 4.0 * (1 / treat + 1 / control) ** 0.5
    assert f"smallest effect, revenue per recipient USD {amount:.2f}" in shown
    assert "An effect of" in shown
