"""Erasure: the person is gone everywhere, nobody else's row has changed, and no job brings them back."""

import csv
import io
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import D0, make_frame, make_row, minutes
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from couponflow import erasing, maintenance, pipeline
from couponflow.campaign import erasing as lists
from couponflow.campaign import export
from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.entry import record_run, today
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import (
    contracts,
    erased,
    erasure,
    layouts,
    literals,
    runs,
    schemas,
    storage,
    tables,
    upkeep,
)
from couponflow.sequences import datasets, feeds, records
from couponflow.training import feed, manifests

DAYS = DateRange(D0, D0 + timedelta(days=2))
GONE, STAYS, OTHER = "customer-000017", "customer-000018", "customer-0000171"
SHARED, OWN = "cookie-shared-1", "cookie-own-1"
KEY = "a key of the tests, long enough"


def event(user: str | None, number: int, visitor: str | None = None, **over: Any) -> dict[str, Any]:
    when = f"2024-01-10T0{number % 10}:00:00Z"
    names = {column.name: None for column in contracts.FEEDS["events"].columns}
    base = {"event_id": f"e{number}", "user_id": user, "visitor_id": visitor, "event_type": "view"}
    more = {"event_time": when, "ingest_time": when, "item_id": "i1", "category_id": "c1", "price": 1.0}
    return names | base | more | over


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class World:
    """A lake in which three people stand in every table, list and kind of raw file."""

    def __init__(self, folder: Path, spark: SparkSession) -> None:
        self.folder, self.spark = folder, spark
        self.config: Config = load_config(
            None,
            (
                f"lake.root_uri='{folder / 'lake'}'",
                f"export.target_uri='{folder / 'export'}'",
                "export.auto_approve=true",
                "maintenance.retention_hours=0",
                "maintenance.allow_short_retention=true",
            ),
        )
        self.root = self.config.lake.root_uri
        self.key = feeds.load_key(self.config.events)
        self.pseudonym = {user: records.pseudonym(user, self.key) for user in (GONE, STAYS, OTHER)}
        self._land()
        self.clean()
        self._fill_tables()
        self._hand_over()
        (folder / "lake" / "reports").mkdir()
        (folder / "lake" / "reports" / "r1.html").write_text(f"<p>{self.pseudonym[GONE]} and {GONE}</p>")
        (folder / "lake" / "raw" / "events" / f"ingest_date={D0}" / ".part-0.jsonl.x1").write_text(GONE)

    def land(self, feed_name: str, name: str, content: bytes, day: int = 0) -> Path:
        path = self.folder / "lake" / "raw" / feed_name / f"ingest_date={D0 + timedelta(days=day)}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def _land(self) -> None:
        first = [event(GONE, 1, OWN), event(STAYS, 2, SHARED), event(GONE, 3, SHARED), event(OTHER, 4)]
        refused = event(GONE, 5, event_type="nonsense"), event(STAYS, 6, event_type="nonsense")
        anonymous = event(None, 7, OWN), event(None, 8, SHARED)
        broken = b'{"user_id": "' + GONE.encode() + b'", broken\n'
        mentions = lines(event(STAYS, 9, referred_by=GONE))
        content = lines(*first, *refused, *anonymous) + broken + mentions
        self.events_file = self.land("events", "part-0.jsonl", content)
        later = event(None, 1, OWN) | {"event_time": "2024-01-11T01:00:00Z", "event_id": "e10"}
        self.land("events", "part-0.jsonl", lines(later | {"ingest_time": "2024-01-11T01:00:00Z"}), day=1)
        head = [column.name for column in contracts.FEEDS["orders"].columns]
        rows = [{"order_id": f"o{n}", "user_id": u} for n, u in enumerate((STAYS, GONE, OTHER, GONE))]
        text = io.StringIO()
        writer = csv.DictWriter(text, head, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shop = "two\nlines" if row["user_id"] == GONE else "s1"
            writer.writerow(
                row | {"order_time": "2024-01-10T08:00:00Z", "total_amount": 2.5, "shop_id": shop}
            )
        self.land("orders", "part-0.csv", text.getvalue().encode())
        self.land("orders", "part-0.jsonl", b"", day=1)
        when = datetime(2024, 1, 10, 8, tzinfo=UTC)
        sends = [
            {"send_id": f"18:{user}", "campaign_id": "18", "user_id": user, "delivered_time": when}
            for user in (GONE, STAYS, OTHER)
        ]
        for row in sends:
            row |= {"coupon_id": None, "propensity": 0.5, "mail_type": "marketing"}
        schema = pa.Table.from_pylist(sends).schema.set(4, pa.field("coupon_id", pa.string()))
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(sends, schema=schema), buffer)
        self.land("sends", "part-0.parquet", buffer.getvalue())

    def clean(self) -> None:
        """Read the deliveries as the jobs do; of the other feeds, the two that name users here."""
        with record_run("clean_events", self.config, DAYS) as job:
            pipeline.load_job("clean_events").run(self.spark, job)
        for name in ("orders", "sends"):
            delivery = feeds.find_delivery(self.root, name, DAYS, ())
            raw = feeds.read_raw(self.spark, delivery, self.key)
            feeds.publish(feeds.clean_feed(raw, name, "UTC"), self.root, DAYS, "clean")

    def _fill_tables(self) -> None:
        """Rows of the three in every table that the two jobs have not written."""
        self.visitors = self.stored_visitors()
        for table in erasure.user_tables():
            if table in ("events", "user_days", "orders", "sends"):
                continue
            keys = [name for name in schemas.TABLES[table].key if name not in ("user_id", "as_of")]
            rows = []
            for number, user in enumerate(self.pseudonym.values()):
                texts = {
                    c.name: f"{c.name}{number}"
                    for c in schemas.TABLES[table].columns
                    if c.name in keys and c.type == "string"
                }
                fixed = {n: v for n, v in (("campaign_id", "18"), ("version", "v1")) if n in texts}
                rows.append(make_row(table, user_id=user, **texts | fixed))
            dates = DateRange.day(D0) if schemas.TABLES[table].date_column else None
            self.write(table, self.specialised(table, rows), dates)

    def specialised(self, table: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if table == "identity_links":
            pairs = [(OWN, GONE, 1), (SHARED, STAYS, 2), (SHARED, GONE, 3)]
            return [
                make_row(
                    table,
                    visitor_id=self.visitors[visitor],
                    user_id=self.pseudonym[user],
                    linked_time=minutes(minute),
                    ingest_date=D0,
                )
                for visitor, user, minute in pairs
            ]
        for row in rows:
            if table == "training_examples":
                row |= {"example_id": f"18:{row['user_id']}:{D0}", "split": "train"}
            row |= {c.name: [] for c in schemas.TABLES[table].columns if c.type.startswith("array")}
            if table == "assignments":
                row |= {"arm": "treat", "would_select": True, "run_id": "select-1", "run_date": D0}
        return rows

    def write(self, table: str, rows: list[dict[str, Any]], dates: DateRange | None) -> None:
        frame = make_frame(self.spark, table, rows).coalesce(1)
        equals = {} if dates else {"campaign_id": "18", "version": "v1"}
        tables.overwrite(frame, self.root, table, dates, "fill", **equals)

    def stored_visitors(self) -> dict[str, str]:
        """Cookie ids as a delivery's reader stores them."""
        file = records.RawFile(D0, "x", "x.jsonl")
        content = lines(event(STAYS, 1, OWN), event(STAYS, 2, SHARED))
        stored = records.parse_file(file, content, "events", self.key).column("visitor_id").to_pylist()
        return dict(zip((OWN, SHARED), stored, strict=True))

    def _hand_over(self) -> None:
        task = self.handover()
        found = [(user, "18", "v1", None, n + 1) for n, user in enumerate(self.pseudonym.values())]
        export.hand_over(task, export.Recipients(found, 0), "select-1")
        known = manifests.Dataset(0, "x", {"item": 5}, layouts.WIDE_FEATURES, {})
        counted = datasets.count(self.spark, self.config)
        manifests.write(self.root, replace(known, **counted), "build-1")

    def handover(self) -> export.Handover:
        return export.Handover(self.root, self.config.export.target_uri, "18", "v1", D0, "export-1")

    def erase(self, user: str = GONE, dry_run: bool = False) -> dict[str, int]:
        person = erasing.find_person(self.config, user)
        with record_run("erase_user", self.config, today()) as job:
            job.rows.update(erasing.erase(self.spark, job, person, dry_run))
        return job.rows

    def maintain(self) -> dict[str, int]:
        with record_run("maintain", self.config, today()) as job:
            return maintenance.maintain(self.spark, job, vacuum=True, optimize=True, dry_run=False)

    def rows_of(self, user: str, table: str) -> Any:
        return tables.read(self.spark, self.root, table).where(F.col("user_id") == self.pseudonym[user])

    def others(self) -> dict[str, str]:
        """Content of every table without the person, their own cookie's visitor, and tombstones."""
        mine = [self.pseudonym[GONE], f"visitor:{self.visitors[OWN]}"]
        kept = ~F.col("user_id").isin(*mine) & ~F.col("user_id").startswith("erased:")
        return {
            table: tables.content_hash(tables.read(self.spark, self.root, table).where(kept))
            for table in erasure.user_tables()
            if tables.exists(self.spark, self.root, table)
        }

    def files(self) -> dict[str, bytes]:
        found = [p for place in ("lake", "export") for p in sorted((self.folder / place).rglob("*"))]
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in found if p.is_file()}

    def holding(self, *texts: str) -> list[str]:
        """Slow search of its own: every byte, and every cell of every Parquet file."""
        found = []
        for name, content in self.files().items():
            cells = str(pq.read_table(io.BytesIO(content)).to_pydict()) if name.endswith(".parquet") else ""
            whole = content + cells.encode() + name.encode()
            if any(text.encode() in whole.replace(OTHER.encode(), b"") for text in texts):
                found.append(name)
        return found


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The lake before anybody is erased."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUPONFLOW_USER_KEY", KEY)
        return World(tmp_path_factory.mktemp("erasure"), spark)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUPONFLOW_USER_KEY", KEY)


