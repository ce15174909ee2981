"""What a rank leaves when it fails, and what its launcher makes of the ends of all ranks.

A rank leaves its error as ``error-<rank>.json`` in the run's folder, local or on the lake, with the traceback
of an error that is not ours beside it. Of several errors the launcher raises the one that tells the cause: a
rank that has only lost another says so too, and a rank that was killed says nothing.
"""

import gc
import json
import logging
import re
import traceback
from collections.abc import Callable, Sequence

from couponflow.errors import (
    ConfigError,
    ConflictError,
    CouponflowError,
    DataError,
    InfraError,
)
from couponflow.lake import runs, storage
from couponflow.training.watchdog import DONE, Beat
from couponflow.training.workers import Workers

log = logging.getLogger("couponflow")

#: How Horovod names the first rank that ended badly, on two lines of its last words.
_FIRST_DEAD = re.compile(r"Process name: (\d+)\s+Exit code: (-?\d+)")
#: What a rank says that has only lost another.
_LOST_PEER = "HorovodInternalError"
_RESUMES = "run again: training resumes from its last checkpoint"
_WRITER = "train"
_ERRORS: dict[str, type[CouponflowError]] = {
    error.__name__: error for error in (ConfigError, DataError, ConflictError, InfraError)
}


def guard(uri: str, workers: Workers, work: Callable[[Workers], None]) -> None:
    """Run ``work`` as one rank; its error goes below ``uri`` for the launcher, its exit code to the caller.

    An error that is not ours, such as Horovod's when a peer is gone, counts as ``InfraError``.
    """
    gc.freeze()  # what is imported stays: walking through it at each collection takes 3 % of a step
    try:
        work(workers)
        workers.beat(DONE)
    except Exception as error:
        ours = error if isinstance(error, CouponflowError) else _foreign(error, uri, workers.rank)
        note = {"class": type(ours).__name__, "message": str(ours), "time": runs.utc_now().timestamp()}
        _leave(uri, f"error-{workers.rank}.json", json.dumps(note))
        raise SystemExit(ours.exit_code) from error


def forget(uri: str, num_ranks: int) -> None:
    """Remove what an earlier run has left below ``uri``."""
    for rank in range(num_ranks):
        storage.remove(_note_uri(uri, rank))


def first(
    uri: str,
    num_ranks: int,
    how: str,
    words: Sequence[str],
    beats: Sequence[Beat],
    hung: Sequence[Beat] = (),
) -> CouponflowError:
    """Why the ranks ended: what one of them has named, or who died or hung without a word, where.

    ``how`` the launcher ended, with its last ``words``. ``hung`` are ranks that outlived it; the others have
    then only lost their peer.
    """
    notes = _notes(uri, num_ranks)
    named = _cause(notes)
    if named is not None and not isinstance(named, InfraError):
        return named
    if hung:
        return InfraError(f"rank {hung[0].rank} hung {hung[0]} and was killed; {_RESUMES}")
    dead = _FIRST_DEAD.search("\n".join(words))
    silent = [beat for beat in beats if beat.rank not in notes]
    for beat in silent:
        if dead is not None and beat.rank == int(dead[1]):
            return InfraError(f"rank {beat.rank} ended with code {dead[2]} without a word {beat}; {_RESUMES}")
    working = [beat for beat in silent if beat.phase != DONE]
    if working and named is not None and _LOST_PEER in str(named):
        beat = min(working, key=lambda found: found.exchanges)
        return InfraError(f"rank {beat.rank} ended without a word {beat}; {_RESUMES}")
    return named or InfraError(
        f"{num_ranks} ranks ended with {how} and no error of ours; last lines: "
        f"{' | '.join(list(words)[-5:])}; run again"
    )


def named(uri: str, num_ranks: int) -> CouponflowError | None:
    """The cause that a rank has left below ``uri``; None if none has left any."""
    return _cause(_notes(uri, num_ranks))


def _notes(uri: str, num_ranks: int) -> dict[int, dict[str, str]]:
    """What ranks have left, by rank."""
    names = set(storage.list_names(uri))
    return {
        rank: json.loads(storage.read_bytes(_note_uri(uri, rank)))
        for rank in range(num_ranks)
        if _note_uri(uri, rank).rpartition("/")[2] in names
    }


def _cause(notes: dict[int, dict[str, str]]) -> CouponflowError | None:
    """A rank that saw the cause outranks one that only lost its peer; of those the first counts."""
    if not notes:
        return None

    def order(rank: int) -> tuple[float, int]:
        note = notes[rank]
        return float(note["time"]) if note["class"] == "InfraError" else 0.0, rank

    rank = min(notes, key=order)
    note = notes[rank]
    return _ERRORS.get(note["class"], InfraError)(f"rank {rank}: {note['message']}")


def _foreign(error: Exception, uri: str, rank: int) -> InfraError:
    name = f"traceback-{rank}.txt"
    _leave(uri, name, "".join(traceback.format_exception(error)))
    text = str(error).strip().partition("\n")[0]
    return InfraError(f"{type(error).__name__}: {text}; run again, or see {storage.join(uri, name)}")


def _leave(uri: str, name: str, text: str) -> None:
    """Whole or not at all: the launcher may kill this rank now."""
    try:
        storage.create(storage.join(uri, name), text.encode(), _WRITER)
    except CouponflowError as error:  # must not hide why the rank failed
        log.warning("%s is not written: %s", name, error)


def _note_uri(uri: str, rank: int) -> str:
    return storage.join(uri, f"error-{rank}.json")
