"""Verdicts on the synthetic worlds, whose truth is known.

``first_order``: interests evolve by a chain, which the newest events show. ``order``: two targets of which
only the order of views within one visit tells the wanted one; ``order_off``: the same visits without an
effect; ``shuffled``: the same world, read in histories whose events are permuted inside each time bucket.
``control``: no structure, so that a sequence has nothing to find.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.quality import rungs, samples, verdicts
from bench.quality.rungs import Scored
from bench.quality.samples import Sample, Samples
from bench.quality.verdicts import Bench, Found, Verdict
from couponflow.config import Config, load_config
from couponflow.models.calibration import fit_platt
from couponflow.training import baselines, metrics

Array = NDArray[Any]

ENVIRONMENTS = Path(__file__).parents[2] / "deploy" / "env"
#: What a world takes away from the one of its file.
WORLDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "first_order": ("quality.toml", ()),
    "control": ("quality.toml", ("world.local=0", "world.chain=0", "world.drift=0")),
    "order": ("order.toml", ()),
    "order_off": ("order.toml", ("world.order=0",)),
}
#: DIN in the form of its authors' code, whose attention sees more than a product; of softmax, sigmoid and sum
#: it has the best validation log loss in ``first_order``.
DIN: dict[str, Any] = {"attention": "mlp", "normalise": "softmax"}
#: Networks of each world, by the name of their line: encoder and options beyond the world's ``[model]``.
LADDER: dict[str, tuple[str, dict[str, Any]]] = {
    "mean_pool": ("mean_pool", {}),
    "static": ("static", {}),
    "din": ("din", DIN),
    "din_positions": ("din", {**DIN, "position_dim": 8}),
    "gru": ("gru", {}),
    "gru_att": ("gru_att", {}),
    "dien": ("dien", {}),
}
SEQUENCE_MODELS = ("din", "gru", "gru_att", "dien")


@dataclass(frozen=True)
class Plan:
    """How much is run: seeds of the headline difference, overrides of a world's file.

    ``is_brief`` leaves out the rungs that no verdict needs.
    """

    seeds: int = 3
    overrides: tuple[str, ...] = ()
    is_brief: bool = False

    def config(self, world: str) -> Config:
        """The configuration of a world."""
        file, changes = WORLDS[world]
        return load_config(ENVIRONMENTS / file, (*changes, *self.overrides))


class Runs:
    """The scores of one world's models, each fitted once per seed."""

    def __init__(self, config: Config, drawn: Samples) -> None:
        """Models of ``config.model`` on these splits."""
        self._config, self._drawn = config, drawn
        self.scored: dict[str, list[Scored]] = {}
        self.bench = Bench(drawn.test.label, drawn.test.user)

    def counted(self) -> list[Array]:
        """The models without a sequence: popularity, and logistic regression and boosted trees on counts.

        Returns the test logits of the boosted trees.
        """
        train, valid, test = self._drawn.train, self._drawn.valid, self._drawn.test
        place = samples.COUNTS.index("log_popularity")
        self.scored["popularity"] = [Scored(valid.counts[:, place], test.counts[:, place], 0, 0.0)]
        features = (train.counts, train.label), (valid.counts, valid.label)
        self.scored["logistic"] = [
            rungs.logistic(train.counts, train.label, valid.counts, test.counts, self._config)
        ]
        self.scored["boosted"] = [rungs.boosted(*features, test.counts)]
        return self.tests("boosted")

    def blend(self) -> None:
        """The product's blend, of DIEN and boosted trees; its weights are fitted on the validation rows."""
        members = {name: self.scored[name][0] for name in ("dien", "boosted")}
        weights, intercept = baselines.fit_blend(
            {name: member.valid for name, member in members.items()}, self._drawn.valid.label
        )
        valid, test = (
            intercept + sum(weights[name] * getattr(member, part) for name, member in members.items())
            for part in ("valid", "test")
        )
        self.scored["blend"] = [Scored(np.asarray(valid), np.asarray(test), 0, 0.0)]

    def network(self, name: str, seeds: int = 1) -> list[Array]:
        """Test logits of a line of the ladder, one array per seed."""
        encoder, options = LADDER[name]
        splits = (self._drawn.train.rows, self._drawn.valid.rows, self._drawn.test.rows)
        self.scored[name] = [
            rungs.network(self._config, samples.SIZES, splits, seed, encoder, **options)
            for seed in range(seeds)
        ]
        return self.tests(name)

    def tests(self, name: str) -> list[Array]:
        """Test logits of what has been fitted."""
        return [found.test for found in self.scored[name]]

    def lines(self, world: str, rows: Array | None = None) -> list[dict[str, Any]]:
        """The ladder: AUC with its interval, share of the gap from boosted trees to the oracle, and costs.

        ``rows``: a mask of test rows, shown as ``auc_order_only`` beside the AUC of the others.
        """
        test = self._drawn.test
        oracle = metrics.auc(test.truth, test.label)
        floor = self.bench.auc(*self.tests("boosted")) if "boosted" in self.scored else None
        scores: Mapping[str, Sequence[Array]] = {
            **{name: self.tests(name) for name in self.scored},
            "oracle": [test.truth],
        }
        return [self._line(world, name, found, oracle, floor, rows) for name, found in scores.items()]

    def _line(
        self,
        world: str,
        name: str,
        scores: Sequence[Array],
        oracle: float,
        floor: float | None,
        rows: Array | None,
    ) -> dict[str, Any]:
        test, judged = self._drawn.test, self.bench.interval_of(*scores)
        line: dict[str, Any] = {
            "world": world,
            "model": name,
            "auc": judged.value,
            "interval": list(judged.interval),
            "seeds": len(scores),
            "gauc": float(np.mean([metrics.gauc(s, test.label, test.user)[0] for s in scores])),
        }
        if floor is not None and name != "boosted":
            line["gap_share"] = verdicts.gap_share(floor, judged.value, oracle)
        if rows is not None:
            for key, mask in (("auc_order_only", rows), ("auc_others", ~rows)):
                line[key] = float(np.mean([metrics.auc(s[mask], test.label[mask]) for s in scores]))
        if name in LADDER:
            line["epochs"] = [found.epochs for found in self.scored[name]]
            line["seconds"] = round(sum(found.seconds for found in self.scored[name]), 1)
        return line


