"""Run records and exit codes around a job."""

import json
from concurrent.futures import ThreadPoolExecutor
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


def test_records_of_newer_code_are_read(tmp_path: Path) -> None:
    config = test_config(tmp_path)
    with record_run("sample", config, DAY):
        pass
    path = next((tmp_path / "lake" / "runs" / "sample").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cost_amount": 1.5}))
    (record,) = runs.load_all(config.lake.root_uri)
    assert record.status == "ok"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": "sample"}'])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "runs" / "sample" / "sample-1.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(DataError, match=r"sample-1\.json is damaged"):
        runs.load_all(str(tmp_path))


def test_records_of_concurrent_runs_are_all_kept(tmp_path: Path) -> None:
    config = test_config(tmp_path)

    def one(number: int) -> None:
        with record_run("sample", config, DAY) as job:
            job.rows["n"] = number

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(24)))
    assert sorted(record.rows["n"] for record in runs.load_all(config.lake.root_uri)) == list(range(24))


class Py4JJavaError(Exception):
    """As py4j raises it, without py4j."""

    __module__ = "py4j.protocol"


class AnalysisException(Exception):  # noqa: N818 - named as there
    """As pyspark raises it."""

    __module__ = "pyspark.errors.exceptions.captured"


@pytest.mark.parametrize(
    ("foreign", "code", "words"),
    [
        (Py4JJavaError("Job aborted\n\tat java.base/x"), 5, "Py4JJavaError: Job aborted); published"),
        (AnalysisException("[UNRESOLVED_COLUMN] nonsense"), 3, "[UNRESOLVED_COLUMN] nonsense"),
        (OSError(28, "No space left on device"), 5, "No space left on device"),
    ],
)
def test_failures_of_spark_and_disk_are_ours(
    tmp_path: Path, foreign: Exception, code: int, words: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"[lake]\nroot_uri = '{tmp_path / 'lake'}'\n")
    done = CliRunner().invoke(job_that(foreign), ["--config", str(file), "--dates", "2024-01-10"])  # type: ignore[arg-type]  # a Typer app
    assert done.exit_code == code
    assert words in done.output
    assert "sample 2024-01-10:2024-01-10" in done.output
    assert "java.base" not in done.output
    assert words in runs.load_all(str(tmp_path / "lake"))[0].error


def test_an_unwritable_record_does_not_hide_the_failure(tmp_path: Path) -> None:
    config = test_config(tmp_path)
    (tmp_path / "lake").write_text("a file where the lake should be")
    with pytest.raises(DataError, match="broken"), record_run("sample", config, DAY):
        raise DataError("broken; mend it")
