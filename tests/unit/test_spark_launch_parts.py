"""Ranks as Spark tasks, without Spark: lines in pieces, the signal of the watch, the end of the process."""

import logging
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import cloudpickle
import pytest

from couponflow.errors import InfraError
from couponflow.training import spark_launch
from couponflow.training.watchdog import FilePulse, Watch


def test_pieces_of_a_rank_s_output_become_its_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("couponflow"), "propagate", True)
    tail: deque[str] = deque()
    lines = spark_launch._Lines(tail)

    def other() -> None:
        lines.write("[1]<stderr>:12:34:56 INFO of another rank\n")

    with caplog.at_level(logging.INFO, "couponflow"):
        lines.write("[0]<stderr>:12:34:56 IN")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        lines.write("FO epoch 1\n[0]<stdout>:\n[0]<stdout>:plain\n")
    assert caplog.messages == ["of another rank", "epoch 1", "plain"] == list(tail)


def test_a_rank_without_progress_interrupts_the_main_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it waits for; what a launcher has put on its signals is gone afterwards."""
    monkeypatch.setattr(spark_launch, "_LOOK_SECONDS", 0.01)
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    hook = threading.excepthook
    watch = Watch(str(tmp_path), 1, start_seconds=0, stall_seconds=0.5)
    FilePulse(tmp_path, 0).beat("step", 1, 2)
    found: list[InfraError] = []
    waiting = threading.Event()

    def wait() -> None:
        with spark_launch._watched(watch, found):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            waiting.wait(60)

    with pytest.raises(InfraError, match="rank 0 made no progress for 1 s at epoch 1, step 2") as caught:
        wait()
    assert found == [caught.value]
    after = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    assert after == before
    assert threading.excepthook is hook


def test_a_thread_that_waits_for_a_lost_machine_does_not_keep_the_process() -> None:
    code = (
        "import threading; from couponflow.training import spark_launch; spark_launch._EXIT_SECONDS = 0.1;"
        "threading.Thread(target=threading.Event().wait).start(); spark_launch._end_soon(5)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == 5


def test_what_a_rank_runs_first_needs_nothing_of_this_package() -> None:
    """It is read before the package can be imported; the rank then finds the zip in its folder."""
    start = spark_launch._entry(["couponflow.zip"], "json:loads", ("[1]",))
    content = cloudpickle.dumps(start)
    code = (
        "import pickle, sys; sys.path = [p for p in sys.path if 'couponflow' not in p]; "
        "sys.modules['couponflow'] = None; pickle.loads(sys.stdin.buffer.read()); print('read')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True)
    assert done.stdout.strip() == b"read", done.stderr
    assert pickle.loads(content)() is None
