"""Objects on ``gs://`` when the store answers badly: a small server that loses answers, refuses and pages."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from couponflow.campaign import export
from couponflow.dates import DateRange
from couponflow.errors import ConfigError, ConflictError, DataError, InfraError
from couponflow.lake import leases, needles, runs, storage
from couponflow.lake.needles import Needles
from couponflow.training import checkpoints

BUCKET = "gs://mails/lake"


class Store(ThreadingHTTPServer):
    """The part of the Cloud Storage JSON API that ``storage`` uses, for one bucket."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.writes = 0
        self.lost_answers = 0  # of the next uploads: done, then 503
        self.refusal = 0  # status of every request

    def put(self, name: str, content: bytes, generation: int | None) -> bool:
        if generation is not None and self.objects.get(name, (b"", 0))[1] != generation:
            return False
        self.writes += 1
        self.objects[name] = (content, self.writes)
        return True


class Answers(BaseHTTPRequestHandler):
    server: Store

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def answer(self, status: int, content: bytes | dict[str, Any] = b"{}") -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def resource(self, name: str) -> dict[str, Any]:
        content, generation = self.server.objects[name]
        return {"name": name, "bucket": "mails", "generation": str(generation), "size": str(len(content))}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refusal:
            return self.answer(self.server.refusal)
        query = parse_qs(urlsplit(self.path).query)
        boundary = self.headers["Content-Type"].split("boundary=")[1].strip('"').encode()
        _, head, tail, _ = body.split(b"--" + boundary)
        name = json.loads(head.split(b"\r\n\r\n", 1)[1])["name"]
        content = tail.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
        generation = query.get("ifGenerationMatch")
        if not self.server.put(name, content, int(generation[0]) if generation else None):
            return self.answer(412)
        if self.server.lost_answers:
            self.server.lost_answers -= 1
            return self.answer(503)
        return self.answer(200, self.resource(name))

    def do_GET(self) -> None:
        if self.server.refusal:
            return self.answer(self.server.refusal)
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        name = unquote(url.path.rpartition("/o/")[2]) if "/o/" in url.path else ""
        if not name:
            return self.answer(200, self.page(query) if url.path.endswith("/o") else {})
        if name not in self.server.objects:
            return self.answer(404)
        if url.path.startswith("/download/"):
            return self.answer(200, self.server.objects[name][0])
        return self.answer(200, self.resource(name))

    def do_DELETE(self) -> None:
        if self.server.refusal:
            return self.answer(self.server.refusal)
        name = unquote(urlsplit(self.path).path.rpartition("/o/")[2])
        return self.answer(204 if self.server.objects.pop(name, None) else 404, b"")

    def page(self, query: dict[str, list[str]]) -> dict[str, Any]:
        """Two names a page, folders and objects mixed, as a store with a delimiter answers."""
        prefix, start = query["prefix"][0], int(query.get("pageToken", ["0"])[0])
        inner = sorted(name.removeprefix(prefix) for name in self.server.objects if name.startswith(prefix))
        if "delimiter" in query:
            inner = sorted({name[: name.find("/") + 1] or name for name in inner})
        names = [prefix + name for name in inner[start : start + 2]]
        found: dict[str, Any] = {
            "items": [self.resource(name) for name in names if not name.endswith("/")],
            "prefixes": [name for name in names if name.endswith("/")],
        }
        return found | ({"nextPageToken": str(start + 2)} if start + 2 < len(inner) else {})


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = Store()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_checkpoints_lie_on_the_lake(store: Store) -> None:
    """Written with a generation precondition; a lost answer is no conflict."""
    kept = checkpoints.Store(f"{BUCKET}/work/checkpoints-1", checkpoints.Identity("s", "d", 2))
    assert kept.load() is None
    store.lost_answers = 1
    for step in (1, 2, 3):
        kept.save(1, step, {"number": step})
    found = kept.load()
    assert found is not None
    assert found["number"] == 3
    assert len(storage.list_names(kept.uri)) == 4
    kept.clear()
    assert storage.list_names(kept.uri) == []


def test_a_lost_answer_is_our_own_success(store: Store) -> None:
    uri = f"{BUCKET}/pointer.json"
    store.lost_answers = 1
    storage.create(uri, b"one", "r1")
    store.lost_answers = 1
    storage.replace(uri, b"two", b"one")
    assert (store.objects["lake/pointer.json"][0], store.writes) == (b"two", 2)
    with pytest.raises(ConflictError, match="other content"):
        storage.create(uri, b"three", "r2")
    with pytest.raises(ConflictError, match="changed meanwhile"):
        storage.replace(uri, b"three", b"one")


@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_a_hand_over_whose_answers_are_lost_is_done_once(store: Store, num_lost: int) -> None:
    """Claim, list, manifest: each is written, its answer lost, and met again as ours."""
    task = export.Handover(BUCKET, f"{BUCKET}/out", "18", "v1", date(2024, 1, 10), "export-1")
    store.lost_answers = num_lost
    facts = export.hand_over(task, export.Recipients([("u1", "18", "v1", None, 1)], 0), "select-1")
    assert store.lost_answers == 0
    assert store.writes == 3
    assert export.finished(task) == facts | {"already_exported": True}


