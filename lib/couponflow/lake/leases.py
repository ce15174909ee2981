"""Leases: which run is replacing which dates of which table, so that no two work on one range.

All that is held stands in one object of the lake, ``leases/held.json``, moved by compare-and-swap (a
generation precondition on ``gs://``, a lock file locally). So a claim on any dates of several tables is one
write: all or nothing, without an order in which two runs could wait for each other, and a year costs what a
day costs. One object per table and date would cost a year 364 round trips, and as many per heartbeat.
A claim ends when its run releases it, when its heartbeat has been silent for ``EXPIRY_SECONDS``, or at once
when its process is gone from this machine; then a run that needs the range takes it over.
Delta's own conflict check stays the arbiter of two commits; a lease saves the work of the one that loses.
"""

import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from couponflow.dates import DateRange
from couponflow.errors import ConflictError, CouponflowError, DataError
from couponflow.lake import runs, storage

log = logging.getLogger("couponflow")

#: What a run replaces: a name (a table, or several that one job writes together) and dates; None is all.
Scope = tuple[str, DateRange | None]
Clock = Callable[[], datetime]

#: A name that clashes with every other.
WHOLE_LAKE = "the whole lake"
#: A holder that has no record of its own: the runs inside it have theirs.
UNRECORDED = "backfill"
EXPIRY_SECONDS = 60.0
HEARTBEAT_SECONDS = 15.0
#: Lost compare-and-swaps before giving up, and the longest pause between two.
_ATTEMPTS, _PAUSE_SECONDS = 40, 0.25


def clash(one: Scope, other: Scope) -> bool:
    """Whether two runs that replace these would meet."""
    if WHOLE_LAKE in (one[0], other[0]):
        return True
    if one[0] != other[0] or one[1] is None or other[1] is None:
        return one[0] == other[0]
    return one[1].overlaps(other[1])


@dataclass(frozen=True)
class Claim:
    """One run's hold: its record as it was opened, its scopes, and until when it holds without a heartbeat.

    ``process`` names machine and process, so that a process that is gone here is known to be gone.
    """

    record: runs.RunRecord
    scopes: tuple[Scope, ...]
    expires: datetime
    process: str

    @property
    def run_id(self) -> str:
        """The holder."""
        return self.record.run_id

    @property
    def since(self) -> str:
        """When the holder began."""
        return f"{datetime.fromisoformat(self.record.started_time):%Y-%m-%d %H:%M:%S} UTC"

    def meets(self, scopes: tuple[Scope, ...]) -> Scope | None:
        """The first of these scopes that this claim clashes with."""
        return next((scope for scope in scopes if any(clash(own, scope) for own in self.scopes)), None)

    def is_alive(self, now: datetime) -> bool:
        """Whether its run may still be writing."""
        return now < self.expires and not _is_gone(self.process)


@dataclass
class Lease:
    """A claim while its run works: what it took over, and who took it away, if somebody did."""

    run_id: str
    taken_over: list[str]
    lost_to: str = ""

    def check(self) -> None:
        """Refuse to call a run finished that was taken for dead and overtaken.

        Raises:
            ConflictError: another run has taken the lease over.
        """
        if self.lost_to:
            raise ConflictError(
                f"run {self.run_id} was silent for over {EXPIRY_SECONDS:.0f} s and lost its lease to "
                f"{self.lost_to}; run again when that run has ended"
            )


@contextmanager
def held(
    root_uri: str,
    record: runs.RunRecord,
    scopes: tuple[Scope, ...],
    within: str = "",
    clock: Clock = runs.utc_now,
) -> Iterator[Lease]:
    """Hold all scopes or none while the body runs. ``within`` is the run whose own claim covers this one.

    Dead claims that clash are taken over: their runs get a record with status ``killed``.

    Raises:
        ConflictError: another run holds a clashing scope; nothing is held then.
    """
    if not scopes:
        yield Lease(record.run_id, [])
        return
    lease = Lease(record.run_id, _acquire(root_uri, record, scopes, within, clock))
    stop = threading.Event()
    beat = threading.Thread(
        target=_heartbeat, args=(root_uri, lease, stop, clock), name=f"lease {record.run_id}", daemon=True
    )
    beat.start()
    try:
        yield lease
    finally:
        stop.set()
        beat.join()
        _release(root_uri, record.run_id)


def check_free(
    root_uri: str,
    record: runs.RunRecord,
    scopes: tuple[Scope, ...],
    own: Collection[str] = (),
    clock: Clock = runs.utc_now,
) -> None:
    """Refuse a run whose scopes a living one holds; nothing is taken. ``own``: attempt keys of its own runs.

    Raises:
        ConflictError: naming the holder.
    """
    for claim in claims(root_uri):
        is_own = bool(claim.record.attempt_key) and claim.record.attempt_key in own
        if not is_own and claim.is_alive(clock()) and claim.meets(scopes):
            raise _refusal(record, claim, scopes)


def claims(root_uri: str) -> list[Claim]:
    """All claims of a lake, dead ones too, oldest first.

    Raises:
        DataError: the object is damaged.
    """
    return _read(root_uri)[1]


