"""A release: the files of one version as they lie in the bucket for code, under the hash of their content.

    gs://CODE/releases/RELEASE/couponflow.zip    package and jobs, importable as it is
                               jobs/*.py         what Dataproc starts
                               ENV.toml          the config

The same sources and config give the same bytes, so the same name: uploading twice writes once, and what a
release holds never changes. Another config is another release, so a job says by its release all that it ran.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from couponflow.cloud.rendering import read_text
from couponflow.cloud.specs import Environment
from couponflow.lake import program, storage

PACKAGE = "couponflow.zip"
#: The first instant that a zip can hold; no clock gets into the bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_READABLE_FILE = 0o100644 << 16
_UNIX = 3
_NUM_WRITERS = 8


@dataclass(frozen=True)
class Release:
    """Content of every object by its name below the release."""

    objects: Mapping[str, bytes]

    @cached_property
    def name(self) -> str:
        """Hash of names and contents."""
        digest = hashlib.sha256()
        for name, content in sorted(self.objects.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()[:16]


def make(environment: Environment) -> Release:
    """The release of this program with an environment's file.

    Raises:
        ConfigError: the file cannot be read.
        InfraError: the program's own files cannot be read.
    """
    files = program.files()
    jobs = {path: content for path, content in files.items() if path.startswith(f"{program.JOBS}/")}
    jobs.pop(f"{program.JOBS}/__init__.py", None)
    config = read_text(Path(environment.file)).encode()
    return Release({PACKAGE: zipped(files), **jobs, f"{environment.cloud.environment}.toml": config})


def zipped(files: Mapping[str, bytes]) -> bytes:
    """An archive that Python imports from; not compressed, as other versions of zlib give other bytes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path, content in sorted(files.items()):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.external_attr, entry.create_system = _READABLE_FILE, _UNIX
            archive.writestr(entry, content)
    return target.getvalue()


def upload(release: Release, bucket: str) -> None:
    """Write what is not there yet; whoever uploads at the same time writes the same bytes.

    Raises:
        ConflictError: an object of this name holds other bytes.
        DataError: there is no such bucket.
        InfraError: access is denied, or the store did not answer.
    """
    root = f"gs://{bucket}/releases/{release.name}"
    present = storage.sizes(root)
    missing = {
        name: content for name, content in release.objects.items() if present.get(name) != len(content)
    }

    def write(name: str) -> None:
        storage.create(storage.join(root, name), missing[name], release.name)

    with ThreadPoolExecutor(_NUM_WRITERS) as pool:
        list(pool.map(write, missing))
