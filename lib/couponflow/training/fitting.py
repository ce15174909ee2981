"""Each kind of model from a dataset to a registered bundle: what joins feed, trainer, baselines and registry.

Protocol: fitted on split ``train``, chosen and calibrated on ``valid``; ``test`` is never opened here.
Where training negatives were sampled, every calibrator undoes that exactly before its fitted map.
A DIEN trains on ``training.num_ranks`` Horovod ranks. The process that asks for it starts them, beside it or
as tasks of Spark, each of them runs ``train_rank``, rank 0 leaves the bundle in the run's folder, local or on
the lake, and the asking process registers it.
"""

import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from couponflow.config import Config
from couponflow.errors import ConfigError, DataError
from couponflow.lake import faults, storage
from couponflow.training import calibrators, feed, launch, manifests, metrics, preparation, registry
from couponflow.training.workers import Workers, connect, launched_rank

if TYPE_CHECKING:
    from couponflow.models.bundle import Bundle
    from couponflow.training.checkpoints import Store

log = logging.getLogger("couponflow")

_TRAIN, _VALID = "train", "valid"
_BUNDLE, _RESULT, _CONFIG = "bundle", "result.json", "config.json"
#: Settings of training that do not change what is learnt; the number of ranks is checked by itself.
_OPERATIONAL = {"num_ranks", "launcher", "start_timeout_seconds", "stall_seconds", "checkpoint_steps"}


def train(
    config: Config, kind: str, run_id: str, argv: Sequence[str], from_scratch: bool = False
) -> tuple[dict[str, int], dict[str, Any]]:
    """Fit, calibrate and register one model; returns the rows read and the facts of the run.

    ``argv`` starts one rank of this job when followed by ``--run-folder FOLDER``. A DIEN goes on from the
    newest good checkpoint of the same settings and dataset, unless it is to begin ``from_scratch``; they are
    removed once its bundle is registered. The first logistic model of a lake becomes its champion.

    Raises:
        ConfigError: an unknown kind, more ranks than row groups or slots, or checkpoints of other ranks.
        DataError: the examples are missing, damaged or give a loss that is not finite, or no checkpoint can
            be used.
        InfraError: a rank died or hung.
    """
    if kind not in registry.KINDS:
        raise ConfigError(f"model {kind!r}: expected one of {', '.join(registry.KINDS)}; give --model KIND")
    start = time.monotonic()
    root_uri = config.lake.root_uri
    dataset = manifests.load(root_uri)
    folder = _run_folder(root_uri, run_id)
    ranks = config.training.num_ranks
    checkpoints = checkpoint_store(config, dataset, ranks) if kind == "dien" else None
    if checkpoints is not None and from_scratch:
        checkpoints.clear()
    elif checkpoints is not None:
        checkpoints.load()  # refused before any rank is started
    is_on_spark = config.training.launcher == "spark"
    if kind == "dien" and (ranks > 1 or is_on_spark) and launched_rank() is None:
        for split in (_TRAIN, _VALID):
            manifests.check(dataset, split, ranks)
        if is_on_spark:
            _train_on_spark(config, kind, run_id, folder)
        else:
            (folder / _CONFIG).write_text(config.model_dump_json(), encoding="utf-8")
            limits = config.training.start_timeout_seconds, config.training.stall_seconds
            launch.run(ranks, [*argv, "--run-folder", str(folder)], folder, *limits)
    else:
        train_rank(config, kind, folder, connect(), dataset)
    if not (folder / _RESULT).is_file():  # another rank of a launcher that is not ours
        shutil.rmtree(folder)
        return {}, {"rank_only": True}
    result = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    version = registry.register(root_uri, folder / _BUNDLE, run_id)
    if kind == "logistic" and registry.pointed(root_uri, registry.CHAMPION) is None:
        registry.set_champion(root_uri, version, run_id, "first champion")
    shutil.rmtree(folder)  # published; what stays of a failed run says why
    if checkpoints is not None:
        checkpoints.clear()
    seconds = round(time.monotonic() - start, 1)
    log.info("registered %s in %.1f s", version, seconds)
    facts = {"model_version": version, "seconds": seconds, "training_examples_version": dataset.table_version}
    return result["rows"], facts | result["metrics"]


