"""A proxy in front of a local object server: it passes requests on, and spoils those that a test names."""

import http.client
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

#: Headers that belong to one connection, or that the proxy sets itself.
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
_HEAD_BYTES = 4_096


@dataclass
class Fault:
    """What becomes of the next ``times`` requests whose method, path or first bytes match ``pattern``.

    ``status`` is the answer instead of the server's, 0 closes the connection without one. With ``is_done``
    the server is asked before, so that the request has its effect and only the answer is lost. ``hang`` keeps
    the connection open until the proxy stops. ``is_cut`` closes it in the middle of the server's answer.
    """

    pattern: str
    status: int = 503
    times: int = 1
    is_done: bool = False
    hang: bool = False
    is_cut: bool = False


class Proxy(ThreadingHTTPServer):
    """Passes every request on to ``upstream`` (``http://host:port``) unless a fault names it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        #: Requests that met a fault, as "METHOD path".
        self.spoilt: list[str] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def meet(self, line: str, head: bytes) -> Fault | None:
        """The fault of this request, which it uses up once."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern.encode(), line.encode() + b"\n" + head):
                    fault.times -= 1
                    self.spoilt.append(line)
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def _serve(self) -> None:
        body = self._body()
        fault = self.server.meet(f"{self.command} {self.path}", body[:_HEAD_BYTES])
        if fault is not None and fault.hang:
            self.server.stopped.wait()
        answer = self._forward(body) if fault is None or fault.is_done or fault.is_cut else None
        if fault is None or fault.is_cut:
            assert answer is not None
            self._answer(*answer, is_cut=fault is not None)
        elif fault.status and not fault.hang:
            words = b'{"error": {"code": %d, "message": "spoilt by a test"}}' % fault.status
            self._answer(fault.status, [("Content-Type", "application/json")], words)
        else:
            self.close_connection = True  # without a word

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _serve  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        try:
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
            return answer.status, kept, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, is_cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection |= is_cut


@contextmanager
def running(upstream: str) -> Iterator[Proxy]:
    """A proxy while the body runs."""
    proxy = Proxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