def dead(root_uri: str, clock: Clock = runs.utc_now) -> list[Claim]:
    """Claims whose run was killed and which nobody has taken over yet."""
    return [claim for claim in claims(root_uri) if not claim.is_alive(clock())]


def _acquire(
    root_uri: str, record: runs.RunRecord, scopes: tuple[Scope, ...], within: str, clock: Clock
) -> list[str]:
    def change(present: list[Claim]) -> list[Claim]:
        now = clock()
        clashing = [claim for claim in present if claim.run_id != within and claim.meets(scopes)]
        for claim in clashing:
            if claim.is_alive(now):
                raise _refusal(record, claim, scopes)
        taken[:] = clashing
        expires = now + timedelta(seconds=EXPIRY_SECONDS)
        own = Claim(replace(record, config={}, facts={}, rows={}), scopes, expires, _this_process())
        return [*[claim for claim in present if claim not in clashing], own]

    taken: list[Claim] = []
    _change(root_uri, change)
    for claim in taken:
        log.warning("%s: took the lease of %s over, whose process had died", record.run_id, claim.run_id)
        if claim.record.job != UNRECORDED:
            runs.bury(root_uri, claim.record, claim.expires, "killed: its process ended without a word")
    return [claim.run_id for claim in taken]


def _refusal(record: runs.RunRecord, holder: Claim, scopes: tuple[Scope, ...]) -> ConflictError:
    met = holder.meets(scopes)
    assert met is not None
    what = met[0] if met[1] is None else f"{met[0]} {met[1]}"
    return ConflictError(
        f"{record.job} {record.dates}: {what} is held by run {holder.run_id} since {holder.since}; run again "
        f"when it has ended (a killed run loses its lease within {EXPIRY_SECONDS:.0f} s)"
    )


def _heartbeat(root_uri: str, lease: Lease, stop: threading.Event, clock: Clock) -> None:
    def change(present: list[Claim]) -> list[Claim]:
        expires = clock() + timedelta(seconds=EXPIRY_SECONDS)
        if all(claim.run_id != lease.run_id for claim in present):
            lease.lost_to = ", ".join(claim.run_id for claim in present) or "another run"
        return [
            replace(claim, expires=expires) if claim.run_id == lease.run_id else claim for claim in present
        ]

    while not stop.wait(HEARTBEAT_SECONDS) and not lease.lost_to:
        try:
            _change(root_uri, change)
        except CouponflowError as error:  # the next beat may reach the store again
            log.warning("lease of %s: not renewed (%s)", lease.run_id, error)


def _release(root_uri: str, run_id: str) -> None:
    try:
        _change(root_uri, lambda present: [claim for claim in present if claim.run_id != run_id])
    except CouponflowError as error:  # it ends by itself, and must not hide how the run ended
        log.warning("lease of %s: not released (%s); it ends by itself", run_id, error)


def _change(root_uri: str, change: Callable[[list[Claim]], list[Claim]]) -> None:
    """Replace the claims by a function of them; another writer in between means reading again."""
    for attempt in range(_ATTEMPTS):
        content, present = _read(root_uri)
        wanted = _dump(change(present))
        try:
            storage.replace(_uri(root_uri), wanted, content)
            return
        except ConflictError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0, _PAUSE_SECONDS))


def _read(root_uri: str) -> tuple[bytes | None, list[Claim]]:
    uri = _uri(root_uri)
    if not storage.exists(uri):
        return None, []
    content = storage.read_bytes(uri)
    try:
        return content, [_parse(tree) for tree in json.loads(content)["claims"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{uri} is damaged ({error!r}); delete it when no run of this lake is active"
        ) from error


def _parse(tree: dict[str, Any]) -> Claim:
    scopes = tuple((name, DateRange.parse(dates) if dates else None) for name, dates in tree["scopes"])
    known = {name: value for name, value in tree["record"].items() if name in runs.FIELDS}
    expires = datetime.fromisoformat(tree["expires"])
    return Claim(runs.RunRecord(**known), scopes, expires, str(tree["process"]))


def _dump(present: list[Claim]) -> bytes:
    trees = [
        {
            "record": asdict(claim.record),
            "scopes": [[name, str(dates) if dates else ""] for name, dates in claim.scopes],
            "expires": claim.expires.isoformat(),
            "process": claim.process,
        }
        for claim in present
    ]
    return json.dumps({"claims": trees}, indent=1, sort_keys=True).encode()


def _uri(root_uri: str) -> str:
    return storage.join(root_uri, "leases", "held.json")


def _this_process() -> str:
    """Machine, pid and start of this process; a number that the system gives out again is another process."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def _is_gone(process: str) -> bool:
    """Whether a process of this machine has ended; false where that cannot be known."""
    machine, pid, started = process.rsplit(" ", 2)
    if machine != _machine() or not pid.isdecimal():
        return False
    return _started(int(pid)) != started


@cache
def _machine() -> str:
    """Host, boot and process namespace: two containers of one name are two machines."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return f"{socket.gethostname()} unknown"
    return f"{socket.gethostname()} {boot.read_text().strip()} {space.readlink()}"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks; empty where there is none, or only its remains."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self").exists() else "unknown"
    return "" if state in ("Z", "X") else rest[18]
