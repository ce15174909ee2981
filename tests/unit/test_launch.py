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


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run argv itself instead of horovodrun."""
    monkeypatch.setattr(launch, "command", lambda num_ranks, argv, timeout: list(argv))


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_command_is_static_gloo_on_localhost() -> None:
    argv = launch.command(2, ["python", "train.py"], 60)
    assert Path(argv[0]) == Path(sys.executable).parent / "horovodrun"
    where = ["-np", "2", "-H", "localhost:2", "--gloo", "--start-timeout", "60"]
    assert argv[1:] == [*where, "python", "train.py"]


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.num_ranks = 100000: this machine has slots for \d+"):
        launch.command(100_000, ["x"])


def test_group_of_one_returns_what_it_gets() -> None:
    workers = launch.connect()
    assert (workers.rank, workers.size, type(workers)) == (0, 1, launch.Workers)
    assert workers.allreduce_sum([1, 2]).tolist() == [1.0, 2.0]
    assert workers.allreduce_sum(3).tolist() == [3.0]
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
        "f.joinpath('error-0.json').write_text(json.dumps({'class': 'InfraError', 'message': 'peer lost'}));"
        "f.joinpath('error-1.json').write_text(json.dumps({'class': 'DataError', 'message': 'loss is NaN'}));"
        "sys.exit(3)"
    )
    with pytest.raises(DataError, match="rank 1: loss is NaN"):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path)


def test_the_first_rank_to_fail_is_named(fake: None, tmp_path: Path) -> None:
    text = (
        "import pathlib, json, os, sys; f = pathlib.Path(sys.argv[1]);"
        "note = lambda rank, at, text: (f.joinpath(f'error-{rank}.json').write_text(json.dumps("
        "{'class': 'InfraError', 'message': text})), os.utime(f / f'error-{rank}.json', (at, at)));"
        "note(0, 200, 'peer lost'); note(1, 100, 'disk full'); sys.exit(5)"
    )
    with pytest.raises(InfraError, match="rank 1: disk full"):
        launch.run(2, [*script(text), str(tmp_path)], tmp_path)


def test_a_wordless_death_is_an_infra_error_with_the_last_lines(fake: None, tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=r"code 7 .* last lines: one \| two"):
        launch.run(2, script("print('one'); print('two'); raise SystemExit(7)"), tmp_path)


def test_silence_kills_the_whole_family(fake: None, tmp_path: Path) -> None:
    # The child has a session of its own, as ranks have, and is stopped: only SIGKILL ends it.
    text = (
        "import os, signal, subprocess, sys, time;"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)'];"
        "child = subprocess.Popen(sleep, start_new_session=True);"
        "os.kill(child.pid, signal.SIGSTOP); print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.perf_counter()
    with pytest.raises(InfraError, match=r"nothing for 1.5 s and were killed; last line: (\d+)") as caught:
        launch.run(2, script(text), tmp_path, silence_seconds=1.5)
    assert time.perf_counter() - start < 30
    pid = int(str(caught.value).split("last line: ")[1].split(";")[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_pipe_that_outlives_its_launcher_does_not_hang_the_call(fake: None, tmp_path: Path) -> None:
    text = (
        "import subprocess, sys;"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)'];"
        "print(subprocess.Popen(sleep, start_new_session=True).pid, flush=True)"
    )
    start = time.perf_counter()
    with pytest.raises(InfraError, match=r"nothing for 1\.5 s") as caught:
        launch.run(2, script(text), tmp_path, silence_seconds=1.5)
    psutil.Process(int(str(caught.value).split("last line: ")[1].split(";")[0])).kill()
    assert time.perf_counter() - start < 30


def test_a_job_that_is_told_to_end_takes_its_ranks_along(tmp_path: Path) -> None:
    rank = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    text = (
        "import logging, pathlib, sys; from couponflow.training import launch;"
        "logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout);"
        "launch.command = lambda num_ranks, argv, timeout: list(argv);"
        f"launch.run(2, {script(rank)!r}, pathlib.Path({str(tmp_path)!r}))"
    )
    with subprocess.Popen(script(text), stdout=subprocess.PIPE, text=True) as job:
        pid = int(job.stdout.readline())
        job.terminate()
        assert job.wait(timeout=30) == 128 + signal.SIGTERM
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_foreign_error_of_a_rank_is_an_infra_error_without_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(workers: launch.Workers) -> None:
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
    def work(workers: launch.Workers) -> None:
        raise DataError(f"rank {workers.rank} of {workers.size}")

    with pytest.raises(SystemExit) as caught:
        launch.run_rank(tmp_path, work)
    assert caught.value.code == 3
    assert json.loads((tmp_path / "error-0.json").read_text()) == {
        "class": "DataError",
        "message": "rank 0 of 1",
    }


def test_horovod_is_not_imported_by_a_group_of_one() -> None:
    code = (
        "import sys; from couponflow.training import feed, launch; launch.connect();"
        "print('horovod' in sys.modules, 'torch' in sys.modules, 'petastorm' in sys.modules)"
    )
    found = subprocess.run(script(code), capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False", "False"]