def first_order(plan: Plan) -> Found:
    """How much of the gap to the oracle each rung closes, and how good the best one's probabilities are."""
    config = plan.config("first_order")
    drawn = samples.draw(config)
    runs = Runs(config, drawn)
    boosted = runs.counted()
    for name in (
        ("din", "dien") if plan.is_brief else ("mean_pool", "static", "din", "gru", "gru_att", "dien")
    ):
        runs.network(name)
    runs.blend()
    test = drawn.test
    oracle = metrics.auc(test.truth, test.label)
    floor = runs.bench.auc(*boosted)
    share = verdicts.gap_share(floor, runs.bench.auc(*runs.tests("din")), oracle)
    difference = runs.bench.difference(runs.tests("din"), boosted)
    found = [
        verdicts.closes_gap(
            "din_gap_share", share, difference, 0.30, 1, "boosted trees on windows and recency"
        ),
        calibrated(drawn.valid, test, runs.scored["dien"][0]),
    ]
    return Found(found, runs.lines("first_order"))


def calibrated(valid: Sample, test: Sample, scored: Scored) -> Verdict:
    """Calibration error of the test days after Platt scaling on the validation day, and the distance to p."""
    probability = fit_platt(scored.valid, valid.label).apply(scored.test)
    raw = 1.0 / (1.0 + np.exp(-scored.test))
    return verdicts.at_most(
        "calibration_ece",
        metrics.ece(probability, test.label),
        "ECE",
        0.02,
        "DIEN, Platt on the matured validation day",
        mean_distance_to_truth=float(np.abs(probability - test.truth).mean()),
        ece_uncalibrated=metrics.ece(raw, test.label),
        ratio=metrics.calibration_ratio(probability, test.label),
    )