def test_every_table_with_a_user_column_is_reached(world: World) -> None:
    named = {t.name for t in schemas.TABLES.values() if {"user_id", "visitor_id"} & set(t.column_names)}
    assert set(erasure.user_tables()) == named
    held = {table for table in named if world.rows_of(GONE, table).count()}
    assert held == named


def test_spark_and_python_hash_ids_alike(world: World) -> None:
    listed = erased.Erased("").with_ids(["a"])
    ids = ["", "a", "ü", "visitor:x", "x" * 200]
    frame = literals.frame(world.spark, [(i,) for i in ids], "user_id string")
    found = [row[0] for row in frame.select(erasure.hash_column(listed, F.col("user_id"))).collect()]
    assert found == [listed.hash_of(i) for i in ids]
    assert [row.user_id for row in erasure.on_list(frame, listed).collect()] == ["a"]


def test_no_log_holds_statistics_of_ids(world: World) -> None:
    kept: set[str] = set()
    for path in (world.folder / "lake" / "tables").rglob("_delta_log/*.json"):
        for line in path.read_text().splitlines():
            stats = json.loads(line).get("add", {}).get("stats")
            kept |= set(json.loads(stats).get("minValues", {})) if stats else set()
    personal = {"user_id", "visitor_id", "example_id", "send_id", "session_id"}
    assert kept, "no statistics were written at all"
    assert not kept & personal


