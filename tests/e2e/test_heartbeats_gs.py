"""What ranks leave on ``gs://`` reaches whoever watches them: heartbeats, and the error of one that fails."""

import pytest

from couponflow.errors import DataError, InfraError
from couponflow.training import rank_errors
from couponflow.training.watchdog import DONE, LakePulse, Watch
from couponflow.training.workers import Workers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_silent_rank_is_named_from_its_object(bucket: str) -> None:
    uri, clock = f"{bucket}/lake/work/train-1", Clock()
    LakePulse(uri, 0).close()  # of an earlier run
    watch = Watch(uri, 2, start_seconds=30, stall_seconds=10, clock=clock)
    pulses = [LakePulse(uri, rank, send_seconds=3600) for rank in range(2)]
    pulses[0].exchange()
    pulses[1].beat("load", 2, 7)
    for pulse in pulses:
        pulse._send()
    clock.now = 5.0
    assert watch.look()
    assert [(beat.phase, beat.step) for beat in watch.beats()] == [("start", 0), ("load", 7)]
    clock.now = 16.0
    with pytest.raises(InfraError, match=r"rank 1 made no progress for 11 s at epoch 2, step 7"):
        watch.look()
    for pulse in pulses:
        pulse.beat(DONE)
        pulse.close()
    watch.refresh()
    assert {beat.phase for beat in watch.beats()} == {DONE}


def test_the_error_of_a_rank_comes_back_from_its_object(bucket: str) -> None:
    uri = f"{bucket}/lake/work/train-2"

    def work(workers: Workers) -> None:
        raise DataError("its shard is damaged; restore it")

    assert rank_errors.named(uri, 2) is None
    with pytest.raises(SystemExit) as caught:
        rank_errors.guard(uri, Workers(), work)
    assert caught.value.code == 3
    found = rank_errors.named(uri, 2)
    assert isinstance(found, DataError)
    assert str(found) == "rank 0: its shard is damaged; restore it"
    rank_errors.forget(uri, 2)
    assert rank_errors.named(uri, 2) is None
