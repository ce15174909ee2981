"""Erasure in the tables: rows of people on the do-not-ingest list go, the ledger keeps rows without a name.

The list holds keyed hashes, so a table's ids are hashed by Spark in the same way and compared. Nothing here
needs to know who it is: whatever was half done when a run died is done by the next one.
"""

import json
import secrets
from collections.abc import Mapping
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.errors import DataError
from couponflow.lake import failures, literals, schemas, storage, tables
from couponflow.lake.erased import TOMBSTONE, Erased

LEDGER = "assignments"
#: Emptied last: it says which visitors are a person's.
LINKS = "identity_links"
_BLOCK_BYTES = 64  # of SHA-256, for HMAC
_TOKEN_DIGITS = 16


def user_tables() -> tuple[str, ...]:
    """Tables that name users, upstream before downstream, the links last."""
    named = [table.name for table in schemas.TABLES.values() if "user_id" in table.column_names]
    return (*[name for name in named if name != LINKS], LINKS)


def hash_column(erased: Erased, user_id: Column) -> Column:
    """``Erased.hash_of`` as a Spark expression: HMAC-SHA256 in hex."""
    block = bytes.fromhex(erased.key).ljust(_BLOCK_BYTES, b"\0")
    inner, outer = (bytes(byte ^ pad for byte in block) for pad in (0x36, 0x5C))
    first = F.sha2(F.concat(F.lit(bytearray(inner)), F.encode(user_id, "UTF-8")), 256)
    return F.sha2(F.concat(F.lit(bytearray(outer)), F.unhex(first)), 256)


def on_list(frame: DataFrame, erased: Erased) -> DataFrame:
    """The rows of a frame whose ``user_id`` is that of an erased person."""
    hashes = literals.frame(frame.sparkSession, [(text,) for text in sorted(erased.hashes)], "hash string")
    same = hash_column(erased, F.col("user_id")) == F.col("hash")
    return frame.join(F.broadcast(hashes), same, "left_semi")


def people(spark: SparkSession, root_uri: str, erased: Erased) -> dict[str, dict[str, int]]:
    """Rows of each erased person in each table that holds some, table by table upstream first.

    Cost: one Spark job that reads the ids of every table once.
    """
    held = [table for table in user_tables() if tables.exists(spark, root_uri, table)]
    if not erased.hashes or not held:
        return {}
    counted = [
        tables.read(spark, root_uri, table)
        .groupBy("user_id")
        .agg(F.count(F.lit(1)).alias("rows"))
        .select(F.lit(table).alias("table"), "user_id", "rows")
        for table in held
    ]
    found: dict[str, dict[str, int]] = {}
    for row in on_list(reduce(DataFrame.unionAll, counted), erased).collect():  # few: they are erased once
        found.setdefault(row["table"], {})[row["user_id"]] = int(row["rows"])
    return {table: found[table] for table in held if table in found}


def count_rows(spark: SparkSession, root_uri: str, erased: Erased) -> dict[str, int]:
    """Rows of erased people in each table that holds some."""
    return {table: sum(rows.values()) for table, rows in people(spark, root_uri, erased).items()}