def test_a_dry_run_counts_and_changes_nothing(world: World) -> None:
    before = world.files()
    counts = world.erase(dry_run=True)
    changed = {name for name, content in world.files().items() if before.get(name) != content}
    assert {name.split("/")[1] for name in changed} == {"runs"}
    assert counts["raw events"] == 5  # three of the user, one refused of the user, one of the own cookie...
    assert counts["raw orders"] == 2
    assert counts["raw sends"] == counts["sends"] == 1
    assert counts["list 18/v1"] == 1
    assert set(erasure.user_tables()) <= set(counts)


def test_a_killed_erasure_is_completed_by_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before, stats = world.others(), world.rows_of(GONE, "assignments").count()
    take_out = tables.take_out

    def dies(keys: Any, root: str, table: str, *more: Any, **named: Any) -> int:
        taken = take_out(keys, root, table, *more, **named)
        if table == "training_examples":
            raise KeyboardInterrupt
        return taken

    monkeypatch.setattr(tables, "take_out", dies)
    with pytest.raises(KeyboardInterrupt):
        world.erase()
    monkeypatch.undo()
    monkeypatch.setenv("COUPONFLOW_USER_KEY", KEY)
    assert len(erasure.open_requests(world.root)) == 1
    assert not world.rows_of(GONE, "events").count()
    assert world.rows_of(GONE, "assignments").count() == stats
    world.erase()
    assert not erasure.open_requests(world.root)
    assert {t: world.rows_of(GONE, t).count() for t in erasure.user_tables()} == dict.fromkeys(
        erasure.user_tables(), 0
    )
    assert world.others() == before
    assert world.erase() == {}  # nothing is left to do


