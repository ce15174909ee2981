"""Erasure outside the tables: raw files keep every other record at its place, lists and manifests follow."""

import codecs
import csv
import io
import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import D0

from couponflow.campaign import erasing as lists
from couponflow.campaign import export
from couponflow.errors import ConflictError, DataError
from couponflow.lake import contracts, erased, erasure, layouts, runs, storage
from couponflow.lake.needles import Needles
from couponflow.sequences import erasing, records
from couponflow.sequences.records import RawFile
from couponflow.sources.landing import Landing
from couponflow.training import manifests

PERSON = "person-7"
FOUND = Needles((PERSON,))
LISTED = erased.Erased("").with_ids([PERSON, "visitor:v1"])
READER = erasing.Reader(None)
HEAD = [column.name for column in contracts.FEEDS["orders"].columns]


def order(number: int, user: str, shop: str = "s1") -> dict[str, Any]:
    when = "2024-01-10T08:00:00Z"
    base = {"order_id": f"o{number}", "user_id": user, "order_time": when, "total_amount": 2.5}
    return dict.fromkeys(HEAD) | base | {"shop_id": shop}


def render(rows: list[dict[str, Any]], kind: str) -> bytes:
    if kind == "parquet":
        out = io.BytesIO()
        typed = [
            row | {"order_time": datetime(2024, 1, 10, 8, tzinfo=UTC), "status_time": None} for row in rows
        ]
        texts = {"order_status": pa.string(), "shop_id": pa.string()}
        table = pa.Table.from_pylist(typed) if typed else pa.table({})
        for name, wanted in texts.items():
            if name in table.column_names:
                place = table.column_names.index(name)
                table = table.set_column(place, name, table.column(name).cast(wanted))
        pq.write_table(table, out)
        return out.getvalue()
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, HEAD, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
        return codecs.BOM_UTF8 + text.getvalue().encode()
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(content: bytes, kind: str) -> list[tuple[int, str, str, str]]:
    file = RawFile(D0, "x", f"x.{kind}")
    table = records.parse_file(file, content, "orders").select(
        ["row_number", "order_id", "user_id", "shop_id"]
    )
    return [tuple(row.values()) for row in table.to_pylist()]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("seed", range(25))
def test_blanked_records_are_gone_and_the_others_as_before(kind: str, seed: int) -> None:
    """Against a plain filter, over random files from empty to a few rows; texts hold line ends and quotes."""
    draw = random.Random(f"{kind}{seed}")
    shops = ["s1", "two\nlines", 'a "quote", b', "", "\r\n", "ümlaut"]
    users = [draw.choice([PERSON, f"{PERSON}1", "u2"]) for _ in range(draw.randrange(6))]
    rows = [order(n, user, draw.choice(shops)) for n, user in enumerate(users)]
    content = render(rows, kind)
    before = read(content, kind)
    positions = [row[0] for row in before if row[2] == PERSON]
    cleaned = erasing.blanked(RawFile(D0, "x", f"x.{kind}"), content, positions, FOUND)
    assert read(cleaned, kind) == [row for row in before if row[2] != PERSON]
    again = erasing.blanked(RawFile(D0, "x", f"x.{kind}"), cleaned, [], FOUND)
    assert again == cleaned or kind == "parquet"


