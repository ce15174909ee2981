"""Python workers of Spark whose next task starts at once: the one door to ``mapInArrow``.

Before each task Spark 3.5 forgets what ``import`` has found, so that every zip importer reads its archive's
directory again (a later Spark does not: SPARK-54744); after each task it collects garbage among everything
that the imported packages made. With ours loaded the two take about 0.1 s, as long as scoring 10,000 users
does. A settled worker has nothing to forget and nothing to look through.
"""

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING
from zipimport import zipimporter

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType

    Work = Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]

#: Modules at the last settling: later ones bring objects of their own.
_num_modules = 0


def map_in_arrow(frame: "DataFrame", work: "Work", schema: "StructType | str") -> "DataFrame":
    """``frame.mapInArrow(work, schema)``, after which the worker is settled. Lazy.

    ``work`` turns the batches of one partition into others; it is pickled, as in Spark.
    """
    return frame.mapInArrow(partial(_run, work), schema)


def settle() -> None:
    """Make the end of this task and the start of the next cheap; for a worker, at the end of a task.

    Importers are caches: a later import makes them again. Objects that live now are left out of collections
    for good, once for each time that modules were added; all else is collected as ever.
    """
    global _num_modules
    for path, finder in list(sys.path_importer_cache.items()):
        if isinstance(finder, zipimporter):
            del sys.path_importer_cache[path]
    if len(sys.modules) != _num_modules:
        _num_modules = len(sys.modules)
        gc.collect()  # or garbage of now would stay
        gc.freeze()


def _run(work: "Work", batches: "Iterable[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    yield from work(batches)
    settle()
