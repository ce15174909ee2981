"""Delivered files as Arrow tables: positions, broken records, drift, pseudonyms. No JVM."""

import codecs
import hashlib
import hmac
import io
import json
import math
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from couponflow.dates import DateRange
from couponflow.errors import ConfigError, DataError
from couponflow.lake import contracts, erased
from couponflow.sections import EventsConfig
from couponflow.sequences import coercion, feeds, records

DAY = date(2024, 1, 10)
KEY = records.PseudonymKey("v1", b"0123456789abcdef")


def order(**over: Any) -> dict[str, Any]:
    base = {"order_id": "o1", "user_id": "u1", "order_time": "2024-01-10T08:00:00Z", "total_amount": 2.5}
    return base | {"shop_id": "s1", "order_status": None, "status_time": None} | over


def lines(*rows: Any) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


def parse(
    content: bytes, name: str = "a.jsonl", feed: str = "orders", key: Any = None
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = records.parse_file(
        records.RawFile(DAY, name, name), content, feed, key
    ).to_pylist()
    return found


def test_the_fast_and_the_patient_path_read_the_same_rows() -> None:
    rows = [order(order_id=f"o{n}", total_amount=5.55e-17 * n, shop_id=None, extra=n) for n in range(5)]
    rows.append(order(order_time="2024-01-10T08:00:00.123456+01:00"))
    fast = parse(lines(*rows))
    assert fast == [row for row in parse(lines(*rows, b"{broken")) if not row["_corrupt"]]
    assert fast[4]["total_amount"] == 5.55e-17 * 4
    assert fast[5]["order_time"] == datetime(2024, 1, 10, 7, 0, 0, 123456, tzinfo=UTC)
    assert [row["row_number"] for row in fast] == list(range(6))


def test_a_broken_record_is_flagged_and_its_neighbours_keep_their_positions() -> None:
    bad = [
        b'{"order_id": "cut',
        b"null",
        b"[1]",
        b'{"order_id": "\xff\xfe"}',
        b'{"order_id": "\\ud800"}',
        b"[" * 100_000,
        json.dumps(order(order_id="x" * 20_000)).encode(),
        json.dumps(order(total_amount="2.5")).encode(),
    ]
    found = parse(lines(order(), b"", *bad, order(order_id="o2")))
    assert [row["_corrupt"] for row in found] == [False, *[True] * len(bad), False]
    assert [row["row_number"] for row in found] == [0, *range(2, 3 + len(bad))]
    assert found[-1]["order_id"] == "o2"
    assert {row["source_file"] for row in found} == {"a.jsonl"}


@pytest.mark.parametrize("bad", [b"null", json.dumps(order(order_id="x" * 20_000)).encode()])
def test_what_the_fast_path_would_let_through_is_flagged_too(bad: bytes) -> None:
    assert [row["_corrupt"] for row in parse(lines(order(), bad))] == [False, True]


def test_an_unreadable_time_is_null_and_not_corrupt() -> None:
    found = parse(lines(order(order_time="yesterday"), order(order_time=1704873600000)))
    assert [(row["order_time"], row["_corrupt"]) for row in found] == [(None, False)] * 2


def test_not_a_number_is_read_and_an_empty_file_has_no_rows() -> None:
    assert math.isnan(parse(b'{"total_amount": NaN}\n')[0]["total_amount"])
    assert parse(b"") == []


def test_maps_and_nested_coupons_are_read() -> None:
    user = {"user_id": "u1", "has_attributes": True, "attributes": {"age": "45-54", "income": None}}
    assert parse(lines(user), feed="users")[0]["attributes"] == [("age", "45-54"), ("income", None)]
    coupons = [{"coupon_id": "k", "category_id": None, "item_ids": ["i1", "i2"]}]
    row = {"campaign_id": "1", "campaign_type": "A", "start_date": "2024-01-01", "coupons": coupons}
    found = parse(lines(row | {"end_date": "2024-02-30"}), feed="campaigns")[0]
    assert (found["coupons"], found["start_date"], found["end_date"]) == (coupons, date(2024, 1, 1), None)
    assert parse(lines(row | {"coupons": [{"item_ids": "i1"}]}), feed="campaigns")[0]["_corrupt"]


def test_csv_and_parquet_give_the_rows_of_json() -> None:
    rows = [order(), order(order_id="o2", shop_id=None)]
    head = list(rows[0])
    text = "\n".join([",".join(head), *(",".join(str(r[n] or "") for n in head) for r in rows)]) + "\n"
    buffer = io.BytesIO()
    when = datetime(2024, 1, 10, 8, tzinfo=UTC)
    pq.write_table(pa.Table.from_pylist([r | {"order_time": when} for r in rows]), buffer)
    wanted = [row | {"source_file": None} for row in parse(lines(*rows))]
    for content, name in ((text.encode(), "a.csv"), (buffer.getvalue(), "a.parquet")):
        assert [row | {"source_file": None} for row in parse(content, name)] == wanted


HEAD = b"order_id,user_id,order_time,total_amount,shop_id,order_status,status_time\n"


def csv_line(order_id: str) -> bytes:
    return f"{order_id},u1,2024-01-10T08:00:00Z,2.5,s1,,\n".encode("latin-1")


def outcome(content: bytes, name: str = "a.csv") -> list[tuple[int, str | None, bool]]:
    return [(row["row_number"], row["order_id"], row["_corrupt"]) for row in parse(content, name)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_csv_row_is_its_header_and_what_is_no_row_is_flagged_line_by_line(newline: bytes) -> None:
    good = [csv_line('"two\nlines"'), b"\n", csv_line('"a ""b"", c"')]
    bad = [b"o3,u1\n", csv_line("o4,more"), csv_line("caf\xe9"), csv_line('"o5"x')]
    swallowed = [csv_line("o7"), b'o8,"u1\n', *[csv_line("o9")] * 5_000]  # longer than a cell may be
    content = codecs.BOM_UTF8 + b"".join([HEAD, *good, *bad, *swallowed]).replace(b"\n", newline)
    found = outcome(content)
    lines = f"two{newline.decode()}lines"
    assert found[:2] == [(0, lines, False), (2, 'a "b", c', False)]  # a blank line keeps its place
    assert found[2:7] == [*[(n, None, True) for n in range(3, 7)], (7, "o7", False)]
    every = [0, *range(2, 8 + 5_001)]  # every swallowed line is a row
    assert [number for number, _, _ in found] == every
    assert found[7][1:] == (None, True)
    assert found[-1][1:] == ("o9", False), "the reader must recover after a refused row"
    assert outcome(HEAD + csv_line("o1") + b'o2,"u1\n' + csv_line("o3"))[1:] == [
        (1, None, True),
        (2, None, True),
    ]
    assert outcome(HEAD) == outcome(b"") == []


def test_a_parquet_row_without_any_value_is_blank_and_keeps_its_place() -> None:
    rows = [order(), dict.fromkeys(order()), order(order_id="o3"), dict.fromkeys(order())]
    when = {"order_time": datetime(2024, 1, 10, 8, tzinfo=UTC)}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row | when if row["order_id"] else row for row in rows]), buffer)
    assert outcome(buffer.getvalue(), "a.parquet") == [(0, "o1", False), (2, "o3", False)]


