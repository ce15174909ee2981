"""Models of the aggregates in their stored form: each against its obvious slow version."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from couponflow.errors import ConfigError
from couponflow.lake import layouts
from couponflow.models.batch import Batch, random_batch
from couponflow.models.tabular import CAMPAIGN_TYPES, FORMS, Rate, Rule, Trees, campaign_types

NUM_WIDE = len(layouts.WIDE_FEATURES)
PLACE = {name: place for place, name in enumerate(layouts.WIDE_FEATURES)}


def batch_of(wide: np.ndarray) -> Batch:
    batch = random_batch(torch.Generator().manual_seed(0), len(wide), num_wide=wide.shape[1])
    batch.wide[:] = torch.from_numpy(wide)
    return batch


def flagged(*types: str) -> np.ndarray:
    wide = np.random.default_rng(0).normal(size=(len(types), NUM_WIDE)).astype(np.float32)
    for row, name in enumerate(types):
        for known in CAMPAIGN_TYPES[:-1]:
            wide[row, PLACE[f"is_{known}"]] = float(name == known)
    return wide


def stump(**over: Any) -> dict[str, Any]:
    """Two trees: one split on feature 1 at 0.5, and a leaf."""
    tree = {
        "baseline": 0.25,
        "num_features": 3,
        "roots": [0, 3],
        "feature": [1, 0, 0, 0],
        "threshold": [0.5, 0.0, 0.0, 0.0],
        "left": [1, -1, -1, -1],
        "right": [2, -1, -1, -1],
        "missing_left": [1, 0, 0, 0],
        "value": [0.0, -1.0, 2.0, 0.125],
    }
    return tree | over


def test_a_campaign_is_of_the_type_its_flag_says_or_of_another() -> None:
    types = ["type_b", "other", "type_a", "type_c", "type_b"]
    assert campaign_types(flagged(*types)).tolist() == types
    assert campaign_types(np.zeros((0, NUM_WIDE))).tolist() == []
    assert CAMPAIGN_TYPES == ("type_a", "type_b", "type_c", "other")


def test_a_rate_depends_on_the_type_alone() -> None:
    model = Rate(-2.0, {"type_a": -1.0, "type_b": -3.0})
    logits = model.logits(batch_of(flagged("type_b", "type_a", "type_c", "other")))
    assert logits.tolist() == [-3.0, -1.0, -2.0, -2.0]


def test_a_rule_is_its_formula() -> None:
    wide = flagged("other", "type_a")
    model = Rule({"num_redemptions": 2.0, "recency_days": -0.5}, 1.5, -0.75)
    for row, found in zip(wide.astype(float), model.logits(batch_of(wide)), strict=True):
        score = 2.0 * row[PLACE["num_redemptions"]] - 0.5 * row[PLACE["recency_days"]]
        assert found == pytest.approx(1.5 * score - 0.75, abs=1e-12)


def test_a_walk_through_trees() -> None:
    model = Trees(**stump())
    wide = np.array([[9.0, 0.5, 9.0], [0.0, 0.5000001, 0.0], [0.0, np.nan, 0.0]])
    assert model.raw(wide).tolist() == [0.25 - 1.0 + 0.125, 0.25 + 2.0 + 0.125, 0.25 - 1.0 + 0.125]
    missing_right = Trees(**stump(missing_left=[0, 0, 0, 0]))
    assert missing_right.raw(wide)[2] == 2.375
    assert model.raw(np.zeros((0, 3))).tolist() == []
    nothing = Trees(**stump(roots=[], **{name: [] for name in list(stump())[3:]}))
    assert nothing.raw(wide).tolist() == [0.25] * 3


MODELS = (
    Rate(-2 / 3, {"type_a": 0.1 + 0.2}),
    Rule({"recency_days": -1 / 3, "num_redemptions": 0.1, "num_lines_all": 1e-17}, 1 / 7, -0.3),
    Trees(**stump(num_features=NUM_WIDE, value=[0.0, -1 / 3, 2 / 7, 0.1])),
)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.kind)
def test_the_stored_form_is_exact(model: Any) -> None:
    batch = batch_of(flagged("type_a", "type_b", "other"))
    text = json.dumps(model.to_dict(), sort_keys=True, allow_nan=False)
    again = FORMS[model.kind](**json.loads(text))
    assert again.logits(batch).tobytes() == model.logits(batch).tobytes()
    assert json.dumps(again.to_dict(), sort_keys=True) == text


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"left": [0, -1, -1, -1]}, "points outside"),  # a circle
        ({"right": [4, -1, -1, -1]}, "points outside"),
        ({"roots": [0, 4]}, "points outside"),
        ({"roots": [-1]}, "points outside"),
        ({"feature": [3, 0, 0, 0]}, "points outside"),
        ({"value": [0.0, 1.0]}, "unequal length"),
        ({"value": [0.0, math.nan, 0.0, 0.0]}, "not finite"),
        ({"threshold": [math.inf, 0.0, 0.0, 0.0]}, "not finite"),
    ],
)
def test_damaged_trees_are_refused(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Trees(**stump(**over))


def test_other_bad_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="rate: a number is not finite"):
        Rate(math.inf, {})
    with pytest.raises(ConfigError, match="unknown aggregates shoe_size"):
        Rule({"shoe_size": 1.0}, 1.0, 0.0)
    with pytest.raises(ConfigError, match="3 aggregates expected, found 2"):
        Trees(**stump()).raw(np.zeros((1, 2)))
