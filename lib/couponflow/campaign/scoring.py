"""Calibrated probabilities of users for the targets of campaigns: the bundle, inside Spark.

Rows go through the same decoder as in training. torch is imported inside functions only, and only workers
score. What is published, and when, is ``publication``'s.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyspark import Accumulator
from pyspark.sql import Column, DataFrame
from pyspark.sql.pandas.functions import pandas_udf

from couponflow.campaign.scores.shipping import ShippedBundle, is_open, on_worker
from couponflow.campaigning import ScoringConfig
from couponflow.errors import DataError
from couponflow.lake import layouts, python_tasks, schemas, tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from couponflow.models.bundle import Bundle

_INPUT = ("user_id", "length", "history", "target_ids", "target_sizes", "targets", "wide")
_OUTPUT = pa.schema(
    [
        ("campaign_id", pa.string()),
        ("run_date", pa.date32()),
        ("user_id", pa.string()),
        ("target_id", pa.string()),
        ("model_version", pa.string()),
        ("score", pa.float64()),
        ("conversion_probability", pa.float64()),
        ("is_cold_start", pa.bool_()),
    ]
)
_PACKED = pa.schema(
    [
        ("target_ids", pa.list_(pa.string())),
        ("target_sizes", pa.list_(pa.int32())),
        ("targets", pa.binary()),
        ("wide", pa.binary()),
    ]
)
_EVENT_BYTES = 4 * len(layouts.HISTORY_FIELDS)
_MEMBER_BYTES = 4 * len(layouts.TARGET_FIELDS)
_WIDE_BYTES = 4 * len(layouts.WIDE_FEATURES)


def score_rows(
    bundle: "Bundle",
    rows: pa.RecordBatch,
    campaign_ids: Sequence[str],
    run_date: date,
    chunk_rows: int = 512,
) -> pa.RecordBatch:
    """Score the campaigns' targets of each row of ``scoring_examples``; a pure function.

    Returns rows of ``predictions``, one per user and campaign of ``campaign_ids`` that his ``target_ids``
    name: users in the order of the input, campaigns in the order given. A history is decoded and read once
    for all its targets. Memory: ``chunk_rows`` histories at a time, sorted by length, so that a chunk is
    padded to its own longest. The rows beside a user change his score by rounding only: matrix products add
    in an order of their own for other sizes and places.

    Raises:
        DataError: packed columns disagree with the declared sizes.
    """
    from couponflow.models import tabular
    from couponflow.models.batch import decode, targets_of
    from couponflow.models.calibration import sigmoid

    length = rows.column("length").to_numpy(zero_copy_only=False).astype(np.int64)
    histories = _Bytes(rows.column("history"))
    if (histories.sizes != _EVENT_BYTES * length).any():
        raise DataError("scoring_examples: length and history disagree; rebuild the examples")
    asked = _asked(rows, campaign_ids)
    targets = targets_of(asked.members, asked.num_members, asked.wide)
    logits = np.empty(len(asked.row), np.float64)
    by_length = np.argsort(length, kind="stable")
    for start in range(0, len(by_length), chunk_rows):
        own = by_length[start : start + chunk_rows]
        place = np.full(len(length), -1)
        place[own] = np.arange(len(own))
        pairs = np.flatnonzero(place[asked.row] >= 0)
        if pairs.size:
            batch = decode([histories[row] for row in own.tolist()])
            of = place[asked.row[pairs]]
            logits[pairs] = bundle.target_logits(batch, targets.take(pairs), of, chunk_rows)
    types = tabular.campaign_types(targets.wide.numpy()) if asked.row.size else np.zeros(0, object)
    campaigns = pa.array(np.asarray(campaign_ids, object)[asked.campaign], pa.string())
    arrays = [
        campaigns,
        pa.repeat(pa.scalar(run_date, pa.date32()), asked.row.size),
        rows.column("user_id").take(pa.array(asked.row)),
        campaigns,
        pa.repeat(bundle.model_version, asked.row.size),
        pa.array(sigmoid(logits), pa.float64()),
        pa.array(bundle.probabilities(logits, types), pa.float64()),
        pa.array(length[asked.row] == 0, pa.bool_()),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=_OUTPUT)


class _Bytes:
    """A binary column as views into its buffer: a Python object is made only for what is read.

    ``start`` and ``sizes`` [N] in bytes.
    """

    def __init__(self, column: pa.Array) -> None:
        """Of a column of type binary."""
        _, offsets, content = column.buffers()
        self.content = memoryview(content or b"")
        bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        self.start, self.sizes = bounds[:-1].astype(np.int64), np.diff(bounds).astype(np.int64)

    def __getitem__(self, row: int) -> memoryview:
        """The value of a row."""
        return self.content[self.start[row] : self.start[row] + self.sizes[row]]

    def joined(self) -> memoryview:
        """All values, end to end."""
        first = int(self.start[0]) if self.start.size else 0
        return self.content[first : first + int(self.sizes.sum())]


class _Asked(NamedTuple):
    """Pairs of row and campaign, row by row: both places [R], and the target.

    ``num_members`` [R] records of ``members`` [M,3] each; ``wide`` [R,F] aggregates.
    """

    row: "NDArray[np.int64]"
    campaign: "NDArray[np.int64]"
    num_members: "NDArray[np.int64]"
    members: "NDArray[np.int32]"
    wide: "NDArray[np.float32]"


def _asked(rows: pa.RecordBatch, campaign_ids: Sequence[str]) -> _Asked:
    """Find the campaigns among the targets that each row has packed.

    Raises:
        DataError: the packed columns of a row disagree.
    """
    names, num_members = rows.column("target_ids"), rows.column("target_sizes")
    targets, wide = _Bytes(rows.column("targets")), _Bytes(rows.column("wide"))
    num_targets = names.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    sizes = num_members.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    is_sound = np.array_equal(num_members.value_lengths().to_numpy(zero_copy_only=False), num_targets)
    first = np.cumsum(num_targets) - num_targets  # of each row, among all targets
    before = np.concatenate([[0], np.cumsum(sizes)])  # members before each target
    if is_sound:
        members_of_row = before[first + num_targets] - before[first]
        is_sound = bool((targets.sizes == _MEMBER_BYTES * members_of_row).all())
    if not is_sound or (wide.sizes != _WIDE_BYTES * num_targets).any():
        raise DataError("scoring_examples: targets and wide disagree; rebuild the examples")
    known = pc.index_in(names.flatten(), value_set=pa.array(campaign_ids, pa.string()))
    campaign = known.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    place = np.flatnonzero(campaign >= 0)
    row = np.repeat(np.arange(len(num_targets)), num_targets)[place]
    order = np.lexsort((campaign[place], row))
    place, row = place[order], row[order]
    size = sizes[place]
    of_members = np.arange(size.sum()) + np.repeat(before[place] - (np.cumsum(size) - size), size)
    members = np.frombuffer(targets.joined(), "<i4").reshape(-1, len(layouts.TARGET_FIELDS))[of_members]
    aggregates = np.frombuffer(wide.joined(), "<f4").reshape(-1, len(layouts.WIDE_FEATURES))[place]
    return _Asked(row, campaign[place], size, members, aggregates)


def target_of(row: Mapping[str, Any], campaign_id: str) -> tuple[bytes, bytes] | None:
    """Packed members and aggregates of a campaign's target in one row of ``scoring_examples``; None without.

    Raises:
        DataError: the packed columns of the row disagree.
    """
    held = {name: row[name] for name in ("target_ids", "target_sizes")}
    held |= {name: bytes(row[name]) for name in ("targets", "wide")}
    asked = _asked(pa.RecordBatch.from_pylist([held], schema=_PACKED), [campaign_id])
    return (asked.members.tobytes(), asked.wide.tobytes()) if asked.row.size else None


def score_users(
    examples: DataFrame,
    shipped: ShippedBundle,
    campaign_ids: Sequence[str],
    run_date: date,
    chunk_rows: int,
    num_tasks: int,
    loads: "Accumulator[int] | None" = None,
) -> DataFrame:
    """Rows of ``predictions`` for every row of ``scoring_examples`` and each of the campaigns that it names.

    Lazy. ``loads`` counts how often a worker process has loaded the bundle. A small table may lie in one
    file, so rows are spread over ``num_tasks`` tasks first. The user says which task and which place in it,
    not the cluster: so the same users get the same scores to the last bit on any number of cores.
    """
    spread = examples.select(*_INPUT).repartition(num_tasks, "user_id")
    spread = spread.sortWithinPartitions("length", "user_id")
    work = partial(
        _score_batches,
        shipped=shipped,
        campaign_ids=tuple(campaign_ids),
        run_date=run_date,
        chunk_rows=chunk_rows,
        loads=loads,
    )
    return python_tasks.map_in_arrow(spread, work, tables.struct_type(schemas.TABLES["predictions"].columns))


def score_udf(shipped: ShippedBundle) -> Callable[..., Column]:
    """An iterator pandas UDF for any DataFrame, of columns ``history``, ``target`` and ``wide``.

    Each is packed as in ``training_examples``; returns a struct of ``score`` and ``conversion_probability``,
    as ``predictions`` holds them. The bundle is loaded once per worker process.
    """

    # Spark evaluates the hints, and there Series takes no argument.
    def scores(
        batches: Iterator[tuple[pd.Series, pd.Series, pd.Series]],  # type: ignore[type-arg]  # evaluated by Spark
    ) -> Iterator[pd.DataFrame]:
        from couponflow.models import tabular
        from couponflow.models.batch import decode
        from couponflow.models.calibration import sigmoid

        bundle = on_worker(shipped)
        for history, target, wide in batches:
            batch = decode(history.tolist(), target.tolist(), wide.tolist())
            logits = bundle.logits(batch, ScoringConfig().chunk_rows)
            types = tabular.campaign_types(batch.wide.numpy())
            columns = {
                "score": sigmoid(logits),
                "conversion_probability": bundle.probabilities(logits, types),
            }
            yield pd.DataFrame(columns)
        python_tasks.settle()

    made: Callable[..., Column] = pandas_udf(scores, "score double, conversion_probability double")  # type: ignore[call-overload]  # its stubs know no iterator of tuples
    return made


def _score_batches(
    batches: Iterator[pa.RecordBatch],
    shipped: ShippedBundle,
    campaign_ids: Sequence[str],
    run_date: date,
    chunk_rows: int,
    loads: "Accumulator[int] | None",
) -> Iterator[pa.RecordBatch]:
    for rows in batches:
        if rows.num_rows:
            is_new = not is_open(shipped)
            bundle = on_worker(shipped)
            if is_new and loads is not None:
                loads.add(1)
            yield score_rows(bundle, rows, campaign_ids, run_date, chunk_rows)