def run_rank(folder: Path, kind: str) -> None:
    """One rank of a launched run; everything it needs lies in ``folder``."""
    config = Config.model_validate_json((folder / _CONFIG).read_text(encoding="utf-8"))

    def work(workers: Workers) -> None:
        train_rank(config, kind, folder, workers, manifests.load(config.lake.root_uri))

    launch.run_rank(folder, work)


def _train_on_spark(config: Config, kind: str, run_id: str, folder: Path) -> None:
    """Train on ranks that know the lake only, and bring what they leave there into ``folder``."""
    from couponflow.lake import session
    from couponflow.training import spark_launch

    root_uri = storage.spark_uri(config.lake.root_uri)  # ranks have other working folders
    uri = storage.join(root_uri, "work", run_id)
    lake = config.lake.model_copy(update={"root_uri": root_uri})
    content = config.model_copy(update={"lake": lake}).model_dump_json().encode()
    storage.create(storage.join(uri, _CONFIG), content, run_id)
    training = config.training
    spark_launch.run(
        session.start(config.spark, "train"),
        training.num_ranks,
        f"{__name__}:{run_lake_rank.__name__}",
        (uri, kind, run_id),
        uri,
        training.start_timeout_seconds,
        training.stall_seconds,
    )
    if storage.is_remote(uri):
        storage.download_folder(uri, folder)
        storage.remove_folder(uri)


def run_lake_rank(uri: str, kind: str, run_id: str) -> None:
    """One rank of a run on Spark; what it needs lies below ``uri``, and rank 0 leaves its result there."""
    from couponflow.training import spark_launch

    config = Config.model_validate_json(storage.read_bytes(storage.join(uri, _CONFIG)))

    def work(workers: Workers) -> None:
        with tempfile.TemporaryDirectory(prefix=f"{run_id}-") as name:
            folder = Path(name)
            train_rank(config, kind, folder, workers, manifests.load(config.lake.root_uri))
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                storage.create(
                    storage.join(uri, path.relative_to(folder).as_posix()), path.read_bytes(), run_id
                )

    spark_launch.run_rank(uri, work)


def train_rank(config: Config, kind: str, folder: Path, workers: Workers, dataset: manifests.Dataset) -> None:
    """Fit one model; rank 0 leaves the bundle, the rows read and the curves in ``folder``."""
    from couponflow.models.bundle import save_bundle

    if kind != "dien" and workers.size > 1:
        raise ConfigError(f"model {kind} trains in one process; start it without a launcher")
    if workers.rank:
        log.setLevel(logging.WARNING)  # one rank reports for all
    match kind:
        case "dien":
            bundle = fit_dien(config, dataset, workers)
            num_train = dataset.rows(_TRAIN)
        case "blend":
            bundle, num_train = fit_blend(config, dataset, folder), 0
        case _:
            bundle, num_train = fit_tabular(config, dataset, kind), dataset.rows(_TRAIN)
    if workers.rank:
        return
    bundle = replace(bundle, metrics={**bundle.metrics, "fitted_on": fitted_on(config, kind)})
    save_bundle(bundle, folder / _BUNDLE)
    rows = {f"{manifests.TABLE}.{_TRAIN}": num_train, f"{manifests.TABLE}.{_VALID}": dataset.rows(_VALID)}
    result = {"rows": rows, "metrics": bundle.metrics}
    (folder / _RESULT).write_text(json.dumps(result), encoding="utf-8")


def fitted_on(config: Config, kind: str) -> dict[str, int]:
    """The rows that shaped the weights, as UTC microseconds since 1970.

    They were sent at ``from`` or later and their labels were final by ``final_by``; a later calibrator must
    be fitted on others. The weights of a blend come from ``valid``.
    """
    until = "test_start" if kind == "blend" else "valid_start"
    return {
        "from": calibrators.instant(config, "train_start"),
        "final_by": calibrators.instant(config, until),
    }


def fit_dien(config: Config, dataset: manifests.Dataset, workers: Workers) -> "Bundle":
    """Train the network on this rank's shards; the bundle is calibrated on all validation rows."""
    import torch

    from couponflow.models.bundle import Bundle
    from couponflow.models.calibration import Calibrator
    from couponflow.models.dien import Dien
    from couponflow.training import steps, trainer

    settings = config.training
    if workers.size > 1:
        torch.set_num_threads(1)
    shuffle = (settings.batch_size, settings.shuffle_rows, settings.seed)
    train_feed = feed.Feed(dataset, _TRAIN, workers, *shuffle)
    valid_feed = feed.Feed(dataset, _VALID, workers, 512 * workers.size)
    store = checkpoint_store(config, dataset, workers.size)
    resumed = store.load(log.debug)  # the process that asked has warned
    torch.manual_seed(settings.seed)
    network = Dien(config.model, dataset.vocabulary_sizes, len(dataset.wide_features))
    if resumed is None:
        preparation.prepare(network, preparation.wide_rows(train_feed, workers), config)
    unsampled = Calibrator(sampling_rate=dataset.sampling_rate)

    def report(phase: str, epoch: int, step: int) -> None:
        workers.beat(phase, epoch, step)
        faults.fire(config.lake.root_uri, "train", phase, f"{workers.rank}-{epoch}-{step}")

    fitted = trainer.fit(
        network,
        trainer.Rows(
            train_feed.epoch, valid_feed.epoch, valid_shift=unsampled.correction, locate=train_feed.locate
        ),
        settings,
        steps.Objective(
            config.model.auxiliary_weight, preparation.embedding_penalty(network, train_feed, config, workers)
        ),
        workers,
        store,
        resumed=resumed,
        report=report,
    )
    if fitted.train_rows != dataset.rows(_TRAIN):
        raise DataError(
            f"trained on {fitted.train_rows} rows of {dataset.rows(_TRAIN)}; run build_examples again"
        )
    types = np.full(fitted.valid_label.size, "")
    if config.calibration.needs_types:
        types = valid_types(valid_feed, workers)
    if workers.rank:
        calibrator = unsampled  # rank 0 saves the bundle
    else:
        calibrator = calibrators.fit(
            config, dataset, fitted.valid_logit, fitted.valid_label, types, unsampled
        )
    curves = {
        "epochs": fitted.curves(),
        "best_epoch": fitted.best.epoch,
        "num_ranks": workers.size,
        "valid": _valid_metrics(fitted.valid_logit + unsampled.correction, fitted.valid_label),
    }
    return Bundle(
        network,
        dataset.vocabulary_version,
        dataset.vocabulary_sizes,
        dataset.wide_features,
        calibrator,
        curves,
    )


def checkpoint_store(config: Config, dataset: manifests.Dataset, num_ranks: int) -> "Store":
    """Where a DIEN of these settings and this dataset keeps its checkpoints; any later run finds them there.

    Ranks are no part of the place, so that a run with others is told instead of beginning again.
    """
    from couponflow.training.checkpoints import Identity, Store

    names = sorted(set(type(config.training).model_fields) - _OPERATIONAL)
    settings = config.fingerprint("model", *(f"training.{name}" for name in names))
    content = json.dumps(asdict(dataset), sort_keys=True).encode()
    data = f"{manifests.TABLE}-v{dataset.table_version}-{storage.sha256(content)[:16]}"
    key = storage.sha256(f"{settings} {data}".encode())[:16]
    uri = storage.join(config.lake.root_uri, "work", f"checkpoints-dien-{key}")
    return Store(uri, Identity(settings, data, num_ranks))


def valid_types(valid_feed: feed.Feed, workers: Workers) -> NDArray[Any]:
    """Campaign types of the validation rows of all ranks, in the order of their logits; collective."""
    from couponflow.models import tabular

    codes = [tabular.campaign_codes(batch.wide.numpy()) for batch in valid_feed.epoch()]
    gathered = workers.gather(np.concatenate([np.zeros(0), *codes]))
    types: NDArray[Any] = np.asarray(tabular.CAMPAIGN_TYPES)[gathered.astype(int)]
    return types


