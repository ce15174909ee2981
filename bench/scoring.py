"""Scoring all users in Spark against the UDFs that are usually written, and against the model alone.

The table: 100,000 users of ``scoring_examples``, geometric lengths with a mean of 21 of at most 100 events,
one target of three members. Every side reads it with the same columns, decodes with the product's decoder,
runs the same weights (product defaults) with one torch thread per Python worker on ``local[2]``, and writes
to ``noop``; the rivals have workers of their own, which nobody settles (``lake.python_tasks``). Before
anything is timed the scores of all sides are compared. Value: users per second of ours over the rival's.

- padded: an iterator pandas UDF, plain torch (``bench.plain``), every chunk padded to 100 steps;
- trimmed: the same, rows sorted by length and each chunk padded to its longest;
- row by row: one row per forward, as Horovod's Spark estimator does, over 400 of the users;
- the ceiling: two processes with the decoded batches in memory, no Spark;
- many targets: 50 targets of 500 users in one pass, against 50 passes of one target.

Runs as a program for the ceiling: ``python -m bench.scoring FOLDER PART``.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.functions import pandas_udf

from bench.run import Action, Claim, in_turns, median_ratio
from bench.served import Served, serve
from couponflow.campaign import scoring
from couponflow.campaign.scores import shipping
from couponflow.campaigning import ScoringConfig
from couponflow.lake import layouts, session
from couponflow.sections import SparkConfig

if TYPE_CHECKING:
    from couponflow.models.batch import Batch
    from couponflow.models.bundle import Bundle

CLAIMS = (
    "scoring_vs_padded_pandas_udf",
    "scoring_vs_trimmed_pandas_udf",
    "scoring_vs_model_ceiling",
    "scoring_vs_horovod_row_by_row",
    "many_targets",
)
USERS, FEW, STEPS, MEAN_LENGTH, RUNS = 100_000, 400, 100, 21, 5
#: Users at once: the product's default, and the fastest of 512, 1,024, 2,048 and 4,096 for plain torch.
CHUNK, PLAIN_CHUNK = ScoringConfig().chunk_rows, 512
#: As many as the score job makes of these users.
TASKS = ScoringConfig().num_tasks(USERS)
MANY_USERS, TARGETS = 500, 50
DAY = date(2024, 1, 1)
SIZES = {"item": 100_002, "category": 1_002, "shop": 52, "event_type": 9}
_COLUMNS = ("history", "targets", "wide")
Score = Callable[["Bundle", "Batch"], "np.ndarray[Any, Any]"]


def rows(num_users: int, num_targets: int = 1, seed: int = 0) -> pa.Table:
    """Rows of ``scoring_examples``."""
    draw = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(np.clip(draw.geometric(1 / MEAN_LENGTH, num_users), 0, STEPS).tolist()):
        ids = [draw.integers(1, SIZES[name], length) for name in layouts.VOCABULARY_FIELDS]
        history = np.column_stack([*ids, draw.integers(0, 500_000, length)])
        members = [draw.integers(1, SIZES[name], 3 * num_targets) for name in ("item", "category", "shop")]
        made.append(
            {
                "user_id": f"u{number}",
                "length": length,
                "history": history.astype("<i4").tobytes(),
                "target_ids": [str(n) for n in range(num_targets)],
                "target_sizes": [3] * num_targets,
                "targets": np.column_stack(members).astype("<i4").tobytes(),
                "wide": draw.normal(size=(num_targets, len(layouts.WIDE_FEATURES))).astype("<f4").tobytes(),
            }
        )
    return pa.Table.from_pylist(made)


def make_bundle() -> "Bundle":
    """An untrained network of the product's default widths."""
    import torch

    from couponflow.modelling import ModelConfig
    from couponflow.models.bundle import Bundle
    from couponflow.models.dien import Dien

    torch.manual_seed(0)
    return Bundle(Dien(ModelConfig(), SIZES, len(layouts.WIDE_FEATURES)).eval(), "v1", dict(SIZES))


