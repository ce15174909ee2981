"""Workers that are settled between tasks: the same rows, and nothing left to forget or to look through."""

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from zipimport import zipimporter

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from couponflow.lake import python_tasks


@pytest.mark.parametrize(("rows", "tasks"), [(0, 1), (1, 3), (50, 7)])
def test_the_rows_are_those_of_map_in_arrow(spark: SparkSession, rows: int, tasks: int) -> None:
    def doubled(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_pydict({"id": [2 * value for value in batch.column(0).to_pylist()]})

    frame = spark.range(0, rows, 1, tasks)
    found = python_tasks.map_in_arrow(frame, doubled, "id long").collect()
    assert found == frame.mapInArrow(doubled, "id long").collect()
    assert [row.id for row in found] == [2 * number for number in range(rows)]


def test_a_task_meets_what_the_one_before_has_settled(spark: SparkSession) -> None:
    """In every worker, from its second task on: no importer of an archive, few objects to look through."""

    def state(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            importers = sum(isinstance(one, zipimporter) for one in sys.path_importer_cache.values())
            seen = {"pid": os.getpid(), "importers": importers, "frozen": gc.get_freeze_count()}
            yield pa.RecordBatch.from_pylist([seen | {"tracked": len(gc.get_objects())}])

    schema = "pid long, importers long, frozen long, tracked long"
    frame = python_tasks.map_in_arrow(spark.range(0, 20, 1, 20), state, schema)
    known = {row.pid for row in frame.collect()}
    later = [row for row in frame.collect() if row.pid in known]
    assert later
    for row in later:
        assert row.importers == 0
        assert row.frozen > 10 * row.tracked


def test_objects_are_frozen_anew_only_after_new_modules() -> None:
    try:
        python_tasks.settle()
        first = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        python_tasks.settle()
        assert gc.get_freeze_count() <= first
        assert len(kept) == 1000
        sys.modules["_a_module_of_this_test"] = sys
        python_tasks.settle()
        assert gc.get_freeze_count() >= first + 1000
    finally:
        del sys.modules["_a_module_of_this_test"]
        gc.unfreeze()
