"""Vocabularies: stable names and ids, PAD never issued, OOV for everything else."""

import random
from collections import Counter
from datetime import date, timedelta
from typing import Any

import pytest
from builders import make_event, make_frame
from oracles import xxhash64
from pyspark.sql import DataFrame, SparkSession

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import Run
from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts, runs, tables
from couponflow.sequences import vocabulary
from jobs import build_vocabulary

DATES = DateRange(date(2024, 1, 1), date(2024, 2, 1))


def built(events: DataFrame, min_count: int = 2, dates: DateRange = DATES) -> list[tuple[object, ...]]:
    return sorted(
        tuple(row) for row in vocabulary.build(vocabulary.count_values(events), min_count, dates).collect()
    )


def some_events(spark: SparkSession) -> DataFrame:
    items = ["b", "b", "a", "a", "a", "rare", None, "<PAD>", "<PAD>", "<OOV>", "<OOV>"]
    kinds = ["purchase"] * 10 + ["search"]
    rows = [
        make_event("u", n, event_id=str(n), item_id=item, event_type=kind, category_id=f"c{n % 2}")
        for n, (item, kind) in enumerate(zip(items, kinds, strict=True))
    ]
    return make_frame(spark, "events", rows)


def test_a_version_is_a_function_of_range_count_and_values(spark: SparkSession) -> None:
    events = some_events(spark)
    rows = built(events)
    index = {(field, value): number for _, field, value, number, _ in rows}
    counts = {(field, value): number for _, field, value, _, number in rows}
    assert {v: n for (f, v), n in index.items() if f == "item"} == {"<PAD>": 0, "<OOV>": 1, "a": 2, "b": 3}
    assert counts["item", "a"], counts["item", "<OOV>"] == (3, 5)
    assert {v: n for (f, v), n in index.items() if f == "category"} == {
        "<PAD>": 0,
        "<OOV>": 1,
        "c0": 2,
        "c1": 3,
    }
    fixed = {name: number for number, name in enumerate(layouts.EVENT_TYPES, 2)}
    assert {v: n for (f, v), n in index.items() if f == "event_type"} == {"<PAD>": 0, "<OOV>": 1, **fixed}
    assert built(events.repartition(5).orderBy("price")) == rows
    versions = {rows[0][0], built(events, min_count=1)[0][0]}
    versions.add(built(events, dates=DateRange(DATES.start, date(2024, 2, 2)))[0][0])
    versions.add(built(events.where("item_id != 'b'"))[0][0])
    assert len(versions) == 4


def test_encode_gives_every_value_an_id_and_never_zero(spark: SparkSession) -> None:
    counts = vocabulary.count_values(some_events(spark))
    terms = vocabulary.build(counts, 2, DATES)
    values = ["a", "b", "rare", "never seen", "<PAD>", "<OOV>", None]
    rows = [make_event("u", n, event_id=str(n), item_id=value) for n, value in enumerate(values)]
    rows.append(make_event("u", 99, event_id="99", event_type="mail_click", category_id=None, shop_id="new"))
    encoded = vocabulary.encode(make_frame(spark, "events", rows), terms).collect()
    found = {int(row["event_id"]): row for row in encoded}
    assert [found[n]["item_index"] for n in range(len(values))] == [2, 3, 1, 1, 1, 1, 1]
    last = found[99]
    assert (last["category_index"], last["shop_index"], last["event_type_index"]) == (1, 1, 8)
    assert len(encoded) == len(rows)
    # Items: <PAD> twice, <OOV> twice and one rare of ten that have one.
    assert vocabulary.oov_shares(terms) == {"item": 0.5, "category": 0.0, "shop": 0.0, "event_type": 0.0}


def test_the_pointer_names_the_version_in_use(spark: SparkSession, root_uri: str) -> None:
    with pytest.raises(DataError, match="run build_vocabulary"):
        vocabulary.current(root_uri)
    for version in ("v1", "v2", "v2"):
        vocabulary.publish(root_uri, vocabulary.Current(version, str(DATES), "f"))
        assert vocabulary.current(root_uri) == vocabulary.Current(version, str(DATES), "f")


def of_items(spark: SparkSession, *items: str | None) -> DataFrame:
    """Counts of events that carry these items, shop ``s-<item>`` each."""
    rows = [
        make_event("u", n, event_id=str(n), item_id=item, shop_id=f"s-{item}") for n, item in enumerate(items)
    ]
    return vocabulary.count_values(make_frame(spark, "events", rows))