def padded(bundle: "Bundle", batch: "Batch") -> "np.ndarray[Any, Any]":
    """Chunks in the order of arrival, padded to the cap."""
    from dataclasses import fields, replace

    from torch.nn.functional import pad

    def widen(chunk: "Batch") -> "Batch":
        extra = STEPS - chunk.hist_item.shape[1]
        names = [part.name for part in fields(chunk) if part.name.startswith("hist_")]
        return replace(chunk, **{name: pad(getattr(chunk, name), (0, extra)) for name in names})

    return _plain(bundle, batch, np.arange(batch.size), widen)


def trimmed(bundle: "Bundle", batch: "Batch") -> "np.ndarray[Any, Any]":
    """Chunks of rows of about one length, padded to their longest."""
    return _plain(bundle, batch, np.argsort(batch.length.numpy(), kind="stable"), lambda chunk: chunk)


def row_by_row(bundle: "Bundle", batch: "Batch") -> "np.ndarray[Any, Any]":
    """One forward pass a row."""
    return np.concatenate([bundle.logits(batch.take([row])) for row in range(batch.size)])


def _plain(
    bundle: "Bundle", batch: "Batch", order: "np.ndarray[Any, Any]", prepare: Callable[["Batch"], "Batch"]
) -> "np.ndarray[Any, Any]":
    import torch

    from bench.plain import PlainDien
    from couponflow.models.dien import Dien

    assert isinstance(bundle.model, Dien)
    network, found = PlainDien(bundle.model), np.empty(batch.size)
    with torch.inference_mode():
        for start in range(0, batch.size, PLAIN_CHUNK):
            places = order[start : start + PLAIN_CHUNK]
            found[places] = network.logits(prepare(batch.take(places))).double().numpy()
    return found


def udf_scores(examples: DataFrame, shipped: shipping.ShippedBundle, score: Score) -> DataFrame:
    """``user_id`` and ``score`` by an iterator pandas UDF that keeps its model for all batches."""

    # Spark evaluates the hints, and there Series takes no argument.
    def scores(
        batches: Iterator[tuple[pd.Series, ...]],  # type: ignore[type-arg]  # evaluated by Spark
    ) -> Iterator[pd.Series]:  # type: ignore[type-arg]  # evaluated by Spark
        from couponflow.models.batch import decode

        bundle = shipping.on_worker(shipped)
        for columns in batches:
            batch = decode(*[column.tolist() for column in columns])
            yield pd.Series(1.0 / (1.0 + np.exp(-score(bundle, batch))))

    environment = examples.sparkSession.sparkContext.environment
    environment["BENCH_SIDE"] = "rival"  # Spark keeps workers by what they find in it
    made = pandas_udf(scores, "double")  # type: ignore[call-overload]  # its stubs want a plain Series
    rows = examples.select("user_id", made(*_COLUMNS).alias("score"))
    del environment["BENCH_SIDE"]
    return rows


def ours(examples: DataFrame, shipped: shipping.ShippedBundle) -> DataFrame:
    """What the score job computes."""
    return scoring.score_users(examples, shipped, ["0"], DAY, CHUNK, TASKS).select("user_id", "score")


def score_part(folder: Path, part: int) -> None:
    """One process of the ceiling: it holds half of the users, decoded."""
    import torch

    from couponflow.models.batch import decode

    torch.set_num_threads(1)
    own = pq.read_table(folder / "users.parquet").to_pylist()[part::2]
    bundle, batch = make_bundle(), decode(*[[row[name] for row in own] for name in _COLUMNS])
    serve(lambda: bundle.logits(batch, CHUNK))


def check_equal(frames: dict[str, DataFrame]) -> None:
    """All sides give every user one score, alike to 1e-5."""
    found = {name: {row[0]: row[1] for row in frame.collect()} for name, frame in frames.items()}
    first = next(iter(found.values()))
    for name, scores in found.items():
        common = scores.keys() & first.keys()
        assert common, name
        assert max(abs(scores[user] - first[user]) for user in common) < 1e-5, name


