"""The numpy side of examples: packed bytes of sequence columns, and auxiliary negatives. No Spark here.

Layouts are those of ``schemas``: little-endian, row-major, one binary value per row of a table. Everything
is a pure function of its arguments, so a value does not depend on the batch it was computed in.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from couponflow.lake.layouts import HISTORY_FIELDS, NEGATIVE_FIELDS, TARGET_FIELDS, WIDE_FEATURES

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

MICROS_PER_MINUTE = 60_000_000
#: Popularity weights are integers in units of 1 / 1024, so that sums of them are exact.
WEIGHT_SCALE = 1024
_ITEM, _CATEGORY, _AGE = 0, 1, 4
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def pack(matrix: NDArray[np.generic], sizes: Int64) -> pa.BinaryArray:
    """Cut the rows of a C-ordered matrix into one binary value per entry of ``sizes`` (rows each).

    Args:
        matrix: [sum of sizes, fields], already int32 or float32 little-endian.
        sizes: rows of ``matrix`` per value; 0 gives an empty value.
    """
    width = matrix.shape[1] * matrix.dtype.itemsize
    ends = np.concatenate([[0], np.cumsum(sizes)]) * width
    if ends[-1] >= 2**31:
        raise ValueError("a packed batch exceeds 2 GiB; send fewer rows at once")
    offsets = pa.py_buffer(ends.astype("<i4").tobytes())
    return pa.BinaryArray.from_buffers(
        pa.binary(), len(sizes), [None, offsets, pa.py_buffer(np.ascontiguousarray(matrix).tobytes())]
    )


def unpack(values: pa.BinaryArray, fields: int) -> tuple[Int32, Int64]:
    """The inverse of ``pack`` for int32 values: the stacked rows, and the rows per value."""
    sizes = pc.binary_length(values).to_numpy(zero_copy_only=False).astype(np.int64) // (4 * fields)
    stacked = np.frombuffer(b"".join(values.to_pylist()), dtype="<i4")
    return stacked.reshape(-1, fields).astype(np.int32, copy=False), sizes


def with_packed_wide(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Pack the last column, a list of ``layouts.WIDE_FEATURES`` per row, as float32."""
    for batch in batches:
        values = batch.columns[-1].flatten().to_numpy(zero_copy_only=False).astype("<f4")
        matrix = values.reshape(batch.num_rows, len(WIDE_FEATURES))
        packed = pack(matrix, np.ones(batch.num_rows, dtype=np.int64))
        yield pa.RecordBatch.from_arrays([*batch.columns[:-1], packed], names=batch.schema.names)