def index_of(rows: DataFrame, field: str = "item") -> dict[str, int]:
    return {row["value"]: row["index"] for row in rows.collect() if row["field"] == field}


def later(number: int) -> DateRange:
    return DateRange(date(2024, 2, number), date(2024, 2, number + 1))


@pytest.mark.parametrize("buckets", [0, 3])
def test_an_extension_appends_and_keeps_every_id(spark: SparkSession, buckets: int) -> None:
    parent = vocabulary.build(of_items(spark, "m", "m", "b", "b", "x"), 2, DATES, buckets).cache()
    counts = of_items(spark, "a", "a", "z", "z", "x", "x", "b", "rare", "<BUCKET 7>", "<BUCKET 7>").cache()
    child = vocabulary.build(counts, 2, later(1), buckets, parent).cache()
    old, new = index_of(parent), index_of(child)
    first = 2 + buckets
    assert {value: n for value, n in old.items() if not value.startswith("<")} == {"b": first, "m": first + 1}
    assert {value: n for value, n in new.items() if value not in old} == {
        "a": first + 2,
        "x": first + 3,
        "z": first + 4,
    }
    assert {value: new[value] for value in old} == old
    assert index_of(child, "event_type") == index_of(parent, "event_type")
    assert index_of(child, "shop").keys() >= index_of(parent, "shop").keys()
    grown = {field: vocabulary.sizes(rows)[field] for rows in (child,) for field in ("item", "shop")}
    assert grown == {"item": first + 5, "shop": 2 + 7}  # m b x, then <BUCKET 7> a rare z
    counted = {(r["field"], r["value"]): r["num_events"] for r in child.collect()}
    assert (counted["item", "m"], counted["item", "b"], counted["item", "a"]) == (0, 1, 2)
    lost = sum(n for (f, v), n in counted.items() if f == "item" and v.startswith("<"))
    assert lost == 3  # rare, and a value that looks like a bucket
    assert counted["item", "<OOV>"] == (0 if buckets else 3)
    name = vocabulary.version_of(child)
    name = vocabulary.version_of(child)
    if not buckets:
        others = {
            vocabulary.version_of(vocabulary.build(counts, 2, later(1))),
            vocabulary.version_of(vocabulary.build(counts, 2, later(2), 0, parent)),
            vocabulary.version_of(parent),
        }
        assert len(others | {name}) == 4
    with pytest.raises(ConfigError, match=f"hash_buckets = 9: expected {buckets}"):
        vocabulary.build(counts, 2, later(1), 9, parent)


def test_values_without_an_id_share_buckets_as_an_oracle_hashes_them(spark: SparkSession) -> None:
    rng = random.Random(2)
    alphabet = "abcdefghij-ü日 0"
    rare = ["".join(rng.choices(alphabet, k=rng.randint(0, 70))) for _ in range(500)]
    values = ["own", None, "<PAD>", "<OOV>", "<BUCKET 0>", *rare]
    rows = [
        make_event("u", n, event_id=str(n), item_id=value, shop_id="new") for n, value in enumerate(values)
    ]
    frame = make_frame(spark, "events", rows)
    for buckets in (1, 64):
        counts = of_items(spark, "own", "own").cache()
        terms = vocabulary.build(counts, 2, DATES, buckets).cache()
        grown = vocabulary.build(of_items(spark, "next", "next"), 2, later(1), buckets, terms)
        first, second = (
            {int(row["event_id"]): row for row in vocabulary.encode(frame, used).collect()}
            for used in (terms, grown)
        )
        for number, value in enumerate(values):
            expected = 1 if value is None else 2 + xxhash64(value) % buckets
            assert first[number]["item_index"] == (2 + buckets if value == "own" else expected)
            assert first[number]["shop_index"] == 1, "only items have buckets"
            assert second[number]["item_index"] == first[number]["item_index"]
        used = Counter(row["item_index"] for row in first.values())
        assert len(used) == buckets + 2
        assert vocabulary.num_buckets(grown) == buckets
    assert len(first) == len(rows)


