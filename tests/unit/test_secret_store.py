"""The pseudonym key out of Secret Manager: its REST interface, served here."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import google_crc32c
import pytest
import requests

from couponflow.errors import ConfigError, InfraError
from couponflow.lake import secret_store
from couponflow.sections import EventsConfig
from couponflow.sequences import feeds

VERSION = "projects/p/secrets/user-key/versions/3"
KEY = b"0123456789abcdef"


class Service(ThreadingHTTPServer):
    """Answers one version; ``statuses`` are given first, one a request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses: list[int] = []
        self.asked: list[str] = []
        self.content, self.checksum = KEY, google_crc32c.value(KEY)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200 and self.path != f"/v1/{VERSION}:access":
            status = 404
        held = {
            "data": base64.b64encode(self.server.content).decode(),
            "dataCrc32c": str(self.server.checksum),
        }
        body = json.dumps({"name": VERSION, "payload": held} if status == 200 else {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def read(service: Service, version: str = VERSION) -> bytes:
    return secret_store.read(version, requests.Session(), service.url)


def test_the_bytes_of_a_version_without_the_line_break_of_a_file(service: Service) -> None:
    assert read(service) == KEY
    service.content = KEY + b"\n"
    service.checksum = google_crc32c.value(service.content)
    assert read(service) == KEY


def test_what_passes_is_asked_again_and_what_stays_is_told(service: Service) -> None:
    service.statuses = [503, 429]
    assert read(service) == KEY
    assert len(service.asked) == 3
    service.statuses = [503] * 9
    with pytest.raises(InfraError, match="answered 503; run again"):
        read(service)
    assert len(service.statuses) == 3  # the first and five more


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [(403, InfraError, "roles/secretmanager.secretAccessor"), (404, ConfigError, "no such version")],
)
def test_a_refusal_names_the_version_and_the_next_step(
    service: Service, status: int, error: type[Exception], text: str
) -> None:
    service.statuses = [status]
    with pytest.raises(error, match=f"secret {VERSION}: .*{text}"):
        read(service)
    assert len(service.asked) == 1


def test_bytes_that_are_not_what_was_stored_are_refused(service: Service) -> None:
    service.checksum += 1
    with pytest.raises(InfraError, match="arrived damaged") as refused:
        read(service)
    assert KEY.decode() not in str(refused.value)


def test_nobody_there(service: Service) -> None:
    unused = Service()
    unused.server_close()
    with pytest.raises(InfraError, match="did not answer"):
        read(unused)


def test_the_key_of_the_config_is_that_of_the_secret(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret_store, "_session", requests.Session)
    monkeypatch.setattr(secret_store, "_SERVICE", service.url)
    monkeypatch.setenv("COUPONFLOW_USER_KEY", "another key of 16 bytes")
    key = feeds.load_key(EventsConfig(key_secret=VERSION, key_version="v3"))
    assert key is not None
    assert (key.secret, key.version) == (KEY, "v3")
    service.content, service.checksum = b"short", google_crc32c.value(b"short")
    with pytest.raises(ConfigError, match=f"secret {VERSION} holds no pseudonym key of at least 16"):
        feeds.load_key(EventsConfig(key_secret=VERSION))


@pytest.mark.parametrize("name", ["projects/p/secrets/s/versions/latest", "user-key", "projects/p/secrets/s"])
def test_only_a_numbered_version_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="key_secret"):
        EventsConfig(key_secret=name)
