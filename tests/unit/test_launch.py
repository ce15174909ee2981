"""Launching: argv, error files, the watchdog, and the group of one. The launcher is a small fake script."""

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from couponflow.errors import ConfigError, DataError, InfraError
from couponflow.training import launch
from couponflow.training.workers import Workers, connect


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run argv itself instead of horovodrun."""
    monkeypatch.setattr(launch, "command", lambda num_ranks, argv, *limits: list(argv))


#: How a rank leaves its error, in a script that knows the folder as ``f``.
NOTE = (
    "note = lambda rank, kind, text, at=1: f.joinpath(f'error-{rank}.json').write_text("
    "json.dumps({'class': kind, 'message': text, 'time': at}));"
)


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_command_is_static_gloo_on_localhost() -> None:
    argv = launch.command(2, ["python", "train.py"], 60, 45.5)
    assert Path(argv[0]) == Path(sys.executable).parent / "horovodrun"
    where = ["-np", "2", "-H", "localhost:2", "--gloo"]
    limits = ["--start-timeout", "60", "--gloo-timeout-seconds", "166"]
    assert argv[1:] == [*where, *limits, "--cycle-time-ms", "10", "python", "train.py"]


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.num_ranks = 100000: this machine has slots for \d+"):
        launch.command(100_000, ["x"])


def test_group_of_one_returns_what_it_gets() -> None:
    workers = connect()
    assert (workers.rank, workers.size, type(workers)) == (0, 1, Workers)
    assert workers.allreduce_sum([1, 2]).tolist() == [1.0, 2.0]
    assert workers.allreduce_sum(3).tolist() == [3.0]
    assert workers.start_sum("rows", [1, 2])().tolist() == [1.0, 2.0]
    assert workers.allreduce_max(4) == 4.0
    assert np.array_equal(workers.gather([1.0, 2.0]), [1.0, 2.0])


def test_lines_are_passed_on_without_the_launcher_prefix(
    fake: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("couponflow"), "propagate", True)
    with caplog.at_level(logging.INFO, "couponflow"):
        launch.run(2, script("print('[0]<stderr>:12:34:56 INFO epoch 1'); print(); print('plain')"), tmp_path)
    assert caplog.messages == ["epoch 1", "plain"]


def test_error_of_a_rank_comes_back_as_its_class(fake: None, tmp_path: Path) -> None:
    (tmp_path / "error-0.json").write_text(json.dumps({"class": "ConfigError", "message": "old"}))
    text = (
        "import pathlib, json, sys; f = pathlib.Path(sys.argv[1]);"
        f"{NOTE} note(0, 'InfraError', 'peer lost'); note(1, 'DataError', 'loss is NaN', 2); sys.exit(3)"
    )
    with pytest.raises(DataError, match="rank 1: loss is NaN"):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path)


def test_the_first_rank_to_fail_is_named(fake: None, tmp_path: Path) -> None:
    text = (
        "import pathlib, json, sys; f = pathlib.Path(sys.argv[1]);"
        f"{NOTE} note(0, 'InfraError', 'peer lost', 200); note(1, 'InfraError', 'disk full', 100);"
        "sys.exit(5)"
    )
    with pytest.raises(InfraError, match="rank 1: disk full"):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path)


def test_a_lost_peer_points_to_the_rank_that_said_nothing(fake: None, tmp_path: Path) -> None:
    """Whichever the launcher saw end first."""
    text = (
        "import json, pathlib, sys; from couponflow.training.watchdog import FilePulse;"
        "f = pathlib.Path(sys.argv[1]);"
        "FilePulse(f, 0).beat('step', 1, 5); FilePulse(f, 1).beat('load', 1, 4);"
        f"{NOTE} note(0, 'InfraError', 'HorovodInternalError: peer closed');"
        "print('Process name: 0\\nExit code: 5\\n'); sys.exit(1)"
    )
    with pytest.raises(
        InfraError, match=r"rank 1 ended without a word at epoch 1, step 4 \(last phase: load\)"
    ):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path)


def test_a_wordless_death_is_an_infra_error_with_the_last_lines(fake: None, tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=r"code 7 .* last lines: one \| two"):
        launch.run(2, script("print('one'); print('two'); raise SystemExit(7)"), tmp_path)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


#: Rank 1 of a group: beats at epoch 2, step 7, and stops itself, as SIGSTOP would.
STOPPED = (
    "import os, pathlib, signal, sys; from couponflow.training.watchdog import FilePulse;"
    "pulse = FilePulse(pathlib.Path(sys.argv[1]), 1); pulse.beat('step', 2, 7);"
    "os.kill(os.getpid(), signal.SIGSTOP)"
)


def test_a_stopped_rank_is_named_and_the_whole_family_killed(fake: None, tmp_path: Path) -> None:
    # The rank has a session of its own, as ranks have, and is stopped: only SIGKILL ends it.
    text = (
        "import pathlib, subprocess, sys, time; from couponflow.training.watchdog import FilePulse;"
        f"rank = [sys.executable, '-c', {STOPPED!r}, sys.argv[1]];"
        "subprocess.Popen(rank, start_new_session=True); pulse = FilePulse(pathlib.Path(sys.argv[1]), 0);"
        "pulse.beat('step', 2, 7); pulse.exchange(); print('waiting', flush=True); time.sleep(60)"
    )
    start = time.perf_counter()
    with pytest.raises(
        InfraError, match=r"rank 1 made no progress for 2 s at epoch 2, step 7 \(last phase: st"
    ):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path, start_timeout_seconds=20, stall_seconds=2)
    assert time.perf_counter() - start < 40
    beats = [json.loads((tmp_path / f"heartbeat-{rank}").read_text()) for rank in range(2)]
    assert all(is_gone(beat["process"]) for beat in beats)


def test_a_stopped_rank_that_outlives_its_launcher_is_killed(fake: None, tmp_path: Path) -> None:
    """As Horovod leaves it: the other rank gives up, the launcher ends, and the stopped one stays."""
    text = (
        "import pathlib, subprocess, sys, time;"
        f"rank = [sys.executable, '-c', {STOPPED!r}, sys.argv[1]];"
        "quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True);"
        "subprocess.Popen(rank, **quiet); beat = pathlib.Path(sys.argv[1], 'heartbeat-1');\n"
        "while not (beat.is_file() and '\"step\"' in beat.read_text()): time.sleep(0.05)\n"
        "time.sleep(2); print('Process name: 0\\nExit code: 5'); sys.exit(1)"
    )
    with pytest.raises(InfraError, match=r"rank 1 hung at epoch 2, step 7 \(last phase: step\) and was k"):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path)
    assert is_gone(json.loads((tmp_path / "heartbeat-1").read_text())["process"])


def test_the_rank_that_died_first_is_named_with_its_place(fake: None, tmp_path: Path) -> None:
    """Its peer has only lost it, and says so."""
    text = (
        "import json, pathlib, sys; from couponflow.training.watchdog import FilePulse;"
        "f = pathlib.Path(sys.argv[1]); FilePulse(f, 1).beat('checkpoint', 3, 20);"
        f"{NOTE} note(0, 'InfraError', 'peer lost');"
        "print('The first process to do so was:\\nProcess name: 1\\nExit code: 137\\n'); sys.exit(1)"
    )
    place = (
        r"rank 1 ended with code 137 without a word at epoch 3, step 20 \(last phase: checkpoint\); run again"
    )
    with pytest.raises(InfraError, match=place):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path)


def test_a_pipe_that_outlives_its_launcher_does_not_hang_the_call(
    fake: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import subprocess, sys;"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)'];"
        "print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)"
    )
    start = time.perf_counter()
    monkeypatch.setattr(launch, "KILL_SECONDS", 1.5)
    monkeypatch.setattr(logging.getLogger("couponflow"), "propagate", True)
    with caplog.at_level(logging.INFO, "couponflow"):
        launch.run(2, script(text), tmp_path)
    psutil.Process(int(caplog.messages[0])).kill()
    assert time.perf_counter() - start < 30


def test_a_job_that_is_told_to_end_takes_its_ranks_along(tmp_path: Path) -> None:
    rank = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    text = (
        "import logging, pathlib, sys; from couponflow.training import launch;"
        "logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout);"
        "launch.command = lambda num_ranks, argv, *limits: list(argv);"
        f"launch.run(2, {script(rank)!r}, pathlib.Path({str(tmp_path)!r}))"
    )
    with subprocess.Popen(script(text), stdout=subprocess.PIPE, text=True) as job:
        pid = int(job.stdout.readline())
        job.terminate()
        assert job.wait(timeout=30) == 128 + signal.SIGTERM
    assert is_gone(pid)


def test_a_foreign_error_of_a_rank_is_an_infra_error_without_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(workers: Workers) -> None:
        raise RuntimeError("peer closed the connection\nat gloo/transport.cc")

    with pytest.raises(SystemExit) as caught:
        launch.run_rank(tmp_path, work)
    assert caught.value.code == 5
    note = json.loads((tmp_path / "error-0.json").read_text())
    assert note["class"] == "InfraError"
    path = tmp_path / "traceback-0.txt"
    assert note["message"] == f"RuntimeError: peer closed the connection; run again, or see {path}"
    assert "at gloo/transport.cc" in path.read_text()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["error-0.json", "traceback-0.txt"]
    assert capsys.readouterr().err == ""


def test_a_rank_leaves_its_error_and_exit_code(tmp_path: Path) -> None:
    def work(workers: Workers) -> None:
        raise DataError(f"rank {workers.rank} of {workers.size}")

    with pytest.raises(SystemExit) as caught:
        launch.run_rank(tmp_path, work)
    assert caught.value.code == 3
    note = json.loads((tmp_path / "error-0.json").read_text())
    assert (note["class"], note["message"]) == ("DataError", "rank 0 of 1")


def test_horovod_is_not_imported_by_a_group_of_one() -> None:
    code = (
        "import sys; from couponflow.training import feed, launch, workers; workers.connect();"
        "print('horovod' in sys.modules, 'torch' in sys.modules, 'petastorm' in sys.modules)"
    )
    found = subprocess.run(script(code), capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False", "False"]