@pytest.mark.parametrize("extra", [b"", b"{broken\n"])
def test_marks_line_ends_blank_lines_and_repeated_keys_of_json_lines(extra: bytes) -> None:
    line = json.dumps(order()).encode()
    twice = b'{"order_id": "first", ' + json.dumps(order(order_id="last")).encode()[1:]
    content = codecs.BOM_UTF8 + line + b"\r\n" + twice + b"\r\n\r\n" + line + b"\r\n" + extra
    assert outcome(content, "a.jsonl")[:3] == [(0, "o1", False), (1, "last", False), (3, "o1", False)]
    assert outcome(b"[" + line + b"," + line + b"]\n" + line, "a.jsonl") == [
        (0, None, True),
        (1, "o1", False),
    ]


def test_a_file_with_a_byte_order_mark_is_no_drift_and_a_repeated_header_is(tmp_path: Path) -> None:
    land(tmp_path, "2024-01-10", codecs.BOM_UTF8 + HEAD + csv_line("o1"), "a.csv")
    land(tmp_path, "2024-01-10", codecs.BOM_UTF8 + lines(order()), "a.jsonl")
    assert find(tmp_path).new_columns == ()
    land(tmp_path, "2024-01-10", HEAD.replace(b"shop_id", b"user_id") + csv_line("o1"), "b.csv")
    with pytest.raises(DataError, match=r"b\.csv: expected csv records, found none"):
        find(tmp_path)


