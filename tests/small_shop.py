"""A whole job that takes a minute: a synthetic shop of 150 users and 25 days, trained for one epoch."""

from pathlib import Path

from pyspark.sql import SparkSession

from couponflow import pipeline
from couponflow.config import Config
from couponflow.lake import tables

#: A shop that comes in few files, for a config of any lake: every object costs a request, every file a task.
SHOP = """
[source]
name = "synthetic"
num_users = 150
[world]
rate = 0.6
recency = 1.0
campaign_first_day = 3
campaign_every_days = 7
late_share = 0.0
retry_share = 0.0
has_day_truth = false
[conversions]
source = "redemptions"
window = "campaign"
[vocabulary]
max_oov_share = 1.0
[examples]
history_length = 20
train_start = "2024-01-04"
valid_start = "2024-01-11"
test_start = "2024-01-18"
[run]
first_date = "2024-01-01"
last_date = "2024-01-25"
first_as_of = "2024-01-01"
campaign_id = "3"
run_date = "2024-01-18"
"""
_JOB = """
[lake]
root_uri = "{root}/lake"
time_zone = "America/New_York"
[events]
pseudonymise = false
[model]
hidden_dim = 8
[training]
max_epochs = 1
num_ranks = 2
[evaluation]
num_draws = 50
[scoring]
model = "dien"
[selection]
control_share = 0.1
[export]
target_uri = "{root}/export"
auto_approve = true
"""


def write_config(folder: Path, root: str) -> Path:
    """The config file of the job, with lake and export under a root."""
    path = folder / "config.toml"
    path.write_text(_JOB.format(root=root) + SHOP, encoding="utf-8")
    return path


def content(config: Config, spark: SparkSession) -> dict[str, tuple[int, str]]:
    """Rows and hash of every table, as ``couponflow status --content`` shows them; run ids do not count."""
    root = config.lake.root_uri
    found = {name: (rows, text) for name, _, rows, text in pipeline.content(root, spark)}
    ledger = tables.read(spark, root, "assignments").drop("run_id")
    return found | {"assignments": (ledger.count(), tables.content_hash(ledger))}
