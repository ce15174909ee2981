"""The files of the program itself: package and jobs, from a checkout, an installed wheel or a release's zip.

What a release ships and what a run record calls the code version are both made of ``files``, so the version
inside a release equals that of the sources it was made from.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from couponflow.errors import InfraError

#: Of a source file, or of the data that the package reads beside its modules.
_SUFFIXES = (".py", ".j2")
PACKAGE, JOBS = "couponflow", "jobs"


@cache
def files() -> dict[str, bytes]:
    """Content of every file by its path, ``couponflow/...`` and ``jobs/...``, in the order of the paths.

    Raises:
        InfraError: the package lies where it cannot be read.
    """
    package = resources.files(PACKAGE)
    found = dict(_below(package, PACKAGE))
    for jobs in _folders_of_jobs(package):
        found.update(_below(jobs, JOBS))
    if f"{PACKAGE}/__init__.py" not in found:
        raise InfraError(f"{package}: holds no readable source of {PACKAGE}; install the package anew")
    return dict(sorted(found.items()))


@cache
def version() -> str:
    """Hash of all these files; any edit gives another."""
    digest = hashlib.sha256()
    for path, content in files().items():
        digest.update(path.encode() + b"\0" + content)
    return digest.hexdigest()[:12]


def _folders_of_jobs(package: Traversable) -> Iterator[Traversable]:
    """``jobs/`` beside ``lib/`` in a checkout, beside the package in a wheel and in a zip."""
    inside = package.parent  # type: ignore[attr-defined]  # of a path and of a path in a zip, not of the protocol
    for folder in (inside / JOBS, inside.parent / JOBS):
        if (folder / "__init__.py").is_file():
            yield folder
            return


def _below(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _below(entry, f"{path}/{entry.name}")
        elif entry.name.endswith(_SUFFIXES):
            yield f"{path}/{entry.name}", entry.read_bytes()
