"""Storage and hand-over against a real object server: the google-cloud-storage client and fake-gcs-server."""

from concurrent.futures import ThreadPoolExecutor
from datetime import date

import pytest

from couponflow.campaign import export
from couponflow.errors import ConflictError, DataError
from couponflow.lake import storage

ROWS = export.Recipients([(f"u{n}", "18", "v1", None, n) for n in range(1, 501)], num_withdrawn=0)


def handover(bucket: str, run_id: str = "export-1") -> export.Handover:
    return export.Handover(f"{bucket}/lake", f"{bucket}/out", "18", "v1", date(2024, 1, 10), run_id)


def generation(uri: str) -> int:
    blob = storage._blob(uri)
    blob.reload()
    return int(blob.generation)


def test_create_once_then_nothing_then_conflict(bucket: str) -> None:
    uri = f"{bucket}/a/b.txt"
    with pytest.raises(DataError, match="does not exist"):
        storage.read_bytes(uri)
    storage.create(uri, b"one", "r1")
    first = generation(uri)
    storage.create(uri, b"one", "r2")
    with pytest.raises(ConflictError, match="other content"):
        storage.create(uri, b"two", "r3")
    assert (storage.read_bytes(uri), generation(uri)) == (b"one", first)
    assert storage.list_names(f"{bucket}/a") == ["b.txt"]


def test_twenty_writers_one_winner(bucket: str) -> None:
    uri = f"{bucket}/race.txt"

    def write(number: int) -> bool:
        try:
            storage.create(uri, f"content {number}".encode(), f"r{number}")
            return True
        except ConflictError:
            return False

    with ThreadPoolExecutor(20) as pool:
        won = list(pool.map(write, range(20)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == f"content {won.index(True)}".encode()


def test_a_pointer_moves_only_from_what_was_read(bucket: str) -> None:
    uri = f"{bucket}/champion.json"
    storage.replace(uri, b"a", None)
    storage.replace(uri, b"b", b"a")
    with pytest.raises(ConflictError, match="changed meanwhile"):
        storage.replace(uri, b"c", b"a")
    assert storage.read_bytes(uri) == b"b"


def test_a_list_is_handed_over_once(bucket: str) -> None:
    facts = export.hand_over(handover(bucket), ROWS, "select-1")
    assert facts["num_recipients"] == 500
    assert storage.read_bytes(facts["file"]) == export.render(ROWS.rows)
    before = {name: generation(facts[name]) for name in ("file", "manifest")}
    again = export.finished(handover(bucket, "export-2"))
    assert again == facts | {"already_exported": True}
    export.hand_over(handover(bucket, "export-3"), ROWS, "select-1")
    assert {name: generation(facts[name]) for name in before} == before
    assert storage.list_names(facts["folder"]) == ["audience.csv", "manifest.json"]
    export.check_only_version(handover(bucket))


def test_two_exporters_with_different_lists_leave_one_list(bucket: str) -> None:
    lists = [export.Recipients(ROWS.rows[: 100 + n], 0) for n in range(8)]

    def hand_over(number: int) -> bool:
        try:
            export.hand_over(handover(bucket, f"export-{number}"), lists[number], "select-1")
            return True
        except ConflictError:
            return False

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(hand_over, range(8)))
    assert won.count(True) == 1
    done = export.finished(handover(bucket))
    assert done is not None
    assert done["num_recipients"] == 100 + won.index(True)
