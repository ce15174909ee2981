"""completejourney in time order: each campaign judged by models that were fitted on what was known before it.

The examples are those of a finished ``make run``, the origins its back-test cut-offs. At each origin every
model is refitted on the rows whose label was final by then, with the product's settings; nothing is chosen on
a judged campaign. Networks and the blend hold back a fifth of the households for early stopping and
calibration.

Probabilities are corrected by what is known before a campaign: the observed rate of the latest campaign of
its type whose label is final, against what the model says of that campaign's rows.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.quality import rungs, verdicts
from bench.quality.verdicts import Bench, Found
from couponflow.config import Config
from couponflow.errors import DataError
from couponflow.models.calibration import fit_platt, prior_shift
from couponflow.training import backtest, baselines, feed, manifests, metrics

log = logging.getLogger("couponflow")

Array = NDArray[Any]

NETWORKS = ("mean_pool", "static", "din", "gru", "gru_att", "dien")
#: ``encoder@n`` is the encoder under the n-th other seed of initialisation, order of rows and dropout.
MORE_SEEDS = ("dien@1", "dien@2")
MODELS = ("rate", "rule", "logistic", "boosted", *NETWORKS, *MORE_SEEDS, "blend")
#: One household in so many is held back.
_FOLDS = 5
_TYPES = ("is_type_a", "is_type_b", "is_type_c")
#: Rows with which a cell's rate is drawn towards its campaign type's, and a correction towards none.
_CELL_ROWS, _CORRECTION_ROWS = 20.0, 50.0
_MOST_REDEMPTIONS = 3


@dataclass(frozen=True)
class Campaigns:
    """Labelled rows of all splits, in time order.

    ``wide`` [N,F]; ``label``, ``user``, ``campaign``, ``redemptions`` (earlier ones, at most 3) and ``type``
    (0, 1, 2 for A, B, C), all [N].
    """

    rows: tuple[feed.Example, ...]
    wide: Array
    label: Array
    user: Array
    campaign: Array
    redemptions: Array
    type: Array


@dataclass(frozen=True)
class Origin:
    """One cut-off: places of the rows that train, of those judged, and of those to be scored.

    ``asked`` holds the judged rows and those of the latest matured campaign of each type, ascending;
    ``latest`` names the latter by type. ``inner`` and ``outer`` are ``train`` without the held-back
    households, and their rows.
    """

    train: Array
    inner: Array
    outer: Array
    test: Array
    asked: Array
    latest: dict[int, Array]

    def of(self, places: Array, scores: Array) -> Array:
        """The scores of some of the asked rows."""
        return np.asarray(scores[np.searchsorted(self.asked, places)])


@dataclass(frozen=True)
class Logits:
    """What a model says of the asked rows: as fitted, for ranking, and calibrated; float64 [asked].

    ``outer`` are the raw logits of the held-back rows, where a model has such.
    """

    raw: Array
    calibrated: Array
    outer: Array | None = None


@dataclass
class Judged:
    """What was collected origin by origin: places, and per model raw and corrected logits and seconds."""

    places: list[Array] = field(default_factory=list)
    raw: dict[str, list[Array]] = field(default_factory=dict)
    corrected: dict[str, list[Array]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def read(dataset: manifests.Dataset) -> Campaigns:
    """Every labelled row of every split, with its history and its times.

    Raises:
        DataError: as ``feed.read_all`` and ``feed.read_dated``.
    """
    dated = {row.example_id: row for row in feed.read_dated(dataset)}
    rows = []
    for split in sorted(dataset.files):
        for row in feed.read_all(dataset, split) if dataset.rows(split) else []:
            times = dated[row.example_id]
            rows.append(row._replace(as_of=times.as_of, mature_time=times.mature_time))
    rows.sort(key=lambda row: (row.as_of, row.example_id))
    return campaigns(rows, dataset.wide_features)


def campaigns(rows: Sequence[feed.Example], wide_features: Sequence[str]) -> Campaigns:
    """What the models need of rows in time order."""
    wide = feed.aggregates(rows).astype(np.float64)
    place = {name: n for n, name in enumerate(wide_features)}
    redemptions = np.rint(np.expm1(wide[:, place["num_redemptions"]])).astype(np.int64)
    return Campaigns(
        tuple(rows),
        wide,
        np.array([row.label for row in rows]),
        np.array([row.user_id for row in rows]),
        np.array([row.target_id for row in rows]),
        np.minimum(redemptions, _MOST_REDEMPTIONS),
        wide[:, [place[name] for name in _TYPES]].argmax(axis=1),
    )


def origin(held: Campaigns, train: Array, test: Array) -> Origin:
    """What one origin may see and has to score."""
    is_outer = np.array([_is_held_back(user) for user in held.user[train]], dtype=bool)
    latest = {}
    for kind in np.unique(held.type[test]).tolist():
        known = train[held.type[train] == kind]
        if known.size:
            newest = held.campaign[known[-1]]
            latest[kind] = known[held.campaign[known] == newest]
    asked = np.unique(np.concatenate([test, *latest.values()]))
    return Origin(train, train[~is_outer], train[is_outer], test, asked, latest)


def _is_held_back(user: str) -> bool:
    return hashlib.sha256(user.encode()).digest()[1] % _FOLDS == 0


def run(config: Config, models: Sequence[str] = MODELS) -> Found:
    """Judge the models on every campaign after the first cut-off.

    Raises:
        DataError: the lake has no examples, or they have no cut-offs.
    """
    dataset = manifests.load(config.lake.root_uri)
    if not dataset.folds:
        raise DataError(
            f"{config.lake.root_uri}: the examples have no cut-offs; set examples.cutoffs and run make run"
        )
    held, judged = read(dataset), Judged()
    for fold in dataset.folds:
        train, test = backtest.fold_rows(held.rows, fold)
        judge(config, dataset.vocabulary_sizes, held, origin(held, train, test), models, judged)
        log.info("origin %s: %d rows train, %d are judged", fold["cutoff"], len(train), len(test))
    return summary(held, judged)


def judge(
    config: Config,
    sizes: dict[str, int],
    held: Campaigns,
    now: Origin,
    models: Sequence[str],
    judged: Judged,
) -> None:
    """Fit every model at one origin and keep what it says of the judged rows."""
    judged.places.append(now.test)
    fitted: dict[str, Logits] = {}
    for name in models:
        start = time.monotonic()
        fitted[name] = fit(name, config, sizes, held, now, fitted)
        judged.seconds[name] = judged.seconds.get(name, 0.0) + time.monotonic() - start
        judged.raw.setdefault(name, []).append(now.of(now.test, fitted[name].raw))
        judged.corrected.setdefault(name, []).append(corrected(held, now, fitted[name].calibrated))


def fit(
    name: str,
    config: Config,
    sizes: dict[str, int],
    held: Campaigns,
    now: Origin,
    fitted: dict[str, Logits],
) -> Logits:
    """One model at one origin; the blend needs DIEN in ``fitted``."""
    label = held.label
    match name:
        case "rate":
            cells = np.zeros(len(label), dtype=np.int64)
            return _same(_cell_rates(held, now.train, cells)[now.asked])
        case "rule":
            return _same(_cell_rates(held, now.train, held.redemptions)[now.asked])
        case "logistic":
            return _same(_logistic(config, held, now.train, now.asked))
        case "boosted":
            features = (held.wide[now.inner], label[now.inner]), (held.wide[now.outer], label[now.outer])
            found = rungs.boosted(*features, held.wide[now.asked])
            return Logits(found.test, found.test, found.valid)
        case "blend":
            return _blend(config, held, now, fitted["dien"])
        case _:
            inner, outer, asked = (
                [held.rows[place] for place in part] for part in (now.inner, now.outer, now.asked)
            )
            encoder, _, number = name.partition("@")
            seed = config.training.seed + int(number or 0)
            found = rungs.network(config, sizes, (inner, outer, asked), seed, encoder)
            return Logits(found.test, _platt(found.valid, label[now.outer], found.test), found.valid)


def _same(logit: Array) -> Logits:
    return Logits(logit, logit)


def _cell_rates(held: Campaigns, train: Array, cell: Array) -> Array:
    """Log-odds of the shrunk rate of each row's (campaign type, cell) in the training rows, for all rows."""
    label, kind = held.label, held.type
    overall = float(label[train].mean())
    rates = np.empty(len(label))
    for number in np.unique(kind):
        of_type = train[kind[train] == number]
        rate = (label[of_type].sum() + _CELL_ROWS * overall) / (len(of_type) + _CELL_ROWS)
        for value in np.unique(cell):
            rows = of_type[cell[of_type] == value]
            shrunk = (label[rows].sum() + _CELL_ROWS * rate) / (len(rows) + _CELL_ROWS)
            rates[(kind == number) & (cell == value)] = shrunk
    return rungs.logit_of(rates)


