"""The evaluation of registered models: what joins registry, feed and evaluation into one record."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from couponflow.config import Config
from couponflow.errors import DataError
from couponflow.lake import storage
from couponflow.training import backtest, calibrators, evaluation, feed, fitting, registry

log = logging.getLogger("couponflow")

_TEST = "test"


def evaluate_models(config: Config, run_id: str, dates: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Judge the champion and the newest model of every kind on ``test``: ``evaluations/<run_id>.json``.

    Models are named by kind; a champion that is not the newest of its kind is named ``champion``. With
    ``examples.cutoffs`` the record also holds the back-test. Returns the rows read and the main numbers.

    Raises:
        DataError: no champion, no test rows, or damaged files.
        ConfigError: a model expects another vocabulary than the examples have.
    """
    from couponflow.models.bundle import load_bundle

    root_uri = config.lake.root_uri
    dataset = feed.load_manifest(root_uri)
    named, champion = chosen_models(root_uri)
    rows = feed.read_all(dataset, _TEST)
    label = np.array([row.label for row in rows])
    users, campaigns = (np.array([getattr(row, name) for row in rows]) for name in ("user_id", "target_id"))
    labelled = evaluation.LabelledRows(label, users, campaigns)
    types = calibrators.row_types(rows)
    scored, training, calibration = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, version in named.items():
            bundle = load_bundle(registry.fetch(root_uri, version, Path(folder)), dataset.vocabulary_version)
            logit = fitting.score_rows(bundle, rows)
            scored.append(evaluation.ScoredModel(name, version, logit, bundle.probabilities(logit, types)))
            calibration[name] = calibrators.described(bundle, logit, label, types, campaigns)
            training[name] = {
                "epochs": bundle.metrics.get("epochs", []),
                "num_ranks": bundle.metrics.get("num_ranks", 1),
            }
    judged = evaluation.evaluate(labelled, scored, champion, config.evaluation)
    record = {
        "run_id": run_id,
        "dates": dates,
        "split": _TEST,
        "training_examples_version": dataset.table_version,
        **judged,
        "training": training,
        "calibration": calibration,
        "backtest": backtest.run(config, dataset),
    }
    uri = storage.join(root_uri, "evaluations", f"{run_id}.json")
    storage.create(uri, json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode(), run_id)
    main = {
        name: {"model_version": found["model_version"]}
        | {key: found["metrics"][key] for key in ("auc", "gauc", "pr_auc", "log_loss", "ece")}
        for name, found in judged["models"].items()
    }
    for name, numbers in main.items():
        log.info(
            "%s: AUC %.4f, log loss %.4f, calibration error %.4f",
            name,
            numbers["auc"],
            numbers["log_loss"],
            numbers["ece"],
        )
    log.info("gate: %s", judged["gate"]["decision"])
    facts = {"evaluation": uri, "models": main, "gate": judged["gate"], "backtest": record["backtest"]}
    return {f"{feed.TABLE}.{_TEST}": len(rows)}, facts


def chosen_models(root_uri: str) -> tuple[dict[str, str], str]:
    """Name -> version of what is judged, and the champion's name among them.

    Raises:
        DataError: there is no champion.
    """
    champion = registry.resolve(root_uri, registry.CHAMPION)
    named = {
        kind: registry.resolve(root_uri, kind)
        for kind in registry.KINDS
        if registry.pointed(root_uri, kind) is not None
    }
    if not named:
        raise DataError(f"{root_uri} has no models; run the train job first")
    for kind, version in named.items():
        if version == champion:
            return named, kind
    return {**named, registry.CHAMPION: champion}, registry.CHAMPION
