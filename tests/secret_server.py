"""A stand-in of Secret Manager with one version of one secret: its REST interface, as far as it is read."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import google_crc32c


class Service(ThreadingHTTPServer):
    """Answers one version; ``statuses`` are given first, one a request."""

    def __init__(self, version: str, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = version
        self.statuses: list[int] = []
        self.asked: list[str] = []
        self.put(content)

    def put(self, content: bytes) -> None:
        """Hold other bytes."""
        self.content, self.checksum = content, google_crc32c.value(content)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200 and self.path != f"/v1/{self.server.version}:access":
            status = 404
        held = {
            "data": base64.b64encode(self.server.content).decode(),
            "dataCrc32c": str(self.server.checksum),
        }
        body = json.dumps({"name": self.server.version, "payload": held} if status == 200 else {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(version: str, content: bytes) -> Iterator[Service]:
    """The service while the body runs."""
    with Service(version, content) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
