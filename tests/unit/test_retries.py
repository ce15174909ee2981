"""A write that the store refuses for the moment: looked for, repeated, bounded; its answers in our words."""

from collections.abc import Callable

import pytest

from couponflow.errors import CouponflowError, InfraError, StoreBusyError
from couponflow.lake import failures, retries


def answer(status: int, reason: str = "Service Unavailable") -> str:
    """The connector's error in Spark's: what failed, then the cause with status, request and body."""
    return (
        "An error occurred while calling o399.save.\n"
        ": org.apache.spark.SparkException: Job aborted due to stage failure: Task 0 in stage 24.0 failed\n"
        "Caused by: java.io.IOException: Upload failed for 'gs://mails/lake/tables/orders/part-0.parquet'. "
        f"details={status} {reason}\n"
        "POST http://127.0.0.1:4443/upload/storage/v1/b/mails/o?ifGenerationMatch=0&name=lake/part-0.parquet\n"
        "{\n"
        "\tat com.google.cloud.hadoop.gcsio.GoogleCloudStorageExceptions.create(Exceptions.java:87)"
    )


SILENCE = (
    "An error occurred while calling o1.\n: java.net.SocketTimeoutException: Read timed out\n\tat {where}"
)


class Write:
    """Fails with the given texts, one a call, then succeeds."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.calls = list(texts), 0

    def __call__(self) -> None:
        self.calls += 1
        if len(self.texts) >= self.calls:
            raise RuntimeError(self.texts[self.calls - 1])


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSE_SECONDS", 0.0)


def nothing() -> int | None:
    return None


def run(write: Write, look: Callable[[], int | None] = nothing) -> int | None:
    return retries.repeated(write, look, "orders", "2024-01-10")


def test_a_write_is_repeated_until_the_store_takes_it() -> None:
    write = Write(answer(503), answer(429, "Too Many Requests"))
    assert run(write) is None
    assert write.calls == 3


def test_what_the_log_holds_already_is_not_written_again() -> None:
    write = Write(answer(503))
    assert run(write, lambda: 7) == 7
    assert write.calls == 1


def test_patience_ends() -> None:
    write = Write(*[answer(503)] * 9)
    with pytest.raises(
        StoreBusyError, match=r"^table orders, range 2024-01-10: .*bucket mails \(status 503\)"
    ):
        run(write)
    assert write.calls == retries.MAX_WRITES


def test_a_refusal_is_not_repeated() -> None:
    write = Write(answer(403, "Forbidden"))
    with pytest.raises(InfraError, match=r"roles/storage\.objectUser on bucket mails"):
        run(write)
    assert write.calls == 1


def test_a_bug_stays_a_bug() -> None:
    write = Write("index out of range")
    with pytest.raises(RuntimeError, match="index out of range"):
        run(write)
    assert write.calls == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer(401, "Unauthorized"), InfraError),
        (answer(500, "Internal Server Error"), StoreBusyError),
        (answer(408, "Request Timeout"), StoreBusyError),
        (answer(412, "Precondition Failed"), type(None)),  # Delta knows what another writer means
        (answer(404, "Not Found"), type(None)),
        (SILENCE.format(where="com.google.cloud.hadoop.gcsio.Channel.read(Channel.java:1)"), StoreBusyError),
        (SILENCE.format(where="org.apache.spark.rpc.netty.Outbox.send(Outbox.scala:1)"), type(None)),
        ("File file:/lake/orders/part-0.parquet does not exist", type(None)),
    ],
)
def test_each_answer_has_its_error(text: str, expected: type[CouponflowError] | type[None]) -> None:
    found = failures.store_error(RuntimeError(text), "table orders")
    assert type(found) is expected
    assert found is None or (str(found).startswith("table orders: ") and "\n" not in str(found))


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("File file:/lake/orders/part-0.parquet does not exist. It is", "file:/lake/orders/part-0.parquet"),
        ("Encountered error while reading file file:///lake/2.json. Details:", "file:///lake/2.json"),
        ("ChecksumException: Checksum error: file:/lake/2.json at 0 exp: 1", "file:/lake/2.json"),
        ("Encountered error while reading file gs://b/2.json.\n at com.google.cloud.hadoop.gcsio.R", ""),
        ("Python worker exited unexpectedly (crashed)", ""),
    ],
)
def test_a_damaged_file_is_named_unless_the_store_is_to_blame(text: str, file: str) -> None:
    found = failures.damage(RuntimeError(text), "table orders")
    assert (found is not None) == bool(file)
    assert found is None or str(found).startswith(f"table orders: {file} is damaged or gone; ")
