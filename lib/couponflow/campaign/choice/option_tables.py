"""Options of users as Arrow tables: one batch, one task or one sum at a time.

The work itself is plain functions of arrays; here they meet Spark. No row reaches the driver but sums and
the facts of a task.
"""

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from couponflow.campaign.choice.pricing import NO_LIMIT, Bools, Ints, Limits, Users, offered
from couponflow.errors import DataError
from couponflow.lake import python_tasks

if TYPE_CHECKING:
    import pyarrow as pa

#: What a task returns: the users with their option and reason, and one row without a user for its facts.
CHOICES = "user_id string, option int, reason string, facts string"
Work = Callable[["pa.Table"], "pa.Table"]


def users_of(table: "pa.Table", limits: Limits) -> Users:
    """The arrays of a table of options, row by row as it stands."""
    num_options = len(limits.units[0].options)

    def stacked(name: str) -> Ints:
        columns = [table.column(f"{name}_{place}").to_numpy() for place in range(num_options)]
        return np.asarray(np.stack(columns, 1), np.int64)

    def bits(name: str, count: int) -> Bools:
        flags = table.column(name).to_numpy().astype(np.int64)
        return np.asarray((flags[:, None] >> np.arange(count)) & 1 == 1)

    is_segment = [unit.kind == "segment_max" for unit in limits.units]
    member = np.ones((table.num_rows, len(is_segment)), bool)
    member[:, is_segment] = bits("segments", sum(is_segment))
    return Users(stacked("value"), stacked("cost"), bits("offered", num_options), member)


def options_of(table: "pa.Table") -> Ints:
    """[N] the options that the users of a table hold."""
    return np.asarray(table.column("option").to_numpy().astype(np.int64))


def choice_rows(
    table: "pa.Table | None" = None,
    choice: Ints | None = None,
    reasons: list[str | None] | None = None,
    facts: dict[str, Any] | None = None,
) -> "pa.Table":
    """Rows of ``CHOICES``: one per user of the table, and one without a user that carries the facts."""
    import pyarrow as pa

    user_ids = [] if table is None else table.column("user_id").to_pylist()
    options = [] if choice is None else choice.tolist()
    told = [] if facts is None else [json.dumps(facts)]
    blank: list[Any] = [None] * len(told)
    columns = {
        "user_id": pa.array(user_ids + blank, pa.string()),
        "option": pa.array(options + blank, pa.int32()),
        "reason": pa.array((reasons or [None] * len(user_ids)) + blank, pa.string()),
        "facts": pa.array([None] * len(user_ids) + told, pa.string()),
    }
    return pa.table(columns)


def schema_of(frame: DataFrame) -> str:
    """The columns of a frame as DDL, for what a mapped frame adds to them."""
    return ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in frame.schema)


def mapped(frame: DataFrame, work: Work, schema: str) -> DataFrame:
    """Each batch of rows turned into another table."""

    def run(batches: "Iterable[pa.RecordBatch]") -> "Iterable[pa.RecordBatch]":
        import pyarrow as pa

        for batch in batches:
            yield from work(pa.Table.from_batches([batch])).to_batches()

    return python_tasks.map_in_arrow(frame, run, schema)


def where(kept: DataFrame, limits: Limits, is_kept: Callable[[Users], Bools]) -> DataFrame:
    """The users of a kind, as all their columns."""

    def work(table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        return table.filter(pa.array(is_kept(offered(users_of(table, limits), limits))))

    return mapped(kept, work, schema_of(kept))


def in_one_task(frame: DataFrame, work: Work, raises: bool = True) -> tuple[DataFrame, dict[str, Any]]:
    """Work once on all rows as one table in tie order; its rows of ``CHOICES``, and the facts apart.

    Raises:
        DataError: the work met one, and ``raises``.
    """

    def run(batches: "Iterable[pa.RecordBatch]") -> "Iterable[pa.RecordBatch]":
        import pyarrow as pa

        read = list(batches)
        if read:
            table = pa.Table.from_batches(read).combine_chunks()
            yield from work(table.sort_by([("tie", "ascending"), ("user_id", "ascending")])).to_batches()

    rows = python_tasks.map_in_arrow(frame.repartition(1), run, CHOICES).localCheckpoint()
    told = [row.facts for row in rows.where(F.col("facts").isNotNull()).select("facts").collect()]
    if not told:  # no row, no batch: the work has not run
        told = work(to_arrow_schema(frame.schema).empty_table()).column("facts").to_pylist()
    facts: dict[str, Any] = json.loads(told[0])
    if raises and "error" in facts:
        raise DataError(facts["error"])
    return rows.where(F.col("user_id").isNotNull()).drop("facts"), facts


def grouped_sums(
    kept: DataFrame, limits: Limits, work: Callable[[Users], dict[str, Ints]], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Sums of whole numbers by ``key``, ascending; summed in each batch first.

    A sum of a batch that a bigint cannot hold counts as ``NO_LIMIT``, which exceeds every limit.
    """

    def summed(table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        columns = work(offered(users_of(table, limits), limits))
        keys, place = np.unique(columns["key"], return_inverse=True)
        sums = {"key": pa.array(keys.astype(np.int64))}
        for name in names:
            total = np.zeros(keys.size, np.int64)
            np.add.at(total, place, columns[name])
            rough = np.bincount(place, columns[name].astype(np.float64), keys.size)
            sums[name] = pa.array(np.where(rough < float(NO_LIMIT), total, NO_LIMIT))
        return pa.table(sums)

    schema = ", ".join(f"{name} bigint" for name in ("key", *names))
    exact = [F.sum(F.col(name).cast("decimal(38,0)")).alias(name) for name in names]
    rows = mapped(kept, summed, schema).groupBy("key").agg(*exact).collect()
    return sorted((row.asDict() for row in rows), key=lambda row: int(row["key"]))