def _logistic(config: Config, held: Campaigns, train: Array, asked: Array) -> Array:
    model = baselines.fit_logistic(held.wide[train], held.label[train], config.training.logistic_c)
    sd = np.where(model.sd == 0.0, 1.0, model.sd)
    return np.asarray(((held.wide[asked] - model.mean) / sd) @ model.coef + model.intercept)


def _platt(outer: Array, label: Array, asked: Array) -> Array:
    return rungs.logit_of(fit_platt(outer, label).apply(asked))


def _blend(config: Config, held: Campaigns, now: Origin, dien: Logits) -> Logits:
    """The product's blend of DIEN and logistic regression, its weights from the held-back households."""
    assert dien.outer is not None
    label = held.label[now.outer]
    weights, intercept = baselines.fit_blend(
        {"dien": dien.outer, "logistic": _logistic(config, held, now.inner, now.outer)}, label
    )
    asked = {"dien": dien.raw, "logistic": _logistic(config, held, now.inner, now.asked)}
    return _same(np.asarray(intercept + sum(weights[name] * asked[name] for name in sorted(weights))))


def corrected(held: Campaigns, now: Origin, logit: Array) -> Array:
    """The judged rows' logits, moved per campaign type to the rate of its latest matured campaign."""
    shifted = now.of(now.test, logit).copy()
    for kind, rows in now.latest.items():
        said = float((1.0 / (1.0 + np.exp(-now.of(rows, logit)))).mean())
        seen = (held.label[rows].sum() + _CORRECTION_ROWS * said) / (len(rows) + _CORRECTION_ROWS)
        shifted[held.type[now.test] == kind] += prior_shift(said, float(seen))
    return shifted


