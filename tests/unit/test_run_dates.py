"""Dates of a workflow's parameters, and the rules from which a scheduler outside computes them."""

import contextlib
import json
import random
from datetime import date, timedelta
from pathlib import Path

import pytest
from builders import test_config
from deploy_files import ROOT, environment
from typer.testing import CliRunner

from couponflow import backfill_plan, scopes
from couponflow.cli import app
from couponflow.cloud import run_dates
from couponflow.dates import DateRange, parse_day


def applied(bound: run_dates.Bound, day: date) -> date:
    """As a scheduler reads a bound."""
    return day + timedelta(days=bound) if isinstance(bound, int) else parse_day(bound)


@pytest.mark.parametrize(
    "override", ["conversions.window=days", "conversions.window=campaign", "lake.lateness_days=0"]
)
def test_the_rules_give_the_ranges_of_any_later_day(tmp_path: Path, override: str) -> None:
    config = test_config(tmp_path, override)
    rules = run_dates.rules(config)
    draw = random.Random(0)
    # As far behind the first dates as a label window reaches.
    first = max(config.run.last_date, config.examples.test_start) + timedelta(days=430)
    for day in (first + timedelta(days=draw.randrange(1_500)) for _ in range(20)):
        for workflow, by_name in rules.items():
            dates = run_dates.ranges(config, workflow, DateRange.day(day))
            for name, bounds in by_name.items():
                start, last = (applied(bound, day) for bound in bounds)
                assert DateRange(start, last + timedelta(days=1)) == dates[name]


def test_a_delivery_reaches_what_a_backfill_of_it_runs(tmp_path: Path) -> None:
    config = test_config(tmp_path)
    day = config.run.last_date
    daily = run_dates.ranges(config, "daily", DateRange.day(day))
    planned = backfill_plan.plan(config, "all", DateRange.day(day))
    by_job = {part.job: part.dates for part in planned.parts}
    assert daily["EVENT_DATES"] == by_job["sessionize"] == scopes.touched_dates(DateRange.day(day), config)
    assert daily["SEND_DATES"] == by_job["attribute_conversions"]


def test_the_rules_of_an_environment() -> None:
    """Lateness of 3 days, labels of 14 days: 14 + 3 + 1 back, and a day ahead for fast clocks."""
    rules = run_dates.rules(environment("dev").config)
    assert rules["daily"] == {"EVENT_DATES": (-3, 1), "SEND_DATES": (-18, 0), "AS_OF_DATES": (-18, 0)}
    examples = environment("dev").config.examples
    before_test = (examples.test_start - timedelta(days=1)).isoformat()
    assert rules["train"] == {
        "AS_OF_DATES": (examples.train_start.isoformat(), before_test),
        "TEST_DATES": (examples.test_start.isoformat(), 0),
    }


def test_check_tells_a_scheduler_all_that_it_needs() -> None:
    """What deploy/airflow reads, beside the specs themselves."""
    with contextlib.chdir(ROOT):
        told = json.loads(CliRunner().invoke(app, ["check", "--deploy", "dev", "--json"]).stdout)
    cloud = environment("dev").cloud
    assert told["dates"]["daily"]["EVENT_DATES"] == [-3, 1]
    assert told["time_zone"] == "America/New_York"
    assert {name: told["cloud"][name] for name in ("project", "region")} == {
        "project": cloud.project,
        "region": cloud.region,
    }
    assert told["cloud"]["service_accounts"]["submit"] == cloud.service_accounts.submit
    workflows = [spec["rendered"] for spec in told["specs"] if "jobs" in spec["rendered"]]
    for workflow in workflows:
        parameters = {parameter["name"] for parameter in workflow["parameters"]}
        rules = told["dates"].get(workflow["id"].removeprefix("couponflow-"), {})
        assert set(rules) <= parameters
        assert all(job["labels"]["version"] == told["release"] for job in workflow["jobs"])
