"""Run records and exit codes around a job."""

import json
from pathlib import Path

import pytest
from builders import test_config
from typer.testing import CliRunner

from couponflow.dates import DateRange
from couponflow.entry import ConfigPath, Dates, Overrides, job_app, open_run, record_run
from couponflow.errors import ConfigError, ConflictError, CouponflowError, DataError, InfraError
from couponflow.lake import runs

DAY = DateRange.parse("2024-01-10")


def job_that(raises: BaseException | None) -> object:
    app = job_app("A job.")

    @app.command()
    def main(config: ConfigPath, dates: Dates, overrides: Overrides = None) -> None:
        """Do it."""
        with open_run("sample", config, overrides, dates) as job:
            job.rows["out"] = len(job.dates)
            if raises:
                raise raises

    return app


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (ConfigError("c"), 2), (DataError("d"), 3), (ConflictError("x"), 4), (InfraError("i"), 5)],
)
def test_exit_codes(tmp_path: Path, error: CouponflowError | None, code: int) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"[lake]\nroot_uri = '{tmp_path / 'lake'}'\n")
    done = CliRunner().invoke(job_that(error), ["--config", str(file), "--dates", "2024-01-01:2024-01-03"])  # type: ignore[arg-type]  # a Typer app
    assert done.exit_code == code, done.output
    (record,) = runs.load_all(str(tmp_path / "lake"))
    assert record.status == ("failed" if error else "ok")
    assert record.rows == {"out": 3}
    assert record.error == (str(error) if error else "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dates", "2024-02-30"], "2024-02-30"),
        (["--dates", "2024-01-01", "--set", "lake.rot_uri=x"], "did you mean root_uri?"),
        (["--dates", "2024-01-01", "--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_arguments_end_with_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text("")
    done = CliRunner().invoke(job_that(None), ["--config", str(file), *arguments])  # type: ignore[arg-type]  # a Typer app
    assert done.exit_code == 2
    assert words in done.output


def test_the_unexpected_is_recorded_and_raised(tmp_path: Path) -> None:
    config = test_config(tmp_path)
    with pytest.raises(ZeroDivisionError), record_run("sample", config, DAY):
        _ = 1 / 0
    (record,) = runs.load_all(config.lake.root_uri)
    assert record.status == "failed"
    assert record.error.startswith("ZeroDivisionError")


def test_records_are_plain_json_and_come_back(tmp_path: Path) -> None:
    config = test_config(tmp_path)
    with record_run("sample", config, DAY, campaign="18", fingerprint="f1") as job:
        job.facts["note"] = "x"
    (record,) = runs.load_all(config.lake.root_uri)
    path = next((tmp_path / "lake" / "runs" / "sample").iterdir())
    stored = json.loads(path.read_text())
    assert stored["arguments"] == {"campaign": "18"}
    assert stored["code_version"] == runs.code_version()
    assert record.facts == {"note": "x"}
    assert runs.latest_ok(config.lake.root_uri, "sample", "f1") == record
    assert runs.latest_ok(config.lake.root_uri, "sample", "f2") is None