def test_a_writer_between_check_and_upload_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{BUCKET}/pointer.json"
    storage.create(uri, b"one", "r1")
    upload = storage._upload

    def late(*arguments: Any) -> bool:
        store.put("lake/pointer.json", b"theirs", None)
        return upload(*arguments)

    monkeypatch.setattr(storage, "_upload", late)
    with pytest.raises(ConflictError, match="changed meanwhile"):
        storage.replace(uri, b"ours", b"one")
    assert storage.read_bytes(uri) == b"theirs"


def test_a_refusal_names_bucket_and_role(store: Store, tmp_path: Path) -> None:
    store.refusal = 403
    uri = f"{BUCKET}/a.json"
    for call in (
        lambda: storage.create(uri, b"x", "r1"),
        lambda: storage.replace(uri, b"x", None),
        lambda: storage.read_bytes(uri),
        lambda: storage.read_head(uri, 4),
        lambda: storage.exists(uri),
        lambda: storage.list_names(BUCKET),
        lambda: storage.download_folder(BUCKET, tmp_path),
    ):
        with pytest.raises(InfraError, match=r"roles/storage\.objectUser on bucket mails"):
            call()


def test_what_is_missing_is_named(store: Store) -> None:
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        storage.read_bytes(f"{BUCKET}/gone.json")
    assert not storage.exists(f"{BUCKET}/gone.json")
    assert storage.list_names(f"{BUCKET}/nowhere") == []


def test_every_page_is_listed_and_downloaded(store: Store, tmp_path: Path) -> None:
    names = ["a/1", "a/2", "b/1", "c.json", "d.json", "e/1", "f/"]
    for name in names:
        store.put(f"lake/x/{name}", name.encode(), None)
    assert storage.list_names(f"{BUCKET}/x") == ["a", "b", "c.json", "d.json", "e", "f"]
    assert storage.list_sizes(f"{BUCKET}/x") == dict.fromkeys("abef", 0) | {"c.json": 6, "d.json": 6}
    folder = storage.download_folder(f"{BUCKET}/x", tmp_path)
    assert list(storage.walk(str(folder))) == names[:-1]
    assert list(storage.walk(f"{BUCKET}/x")) == names[:-1]
    assert (folder / "e" / "1").read_bytes() == b"e/1"


def test_an_object_is_removed_once_and_an_absent_one_is_no_error(store: Store) -> None:
    store.put("lake/a.json", b"x", None)
    for _ in range(2):
        storage.remove(f"{BUCKET}/a.json")
        assert not storage.exists(f"{BUCKET}/a.json")
    store.refusal = 403
    with pytest.raises(InfraError, match=r"roles/storage\.objectUser"):
        storage.remove(f"{BUCKET}/a.json")


def test_a_byte_search_and_a_redaction_reach_every_object(store: Store) -> None:
    store.put("lake/a/r.json", b'"customer-17"', None)
    store.put("lake/b.json", b'"customer-171"', None)
    found = Needles(("customer-17",))
    assert list(needles.search(BUCKET, found)) == [(f"{BUCKET}/a/r.json", "its bytes")]
    assert needles.redact(BUCKET, found, (".json",), ()) == [f"{BUCKET}/a/r.json"]
    assert list(needles.search(BUCKET, found)) == []


def test_a_download_stays_in_its_folder(store: Store, tmp_path: Path) -> None:
    store.put("lake/x/../../escaped", b"x", None)
    with pytest.raises(ConfigError, match="leaves"):
        storage.download_folder(f"{BUCKET}/x", tmp_path / "in" / "here")
    assert not (tmp_path / "escaped").exists()


def test_any_other_answer_is_our_error(store: Store) -> None:
    store.refusal = 400
    with pytest.raises(InfraError, match=r"a\.json: the object store failed \(BadRequest"):
        storage.read_bytes(f"{BUCKET}/a.json")


def test_sizes_of_all_objects_over_several_pages(store: Store) -> None:
    for number in range(5):
        storage.create(
            f"{BUCKET}/raw/events/ingest_date=2024-01-0{number % 2 + 1}/p{number}", b"x" * number, "r"
        )
    storage.create(f"{BUCKET}/raw/events/.hidden", b"xxx", "r")
    assert storage.sizes(f"{BUCKET}/raw/events") == {
        f"ingest_date=2024-01-0{number % 2 + 1}/p{number}": number for number in range(5)
    }
    assert storage.sizes(f"{BUCKET}/raw/nothing") == {}


class LockedStore(Store):
    """One writer at a time, as a store decides about preconditions."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes, generation: int | None) -> bool:
        with self.lock:
            return super().put(name, content, generation)


def test_leases_on_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six threads want one day: never two inside; a lost answer of the store is no lost lease."""
    server = LockedStore()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    scope = (("events", DateRange.parse("2024-01-10")),)
    inside: list[int] = []
    seen: list[int] = []

    def one(number: int) -> None:
        for _ in range(8):
            record = runs.start("clean_events", "2024-01-10:2024-01-10", {}, "f")
            with suppress(ConflictError), leases.held(BUCKET, record, scope):
                inside.append(number)
                seen.append(len(inside))
                inside.remove(number)

    try:
        server.lost_answers = 1
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(one, range(6)))
        assert set(seen) == {1}
        assert leases.claims(BUCKET) == []
        assert [name for name in server.objects if "leases" in name] == ["lake/leases/held.json"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
