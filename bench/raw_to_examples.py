"""The whole data plane on the synthetic shop: raw feeds to training examples, rows per second and core.

Every stage is the job's own ``run`` over the whole range, in one process. Reported without a bound, with the
seconds of each stage as its profile. Rows are the delivered events.
"""

import shutil
import time
from pathlib import Path

from bench import data
from bench.run import Claim
from couponflow import pipeline
from couponflow.config import Config, load_config
from couponflow.entry import record_run
from couponflow.lake import session

CLAIMS = (
    "raw_to_examples",
    "raw_to_examples_clean_events",
    "raw_to_examples_clean_feeds",
    "raw_to_examples_sessionize",
    "raw_to_examples_attribute_conversions",
    "raw_to_examples_build_vocabulary",
    "raw_to_examples_build_examples",
)
NUM_USERS, CORES = 20_000, 2
_STAGES = tuple(name.removeprefix("raw_to_examples_") for name in CLAIMS[1:])


def make_config(num_users: int) -> Config:
    """The demo shop with more users, its lake under ``var/bench``."""
    root = data.FOLDER / f"shop-{num_users}"
    demo = Path(__file__).parents[1] / "deploy" / "env" / "demo.toml"
    return load_config(demo, (f"lake.root_uri='{root}'", f"source.num_users={num_users}"))


def landed(config: Config) -> int:
    """Land the raw feeds once; returns the delivered events."""
    root = Path(config.lake.root_uri)
    mark = root / "_LANDED"
    if not mark.exists():
        shutil.rmtree(root, ignore_errors=True)
        rows = pipeline.land(config, lambda what, done, total: None)
        mark.write_text(str(rows["events"]), encoding="utf-8")
    return int(mark.read_text(encoding="utf-8"))


def measure(names: tuple[str, ...], num_users: int = NUM_USERS) -> list[Claim]:
    """One warm-up pass, one that counts."""
    config = make_config(num_users)
    rows = landed(config)
    spark = session.start(config.spark, "bench")
    stages = [stage for stage in pipeline.plan(config) if stage.job in _STAGES and not stage.campaign]
    seconds: dict[str, float] = {}
    for _ in range(2):
        for folder in ("tables", "runs", "datasets", "vocabularies"):
            shutil.rmtree(Path(config.lake.root_uri) / folder, ignore_errors=True)
        for stage in stages:
            start = time.perf_counter()
            with record_run(stage.job, config, stage.dates) as run:
                pipeline.load_job(stage.job).run(spark, run)
            seconds[stage.job] = time.perf_counter() - start
    total = sum(seconds.values())
    rate = rows / total / CORES
    claims = {CLAIMS[0]: Claim(CLAIMS[0], rate, "rows/s per core", None, 1, "none")}
    for job, spent in seconds.items():
        name = f"raw_to_examples_{job}"
        claims[name] = Claim(name, spent, "s", None, 1, f"{spent / total:.0%} of the data plane")
    return [claims[name] for name in names if name in claims]
