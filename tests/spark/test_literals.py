"""Small frames: the values, types and nulls of rows that Spark would read itself; empty; not a number."""

import math
from datetime import UTC, date, datetime
from typing import Any

import pytest
from builders import make_row
from pyspark.sql import SparkSession

from couponflow.lake import literals, schemas, tables

VALUES: dict[str, Any] = {
    "string": "é,\n",
    "int": -7,
    "bigint": 2**53 + 1,
    "double": 0.1,
    "boolean": True,
    "timestamp": datetime(2024, 3, 1, 4, 5, 6, 123_457, tzinfo=UTC),
    "date": date(1969, 12, 31),
    "binary": b"\0\xff",
    "array<string>": ["a", None],
    "array<int>": [1, 2],
    "map<string,string>": {"k": "v"},
    "array<struct<coupon_id:string,category_id:string,item_ids:array<string>>>": [("k1", None, ["i1"])],
}


@pytest.mark.parametrize("table", sorted(schemas.TABLES))
def test_rows_of_every_table_are_those_that_spark_reads(spark: SparkSession, table: str) -> None:
    declared = schemas.TABLES[table]
    full = tuple(VALUES[column.type] for column in declared.columns)
    rows = [full, tuple(make_row(table).values()), full]
    schema = tables.struct_type(declared.columns)
    found, expected = literals.frame(spark, rows, schema), spark.createDataFrame(rows, schema)
    assert found.schema == expected.schema
    assert found.collect() == expected.collect()
    assert "LocalTableScan" in found._jdf.queryExecution().executedPlan().toString()
    nothing = literals.frame(spark, [], schema)
    assert [(f.name, f.dataType) for f in nothing.schema] == [(f.name, f.dataType) for f in schema]
    assert nothing.collect() == []


def test_not_a_number_is_no_null(spark: SparkSession) -> None:
    rows = literals.frame(spark, [(math.nan,), (None,), (1.0,)], "value double").collect()
    assert math.isnan(rows[0].value)
    assert [row.value for row in rows[1:]] == [None, 1.0]
