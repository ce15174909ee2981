"""What an error of Spark, of Delta or of the Cloud Storage connector below them means, said in ours."""

import re

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException

from couponflow.errors import CommitConflictError, CouponflowError, DataError, InfraError, StoreBusyError
from couponflow.lake import storage

#: What an action of Spark raises: translated by PySpark, or as it came from the JVM.
SPARK_ERRORS: tuple[type[Exception], ...] = (Py4JJavaError, PySparkException)
#: How the connector words an answer of the store: status and reason, then what was asked of which bucket.
_ANSWER = re.compile(r"\b([45]\d\d)\b[^\n]*\n\s*(?:GET|HEAD|POST|PUT|PATCH|DELETE) \S+/b/([^/?\s]+)")
_DENIED = ("401", "403")
_TRANSIENT = ("408", "429", "500", "502", "503", "504")
#: The store did not answer at all; the connector's own frames say that it was the store who was asked.
_CONNECTOR = "com.google.cloud.hadoop"
#: How Spark, Delta and Hadoop word a file that is not as it was written, or is gone.
_DAMAGE = re.compile(
    r"(?:Checksum error:|Encountered error while reading file) ((?:file|gs):/[^\s,]+)"
    r"|File ((?:file|gs):/\S+) does not exist"
)
_SILENCE = re.compile(r"(?:java\.net|javax\.net\.ssl|org\.apache\.http)\.\w+Exception[^\n]*")


def store_error(error: BaseException, where: object) -> CouponflowError | None:
    """What the object store answered Spark, or that it did not, as our error; None where it is not to blame.

    By then the connector has repeated what it can repeat: reads, and uploads that are resumable.
    """
    text = f"{error}\n{getattr(error, 'stackTrace', '')}"  # with the causes, which the first line hides
    for status, bucket in _ANSWER.findall(text):
        if status in _DENIED:
            return storage.denied(str(where), bucket)
        if status in _TRANSIENT:
            return StoreBusyError(
                f"{where}: the object store failed for bucket {bucket} (status {status}); "
                "check its quota and health, then try again"
            )
    silence = _SILENCE.search(text)
    if silence is None or _CONNECTOR not in text:
        return None
    return StoreBusyError(
        f"{where}: the object store did not answer ({silence[0][:200]}); check the network, then try again"
    )


def damage(error: BaseException, where: object) -> DataError | None:
    """A file of the lake that cannot be read as it lies there, by name; None where that is not the reason.

    What the connector threw is the store's, not the file's: it may be other the next time.
    """
    text = f"{error}\n{getattr(error, 'stackTrace', '')}"
    found = _DAMAGE.search(text)
    if found is None or _CONNECTOR in text:
        return None
    file = (found[1] or found[2]).rstrip(".")
    return DataError(
        f"{where}: {file} is damaged or gone; restore the file, or build again what it belongs to"
    )


def read_error(error: Exception, table: str, uri: str) -> CouponflowError:
    """What failed while a table was opened, as our error."""
    if ours := store_error(error, f"table {table} at {uri}"):
        return ours
    if isinstance(error, AnalysisException):
        return DataError(
            f"table {table} cannot be read at {uri}: {first_line(error)}; run the job that writes it"
        )
    return DataError(  # a commit is cut, gone or unreadable
        f"table {table} at {uri}: its log is damaged ({first_line(error)}); restore its _delta_log"
    )


def write_error(error: Exception, table: str, where: object) -> Exception:
    """What failed in a write, as our error; anything that is a bug comes back as it is."""
    text = str(error)
    # Every class of that module is a lost race, and none is a subclass of another.
    if type(error).__module__ == "delta.exceptions" or "ConcurrentModificationException" in text:
        return CommitConflictError(
            f"table {table}, range {where}: another run changed it meanwhile; run again"
        )
    if ours := store_error(error, f"table {table}, range {where}"):
        return ours
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
