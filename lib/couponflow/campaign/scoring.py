"""Every user of the master gets one calibrated probability for a campaign: the bundle, inside Spark.

The bundle travels as one archive through ``SparkContext.addFile``, is checked against its SHA-256 and loaded
once per Python worker process, where torch runs on one thread (processes give the parallelism). Rows go
through the same decoder as in training. Nothing is published before the gates have passed. torch is imported
inside functions only, and only workers score.
"""

import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark import Accumulator, SparkFiles
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from couponflow.errors import ConfigError, CouponflowError, DataError, InfraError
from couponflow.lake import layouts, schemas, storage, tables
from couponflow.sections import ScoringConfig

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
_EVENT_BYTES = 4 * len(layouts.HISTORY_FIELDS)
_MEMBER_BYTES = 4 * len(layouts.TARGET_FIELDS)
_WIDE_BYTES = 4 * len(layouts.WIDE_FEATURES)
_BATCH_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
_OUR_ERROR = re.compile(r"couponflow\.errors\.(ConfigError|DataError|InfraError): (.+)")

#: The bundle of this worker process, by archive hash; at most one, so that a long-lived worker stays small.
_loaded: dict[str, Any] = {}


@dataclass(frozen=True)
class ShippedBundle:
    """A bundle on its way to the workers: its archive among ``SparkFiles`` and what must be in it."""

    file_name: str
    sha256: str
    kind: str
    model_version: str
    vocabulary_version: str