def test_a_broken_csv_counts_as_when_it_is_read() -> None:
    lines = [
        ",".join(HEAD),
        "o0,u1",
        "",
        f"o1,{PERSON},2024-01-10T08:00:00Z,2,s1,,",
        'o2,"u1',
        "o3,u2,x,1,s,,",
    ]
    content = "\n".join(lines).encode()
    before = read(content, "csv")
    (position,) = [row[0] for row in before if row[2] == PERSON]
    cleaned = erasing.blanked(RawFile(D0, "x", "x.csv"), content, [position], FOUND)
    assert read(cleaned, "csv") == [row for row in before if row[2] != PERSON]
    assert PERSON.encode() not in cleaned


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rewriting_a_file_takes_the_person_and_checks_the_rest(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    rows = [order(1, "u1"), order(2, PERSON), order(3, "u3", shop=f"friend of {PERSON}")]
    path.write_bytes(render(rows, kind))
    file = RawFile(D0, str(path), path.name)
    before = read(path.read_bytes(), kind)
    erasing.rewrite(erasing.Affected("orders", file, (1,), True), LISTED, PERSON, FOUND, READER)
    expected = [before[0], (*before[2][:3], "friend of erased")]
    assert read(path.read_bytes(), kind) == expected
    stat = path.stat().st_mtime_ns
    if kind != "parquet":  # nothing is left to do: the file is not touched
        erasing.rewrite(erasing.Affected("orders", file, (), False), LISTED, PERSON, FOUND, READER)
        assert path.stat().st_mtime_ns == stat
    path.write_bytes(render(rows, kind))
    with pytest.raises(DataError, match="would not read as before"):  # a position that misses the person
        erasing.rewrite(erasing.Affected("orders", file, (0,), True), LISTED, PERSON, FOUND, READER)
    assert read(path.read_bytes(), kind) == before


def test_visitors_of_the_person_go_and_a_member_on_their_device_stays() -> None:
    table = pa.table(
        {
            "user_id": pa.array([PERSON, None, "", "u2", None, "u3"]),
            "visitor_id": pa.array(["v1", "v1", "v1", "v1", "v2", None]),
            "row_number": pa.array(range(6), pa.int64()),
        }
    )
    positions, visitors = erasing._hits(table, LISTED, PERSON)
    assert positions == [0, 1, 2]
    assert visitors == ["v1"]


ROWS = [(user, "18", "v1", None, n + 1) for n, user in enumerate(("u1", PERSON, 'u,"3'))]


def hand_over(folder: Path) -> export.Handover:
    task = export.Handover(str(folder / "lake"), str(folder / "out"), "18", "v1", D0, "export-1")
    export.hand_over(task, export.Recipients(ROWS, 0), "select-1")
    return task


@pytest.mark.parametrize("dies_at", ["create", "replace", "remove", ""])
def test_a_list_loses_the_person_at_whatever_moment_the_run_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    task = hand_over(tmp_path)
    assert lists.prune(task.target_uri, LISTED.contains, "r1", dry_run=True) == {"list 18/v1": 1}
    first = export.finished(task)
    if dies_at:

        def dies(*arguments: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(storage, dies_at, dies)
        with pytest.raises(KeyboardInterrupt):
            lists.prune(task.target_uri, LISTED.contains, "r1")
        monkeypatch.undo()
        assert export.finished(task) is not None  # whole at every moment: the old list or the new one
    lists.prune(task.target_uri, LISTED.contains, "r2")
    done = export.finished(task)
    assert first is not None
    assert done is not None
    assert (first["num_recipients"], done["num_recipients"]) == (3, 2)
    (name, manifest) = storage.list_names(task.folder)
    assert manifest == export.MANIFEST
    text = storage.read_bytes(storage.join(task.folder, name))
    assert [row["user_id"] for row in csv.DictReader(io.StringIO(text.decode()))] == ["u1", 'u,"3']
    assert lists.prune(task.target_uri, LISTED.contains, "r3") == {}
    with pytest.raises(ConflictError):  # the hand-over stays done: no second version of the day
        export.check_only_version(export.Handover(task.root_uri, task.target_uri, "18", "v2", D0, "x"))


def test_an_unfinished_list_is_removed_and_a_changed_one_refused(tmp_path: Path) -> None:
    task = hand_over(tmp_path)
    list_uri = storage.join(task.folder, export.FILE)
    content = storage.read_bytes(list_uri)
    storage.replace(list_uri, content + b"u9,18,v1,,9\n", content)
    with pytest.raises(DataError, match="another checksum than its manifest"):
        lists.prune(task.target_uri, LISTED.contains, "r1")
    storage.remove(storage.join(task.folder, export.MANIFEST))
    assert lists.prune(task.target_uri, LISTED.contains, "r1") == {"list 18/v1": 1}
    assert storage.list_names(task.folder) == []
    assert lists.prune(str(tmp_path / "absent"), LISTED.contains, "r1") == {}


def dataset(folder: Path, version: int, names: list[str]) -> str:
    for name in names:
        (folder / name).touch()
    rows = {(folder / name).as_uri(): 1 for name in names}
    groups = {uri: (1,) for uri in rows}  # given, so that no footer is read
    made = manifests.Dataset(version, "v1", {"item": 3}, layouts.WIDE_FEATURES, {"train": rows}, groups)
    return manifests.write(str(folder), made, "r")


def test_a_manifest_is_renewed_and_older_ones_go(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert manifests.current(root) is None
    dataset(tmp_path, 1, ["a"])
    dataset(tmp_path, 2, ["a", "b"])
    (tmp_path / "c").touch()
    rows = {(tmp_path / "c").as_uri(): 1}
    counted = {"table_version": 3, "files": {"train": rows}, "row_groups": {next(iter(rows)): (1,)}}
    uri, removed = manifests.renew(root, counted, "r")
    assert uri.endswith("-v3.json")
    assert [storage.join(root, "datasets", f"training_examples-v{n}.json") for n in (1, 2)] == removed
    found = manifests.current(root)
    assert found is not None
    assert (found.table_version, found.vocabulary_version, found.rows("train")) == (3, "v1", 1)
    assert storage.list_names(storage.join(root, "datasets")) == [
        "training_examples-v3.json",
        "training_examples.json",
    ]


def test_manifests_of_files_that_go_are_retired_and_the_newest_one_stops(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert manifests.retire(root, ["a"], dry_run=False) == []
    first = dataset(tmp_path, 1, ["a"])
    dataset(tmp_path, 2, ["b"])
    assert manifests.retire(root, [str(tmp_path / "x")], dry_run=False) == []
    assert manifests.retire(root, [str(tmp_path / "a")], dry_run=True) == [first]
    assert manifests.retire(root, [str(tmp_path / "a")], dry_run=False) == [first]
    with pytest.raises(DataError, match=r"training_examples-v1\.json does not exist"):
        manifests.load(root, 1)
    with pytest.raises(DataError, match="run build_examples, then maintain again"):
        manifests.retire(root, [str(tmp_path / "b")], dry_run=False)
    second = dataset(tmp_path, 3, ["d"])
    (tmp_path / "d").unlink()  # vacuumed by hand
    with pytest.raises(DataError, match=r"names .*/d, which"):
        manifests.retire(root, [], dry_run=False)
    assert storage.exists(second)


def test_a_source_that_lands_again_accepts_what_an_erasure_has_rewritten(tmp_path: Path) -> None:
    columns = {name: ["null"] * 2 for name in HEAD} | {"user_id": [f'"{PERSON}"', '"u2"']}
    landing = Landing(str(tmp_path), "test")
    landing.day("orders", D0, columns)
    (path,) = tmp_path.rglob("*.jsonl")
    content = path.read_bytes()
    erased.note_rewritten(str(tmp_path), [storage.sha256(content)])
    erased.note_rewritten(str(tmp_path), [storage.sha256(content), "another"])
    path.write_bytes(b"\n" + content.split(b"\n", 1)[1])
    landing.day("orders", D0, columns)
    assert PERSON.encode() not in path.read_bytes()
    with pytest.raises(ConflictError, match="was landed before with other rows"):
        landing.day("orders", D0, columns | {"user_id": ['"u1"', '"u2"']})


def test_the_list_holds_hashes_and_only_grows(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert not erased.load(root).contains(PERSON)
    first = erased.add(root, [PERSON])
    second = erased.add(root, ["u2", PERSON])
    assert first.key == second.key
    assert second.hashes > first.hashes
    assert erased.load(root) == second
    assert erased.load(root).contains(PERSON)
    assert not erased.load(root).contains(f"{PERSON}1")
    assert PERSON not in (tmp_path / "erasure" / "do_not_ingest.json").read_text()
    assert second.with_ids(["u3"]).contains("u3")
    assert erased.load(root) == second  # with_ids writes nothing
    (tmp_path / "erasure" / "do_not_ingest.json").write_text("{")
    with pytest.raises(DataError, match="restore it before any delivery is read"):
        erased.load(root)


def test_a_request_says_how_far_it_got(tmp_path: Path) -> None:
    root = str(tmp_path)
    request = erasure.Request(root, "ab12")
    request.close("verified")  # nothing was begun
    assert erasure.open_requests(root) == []
    request.open("run-1", "2024-01-10T00:00:00")
    request.done("raw", {"raw events": 2})
    assert erasure.open_requests(root) == ["ab12"]
    other = erasure.Request(root, "ab12")
    request.close("deleted")
    with pytest.raises(ConflictError):  # two runs, one request
        other.done("tables", {})
    assert erasure.open_requests(root) == []
    assert erasure.Request(root, "ab12").content["done"] == {"raw": {"raw events": 2}}


def test_marks_of_two_erasures_the_later_counts(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert runs.reproducible_since(root) == ""
    runs.mark_not_reproducible(root, "e1")
    first = runs.reproducible_since(root)
    runs.mark_not_reproducible(root, "e2")
    assert runs.reproducible_since(root) > first


def test_removing_an_object_twice_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    storage.remove(str(tmp_path / "a"))
    storage.remove(str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []
