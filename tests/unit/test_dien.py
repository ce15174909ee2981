import math
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from couponflow.errors import ConfigError
from couponflow.modelling import ModelConfig
from couponflow.models.batch import RANDOM_SIZES, Batch, empty_batch, random_batch
from couponflow.models.dien import Dien, Output
from couponflow.models.encoders import recurrent
from couponflow.models.layers import Cell

CELLS: tuple[Cell, ...] = get_args(Cell)
ENCODERS = ("mean_pool", "static", "din", "gru", "gru_att")
NUM_WIDE = 5
#: Every encoder and cell, and every option of theirs at least once.
VARIANTS: dict[str, dict[str, Any]] = {
    "mean_pool": {"encoder": "mean_pool"},
    "static": {"encoder": "static"},
    "din": {"encoder": "din"},
    "din_sum": {"encoder": "din", "normalise": "sum"},
    "din_sigmoid": {"encoder": "din", "normalise": "sigmoid"},
    "din_prelu": {"encoder": "din", "attention_activation": "prelu"},
    "din_dice": {"encoder": "din", "attention_activation": "dice"},
    "din_bilinear": {"encoder": "din", "attention": "bilinear"},
    "din_positions": {"encoder": "din", "position_dim": 2},
    "din_match": {"encoder": "din", "match_features": True},
    "gru": {"encoder": "gru"},
    "gru_att": {"encoder": "gru_att"},
    "gru_att_match": {"encoder": "gru_att", "normalise": "sigmoid", "match_features": True},
    **{cell: {"cell": cell} for cell in CELLS},
    "dien_sigmoid": {"normalise": "sigmoid"},
    "dien_bilinear": {"attention": "bilinear"},
    "dien_dice": {"attention_activation": "dice"},
    "dien_match": {"normalise": "sigmoid", "attention": "bilinear", "match_features": True},
}
ORDER_FREE = {name for name in VARIANTS if name.startswith(("mean_pool", "static", "din"))} - {
    "din_positions"
}
SMALL: dict[str, Any] = {
    "item_dim": 3,
    "category_dim": 4,
    "shop_dim": 2,
    "type_dim": 2,
    "gap_dim": 2,
    "hidden_dim": 5,
    "attention_dims": (6, 4),
    "auxiliary_dims": (6, 4),
    "head_dims": (8, 4),
    "dropout": 0.0,
}


def network(**over: Any) -> Dien:
    torch.manual_seed(0)
    return Dien(ModelConfig(**(SMALL | over)), RANDOM_SIZES, NUM_WIDE)


def trained(**over: Any) -> Dien:
    """Weights and statistics away from their start, as after training; scoring must not depend on mates."""
    made = network(**over)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.add_(0.5 * torch.randn(value.shape, generator=generator))
            if name.endswith(("item.weight", "category.weight", "shop.weight", "event_type.weight")):
                value[0] = 0.3  # what a custom initialisation may leave in the padding row
    made.train()
    made(rows(64, seed=2))
    return made.eval()


def rows(size: int, seed: int = 0, **over: Any) -> Batch:
    return random_batch(torch.Generator().manual_seed(seed), size, num_wide=NUM_WIDE, **over)


def loss_of(output: Output, batch: Batch, alpha: float = 1.0) -> Tensor:
    label_sum = binary_cross_entropy_with_logits(output.logits, batch.label, reduction="sum")
    return label_sum / max(batch.size, 1) + alpha * output.aux_sum / max(batch.num_pairs, 1)


