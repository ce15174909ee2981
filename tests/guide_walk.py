"""A person who follows ``deploy/README.md`` at a shell, in a copy of the project.

What is not Google's is the real thing: ``make``, the scripts, couponflow and the clients of its libraries.
Behind them stand the served Dataproc, the object server and a ``gcloud`` on the PATH: ``recording_gcloud``
for what ``setup.sh`` makes, ``dataproc_gcloud`` for the rest. Drivers are those of ``leaving_drivers``.
Besides ``SUBSTITUTED`` the copy differs in two lines: ``dev.toml`` names the address of the stand-in, and the
drawn shop is smaller.
"""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recording_gcloud
import warm_programs
from dataproc_server import Server, serving
from dataproc_world import State, write_object
from deploy_files import DEPLOY, ROOT
from leaving_drivers import LeavingDrivers

#: Prepares, is given what the line printed, and asserts what the line has promised.
Claim = Generator[None, str, None]
#: What stands in the guide for something that only a run tells, and where the test has it from.
SUBSTITUTED: dict[str, Callable[["Walk"], str]] = {
    "0123456789abcdef": lambda walk: walk.image,
    "VERSION": lambda walk: walk.version,
    "JOB_ID": lambda walk: walk.waiting,
}


def commands(text: str) -> list[str]:
    """The lines of all ``sh`` blocks, those in lists too."""
    blocks = re.findall(r"^( *)```sh\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [line for _, block in blocks for line in textwrap.dedent(block).splitlines() if line]


@dataclass
class Walk:
    """The copy, what stands behind it, and what the guide's placeholders are there."""

    folder: Path
    variables: dict[str, str]
    server: Server
    drivers: LeavingDrivers
    image: str = ""
    version: str = ""
    waiting: str = ""
    num_seen: int = 0

    def follow(self, line: str, claim: Callable[["Walk"], Claim]) -> None:
        """Type a line, which has to end with 0 and to keep its claim."""
        for word, value in SUBSTITUTED.items():
            if word in line:
                assert value(self), f"nothing has told {word} before: {line}"
                line = line.replace(word, value(self))
        claimed = claim(self)
        next(claimed)
        self.num_seen = len(self.jobs)
        said = self.type(line)
        try:
            claimed.send(said)
        except StopIteration:
            return
        raise AssertionError(f"a claim that goes on: {line}")

    def type(self, line: str) -> str:
        """What bash prints for a line."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @property
    def jobs(self) -> list[Any]:
        return list(self.server.core.jobs.by_id.values())

    @property
    def new(self) -> list[Any]:
        """Jobs that the last line has started."""
        return self.jobs[self.num_seen :]

    @property
    def clusters(self) -> set[str]:
        return set(self.server.core.clusters.by_name)

    @property
    def made(self) -> list[str]:
        """What ``setup.sh`` has made in the project."""
        return list(self._kept("bin/gcloud.json").get("made", []))

    @property
    def login(self) -> dict[str, Any]:
        """What gcloud knows of the person."""
        return self._kept("../stand-in.json")

    def _kept(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def stages(self) -> Counter[str]:
        """New jobs by stage; all have ended well, and no cluster of their own is left."""
        assert {job.status.state for job in self.new} <= {State.DONE}
        assert not {name for name in self.clusters if name.startswith("couponflow-")}
        return Counter(job.labels["stage"] for job in self.new)

    def dates(self) -> set[str]:
        """Dates of new jobs, as their labels have them."""
        return {job.labels["dt"] for job in self.new}


@contextmanager
def walking(store: str, folder: Path) -> Iterator[Walk]:
    """A walk that has not begun; ``store`` is the address of an object server without our buckets."""
    project, drivers = folder / "project", LeavingDrivers()
    shutil.copytree(DEPLOY, project / "deploy")
    _install(project)
    with serving(drivers, project="couponflow-dev", store=write_object) as cloud:
        _change(project / "deploy/env/dev.toml", "[cloud]\n", f'[cloud]\nendpoint = "{cloud.rest_url}"\n')
        _change(project / "deploy/env/shop.toml", "num_users = 1500", "num_users = 60")
        variables = {
            "PATH": f"{project}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "COLUMNS": "200",
            "STORAGE_EMULATOR_HOST": store,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAPROC": f"{cloud.rest_url}/",
            "CLOUDSDK_CONFIG": str(folder),
        }
        with warm_programs.serving(project / "bin"):
            yield Walk(project, variables, cloud, drivers)


def _change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def _install(project: Path) -> None:
    """The project as ``make install`` leaves it, and its programs on the PATH."""
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy2(ROOT / name, project / name)
    (project / ".tools").symlink_to(ROOT / ".tools")
    (project / ".venv").symlink_to(sys.prefix)
    (project / ".stamps").mkdir()
    for name in ("prerequisites", "uv", "env", "jars"):  # newer than what they depend on
        (project / ".stamps" / name).touch()
    programs = project / "bin"
    programs.mkdir()
    shutil.copyfile(recording_gcloud.__file__, programs / "recording.py")
    gcloud = f"""#!/bin/sh
case "$1 $2" in
auth* | config* | dataproc* | 'storage cp' | 'storage ls') exec {programs}/dataproc-gcloud "$@" ;;
*) exec {sys.executable} -I -S {programs}/recording.py "$@" ;;
esac
"""
    for name, text in (("gcloud", gcloud), ("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