def test_pseudonyms_are_hmac_sha256_and_leave_empty_ids_to_validation() -> None:
    found = parse(
        lines(order(), order(user_id="ü"), order(user_id=""), order(user_id=None), order()), key=KEY
    )
    u1, umlaut = (hmac.new(KEY.secret, name.encode(), hashlib.sha256).hexdigest() for name in ("u1", "ü"))
    assert [row["user_id"] for row in found] == [u1, umlaut, "", None, u1]
    assert records.pseudonym("u1", KEY) == u1
    assert "0123456789" not in repr(KEY)


def test_the_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EventsConfig(key_variable="SOME_KEY", key_version="v7")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"SOME_KEY .* set it"):
        feeds.load_key(settings)
    monkeypatch.setenv("SOME_KEY", "k" * 16)
    assert feeds.load_key(settings) == records.PseudonymKey("v7", b"k" * 16)
    assert feeds.load_key(EventsConfig(pseudonymise=False)) is None


def land(root: Path, day: str, content: bytes, name: str = "a.jsonl", feed: str = "orders") -> None:
    folder = root / "raw" / feed / f"ingest_date={day}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def find(
    root: Path, dates: str = "2024-01-10", closed: tuple[date, ...] = (), feed: str = "orders"
) -> feeds.Delivery:
    return feeds.find_delivery(str(root), feed, DateRange.parse(dates), closed)


def test_a_missing_day_stops_and_a_closed_or_empty_one_does_not(tmp_path: Path) -> None:
    land(tmp_path, "2024-01-10", lines(order()))
    land(tmp_path, "2024-01-12", b"")
    with pytest.raises(DataError, match=r"feed orders has no delivery for 2024-01-11 .*; land raw/orders"):
        find(tmp_path, "2024-01-10:2024-01-12")
    delivery = find(tmp_path, "2024-01-10:2024-01-12", (date(2024, 1, 11),))
    assert [str(file.ingest_date) for file in delivery.files] == ["2024-01-10", "2024-01-12"]
    assert find(tmp_path, "2024-01-10:2024-01-12", feed="sends").files == ()


def test_a_new_column_is_named_and_a_hidden_file_ignored(tmp_path: Path) -> None:
    land(tmp_path, "2024-01-10", lines(order(), order(colour="red")))
    land(tmp_path, "2024-01-10", b"junk", "_SUCCESS")
    delivery = find(tmp_path)
    assert (delivery.new_columns, len(delivery.files)) == (("colour",), 1)


def test_null_values_and_one_bad_record_are_no_drift(tmp_path: Path) -> None:
    rows = (order(shop_id=None), order(total_amount="x"), b"{", order(user_id=None))
    land(tmp_path, "2024-01-10", lines(*rows))
    assert find(tmp_path).new_columns == ()