def summary(held: Campaigns, judged: Judged) -> Found:
    """Verdicts and the ladder over the rows of all origins together."""
    places = np.concatenate(judged.places)
    label, user, campaign = held.label[places], held.user[places], held.campaign[places]
    raw = {name: np.concatenate(found) for name, found in judged.raw.items()}
    chance = {name: 1.0 / (1.0 + np.exp(-np.concatenate(found))) for name, found in judged.corrected.items()}
    bench = Bench(label, user)
    num_top = metrics.rows_of_share(0.1, label.size)
    ladder: list[dict[str, Any]] = []
    for name, logit in raw.items():
        found, against = bench.interval_of(logit), bench.difference([logit], [raw["logistic"]])
        as_fitted = 1.0 / (1.0 + np.exp(-logit))
        ladder.append(
            {
                "world": "completejourney",
                "model": name,
                "auc": found.value,
                "interval": list(found.interval),
                "gauc": metrics.gauc(logit, label, campaign)[0],
                "pr_auc": metrics.pr_auc(logit, label),
                "ece_as_fitted": metrics.ece(as_fitted, label),
                "ece": metrics.ece(chance[name], label),
                "lift_10": metrics.lift(logit, label, num_top),
                "minus_logistic": [against.value, *against.interval],
                "minimum_detectable": against.minimum_detectable,
                "seconds": round(judged.seconds[name], 1),
            }
        )
    lines = {line["model"]: line for line in ladder}
    counts = {
        "rows": int(label.size),
        "positives": int(label.sum()),
        "households": len(np.unique(user)),
        "campaigns": len(np.unique(campaign)),
    }
    found_verdicts = [
        verdicts.at_least(
            "rolling_logistic_auc",
            lines["logistic"]["auc"],
            "AUC",
            0.79,
            "none: the floor of the champion",
            interval=tuple(lines["logistic"]["interval"]),
            **counts,
        ),
        verdicts.at_most("rolling_logistic_ece", lines["logistic"]["ece"], "ECE", 0.05, "none, corrected"),
    ]
    if "dien" in lines:
        line = lines["dien"]
        seeds = [logit for name, logit in raw.items() if name.partition("@")[0] == "dien"]
        by_seed = [metrics.auc(logit, label) for logit in seeds]
        against = bench.difference(seeds, [raw["logistic"]])
        found_verdicts += [
            verdicts.at_least(
                "rolling_dien_minus_logistic",
                against.value,
                "AUC",
                -0.015,
                "logistic regression on 100 aggregates",
                interval=against.interval,
                minimum_detectable=against.minimum_detectable,
                auc_by_seed=by_seed,
                sd_over_seeds=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
            ),
            verdicts.at_most(
                "rolling_dien_ece",
                line["ece"],
                "ECE",
                0.05,
                "none, corrected",
                as_fitted=line["ece_as_fitted"],
            ),
            verdicts.at_least(
                "rolling_dien_lift_10",
                line["lift_10"],
                "times the rate",
                3.5,
                "all rows",
                logistic=lines["logistic"]["lift_10"],
            ),
        ]
    return Found(found_verdicts, ladder)
