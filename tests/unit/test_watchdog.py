"""The watchdog: which rank lags, from heartbeats alone; the clock is injected."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from couponflow.errors import InfraError
from couponflow.training import watchdog
from couponflow.training.watchdog import DONE, FilePulse, LakePulse, Watch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_watch(folder: Path, clock: Clock, num_ranks: int = 2) -> Watch:
    return Watch(str(folder), num_ranks, start_seconds=30, stall_seconds=10, clock=clock)


def passes(watch: Watch, clock: Clock, seconds: float) -> None:
    clock.now += seconds
    assert watch.look()


def test_beating_ranks_are_left_alone(tmp_path: Path, clock: Clock) -> None:
    watch = make_watch(tmp_path, clock)
    pulses = [FilePulse(tmp_path, rank) for rank in range(2)]
    for step in range(50):
        for pulse in pulses:
            pulse.beat("step", 1, step)
            pulse.exchange()
        passes(watch, clock, 9)
    assert [beat.process for beat in watch.beats()] == [os.getpid()] * 2
    assert not watch.look()  # it has just looked


def test_the_rank_that_has_entered_fewer_exchanges_is_named(tmp_path: Path, clock: Clock) -> None:
    """Rank 0 waits for rank 1 and is silent for longer: its last beat is the older one."""
    watch = make_watch(tmp_path, clock)
    pulses = [FilePulse(tmp_path, rank) for rank in range(2)]
    for pulse in pulses:
        pulse.beat("step", 2, 7)
    pulses[0].exchange()
    passes(watch, clock, 1)
    pulses[1].beat("step", 2, 8)
    passes(watch, clock, 5)
    passes(watch, clock, 9)  # rank 0 is silent for 14 s, and rank 1 is not stuck
    with pytest.raises(
        InfraError, match=r"rank 1 made no progress for 11 s at epoch 2, step 8 \(last phase: s"
    ):
        passes(watch, clock, 2)


@pytest.mark.parametrize("silent", [0, 1])
def test_of_ranks_at_one_exchange_the_older_beat_is_named(tmp_path: Path, clock: Clock, silent: int) -> None:
    watch = make_watch(tmp_path, clock)
    pulses = [FilePulse(tmp_path, rank) for rank in range(2)]
    for pulse in pulses:
        pulse.beat("load", 1, 0)
    passes(watch, clock, 1)
    pulses[1 - silent].beat("load", 1, 1)
    passes(watch, clock, 5)
    with pytest.raises(
        InfraError, match=rf"^rank {silent} made no progress for 12 s .* were killed; run again"
    ):
        passes(watch, clock, 7)


def test_a_rank_that_never_started_has_time_to_start(tmp_path: Path, clock: Clock) -> None:
    watch = make_watch(tmp_path, clock)
    FilePulse(tmp_path, 0)
    passes(watch, clock, 39)
    with pytest.raises(
        InfraError, match=r"rank 1 made no progress for 41 s before the first epoch \(last phas"
    ):
        passes(watch, clock, 2)


def test_a_rank_that_is_done_is_not_expected_to_beat(tmp_path: Path, clock: Clock) -> None:
    watch = make_watch(tmp_path, clock)
    pulses = [FilePulse(tmp_path, rank) for rank in range(2)]
    pulses[1].beat(DONE)
    for _ in range(5):
        pulses[0].beat("validate", 3)
        passes(watch, clock, 9)
    pulses[0].beat(DONE)
    passes(watch, clock, 9)
    with pytest.raises(InfraError, match="all ranks are done but their launcher did not end for 10 s"):
        passes(watch, clock, 11)


def test_a_half_written_beat_counts_for_nothing(tmp_path: Path, clock: Clock) -> None:
    watch = make_watch(tmp_path, clock, 1)
    FilePulse(tmp_path, 0).beat("step", 4, 2)
    passes(watch, clock, 1)
    before = watch.beats()
    (tmp_path / "heartbeat-0").write_text('{"rank": 0, "ph')
    passes(watch, clock, 9)
    assert watch.beats() == before
    with pytest.raises(InfraError, match="epoch 4, step 2"):
        passes(watch, clock, 2)


def test_an_earlier_runs_heartbeats_are_forgotten(tmp_path: Path, clock: Clock) -> None:
    FilePulse(tmp_path, 0).beat("step", 9, 9)
    watch = make_watch(tmp_path, clock, 1)
    passes(watch, clock, 1)
    assert watch.beats()[0].process == 0


def test_the_newest_beat_reaches_the_lake_though_its_thread_sleeps(tmp_path: Path, clock: Clock) -> None:
    watch = make_watch(tmp_path, clock, 1)
    pulse = LakePulse(str(tmp_path), 0, send_seconds=3600)
    for step in range(3):
        pulse.beat("step", 1, step)
    passes(watch, clock, 1)
    assert [beat.phase for beat in watch.beats()] == ["start"]  # a step is shorter than a write
    pulse.beat(DONE)
    pulse.close()
    passes(watch, clock, 1)
    assert [beat.phase for beat in watch.beats()] == [DONE]


def test_a_thread_sends_beats_while_the_rank_works(tmp_path: Path) -> None:
    pulse = LakePulse(str(tmp_path), 0, send_seconds=0.01)
    pulse.beat("step", 4, 2)
    deadline = time.monotonic() + 30
    while b'"step": 2' not in (tmp_path / "heartbeat-0").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    pulse.close()
    assert json.loads((tmp_path / "heartbeat-0").read_bytes())["epoch"] == 4


def test_a_beat_whose_answer_was_lost_does_not_silence_the_rank(tmp_path: Path, clock: Clock) -> None:
    """What lies there is not what the rank believes it wrote last."""
    watch = make_watch(tmp_path, clock, 1)
    pulse = LakePulse(str(tmp_path), 0, send_seconds=3600)
    (tmp_path / "heartbeat-0").write_bytes(b"written, but the rank was told that it was not")
    pulse.beat("step", 1, 1)
    pulse._send()
    pulse.beat("step", 1, 2)
    pulse.close()
    passes(watch, clock, 1)
    assert [beat.step for beat in watch.beats()] == [2]


def test_a_shorter_beat_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    pulse = FilePulse(tmp_path, 0)
    pulse.beat("checkpoint", 123_456, 123_456_789)
    pulse.beat("load")
    assert json.loads((tmp_path / "heartbeat-0").read_text())["phase"] == "load"


def test_a_rank_ends_when_its_launcher_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_LOOK_SECONDS", -1.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        (tmp_path / "launcher").write_text(str(launcher.pid))
        pulse = FilePulse(tmp_path, 0)
        pulse.beat("step", 1, 1)
        launcher.kill()
    with pytest.raises(InfraError, match="process that started this rank is gone"):
        pulse.beat("step", 1, 2)