def test_a_file_without_one_readable_record_stops(tmp_path: Path) -> None:
    land(tmp_path, "2024-01-10", b"\x00\xff{\n[\n", "part-7.jsonl")
    with pytest.raises(DataError, match=r"part-7\.jsonl: expected jsonl records, found none"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [{k: v for k, v in order().items() if k != "user_id"}] * 2,
            "user_id: expected string, found no such",
        ),
        ([{k: v for k, v in order().items() if k != "shop_id"}], "shop_id: expected string, found no such"),
        ([order(total_amount="2.5")] * 2, "total_amount: expected double, found string"),
        ([order(order_time=1704873600000)] * 2, "order_time: expected timestamp as iso, found number"),
        ([order(shop_id=7)], "shop_id: expected string, found number"),
    ],
)
def test_a_missing_or_retyped_column_stops_and_names_the_file(
    tmp_path: Path, rows: list[dict[str, Any]], text: str
) -> None:
    land(tmp_path, "2024-01-10", lines(*rows), "part-7.jsonl")
    with pytest.raises(DataError, match=rf"feed orders, file .*part-7\.jsonl: column {text}") as caught:
        find(tmp_path)
    assert caught.value.exit_code == 3


def test_a_parquet_file_of_another_type_or_cut_short_stops(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([order(total_amount="much")]), buffer)
    land(tmp_path, "2024-01-10", buffer.getvalue(), "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column total_amount: expected double, found string"):
        find(tmp_path)
    land(tmp_path, "2024-01-10", buffer.getvalue()[:-20], "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: not readable as Parquet"):
        find(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "magic", "footer", "text"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    whole = parquet(shop_id=pa.array(["s1"] * 1_000))
    content = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "magic": b"ORC1" + whole[4:-4] + b"ORC1",
        "footer": whole[:-200] + bytes(b ^ 0xFF for b in whole[-200:-8]) + whole[-8:],
        "text": lines(order()),
    }[damage]
    land(tmp_path, "2024-01-10", content, "part-3.parquet")
    with pytest.raises(
        DataError, match=r"part-3\.parquet: not readable as Parquet .*; deliver the file again"
    ):
        find(tmp_path)


def test_columns_in_another_order_and_columns_of_nulls_are_no_drift(tmp_path: Path) -> None:
    row = order(shop_id=None, order_status=None)
    land(tmp_path, "2024-01-10", lines(dict(reversed(row.items()))), "a.jsonl")
    land(tmp_path, "2024-01-10", parquet(shop_id=pa.nulls(1)), "a.parquet")
    assert find(tmp_path).new_columns == ()
    assert parse(lines(dict(reversed(row.items())))) == parse(lines(row))


def test_an_unknown_kind_of_file_stops(tmp_path: Path) -> None:
    land(tmp_path, "2024-01-10", b"", "a.xlsx")
    with pytest.raises(DataError, match=r"a\.xlsx: unknown kind"):
        find(tmp_path)


def parquet(**columns: pa.Array) -> bytes:
    target = io.BytesIO()
    size = max(len(column) for column in columns.values())
    texts = {"order_id": pa.array([f"o{n}" for n in range(size)]), "user_id": pa.array(["u1"] * size)}
    times = {"order_time": pa.array([datetime(2024, 1, 10, 8, tzinfo=UTC)] * size)}
    amounts = {"total_amount": pa.array([2.5] * size)}
    rest = {name: pa.nulls(size) for name in ("shop_id", "order_status", "status_time")}
    pq.write_table(pa.table(texts | times | amounts | rest | columns), target)
    return target.getvalue()


