"""The evaluation of registered models: what joins registry, feed and evaluation into one record."""

import json
import logging
import math
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from couponflow.config import Config
from couponflow.dates import local_day
from couponflow.errors import DataError
from couponflow.lake import storage
from couponflow.sections import EvaluationConfig
from couponflow.training import (
    backtest,
    calibrators,
    decisions,
    evaluation,
    feed,
    fitting,
    inspection,
    manifests,
    registry,
    segments,
)

log = logging.getLogger("couponflow")

_TEST = "test"


def evaluate_models(config: Config, run_id: str, dates: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Judge the champion and the newest model of every kind on ``test``: ``evaluations/<run_id>.json``.

    Models are named by kind; a champion that is not the newest of its kind is named ``champion``. With
    ``examples.cutoffs`` the record also holds the back-test. The gate's decision has a record of its own, and
    its challenger becomes the registry's. Returns the rows read and the main numbers.

    Raises:
        DataError: no champion, no test rows, or damaged files.
        ConfigError: a model expects another vocabulary than the examples have.
        ConflictError: another run moved the challenger meanwhile.
    """
    from couponflow.models.bundle import load_bundle
    from couponflow.models.dien import Dien

    root_uri = config.lake.root_uri
    dataset = manifests.load(root_uri)
    named, champion = chosen_models(root_uri)
    rows = feed.read_all(dataset, _TEST, (*feed.ALL_COLUMNS, "as_of"))
    truth = labelled(rows, config.lake.time_zone)
    types = calibrators.row_types(rows)
    scored, training, calibration, attention = [], {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, version in named.items():
            bundle = load_bundle(registry.fetch(root_uri, version, Path(folder)), dataset.vocabulary_version)
            logit = fitting.score_rows(bundle, rows)
            scored.append(evaluation.ScoredModel(name, version, logit, bundle.probabilities(logit, types)))
            calibration[name] = calibrators.described(bundle, logit, truth.label, types, truth.campaign_id)
            training[name] = {
                "epochs": bundle.metrics.get("epochs", []),
                "num_ranks": bundle.metrics.get("num_ranks", 1),
            }
            if isinstance(bundle.model, Dien):
                attention[name] = inspection.attention_sample(bundle.model, rows)
    judged = judge_rows(truth, rows, scored, champion, config.evaluation)
    record = {
        "run_id": run_id,
        "dates": dates,
        "split": _TEST,
        "training_examples_version": dataset.table_version,
        "vocabulary_version": dataset.vocabulary_version,
        **judged,
        "training": training,
        "calibration": calibration,
        "attention": attention,
        "backtest": backtest.run(config, dataset),
    }
    uri = storage.join(root_uri, "evaluations", f"{run_id}.json")
    storage.create(uri, json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode(), run_id)
    decision_uri = decisions.write(root_uri, run_id, record, uri)
    if challenger := judged["gate"]["challenger_version"]:
        registry.set_challenger(root_uri, challenger, run_id, judged["gate"]["decision"])
    main = {
        name: {"model_version": found["model_version"]}
        | {key: found["metrics"][key] for key in ("auc", "gauc", "pr_auc", "log_loss", "ece")}
        for name, found in judged["models"].items()
    }
    _log(judged)
    facts = {"evaluation": uri, "decision": decision_uri, "models": main, "gate": judged["gate"]}
    return {f"{manifests.TABLE}.{_TEST}": len(rows)}, {**facts, "backtest": record["backtest"]}


def labelled(rows: Sequence[feed.Example], time_zone: str) -> evaluation.LabelledRows:
    """The stored rows as what is judged.

    Raises:
        DataError: they have one class only.
    """
    instants = np.array([row.as_of for row in rows], np.int64)
    known, place = np.unique(instants, return_inverse=True)
    days = [str(local_day(datetime.fromtimestamp(micros / 1e6, UTC), time_zone)) for micros in known.tolist()]
    return evaluation.LabelledRows(
        np.array([row.label for row in rows]),
        np.array([row.user_id for row in rows]),
        np.array([row.target_id for row in rows]),
        np.array(days, dtype="U10")[place],
    )


def judge_rows(
    labelled_rows: evaluation.LabelledRows,
    rows: Sequence[feed.Example],
    models: Sequence[evaluation.ScoredModel],
    champion: str,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """All models on the same rows: metrics, intervals, segments, comparisons, the gate. NaN becomes None."""
    judged = evaluation.evaluate(labelled_rows, models, champion, config)
    record = evaluation.describe(labelled_rows, models, judged, config)
    names = segments.assign(rows)
    for model in models:
        record["models"][model.name]["segments"] = segments.judge(
            model.logit, model.probability, labelled_rows.label, names, config.num_bins
        )
    record["segments_left_out"] = segments.LEFT_OUT
    record["gate"] = decisions.decide(labelled_rows, models, judged, config)
    cleaned: dict[str, Any] = evaluation.without_nan(record)
    return cleaned


def _log(judged: dict[str, Any]) -> None:
    for name, found in judged["models"].items():
        log.info(
            "%s: AUC %.4f, log loss %.4f, calibration error %.4f",
            name,
            *(found["metrics"][key] for key in ("auc", "log_loss", "ece")),
        )
    for found in judged["comparisons"]:
        low, high = (math.nan if end is None else end for end in found["interval"])
        smallest = found["minimum_detectable"]
        log.info(
            "%s against %s: AUC %+.4f [%+.4f, %+.4f], minimum detectable %.4f%s",
            found["challenger"],
            found["champion"],
            found["difference"],
            low,
            high,
            math.nan if smallest is None else smallest,
            "" if found["is_testable"] else ", not testable",
        )
    log.info("gate: %s", judged["gate"]["decision"])


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
