"""The four ways a run may fail; the class decides the exit code.

A message is one line: what happened, in which table, range or file, and what to do next.
"""


class CouponflowError(Exception):
    """Base of all errors that a run may end with; ``exit_code`` is what the process returns."""

    exit_code = 1


class ConfigError(CouponflowError):
    """Bad arguments or configuration; the same call fails again."""

    exit_code = 2


class DataError(CouponflowError):
    """Corrupt, missing, drifted, stale or immature data; a person has to look."""

    exit_code = 3


class ConflictError(CouponflowError):
    """Another run holds or has changed the same range; trying again later helps."""

    exit_code = 4


class CommitConflictError(ConflictError):
    """A commit lost its race: nothing was written, and reading again and repeating may succeed at once."""


class InfraError(CouponflowError):
    """A worker, disk or network failed; a restart helps."""

    exit_code = 5


class StoreBusyError(InfraError):
    """The object store failed for the moment: nothing is known to be written, and repeating may succeed."""