def test_the_ledger_keeps_its_counts(world: World) -> None:
    rows = tables.read(world.spark, world.root, "assignments").collect()
    assert len(rows) == 3
    nameless = [row for row in rows if row.user_id.startswith(erased.TOMBSTONE)]
    assert [(row.arm, row.would_select) for row in nameless] == [("treat", True)]


def test_the_list_is_rewritten_and_still_handed_over(world: World) -> None:
    done = export.finished(world.handover())
    assert done is not None
    assert done["num_recipients"] == 2
    names = storage.list_names(world.handover().folder)
    assert len(names) == 2
    manifest = json.loads(storage.read_bytes(storage.join(world.handover().folder, "manifest.json")))
    assert [note["num_rows"] for note in manifest["erasures"]] == [1]
    everyone = tables.read(world.spark, world.root, "audience")
    consent = everyone.select("user_id", F.lit(None).cast("string").alias("consent_reason"))
    ledger = tables.read(world.spark, world.root, "assignments")
    assert len(export.recipients(everyone, ledger, consent).rows) == 2  # a tombstone is no recipient


def test_training_goes_on_with_the_rest(world: World) -> None:
    dataset = manifests.load(world.root)
    assert dataset.rows("train") == 2
    manifests.check(dataset, "train")
    assert {row.user_id for row in feed.read_all(dataset, "train")} == {
        world.pseudonym[STAYS],
        world.pseudonym[OTHER],
    }
    assert storage.list_names(storage.join(world.root, "datasets")) == [
        f"training_examples-v{dataset.table_version}.json",
        "training_examples.json",
    ]


def test_runs_before_the_erasure_are_not_reproducible(world: World) -> None:
    since = runs.reproducible_since(world.root)
    found = {record.job: record.started_time >= since for record in runs.load_all(world.root)}
    assert found["clean_events"] is False
    assert runs.reproducible_since(str(world.folder / "elsewhere")) == ""


def test_raw_files_keep_every_other_record_at_its_place(world: World) -> None:
    kept = [json.loads(line)["event_id"] if line else "" for line in _readable(world.events_file)]
    assert kept == ["", "e2", "", "e4", "", "e6", "", "e8", "broken", "e9", ""]
    record = next(json.loads(line) for line in world.events_file.read_bytes().split(b"\n") if b"e9" in line)
    assert record["referred_by"] == "erased"


def _readable(path: Path) -> list[str]:
    text = path.read_text().split("\n")
    return [line if "broken" not in line else '{"event_id": "broken"}' for line in text]


def test_no_job_brings_the_person_back(world: World) -> None:
    before = world.others()
    quarantine = tables.content_hash(tables.read(world.spark, world.root, "quarantine"))
    world.clean()
    assert {t: h for t, h in world.others().items() if t in ("events", "orders", "sends")} == {
        t: before[t] for t in ("events", "orders", "sends")
    }
    assert tables.content_hash(tables.read(world.spark, world.root, "quarantine")) == quarantine
    path = world.land("events", "part-1.jsonl", lines(event(GONE, 1), event(STAYS, 2)), day=1)
    counts = world.erase()
    assert counts == {"raw events": 1}
    assert GONE.encode() not in path.read_bytes()
    world.clean()
    assert not world.rows_of(GONE, "events").count()


def test_maintain_takes_out_what_a_late_job_wrote_and_nothing_is_left(world: World) -> None:
    world.write("histories", [make_row("histories", user_id=world.pseudonym[GONE], as_of_date=D0)], DAYS)
    person = erasing.find_person(world.config, GONE)
    assert world.maintain()["erased histories"] == 1  # its old version goes in the same run
    assert not world.rows_of(GONE, "histories").count()
    assert world.holding(GONE, world.pseudonym[GONE]) == []
    erasing.verify(world.config, person)
    (request,) = (world.folder / "lake" / "erasure" / "requests").glob("*.json")
    assert json.loads(request.read_text())["status"] == "verified"
    with pytest.raises(DataError, match=r"\d+ files may still hold this person"):
        erasing.verify(world.config, erasing.find_person(world.config, STAYS))


