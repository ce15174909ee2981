"""Occlusion and attention of one row: equal to scoring the shortened row, for every kind of model."""

import numpy as np
import pytest
import torch
from test_bundle import BATCH, BUNDLES

from couponflow.campaign.scores import influence
from couponflow.models.batch import Batch

ROW = BATCH.take([int(torch.argmax(BATCH.length))])
LENGTH = int(ROW.length[0])


@pytest.mark.parametrize("kind", BUNDLES)
def test_an_events_effect_is_the_probability_lost_without_it(kind: str) -> None:
    bundle = BUNDLES[kind]()
    found = influence.of_events(bundle, ROW)
    assert len(found) == LENGTH > 2
    whole = influence.probability(bundle, ROW)[0]
    for step, event in enumerate(found):
        columns = dict(vars(ROW))
        for name in [name for name in columns if name.startswith(("hist_", "neg_"))]:
            columns[name] = torch.cat([columns[name][:, :step], columns[name][:, step + 1 :]], dim=1)
        shorter = Batch(**(columns | {"length": torch.tensor([LENGTH - 1])}))
        assert event["effect"] == pytest.approx(whole - influence.probability(bundle, shorter)[0], abs=1e-9)
        assert event["item"] == int(ROW.hist_item[0, step])
    reads_events = kind in ("dien", "blend")
    assert any(event["effect"] for event in found) == reads_events
    weights = [event["attention"] for event in found]
    if reads_events:
        assert sum(weights) == pytest.approx(1.0, abs=1e-5)
    else:
        assert weights == [None] * LENGTH


@pytest.mark.parametrize("kind", BUNDLES)
def test_an_aggregates_effect_is_against_its_training_mean(kind: str) -> None:
    bundle = BUNDLES[kind]()
    found = influence.of_aggregates(bundle, ROW)
    if kind in ("rate", "rule", "boosted"):  # keep no means
        assert found == {}
        return
    assert tuple(found) == bundle.wide_features
    name = max(found, key=lambda one: abs(found[one]))
    place = bundle.wide_features.index(name)
    model = bundle.model.members["dien"].model if kind == "blend" else bundle.model
    mean = model.mean[place] if kind == "logistic" else float(model.wide_mean[place])
    wide = ROW.wide.clone()
    wide[0, place] = mean
    changed = influence.probability(bundle, Batch(**(vars(ROW) | {"wide": wide})))[0]
    assert found[name] == pytest.approx(influence.probability(bundle, ROW)[0] - changed, abs=1e-6)  # float32
    assert np.abs(found[name]) > 0


def test_an_empty_history_rests_on_aggregates_alone() -> None:
    empty = BATCH.take([int(torch.argmin(BATCH.length))])
    assert int(empty.length[0]) == 0
    assert influence.of_events(BUNDLES["dien"](), empty) == []
