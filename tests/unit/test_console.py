"""Progress: the bar follows stages, reported steps and the epochs that ranks log."""

import io
import json
import threading
import time

import pytest
from rich.console import Console
from rich.progress import Progress, TaskID

from couponflow import console, pipeline
from couponflow.dates import DateRange
from couponflow.entry import log, set_up_logging
from couponflow.lake import runs

DAY = DateRange.parse("2024-01-10")


def shown(display: console.RunDisplay) -> dict[str, tuple[float, float | None]]:
    return {task.description: (task.completed, task.total) for task in display._bars.tasks}


def test_bars_follow_stages_steps_and_epochs() -> None:
    set_up_logging()
    display = console.RunDisplay(lambda: None)
    display._bars = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    display._is_terminal = True
    stage = pipeline.Stage("train", DAY, (), model="dien")
    with display as progress:
        progress.start(1, 4, stage)
        assert shown(display) == {"all stages": (1, 4), "train dien": (0, None)}
        progress.step("days", 3, 60)
        assert shown(display)["train dien: days"] == (3, 60)
        log.info("epoch 2/8: train 0.5")
        assert shown(display)["train dien: epochs"] == (2, 8)
        record = runs.start("train", str(DAY), {}, "f")
        progress.end(2, 4, pipeline.Outcome(stage, record, True))
        progress.start(2, 4, pipeline.Stage("evaluate", DAY, ()))
        assert shown(display) == {
            "all stages": (2, 4),
            "evaluate": (0, None),
        }  # nothing of the last stage stays
    log.info("epoch 5/8: after the run")
    assert "evaluate: epochs" not in shown(display)


def test_brackets_and_colons_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "cast [/price] at 10:100:00 [red] :warning:"
    console.show_rows("Runs", ["error"], [[text]])
    console.show_json({"error": text, "long": "x" * 300})
    table, _, tree = capsys.readouterr().out.partition("{")
    assert text in table
    assert json.loads("{" + tree) == {"error": text, "long": "x" * 300}


def test_steps_and_stages_from_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    display = console.RunDisplay(lambda: None)
    display._bars = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    display._is_terminal = True
    stop = threading.Event()
    wrong: list[Exception] = []

    def steps() -> None:
        while not stop.is_set():
            try:
                display._step("Spark tasks", 1, 2)
            except Exception as error:
                wrong.append(error)

    remove = display._bars.remove_task

    def remove_slowly(task: TaskID) -> None:
        remove(task)
        time.sleep(0.01)

    monkeypatch.setattr(display._bars, "remove_task", remove_slowly)
    watcher = threading.Thread(target=steps)
    watcher.start()
    for number in range(5):
        display._start(number, 5, pipeline.Stage("evaluate", DAY, ()))
    stop.set()
    watcher.join()
    assert not wrong


def test_numbers_are_right_aligned_with_separators() -> None:
    stream = io.StringIO()
    kept = console.out
    console.out = Console(file=stream, width=60)
    try:
        console.show_rows("Rows", ["table", "rows"], [["events", 1460047], ["sends", 12]])
    finally:
        console.out = kept
    assert "1,460,047" in stream.getvalue()
    assert "       12 " in stream.getvalue()