def test_the_oov_share_counts_named_values_and_is_limited(spark: SparkSession) -> None:
    terms = vocabulary.build(of_items(spark, "a", "a"), 2, DATES)
    items = ["a", "a", "new", "newer", None, None, None]
    rows = [make_event("u", n, event_id=str(n), item_id=item, shop_id="s-a") for n, item in enumerate(items)]
    shares = vocabulary.encoded_oov_shares(vocabulary.encode(make_frame(spark, "events", rows), terms))
    assert shares == {"item": 0.5, "category": 0.0, "shop": 0.0, "event_type": 0.0}
    vocabulary.check_oov_shares(shares, 0.5, "v1")
    with pytest.raises(
        DataError, match=r"vocabulary v1, field item: 50.0% .* at most .* 49.0%; run build_vocab"
    ):
        vocabulary.check_oov_shares(shares, 0.49, "v1")
    empty = vocabulary.encode(make_frame(spark, "events", []), terms)
    assert set(vocabulary.encoded_oov_shares(empty).values()) == {0.0}


def deliver(spark: SparkSession, root_uri: str, day: date, ingest: date, *items: str) -> None:
    rows = [
        make_event("u", n, event_id=f"{day}{ingest}{n}", item_id=item, event_date=day, ingest_date=ingest)
        for n, item in enumerate(items)
    ]
    tables.overwrite(make_frame(spark, "events", rows), root_uri, "events", DateRange.day(ingest))


def run_job(spark: SparkSession, config: Config, dates: DateRange, **settings: Any) -> dict[str, Any]:
    section = config.vocabulary.model_copy(update={"min_count": 1} | settings)
    changed = config.model_copy(update={"vocabulary": section})
    job = Run(changed, dates, runs.start("build_vocabulary", str(dates), {}, ""))
    build_vocabulary.run(spark, job)
    return job.facts


def test_the_job_is_stable_over_reruns_late_data_and_extensions(spark: SparkSession, config: Config) -> None:
    root_uri = config.lake.root_uri
    day = [date(2024, 2, 1) + timedelta(days=n) for n in range(5)]
    tables.overwrite(make_frame(spark, "user_days", []), root_uri, "user_days", DateRange.day(day[0]))
    deliver(spark, root_uri, day[0], day[0], "b", "d")
    deliver(spark, root_uri, day[1], day[1], "a", "d")
    deliver(spark, root_uri, day[2], day[2], "c")
    first, second, third = (DateRange.day(d) for d in day[:3])
    root = run_job(spark, config, first, extend=True)
    assert root["parent"] == ""
    child = run_job(spark, config, second, extend=True)
    assert (child["parent"], vocabulary.current(root_uri).version) == (
        root["vocabulary_version"],
        child["vocabulary_version"],
    )
    last = run_job(spark, config, third, extend=True)
    assert last["parent"] == child["vocabulary_version"]
    deliver(spark, root_uri, day[0], day[4], "late", "late too")  # known after the ranges
    for dates, made in ((second, child), (first, root), (third, last)):
        again = run_job(spark, config, dates, extend=True)
        assert (again["vocabulary_version"], again["parent"]) == (made["vocabulary_version"], made["parent"])
        assert vocabulary.current(root_uri).version == last["vocabulary_version"], "newer ids stay in use"
    loaded = index_of(vocabulary.load(spark, root_uri, last["vocabulary_version"]))
    assert loaded == {"<PAD>": 0, "<OOV>": 1, "b": 2, "d": 3, "a": 4, "c": 5}
    assert vocabulary.current(root_uri).parent == child["vocabulary_version"]
    with pytest.raises(ConfigError, match="expected one that starts after 2024-02-03"):
        run_job(spark, config, DateRange(day[0], day[2]), extend=True)
    with pytest.raises(DataError, match="no event of that range"):
        run_job(spark, config, DateRange.day(day[3]), extend=True)
    whole = DateRange(day[0], day[3])
    rebuilt = run_job(spark, config, whole)
    assert rebuilt["parent"] == ""
    assert vocabulary.current(root_uri).version == rebuilt["vocabulary_version"]
    assert index_of(vocabulary.load(spark, root_uri, rebuilt["vocabulary_version"]))["a"] == 2
    assert run_job(spark, config, first)["vocabulary_version"] == root["vocabulary_version"]
    assert vocabulary.current(root_uri).version == root["vocabulary_version"], "a rebuild moves the pointer"
