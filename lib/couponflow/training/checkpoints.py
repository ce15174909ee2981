"""Durable checkpoints of a training run: whole or not there, checked before they are read.

A checkpoint is an object ``<epoch>-<step>-<digest>.pt`` and, written after it, a manifest ``.json`` beside it
with its SHA-256, its size and what it belongs to. Both are created by ``lake.storage``: on local disk
written, synced and linked into place, on ``gs://`` with a generation precondition. An object without a
manifest is what a killed writer left and counts for nothing. No pickle runs: contents are plain values and
tensors, read with ``weights_only=True``.
"""

import io
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from couponflow.errors import ConfigError, DataError
from couponflow.lake import storage

log = logging.getLogger("couponflow")

SCHEMA_VERSION = 1
#: How many are kept: the newest may turn out to be damaged.
KEPT = 2
_FROM_SCRATCH = "pass --from-scratch to job train to begin again"


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: fingerprints of the settings and of the dataset, and the group's size."""

    settings: str
    data: str
    num_ranks: int


class _UnusableError(Exception):
    """Why one checkpoint cannot be used."""


class Store:
    """The checkpoints of one run's content under a folder or ``gs://`` prefix of their own."""

    def __init__(self, uri: str, identity: Identity, writer: str = "train") -> None:
        """``writer`` marks objects on ``gs://``, so that a lost answer is told from another run's object."""
        self.uri, self.identity, self._writer = uri, identity, writer

    def save(
        self, epoch: int, step: int, tree: dict[str, Any], midway: Callable[[], None] = lambda: None
    ) -> None:
        """Keep ``tree`` as the state after ``step`` steps of ``epoch``; older ones than the last two go.

        ``midway`` is called when the content is written and its manifest is not.

        Raises:
            InfraError: the disk is full, or the store refused the write; what was there stays.
        """
        stream = io.BytesIO()
        torch.save(tree, stream)
        content = stream.getvalue()
        digest = storage.sha256(content)
        name = f"{epoch:05d}-{step:09d}-{digest[:12]}"
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "sha256": digest,
            "bytes": len(content),
            "epoch": epoch,
            "step": step,
            "identity": asdict(self.identity),
        }
        storage.create(self._path(f"{name}.pt"), content, self._writer)
        midway()
        text = json.dumps(manifest, indent=1, sort_keys=True).encode()
        storage.create(self._path(f"{name}.json"), text, self._writer)
        for old in self._names()[KEPT:]:
            self._remove(old)

    def load(self, report: Callable[[str], None] = log.warning) -> dict[str, Any] | None:
        """The newest good checkpoint; None if there has never been one. Each bad one is reported.

        Raises:
            ConfigError: it was written by another number of ranks.
            DataError: there are checkpoints, and none is good.
        """
        names = self._names()
        for name in names:
            try:
                return self._read(name)
            except _UnusableError as error:
                report(f"checkpoint {self._path(name)}: {error}; trying the one before it")
        if names:
            raise DataError(
                f"none of the {len(names)} checkpoints in {self.uri} can be used; restore one, or "
                f"{_FROM_SCRATCH}"
            )
        return None

    def clear(self) -> None:
        """Remove all of them, manifests first."""
        for name in self._names():
            self._remove(name)
        for name in storage.list_names(self.uri):
            storage.remove(self._path(name))
        if not storage.is_remote(self.uri) and (folder := Path(self.uri)).is_dir():
            for hidden in folder.iterdir():  # of writers that were killed
                hidden.unlink()
            folder.rmdir()

    def _names(self) -> list[str]:
        """Those with a manifest, newest first."""
        found = storage.list_names(self.uri)
        return sorted((name.removesuffix(".json") for name in found if name.endswith(".json")), reverse=True)

    def _read(self, name: str) -> dict[str, Any]:
        manifest = self._manifest(name)
        found = manifest["identity"]
        if {**found, "num_ranks": 0} != {**asdict(self.identity), "num_ranks": 0}:
            raise _UnusableError("it belongs to other settings or another dataset")
        if found["num_ranks"] != self.identity.num_ranks:
            raise ConfigError(
                f"checkpoint {self._path(name)} is of {found['num_ranks']} ranks and this run has "
                f"{self.identity.num_ranks}: set training.num_ranks = {found['num_ranks']} to resume, or "
                f"{_FROM_SCRATCH}"
            )
        try:
            content = storage.read_bytes(self._path(f"{name}.pt"))
        except DataError as error:
            raise _UnusableError("its content is lost") from error
        if len(content) != manifest["bytes"] or storage.sha256(content) != manifest["sha256"]:
            raise _UnusableError(
                f"its content is damaged ({len(content)} bytes, expected {manifest['bytes']} of SHA-256 "
                f"{manifest['sha256'][:12]})"
            )
        try:
            tree = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise _UnusableError(
                f"it holds something else than values and tensors ({type(error).__name__})"
            ) from error
        if not isinstance(tree, dict):
            raise _UnusableError("it holds no state of a training run")
        return tree

    def _manifest(self, name: str) -> dict[str, Any]:
        try:
            tree = json.loads(storage.read_bytes(self._path(f"{name}.json")))
            version = tree["schema_version"]
            checked = {
                "identity": {key: tree["identity"][key] for key in ("settings", "data", "num_ranks")},
                "bytes": int(tree["bytes"]),
                "sha256": str(tree["sha256"]),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise _UnusableError("its manifest is damaged") from error
        if version != SCHEMA_VERSION:
            raise _UnusableError(
                f"it was written by other code (schema {version}, expected {SCHEMA_VERSION})"
            )
        return checked

    def _remove(self, name: str) -> None:
        storage.remove(self._path(f"{name}.json"))
        storage.remove(self._path(f"{name}.pt"))

    def _path(self, name: str) -> str:
        return storage.join(self.uri, name)
