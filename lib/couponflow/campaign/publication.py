"""Scores of a campaign and day, published as a whole or not at all.

The users are scored in parts, by hash; a part that is finished lies under ``work/scores`` of the lake until
the scores are published, so that a run that was killed goes on where it was. Then come the gates, then one
commit. Nothing else reads the parts; those of runs with other examples or another model, which nobody will
finish, go with the first that ends.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

from pyspark import Accumulator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign.scores import gates, shipping
from couponflow.campaign.scoring import score_users
from couponflow.campaigning import ScoringConfig
from couponflow.errors import ConfigError, CouponflowError, DataError, InfraError
from couponflow.lake import failures, faults, schemas, storage, tables

log = logging.getLogger("couponflow")

#: Below the lake's root; ``erase_user`` empties it.
PARTS = ("work", "scores")
_BATCH_ROWS = "spark.sql.execution.arrow.maxRecordsPerBatch"
_OUR_ERROR = re.compile(r"couponflow\.errors\.(ConfigError|DataError|InfraError): (.+)")


@dataclass(frozen=True)
class Request:
    """What is to be scored: the targets of one campaign on one day, its own first.

    ``data_version`` names the state of the examples.
    """

    root_uri: str
    campaign_id: str
    run_date: date
    data_version: str
    section: ScoringConfig
    target_ids: tuple[str, ...]


@contextmanager
def scored(
    request: Request, examples: DataFrame, users: DataFrame, before: DataFrame | None, folder: Path
) -> Iterator[tuple[DataFrame, dict[str, Any]]]:
    """Score all users with the bundle in ``folder``, pass the gates, lend the rows and the run's facts.

    ``before``: the campaign's last predictions of an earlier day. The facts are those of its own target. The
    parts are removed when the block ends well, and where a gate is closed: scored again they would be the
    same.

    Raises:
        ConfigError: the model's vocabulary is not the table's, or the bundle is damaged.
        DataError: a gate is closed or the examples are malformed.
        InfraError: a worker failed; what is finished stays for the next run.
    """
    spark = examples.sparkSession
    shipped = shipping.ship_bundle(spark, folder)
    gates.check_vocabulary(examples, shipped)
    loads = spark.sparkContext.accumulator(0)
    rows_before = spark.conf.get(_BATCH_ROWS)
    spark.conf.set(_BATCH_ROWS, str(request.section.arrow_batch_rows))
    started = perf_counter()
    try:
        place, num_parts = _score_parts(request, examples, users.count(), shipped, loads)
        schema = tables.struct_type(schemas.TABLES["predictions"].columns)
        uris = [storage.spark_uri(_part(place, number)) for number in range(num_parts)]
        predictions = spark.read.schema(schema).parquet(*uris)
        seconds = perf_counter() - started
        try:
            facts = _checked(request, predictions, users, before, shipped.base_rate)
        except DataError:
            storage.remove_folder(_parts_of(request))
            raise
        facts |= {
            "model_version": shipped.model_version,
            "kind": shipped.kind,
            "num_parts": num_parts,
            "target_ids": list(request.target_ids),
            "num_scores": facts["num_users"] * len(request.target_ids),
            "users_per_second": round(facts["num_users"] / seconds, 1),
            "bundle_loads": loads.value,
        }
        yield predictions, facts
        storage.remove_folder(_parts_of(request))
    except failures.SPARK_ERRORS as error:  # which, depends on where in its task the worker's error is met
        raise _as_ours(error, request) from error
    finally:
        spark.conf.set(_BATCH_ROWS, str(rows_before))


def _checked(
    request: Request,
    predictions: DataFrame,
    users: DataFrame,
    before: DataFrame | None,
    base_rate: float | None,
) -> dict[str, Any]:
    """The gates of each target; returns the facts of the campaign's own.

    Raises:
        DataError: a gate is closed; the message names the target.
    """
    found = []
    for target_id in request.target_ids:
        is_of = F.col("target_id") == target_id
        rows, earlier = predictions.where(is_of), None if before is None else before.where(is_of)
        if earlier is not None and earlier.isEmpty():  # a target that is new to the campaign
            earlier = None
        try:
            facts = gates.check_predictions(rows, users)
            found.append(facts | gates.check_drift(rows, earlier, base_rate, request.section))
        except DataError as error:
            if len(request.target_ids) == 1:
                raise
            raise DataError(
                f"target {target_id} of campaign {request.campaign_id}: {error} (build_examples needs "
                f"--campaign {','.join(request.target_ids)})"
            ) from error
    return found[0]


def last_predictions(predictions: DataFrame, campaign_id: str, run_date: date) -> DataFrame | None:
    """The campaign's rows of the newest day before the run date; None where there is none."""
    earlier = predictions.where((F.col("campaign_id") == campaign_id) & (F.col("run_date") < F.lit(run_date)))
    newest = earlier.agg(F.max("run_date")).collect()[0][0]
    return None if newest is None else earlier.where(F.col("run_date") == F.lit(newest))


def _score_parts(
    request: Request,
    examples: DataFrame,
    num_users: int,
    shipped: shipping.ShippedBundle,
    loads: "Accumulator[int]",
) -> tuple[str, int]:
    """Write every part that is not there yet; returns where they lie, and their number."""
    section = request.section
    num_parts = max(1, -(-num_users // section.part_users))
    num_tasks = section.num_tasks(-(-num_users // num_parts))
    targets = ",".join(request.target_ids)
    examined = f"{request.data_version} {shipped.sha256} {num_parts}"
    # Parts scored in other chunks would differ in their last bits.
    asked = f"{targets} {examined} {section.arrow_batch_rows} {section.chunk_rows}"
    place = storage.join(_parts_of(request), storage.sha256(asked.encode())[:16])
    started, num_new = perf_counter(), 0
    for number in range(num_parts):
        uri = _part(place, number)
        if storage.exists(storage.join(uri, "_SUCCESS")):
            log.info("score campaign %s: part %d of %d is there", request.campaign_id, number + 1, num_parts)
            continue
        rows = examples
        if num_parts > 1:
            rows = examples.where(F.pmod(F.xxhash64("user_id"), F.lit(num_parts)) == number)
        frame = score_users(
            rows, shipped, request.target_ids, request.run_date, section.chunk_rows, num_tasks, loads
        )
        frame = frame.withColumn("campaign_id", F.lit(request.campaign_id))
        frame.write.mode("overwrite").parquet(storage.spark_uri(uri))
        num_new += 1
        speed = num_new * num_users / num_parts / (perf_counter() - started)
        log.info(
            "score campaign %s: part %d of %d, %.0f users/s, about %.0f s left",
            request.campaign_id,
            number + 1,
            num_parts,
            speed,
            (num_parts - number - 1) * num_users / num_parts / speed if speed else 0.0,
        )
        faults.fire(request.root_uri, "score", "part", str(number))
    return place, num_parts


def _parts_of(request: Request) -> str:
    return storage.join(request.root_uri, *PARTS, f"{request.campaign_id}_{request.run_date}")


def _part(place: str, number: int) -> str:
    return storage.join(place, f"part-{number:05d}")


def _as_ours(error: Exception, request: Request) -> CouponflowError:
    """The error that a worker raised, as the class it had there."""
    where = f"campaign {request.campaign_id}, {request.run_date}"
    found = _OUR_ERROR.search(str(error))
    if found:
        kinds: dict[str, type[CouponflowError]] = {"ConfigError": ConfigError, "DataError": DataError}
        return kinds.get(found[1], InfraError)(f"{where}: {found[2].strip()}")
    return InfraError(f"{where}: a worker failed ({failures.first_line(error)}); run again")
