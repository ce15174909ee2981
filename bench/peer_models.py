"""DIEN of four public packages behind one face: a training step and the scores of a batch.

Imported only in the environment of `make bench-peers`. The classes are the packages' own, unmodified; what a
package does around a step (optimiser, clipping) is done as its own trainer does it. Each keeps its design:

- DeepCTR-Torch, RecBole: one GRU of width 36 over item and category, MLP attention, MLP auxiliary loss.
  RecBole has one list of widths for all its MLPs: 80, 40.
- torch-rechub: a GRU and an AUGRU of width 18 per field, bilinear attention, inner-product auxiliary loss.
- FuxiCTR: as DeepCTR-Torch, but its class has no auxiliary loss: less work in training.
  The others compute theirs while scoring too.

Adam throughout (ours is AdamW without decay). Embeddings start at a standard deviation of .05, for some
packages' own 1e-4 gives gradients near zero; RecBole keeps its own Xavier start.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.widths import (
    ATTENTION,
    CATEGORIES,
    HEAD,
    ITEMS,
    MODEL,
    STEPS,
    USERS,
    WIDTH,
    Rows,
    categories,
)
from couponflow.models.batch import Batch
from couponflow.models.dien import Dien
from couponflow.training import steps
from couponflow.training.workers import Workers

_SD = 0.05
_NUM_WIDE = WIDTH  # in the place of the peers' user embedding
_SIZES = {"item": ITEMS + 2, "category": CATEGORIES + 2, "user": USERS + 2}


class Implementation(NamedTuple):
    """``step(n)`` trains on batch n, ``score(n)`` returns its probabilities or logits, [B]."""

    step: Callable[[int], None]
    score: Callable[[int], Tensor]


def couponflow(batches: Sequence[Rows]) -> Implementation:
    """Ours, stepped by the trainer's own functions."""
    torch.manual_seed(0)
    network = Dien(MODEL, {**_SIZES, "shop": 2, "event_type": 2}, _NUM_WIDE)
    optimiser = torch.optim.AdamW(steps.parameter_groups(network, 0.0), lr=1e-3)  # as in fit
    generator = torch.Generator().manual_seed(0)
    held = [_ours(rows, generator) for rows in batches]

    def step(number: int) -> None:
        network.train()
        steps.backward(network, held[number], steps.Objective(MODEL.auxiliary_weight), Workers())
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()

    def score(number: int) -> Tensor:
        network.eval()
        logits: Tensor = network(held[number]).logits
        return logits

    return Implementation(step, score)


def _ours(rows: Rows, generator: torch.Generator) -> Batch:
    mask = rows.item > 0
    return Batch(
        hist_item=rows.item,
        hist_category=rows.category,
        hist_shop=mask.long(),
        hist_type=mask.long(),
        hist_gap=torch.rand(rows.item.shape, generator=generator) * mask,
        neg_item=rows.negative,
        neg_category=rows.negative_category,
        length=rows.length,
        cand_item=rows.target[:, None],
        cand_category=rows.target_category[:, None],
        cand_shop=torch.ones_like(rows.target)[:, None],
        wide=torch.randn((len(rows.target), _NUM_WIDE), generator=generator),
        label=rows.label,
        weight=torch.ones_like(rows.label),
    )


def deepctr(batches: Sequence[Rows]) -> Implementation:
    """DeepCTR-Torch: ids travel as float32 columns of one matrix."""
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models.dien import DIEN

    fields = ["item", "category"]
    columns: list[Any] = [SparseFeat(name, size, WIDTH) for name, size in _SIZES.items()]
    for prefix in ("hist_", "neg_hist_"):
        columns += [
            VarLenSparseFeat(
                SparseFeat(prefix + name, _SIZES[name], WIDTH, embedding_name=name),
                STEPS,
                length_name="length",
            )
            for name in fields
        ]
    model = DIEN(
        columns,
        fields,
        gru_type="AUGRU",
        use_negsampling=True,
        alpha=1.0,
        dnn_hidden_units=HEAD,
        att_hidden_units=ATTENTION,
        att_activation="sigmoid",
        l2_reg_embedding=0,
        init_std=_SD,
    )
    model.compile("adam", "binary_crossentropy")

    def collate(rows: Rows) -> Tensor:
        named = {
            "item": rows.target,
            "category": rows.target_category,
            "user": rows.user,
            "hist_item": rows.item,
            "hist_category": rows.category,
            "neg_hist_item": rows.negative,
            "neg_hist_category": rows.negative_category,
            "length": rows.length,
        }
        return torch.cat(
            [named[name].reshape(len(rows.label), -1) for name in model.feature_index], 1
        ).float()

    held = [(collate(rows), rows.label) for rows in batches]

    def step(number: int) -> None:
        model.train()
        x, y = held[number]
        predicted = model(x).squeeze(-1)
        model.optim.zero_grad()
        loss = model.loss_func(predicted, y, reduction="sum")
        (loss + model.get_regularization_loss() + model.aux_loss).backward()
        model.optim.step()

    def score(number: int) -> Tensor:
        scored: Tensor = model.eval()(held[number][0])[:, 0]
        return scored

    return Implementation(step, score)


