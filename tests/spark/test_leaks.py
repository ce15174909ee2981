"""The leak audit: passes on honest features, names a planted leak, and refuses to pass without seeing."""

import random
from datetime import timedelta
from pathlib import Path

import pytest
from builders import make_event, make_frame, make_row
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from test_examples import ALL_DATES, D, adjusted, at, days, make_events, make_world, write
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.config import Config
from couponflow.errors import ConfigError, DataError
from couponflow.lake import tables
from couponflow.sequences import aggregates, conversions, examples, histories, leaks, vocabulary

USERS = 8


@pytest.fixture
def lake(spark: SparkSession, config: Config) -> Config:
    """A lake with events on both sides of the cut-off; the last two users have none."""
    config = adjusted(config)
    world = make_world(make_events(random.Random(1), 6, -60, 20, late_days=30), (0, -30))
    for campaign in world["campaigns"]:
        campaign["ingest_date"] -= timedelta(days=1)
    world["catalogue"] = [make_row("catalogue", item_id="i1", shop_id="s1", snapshot_date=days(-50))]
    link = {"linked_time": at(1), "ingest_date": days(1)}
    world["identity_links"] = [make_row("identity_links", visitor_id="v", user_id="u1", **link)]
    seen = {"visitor_id": "v", "event_time": at(-4), "event_date": days(-4), "ingest_time": at(-4)}
    world["events"].append(make_event("visitor:v", 0, event_id="anonymous", ingest_date=days(-4), **seen))
    world["user_days"] = []
    for name, rows in world.items():
        write(make_frame(spark, name, rows), config.lake.root_uri, name)
    terms = vocabulary.build(
        vocabulary.count_values(make_frame(spark, "events", world["events"])), 1, ALL_DATES
    )
    version = vocabulary.version_of(terms)
    tables.overwrite(terms, config.lake.root_uri, "vocabularies", version=version)
    vocabulary.publish(config.lake.root_uri, vocabulary.Current(version, str(ALL_DATES), "f"))
    return config


def leaky(spark: SparkSession, config: Config, population: DataFrame) -> list[Row]:
    """A leak in each group: late events in histories, untold redemptions in wide, corrections in targets."""
    inputs = examples.read_inputs(spark, config, days(leaks.REACH_DAYS))
    with examples.cached(inputs.events):
        on_time = inputs.events.withColumn("ingest_time", F.col("event_time"))
        history = histories.build(on_time, population, 6).drop("as_of_date")
        told = inputs.redemptions.withColumn("ingest_date", F.to_date("redemption_time"))
        frames = (inputs.campaigns, inputs.sends, told, inputs.users, inputs.orders, inputs.catalogue)
        wide = aggregates.build(inputs.events, population, *frames, "UTC").drop("as_of_date")
        newest = conversions.latest_campaigns(tables.read(spark, config.lake.root_uri, "campaigns"))
        target = examples.build_targets(newest, inputs.vocabulary)
        return wide.join(history, ["user_id", "as_of"]).join(target, "campaign_id").collect()


def constant(spark: SparkSession, config: Config, population: DataFrame) -> list[Row]:
    """Features that no fact changes."""
    names = [name for group in leaks.GROUPS.values() for name in group]
    return population.select("user_id", *[F.lit(1).alias(name) for name in names]).collect()


def test_the_audit_passes_on_honest_features_and_names_every_planted_leak(
    spark: SparkSession, lake: Config
) -> None:
    before = {p: p.stat().st_mtime_ns for p in Path(lake.lake.root_uri).rglob("*") if p.is_file()}
    honest = leaks.audit(spark, lake, D, USERS, "a0")
    assert [(f.group, f.verdict, f.rows, f.leaked) for f in honest] == [
        (group, "ok", USERS, 0) for group in leaks.GROUPS
    ]
    assert {f.moved for f in honest} == {USERS}, "known facts must change the features of everyone"
    leaks.check(honest, D)
    found = {f.group: f for f in leaks.audit(spark, lake, D, USERS, "a0", build=leaky)}
    assert [f.verdict for f in found.values()] == ["LEAK"] * 3
    assert found["history"].leaked == USERS
    assert found["history"].first_user == "u0"
    names = [name.split()[0] for name in found["wide"].features]
    assert names[0] == "num_redemptions"
    assert all("rede" in name for name in names), "only what redemptions tell has leaked"
    with pytest.raises(DataError, match=r"history of 8 of 8 users changed .* first u0"):
        leaks.check(list(found.values()), D)
    with pytest.raises(DataError, match="first u0, num_redemptions 0 -> "):
        leaks.check([found["wide"]], D)
    assert before == {p: p.stat().st_mtime_ns for p in Path(lake.lake.root_uri).rglob("*") if p.is_file()}


def test_an_audit_that_sees_nothing_does_not_pass(spark: SparkSession, lake: Config) -> None:
    found = leaks.audit(spark, lake, D, 3, "a0", build=constant)
    assert [(f.verdict, f.rows) for f in found] == [("blind", 3)] * 3
    with pytest.raises(DataError, match="the audit proves nothing"):
        leaks.check(found, D)


def test_wrong_questions_are_refused(spark: SparkSession, lake: Config) -> None:
    with pytest.raises(ConfigError, match="campaign 'nobody' is not in table campaigns"):
        leaks.audit(spark, lake, D, 3, "nobody")
    with pytest.raises(ConfigError, match="--sample 0: expected 1 to"):
        leaks.audit(spark, lake, D, 0, "a0")
    with pytest.raises(DataError, match="no snapshot up to 2024-01-01"):
        leaks.audit(spark, lake, days(-60), 3, "a0")


def test_the_sample_follows_its_seed(spark: SparkSession, lake: Config) -> None:
    def drawn(seed: int) -> list[str]:
        question = leaks._question(spark, lake, D, "a0")
        rows = leaks._population(spark, lake, question, 3, seed).collect()
        return sorted(row["user_id"] for row in rows)

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_the_command_prints_a_verdict_per_group(spark: SparkSession, lake: Config, tmp_path: Path) -> None:
    argv = ["check", "--leaks", "--as-of", str(D), "--sample", "4", "--campaign", "a0", "--config"]
    file = tmp_path / "leaks.toml"
    file.write_text(f"[lake]\nroot_uri = '{lake.lake.root_uri}'\n[examples]\nhistory_length = 6\n")
    done = CliRunner().invoke(app, [*argv, str(file)])
    assert done.exit_code == 0, done.output
    lines = [line.split("│")[1:4] for line in done.output.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        [group, "ok", "4"] for group in ("history", "wide", "target")
    ]
    early = CliRunner().invoke(
        app, [*argv[:2], "--as-of", "2024-01-01", "--campaign", "a0", "--config", str(file)]
    )
    assert early.exit_code == 3
    assert "no snapshot up to 2024-01-01" in early.output
