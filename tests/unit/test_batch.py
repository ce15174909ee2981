import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from couponflow.errors import DataError
from couponflow.models.batch import Batch, decode, empty_batch, random_batch

Rows = list[list[list[int]]]


def pack(rows: Rows, width: int) -> list[bytes]:
    return [np.asarray(row, "<i4").reshape(-1, width).tobytes() for row in rows]


def wide_bytes(*rows: list[float]) -> list[bytes]:
    return [np.asarray(row, "<f4").tobytes() for row in rows]


EVENTS: Rows = [[[2, 3, 4, 5, 1440], [6, 7, 8, 5, 0]], [], [[9, 3, 4, 2, 10080]]]
MEMBERS: Rows = [[[0, 3, 0]], [[2, 0, 0], [0, 0, 4]], []]
NEGATIVES: Rows = [[[0, 0], [11, 12]], [], [[0, 0]]]
WIDE = wide_bytes([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])


def example(**over: Any) -> Batch:
    columns: dict[str, Any] = {
        "history": pack(EVENTS, 5),
        "target": pack(MEMBERS, 3),
        "wide": WIDE,
        "negatives": pack(NEGATIVES, 2),
        "label": [1, 0, 1],
    }
    return decode(**(columns | over))


def test_decode_lays_out_a_known_batch() -> None:
    batch = example()
    assert batch.size == 3
    assert batch.length.tolist() == [2, 0, 1]
    assert batch.hist_item.tolist() == [[2, 6], [0, 0], [9, 0]]
    assert batch.hist_category.tolist() == [[3, 7], [0, 0], [3, 0]]
    assert batch.hist_shop.tolist() == [[4, 8], [0, 0], [4, 0]]
    assert batch.hist_type.tolist() == [[5, 5], [0, 0], [2, 0]]
    assert batch.hist_gap[0].tolist() == pytest.approx([math.log(2), 0.0])
    assert batch.hist_gap[2].tolist() == pytest.approx([math.log(8), 0.0])
    assert batch.neg_item.tolist() == [[0, 11], [0, 0], [0, 0]]
    assert batch.neg_category.tolist() == [[0, 12], [0, 0], [0, 0]]
    assert batch.cand_item.tolist() == [[0, 0], [2, 0], [0, 0]]
    assert batch.cand_category.tolist() == [[3, 0], [0, 0], [0, 0]]
    assert batch.cand_shop.tolist() == [[0, 0], [0, 4], [0, 0]]
    assert batch.wide.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert batch.label.tolist() == [1, 0, 1]
    assert batch.weight.tolist() == [1, 1, 1]
    assert batch.mask.tolist() == [[True, True], [False, False], [True, False]]
    kinds = {name: getattr(batch, name).dtype for name in ("hist_item", "length", "cand_shop", "neg_item")}
    assert set(kinds.values()) == {torch.int64}
    assert {batch.hist_gap.dtype, batch.wide.dtype, batch.label.dtype} == {torch.float32}


def test_scoring_needs_neither_negatives_nor_labels() -> None:
    batch = example(negatives=None, label=None)
    assert not batch.neg_item.any()
    assert not batch.label.any()
    assert torch.equal(batch.hist_item, example().hist_item)


def test_decode_equals_a_slow_decoder() -> None:
    rng = random.Random(3)
    for _ in range(50):
        size = rng.randint(1, 6)
        events = [
            [[rng.randint(1, 99) for _ in range(5)] for _ in range(rng.randint(0, 5))] for _ in range(size)
        ]
        members = [
            [[rng.randint(0, 9) for _ in range(3)] for _ in range(rng.randint(0, 4))] for _ in range(size)
        ]
        batch = decode(pack(events, 5), pack(members, 3), wide_bytes(*([0.5],) * size))
        columns = (batch.hist_item, batch.hist_category, batch.hist_shop, batch.hist_type)
        longest = max(map(len, events))
        for field, tensor in enumerate(columns):
            slow = [[event[field] for event in row] + [0] * (longest - len(row)) for row in events]
            assert tensor.tolist() == slow
        widest = max(map(len, members))
        for field, tensor in enumerate((batch.cand_item, batch.cand_category, batch.cand_shop)):
            slow = [[member[field] for member in row] + [0] * (widest - len(row)) for row in members]
            assert tensor.tolist() == slow


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"history": pack([*EVENTS[:2], [[9, 0, 4, 2, 5]]], 5)}, "history of row 2 holds id 0"),
        (
            {"history": pack([*EVENTS[:2], [[9, 1, 4, 2, -1]]], 5)},
            "history of row 2 holds an event after as_of",
        ),
        ({"history": [b"123", b"", b""]}, "history of row 0: 3 bytes"),
        ({"history": pack(EVENTS, 5)[:2]}, "target has 3 rows, history 2"),
        ({"target": [b"", b"12345678", b""]}, "target of row 1: 8 bytes"),
        ({"target": pack([[], [], [[0, -2, 0]]], 3)}, "target of row 2 holds a negative id"),
        ({"negatives": pack([[[0, 0]], [], [[0, 0]]], 2)}, "negatives of row 0: 1 records for 2 events"),
        ({"wide": wide_bytes([1.0, 2.0], [3.0], [5.0, 6.0])}, "wide of row 1: 4 bytes"),
        ({"wide": wide_bytes([1.0, 2.0], [3.0, math.nan], [5.0, 6.0])}, "wide of row 1 is not finite"),
        ({"label": [1.0]}, "label has 1 rows"),
    ],
)
def test_decode_names_column_and_row_of_bad_data(over: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        example(**over)


def test_take_keeps_the_named_order_and_trims() -> None:
    taken = example().take([2, 1])
    assert taken.hist_item.tolist() == [[9], [0]]
    assert taken.wide.tolist() == [[5, 6], [3, 4]]
    assert taken.label.tolist() == [1, 0]
    assert example().take([]).hist_item.shape == (0, 0)


def test_empty_batches() -> None:
    assert empty_batch(7).wide.shape == (0, 7)
    assert empty_batch(7).mask.shape == (0, 0)
    assert decode([], [], []).size == 0
    nobody = decode([b"", b""], [b"", b""], wide_bytes([1.0], [2.0]))
    assert nobody.hist_item.shape == (2, 0)
    assert nobody.cand_item.shape == (2, 0)


def test_random_batches_are_legal_and_repeatable() -> None:
    batch, again = (random_batch(torch.Generator().manual_seed(5), 200) for _ in range(2))
    assert torch.equal(batch.hist_item, again.hist_item)
    assert (batch.hist_item[batch.mask] > 0).all()
    assert not batch.hist_item[~batch.mask].any()
    assert (batch.length == 0).any()
    assert batch.hist_item.shape[1] == int(batch.length.max())
    assert ((batch.cand_item + batch.cand_category + batch.cand_shop).sum(1) == 0).any()
