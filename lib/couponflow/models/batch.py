"""The batch of training and of scoring, and the one decoder that makes it from packed bytes.

Legend: ``B`` rows, ``T`` padded steps (the longest history of the batch, possibly 0), ``K`` padded target
members, ``F`` wide features. Histories are oldest first and padded at the end; id 0 is padding, 1 is
out of vocabulary. Packed layouts are declared in ``lake.schemas``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from couponflow.errors import DataError
from couponflow.lake import layouts

Array = np.ndarray[Any, np.dtype[Any]]
#: A packed value; a view saves copying it out of its column.
Packed = bytes | memoryview
MINUTES_PER_DAY = 1440.0
#: Vocabulary sizes of ``random_batch``; tests build their network with the same ones.
RANDOM_SIZES: dict[str, int] = {"item": 50, "category": 20, "shop": 8, "event_type": 9}

_HISTORY, _NEGATIVE, _TARGET = (
    len(names) for names in (layouts.HISTORY_FIELDS, layouts.NEGATIVE_FIELDS, layouts.TARGET_FIELDS)
)
_IDS = _HISTORY - 1  # every history field but the age is an id


@dataclass(frozen=True, eq=False)
class Targets:
    """What rows ask of histories: ``cand_*`` int64 [B,K] and ``wide`` float32 [B,F], as in ``Batch``."""

    cand_item: Tensor
    cand_category: Tensor
    cand_shop: Tensor
    wide: Tensor

    def take(self, index: Tensor | Array | Sequence[int]) -> "Targets":
        """The named rows in the named order; members keep their padding."""
        rows = torch.as_tensor(index, dtype=torch.int64, device=self.wide.device)
        return Targets(
            **{field.name: getattr(self, field.name).index_select(0, rows) for field in fields(Targets)}
        )

    def to(self, device: torch.device | str) -> "Targets":
        """The same rows on another device."""
        return Targets(**{field.name: getattr(self, field.name).to(device) for field in fields(Targets)})


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step, as tensors.

    ``hist_*`` int64 [B,T] ids, 0 beyond ``length``; ``hist_gap`` float32 [B,T] log1p(age in days);
    ``neg_*`` int64 [B,T] auxiliary negative of the event at the same position, 0 where none is drawn;
    ``length`` int64 [B], 0 is legal; ``cand_*`` int64 [B,K] members of the target, 0 = absent or padding;
    ``wide`` float32 [B,F], not standardised; ``label``, ``weight`` float32 [B].
    """

    hist_item: Tensor
    hist_category: Tensor
    hist_shop: Tensor
    hist_type: Tensor
    hist_gap: Tensor
    neg_item: Tensor
    neg_category: Tensor
    length: Tensor
    cand_item: Tensor
    cand_category: Tensor
    cand_shop: Tensor
    wide: Tensor
    label: Tensor
    weight: Tensor

    @property
    def size(self) -> int:
        """Number of rows B."""
        return int(self.length.shape[0])

    @property
    def mask(self) -> Tensor:
        """True on real steps, bool [B,T]."""
        steps = torch.arange(self.hist_item.shape[1], device=self.length.device)
        return steps < self.length[:, None]

    @property
    def num_pairs(self) -> int:
        """Pairs of the auxiliary loss: events after the first of their history that have a negative."""
        is_drawn = (self.neg_item > 0) | (self.neg_category > 0)
        return int((is_drawn & self.mask)[:, 1:].sum())

    @property
    def targets(self) -> Targets:
        """What each row asks of its own history."""
        return Targets(**{field.name: getattr(self, field.name) for field in fields(Targets)})

    def to(self, device: torch.device | str) -> "Batch":
        """The same rows on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def take(self, index: Tensor | Array | Sequence[int]) -> "Batch":
        """The named rows in the named order, trimmed to their longest history.

        ``index`` holds row positions; members keep their padding.
        """
        rows = torch.as_tensor(index, dtype=torch.int64, device=self.length.device)
        longest = int(self.length[rows].max()) if rows.numel() else 0
        return Batch(
            **{
                field.name: (
                    getattr(self, field.name)[:, :longest]
                    if field.name.startswith(("hist_", "neg_"))
                    else getattr(self, field.name)
                ).index_select(0, rows)
                for field in fields(Batch)
            }
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(Batch)})


def decode(
    history: Sequence[Packed],
    target: Sequence[Packed] | None = None,
    wide: Sequence[Packed] | None = None,
    negatives: Sequence[Packed] | None = None,
    label: Sequence[float] | None = None,
    weight: Sequence[float] | None = None,
) -> Batch:
    """Unpack example columns into a batch; training and scoring call this and nothing else.

    Order: rows and events keep their order; padding goes to the end of each row.
    Missing: without ``target`` and ``wide`` the rows are histories alone; without ``negatives`` none counts
        as drawn; ``label`` defaults to 0, ``weight`` to 1.

    Raises:
        DataError: columns disagree in rows, a value is no whole number of records, negatives are not
            aligned with their history, id 0 or an age below 0 lies inside a history, an id is negative,
            or an aggregate is not finite. The message names the column and the position of the row.
    """
    size = len(history)
    columns = {"target": target, "wide": wide, "negatives": negatives, "label": label, "weight": weight}
    for name, values in columns.items():
        if values is not None and len(values) != size:
            raise DataError(f"{name} has {len(values)} rows, history {size}; rebuild the examples")

    events, length = _records("history", history, _HISTORY)
    _refuse("history", "holds id 0", length, (events[:, :_IDS] < layouts.OOV).any(1))
    _refuse("history", "holds an event after as_of", length, events[:, _IDS] < 0)
    asked = decode_targets([b""] * size if target is None else target, [b""] * size if wide is None else wide)
    drawn = None
    if negatives is not None:
        drawn, num_drawn = _records("negatives", negatives, _NEGATIVE)
        if wrong := np.flatnonzero(num_drawn != length).tolist():
            raise DataError(
                f"negatives of row {wrong[0]}: {num_drawn[wrong[0]]} records for {length[wrong[0]]} events; "
                "rebuild the examples"
            )
        _refuse("negatives", "holds a negative id", length, (drawn < 0).any(1))

    item, category, shop, event_type, age = (_pad(events[:, n], length) for n in range(_HISTORY))
    if drawn is None:
        neg_item = neg_category = np.zeros_like(item)
    else:
        neg_item, neg_category = (_pad(drawn[:, n], length) for n in range(_NEGATIVE))
    return Batch(
        hist_item=torch.from_numpy(item),
        hist_category=torch.from_numpy(category),
        hist_shop=torch.from_numpy(shop),
        hist_type=torch.from_numpy(event_type),
        hist_gap=torch.from_numpy(np.log1p(age / MINUTES_PER_DAY).astype(np.float32)),
        neg_item=torch.from_numpy(neg_item),
        neg_category=torch.from_numpy(neg_category),
        length=torch.from_numpy(length),
        cand_item=asked.cand_item,
        cand_category=asked.cand_category,
        cand_shop=asked.cand_shop,
        wide=asked.wide,
        label=torch.from_numpy(np.zeros(size, np.float32) if label is None else _floats(label)),
        weight=torch.from_numpy(np.ones(size, np.float32) if weight is None else _floats(weight)),
    )


def decode_targets(target: Sequence[Packed], wide: Sequence[Packed]) -> Targets:
    """Unpack the columns that do not depend on the history; rows keep their order.

    Raises:
        DataError: columns disagree in rows, a target is no whole number of records or holds a negative id, or
            an aggregate is not finite.
    """
    if len(target) != len(wide):
        raise DataError(f"target has {len(target)} rows, wide {len(wide)}; rebuild the examples")
    members, num_members = _records("target", target, _TARGET)
    return targets_of(members, num_members, _wide_matrix(wide))


def targets_of(members: Array, num_members: Array, wide: Array) -> Targets:
    """Targets that are unpacked already: records [M,3] of all, how many each row has [B], aggregates [B,F].

    Raises:
        DataError: a target holds a negative id, or an aggregate is not finite.
    """
    _refuse("target", "holds a negative id", num_members, (members < 0).any(1))
    _refuse_infinite(wide)
    item, category, shop = (torch.from_numpy(_pad(members[:, n], num_members)) for n in range(_TARGET))
    return Targets(item, category, shop, torch.from_numpy(wide))


def feature_ids(batch: Batch, targets: Targets | None = None) -> dict[str, tuple[Tensor, ...]]:
    """The ids by field of the vocabulary, history and target (the rows' own by default), padding included."""
    asked = batch.targets if targets is None else targets
    return {
        "item": (batch.hist_item, asked.cand_item),
        "category": (batch.hist_category, asked.cand_category),
        "shop": (batch.hist_shop, asked.cand_shop),
        "event_type": (batch.hist_type,),
    }


def beyond_vocabulary(
    batch: Batch, sizes: Mapping[str, int], targets: Targets | None = None
) -> tuple[str, int] | None:
    """The first field whose largest id needs more ids than ``sizes`` has, and that id; None where all fit."""
    negatives = {"item": batch.neg_item, "category": batch.neg_category}
    columns = {
        name: (*tensors, negatives[name]) if name in negatives else tensors
        for name, tensors in feature_ids(batch, targets).items()
    }
    for name, tensors in columns.items():
        largest = max((int(tensor.max()) for tensor in tensors if tensor.numel()), default=0)
        if largest >= sizes[name]:
            return name, largest
    return None


def empty_batch(num_wide: int) -> Batch:
    """A batch of zero rows: what a rank without data feeds to its network."""

    ids = {field.name: torch.zeros((0, 0), dtype=torch.int64) for field in fields(Batch)}
    floats = {"hist_gap": (0, 0), "wide": (0, num_wide), "label": (0,), "weight": (0,)}
    others = {name: torch.zeros(shape) for name, shape in floats.items()}
    return Batch(**(ids | others | {"length": torch.zeros(0, dtype=torch.int64)}))


def random_batch(
    generator: torch.Generator,
    size: int,
    *,
    max_length: int = 12,
    max_members: int = 3,
    num_wide: int = len(layouts.WIDE_FEATURES),
    vocabulary_sizes: Mapping[str, int] | None = None,
    length: Sequence[int] | None = None,
) -> Batch:
    """Random legal rows for tests and benches.

    ``length`` fixes the history lengths; otherwise they are uniform in 0..max_length, so empty histories
    occur. Members number 0..max_members and leave fields absent at random, so empty targets occur.
    Ids stay below ``vocabulary_sizes`` (default ``RANDOM_SIZES``); labels are fair coins.
    """
    sizes = vocabulary_sizes or RANDOM_SIZES

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lengths = integers(0, max_length + 1, size) if length is None else torch.tensor(length, dtype=torch.int64)
    steps = int(lengths.max()) if size else 0
    mask = torch.arange(steps) < lengths[:, None]
    members = torch.arange(max_members) < integers(0, max_members + 1, size)[:, None]

    def history(field: str) -> Tensor:
        return integers(layouts.OOV, sizes[field], size, steps) * mask

    def candidate(field: str) -> Tensor:
        ids = integers(layouts.OOV, sizes[field], size, max_members)
        return ids * members * (integers(0, 4, size, max_members) > 0)

    return Batch(
        hist_item=history("item"),
        hist_category=history("category"),
        hist_shop=history("shop"),
        hist_type=history("event_type"),
        hist_gap=torch.rand((size, steps), generator=generator) * 5.0 * mask,
        neg_item=history("item"),
        neg_category=history("category"),
        length=lengths,
        cand_item=candidate("item"),
        cand_category=candidate("category"),
        cand_shop=candidate("shop"),
        wide=torch.randn((size, num_wide), generator=generator) + 1.0,
        label=integers(0, 2, size).float(),
        weight=torch.ones(size),
    )


def _records(name: str, values: Sequence[Packed], num_fields: int) -> tuple[Array, Array]:
    """All records of a packed int32 column, [sum of lengths, num_fields], and the records per row."""
    num_bytes = np.fromiter(map(len, values), np.int64, len(values))
    width = 4 * num_fields
    if (wrong := np.flatnonzero(num_bytes % width)).size:
        raise DataError(
            f"{name} of row {wrong[0]}: {num_bytes[wrong[0]]} bytes are no whole number of {width}-byte "
            "records; rebuild the examples"
        )
    return np.frombuffer(b"".join(values), "<i4").reshape(-1, num_fields), num_bytes // width


def _refuse(name: str, what: str, length: Array, is_wrong: Array) -> None:
    if is_wrong.any():
        row = int(np.searchsorted(np.cumsum(length), int(is_wrong.argmax()), side="right"))
        raise DataError(f"{name} of row {row} {what}; rebuild the examples")


def _pad(flat: Array, length: Array) -> Array:
    """Lay out one field of all records as int64 [B, longest], zeros at the end of each row."""
    longest = int(length.max()) if length.size else 0
    padded = np.zeros((length.size, longest), np.int64)
    padded[np.arange(longest) < length[:, None]] = flat
    return padded


def decode_wide(values: Sequence[Packed]) -> Array:
    """Packed aggregates as float32 [N,F]; [0,0] without rows.

    Raises:
        DataError: rows differ in length, or a value is not finite.
    """
    wide = _wide_matrix(values)
    _refuse_infinite(wide)
    return wide


def _wide_matrix(values: Sequence[Packed]) -> Array:
    num_bytes = np.fromiter(map(len, values), np.int64, len(values))
    expected = int(num_bytes[0]) if num_bytes.size else 0
    wrong = np.flatnonzero((num_bytes != expected) | (num_bytes % 4 != 0))
    if wrong.size:
        raise DataError(
            f"wide of row {wrong[0]}: {num_bytes[wrong[0]]} bytes, row 0 has {expected}; rebuild the examples"
        )
    return np.frombuffer(b"".join(values), "<f4").reshape(len(values), expected // 4).astype(np.float32)


def _refuse_infinite(wide: Array) -> None:
    if not np.isfinite(wide).all():
        row = int(np.flatnonzero(~np.isfinite(wide).all(1))[0])
        raise DataError(f"wide of row {row} is not finite; rebuild the examples")


def _floats(values: Sequence[float]) -> Array:
    return np.asarray(values, np.float32)
