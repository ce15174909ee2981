"""The rows of a list: the recipients of a version who may still be mailed, and the seed accounts. Ids only.

Seed accounts are mailed with every list, to see what recipients see. They stand at its end under ``is_seed``,
are in no ledger and no recipient count; an account that the ledger knows, in whatever arm, is no seed.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign.choice import assignment
from couponflow.errors import DataError
from couponflow.lake.erased import TOMBSTONE

COLUMNS = ("user_id", "campaign_id", "version", "coupon_id", "rank", "is_seed")


@dataclass(frozen=True)
class Recipients:
    """The rows of a list, in the order of choice; how many of the audience have withdrawn since; seeds."""

    rows: Sequence[tuple[str, str, str, str | None, int]]
    num_withdrawn: int
    seeds: Sequence[str] = ()


def recipients(audience: DataFrame, ledger: DataFrame, consent: DataFrame) -> Recipients:
    """The users of a version who may still be mailed, by rank.

    Inputs: ``audience`` and ``ledger`` rows of the one version; ``consent`` of
    ``eligibility.consent_status``. A user who is not granted any more, or has no record, is left out and
    counted. The list is the deliverable, so it meets on the driver, streamed by partition.

    Raises:
        DataError: a user of the audience is not in the ledger as mailed (holdout, control, unknown), or the
            ledger mails someone whom the audience lacks.
    """
    named = ledger.where(~F.col("user_id").startswith(TOMBSTONE))  # an erased person is on no list
    arms = named.select("user_id", "arm").distinct()
    may_mail = consent.where(F.col("consent_reason").isNull()).select(
        "user_id", F.lit(True).alias("may_mail")
    )
    joined = (
        audience.join(arms, "user_id", "full")
        .where(F.col("rank").isNotNull() | F.col("arm").isin(*assignment.MAILED))
        .join(may_mail, "user_id", "left")
        .select("user_id", "campaign_id", "version", "coupon_id", "rank", "arm", "may_mail")
        .orderBy("rank", "user_id")
    )
    rows, num_withdrawn, seen = [], 0, set()
    for row in joined.toLocalIterator():
        if row["arm"] not in assignment.MAILED or row["rank"] is None:
            raise DataError(
                f"audience and ledger disagree: a user with arm {row['arm']} and rank {row['rank']}; "
                "nothing handed over, run select_audience again"
            )
        if row["user_id"] in seen:
            raise DataError("audience: a user stands in it twice; run select_audience again")
        seen.add(row["user_id"])
        if row["may_mail"]:
            rows.append(tuple(row[name] for name in COLUMNS[:-1]))
        else:
            num_withdrawn += 1
    return Recipients(rows, num_withdrawn)


def seeds_of(
    user_ids: Sequence[str], ledger: DataFrame, consent: DataFrame, is_erased: Callable[[str], bool]
) -> list[str]:
    """The seed accounts of a version, sorted: those that its ledger does not know, and nobody has to spare.

    An account in the ledger is what the ledger says, recipient or withheld. One that refuses mail, or was
    erased, is left out as well.
    """
    if not user_ids:
        return []
    asked = F.col("user_id").isin(*user_ids)
    refusing = consent.where(asked & F.col("consent_reason").isNotNull()).select("user_id")
    known = ledger.where(asked).select("user_id").union(refusing).distinct().collect()
    left_out = {row["user_id"] for row in known} | {user for user in user_ids if is_erased(user)}
    return sorted(set(user_ids) - left_out)


def render(rows: Iterable[Sequence[Any]], seeds: Iterable[Sequence[Any]] = ()) -> bytes:
    """The list as CSV: header, recipients, seeds, ``\\n`` line ends, an absent coupon or rank is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*row, "false") for row in rows)
    writer.writerows((*row, "true") for row in seeds)
    return text.getvalue().encode()


def check_ids(found: Recipients) -> None:
    """Ids only, each once.

    Raises:
        DataError: see above.
    """
    mailed = {row[0] for row in found.rows}
    ids = [*found.seeds, *(text for row in found.rows for text in (row[0], row[3] or ""))]
    if any("@" in text for text in ids):
        raise DataError("audience: an id holds '@'; mail addresses must not enter, nothing handed over")
    if mailed & set(found.seeds) or len(set(found.seeds)) < len(found.seeds):
        raise DataError(
            "audience: a seed account is a recipient, or a seed twice; correct export.seed_user_ids"
        )
