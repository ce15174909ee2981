"""Which runs must not be started again: a note on the lake, under the key of the attempt.

Dataproc starts a driver again after any exit but 0. Bad arguments and bad data (exit codes 2 and 3) fail the
same way every time, so the first such end leaves a note; a driver of the same attempt that finds it ends at
once with the same code and text, before Spark starts. The next attempt has another key. An error in the
config file itself leaves no note: it is what says where the lake is, and nothing has started by then.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from couponflow.errors import ConfigError, CouponflowError, DataError
from couponflow.lake import storage

log = logging.getLogger("couponflow")

_FINAL = {error.exit_code: error for error in (ConfigError, DataError)}


@contextmanager
def guarded(root_uri: str, key: str) -> Iterator[None]:
    """Run the body unless it has failed for good before; note such a failure. Without a key: just run it.

    Raises:
        ConfigError, DataError: what the noted attempt ended with.
    """
    if not key:
        yield
        return
    if (failure := noted(root_uri, key)) is not None:
        raise failure
    try:
        yield
    except (ConfigError, DataError) as error:
        _note(root_uri, key, error)
        raise


def noted(root_uri: str, key: str) -> CouponflowError | None:
    """What an attempt has failed with for good; None where it may go on."""
    uri = _uri(root_uri, key)
    if not storage.exists(uri):
        return None
    try:
        tree = json.loads(storage.read_bytes(uri))
        return _FINAL[tree["exit_code"]](str(tree["error"]))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{uri} is damaged ({error!r}); delete it to let the job run again") from error


def _note(root_uri: str, key: str, failure: CouponflowError) -> None:
    content = json.dumps({"exit_code": failure.exit_code, "error": str(failure)}, sort_keys=True).encode()
    try:
        storage.create(_uri(root_uri, key), content, key)
    except CouponflowError as error:  # must not hide why the job failed
        log.warning("attempt %s: not marked as failed for good (%s)", key, error)


def _uri(root_uri: str, key: str) -> str:
    return storage.join(root_uri, "attempts", f"{key}.json")
