"""The train job in a process of its own, hit by a fault or not, for tests of what survives."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from couponflow.lake import faults, runs
from jobs import train

JOB = Path(train.__file__)
SETTINGS = (
    "model.dropout=0.2",
    "training.max_epochs=2",
    "training.batch_size=64",
    "training.checkpoint_steps=2",
    "training.warmup_steps=4",
)
SECONDS = 400


def arguments(config: str, *over: str) -> list[str]:
    sets = [text for setting in (*SETTINGS, *over) for text in ("--set", setting)]
    return ["--config", config, "--dates", "2024-01-10", "--model", "dien", *sets]


def run_job(config: str, *over: str, fault: str = "", options: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code of the job in a process of its own, and its last words.

    A JVM that is shut down in the midst of something prints a trace after them.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop(faults.VARIABLE, None)
    done = subprocess.run(
        [sys.executable, str(JOB), *arguments(config, *over), *options],
        env=environment | ({faults.VARIABLE: fault} if fault else {}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    lines = done.stderr.strip().splitlines()
    return done.returncode, next(
        (line for line in reversed(lines) if line.startswith("couponflow")), lines[-1] if lines else ""
    )


def trained(root: str) -> dict[str, Any]:
    """Facts of the last run that ended well."""
    return [record for record in runs.load_all(root, "train") if record.status == "ok"][-1].facts


def curves(facts: dict[str, Any]) -> list[float]:
    return [
        value
        for epoch in facts["epochs"]
        for value in (
            epoch["train_loss"],
            epoch["auxiliary_loss"],
            epoch["valid_log_loss"],
            epoch["valid_auc"],
            *epoch["train_loss_by_rank"],
        )
    ]


def survivors(root: str) -> list[psutil.Process]:
    """Processes of a run in this lake that are still there."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if root in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
