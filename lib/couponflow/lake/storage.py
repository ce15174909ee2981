"""The only door to plain objects: bytes on local disk and on ``gs://``.

Published objects are created once (``create``: generation precondition, or a hard link locally) or replaced
against what was read (``replace``: generation precondition, or a lock file); nothing is overwritten blindly.
Beside local objects lie hidden files: locks, and what a killed writer left; ``list_names`` shows neither.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from couponflow.errors import ConfigError, ConflictError, DataError, InfraError


def join(root_uri: str, *parts: str) -> str:
    """Append path parts to a folder or ``gs://`` prefix.

    Raises:
        ConfigError: a part would leave the prefix.
    """
    for part in parts:
        if (
            ".." in part.split("/")
            or "%2e" in part.lower()
            or any(ord(c) < 32 for c in part)
            or part.startswith("/")
        ):
            raise ConfigError(f"path part {part!r} leaves {root_uri}; use plain names")
    return "/".join([root_uri.rstrip("/"), *parts])


def is_remote(uri: str) -> bool:
    """Whether the URI names an object store."""
    return uri.startswith("gs://")


def spark_uri(uri: str) -> str:
    """The same place as Spark wants it: an absolute local path, or ``gs://``."""
    return uri if is_remote(uri) else str(Path(uri).resolve())


def read_bytes(uri: str) -> bytes:
    """Read one object.

    Raises:
        DataError: it does not exist.
        InfraError: the disk or the store refused the read.
    """
    if is_remote(uri):
        with _store_errors(uri):
            return bytes(_blob(uri).download_as_bytes())
    with _disk_errors(uri):
        return Path(uri).read_bytes()


def read_head(uri: str, size: int) -> bytes:
    """The first ``size`` bytes of one object, fewer if it is shorter.

    Raises:
        DataError: it does not exist.
        InfraError: the disk or the store refused the read.
    """
    if is_remote(uri):
        with _store_errors(uri):
            blob = _blob(uri)
            blob.reload()
            return bytes(blob.download_as_bytes(start=0, end=size - 1)) if blob.size else b""
    with _disk_errors(uri), Path(uri).open("rb") as file:
        return file.read(size)


def read_from(uri: str, start: int) -> bytes:
    """What an object that grows holds from an offset on.

    Raises:
        DataError: it does not exist.
        InfraError: the disk or the store refused the read.
    """
    if is_remote(uri):
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        with _store_errors(uri):
            try:
                return bytes(_blob(uri).download_as_bytes(start=start))
            except RequestRangeNotSatisfiable:
                return b""
    with _disk_errors(uri), Path(uri).open("rb") as file:
        file.seek(start)
        return file.read()


def has_bucket(name: str) -> bool:
    """Whether a bucket is there; true also where this account may not look into it.

    Raises:
        InfraError: the store did not answer.
    """
    from google.api_core.exceptions import Forbidden, NotFound

    with _store_errors(f"gs://{name}"):
        try:
            next(iter(_client().list_blobs(name, max_results=1)), None)
        except NotFound:
            return False
        except Forbidden:
            return True
    return True


def exists(uri: str) -> bool:
    """Whether the object is there."""
    if not is_remote(uri):
        return Path(uri).is_file()
    with _store_errors(uri):
        return bool(_blob(uri).exists())


def create(uri: str, content: bytes, run_id: str) -> None:
    """Write an object that must not exist yet; ours from a lost answer counts as written.

    Raises:
        ConflictError: another run has written a different object under this name.
        InfraError: the store refused the write.
    """
    if is_remote(uri):
        _create_remote(uri, content, run_id)
        return
    path = Path(uri)
    try:
        temporary = _write_beside(path, content)
        try:
            os.link(temporary, path)  # atomic, fails if the name is taken
        finally:
            temporary.unlink()
    except FileExistsError as error:
        if read_bytes(uri) != content:
            raise ConflictError(
                f"{uri} was written by another run with other content; start a new version"
            ) from error
    except OSError as error:
        raise _unwritten(uri, content, error) from error