def take_out(spark: SparkSession, root_uri: str, erased: Erased, run_id: str) -> dict[str, int]:
    """Delete the rows of erased people from all tables; in the ledger they take a tombstone.

    Returns how many, by table. Key of the ledger: people of one campaign version keep different tombstones.
    Idempotent.

    Raises:
        ConflictError: another run has changed a table meanwhile.
        DataError: one cannot be read.
    """
    taken = {}
    for table, rows in people(spark, root_uri, erased).items():
        ids = sorted(rows)
        if table == LEDGER:
            tokens = [(user_id, TOMBSTONE + secrets.token_hex(_TOKEN_DIGITS // 2)) for user_id in ids]
            keys = literals.frame(spark, tokens, "user_id string, token string")
            taken[table] = tables.take_out(keys, root_uri, table, run_id, replacement="token")
        else:
            keys = literals.frame(spark, [(user_id,) for user_id in ids], "user_id string")
            taken[table] = tables.take_out(keys, root_uri, table, run_id)
    return taken


def take_out_refused(
    spark: SparkSession, root_uri: str, positions: list[tuple[str, Any, str, int]], run_id: str
) -> int:
    """Delete the quarantine rows of raw records (feed, ingest date, file, row number). Returns how many.

    Such a row holds no value of the record, but says that there was one.
    """
    if not positions or not tables.exists(spark, root_uri, "quarantine"):
        return 0
    names = ("feed", "ingest_date", "source_file", "row_number")
    columns = tuple(c for c in schemas.TABLES["quarantine"].columns if c.name in names)
    keys = literals.frame(spark, positions, tables.struct_type(columns))
    return tables.take_out(keys, root_uri, "quarantine", run_id)


def own_visitors(spark: SparkSession, root_uri: str, user_id: str) -> list[str]:
    """Visitors that belong to one user: the first link of each names them."""
    return _owned(spark, root_uri, F.col("user_id") == F.lit(user_id), user_id)


def without_other_owner(spark: SparkSession, root_uri: str, visitors: set[str], user_id: str) -> list[str]:
    """Of these visitors, those whose first link does not name another user; unknown ones stay."""
    if not visitors or not tables.exists(spark, root_uri, LINKS):
        return sorted(visitors)
    known = tables.read(spark, root_uri, LINKS).where(F.col("visitor_id").isin(*visitors))
    linked = {row["visitor_id"] for row in known.select("visitor_id").distinct().collect()}
    mine = _owned(spark, root_uri, F.col("visitor_id").isin(*visitors), user_id)
    return sorted((visitors - linked) | set(mine))


def _owned(spark: SparkSession, root_uri: str, about: Column, user_id: str) -> list[str]:
    if not tables.exists(spark, root_uri, LINKS):
        return []
    links = tables.read(spark, root_uri, LINKS)
    asked = links.where(about).select("visitor_id").distinct()
    first = links.join(asked, "visitor_id", "left_semi").groupBy("visitor_id")
    owner = first.agg(F.min(F.struct("ingest_date", "linked_time", "user_id")).alias("link"))
    rows = owner.where(F.col("link.user_id") == F.lit(user_id)).select("visitor_id").collect()
    return sorted(row["visitor_id"] for row in rows)  # the devices of one person


def is_merged_only(spark: SparkSession, root_uri: str, table: str, since: int) -> bool:
    """Whether nothing but erasures has changed a table after a version: no job writes by MERGE."""
    place = tables.table_uri(root_uri, table)
    try:
        rows = spark.sql(f"DESCRIBE HISTORY delta.`{place}`").select("version", "operation").collect()
    except failures.SPARK_ERRORS as error:
        raise DataError(
            f"table {table} at {place}: its history cannot be read ({failures.first_line(error)}); "
            "restore its _delta_log"
        ) from error
    return all(row["operation"] == "MERGE" for row in rows if row["version"] > since)


class Request:
    """The record of one person's erasure, under the keyed hash of the id: what was done, and how it stands.

    ``status``: open (a run died in it: erase again), deleted (old versions still hold the rows) or verified.
    """

    def __init__(self, root_uri: str, person: str) -> None:
        """Find the record of a person's hash; nothing is written."""
        self.uri = storage.join(root_uri, "erasure", "requests", f"{person}.json")
        self._held = storage.read_bytes(self.uri) if storage.exists(self.uri) else None
        self.content: dict[str, Any] = json.loads(self._held) if self._held else {}

    def open(self, run_id: str, time: str) -> None:
        """Begin, or begin again. Raises ConflictError when another run has the same request."""
        self.content = {"status": "open", "run_id": run_id, "requested_time": time, "done": {}}
        self._write()

    def done(self, step: str, counts: Mapping[str, int]) -> None:
        """Keep that a step is done, with its counts."""
        self.content["done"][step] = dict(counts)
        self._write()

    def close(self, status: str) -> None:
        """Set the status."""
        if self.content:
            self.content["status"] = status
            self._write()

    def _write(self) -> None:
        text = json.dumps(self.content, indent=1, sort_keys=True).encode()
        storage.replace(self.uri, text, self._held)
        self._held = text


def open_requests(root_uri: str) -> list[str]:
    """Hashes of the people whose erasure a run began and did not end."""
    folder = storage.join(root_uri, "erasure", "requests")
    names = [name.removesuffix(".json") for name in storage.list_names(folder)]
    return [name for name in names if Request(root_uri, name).content.get("status") == "open"]
