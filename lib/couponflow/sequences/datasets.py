"""How training rows lie in files, and what a dataset says about a version of ``training_examples``.

Rows of a split lie in hash order in files of nearly equal size, so that any share of the files is a random
sample of the split and shards are even. Everything a manifest holds is counted on one pinned snapshot.
"""

from datetime import date
from typing import Any

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from couponflow.config import Config
from couponflow.errors import DataError
from couponflow.lake import layouts, literals, tables
from couponflow.sequences import vocabulary
from couponflow.sequences.labels import SPLITS, fold_conditions

TABLE = "training_examples"
MAX_ROW_GROUP = 20_000
#: Rows that one task of the placement sorts, about.
BUCKET_ROWS = 100_000
_MAX_BITS = 16


def place_in_files(rows: DataFrame, splits: dict[str, int], num_ranks: int) -> tuple[DataFrame, int, int]:
    """Deal the rows of each split, in hash order, to files of nearly equal size.

    Adds ``file_key``, a number that Spark's hash partitioning sends to the partition of that file; returns
    with it the number of files and the largest file's rows.
    Rule: the row at position p of n in the order (row_hash, example_id) of its split goes to file p * files
        div n.
    Cost: the position is counted in two steps, rows per range of hashes and then the rank inside a range, so
        that no task sorts a whole split; the counts, a few thousand, pass through the driver.
    """
    basis = splits["train"] or sum(splits.values())
    rows_per_file = max(1, min(MAX_ROW_GROUP, basis // (4 * num_ranks)))
    files = {name: max(1, size // rows_per_file) for name, size in splits.items() if size}
    num_files = max(1, sum(files.values()))
    max_rows = max([-(-splits[name] // count) for name, count in files.items()], default=1)
    first_file = {name: sum(list(files.values())[:place]) for place, name in enumerate(files)}
    # Signed shift: the bucket ascends with the hash.
    bits = min(_MAX_BITS, max(1, (max(splits.values()) // BUCKET_ROWS).bit_length()))
    bucketed = rows.withColumn("bucket", F.shiftright("row_hash", 64 - bits))
    counts = bucketed.groupBy("split", "bucket").count().orderBy("split", "bucket").collect()
    plan, before = [], dict.fromkeys(files, 0)
    for row in counts:
        name = row["split"]
        plan.append((name, row["bucket"], before[name], splits[name], files[name], first_file[name]))
        before[name] += row["count"]
    spark = rows.sparkSession
    declared = "split string, bucket bigint, before bigint, split_rows int, split_files int, first_file int"
    keys = _partition_keys(spark, num_files)
    in_bucket = Window.partitionBy("split", "bucket").orderBy("row_hash", "example_id")
    placed = (
        bucketed.withColumn("position", F.row_number().over(in_bucket) - 1)
        .join(F.broadcast(literals.frame(spark, plan, declared)), ["split", "bucket"])
        .withColumn(
            "file",
            (F.col("first_file") + F.expr("(before + position) * split_files div split_rows")).cast("int"),
        )
        .join(F.broadcast(keys), "file")
        .drop("file", "position", "bucket", "before", "split_rows", "split_files", "first_file")
    )
    return placed, num_files, max_rows


def _partition_keys(spark: SparkSession, num_partitions: int) -> DataFrame:
    """One number per partition that hash partitioning sends exactly there: no two files share a task."""
    place = F.pmod(F.hash(F.col("file_key")), F.lit(num_partitions))
    return (
        spark.range(40 * num_partitions + 200)  # leaves a partition without a key with odds below e^-40
        .select(F.col("id").cast("int").alias("file_key"))
        .groupBy(place.alias("file"))
        .agg(F.min("file_key").alias("file_key"))
    )


def files_by_split(spark: SparkSession, root_uri: str) -> tuple[int, dict[str, dict[str, int]]]:
    """The newest version of the table and, per split, the files that its snapshot names, with their rows."""
    version = tables.version(spark, root_uri, TABLE)
    rows = tables.read(spark, root_uri, TABLE, version=version)
    files = {split: tables.snapshot_files(rows.where(F.col("split") == split)) for split in SPLITS}
    return version or 0, {split: found for split, found in files.items() if found}


def describe(
    spark: SparkSession, config: Config, terms: DataFrame, vocabulary_version: str
) -> dict[str, Any]:
    """What the manifest says of the newest version of the table, as fields of ``training.manifests.Dataset``.

    ``terms``, the vocabulary's rows, give the sizes of embeddings; the rest is ``count``.

    Raises:
        DataError: as ``count``.
    """
    return {
        "vocabulary_version": vocabulary_version,
        "vocabulary_sizes": vocabulary.sizes(terms),
        "wide_features": layouts.WIDE_FEATURES,
        **count(spark, config),
    }


def count(spark: SparkSession, config: Config) -> dict[str, Any]:
    """What is counted on one snapshot, rows that are marked as deleted left out: ``table_version``, ``files``
    (split -> {URI: rows}), ``sampling_rate`` of the training negatives and ``folds`` (rows per cut-off).

    A manifest that follows a deletion takes these fields anew and keeps the others.

    Raises:
        DataError: training rows were sampled at several rates, which no single correction undoes.
    """
    root_uri = config.lake.root_uri
    version, files = files_by_split(spark, root_uri)
    rows = tables.read(spark, root_uri, TABLE, version=version)
    negatives = rows.where((F.col("split") == "train") & (F.col("label") == 0))
    rates = sorted(row[0] for row in negatives.select("sampling_rate").distinct().collect())
    if len(rates) > 1:
        raise DataError(
            f"{TABLE} version {version}: training rows were kept at the rates {rates[0]} and {rates[-1]}, "
            "expected one; run build_examples for all its dates with one examples.negative_share"
        )
    return {
        "table_version": version,
        "files": files,
        "sampling_rate": rates[0] if rates else 1.0,
        "folds": tuple(count_folds(rows, config.examples.cutoffs, config.lake.time_zone)),
    }


def count_folds(rows: DataFrame, cutoffs: tuple[date, ...], time_zone: str) -> list[dict[str, Any]]:
    """Rows and positives that train and test each cut-off of the back-test; one pass for all of them."""
    folds = fold_conditions(cutoffs, time_zone)
    if not folds:
        return []
    sums = []
    for place, (_, start, end) in enumerate(folds):
        is_train = F.col("mature_time") <= F.lit(start)
        is_test = F.col("as_of") >= F.lit(start)
        is_test = is_test & (F.col("as_of") < F.lit(end)) if end is not None else is_test
        for part, condition in (("train", is_train), ("test", is_test)):
            one = F.when(condition, 1).otherwise(0)
            sums.append(F.sum(one).alias(f"{part}_rows_{place}"))
            sums.append(F.sum(one * F.col("label")).alias(f"{part}_positives_{place}"))
    found = rows.agg(*sums).collect()[0].asDict()
    return [
        {
            "cutoff": day.isoformat(),
            "start": start.isoformat(),
            "end": end.isoformat() if end is not None else "",
            **{
                f"{part}_{what}": int(found[f"{part}_{what}_{place}"] or 0)
                for part in ("train", "test")
                for what in ("rows", "positives")
            },
        }
        for place, (day, start, end) in enumerate(folds)
    ]