def test_a_bad_value_of_a_parquet_file_is_one_bad_row() -> None:
    rows = parse(parquet(shop_id=pa.array([b"ok", b"\xff\xfe", b"x" * 10_000_000, None, b""])), "a.parquet")
    assert [row["_corrupt"] for row in rows] == [False, True, True, False, False]
    assert [row["shop_id"] for row in rows] == ["ok", None, None, None, ""]
    coded = pa.array(["s1", None, "s1"]).dictionary_encode()
    assert [r["shop_id"] for r in parse(parquet(shop_id=coded), "a.parquet")] == ["s1", None, "s1"]
    texts = pa.array(["2024-01-10T09:00:00+01:00", "noon", None])
    found = parse(parquet(order_time=texts), "a.parquet")
    assert [(r["order_time"], r["_corrupt"]) for r in found] == [
        (datetime(2024, 1, 10, 8, tzinfo=UTC), False),
        (None, False),
        (None, False),
    ]
    nanos = pa.array([1_704_873_600_000_000_001], pa.timestamp("ns"))
    assert parse(parquet(order_time=nanos), "a.parquet")[0]["order_time"] == datetime(
        2024, 1, 10, 8, tzinfo=UTC
    )
    whole = pa.array([4], pa.int64())
    assert parse(parquet(total_amount=whole), "a.parquet")[0]["total_amount"] == 4.0


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"user_id": pa.array([7])}, "user_id: expected string, found int64"),
        ({"total_amount": pa.array(["2.5"])}, "total_amount: expected double, found string"),
        ({"order_time": pa.array([1_704_873_600])}, "order_time: expected timestamp as iso, found int64"),
    ],
)
def test_a_parquet_column_of_another_type_stops(tmp_path: Path, column: Any, words: str) -> None:
    land(tmp_path, "2024-01-10", parquet(**column), "a.parquet")
    with pytest.raises(DataError, match=words):
        find(tmp_path)


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("extra", [[], [b"{broken"]], ids=["fast", "patient"])
def test_of_an_erased_person_the_position_is_left(tmp_path: Path, key: Any, extra: list[bytes]) -> None:
    ids = [records.pseudonym(name, key) for name in ("gone", "cookie", "visitor")]
    listed = erased.add(str(tmp_path), [ids[0], ids[1], f"visitor:{ids[2]}"])
    named = [("u1", None), ("gone", None), ("u1", "cookie"), (None, "visitor"), ("gone", "x"), (None, None)]
    named.append(("u1", "visitor"))  # a member on the device of somebody who was erased
    rows = [contracts.FEEDS["events"].example | {"user_id": u, "visitor_id": v} for u, v in named]
    file = records.RawFile(DAY, "a.jsonl", "a.jsonl")
    content = lines(*rows, *extra)
    table = records.parse_file(file, content, "events", key, erased=listed)
    found = table.to_pylist()[:7]
    assert [row["_erased"] for row in found] == [False, True, True, True, True, False, False]
    assert [row["row_number"] for row in found] == list(range(7))
    names = [column.name for column in contracts.FEEDS["events"].columns]
    assert all(row[name] is None for row in found if row["_erased"] for name in names)
    assert found[0] == records.parse_file(file, content, "events", key).to_pylist()[0]
    for feed in contracts.FEEDS:  # every column type can be blanked
        example = contracts.FEEDS[feed].example | {"user_id": "gone"}
        row = records.parse_file(file, lines(example), feed, key, erased=listed).to_pylist()[0]
        assert row["_erased"] == ("user_id" in contracts.FEEDS[feed].example), feed


def test_a_day_is_spread_by_the_bytes_of_its_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "_TASK_BYTES", 1_000)
    land(tmp_path, "2024-01-10", lines(order()))
    land(tmp_path, "2024-01-11", lines(*[order()] * 20), "a.jsonl")
    land(tmp_path, "2024-01-11", lines(order()), "b.jsonl")
    size = len(lines(*[order()] * 21))
    files = find(tmp_path, "2024-01-10:2024-01-11").files
    assert [file.spread for file in files] == [1, 1 + size // 1_000, 1 + size // 1_000]


def test_every_feed_has_arrow_types() -> None:
    for feed in contracts.FEEDS.values():
        assert coercion.arrow_schema(feed.columns).names == [column.name for column in feed.columns]
