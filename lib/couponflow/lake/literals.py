"""Small frames from rows of the driver, as plain data in the plan.

``createDataFrame`` of a list sends the rows through Python workers each time that the frame is read, even if
there are none. Through Arrow they become a local relation, which costs no task.
"""

from collections.abc import Sequence
from math import isnan
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T


def frame(spark: SparkSession, rows: Sequence[tuple[Any, ...]], schema: T.StructType | str) -> DataFrame:
    """A frame of a few rows, values in the order of ``schema``. Grain: one row per tuple."""
    declared = T._parse_datatype_string(schema) if isinstance(schema, str) else schema
    assert isinstance(declared, T.StructType)
    if not rows:  # the optimiser knows that nothing comes of a limit of 0, and drops the joins with it
        columns = [F.lit(None).cast(field.dataType).alias(field.name) for field in declared]
        return spark.range(0).select(*columns).limit(0)
    if any(isinstance(value, float) and isnan(value) for row in rows for value in row):
        return spark.createDataFrame(list(rows), declared)  # pandas would make it a null
    import pandas as pd  # here: half a second that not every job has to pay

    data = pd.DataFrame(list(rows), columns=declared.names, dtype=object)
    return spark.createDataFrame(data, declared)