def test_an_unknown_person_is_listed(world: World) -> None:
    assert world.erase("nobody-at-all") == {}
    assert erased.load(world.root).contains(records.pseudonym("nobody-at-all", world.key))


def test_an_erasure_that_races_with_a_job_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(*arguments: Any) -> list[str]:
        world.write("histories", [make_row("histories", user_id=world.pseudonym[OTHER], as_of_date=D0)], DAYS)
        return []

    monkeypatch.setattr(erasing.needles, "redact", writes)
    with pytest.raises(ConflictError, match="tables histories got rows of an erased person again"):
        world.erase(OTHER)


def test_a_file_named_after_the_person_is_refused(world: World) -> None:
    path = world.land("orders", f"{STAYS}.jsonl", b"")
    with pytest.raises(DataError, match="feed orders, day 2024-01-10: a raw file is named after") as caught:
        world.erase(STAYS)
    assert STAYS not in str(caught.value)
    path.unlink()


def test_a_table_with_deletion_vectors_is_refused(spark: SparkSession, root_uri: str) -> None:
    row = make_row("orders", order_id="o1", user_id="u-1", ingest_date=D0)
    tables.overwrite(make_frame(spark, "orders", [row]), root_uri, "orders", DateRange.day(D0))
    place = f"delta.`{tables.table_uri(root_uri, 'orders')}`"
    spark.sql(f"ALTER TABLE {place} SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')")
    keys = literals.frame(spark, [("u-1",)], "user_id string")
    with pytest.raises(DataError, match=r"expected delta\.enableDeletionVectors = false"):
        tables.take_out(keys, root_uri, "orders")


def test_small_files_are_joined_and_old_ones_removed(spark: SparkSession, root_uri: str) -> None:
    for table in ("orders", "training_examples"):
        date_column = schemas.TABLES[table].date_column
        assert date_column is not None
        rows = [make_row(table, **{schemas.TABLES[table].key[0]: f"k{n}", date_column: D0}) for n in range(5)]
        frame = make_frame(spark, table, rows).repartition(5)
        tables.overwrite(frame, root_uri, table, DateRange.day(D0))
    before = tables.content_hash(tables.read(spark, root_uri, "orders"))
    number = len(upkeep.files(spark, root_uri, "orders"))
    assert number > 2
    partition = {"ingest_date": str(D0)}
    assert upkeep.crowded_partitions(spark, root_uri, "orders", number) == []
    assert upkeep.crowded_partitions(spark, root_uri, "orders", number - 1) == [(partition, number)]
    assert upkeep.crowded_partitions(spark, root_uri, "training_examples", 1) == []  # files are row groups
    results = pipeline.versions(root_uri, ("orders",))
    assert upkeep.compact(spark, root_uri, "orders", partition) == number - 1
    assert pipeline.versions(root_uri, ("orders",)) == results  # finished stages stay finished
    assert upkeep.stale_files(spark, root_uri, "orders", 168) == []
    stale = upkeep.stale_files(spark, root_uri, "orders", 0)
    assert len(stale) == number
    version = tables.version(spark, root_uri, "orders")
    upkeep.vacuum(spark, root_uri, "orders", 0)
    assert upkeep.stale_files(spark, root_uri, "orders", 0) == []
    assert tables.version(spark, root_uri, "orders") == version == results["orders"] + 1  # VACUUM is none
    assert tables.content_hash(tables.read(spark, root_uri, "orders")) == before


def test_a_short_retention_must_be_asked_for() -> None:
    upkeep.check_retention(168, allow_short=False)
    upkeep.check_retention(0, allow_short=True)
    with pytest.raises(ConfigError, match="retention_hours = 167: expected at least 168"):
        upkeep.check_retention(167, allow_short=False)


def test_lists_of_nobody_stay_as_they_are(world: World) -> None:
    before = world.files()
    assert lists.prune(world.config.export.target_uri, lambda user: False, "r") == {}
    assert world.files() == before
