"""Run records: one JSON object per run, readable without Spark.

A record says which job ran, over which dates, with which config, code and table versions, how many rows
it read, wrote and refused, and how it ended: ``ok``, ``failed``, or ``killed`` where the process died and
another run wrote the record for it. A finished record with the same fingerprint lets a rerun skip.
"""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

from couponflow.errors import DataError
from couponflow.lake import program, storage

#: A store answers each read after tens of milliseconds, however small the record is.
_NUM_READERS = 16


@dataclass
class RunRecord:
    """One run of one job. ``rows`` maps a name (table, feed, reason) to a count, ``usage``: see ``costs``.

    ``attempt_key``: id of the job on Dataproc that it was; empty for a run elsewhere, or of a workflow.
    """

    run_id: str
    job: str
    dates: str
    arguments: dict[str, str]
    config_fingerprint: str
    code_version: str
    started_time: str
    finished_time: str = ""
    status: str = "running"
    error: str = ""
    fingerprint: str = ""
    attempt_key: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of a finished run."""
        if not self.finished_time:
            return 0.0
        return (
            datetime.fromisoformat(self.finished_time) - datetime.fromisoformat(self.started_time)
        ).total_seconds()


#: Names of what a record holds.
FIELDS = tuple(item.name for item in fields(RunRecord))


def code_version() -> str:
    """Hash of the package's and the jobs' source text; any edit gives another."""
    return program.version()


def utc_now() -> datetime:
    """The clock of records and leases; tests give their own."""
    return datetime.now(UTC)


def start(job: str, dates: str, arguments: dict[str, str], config_fingerprint: str) -> RunRecord:
    """Open a record with a fresh id; nothing is written until ``finish``."""
    now = utc_now()
    run_id = f"{job}-{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    return RunRecord(run_id, job, dates, arguments, config_fingerprint, code_version(), now.isoformat())


def finish(root_uri: str, record: RunRecord, status: str, error: str = "") -> None:
    """Close the record and write it once."""
    record.finished_time = utc_now().isoformat()
    record.status = status
    record.error = error
    _write(root_uri, record)


def bury(root_uri: str, record: RunRecord, ended: datetime, error: str) -> None:
    """Write the record of a run whose process died, unless it wrote its own before."""
    buried = replace(record, finished_time=ended.isoformat(), status="killed", error=error)
    if not storage.exists(_uri(root_uri, record)):
        _write(root_uri, buried)


def _write(root_uri: str, record: RunRecord) -> None:
    content = json.dumps(asdict(record), indent=1, sort_keys=True).encode()
    storage.create(_uri(root_uri, record), content, record.run_id)


def _uri(root_uri: str, record: RunRecord) -> str:
    return storage.join(root_uri, "runs", record.job, f"{record.run_id}.json")


def mark_not_reproducible(root_uri: str, run_id: str) -> None:
    """Say that no run started before now can be repeated: an erasure has taken rows that it read or wrote."""
    mark = {"before": utc_now().isoformat()}
    storage.create(storage.join(_marks(root_uri), f"{run_id}.json"), json.dumps(mark).encode(), run_id)


def reproducible_since(root_uri: str) -> str:
    """Instant (ISO-8601) before whose last erasure a run's ``started_time`` lies if it cannot be repeated."""
    folder = _marks(root_uri)
    marks = [storage.read_bytes(storage.join(folder, name)) for name in storage.list_names(folder)]
    return max((str(json.loads(mark)["before"]) for mark in marks), default="")


def _marks(root_uri: str) -> str:
    return storage.join(root_uri, "erasure", "marks")


def load_all(root_uri: str, job: str | None = None) -> list[RunRecord]:
    """All records, oldest first.

    Raises:
        DataError: a record is damaged; the message names its file.
    """
    jobs = [job] if job else storage.list_names(storage.join(root_uri, "runs"))
    folders = [storage.join(root_uri, "runs", name) for name in jobs]
    uris = [
        storage.join(folder, file)
        for folder in folders
        for file in storage.list_names(folder)
        if file.endswith(".json")
    ]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        records = [
            _parse(uri, content)
            for uri, content in zip(uris, pool.map(storage.read_bytes, uris), strict=True)
        ]
    return sorted(records, key=lambda record: (record.started_time, record.run_id))


def _parse(uri: str, content: bytes) -> RunRecord:
    """A record; what newer code has added to it is left out."""
    try:
        tree = json.loads(content)
        return RunRecord(**{name: tree[name] for name in FIELDS if name in tree})
    except (ValueError, TypeError) as error:
        raise DataError(
            f"run record {uri} is damaged ({error}); restore it, or delete it to run its job again"
        ) from error
