"""A write to a Delta table that the object store refuses for the moment: is it there? If not, once more."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from couponflow.errors import StoreBusyError
from couponflow.lake import failures

log = logging.getLogger("couponflow")

_Found = TypeVar("_Found")
#: Tries of one write; the longest of the random pauses between them, in seconds, doubles from this on.
MAX_WRITES, PAUSE_SECONDS = 4, 2.0


def repeated(
    write: Callable[[], object], look: Callable[[], _Found | None], table: str, where: object
) -> _Found | None:
    """Write once, and again where the object store failed for the moment; at most ``MAX_WRITES`` times.

    ``look`` says after an error what the log holds of this write, as only its answer may be lost. Returns
    that, or None after a write without an error.

    Raises:
        CouponflowError: as ``failures.write_error``, once the log holds nothing of it.
    """
    for attempt in range(1, MAX_WRITES + 1):
        try:
            write()
            return None
        except Exception as error:
            if (found := look()) is not None:
                return found
            ours = failures.write_error(error, table, where)
            if not isinstance(ours, StoreBusyError) or attempt == MAX_WRITES:
                raise ours from error
            log.warning("%s; attempt %d of %d follows", ours, attempt + 1, MAX_WRITES)
        time.sleep(random.uniform(0, PAUSE_SECONDS * 2 ** (attempt - 1)))
    raise AssertionError("unreachable")
