"""Upkeep beside a training: its dataset is a version of a table, whose files upkeep removes one day."""

from pathlib import Path
from typing import Any

import pytest
from builders import D0, make_frame, make_row
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from couponflow import maintenance
from couponflow.config import load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run
from couponflow.errors import DataError
from couponflow.lake import layouts, tables, upkeep
from couponflow.training import manifests
from jobs import train

DAY = DateRange.day(D0)
TABLE = "training_examples"


def build(spark: SparkSession, root: str, number: int) -> dict[str, int]:
    """Write so many rows; returns the files of the snapshot."""
    rows = [make_row(TABLE, example_id=f"e{n}", as_of_date=D0, split="train") for n in range(number)]
    tables.overwrite(make_frame(spark, TABLE, rows).coalesce(1), root, TABLE, DAY, f"run-{number}")
    return tables.snapshot_files(tables.read(spark, root, TABLE))


def test_a_pinned_version_is_kept_for_the_retention_and_named_when_it_is_gone(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, file = str(tmp_path / "lake"), tmp_path / "config.toml"
    file.write_text(f"[lake]\nroot_uri = '{root}'\n[events]\npseudonymise = false\n")
    sizes = {"item": 1, "category": 1, "shop": 1, "event_type": 1}
    dataset = manifests.Dataset(1, "voc-1", sizes, layouts.WIDE_FEATURES, {"train": build(spark, root, 8)})
    manifests.write(root, dataset, "run-8")
    pinned = manifests.load(root)
    build(spark, root, 5)  # a build that has not come to its manifest yet

    def maintain(*over: str) -> Any:
        config = load_config(file, over)
        with record_run("maintain", config, DAY) as job:
            return maintenance.maintain(spark, job, vacuum=True, optimize=False, dry_run=False)

    assert maintain() == {}
    manifests.check(pinned, "train")
    with pytest.raises(DataError, match="run build_examples, then maintain again"):
        maintain("maintenance.retention_hours=0", "maintenance.allow_short_retention=true")
    manifests.check(pinned, "train")  # refused as a whole

    upkeep.vacuum(spark, root, TABLE, 0)  # by hand
    monkeypatch.setattr(train.fitting.launch, "run", lambda *given: pytest.fail("ranks were started"))
    done = CliRunner().invoke(train.app, ["--config", str(file), "--dates", str(D0), "--model", "dien"])
    assert done.exit_code == 3, done.output
    assert f"{TABLE} version 1 does not exist (vacuumed?); run build_examples again" in done.output
