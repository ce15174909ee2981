"""Vocabularies: stable names and ids, PAD never issued, OOV for everything else."""

from datetime import date

import pytest
from builders import make_event, make_frame
from pyspark.sql import DataFrame, SparkSession

from couponflow.dates import DateRange
from couponflow.errors import DataError
from couponflow.lake import layouts
from couponflow.sequences import vocabulary

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
