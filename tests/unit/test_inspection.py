"""Attention over one send: the weights that scoring uses, and what each event shares with the target."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from couponflow.lake import layouts
from couponflow.modelling import ModelConfig
from couponflow.models.batch import RANDOM_SIZES, random_batch
from couponflow.models.dien import Dien
from couponflow.training import inspection
from couponflow.training.feed import Example

WIDE = np.zeros(3, "<f4").tobytes()


def make_row(name: str, events: list[tuple[int, int, int]], label: float = 1.0) -> Example:
    """A history of (item, category, shop), the n-th n days old, and a target of item 5 and category 7."""
    records = [(*ids, 2, (len(events) - n) * 1440) for n, ids in enumerate(events)]
    target = [(5, 0, 0), (0, 7, 0), (1, 1, 1)]
    history, target_bytes = (np.array(values, "<i4").tobytes() for values in (records, target))
    negatives = np.zeros((len(events), len(layouts.NEGATIVE_FIELDS)), "<i4").tobytes()
    return Example(WIDE, np.float64(label), history, negatives, target_bytes, name, f"user-of-{name}")


def make_network(**settings: Any) -> Dien:
    torch.manual_seed(0)
    return Dien(ModelConfig(**settings), RANDOM_SIZES, 3)


def test_events_have_their_age_weight_and_closest_relation() -> None:
    row = make_row("a", [(5, 7, 2), (4, 7, 2), (4, 4, 2), (1, 1, 1)])
    found = inspection.attention_sample(make_network(), [row])
    assert found is not None
    assert [event["relation"] for event in found["events"]] == ["item", "category", "other", "other"]
    assert [event["age_days"] for event in found["events"]] == pytest.approx([4, 3, 2, 1], rel=1e-5)
    assert sum(event["weight"] for event in found["events"]) == pytest.approx(1.0, abs=1e-6)
    assert "user" not in json.dumps(found), "a record is JSON, and names nobody"


def test_the_send_is_the_converted_one_of_middle_length() -> None:
    rows = [
        make_row("long", [(3, 3, 3)] * 9),
        make_row("b", [(3, 3, 3)] * 2),
        make_row("a", [(3, 3, 3)] * 2),
        make_row("none", []),
        make_row("lost", [(3, 3, 3)] * 5, label=0.0),
    ]
    network = make_network()
    found = inspection.attention_sample(network, rows)
    assert found is not None
    assert (len(found["events"]), found["sends"]) == (2, 4)
    assert found == inspection.attention_sample(network, rows[::-1])
    assert inspection.attention_sample(network, [rows[3], rows[4]]) is None
    assert inspection.attention_sample(network, []) is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cell": "agru"},
        {"encoder": "din"},
        {"encoder": "gru_att"},
        {"attention": "bilinear"},
        {"encoder": "din", "normalise": "sum"},
    ],
)
def test_weights_are_those_of_the_score(settings: dict[str, Any]) -> None:
    """A row alone has the weights that it has in a batch; padding has none; the network stays as it was."""
    network = make_network(**settings).train()
    batch = random_batch(torch.Generator().manual_seed(1), 6, num_wide=3, length=[0, 1, 4, 9, 9, 2])
    weight = network.attention(batch)
    assert weight is not None
    assert network.training
    assert weight.shape == batch.hist_item.shape
    assert not weight[~batch.mask].any()
    for row in range(1, 6):
        alone = network.attention(batch.take([row]))
        assert alone is not None
        torch.testing.assert_close(alone[0], weight[row, : alone.shape[1]], atol=1e-6, rtol=1e-5)
    if settings.get("normalise", "softmax") == "softmax":
        torch.testing.assert_close(weight.sum(1), (batch.length > 0).float())


@pytest.mark.parametrize("settings", [{"encoder": "static"}, {"encoder": "gru"}, {"cell": "gru"}])
def test_an_encoder_without_attention_has_no_weights(settings: dict[str, Any]) -> None:
    network = make_network(**settings)
    assert network.attention(random_batch(torch.Generator().manual_seed(1), 2, num_wide=3)) is None
    assert inspection.attention_sample(network, [make_row("a", [(3, 3, 3)])]) is None


def test_relations_follow_the_target_fields() -> None:
    assert inspection.RELATIONS[:-1] == layouts.TARGET_FIELDS
