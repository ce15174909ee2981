"""A small BigQuery for the real client: load jobs, tables and the ways in which an answer may fail.

Enough of REST v2: ``jobs.insert`` with a multipart or resumable upload, ``jobs.get``, ``tables.get``,
``tables.patch`` and ``tables.delete``. A job runs when it is inserted: CSV against the declared schema, all
rows or none.
"""

import csv
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PARSERS = {"STRING": str, "INTEGER": int, "FLOAT": float, "BOOLEAN": ["false", "true"].index}
PARSERS["DATE"] = date.fromisoformat


@dataclass
class Table:
    """Rows by partition; a table without partitions has them under an empty name."""

    schema: list[dict[str, str]]
    labels: dict[str, str]
    description: str
    partitioning: dict[str, str]
    partitions: dict[str, list[list[Any]]] = field(default_factory=dict)

    @property
    def rows(self) -> list[list[Any]]:
        return [row for part in sorted(self.partitions) for row in self.partitions[part]]


class BigQuery(ThreadingHTTPServer):
    """One project with its datasets. What a test sets below holds for the next requests."""

    daemon_threads = True

    def __init__(self, *datasets: str) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.lock = threading.Lock()
        self.datasets = datasets  # as project.dataset
        self.jobs: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, Table] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []  # method and last part of the path
        self.refusals: list[tuple[int, str]] = []  # status and reason, one per request
        self.losses: list[
            str
        ] = []  # how the next answers get lost, after all was done: close, reset, cut, slow
        self.hidden = 0  # reads of jobs that do not find what is there
        self.slow = 0  # reads of a job until it is done
        self.job_errors: list[dict[str, str]] = []  # one per job that is run
        self.num_lost_rows = 0  # of the next loads, without an error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def insert(self, resource: dict[str, Any], content: bytes) -> tuple[int, dict[str, Any]]:
        reference = resource["jobReference"]
        job_id, location = reference["jobId"], reference["location"]
        with self.lock:
            if job_id in self.jobs:
                return 409, problem(409, "duplicate", f"Already Exists: Job {location}.{job_id}")
            load = resource["configuration"]["load"]
            target = load["destinationTable"]
            if f"{target['projectId']}.{target['datasetId']}" not in self.datasets:
                return 404, problem(404, "notFound", f"Not found: Dataset {target['datasetId']}")
            error = self.job_errors.pop(0) if self.job_errors else None
            num_rows = 0
            if error is None:
                num_rows, error = self.run(load, content)
            status: dict[str, Any] = {"state": "DONE"}
            if error:
                status |= {"errorResult": error, "errors": [error]}
            statistics = {"load": {"outputRows": str(num_rows)} if num_rows else {}}
            self.jobs[job_id] = resource | {
                "kind": "bigquery#job",
                "status": status,
                "statistics": statistics,
            }
            return 200, self.job(job_id)

    def job(self, job_id: str) -> dict[str, Any]:
        found = self.jobs[job_id]
        if self.slow:
            self.slow -= 1
            return found | {"status": {"state": "RUNNING"}, "statistics": {}}
        return found

    def run(self, load: dict[str, Any], content: bytes) -> tuple[int, dict[str, str] | None]:
        fields = load["schema"]["fields"]
        lines = list(csv.reader(io.StringIO(content.decode(), newline="")))[int(load["skipLeadingRows"]) :]
        try:
            rows = [[parse(kind, text) for kind, text in zip(fields, line, strict=True)] for line in lines]
        except ValueError as error:
            return 0, {"reason": "invalid", "message": f"Error while reading data: {error}"}
        name, _, partition = load["destinationTable"]["tableId"].partition("$")
        properties = load.get("destinationTableProperties", {})
        table = self.tables.get(name)
        if table is None:
            table = Table(
                fields,
                properties.get("labels", {}),
                properties.get("description", ""),
                load.get("timePartitioning", {}),
            )
        elif load["writeDisposition"] == "WRITE_EMPTY" and table.rows:
            return 0, {"reason": "duplicate", "message": f"Already Exists: Table {name}"}
        if partition and any(f"{row[1]:%Y%m%d}" != partition for row in rows):
            return 0, {"reason": "invalid", "message": "Some rows belong to different partitions"}
        table.partitions[partition] = rows[: len(rows) - self.num_lost_rows]
        self.tables[name] = table
        return len(table.partitions[partition]), None