def rechub(batches: Sequence[Rows]) -> Implementation:
    """The DIEN of torch-rechub."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.basic.initializers import RandomNormal
    from torch_rechub.models.ranking.dien import DIEN

    def target(name: str) -> Any:
        return SparseFeature(name, _SIZES[name], WIDTH, padding_idx=0, initializer=RandomNormal(0, _SD))

    def history(prefix: str) -> list[Any]:
        return [
            SequenceFeature(prefix + name, _SIZES[name], WIDTH, "concat", shared_with=name, padding_idx=0)
            for name in ("item", "category")
        ]

    torch.manual_seed(0)
    targets = [target("item"), target("category")]
    model = DIEN(
        [target("user")], history("hist_"), history("neg_"), targets, {"dims": list(HEAD)}, alpha=1.0
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    held = [
        (
            {
                "user": rows.user,
                "item": rows.target,
                "category": rows.target_category,
                "hist_item": rows.item,
                "hist_category": rows.category,
                "neg_item": rows.negative,
                "neg_category": rows.negative_category,
            },
            rows.label,
        )
        for rows in batches
    ]

    def step(number: int) -> None:
        model.train()
        x, y = held[number]
        predicted, auxiliary = model(x)
        loss = F.binary_cross_entropy(predicted, y) + auxiliary
        model.zero_grad()
        loss.backward()
        optimiser.step()

    def score(number: int) -> Tensor:
        scored: Tensor = model.eval()(held[number][0])[0]
        return scored

    return Implementation(step, score)


def fuxictr(batches: Sequence[Rows]) -> Implementation:
    """The DIEN of FuxiCTR's model zoo, with the attention MLP of the others."""
    from fuxictr.features import FeatureMap
    from model_zoo.LongCTR.DIEN import DIEN

    features = FeatureMap("bench", ".")
    features.labels = ["label"]
    for name, source in (("user", "user"), ("item", "item"), ("category", "item")):
        features.features[name] = {
            "type": "categorical",
            "source": source,
            "vocab_size": _SIZES[name],
            "embedding_dim": WIDTH,
            "padding_idx": 0,
        }
    torch.manual_seed(0)
    model = DIEN(
        features,
        dnn_hidden_units=list(HEAD),
        dnn_activations="Dice",
        embedding_dim=WIDTH,
        attention_type="din_attention",
        attention_hidden_units=list(ATTENTION),
        attention_activation="Sigmoid",
        optimizer="adam",
        loss="binary_crossentropy",
        verbose=0,
        model_root=".",
        metrics=[],
    )
    model._max_gradient_norm, model._batch_index = 10.0, 0  # set by its fit
    with torch.no_grad():
        for parameter in model.embedding_layer.parameters():
            parameter.normal_(0, _SD)

    def collate(rows: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        both = {"item": (rows.item, rows.target), "category": (rows.category, rows.target_category)}
        items = {name: torch.cat([ids, last[:, None]], 1).flatten() for name, (ids, last) in both.items()}
        return {"user": rows.user, "label": rows.label}, items, rows.item > 0

    held = [collate(rows) for rows in batches]

    def step(number: int) -> None:
        model.train()
        model.train_step(held[number])

    def score(number: int) -> Tensor:
        scored: Tensor = model.eval()(held[number])["y_pred"][:, 0]
        return scored

    return Implementation(step, score)


def recbole(batches: Sequence[Rows]) -> Implementation:
    """The DIEN of RecBole; its dataset is stood in for by the tables that the model reads."""
    from recbole.data.interaction import Interaction
    from recbole.model.sequential_recommender.dien import DIEN
    from recbole.utils import FeatureType

    config = {
        "device": torch.device("cpu"),
        "alpha": 1.0,
        "gru_type": "AUGRU",
        "pooling_mode": "mean",
        "dropout_prob": 0.0,
        "LABEL_FIELD": "label",
        "embedding_size": WIDTH,
        "mlp_hidden_size": list(ATTENTION),
        "NEG_PREFIX": "neg_",
        "numerical_features": [],
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "MAX_ITEM_LIST_LENGTH": STEPS,
    }
    sizes = {"user_id": _SIZES["user"], "item_id": _SIZES["item"], "category": _SIZES["category"]}
    users = Interaction({"user_id": torch.arange(sizes["user_id"])})
    items = Interaction({"item_id": torch.arange(sizes["item_id"]), "category": categories()})
    dataset = SimpleNamespace(
        config=config,
        field2type=dict.fromkeys(sizes, FeatureType.TOKEN),
        num=sizes.__getitem__,
        get_user_feature=lambda: users,
        get_item_feature=lambda: items,
    )
    torch.manual_seed(0)
    model = DIEN(config, dataset)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    held = [
        Interaction(
            {
                "label": rows.label,
                "user_id": rows.user,
                "item_id": rows.target,
                "item_id_list": rows.item,
                "neg_item_id_list": rows.negative,
                "item_length": rows.length,
            }
        )
        for rows in batches
    ]

    def step(number: int) -> None:
        model.train()
        optimiser.zero_grad()
        model.calculate_loss(held[number]).backward()
        optimiser.step()

    def score(number: int) -> Tensor:
        scored: Tensor = model.eval().predict(held[number])
        return scored

    return Implementation(step, score)


OURS = "couponflow"
MAKERS: dict[str, Callable[[Sequence[Rows]], Implementation]] = {
    OURS: couponflow,
    "deepctr-torch": deepctr,
    "torch-rechub": rechub,
    "fuxictr": fuxictr,
    "recbole": recbole,
}
