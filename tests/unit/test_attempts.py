"""A driver that would fail again ends at once; local runs and passing failures are not affected. No JVM."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from couponflow.entry import ConfigPath, Dates, job_app, open_run
from couponflow.errors import ConfigError, ConflictError, CouponflowError, DataError, InfraError
from couponflow.lake import attempts, runs


@pytest.mark.parametrize("error", [ConfigError, DataError])
def test_a_final_failure_is_repeated_without_the_work(tmp_path: Path, error: type[CouponflowError]) -> None:
    worked = []

    def work(key: str) -> None:
        with attempts.guarded(str(tmp_path), key):
            worked.append(key)
            raise error("bad row 3")

    for key in ("key-1", "key-1", "key-1", "key-2"):
        with pytest.raises(error, match="bad row 3"):
            work(key)
    assert worked == ["key-1", "key-2"]


@pytest.mark.parametrize("error", [ConflictError, InfraError, ValueError])
def test_a_passing_failure_may_start_again(tmp_path: Path, error: type[Exception]) -> None:
    for _ in range(2):
        with pytest.raises(error), attempts.guarded(str(tmp_path), "key"):
            raise error("lost")
    assert attempts.noted(str(tmp_path), "key") is None


def test_without_a_key_nothing_is_noted(tmp_path: Path) -> None:
    with pytest.raises(DataError), attempts.guarded(str(tmp_path), ""):
        raise DataError("bad row 3")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "key.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"key\.json is damaged"):
        attempts.noted(str(tmp_path), "key")


def test_every_job_takes_the_key_and_keeps_it_on_record(tmp_path: Path) -> None:
    app, worked = job_app("A job."), []

    @app.command()
    def main(config: ConfigPath, dates: Dates) -> None:
        with open_run("monitor", config, [f"lake.root_uri={tmp_path / 'lake'}"], dates):
            worked.append(str(dates))
            raise DataError("no events for 2017-10-01; land them")

    config = tmp_path / "a.toml"
    config.write_text("", encoding="utf-8")
    call = ["--config", str(config), "--dates", "2017-10-01"]
    ends = [CliRunner().invoke(app, [*call, "--attempt-key", "key-1"]) for _ in range(2)]
    assert [end.exit_code for end in ends] == [3, 3]
    assert worked == ["2017-10-01:2017-10-01"]
    for end in ends:
        assert "couponflow monitor: no events for 2017-10-01; land them" in end.stderr
        assert "couponflow monitor: exit code 3" in end.stderr
    assert CliRunner().invoke(app, call).exit_code == 3
    keys = [record.attempt_key for record in runs.load_all(str(tmp_path / "lake"))]
    assert keys == ["key-1", ""]
    assert "--attempt-key" in CliRunner().invoke(app, ["--help"]).stdout