def parse(column: dict[str, str], text: str) -> Any:
    """One field of a line; empty is null."""
    if text == "":
        if column["mode"] == "REQUIRED":
            raise ValueError(f"Required column {column['name']} is null")
        return None
    value = PARSERS[column["type"]](text)  # type: ignore[operator]  # one function per type
    return bool(value) if column["type"] == "BOOLEAN" else value


def problem(status: int, reason: str, message: str) -> dict[str, Any]:
    """An error as the service words it."""
    return {"error": {"code": status, "message": message, "errors": [{"reason": reason, "message": message}]}}


class Answers(BaseHTTPRequestHandler):
    server: BigQuery

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def answer(self, status: int, content: dict[str, Any], **headers: str) -> None:
        body = json.dumps(content).encode()
        if status == 200 and self.server.losses:
            return self.lose(self.server.losses.pop(0), body)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def lose(self, how: str, body: bytes) -> None:
        """The client does not get this answer, or only half of it, or too late."""
        self.close_connection = True
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif how == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
        elif how == "slow":
            time.sleep(1)

    def is_refused(self) -> bool:
        server, name = self.server, urlsplit(self.path).path.rpartition("/")[2]
        server.requests.append(f"{self.command} {name}")
        if not server.refusals:
            return False
        status, reason = server.refusals.pop(0)
        self.answer(status, problem(status, reason, f"refused as {reason}"))
        return True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def inserted(self, resource: dict[str, Any], content: bytes) -> None:
        self.answer(*self.server.insert(resource, content))

    def do_POST(self) -> None:
        body = self.body()
        if self.is_refused():
            return
        if parse_qs(urlsplit(self.path).query)["uploadType"] == ["resumable"]:
            number = str(len(self.server.uploads))
            self.server.uploads[number] = json.loads(body)
            return self.answer(200, {}, Location=f"{self.server.url}/upload/{number}")
        boundary = self.headers["Content-Type"].split("boundary=")[1].strip('"').encode()
        _, head, tail, _ = body.split(b"--" + boundary)
        content = tail.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
        self.inserted(json.loads(head.split(b"\r\n\r\n", 1)[1]), content)

    def do_PUT(self) -> None:
        body = self.body()
        if not self.is_refused():
            self.inserted(self.server.uploads[self.path.rpartition("/")[2]], body)

    def do_GET(self) -> None:
        if self.is_refused():
            return
        kind, name = urlsplit(self.path).path.split("/")[-2:]
        if kind == "tables":
            return self.table(name)
        if name in self.server.jobs and not self.server.hidden:
            return self.answer(200, self.server.job(name))
        self.server.hidden -= name in self.server.jobs
        self.answer(404, problem(404, "notFound", f"Not found: Job {name}"))

    def table(self, name: str) -> None:
        found = self.server.tables.get(name)
        if found is None:
            return self.answer(404, problem(404, "notFound", f"Not found: Table {name}"))
        project, dataset = urlsplit(self.path).path.split("/")[4:7:2]
        reference = {"projectId": project, "datasetId": dataset, "tableId": name}
        facts = {"labels": found.labels, "description": found.description, "numRows": str(len(found.rows))}
        self.answer(200, {"tableReference": reference, "type": "TABLE", **facts})

    def do_PATCH(self) -> None:
        body = json.loads(self.body())
        if self.is_refused():
            return
        name = urlsplit(self.path).path.rpartition("/")[2]
        found = self.server.tables[name]
        found.labels, found.description = body["labels"], body["description"]
        self.table(name)

    def do_DELETE(self) -> None:
        if self.is_refused():
            return
        name = urlsplit(self.path).path.rpartition("/")[2]
        if self.server.tables.pop(name, None) is None:
            return self.answer(404, problem(404, "notFound", f"Not found: Table {name}"))
        self.answer(200, {})


@contextmanager
def serving(*datasets: str) -> Iterator[BigQuery]:
    """A server with these datasets, named as project.dataset, while the block runs."""
    server = BigQuery(*datasets)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
