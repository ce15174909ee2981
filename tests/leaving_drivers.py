"""Drivers that compute nothing and leave on the lake what the next command of a person asks for.

What a job names has to be in the store: its program, its package and its config, which says where the lake
is. Then come its run record and, by stage, a vocabulary, a model, the version of a choice, a list.
"""

import json
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from dataproc_world import StageDrivers

from couponflow.cloud.requests import argument
from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.lake import layouts, runs, storage
from couponflow.models.bundle import Bundle, save_bundle
from couponflow.models.tabular import Logistic, Trees
from couponflow.sequences import vocabulary
from couponflow.training import registry

WIDTH = len(layouts.WIDE_FEATURES)
SIZES = {"item": 50, "category": 20, "shop": 8, "event_type": 9}


class LeavingDrivers(StageDrivers):
    """One that is stopped leaves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped: set[str] = set()
        self.turn = threading.Lock()

    def __call__(self, job: Any) -> tuple[int, str]:
        code, text = super().__call__(job)
        if code or job.reference.job_id in self.stopped:
            return code, text
        program = job.pyspark_job
        for uri in (program.main_python_file_uri, *program.python_file_uris, *program.file_uris):
            if not storage.exists(uri):
                return 1, f"{uri} is not there\n"
        with self.turn:
            return leave(job, config_of(program.file_uris[0])) or (code, text)

    def stop(self, job_id: str) -> None:
        self.stopped.add(job_id)
        super().stop(job_id)


def config_of(uri: str) -> Config:
    """The config that a job is given, as its driver reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "env.toml"
        path.write_bytes(storage.read_bytes(uri))
        return load_config(path)


def leave(job: Any, config: Config) -> tuple[int, str] | None:
    """What the stage leaves, then its run record; or how it ends where it may not run."""
    root, stage, args = config.lake.root_uri, job.labels["stage"], list(job.pyspark_job.args)
    campaign, model = argument(args, "--campaign"), argument(args, "--model")
    dates = DateRange.parse(argument(args, "--dates"))
    given = {name: value for name, value in (("campaign", campaign), ("model", model)) if value}
    record = runs.start(stage, str(dates), given, config.fingerprint())
    record.attempt_key = argument(args, "--attempt-key")
    match stage:
        case "build_vocabulary":
            made = json.dumps(asdict(vocabulary.Current("v1", str(dates), "drawn"))).encode()
            storage.create(storage.join(root, "vocabularies", f"{vocabulary.CURRENT}.json"), made, "driver")
        case "build_examples":
            record.facts = {"vocabulary_version": vocabulary.current(root).version}
        case "train":
            record.facts = train(root, model)
        case "select_audience":
            record.facts = {"campaign_id": campaign, "version": version_of(root, dates)}
        case "export_audience":
            version = version_of(root, dates)
            if not storage.exists(storage.join(root, "approvals", campaign, f"{version}.json")):
                return 2, f"campaign {campaign}, version {version}: not approved\n"
            folder = storage.join(config.export.target_uri, campaign, version)
            for name in ("audience.csv", "manifest.json"):
                storage.create(storage.join(folder, name), b"{}", "driver")
    runs.finish(root, record, "ok")
    return None


def train(root: str, kind: str) -> dict[str, Any]:
    """A bundle of the two kinds that are quickly made; the first logistic one is champion."""
    version = vocabulary.current(root).version
    if kind == "logistic":
        model: Any = Logistic(np.zeros(WIDTH), 1.0, np.zeros(WIDTH), np.ones(WIDTH))
    elif kind == "boosted":
        leaf, none = np.zeros(1, np.int64), np.full(1, -1)
        model = Trees(0.0, WIDTH, leaf, leaf, np.zeros(1), none, none, leaf, np.ones(1))
    else:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save_bundle(Bundle(model, version, SIZES), Path(folder) / "bundle")
        made = registry.register(root, Path(folder) / "bundle", "driver")
    if kind == "logistic" and registry.pointed(root, registry.CHAMPION) is None:
        registry.set_champion(root, made, "driver", "first champion")
    return {"model_version": made}


def version_of(root: str, dates: DateRange) -> str:
    """A version as the choice names it: its day, its model, a hash."""
    return f"{dates.start}-{registry.resolve(root, registry.CHAMPION)}-1a2b3c"
