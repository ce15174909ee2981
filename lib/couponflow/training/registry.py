"""Where models are kept: immutable versions, the newest of each kind, champion and challenger.

``models/<model_version>/`` holds a bundle's files, its manifest last: a folder without one is no version.
``models/newest-<kind>.json``, ``models/champion.json`` and ``models/challenger.json`` are pointers, moved
against what they held; they name the versions before too, oldest first. A version is model, calibrator and
vocabulary in one, so that none of them moves without the others. Which model deserves promotion is decided
elsewhere.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from couponflow.errors import ConfigError, DataError
from couponflow.lake import storage

CHAMPION = "champion"
CHALLENGER = "challenger"
#: Cheapest first: the order in which an evaluation lists them.
KINDS = ("rate", "rule", "logistic", "boosted", "dien", "blend")
_MANIFEST = "manifest.json"
_VERSION = re.compile(rf"({'|'.join(KINDS)})-[0-9a-f]{{12}}", re.ASCII)


def register(root_uri: str, folder: Path, run_id: str) -> str:
    """Publish the bundle in a local folder and make it the newest of its kind; returns its version.

    Safe to repeat: a version that is there already keeps its files, since equal names mean equal models.

    Raises:
        ConfigError: the folder holds no finished bundle.
        ConflictError: another run moved the pointer meanwhile.
    """
    version, kind = _identity(folder)
    target = _folder_uri(root_uri, version)
    manifest_uri = storage.join(target, _MANIFEST)
    if not storage.exists(manifest_uri):
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in (*(name for name in names if name != _MANIFEST), _MANIFEST):
            storage.create(storage.join(target, name), (folder / name).read_bytes(), run_id)
    _move(root_uri, f"newest-{kind}", version, run_id, "registered")
    return version


def resolve(root_uri: str, name: str) -> str:
    """The version behind a name: ``champion``, ``challenger``, a kind (its newest version), or a version.

    Raises:
        ConfigError: the name is neither.
        DataError: there is no such model.
    """
    if name in (CHAMPION, CHALLENGER) or name in KINDS:
        pointer = pointed(root_uri, name)
        if pointer is None:
            job = "evaluate" if name == CHALLENGER else "train"
            raise DataError(f"{root_uri} has no {name} model; run the {job} job first")
        version = str(pointer["model_version"])
    elif _VERSION.fullmatch(name):
        version = name
    else:
        raise ConfigError(
            f"model {name!r}: expected champion, challenger, {', '.join(KINDS)} or a version such as "
            "logistic-0123456789ab"
        )
    if not storage.exists(storage.join(_folder_uri(root_uri, version), _MANIFEST)):
        raise DataError(
            f"model {version} is not in {root_uri}/models; `couponflow models list` shows what is"
        )
    return version


def pointed(root_uri: str, name: str) -> dict[str, Any] | None:
    """What a name points to: model_version, kind, run_id, reason and the versions before; or None."""
    uri = _pointer_uri(root_uri, name)
    held = _held(uri)
    return None if held is None else _tree(uri, held)


def fetch(root_uri: str, model_version: str, folder: Path) -> Path:
    """A local folder with the bundle's files; a local lake's own folder is returned as it is.

    Raises:
        DataError: the version is not there.
    """
    version = resolve(root_uri, model_version)
    return storage.download_folder(_folder_uri(root_uri, version), folder / version)


def versions(root_uri: str) -> list[str]:
    """All finished versions, sorted by name."""
    names = storage.list_names(storage.join(root_uri, "models"))
    return [
        name
        for name in names
        if _VERSION.fullmatch(name) and storage.exists(storage.join(_folder_uri(root_uri, name), _MANIFEST))
    ]


def roles(root_uri: str) -> dict[str, str]:
    """Version -> ``champion`` or ``challenger``; a challenger that was promoted is the champion."""
    pointers = {name: pointed(root_uri, name) for name in (CHALLENGER, CHAMPION)}
    return {str(pointer["model_version"]): name for name, pointer in pointers.items() if pointer}


def set_champion(root_uri: str, name: str, run_id: str, reason: str) -> str:
    """Make a model the champion; returns its version. The champion before it is remembered.

    Raises:
        ConfigError, DataError: as ``resolve``.
        ConflictError: another run moved the pointer meanwhile.
    """
    version = resolve(root_uri, name)
    _move(root_uri, CHAMPION, version, run_id, reason)
    return version


def promote(root_uri: str, name: str, run_id: str, reason: str) -> str:
    """Make a model the champion after its bundle has been checked; returns its version.

    Raises:
        ConfigError, DataError: as ``resolve`` and ``check_bundle``.
        ConflictError: another run moved the pointer meanwhile.
    """
    version = resolve(root_uri, name)
    check_bundle(root_uri, version)
    return set_champion(root_uri, version, run_id, reason)


def set_challenger(root_uri: str, model_version: str, run_id: str, reason: str) -> None:
    """Name the model that the gate set against the champion; it scores nobody until it is promoted.

    Raises:
        ConflictError: another run moved the pointer meanwhile.
    """
    _move(root_uri, CHALLENGER, resolve(root_uri, model_version), run_id, reason)


def check_bundle(root_uri: str, model_version: str) -> None:
    """Refuse a bundle that this code and these examples cannot score with.

    Raises:
        ConfigError: a file differs from its SHA-256, the bundle is of a newer schema or of other aggregates,
            or it was trained with another vocabulary than the lake's examples have.
        DataError: the version is not there, or the examples are of other code.
    """
    from couponflow.models.bundle import load_bundle
    from couponflow.training import manifests

    manifest = storage.join(root_uri, "datasets", f"{manifests.TABLE}.json")
    vocabulary = manifests.load(root_uri).vocabulary_version if storage.exists(manifest) else None
    with tempfile.TemporaryDirectory() as folder:
        load_bundle(fetch(root_uri, model_version, Path(folder)), vocabulary)


def roll_back(root_uri: str, run_id: str, reason: str) -> str:
    """Make the previous champion the champion again; returns its version. May be repeated.

    Raises:
        ConfigError: as ``check_bundle``.
        DataError: there is no earlier champion.
        ConflictError: another run moved the pointer meanwhile.
    """
    uri = _pointer_uri(root_uri, CHAMPION)
    held = _held(uri)
    previous = [] if held is None else _tree(uri, held)["previous"]
    if not previous:
        raise DataError(f"{root_uri} has no champion before the present one; promote a version instead")
    version = resolve(root_uri, previous[-1])
    check_bundle(root_uri, version)
    storage.replace(uri, _pointer(version, run_id, reason, previous[:-1]), held)
    return version


def _move(root_uri: str, name: str, version: str, run_id: str, reason: str) -> None:
    """Point a name at a version, unless it already points there."""
    uri = _pointer_uri(root_uri, name)
    held = _held(uri)
    before = None if held is None else _tree(uri, held)
    if before is not None and before["model_version"] == version:
        return
    previous = [*before["previous"], before["model_version"]] if before else []
    storage.replace(uri, _pointer(version, run_id, reason, previous), held)


def _pointer(version: str, run_id: str, reason: str, previous: list[str]) -> bytes:
    tree = {
        "model_version": version,
        "kind": version.partition("-")[0],
        "run_id": run_id,
        "reason": reason,
        "previous": previous,
    }
    return json.dumps(tree, indent=1, sort_keys=True).encode()


def _pointer_uri(root_uri: str, name: str) -> str:
    file = f"{name}.json" if name in (CHAMPION, CHALLENGER) else f"newest-{name.removeprefix('newest-')}.json"
    return storage.join(root_uri, "models", file)


def _held(uri: str) -> bytes | None:
    return storage.read_bytes(uri) if storage.exists(uri) else None


def _tree(uri: str, held: bytes) -> dict[str, Any]:
    try:
        tree = dict(json.loads(held))
        tree["previous"], tree["model_version"]  # what every reader asks for
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{uri} is no model pointer ({error!r}); restore it, or delete it and promote a version"
        ) from error
    return tree


def _folder_uri(root_uri: str, version: str) -> str:
    return storage.join(root_uri, "models", version)


def _identity(folder: Path) -> tuple[str, str]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version, kind = str(manifest["model_version"]), str(manifest["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no finished bundle ({error!r}); train again") from error
    if not _VERSION.fullmatch(version) or not version.startswith(f"{kind}-"):
        raise ConfigError(f"{path}: version {version!r} of kind {kind!r} is no model version; train again")
    return version, kind
