"""The feed contracts: every example is valid in every kind of file; reasons and mappings are closed lists."""

import csv
import io
import json
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.config import load_config
from couponflow.errors import ConfigError
from couponflow.lake import contracts
from couponflow.mappings import FeedMapping, FeedsConfig
from couponflow.sequences import coercion, records

DAY = date(2024, 1, 10)


def as_file(rows: list[dict[str, Any]], kind: str, feed: str, mapping: FeedMapping) -> bytes:
    """Deliver rows, whose names and types are already the sender's, as one file of a kind."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()})
        return text.getvalue().encode()
    declared = {mapping.delivered(c.name): c for c in contracts.FEEDS[feed].columns}
    columns = []
    for name in rows[0]:
        kind_of = coercion.arrow_type(declared[name])
        if pa.types.is_timestamp(kind_of) and mapping.time_unit != "iso":
            kind_of = pa.int64()
        columns.append(pa.array([coercion.coerce(row[name], kind_of) for row in rows], kind_of))
    target = io.BytesIO()
    pq.write_table(pa.table(columns, names=list(rows[0])), target)
    return target.getvalue()


def parse(content: bytes, kind: str, feed: str, mapping: FeedMapping = records.AS_DECLARED) -> Any:
    file = records.RawFile(DAY, f"a.{kind}", f"a.{kind}")
    return records.parse_file(file, content, feed, None, mapping).to_pylist()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("feed", contracts.FEEDS)
def test_the_example_of_each_feed_is_read_whole_from_each_kind_of_file(feed: str, kind: str) -> None:
    example = contracts.FEEDS[feed].example
    assert list(example) == [column.name for column in contracts.FEEDS[feed].columns]
    (row,) = parse(as_file([example], kind, feed, records.AS_DECLARED), kind, feed)
    assert not row["_corrupt"]
    assert not [name for name in example if row[name] is None]
    assert row == parse(as_file([example], "jsonl", feed, records.AS_DECLARED), "jsonl", feed)[0] | {
        "source_file": f"a.{kind}"
    }


NAMES = FeedMapping(columns={"user_id": "customer_no", "event_time": "ts", "item_id": "user_id"})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("unit", ["iso", "s", "ms"])
def test_a_sender_keeps_his_names_and_his_unit_of_time(kind: str, unit: str, tmp_path: Any) -> None:
    mapping = FeedMapping(columns=NAMES.columns, time_unit=unit)  # type: ignore[arg-type]  # parametrised
    example = contracts.FEEDS["events"].example
    wanted = parse(as_file([example] * 2, "jsonl", "events", records.AS_DECLARED), "jsonl", "events")
    theirs = {mapping.delivered(name): value for name, value in example.items()}
    if unit != "iso":
        per_second = {"s": 1, "ms": 1_000}[unit]
        for name, moment in (("ts", 1_704_909_800.125), ("ingest_time", 1_704_909_802)):
            theirs[name] = int(moment * per_second) if unit == "ms" else int(moment)
    content = as_file([theirs] * 2, kind, "events", mapping)
    found = parse(content, kind, "events", mapping)
    if unit == "s":
        wanted = [row | {"event_time": row["event_time"].replace(microsecond=0)} for row in wanted]
    assert found == [row | {"source_file": f"a.{kind}"} for row in wanted]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    file = records.RawFile(DAY, str(path), path.name)
    assert records.check_drift("events", file, mapping) == set()
    if unit != "iso" and kind != "parquet":  # real timestamps of a Parquet file are unambiguous
        path.write_bytes(as_file([theirs | {"ts": "2024-01-10T18:03:20Z"}] * 2, kind, "events", NAMES))
        with pytest.raises(
            Exception, match=rf"ts \(our event_time\): expected timestamp as {unit}, found str"
        ):
            records.check_drift("events", file, mapping)


@pytest.mark.parametrize("extra", [b"", b"{broken\n"], ids=["fast", "patient"])
def test_times_in_numbers_are_exact_and_a_wrong_unit_never_overflows(extra: bytes) -> None:
    def read(numbers: list[Any], unit: str) -> list[datetime | None]:
        mapping = FeedMapping(time_unit=unit)  # type: ignore[arg-type]  # parametrised
        rows = [contracts.FEEDS["orders"].example | {"order_time": n, "status_time": None} for n in numbers]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode() + extra
        return [row["order_time"] for row in parse(content, "jsonl", "orders", mapping)][: len(numbers)]

    moment = datetime(2024, 1, 10, 18, 3, 20, 125_000, tzinfo=UTC)
    assert read([1_704_909_800.125, 1_704_909_800], "s") == [moment, moment.replace(microsecond=0)]
    assert read([1_704_909_800_125], "ms") == [moment]
    wrong = read([1_704_909_800_125, -1e300, 1e300, 9e18], "s") + read([1_704_909_800], "ms")
    assert all(found is not None and not 2000 <= found.year <= 2098 for found in wrong), wrong
    assert read([float("nan"), float("inf"), None], "s") == [None, None, None]


@pytest.mark.parametrize("bad", [True, "soon", [1], {"s": 1}, 10**400])
def test_what_is_no_number_is_an_unreadable_time_of_one_row(bad: Any) -> None:
    mapping = FeedMapping(time_unit="s")
    rows = [contracts.FEEDS["sends"].example | {"delivered_time": t} for t in (1_704_909_800, bad)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    found = parse(content, "jsonl", "sends", mapping)
    assert [(r["delivered_time"] is None, r["_corrupt"]) for r in found] == [(False, False), (True, False)]


def test_the_config_names_every_feed_and_refuses_unknown_names() -> None:
    assert list(FeedsConfig.model_fields) == list(contracts.FEEDS)
    for override, words in (
        ("feeds.event.time_unit='s'", "feeds.event; did you mean events?"),
        ("feeds.events.columns={user='customer_no'}", "feed events has no column user; its columns are"),
        ("feeds.events.columns={user_id='visitor_id'}", "two columns are delivered as visitor_id"),
        ("feeds.events.columns={user_id=''}", "feeds.events.columns.user_id"),
        ("feeds.events.time_unit='us'", "'iso', 's' or 'ms'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(None, (override,))
    swapped = load_config(None, ("feeds.events.columns={item_id='category_id', category_id='item_id'}",))
    assert swapped.feeds.of("events").delivered("item_id") == "category_id"


def test_reasons_are_unique_and_explained() -> None:
    for feed in contracts.FEEDS.values():
        assert len(set(feed.reasons)) == len(feed.reasons)
        assert all(contracts.meaning(reason) for reason in feed.reasons)
        for column in feed.columns:
            if not column.nullable and column.type == "string" and feed.name != "events":
                assert f"missing_{column.name}" in feed.reasons


def test_the_contract_is_printed_for_people_and_machines() -> None:
    shown = CliRunner().invoke(app, ["check", "--contract", "costs"])
    assert "negative_cost" in shown.stdout
    assert "raw/orders/" not in shown.stdout
    done = CliRunner().invoke(app, ["check", "--contract", "--json"])
    found = {feed["feed"]: feed for feed in json.loads(done.stdout)}
    assert list(found) == list(contracts.FEEDS)
    event_time = next(c for c in found["events"]["columns"] if c["name"] == "event_time")
    assert event_time["example"] == contracts.FEEDS["events"].example["event_time"]
    assert list(found["orders"]["reasons"]) == sorted(contracts.FEEDS["orders"].reasons)
    wrong = CliRunner().invoke(app, ["check", "--contract", "order"])
    assert (wrong.exit_code, "unknown feed 'order'" in wrong.output) == (2, True)
