"""What a job on Dataproc has printed, and how it ended, as one of our errors.

Dataproc tells of a driver that it failed, not with which exit code. Our jobs say so themselves: in a note on
the lake where it is final (``lake.attempts``), else in the last lines of their output.
"""

import logging
import re
from collections import deque

from couponflow.cloud.dataproc import DONE, Job
from couponflow.cloud.requests import argument
from couponflow.errors import ConfigError, ConflictError, CouponflowError, DataError, InfraError
from couponflow.lake import attempts, storage

log = logging.getLogger("couponflow")

_ERRORS = {error.exit_code: error for error in (ConfigError, DataError, ConflictError, InfraError)}
_EXIT_CODE = re.compile(r"exit(?: code)? ([2-5])\b")
_NUM_LINES = 40


class DriverOutput:
    """What a driver prints, read on from where the last look has ended.

    Dataproc writes it as numbered objects below the job's own prefix, which grow.
    """

    def __init__(self) -> None:
        """Nothing has been read."""
        self._read: dict[str, int] = {}
        self._is_closed = False
        self.last: deque[str] = deque(maxlen=_NUM_LINES)

    def more(self, job: Job) -> str:
        """What has come since the last call; empty where nothing has, or where it may not be read."""
        if self._is_closed or not job.output_uri:
            return ""
        folder, _, prefix = job.output_uri.rpartition("/")
        text = ""
        try:
            for name, size in sorted(storage.list_sizes(folder).items()):
                start = self._read.get(name, 0)
                if name.startswith(prefix) and size > start:
                    content = storage.read_from(storage.join(folder, name), start)
                    self._read[name] = start + len(content)
                    text += content.decode(errors="replace")
        except CouponflowError as error:  # the job does not depend on who looks at it
            log.warning("output of job %s is not shown: %s", job.id, error)
            self._is_closed = True
        self.last.extend(text.splitlines())
        return text


def failure(root_uri: str, job: Job, output: DriverOutput) -> CouponflowError | None:
    """Why an ended job did not end well, of the class that its driver has ended with; None for success."""
    if job.state == DONE:
        return None
    what = f"{job.stage} {argument(job.args, '--dates')}: job {job.id}"
    if job.state == "CANCELLED":
        return InfraError(f"{what} was cancelled; submit it again to go on")
    noted = _noted(root_uri, job)
    if noted is not None:
        return type(noted)(f"{what} failed: {noted}")
    said = f"couponflow {job.stage}: "
    lines = [line.removeprefix(said) for line in output.last if line.startswith(said)]
    codes = [match[1] for text in (job.details, *lines) if (match := _EXIT_CODE.search(text))]
    error = _ERRORS[int(codes[-1])] if codes else InfraError
    reasons = [line for line in lines if not _EXIT_CODE.fullmatch(line)]
    reason = reasons[-1] if reasons else job.details or "without a word"
    return error(f"{what} failed: {reason}; its output is in {job.output_uri}*")


def _noted(root_uri: str, job: Job) -> CouponflowError | None:
    """The final failure that the driver has noted, where this account may read the lake."""
    try:
        return attempts.noted(root_uri, job.id)
    except InfraError as error:
        log.debug("note of job %s: %s", job.id, error)
        return None