def with_targets(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Turn (campaign_id, list of category indices) into (campaign_id, target_size, target)."""
    for batch in batches:
        campaigns, members = batch.columns
        sizes = pc.list_value_length(members).to_numpy(zero_copy_only=False).astype(np.int64)
        categories = members.flatten().to_numpy(zero_copy_only=False)
        matrix = np.zeros((len(categories), len(TARGET_FIELDS)), dtype="<i4")
        matrix[:, TARGET_FIELDS.index("category")] = categories
        yield pa.RecordBatch.from_arrays(
            [campaigns, pa.array(sizes, pa.int32()), pack(matrix, sizes)],
            names=["campaign_id", "target_size", "target"],
        )


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit counters into independent-looking 64-bit numbers (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        mixed = values + _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
        return mixed ^ (mixed >> np.uint64(31))


def counters(seed: int, row_keys: Int64, sizes: Int64) -> NDArray[np.uint64]:
    """One 64-bit number per step, a pure function of (seed, row key, position in the row)."""
    base = splitmix64(row_keys.view(np.uint64) ^ splitmix64(np.array([seed], dtype=np.uint64)))
    positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    with np.errstate(over="ignore"):
        return splitmix64(np.repeat(base, sizes) + positions.astype(np.uint64) * _GOLDEN)


@dataclass(frozen=True)
class Popularity:
    """How often each (item, category) was seen before each refresh.

    ``starts_minutes`` [R] UTC minutes since 1970 at which a refresh becomes valid, ascending; ``pairs``
    [P, 2] item and category index, ascending; ``weights`` [R, P] int64, 0 = not seen before that refresh.
    """

    starts_minutes: Int64
    pairs: Int32
    weights: Int64

    @classmethod
    def from_counts(
        cls, refresh: Int64, pairs: Int32, counts: Int64, starts_minutes: Int64, power: float
    ) -> "Popularity":
        """Accumulate counts that become known at refresh number ``refresh`` (index into starts).

        Pairs that arrive in another order, or more of them with later refreshes, change no earlier draw.
        """
        distinct, place = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
        seen = np.zeros((len(starts_minutes), len(distinct)), dtype=np.int64)
        np.add.at(seen, (refresh, place.reshape(-1)), counts)
        total = np.cumsum(seen, axis=0)
        weights = np.where(total > 0, np.rint(WEIGHT_SCALE * np.power(total, power)), 0.0).astype(np.int64)
        return cls(starts_minutes, distinct.astype(np.int32), weights)


def draw_negatives(
    history: Int32,
    sizes: Int64,
    as_of_minutes: Int64,
    row_keys: Int64,
    blocked: list[frozenset[int]],
    popularity: Popularity,
    seed: int,
) -> Int32:
    """Draw one (item, category) per history step by popularity before the step's day.

    Args:
        history: [steps, 5] stacked steps of all rows; ``sizes`` [rows] steps per row.
        as_of_minutes: [rows] cut-off, UTC minutes since 1970.
        row_keys: [rows] hash of the row's identity; with the seed and the position it fixes the draw.
        blocked: [rows] category indices of the row's target; none of them is ever drawn.

    Returns:
        int32 [steps, 2] item, category; never the step's own item; (0, 0) where nothing may be drawn.

    Exact: weights are integers, the blocked pairs weigh nothing and the mass of the step's own item is
    cut out of the interval, so nothing is drawn twice or rejected. A step exactly at a refresh's midnight
    uses the refresh before (ages are whole minutes); never a later one.
    """
    numbers = counters(seed, row_keys, sizes)
    step_row = np.repeat(np.arange(len(sizes)), sizes)
    # The step lies in (as_of - age - 1 min, as_of - age]; its lower end can never reach into a later day.
    earliest = as_of_minutes[step_row] - history[:, _AGE] - 1
    refresh = np.searchsorted(popularity.starts_minutes, earliest, side="right") - 1
    drawn = np.zeros((len(history), len(NEGATIVE_FIELDS)), dtype=np.int32)
    rows_by_target: dict[frozenset[int], list[int]] = {}
    for row, categories in enumerate(blocked):
        rows_by_target.setdefault(categories, []).append(row)
    group_of_row = np.zeros(len(sizes), dtype=np.int64)
    for number, rows in enumerate(rows_by_target.values()):
        group_of_row[rows] = number
    free = [~np.isin(popularity.pairs[:, 1], list(categories)) for categories in rows_by_target]
    num_refreshes = len(popularity.starts_minutes)
    cell = np.where(refresh >= 0, group_of_row[step_row] * num_refreshes + refresh, -1)
    order = np.argsort(cell, kind="stable")
    borders = np.flatnonzero(np.diff(cell[order])) + 1
    for steps in np.split(order, borders):
        if len(steps) == 0 or cell[steps[0]] < 0:
            continue
        group, moment = divmod(int(cell[steps[0]]), num_refreshes)
        weights = popularity.weights[moment] * free[group]
        drawn[steps] = _draw(numbers[steps], history[steps, _ITEM], popularity.pairs, weights)
    return drawn


def _draw(numbers: NDArray[np.uint64], own_item: Int32, pairs: Int32, weights: Int64) -> Int32:
    mass = np.concatenate([[0], np.cumsum(weights)])
    low = mass[np.searchsorted(pairs[:, 0], own_item, side="left")]
    own = mass[np.searchsorted(pairs[:, 0], own_item, side="right")] - low
    total = mass[-1] - own
    possible = total > 0
    point = (numbers % np.maximum(total, 1).astype(np.uint64)).astype(np.int64)
    point += np.where(point >= low, own, 0)
    place = np.minimum(np.searchsorted(mass, point, side="right") - 1, max(len(pairs) - 1, 0))
    if not possible.any():
        return np.zeros((len(numbers), 2), dtype=np.int32)
    return np.where(possible[:, None], pairs[place], 0).astype(np.int32)


def with_negatives(
    batches: Iterable[pa.RecordBatch], load: Callable[[], Popularity], seed: int
) -> Iterator[pa.RecordBatch]:
    """Append column ``negatives`` to batches with history, target, as_of and row_key."""
    for batch in batches:
        history, sizes = unpack(batch.column("history"), len(HISTORY_FIELDS))
        targets = [
            frozenset(np.frombuffer(value, dtype="<i4").reshape(-1, 3)[:, _CATEGORY].tolist()) - {0}
            for value in batch.column("target").to_pylist()
        ]
        minutes = batch.column("as_of").cast(pa.int64()).to_numpy() // MICROS_PER_MINUTE
        keys = batch.column("row_key").to_numpy()
        drawn = draw_negatives(history, sizes, minutes, keys, targets, load(), seed)
        yield pa.RecordBatch.from_arrays(
            [*batch.columns, pack(drawn.astype("<i4"), sizes)], names=[*batch.schema.names, "negatives"]
        )
