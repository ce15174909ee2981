"""Bytes that a run takes in and leaves: how many the tables have written, and how many it may read.

Counted by the process, for whoever compares before and after. A limit holds in the thread that set it, and is
asked before a write begins: nothing is read or shuffled yet.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from couponflow.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

#: Spark's answer for a source whose size it cannot know, such as rows made in memory, is the largest number.
_UNKNOWN_BYTES = 2**60


@dataclass
class _Limit:
    max_bytes: float
    refusal: Callable[[int], str]
    taken: int = 0


_LIMIT: ContextVar[_Limit | None] = ContextVar("limit", default=None)
_lock = threading.Lock()
_written = 0


def written() -> int:
    """Bytes of the files that this process has committed to tables so far."""
    return _written


def wrote(size: int) -> None:
    """Count the files of one commit."""
    global _written
    with _lock:
        _written += size


@contextmanager
def limited(max_bytes: float, refusal: Callable[[int], str]) -> Iterator[None]:
    """Refuse what the block would read beyond ``max_bytes``, with the text that ``refusal`` makes of it."""
    token = _LIMIT.set(_Limit(max_bytes, refusal))
    try:
        yield
    finally:
        _LIMIT.reset(token)


def charge(frame: "DataFrame") -> None:
    """Count what computing a frame reads against the limit, if there is one. Plans it, and runs nothing.

    Raises:
        ConfigError: the limit is passed.
    """
    limit = _LIMIT.get()
    if limit is None:
        return
    limit.taken += input_bytes(frame)
    if limit.taken > limit.max_bytes:
        raise ConfigError(limit.refusal(limit.taken))


def input_bytes(frame: "DataFrame") -> int:
    """Bytes of the files that computing a frame opens; those that a filter leaves out are not among them."""
    leaves: Any = frame._jdf.queryExecution().optimizedPlan().collectLeaves()
    sizes = [int(leaves.apply(n).stats().sizeInBytes()) for n in range(leaves.size())]
    return sum(size for size in sizes if size < _UNKNOWN_BYTES)
