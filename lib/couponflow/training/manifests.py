"""Dataset manifests over time: one follows an erasure, and those whose files are gone are retired.

A versioned manifest promises that its files can be read. VACUUM removes files; a manifest that names such a
file is removed before it, so that training on that version is refused by name instead of in the middle.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlparse

from couponflow.errors import DataError
from couponflow.lake import storage
from couponflow.training import feed


def current(root_uri: str) -> feed.Dataset | None:
    """What training reads now; None before the first build."""
    return feed.load_manifest(root_uri) if storage.exists(_pointer(root_uri)) else None


def renew(root_uri: str, counted: Mapping[str, Any], run_id: str) -> tuple[str, list[str]]:
    """Publish a manifest of a snapshot that has fewer rows, and retire all others.

    ``counted``: the fields of ``feed.Dataset`` that were counted anew; all others, such as the vocabulary,
    are those of the manifest before, and row groups are read off the files. Returns its URI and what was
    removed.

    Raises:
        DataError: there is no manifest before.
    """
    before = feed.load_manifest(root_uri)
    uri = feed.write_manifest(root_uri, replace(before, **({"row_groups": {}} | dict(counted))), run_id)
    older = [found for found in _versioned(root_uri) if found != uri]
    for found in older:
        storage.remove(found)
    return uri, older


def retire(root_uri: str, gone: Collection[str], dry_run: bool) -> list[str]:
    """Remove the versioned manifests that name a file which will be gone, or is gone; returns them.

    ``gone``: files that are about to be removed, as paths or URIs.

    Raises:
        DataError: the manifest that training reads now names one, so nothing may be removed.
    """
    names = {_base_name(uri) for uri in gone}
    pointer = _pointer(root_uri)
    if storage.exists(pointer) and (lost := _lost(pointer, names)):
        raise DataError(
            f"{pointer} names {lost}, which is replaced and old enough to be removed; training would "
            "fail: run build_examples, then maintain again"
        )
    retired = [uri for uri in _versioned(root_uri) if _lost(uri, names)]
    for uri in [] if dry_run else retired:
        storage.remove(uri)
    return retired


def _lost(uri: str, names: set[str]) -> str:
    """The first file of a manifest that is, or will be, gone; empty if all stay."""
    try:
        files = json.loads(storage.read_bytes(uri))["files"].values()
        listed = sorted({file for of_split in files for file in of_split})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{uri} is no dataset manifest ({error!r}); run build_examples again") from error
    return next((file for file in listed if _base_name(file) in names or not _is_there(file)), "")


def _is_there(uri: str) -> bool:
    return storage.exists(uri if storage.is_remote(uri) else unquote(urlparse(uri).path))


def _base_name(uri: str) -> str:
    """Spark names files uniquely, and writes their folders in several ways."""
    return uri.rpartition("/")[2]


def _pointer(root_uri: str) -> str:
    return storage.join(root_uri, "datasets", f"{feed.TABLE}.json")


def _versioned(root_uri: str) -> list[str]:
    folder = storage.join(root_uri, "datasets")
    names = [name for name in storage.list_names(folder) if name.startswith(f"{feed.TABLE}-v")]
    return [storage.join(folder, name) for name in names]