def ship_bundle(spark: SparkSession, folder: Path) -> ShippedBundle:
    """Pack a bundle folder into one archive and hand it to every present and future worker.

    Raises:
        ConfigError: the folder has no manifest.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except OSError as error:
        raise ConfigError(f"{folder}: no manifest.json, so no finished bundle; train again") from error
    content = pack_folder(folder)
    digest = storage.sha256(content)
    # Executors may join later and fetch the archive then, so it lives as long as the application: in a
    # folder that Spark removes when it stops. Equal contents have an equal name.
    outbox = Path(SparkFiles.getRootDirectory()) / "bundles"
    outbox.mkdir(exist_ok=True)
    archive = outbox / f"bundle-{digest[:16]}.tar"
    if not archive.exists():
        archive.write_bytes(content)
        spark.sparkContext.addFile(str(archive))
    return ShippedBundle(
        archive.name,
        digest,
        str(manifest["kind"]),
        str(manifest["model_version"]),
        str(manifest["vocabulary_version"]),
    )


def pack_folder(folder: Path) -> bytes:
    """A tar of all files below a folder; equal contents give equal bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in storage.walk(str(folder)):
            content = (folder / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def open_bundle(path: Path, sha256: str) -> "Bundle":
    """Load a packed bundle, once per process; torch is set to one thread.

    Raises:
        ConfigError: the archive or a file in it differs from its SHA-256.
    """
    import torch

    from couponflow.models.bundle import load_bundle

    torch.set_num_threads(1)
    bundle: Bundle
    if sha256 in _loaded:
        bundle = _loaded[sha256]
        return bundle
    content = path.read_bytes()
    if storage.sha256(content) != sha256:
        raise ConfigError(f"{path.name} differs from what the driver has sent; run again")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(folder, filter="data")
        bundle = load_bundle(Path(folder))
    _loaded.clear()
    _loaded[sha256] = bundle
    return bundle


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
    padded to its own longest. A user's score does not depend on the rows beside him.

    Raises:
        DataError: packed columns disagree with the declared sizes.
    """
    from couponflow.models import tabular
    from couponflow.models.batch import decode, decode_targets

    length = rows.column("length").to_numpy(zero_copy_only=False).astype(np.int64)
    histories = _Bytes(rows.column("history"))
    if (histories.sizes != _EVENT_BYTES * length).any():
        raise DataError("scoring_examples: length and history disagree; rebuild the examples")
    asked = _asked(rows, campaign_ids)
    targets = decode_targets(asked.members, asked.wide)
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
    with np.errstate(over="ignore"):  # exp of a large negative logit: the score is 0, as it should be
        score = 1.0 / (1.0 + np.exp(-logits))
    campaigns = pa.array(np.asarray(campaign_ids, object)[asked.campaign], pa.string())
    arrays = [
        campaigns,
        pa.array([run_date] * asked.row.size, pa.date32()),
        rows.column("user_id").take(pa.array(asked.row)),
        campaigns,
        pa.array([bundle.model_version] * asked.row.size, pa.string()),
        pa.array(score, pa.float64()),
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

    def parts(self, start: "NDArray[np.int64]", sizes: "NDArray[np.int64]") -> list[memoryview]:
        """Ranges of bytes of the whole column."""
        ends = (start + sizes).tolist()
        return [self.content[first:last] for first, last in zip(start.tolist(), ends, strict=True)]


class _Asked(NamedTuple):
    """Pairs of row and campaign, row by row: both places [R], members and aggregates of the target."""

    row: "NDArray[np.int64]"
    campaign: "NDArray[np.int64]"
    members: list[memoryview]
    wide: list[memoryview]


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
    members = targets.parts(
        targets.start[row] + _MEMBER_BYTES * (before[place] - before[first[row]]),
        _MEMBER_BYTES * sizes[place],
    )
    aggregates = wide.parts(
        wide.start[row] + _WIDE_BYTES * (place - first[row]), np.full(len(row), _WIDE_BYTES)
    )
    return _Asked(row, campaign[place], members, aggregates)


def score_users(
    examples: DataFrame,
    shipped: ShippedBundle,
    campaign_ids: Sequence[str],
    run_date: date,
    chunk_rows: int,
    loads: "Accumulator[int] | None" = None,
) -> DataFrame:
    """Rows of ``predictions`` for every row of ``scoring_examples`` and each of the campaigns that it names.

    Lazy. ``loads`` counts how often a worker process has loaded the bundle. A small table may lie in one
    file, so rows are spread over the cores first, by user; no score depends on where a row goes.
    """
    spread = examples.select(*_INPUT).repartition(
        examples.sparkSession.sparkContext.defaultParallelism, "user_id"
    )
    work = partial(
        _score_batches,
        shipped=shipped,
        campaign_ids=tuple(campaign_ids),
        run_date=run_date,
        chunk_rows=chunk_rows,
        loads=loads,
    )
    return spread.mapInArrow(work, tables.struct_type(schemas.TABLES["predictions"].columns))


def check_vocabulary(examples: DataFrame, shipped: ShippedBundle) -> None:
    """Refuse examples whose ids are not those of the model.

    Raises:
        DataError: there are no examples.
        ConfigError: another vocabulary, or several.
    """
    versions = sorted(row[0] for row in examples.select("vocabulary_version").distinct().collect())
    if not versions:
        raise DataError("table scoring_examples: no rows for that day; run build_examples for it first")
    if versions != [shipped.vocabulary_version]:
        raise ConfigError(
            f"model {shipped.model_version} expects vocabulary {shipped.vocabulary_version}, table "
            f"scoring_examples has {', '.join(versions)}; rebuild the examples with it or name another model"
        )


def check_predictions(predictions: DataFrame, users: DataFrame) -> dict[str, Any]:
    """The gates before publishing; returns num_users, cold_start_users, mean_probability.

    Every user of the master exactly once and nobody else, probabilities and scores in [0, 1] without null
    or NaN, and not all equal.

    Raises:
        DataError: a gate is closed; nothing may be written.
    """
    values = [F.col("score"), F.col("conversion_probability")]
    fine = F.lit(True)
    for value in values:
        fine = fine & value.isNotNull() & ~F.isnan(value) & value.between(0.0, 1.0)
    by_user = predictions.groupBy("user_id").agg(
        F.count(F.lit(1)).alias("num_rows"),
        F.sum(F.when(fine, 0).otherwise(1)).alias("num_bad"),
        F.sum("conversion_probability").alias("probability"),
        F.max(F.col("is_cold_start").cast("int")).alias("is_cold_start"),
    )
    master = users.select("user_id").withColumn("is_known", F.lit(True))
    found = (
        by_user.join(master, "user_id", "full")
        .agg(
            F.count("is_known").alias("num_users"),
            F.count(F.when(F.col("num_rows").isNull(), 1)).alias("num_missing"),
            F.count(F.when(F.col("is_known").isNull(), 1)).alias("num_unknown"),
            F.count(F.when(F.col("num_rows") > 1, 1)).alias("num_repeated"),
            F.coalesce(F.sum("num_bad"), F.lit(0)).alias("num_bad"),
            F.coalesce(F.sum("is_cold_start"), F.lit(0)).alias("num_cold"),
            F.min("probability").alias("low"),
            F.max("probability").alias("high"),
            F.avg("probability").alias("mean"),
        )
        .collect()[0]
    )
    problems = {
        "users of the master without a score": found.num_missing,
        "scored users who are not in the master": found.num_unknown,
        "users with several scores": found.num_repeated,
        "scores that are null, NaN or outside [0, 1]": found.num_bad,
        "users in all, so nothing to publish": int(found.num_users == 0),
        "value for all users: the model is constant": int(found.num_users > 1 and found.low == found.high),
    }
    bad = [f"{count} {what}" for what, count in problems.items() if count]
    if bad:
        raise DataError(
            f"predictions: {'; '.join(bad)}; nothing written, the scores before stay. Rebuild "
            "scoring_examples for that day, or name another model"
        )
    return {
        "num_users": int(found.num_users),
        "cold_start_users": int(found.num_cold),
        "mean_probability": float(found.mean),
    }


@contextmanager
def scored(
    examples: DataFrame,
    users: DataFrame,
    folder: Path,
    campaign_id: str,
    run_date: date,
    section: ScoringConfig,
) -> Iterator[tuple[DataFrame, dict[str, Any]]]:
    """Score all users with the bundle in ``folder``, pass the gates, lend the rows and the run's facts.

    The rows are computed once and kept until the block ends.

    Raises:
        ConfigError: the model's vocabulary is not the table's, or the bundle is damaged.
        DataError: a gate is closed or the examples are malformed.
        InfraError: a worker failed.
    """
    spark = examples.sparkSession
    shipped = ship_bundle(spark, folder)
    check_vocabulary(examples, shipped)
    loads = spark.sparkContext.accumulator(0)
    rows_before = spark.conf.get(_BATCH_ROWS)
    spark.conf.set(_BATCH_ROWS, str(section.arrow_batch_rows))
    predictions = score_users(examples, shipped, [campaign_id], run_date, section.chunk_rows, loads)
    try:
        started = perf_counter()
        predictions.persist()
        try:
            facts = check_predictions(predictions, users)
        except PySparkException as error:
            raise _as_ours(error, campaign_id, run_date) from error
        seconds = perf_counter() - started
        facts |= {
            "model_version": shipped.model_version,
            "kind": shipped.kind,
            "users_per_second": round(facts["num_users"] / seconds, 1),
            "bundle_loads": loads.value,
        }
        yield predictions, facts
    finally:
        predictions.unpersist()
        spark.conf.set(_BATCH_ROWS, str(rows_before))


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
            is_new = shipped.sha256 not in _loaded
            bundle = open_bundle(Path(SparkFiles.get(shipped.file_name)), shipped.sha256)
            if is_new and loads is not None:
                loads.add(1)
            yield score_rows(bundle, rows, campaign_ids, run_date, chunk_rows)


def _as_ours(error: PySparkException, campaign_id: str, run_date: date) -> CouponflowError:
    """The error that a worker raised, as the class it had there."""
    found = _OUR_ERROR.search(str(error))
    if found:
        kinds: dict[str, type[CouponflowError]] = {"ConfigError": ConfigError, "DataError": DataError}
        return kinds.get(found[1], InfraError)(f"campaign {campaign_id}, {run_date}: {found[2].strip()}")
    lines = str(error).strip().splitlines()
    return InfraError(f"campaign {campaign_id}, {run_date}: a worker failed ({lines[-1][:300]}); run again")
