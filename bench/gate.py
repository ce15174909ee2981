"""How often the promotion gate decides rightly, over simulated worlds in which the truth is known.

A user's rows share a part of what drives them, some of it unknown to every model. Each model knows a part of
the rest and states exactly calibrated probabilities, so that only ranking and chance decide.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from bench.run import Claim
from couponflow.sections import EvaluationConfig
from couponflow.training import decisions, evaluation, metrics
from couponflow.training.evaluation import LabelledRows, ScoredModel

CLAIMS = ("gate_worse_refused", "gate_equal_promoted", "gate_better_promoted", "gate_interval_coverage")
CASES, USERS, DRAWS = 100, 600, 200
TRUTH_USERS = 200_000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """Variances of what drives a conversion (probit), and who knows it.

    ``shared`` is known to both models, ``champion`` and ``challenger`` to one each, ``hidden`` to none and
    equal over a user's rows; of the others half the variance is equal over a user's rows.
    """

    champion: float
    challenger: float
    shared: float = 0.5
    hidden: float = 0.3
    base: float = -1.3


#: The champion knows twice as much of its own, as much, or a seventh of what the challenger knows, which is
#: better by about twice the smallest detectable difference.
WORSE, EQUAL, BETTER = World(0.4, 0.2), World(0.2, 0.2), World(0.1, 0.7)


def simulate(world: World, num_users: int, seed: int) -> tuple[LabelledRows, list[ScoredModel]]:
    """Rows of one test split over four days, and the champion and the challenger scored on them."""
    generator = np.random.default_rng(seed)
    user = np.repeat(np.arange(num_users), 1 + generator.poisson(1.0, num_users))

    def part(variance: float, share_of_user: float = 0.5) -> Floats:
        of_user = generator.normal(size=num_users)[user]
        own = generator.normal(size=user.size)
        mixed = np.sqrt(share_of_user) * of_user + np.sqrt(1.0 - share_of_user) * own
        return np.asarray(mixed * np.sqrt(variance), np.float64)

    shared, hidden = part(world.shared), part(world.hidden, 1.0)
    known = {"champion": part(world.champion), "challenger": part(world.challenger)}
    latent = world.base + shared + hidden + known["champion"] + known["challenger"]
    label = (generator.random(user.size) < ndtr(latent)).astype(np.float64)
    rows = LabelledRows(
        label, user, np.zeros(user.size, int), generator.integers(1, 5, user.size).astype(str)
    )
    unknown = {"champion": world.challenger, "challenger": world.champion}
    models = []
    for name in ("champion", "challenger"):
        spread = np.sqrt(1.0 + world.hidden + unknown[name])
        probability = ndtr((world.base + shared + known[name]) / spread)
        logit = np.log(probability) - np.log1p(-probability)
        models.append(ScoredModel(name, name, logit, probability))
    return rows, models


def true_difference(world: World) -> float:
    """AUC of the challenger minus that of the champion over very many users."""
    rows, (champion, challenger) = simulate(world, TRUTH_USERS, 987_654)
    return metrics.auc(challenger.logit, rows.label) - metrics.auc(champion.logit, rows.label)


@dataclass(frozen=True)
class Outcome:
    """What the gate made of one simulated test split."""

    is_promoted: bool
    difference: float
    interval: tuple[float, float]
    minimum_detectable: float


def outcomes(world: World, cases: int, num_users: int = USERS, num_draws: int = DRAWS) -> list[Outcome]:
    """The gate's verdict in ``cases`` independent worlds of one kind."""
    config = EvaluationConfig(num_draws=num_draws)
    found = []
    for seed in range(cases):
        rows, models = simulate(world, num_users, seed)
        judged = evaluation.evaluate(rows, models, "champion", config)
        gate = decisions.decide(rows, models, judged, config)
        (overall,) = judged.comparisons
        found.append(
            Outcome(
                gate["decision"] == decisions.PROMOTE,
                overall.difference,
                overall.interval,
                overall.minimum_detectable,
            )
        )
    return found


def promoted_share(found: list[Outcome]) -> float:
    """Share of cases in which the challenger was promoted."""
    return float(np.mean([outcome.is_promoted for outcome in found]))


def coverage(found: list[Outcome], truth: float) -> float:
    """Share of cases whose 95 % interval of the difference holds the true one."""
    return float(np.mean([low <= truth <= high for low, high in (outcome.interval for outcome in found)]))


def measure(names: tuple[str, ...]) -> list[Claim]:
    """Decisions over ``CASES`` worlds of each kind: 600 users, about 1,200 rows and 200 conversions."""
    by_name = {
        "gate_worse_refused": WORSE,
        "gate_equal_promoted": EQUAL,
        "gate_better_promoted": BETTER,
        "gate_interval_coverage": EQUAL,
    }
    found = {world: outcomes(world, CASES) for world in {by_name[name] for name in names}}
    truth = {world: true_difference(world) for world in found}
    claims = []
    for name in names:
        world = by_name[name]
        detectable = float(np.mean([outcome.minimum_detectable for outcome in found[world]]))
        rival = f"true difference {truth[world]:+.4f} AUC, smallest detectable {detectable:.4f}"
        share = promoted_share(found[world])
        match name:
            case "gate_worse_refused":
                claims.append(Claim(name, 1.0 - share, "of cases", 0.95, CASES, rival))
            case "gate_equal_promoted":
                claims.append(Claim(name, share, "of cases", 0.05, CASES, rival, "at_most"))
            case "gate_better_promoted":
                claims.append(Claim(name, share, "of cases", None, CASES, rival))
            case _:
                value = coverage(found[world], truth[world])
                claims.append(Claim(name, value, "of intervals", 0.9, CASES, rival))
    return claims
