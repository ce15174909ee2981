"""``make demo-dataproc``: a day and a backfill on Dataproc, with local servers in the place of the services.

A synthetic shop is landed on ``gs://``; Google's clients submit to a stand-in of Dataproc, whose drivers are
real ``spark-submit`` processes that reach the store through Spark's connector, and the key of the pseudonyms
through a stand-in of Secret Manager. One driver fails and one answer is lost on the way. What has to hold at
the end is asserted, so a demo that went wrong ends with 1.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import secret_server
import small_shop
import typer
from dataproc_world import State, World, world
from deploy_files import DEPLOY, ROOT
from object_server import MISSING, find_server, running
from spark_runner import SMALL_LAKE, SparkRunner

from couponflow.config import load_config
from couponflow.lake import secret_store

FIRST, LAST = "2024-01-02", "2024-01-11"  # the ten days of the backfill
DAY = "2024-01-12"


def main() -> None:
    """Run the demo in a folder that goes with it."""
    program = find_server()
    if program is None:
        sys.exit(MISSING)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="couponflow-demo-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        url = stack.enter_context(running(program, folder))
        os.environ["STORAGE_EMULATOR_HOST"] = url  # the storage library's own switch
        version = load_config(DEPLOY / "env" / "ci.toml").events.key_secret
        keys = stack.enter_context(secret_server.serving(version, secrets.token_hex(32).encode()))
        known = {secret_store.STAND_IN: keys.url}
        runner = SparkRunner(folder / "drivers", url, settings=SMALL_LAKE, environment=known)
        here = stack.enter_context(world(folder, "rest", runner))
        here.file.write_text(here.file.read_text(encoding="utf-8") + small_shop.SHOP, encoding="utf-8")
        play(here)


def play(here: World) -> None:
    """Land, prepare, backfill with two mishaps, run a day, and show what came of it."""
    env = ("--env", str(here.file))
    ask("land", "synthetic", "--config", str(here.file))
    ask("submit", "clean_events", "--dates", "2024-01-01", *env)
    ask("submit", "build_vocabulary", "--dates", "2024-01-01", *env)
    here.core.faults.fail_driver("clean_events", exit_code=5)
    here.core.faults.lose_answer("SubmitJob")
    before = len(here.jobs)
    backfill = ("backfill", "clean_events", "--from-date", FIRST, "--to-date", LAST, "--chunk-days", "1")
    ask(*backfill, "--max-active-runs", "2", "--on", "dataproc", *env)
    jobs = here.jobs[before:]
    dates = Counter(job.labels["dt"] for job in jobs)
    assert len(dates) == 10, dates
    assert set(dates.values()) == {1}, f"more than one job of a date: {dates}"
    assert {job.status.state for job in jobs} == {State.DONE}
    states = [status.state for job in jobs for status in job.status_history]
    assert states.count(State.ATTEMPT_FAILURE) == 1, "the failure of a driver was not met"
    assert not here.core.faults.lost["SubmitJob"], "no answer was lost"
    ask("submit", "clean_feeds", "--dates", f"2024-01-01:{LAST}", *env)
    ask("submit", "--workflow", "daily", "--dates", DAY, *env)
    ask("status", "--on", "dataproc", *env)
    ask("status", "--content", "--config", str(here.file))
    typer.echo(f"10 days, 10 jobs; one driver failed and one answer was lost. Tables: {here.lake}/tables")


def ask(*args: str) -> None:
    """One command as a person types it, shown; the demo ends where it fails."""
    typer.echo(f"\n$ couponflow {' '.join(args)}")
    done = subprocess.run([sys.executable, "-m", "couponflow.cli", *args], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"couponflow {args[0]} ended with {done.returncode}")


if __name__ == "__main__":
    main()