def padded_by(batch: Batch, extra: int, fill: int) -> Batch:
    """More padding steps that hold garbage, and two more absent members."""
    widened = {
        field.name: torch.nn.functional.pad(getattr(batch, field.name), (0, extra), value=fill)
        for field in fields(Batch)
        if field.name.startswith(("hist_", "neg_"))
    }
    members = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, 2))
        for name in ("cand_item", "cand_category", "cand_shop")
    }
    return replace(batch, **widened, **members)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_alone_equals_the_row_in_a_batch(variant: str) -> None:
    made, batch = trained(**VARIANTS[variant]), rows(9, length=[0, 5, 2, 12, 1, 0, 3, 12, 7])
    together = made(batch).logits
    alone = torch.cat([made(batch.take([row])).logits for row in range(batch.size)])
    torch.testing.assert_close(alone, together, atol=2e-6, rtol=1e-5)
    assert together.std() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_events_alone_and_beside_a_longer_user(variant: str) -> None:
    made = trained(**VARIANTS[variant]).double()
    both = rows(2, length=[2, 5])
    torch.testing.assert_close(made(both.take([0])).logits, made(both).logits[:1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_padding_changes_nothing(variant: str) -> None:
    made, batch = trained(**VARIANTS[variant]), rows(8)
    wider = padded_by(batch, extra=4, fill=1)
    torch.testing.assert_close(made(wider).logits, made(batch).logits)
    made.train()
    before, after = made(batch), made(wider)
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.aux_sum, before.aux_sum)
    assert wider.num_pairs == batch.num_pairs > 0
    assert (before.aux_sum > 0) == recurrent(made.config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_history_is_read_once_for_many_targets(variant: str) -> None:
    made, batch = trained(**VARIANTS[variant]), rows(6, length=[0, 5, 2, 12, 1, 7])
    asked = rows(5, seed=3).targets
    of = torch.tensor([3, 0, 3, 5, 2])
    expected = made(replace(batch.take(of), **vars(asked))).logits
    found = made.judge(made.read(batch).select(of), asked)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    nobody = made.read(batch).select(of[:0])
    assert made.judge(nobody, asked.take([])).shape == (0,)


def test_order_of_rows_and_members_is_irrelevant() -> None:
    made, batch = trained(), rows(8)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(made(batch.take(order)).logits, made(batch).logits[order])
    turned = {name: getattr(batch, name).flip(1) for name in ("cand_item", "cand_category", "cand_shop")}
    torch.testing.assert_close(made(replace(batch, **turned)).logits, made(batch).logits)


def turned(batch: Batch, first: int) -> Batch:
    """The ``first`` oldest events of every row in reverse, each with its age."""
    histories = {
        field.name: getattr(batch, field.name) for field in fields(Batch) if field.name.startswith("hist_")
    }
    return replace(
        batch,
        **{name: torch.cat([h[:, :first].flip(1), h[:, first:]], dim=1) for name, h in histories.items()},
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_events_matters_to_recurrence_and_positions(variant: str) -> None:
    made, batch = trained(**VARIANTS[variant]).double(), rows(4, length=[6, 6, 6, 6])
    moved = (made(turned(batch, 6)).logits - made(batch).logits).abs().max()
    assert (moved < 1e-9) == (variant in ORDER_FREE), moved
    assert variant in ORDER_FREE or moved > 1e-4


def test_places_are_counted_from_the_newest_event_and_old_ones_share_one() -> None:
    made = trained(encoder="din", position_dim=2).double()
    batch = rows(2, length=[130, 130])
    places = made.position.num_embeddings
    torch.testing.assert_close(made(turned(batch, 131 - places)).logits, made(batch).logits)
    assert (made(turned(batch, 132 - places)).logits - made(batch).logits).abs().max() > 1e-6


def test_candidate_is_the_mean_of_members_and_absent_fields_are_zero() -> None:
    made = trained()
    batch = replace(
        rows(2),
        cand_item=torch.tensor([[4, 0, 0], [0, 0, 0]]),
        cand_category=torch.tensor([[0, 6, 0], [0, 0, 0]]),
        cand_shop=torch.tensor([[2, 3, 0], [0, 0, 0]]),
    )
    item, category = made.item.weight[4], made.category.weight[6]
    expected = torch.cat([item, category, made.shop.weight[2] + made.shop.weight[3]]) / 2
    found = made._candidate(batch)
    torch.testing.assert_close(found[0], expected)
    assert not found[1].any()


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("lengths", [[0], [1], [0, 0, 0], [4]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_histories_and_single_rows(variant: str, lengths: list[int], is_training: bool) -> None:
    made = network(**VARIANTS[variant]).train(is_training)
    batch = rows(len(lengths), length=lengths, max_members=0)
    output = made(batch)
    assert output.logits.shape == (len(lengths),)
    loss_of(output, batch).backward()
    for name, value in made.named_parameters():
        assert value.grad is None or torch.isfinite(value.grad).all(), name
    if max(lengths) < 2:
        assert output.aux_sum.item() == 0.0


@pytest.mark.parametrize("scorer", ["mlp", "dot"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_zero_rows_gives_zero_gradients_to_all(variant: str, scorer: str) -> None:
    made = network(**VARIANTS[variant], auxiliary_scorer=scorer).train()
    output = made(empty_batch(NUM_WIDE))
    assert output.logits.shape == (0,)
    assert output.aux_sum.item() == 0.0
    (output.logits.sum() + output.aux_sum).backward()
    for name, value in made.named_parameters():
        assert value.grad is not None, name
        assert not value.grad.any(), name


@pytest.mark.parametrize("scorer", ["mlp", "dot"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str, scorer: str) -> None:
    made, batch = network(**VARIANTS[variant], auxiliary_scorer=scorer).train(), rows(32)
    loss_of(made(batch), batch).backward()
    without = [name for name, value in made.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert not made.item.weight.grad[0].any()  # type: ignore[index]  # just checked to be there


def test_auxiliary_loss_counts_drawn_pairs_while_training() -> None:
    made, batch = network(auxiliary_scorer="dot").train(), rows(16)
    drawn = torch.rand(batch.neg_item.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    batch = replace(batch, neg_item=batch.neg_item * drawn, neg_category=batch.neg_category * drawn)
    pairs = sum(
        bool(batch.neg_item[row, step] or batch.neg_category[row, step])
        for row in range(batch.size)
        for step in range(1, int(batch.length[row]))
    )
    assert 0 < batch.num_pairs == pairs < int((batch.length - 1).clamp_min(0).sum())
    assert made.auxiliary is not None
    with torch.no_grad():
        for value in made.auxiliary.parameters():
            value.zero_()  # a scorer that knows nothing pays ln 2 for each pair
    assert made(batch).aux_sum.item() == pytest.approx(math.log(2) * pairs, rel=1e-6)
    nothing = replace(
        batch, neg_item=torch.zeros_like(batch.neg_item), neg_category=torch.zeros_like(batch.neg_category)
    )
    assert nothing.num_pairs == made(nothing).aux_sum.item() == 0.0
    assert made.eval()(batch).aux_sum.item() == 0.0


def test_auxiliary_weight_zero_switches_the_loss_off() -> None:
    made, batch = network(auxiliary_weight=0.0).train(), rows(16)
    output = made(batch)
    assert output.aux_sum.item() == 0.0
    assert not [name for name, _ in made.named_parameters() if name.startswith("auxiliary")]
    loss_of(output, batch).backward()
    assert all(value.grad is not None for value in made.parameters())


def test_switches_change_the_numbers() -> None:
    batch = rows(16)
    logits = {name: trained(**over)(batch).logits for name, over in VARIANTS.items()}
    logits["no norm"] = trained(final_norm=False)(batch).logits
    logits["no skip"] = trained(wide_skip=False)(batch).logits
    names = sorted(logits)
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            assert (logits[first] - logits[second]).abs().max() > 1e-4, (first, second)


def test_training_starts_near_the_base_rate() -> None:
    made = network()
    made.set_base_rate(0.1)
    logits = made.eval()(rows(64)).logits
    assert logits.mean().item() == pytest.approx(math.log(0.1 / 0.9), abs=0.2)
    for embedding in (made.item, made.category, made.shop, made.event_type):
        assert not embedding.weight[0].any()
        assert embedding.weight[1:].std().item() == pytest.approx(0.05, rel=0.5)
    made.set_base_rate(0.0)
    assert math.isfinite(made.last.bias.item())


def test_aggregates_are_standardised_and_a_constant_one_is_harmless() -> None:
    made, batch = trained(), rows(8)
    plain = made(batch).logits
    mean, sd = torch.arange(5.0), torch.tensor([2.0, 0.5, 3.0, 1.0, 0.0])
    made.set_wide_statistics(mean, sd)
    scaled = replace(batch, wide=batch.wide * torch.tensor([2.0, 0.5, 3.0, 1.0, 1.0]) + mean)
    torch.testing.assert_close(made(scaled).logits, plain, atol=1e-5, rtol=1e-5)
    assert "wide_mean" in made.state_dict()


def test_training_can_start_at_a_logistic_model() -> None:
    made, batch = network().eval(), rows(16)
    mean, sd, coef = torch.arange(5.0), torch.tensor([2.0, 0.5, 3.0, 1.0, 1.0]), torch.linspace(-1, 1, 5)
    made.set_wide_statistics(mean, sd)
    made.set_wide_linear(coef, -1.5)
    expected = (batch.wide - mean) / sd @ coef - 1.5
    assert torch.corrcoef(torch.stack([made(batch).logits, expected]))[0, 1] > 0.95
    torch.nn.init.zeros_(made.last.weight)
    torch.testing.assert_close(made(batch).logits, expected)
    with pytest.raises(ConfigError, match="no linear term"):
        network(wide_skip=False).set_wide_linear(coef, 0.0)


def test_one_logit_per_row_costs_what_two_would() -> None:
    # Two-column logits [[2, 0], [0, 0]] with labels 0, 1 are one logit -2, 0: mean over rows, not columns.
    logits, labels = torch.tensor([0.0 - 2.0, 0.0]), torch.tensor([0.0, 1.0])
    assert binary_cross_entropy_with_logits(logits, labels).item() == pytest.approx(0.410038, abs=1e-6)
    assert network().eval()(rows(1)).logits.shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_gives_no_nan(variant: str, dtype: torch.dtype) -> None:
    made = trained(**VARIANTS[variant]).to(dtype)
    logits = made(rows(6, length=[0, 3, 0, 12, 1, 2])).logits
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision_trains_in_finite_steps(variant: str, dtype: torch.dtype) -> None:
    made, batch = network(**VARIANTS[variant]).train(), rows(16, length=[0, 1, 12, *range(13)])
    with torch.autocast("cpu", dtype):
        loss = loss_of(made(batch), batch)
    loss.backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in made.parameters())


@pytest.mark.parametrize(
    "over",
    [{"auxiliary_scorer": "mlp"}, {"auxiliary_scorer": "dot"}, *({"encoder": name} for name in ENCODERS)],
    ids=str,
)
def test_overfits_64_rows(over: dict[str, Any]) -> None:
    made, batch = network(**over).train(), rows(64)
    optimiser = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(80):
        optimiser.zero_grad()
        loss = loss_of(made(batch), batch)
        loss.backward()
        optimiser.step()
    assert binary_cross_entropy_with_logits(made(batch).logits, batch.label).item() < 0.05
    assert binary_cross_entropy_with_logits(made.eval()(batch).logits, batch.label).item() < 0.1