def order(plan: Plan) -> Found:
    """DIEN against DIN where only the order of events tells."""
    config = plan.config("order")
    drawn = samples.draw(config)
    runs = Runs(config, drawn)
    runs.counted()
    for name in ("dien", "din"):
        runs.network(name, plan.seeds)
    for name in () if plan.is_brief else ("din_positions", "gru", "gru_att", "mean_pool", "static"):
        runs.network(name)
    runs.blend()
    rows = drawn.test.is_order_only
    chosen = drawn.test.take(rows)
    bench = Bench(chosen.label, chosen.user)
    dien, din = ([score[rows] for score in runs.tests(name)] for name in ("dien", "din"))
    verdict = verdicts.exceeds(
        "dien_minus_din_order_only", bench.difference(dien, din), 0.02, plan.seeds, "DIN, same time buckets"
    )
    by_seed = [bench.auc(ours) - bench.auc(theirs) for ours, theirs in zip(dien, din, strict=True)]
    details: dict[str, Any] = {
        "by_seed": by_seed,
        "sd": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0,
        "dien": bench.auc(*dien),
        "din": bench.auc(*din),
        "oracle": metrics.auc(chosen.truth, chosen.label),
    }
    if "din_positions" in runs.scored:
        positions = bench.difference([score[rows] for score in runs.tests("din_positions")], din)
        details["din_positions_minus_din"] = [positions.value, *positions.interval]
    return Found([replace(verdict, details=details)], runs.lines("order", rows))


def order_off(plan: Plan) -> Found:
    """The same visits without an effect: DIEN has nothing over DIN."""
    config = plan.config("order_off")
    drawn = samples.draw(config)
    runs, difference = _pair(config, drawn)
    rival = "DIN, effect of the order switched off"
    verdict = verdicts.is_nothing("dien_minus_din_rule_off", difference, 0.01, 1, rival)
    return Found([verdict], runs.lines("order_off", drawn.test.is_order_only))


def shuffled(plan: Plan) -> Found:
    """The order world in permuted histories: DIEN falls to DIN."""
    config = plan.config("order")
    drawn = samples.draw(config)
    mixed = Samples(
        *(samples.permuted(part, seed) for seed, part in enumerate((drawn.train, drawn.valid, drawn.test)))
    )
    runs, difference = _pair(config, mixed)
    rival = "DIN, both on histories permuted inside each time bucket"
    verdict = verdicts.is_no_gain("dien_minus_din_shuffled", difference, 0.01, 1, rival)
    return Found([verdict], runs.lines("shuffled", mixed.test.is_order_only))


def _pair(config: Config, drawn: Samples) -> tuple[Runs, verdicts.Difference]:
    """DIEN less DIN on the order-only rows."""
    runs = Runs(config, drawn)
    rows = drawn.test.is_order_only
    chosen = drawn.test.take(rows)
    dien, din = ([score[rows] for score in runs.network(name)] for name in ("dien", "din"))
    return runs, Bench(chosen.label, chosen.user).difference(dien, din)


def control(plan: Plan) -> Found:
    """No structure: no sequence model is above boosted trees on counts."""
    config = plan.config("control")
    runs = Runs(config, samples.draw(config))
    boosted = runs.counted()
    found = {name: runs.bench.difference(runs.network(name), boosted) for name in SEQUENCE_MODELS}
    verdict = verdicts.none_above("negative_control", found, "boosted trees on windows and recency")
    return Found([verdict], runs.lines("control"))


EXPERIMENTS: dict[str, Callable[[Plan], Found]] = {
    "order": order,
    "order_off": order_off,
    "shuffled": shuffled,
    "first_order": first_order,
    "control": control,
}
