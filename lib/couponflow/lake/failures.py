"""What an error of Spark or Delta means, said in ours."""

import re

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException

from couponflow.errors import CommitConflictError, DataError, InfraError


def write_error(error: Exception, table: str, where: object) -> Exception:
    """What failed in a write, as our error; anything that is a bug comes back as it is."""
    text = str(error)
    # Every class of that module is a lost race, and none is a subclass of another.
    if type(error).__module__ == "delta.exceptions" or "ConcurrentModificationException" in text:
        return CommitConflictError(
            f"table {table}, range {where}: another run changed it meanwhile; run again"
        )
    null = re.search(r"null in ([a-z_]+\.[a-z_]+)", text)
    if null:
        return DataError(
            f"{null[1]} is null in range {where}, which the table forbids; quarantine such rows first"
        )
    if isinstance(error, AnalysisException) and "REPLACE_WHERE_MISMATCH" in text:
        return DataError(
            f"table {table}: rows outside range {where} were to be written; filter the input to the range"
        )
    if isinstance(error, Py4JJavaError | AnalysisException) or type(error).__module__.startswith("pyspark"):
        return InfraError(
            f"table {table}, range {where}: write failed ({first_line(error)}); "
            "the previous version is intact, run again"
        )
    return error


def first_line(error: Exception) -> str:
    """The first line of an error of Spark, without the trace of its JVM."""
    cause = getattr(error, "java_exception", None)
    text = str(cause.getMessage()) if cause is not None else str(error)
    return text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
