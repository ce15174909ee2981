"""A bundle on its way to Spark's Python workers: one archive, checked by SHA-256, loaded once a process.

torch runs on one thread there: processes give the parallelism. It is imported inside functions only.
"""

import io
import json
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark import SparkFiles
from pyspark.sql import SparkSession

from couponflow.errors import ConfigError
from couponflow.lake import storage

if TYPE_CHECKING:
    from couponflow.models.bundle import Bundle

#: The bundle of this worker process, by archive hash; at most one, so that a long-lived worker stays small.
_loaded: dict[str, Any] = {}


@dataclass(frozen=True)
class ShippedBundle:
    """A bundle on its way to the workers: its archive among ``SparkFiles`` and what must be in it.

    ``base_rate`` is the conversion rate of the rows that calibrated it; None where the bundle does not say.
    """

    file_name: str
    sha256: str
    kind: str
    model_version: str
    vocabulary_version: str
    base_rate: float | None = None


def ship_bundle(spark: SparkSession, folder: Path) -> ShippedBundle:
    """Pack a bundle folder into one archive and hand it to every present and future worker.

    Raises:
        ConfigError: the folder has no manifest.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        metrics = json.loads((folder / "metrics.json").read_bytes())
    except OSError as error:
        raise ConfigError(f"{folder}: no manifest.json, so no finished bundle; train again") from error
    content = pack_folder(folder)
    digest = storage.sha256(content)
    # Executors may join later and fetch the archive then, so it lives as long as the application: in a
    # folder that Spark removes when it stops. Equal contents have an equal name.
    outbox = Path(SparkFiles.getRootDirectory()) / "bundles"
    outbox.mkdir(exist_ok=True)
    archive = outbox / f"bundle-{digest[:16]}.tar"
    if not archive.exists():
        archive.write_bytes(content)
        spark.sparkContext.addFile(str(archive))
    return ShippedBundle(
        archive.name,
        digest,
        str(manifest["kind"]),
        str(manifest["model_version"]),
        str(manifest["vocabulary_version"]),
        (metrics.get("valid") or {}).get("base_rate"),
    )


def pack_folder(folder: Path) -> bytes:
    """A tar of all files below a folder; equal contents give equal bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in storage.walk(str(folder)):
            content = (folder / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Write the files of ``pack_folder`` below a folder.

    By hand: the extraction filters of ``tarfile`` are missing in Python 3.11.2, that of Debian 12.

    Raises:
        ConfigError: a member is no file, or would lie outside the folder.
    """
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            path = folder / member.name
            file = archive.extractfile(member) if member.isfile() else None
            if file is None or not path.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"bundle archive: {member.name} is no file of a bundle; train it again")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())


def open_bundle(path: Path, sha256: str) -> "Bundle":
    """Load a packed bundle, once per process; torch is set to one thread.

    Raises:
        ConfigError: the archive or a file in it differs from its SHA-256.
    """
    import torch

    from couponflow.models.bundle import load_bundle

    torch.set_num_threads(1)
    bundle: Bundle
    if sha256 in _loaded:
        bundle = _loaded[sha256]
        return bundle
    content = path.read_bytes()
    if storage.sha256(content) != sha256:
        raise ConfigError(f"{path.name} differs from what the driver has sent; run again")
    with tempfile.TemporaryDirectory() as folder:
        unpack(content, Path(folder))
        bundle = load_bundle(Path(folder))
    _loaded.clear()
    _loaded[sha256] = bundle
    return bundle


def is_open(shipped: ShippedBundle) -> bool:
    """Whether this process has loaded it."""
    return shipped.sha256 in _loaded


def on_worker(shipped: ShippedBundle) -> "Bundle":
    """The bundle, inside a task.

    Raises:
        ConfigError: as ``open_bundle``.
    """
    return open_bundle(Path(SparkFiles.get(shipped.file_name)), shipped.sha256)
