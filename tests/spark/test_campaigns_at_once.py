"""Two campaigns selected at once on one lake: one waits for the other, and together they keep the cap."""

import csv
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import D0, make_frame, make_row, test_config
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import ConfigError, ConflictError
from couponflow.lake import storage, tables
from jobs import export_audience, select_audience

DAY = DateRange.day(D0)
USERS = [f"u{number:02d}" for number in range(60)]
RULES = (
    "selection.max_sends=1",
    "selection.max_recipients=40",
    "selection.objective='top_k'",
    "selection.control_share=0.1",
    "selection.holdout_share=0.1",
    "selection.explore_share=0.2",
    "events.staff_user_ids=['u00', 'u01']",
)


def write_world(spark: SparkSession, root_uri: str) -> None:
    """Everybody agrees; both campaigns like the same users best."""
    consent = {"channel": "mail", "purpose": "marketing", "state": "granted", "snapshot_date": D0}
    score = {"run_date": D0, "model_version": "m"}
    frames = {
        "users": [make_row("users", user_id=user, snapshot_date=D0) for user in USERS],
        "consents": [make_row("consents", user_id=user, **consent) for user in USERS],
        "predictions": [
            make_row(
                "predictions",
                user_id=user,
                campaign_id=campaign,
                target_id=campaign,
                conversion_probability=1 - number / 100,
                score=1 - number / 100,
                **score,
            )
            for number, user in enumerate(USERS)
            for campaign in ("18", "19")
        ],
        "sends": [make_row("sends", user_id="u05", send_date=D0 - timedelta(days=1), campaign_id="loyalty")],
    }
    for table, rows in frames.items():
        tables.overwrite(make_frame(spark, table, rows), root_uri, table, DAY)


def select(spark: SparkSession, config: Config, campaign: str) -> dict[str, Any]:
    with record_run("select_audience", config, DAY, campaign=campaign) as job:
        select_audience.run(spark, job)
    return job.facts | {"run_id": job.run_id}


def test_one_of_two_selections_waits_and_both_keep_the_cap(spark: SparkSession, tmp_path: Path) -> None:
    config = test_config(tmp_path, *RULES)
    root = config.lake.root_uri
    write_world(spark, root)

    # A held lease is a conflict that names its holder, on the command line too.
    path = tmp_path / "local.toml"
    path.write_text(f"[lake]\nroot_uri = '{root}'\n[export]\ntarget_uri = '{tmp_path / 'export'}'\n")
    arguments = ["--config", str(path), "--dates", str(D0), "--campaign", "19"]
    with record_run("select_audience", config, DAY, campaign="18") as holder:
        refused = CliRunner().invoke(select_audience.app, arguments)
    assert refused.exit_code == 4
    assert f"assignments is held by run {holder.run_id}" in refused.output
    assert not tables.exists(spark, root, "assignments")

    start = threading.Barrier(2)
    done: dict[str, dict[str, Any]] = {}
    lost: dict[str, str] = {}

    def work(campaign: str) -> None:
        start.wait(60)
        try:
            done[campaign] = select(spark, config, campaign)
        except ConflictError as error:
            lost[campaign] = str(error)

    threads = [threading.Thread(target=work, args=(campaign,)) for campaign in ("18", "19")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,), (loser,) = done, lost
    assert f"is held by run {done[winner]['run_id']}" in lost[loser]
    second = select(spark, config, loser)  # as the message says: again, when the other has ended

    ledger = tables.read(spark, root, "assignments").collect()
    arms = {(row.campaign_id, row.user_id): row.arm for row in ledger}
    assert len(arms) == len(ledger) == 2 * len(USERS)
    mailed = {
        c: {u for (of, u), arm in arms.items() if of == c and arm in ("treat", "explore")}
        for c in done | lost
    }
    assert mailed[winner]
    assert mailed[loser]
    assert mailed[winner].isdisjoint(mailed[loser])
    assert {"u00", "u01", "u05"}.isdisjoint(mailed[winner] | mailed[loser])
    by_reason = {step["reason"]: step["excluded"] for step in second["waterfall"]}
    assert (by_reason["staff"], by_reason["frequency_cap"]) == (2, 1 + len(mailed[winner]))
    held = {user for (_, user), arm in arms.items() if arm == "holdout"}
    assert held
    assert held.isdisjoint(mailed[winner] | mailed[loser])

    # The list holds the chosen and those mailed at random, these first.
    explored = {user for user in USERS if arms[winner, user] == "explore"}
    assert len(explored) == done[winner]["explore_users"] > 0
    with record_run("export_audience", config, DAY, campaign=winner) as job:
        export_audience.run(spark, job)
    listed = list(csv.DictReader(storage.read_bytes(job.facts["file"]).decode().splitlines()))
    assert {row["user_id"] for row in listed} == mailed[winner]
    assert {row["user_id"] for row in listed if row["rank"] == "0"} == explored
    assert [row["rank"] for row in listed] == sorted((row["rank"] for row in listed), key=int)

    # A day that has become quiet: neither a new list, nor one that waits for its hand-over.
    quiet = test_config(tmp_path, *RULES, f"selection.quiet_days=['{D0}']")
    with pytest.raises(ConfigError, match="next allowed day is 2024-01-11"):
        select(spark, quiet, winner)
    with (
        pytest.raises(ConfigError, match="next allowed day is 2024-01-11"),
        record_run("export_audience", quiet, DAY, campaign=loser) as job,
    ):
        export_audience.run(spark, job)
    assert not storage.list_names(str(tmp_path / "export" / loser))