def many_targets(runs: int = RUNS) -> Claim:
    """In one process: no Spark, so that nothing but sharing differs."""
    import torch

    torch.set_num_threads(1)
    bundle, batch = make_bundle(), rows(MANY_USERS, TARGETS).to_batches()[0]
    names = [str(number) for number in range(TARGETS)]

    def together() -> None:
        scoring.score_rows(bundle, batch, names, DAY, CHUNK)

    def apart() -> None:
        for name in names:
            scoring.score_rows(bundle, batch, [name], DAY, CHUNK)

    rounds = in_turns({"together": together, "apart": apart}, runs)
    value = median_ratio(rounds, "together", "apart")
    return Claim("many_targets", value, "x its time", 0.65, runs, f"{TARGETS} times one target", "at_most")


def measure(names: tuple[str, ...], num_users: int = USERS, runs: int = RUNS) -> list[Claim]:
    """The Spark claims come from the same rounds."""
    claims = [many_targets(runs)] if "many_targets" in names else []
    if wanted := tuple(name for name in names if name != "many_targets"):
        spark = session.start(SparkConfig(), "bench scoring")
        with tempfile.TemporaryDirectory() as folder:
            claims += _in_spark(spark, Path(folder), wanted, num_users, runs)
    return claims


def _in_spark(
    spark: SparkSession, folder: Path, names: tuple[str, ...], num_users: int, runs: int
) -> list[Claim]:
    from couponflow.models.bundle import save_bundle

    save_bundle(make_bundle(), folder / "bundle")
    pq.write_table(rows(num_users), folder / "users.parquet")
    shipped = shipping.ship_bundle(spark, folder / "bundle")
    examples = spark.read.parquet(str(folder / "users.parquet")).repartition(2, "user_id").cache()
    few = examples.limit(num_users * FEW // USERS).repartition(2, "user_id").cache()
    frames = {
        "ours": ours(examples, shipped),
        "padded": udf_scores(examples, shipped, padded),
        "trimmed": udf_scores(examples, shipped, trimmed),
        "row_by_row": udf_scores(few, shipped, row_by_row),
    }
    check_equal(frames)
    actions: dict[str, Action] = {name: _sink(frame) for name, frame in frames.items()}
    processes = [Served("bench.scoring", str(folder), str(part)) for part in range(2)]

    def at_the_ceiling() -> None:
        for process in processes:
            process.ask()
        for process in processes:
            process.answer()

    try:
        rounds = in_turns(actions | {"ceiling": at_the_ceiling}, runs)
    finally:
        for process in processes:
            process.end()
    num_few = few.count()
    each = [{**seconds, "row_by_row": seconds["row_by_row"] * num_users / num_few} for seconds in rounds]
    speed = {name: num_users / sorted(one[name] for one in each)[len(each) // 2] for name in each[0]}
    bounds = {"padded": 3.0, "trimmed": 1.3, "row_by_row": 25.0, "ceiling": 0.5}
    claim_of = {
        "scoring_vs_padded_pandas_udf": "padded",
        "scoring_vs_trimmed_pandas_udf": "trimmed",
        "scoring_vs_horovod_row_by_row": "row_by_row",
        "scoring_vs_model_ceiling": "ceiling",
    }
    return [
        Claim(
            name,
            median_ratio(each, (rival := claim_of[name]), "ours"),
            "x its users/s",
            bounds[rival],
            runs,
            f"{rival.replace('_', ' ')}, {speed[rival]:,.0f} users/s against {speed['ours']:,.0f}",
        )
        for name in names
    ]


def _sink(frame: DataFrame) -> Action:
    return lambda: frame.write.format("noop").mode("overwrite").save()


if __name__ == "__main__":
    score_part(Path(sys.argv[1]), int(sys.argv[2]))
