"""The only door to plain objects: bytes on local disk and on ``gs://``.

Published objects are created once (``create``: generation precondition, or O_EXCL locally) or replaced
against a known generation; nothing is ever overwritten blindly.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
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
    """
    try:
        if is_remote(uri):
            return bytes(_blob(uri).download_as_bytes())
        return Path(uri).read_bytes()
    except Exception as error:
        if isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFound":
            raise DataError(f"{uri} does not exist; run the stage that writes it") from error
        raise InfraError(
            f"{uri} cannot be read ({type(error).__name__}: {error}); check access and try again"
        ) from error


def read_head(uri: str, size: int) -> bytes:
    """The first ``size`` bytes of one object, fewer if it is shorter.

    Raises:
        DataError: it does not exist.
    """
    if is_remote(uri):
        blob = _blob(uri)
        try:
            blob.reload()
            return bytes(blob.download_as_bytes(start=0, end=size - 1)) if blob.size else b""
        except Exception as error:
            if type(error).__name__ == "NotFound":
                raise DataError(f"{uri} does not exist; run the stage that writes it") from error
            raise InfraError(
                f"{uri} cannot be read ({type(error).__name__}: {error}); check access and try again"
            ) from error
    try:
        with Path(uri).open("rb") as file:
            return file.read(size)
    except FileNotFoundError as error:
        raise DataError(f"{uri} does not exist; run the stage that writes it") from error
    except OSError as error:
        raise InfraError(f"{uri} cannot be read ({error.strerror}); check access and try again") from error


def exists(uri: str) -> bool:
    """Whether the object is there."""
    return bool(_blob(uri).exists()) if is_remote(uri) else Path(uri).is_file()


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
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(name, path)  # atomic, fails if the name is taken
        finally:
            Path(name).unlink()
    except FileExistsError as error:
        if path.read_bytes() != content:
            raise ConflictError(
                f"{uri} was written by another run with other content; start a new version"
            ) from error
    except OSError as error:
        raise InfraError(
            f"{uri}: {len(content)} bytes cannot be written ({error.strerror}); free space or fix access"
        ) from error


def replace(uri: str, content: bytes, expected: bytes | None) -> None:
    """Move a pointer: write ``content`` if the object still holds ``expected`` (None = absent).

    Raises:
        ConflictError: someone moved it first.
    """
    if is_remote(uri):
        _replace_remote(uri, content, expected)
        return
    path = Path(uri)
    found = path.read_bytes() if path.exists() else None
    if found != expected:
        raise ConflictError(f"{uri} changed meanwhile; read it again and repeat")
    if found == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).replace(path)


def list_names(uri: str) -> list[str]:
    """Names directly below a prefix, files and folders, sorted; a missing folder has none."""
    if is_remote(uri):
        bucket, prefix = _split(uri.rstrip("/") + "/")
        pages = bucket.list_blobs(prefix=prefix, delimiter="/")
        names = {blob.name.removeprefix(prefix) for blob in pages}
        names |= {folder.removeprefix(prefix).rstrip("/") for folder in pages.prefixes}
        return sorted(name for name in names if name)
    path = Path(uri)
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def download_folder(uri: str, folder: Path) -> Path:
    """A local copy of all objects below a prefix; a local folder is returned as it is."""
    if not is_remote(uri):
        return Path(uri)
    bucket, prefix = _split(uri.rstrip("/") + "/")
    for blob in bucket.list_blobs(prefix=prefix):
        target = folder / blob.name.removeprefix(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(str(target))
    return folder


def delete_folder(uri: str) -> None:
    """Remove an unpublished folder (a run-unique prefix that never got its manifest)."""
    if is_remote(uri):
        bucket, prefix = _split(uri.rstrip("/") + "/")
        for blob in bucket.list_blobs(prefix=prefix):
            blob.delete()
    else:
        shutil.rmtree(uri, ignore_errors=True)


def sha256(content: bytes) -> str:
    """Hex digest used in every manifest."""
    return hashlib.sha256(content).hexdigest()


def walk(uri: str) -> Iterator[str]:
    """Paths of all local files below a folder, relative to it, sorted."""
    base = Path(uri)
    return (str(path.relative_to(base)) for path in sorted(base.rglob("*")) if path.is_file())


def _client() -> Any:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    if os.environ.get("STORAGE_EMULATOR_HOST"):  # the client library's own switch, set by tests
        anonymous: Any = AnonymousCredentials  # untyped in the library
        return storage.Client(project="test", credentials=anonymous())
    return storage.Client()


def _split(uri: str) -> tuple[Any, str]:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    return _client().bucket(bucket), name


def _blob(uri: str) -> Any:
    bucket, name = _split(uri)
    return bucket.blob(name)


def _create_remote(uri: str, content: bytes, run_id: str) -> None:
    from google.api_core.exceptions import Forbidden, GoogleAPICallError, PreconditionFailed

    blob = _blob(uri)
    blob.metadata = {"run_id": run_id}
    try:
        blob.upload_from_string(content, if_generation_match=0)
    except PreconditionFailed as error:
        # A retry of our own accepted upload also ends here: same bytes mean success.
        if bytes(_blob(uri).download_as_bytes()) != content:
            raise ConflictError(
                f"{uri} was written by another run with other content; start a new version"
            ) from error
    except Forbidden as error:
        raise InfraError(
            f"{uri}: access denied; grant roles/storage.objectUser on the bucket to this service account"
        ) from error
    except GoogleAPICallError as error:
        raise InfraError(f"{uri} cannot be written ({error}); try again") from error


def _replace_remote(uri: str, content: bytes, expected: bytes | None) -> None:
    from google.api_core.exceptions import PreconditionFailed

    blob = _split(uri)[0].get_blob(_split(uri)[1])
    found = bytes(blob.download_as_bytes()) if blob else None
    if found != expected:
        raise ConflictError(f"{uri} changed meanwhile; read it again and repeat")
    if found == content:
        return
    try:
        _blob(uri).upload_from_string(content, if_generation_match=blob.generation if blob else 0)
    except PreconditionFailed as error:
        raise ConflictError(f"{uri} changed meanwhile; read it again and repeat") from error
