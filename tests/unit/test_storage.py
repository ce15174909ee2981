"""Objects on local disk: created once, pointers moved against what was read."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from couponflow.errors import ConfigError, ConflictError, DataError, InfraError
from couponflow.lake import storage


def test_create_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "a" / "b.json")
    storage.create(uri, b"one", "r1")
    storage.create(uri, b"one", "r2")  # the same content again is no conflict
    with pytest.raises(ConflictError, match="another run"):
        storage.create(uri, b"two", "r2")
    assert storage.read_bytes(uri) == b"one"
    assert storage.list_names(str(tmp_path / "a")) == ["b.json"]  # no temporary file stays


def test_twenty_racing_writers_have_one_winner(tmp_path: Path) -> None:
    uri = str(tmp_path / "race.json")
    gate = threading.Barrier(20)
    won: list[int] = []

    def write(number: int) -> None:
        gate.wait()
        try:
            storage.create(uri, f"writer {number}".encode(), str(number))
        except ConflictError:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(uri) == f"writer {won[0]}".encode()


def test_a_pointer_moves_only_from_what_was_read(tmp_path: Path) -> None:
    uri = str(tmp_path / "pointer.json")
    storage.replace(uri, b"v1", expected=None)
    with pytest.raises(ConflictError, match="changed meanwhile"):
        storage.replace(uri, b"v2", expected=None)
    storage.replace(uri, b"v2", expected=b"v1")
    assert storage.read_bytes(uri) == b"v2"


def test_twenty_racing_movers_have_one_winner(tmp_path: Path) -> None:
    uri = str(tmp_path / "pointer.json")
    storage.replace(uri, b"start", expected=None)
    for round_number in range(20):
        held = storage.read_bytes(uri)
        gate = threading.Barrier(20)
        won: list[bytes] = []

        def move(
            number: int, held: bytes = held, gate: Any = gate, won: Any = won, turn: int = round_number
        ) -> None:
            content = f"{turn} {number}".encode()
            gate.wait()
            try:
                storage.replace(uri, content, expected=held)
            except ConflictError:
                return
            won.append(content)

        threads = [threading.Thread(target=move, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [storage.read_bytes(uri)]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "a.json")
    storage.replace(uri, b"old", None)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfraError, match=r"b\.json: 3 bytes cannot be written \(No space left on device\)"):
        storage.create(str(tmp_path / "b.json"), b"new", "r1")
    with pytest.raises(InfraError, match=r"a\.json: 3 bytes cannot be written"):
        storage.replace(uri, b"new", b"old")
    assert storage.read_bytes(uri) == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.lock", "a.json"]


def test_what_a_killed_writer_left_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".a.json.k1ll3d").write_bytes(b"half")
    storage.create(str(tmp_path / "a.json"), b"whole", "r1")
    assert storage.list_names(str(tmp_path)) == ["a.json"]


def test_sizes_are_those_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"12345")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden").write_bytes(b"1")
    assert storage.list_sizes(str(tmp_path)) == {"a.jsonl": 5, "empty": 0, "folder": 0}
    assert storage.list_sizes(str(tmp_path / "nowhere")) == {}


def test_an_object_that_grows_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"one\n")
    assert storage.read_from(str(path), 0) == b"one\n"
    assert storage.read_from(str(path), 4) == b""
    path.write_bytes(b"one\ntwo\n")
    assert storage.read_from(str(path), 4) == b"two\n"


def test_missing_objects_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        storage.read_bytes(str(tmp_path / "gone.json"))
    assert storage.list_names(str(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("part", ["..", "a/../b", "%2e%2e", "/etc/passwd", "a\nb"])
def test_paths_stay_below_their_root(part: str) -> None:
    with pytest.raises(ConfigError, match="leaves"):
        storage.join("gs://bucket/lake", part)


def test_uris() -> None:
    assert storage.join("gs://b/x/", "runs", "a.json") == "gs://b/x/runs/a.json"
    assert storage.spark_uri("gs://b/x") == "gs://b/x"
    assert storage.spark_uri("var").startswith("/")


def test_sizes_by_path(tmp_path: Path) -> None:
    for name, size in (("a/b/c.json", 3), ("a/d", 0), (".lock", 5), ("a/.part.crc", 8)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert storage.sizes(str(tmp_path)) == {"a/b/c.json": 3, "a/d": 0}
    assert storage.sizes(str(tmp_path / "nothing")) == {}
