"""Releases: the same sources give the same bytes, and what is inside imports and finds its data."""

import json
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

from deploy_files import environment

from couponflow.cloud import releases
from couponflow.lake import program, runs

RELEASE = releases.make(environment("dev"))
IMPORTED = """
import json, couponflow
from importlib import resources
from couponflow.lake import program, runs
import jobs.clean_events
page = resources.files("couponflow.campaign.pages").joinpath("report.html.j2").read_text(encoding="utf-8")
print(json.dumps([couponflow.__file__, runs.code_version(), len(program.files()), len(page)]))
"""


def test_a_release_holds_package_jobs_and_config() -> None:
    assert set(RELEASE.objects) == {
        "couponflow.zip",
        "dev.toml",
        *(path for path in program.files() if path.startswith("jobs/") and "__init__" not in path),
    }
    with zipfile.ZipFile(BytesIO(RELEASE.objects["couponflow.zip"])) as archive:
        assert archive.namelist() == sorted(program.files())
        assert all(archive.read(name) == content for name, content in program.files().items())


def test_the_same_files_give_the_same_bytes_in_any_order() -> None:
    files = program.files()
    assert releases.zipped(dict(reversed(files.items()))) == RELEASE.objects["couponflow.zip"]
    assert releases.make(environment("dev")).name == RELEASE.name
    assert len({releases.make(environment(name)).name for name in ("ci", "dev", "prod")}) == 3
    edited = {**RELEASE.objects, "jobs/train.py": b"print()"}
    assert releases.Release(edited).name != RELEASE.name


def test_the_package_imports_out_of_the_zip_with_its_data_and_its_version(tmp_path: Path) -> None:
    archive = tmp_path / "couponflow.zip"
    archive.write_bytes(RELEASE.objects["couponflow.zip"])
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        cwd=tmp_path,
        env={"PYTHONPATH": str(archive)},
        capture_output=True,
        text=True,
        check=True,
    )
    place, version, num_files, num_characters = json.loads(done.stdout)
    assert place.startswith(str(archive))
    assert version == runs.code_version() == program.version()
    assert num_files == len(program.files())
    assert num_characters > 10_000