def replace(uri: str, content: bytes, expected: bytes | None) -> None:
    """Move a pointer: write ``content`` if the object still holds ``expected`` (None = absent).

    Raises:
        ConflictError: someone moved it first.
        InfraError: the disk or the store refused the write.
    """
    if is_remote(uri):
        _replace_remote(uri, content, expected)
        return
    path = Path(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            found = path.read_bytes() if path.exists() else None
            if found != expected:
                raise ConflictError(f"{uri} changed meanwhile; read it again and repeat")
            if found != content:
                _write_beside(path, content).replace(path)
    except OSError as error:
        raise _unwritten(uri, content, error) from error


def remove(uri: str) -> None:
    """Remove one object; an absent one is no error. Only for what was replaced, or nobody may read.

    Raises:
        InfraError: the disk or the store refused it.
    """
    if is_remote(uri):
        from google.api_core.exceptions import NotFound

        with _store_errors(uri):
            try:
                _blob(uri).delete()
            except NotFound:
                return
        return
    with _disk_errors(uri):
        Path(uri).unlink(missing_ok=True)


def remove_folder(uri: str) -> None:
    """Remove all below a prefix; an absent one is no error. Only for what nobody may read.

    Raises:
        InfraError: the disk or the store refused it.
    """
    if is_remote(uri):
        for name in list(walk(uri)):
            remove(join(uri, name))
        return
    with _disk_errors(uri):
        shutil.rmtree(uri, ignore_errors=not Path(uri).exists())


def list_names(uri: str) -> list[str]:
    """Names directly below a prefix, files and folders, sorted; a missing folder has none."""
    return sorted(list_sizes(uri))


def list_sizes(uri: str) -> dict[str, int]:
    """Names directly below a prefix with their bytes, folders with 0; a missing folder has none."""
    if is_remote(uri):
        with _store_errors(uri):
            bucket, prefix = _split(uri.rstrip("/") + "/")
            pages = bucket.list_blobs(prefix=prefix, delimiter="/")
            sizes = {blob.name.removeprefix(prefix): int(blob.size or 0) for blob in pages}  # every page
            sizes |= {folder.removeprefix(prefix).rstrip("/"): 0 for folder in pages.prefixes}
        return {name: size for name, size in sizes.items() if name}
    path = Path(uri)
    with _disk_errors(uri):
        entries = list(os.scandir(path)) if path.is_dir() else []
    # A hidden file may be gone by now: it is another writer's.
    shown = [entry for entry in entries if not entry.name.startswith(".")]
    with _disk_errors(uri):
        return {entry.name: entry.stat().st_size if entry.is_file() else 0 for entry in shown}


def sizes(uri: str) -> dict[str, int]:
    """Bytes of every object below a prefix by its path relative to it; one listing, hidden files left out."""
    if is_remote(uri):
        with _store_errors(uri):
            bucket, prefix = _split(uri.rstrip("/") + "/")
            found = {
                blob.name.removeprefix(prefix): int(blob.size or 0)
                for blob in bucket.list_blobs(prefix=prefix)
            }
    else:
        with _disk_errors(uri):
            found = {name: Path(uri, name).stat().st_size for name in walk(uri)}
    # A name that ends in a slash is a folder that Spark or a console has marked.
    files = {name: size for name, size in found.items() if name and not name.endswith("/")}
    return {name: size for name, size in files.items() if not name.rpartition("/")[2].startswith(".")}


def download_folder(uri: str, folder: Path) -> Path:
    """A local copy of all objects below a prefix; a local folder is returned as it is.

    Raises:
        ConfigError: an object's name would leave the folder.
    """
    if not is_remote(uri):
        return Path(uri)
    with _store_errors(uri):
        bucket, prefix = _split(uri.rstrip("/") + "/")
        for blob in bucket.list_blobs(prefix=prefix):
            name = blob.name.removeprefix(prefix)
            if name and not name.endswith("/"):  # consoles leave such empty objects as folders
                target = Path(join(str(folder), name))
                target.parent.mkdir(parents=True, exist_ok=True)
                blob.download_to_filename(str(target))
    return folder


def sha256(content: bytes) -> str:
    """Hex digest used in every manifest."""
    return hashlib.sha256(content).hexdigest()


def walk(uri: str) -> Iterator[str]:
    """Paths of all files below a folder or prefix, relative to it, sorted; hidden local ones too."""
    if is_remote(uri):
        with _store_errors(uri):
            bucket, prefix = _split(uri.rstrip("/") + "/")
            names = sorted(blob.name.removeprefix(prefix) for blob in bucket.list_blobs(prefix=prefix))
        yield from (name for name in names if name and not name.endswith("/"))
        return
    base = Path(uri)
    yield from (str(path.relative_to(base)) for path in sorted(base.rglob("*")) if path.is_file())


@contextmanager
def _disk_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{uri} does not exist; run the stage that writes it") from error
    except OSError as error:
        raise InfraError(f"{uri} cannot be read ({error.strerror}); check access and try again") from error


def _unwritten(uri: str, content: bytes, error: OSError) -> InfraError:
    return InfraError(
        f"{uri}: {len(content)} bytes cannot be written ({error.strerror}); free space or fix access"
    )


def _write_beside(path: Path, content: bytes) -> Path:
    """A hidden file in the object's folder, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        Path(name).unlink()  # a full disk needs its space back
        raise
    return Path(name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One mover of a pointer at a time; the system frees the lock of a process that dies."""
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def denied(where: str, bucket: str) -> InfraError:
    """The store refuses this service account."""
    return InfraError(
        f"{where}: access denied; grant roles/storage.objectUser on bucket {bucket} to this service account"
    )


@contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    """Errors of the object store as ours. The client has retried what is transient, for two minutes."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption

    bucket = uri.removeprefix("gs://").partition("/")[0]
    try:
        yield
    except exceptions.PreconditionFailed:
        raise  # only the writer knows whose object it met
    except exceptions.NotFound as error:
        raise DataError(
            f"{uri} does not exist, or there is no bucket {bucket}; "
            "run the stage that writes it, or correct the URI"
        ) from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise denied(uri, bucket) from error
    except (exceptions.GoogleAPIError, GoogleAuthError, DataCorruption, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InfraError(
            f"{uri}: the object store failed ({type(error).__name__}: {reason}); "
            "check network and credentials, then try again"
        ) from error


def emulator() -> str | None:
    """Address of a local server that stands in for Cloud Storage; the storage library's own switch."""
    return os.environ.get("STORAGE_EMULATOR_HOST") or None


def _client() -> Any:
    return _client_for(emulator())


@cache
def _client_for(address: str | None) -> Any:
    """One client, so one log-in and one connection pool, per process."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    if address:
        anonymous: Any = AnonymousCredentials  # untyped in the library
        return Client(project="test", credentials=anonymous())
    return Client()


def _split(uri: str) -> tuple[Any, str]:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    return _client().bucket(bucket), name


def _blob(uri: str) -> Any:
    bucket, name = _split(uri)
    return bucket.blob(name)


def _create_remote(uri: str, content: bytes, run_id: str) -> None:
    if not _upload(uri, content, 0, run_id):
        raise ConflictError(f"{uri} was written by another run with other content; start a new version")


def _replace_remote(uri: str, content: bytes, expected: bytes | None) -> None:
    with _store_errors(uri):
        bucket, name = _split(uri)
        blob = bucket.get_blob(name)
        generation = int(blob.generation) if blob else 0  # a download may clear it, and with it the guard
        found = bytes(blob.download_as_bytes()) if blob else None
    changed = ConflictError(f"{uri} changed meanwhile; read it again and repeat")
    if found != expected:
        raise changed
    if found != content and not _upload(uri, content, generation):
        raise changed


def _upload(uri: str, content: bytes, generation: int, run_id: str = "") -> bool:
    """Write if the object still has this generation (0 = absent); false if another writer came first.

    The client repeats an upload whose answer was lost, and then meets its own object: equal bytes mean ours.
    """
    from google.api_core.exceptions import PreconditionFailed

    with _store_errors(uri):
        blob = _blob(uri)
        blob.metadata = {"run_id": run_id} if run_id else None
        try:
            blob.upload_from_string(content, if_generation_match=generation)
        except PreconditionFailed:
            return bytes(_blob(uri).download_as_bytes()) == content
    return True