def fit_tabular(config: Config, dataset: manifests.Dataset, kind: str) -> "Bundle":
    """A model of the aggregates of ``train``, calibrated on ``valid``; boosted trees also stop by it."""
    from couponflow.models.bundle import Bundle
    from couponflow.models.calibration import Calibrator
    from couponflow.models.tabular import Tabular
    from couponflow.training import baselines, boosting

    unsampled = Calibrator(sampling_rate=dataset.sampling_rate)
    wide, label = _aggregates(feed.read_all(dataset, _TRAIN, feed.WIDE_COLUMNS))
    held = feed.read_all(dataset, _VALID, feed.WIDE_COLUMNS)
    valid_wide, valid_label = _aggregates(held)
    model: Tabular
    match kind:
        case "rate":
            model = baselines.fit_rate(wide, label)
        case "rule":
            model = baselines.fit_rule(wide, label)
        case "logistic":
            model = baselines.fit_logistic(wide, label, config.training.logistic_c)
        case _:
            rows = (wide, label, valid_wide, valid_label)
            model = boosting.fit_trees(*rows, config.boosting, config.training.seed, unsampled.correction)
    bundle = Bundle(model, dataset.vocabulary_version, dataset.vocabulary_sizes, dataset.wide_features)
    logit = score_rows(bundle, held)
    types = calibrators.row_types(held)
    valid = _valid_metrics(logit + unsampled.correction, valid_label)
    return replace(
        bundle,
        calibrator=calibrators.fit(config, dataset, logit, valid_label, types, unsampled),
        metrics={"epochs": [], "num_ranks": 1, "valid": valid},
    )


def _aggregates(rows: Sequence[feed.Example]) -> tuple[metrics.Floats, metrics.Floats]:
    """Aggregates [N,F] and labels [N] of stored rows."""
    return feed.aggregates(rows), np.array([row.label for row in rows])


def fit_blend(config: Config, dataset: manifests.Dataset, folder: Path) -> "Bundle":
    """Blend of the newest registered DIEN and logistic models, fitted on ``valid``."""
    from couponflow.models.bundle import load_bundle
    from couponflow.models.calibration import IDENTITY, Calibrator
    from couponflow.training import baselines

    root_uri = config.lake.root_uri
    members = {}
    for kind in ("dien", "logistic"):
        local = registry.fetch(root_uri, kind, folder / "members")
        members[kind] = load_bundle(local, dataset.vocabulary_version)
    held = feed.read_all(dataset, _VALID)
    logits = {kind: score_rows(member, held) for kind, member in members.items()}
    label = np.array([row.label for row in held])
    types = calibrators.row_types(held)

    def calibrate(crossed: metrics.Floats, label: metrics.Floats) -> Calibrator:
        return calibrators.fit(config, dataset, crossed, label, types, IDENTITY)

    bundle = baselines.blend_bundle(members, logits, label, [row.user_id for row in held], calibrate)
    curves = {
        "epochs": [],
        "num_ranks": 1,
        "members": {kind: member.model_version for kind, member in members.items()},
        "valid": _valid_metrics(score_rows(bundle, held), label),
    }
    return replace(bundle, metrics=curves)


def score_rows(bundle: "Bundle", rows: Sequence[feed.Example]) -> metrics.Floats:
    """Raw logits of stored rows, in their order."""
    return np.concatenate([bundle.logits(batch) for batch in feed.batches(rows)] or [np.zeros(0)])


def rank_argv(job_file: str, dates: str, kind: str) -> list[str]:
    """The argument list that starts one rank of the train job, but for its run folder.

    A rank reads its config from that folder, so that a config made in memory reaches it too.
    """
    return [sys.executable, job_file, "--config", _CONFIG, "--dates", dates, "--model", kind]


def _valid_metrics(logit: metrics.Floats, label: metrics.Floats) -> dict[str, float]:
    return {
        "auc": metrics.auc(logit, label),
        "log_loss": metrics.log_loss(logit, label),
        "base_rate": float(np.mean(label)),
    }


def _run_folder(root_uri: str, run_id: str) -> Path:
    """A local folder of this run: beside a local lake's tables, else in the temporary folder."""
    if storage.is_remote(root_uri):
        return Path(tempfile.mkdtemp(prefix=f"{run_id}-"))
    folder = Path(storage.join(root_uri, "work", run_id)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
