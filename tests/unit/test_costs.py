"""What a run used and costs, without Spark: prices, texts and the limit."""

import subprocess
import sys

import pytest
from deploy_files import DEPLOY

from couponflow import costs, prices
from couponflow.clouding import CloudConfig
from couponflow.config import Config, load_config
from couponflow.errors import ConfigError
from couponflow.lake import metering


@pytest.fixture(scope="module")
def deployed() -> Config:
    return load_config(DEPLOY / "env" / "dev.toml")


@pytest.fixture(scope="module")
def cloud(deployed: Config) -> CloudConfig:
    assert deployed.cloud is not None
    return deployed.cloud


def test_a_core_hour_is_its_share_of_a_node_without_the_disk(cloud: CloudConfig) -> None:
    """n2-highmem-4 has 8 GiB a core; by hand: .031611 + 8 x .004237 + .01."""
    core = prices.core_hour_price("n2-highmem-4", cloud.prices)
    assert core == pytest.approx(0.075507)
    node = {"machineTypeUri": "n2-highmem-4"}
    whole = prices.hourly_price({"masterConfig": node, "workerConfig": {"numInstances": 0}}, cloud)
    assert whole.least == pytest.approx(4 * core)


def test_amounts_are_those_of_the_cluster_of_the_job(cloud: CloudConfig) -> None:
    hour = 3600.0
    assert costs.amount(hour, 0, "sessionize", cloud) == pytest.approx(0.075507)
    n1 = 0.031611 + 3.75 * 0.004237 + 0.01
    assert costs.amount(6 * hour, hour, "train", cloud) == pytest.approx(6 * n1 + 0.35)


def test_cpu_time_of_this_process_and_of_its_children_counts(config: Config) -> None:
    meter = costs.Meter()
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    used = meter.usage("train", config)
    assert 0.5 <= used["core_seconds"] < 30
    assert "amount" not in used
    assert "is_shared" not in used


def test_runs_side_by_side_say_that_they_are(deployed: Config) -> None:
    first = costs.Meter()
    second = costs.Meter()
    assert second.usage("monitor", deployed)["is_shared"] == 1
    found = first.usage("monitor", deployed)
    assert found["is_shared"] == 1
    assert found["amount"] >= 0
    assert "is_shared" not in costs.Meter().usage("monitor", deployed)


def test_usage_as_text() -> None:
    used = {"core_seconds": 1234.5, "gpu_seconds": 0.0, "bytes_read": 2_500_000, "bytes_written": 100_000}
    assert costs.text(used) == "1,234 core-s, 2.5 MB in, 0.1 MB out"
    more = used | {"gpu_seconds": 60.0, "amount": 1.234, "is_shared": 1}
    assert costs.text(more, "USD") == "1,234 core-s, 60 GPU-s, 2.5 MB in, 0.1 MB out, 1.23 USD (shared)"
    assert costs.text({}) == ""


def test_the_limit_is_the_budget_in_bytes(deployed: Config, cloud: CloudConfig) -> None:
    """25 USD at .075507 a core hour are 331 core hours; at 300 core seconds a GiB, 3,973 GiB."""
    with costs.within_budget("sessionize", "2024-01-10", deployed):
        limit = metering._LIMIT.get()
        assert limit is not None
        assert limit.max_bytes / 2**30 == pytest.approx(3_973, abs=1)
        text = limit.refusal(4_000 * 2**30)
    assert text == (
        "sessionize 2024-01-10: would read 4000.00 GiB, estimated at 25.17 USD by "
        "cloud.core_seconds_per_gib, above cloud.budget_per_run_amount = 25.00; give fewer --dates, or "
        "raise it with --set cloud.budget_per_run_amount=AMOUNT"
    )
    assert metering._LIMIT.get() is None


def test_without_a_cloud_nothing_is_limited(config: Config) -> None:
    with costs.within_budget("sessionize", "2024-01-10", config):
        assert metering._LIMIT.get() is None


def test_a_machine_without_a_price_is_named(cloud: CloudConfig) -> None:
    with pytest.raises(ConfigError, match="machine type e2-standard-4 has no price"):
        prices.core_hour_price("e2-standard-4", cloud.prices)
