"""The do-not-ingest list: people who were erased, so that no delivery and no backfill brings them back.

The list holds keyed hashes, never an id: a byte search for an erased person's id must find nothing. The key
lies beside them, so this hides ids from a search, not from somebody who tries all of them.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from couponflow.errors import DataError
from couponflow.lake import storage

#: What stands in the ledger instead of an erased person's id: this, then a random text.
TOMBSTONE = "erased:"


@dataclass(frozen=True)
class Erased:
    """Who was erased, as hashes under ``key``."""

    key: str
    hashes: frozenset[str] = frozenset()

    def contains(self, user_id: str) -> bool:
        """Whether this (pseudonymous) id was erased."""
        return bool(self.hashes) and _hash(self.key, user_id) in self.hashes

    def hash_of(self, user_id: str) -> str:
        """The name under which an erasure is kept on record."""
        return _hash(self.key, user_id)

    def with_ids(self, user_ids: Iterable[str]) -> "Erased":
        """The list with more ids on it; writes nothing."""
        key = self.key or secrets.token_hex(16)
        return Erased(key, self.hashes | {_hash(key, user_id) for user_id in user_ids})


def load(root_uri: str) -> Erased:
    """The list of a lake; empty where nobody was erased yet.

    Raises:
        DataError: the list is damaged; without it an erased person could come back.
    """
    uri = _uri(root_uri)
    if not storage.exists(uri):
        return Erased("")
    try:
        tree = json.loads(storage.read_bytes(uri))
        return Erased(str(tree["key"]), frozenset(map(str, tree["hashes"])))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{uri} is damaged ({error!r}); restore it before any delivery is read") from error


def add(root_uri: str, user_ids: list[str]) -> Erased:
    """Put ids on the list; ids that are on it stay once. Returns the new list.

    Raises:
        ConflictError: another run changed the list at the same time.
        DataError: as ``load``.
    """
    uri = _uri(root_uri)
    held = storage.read_bytes(uri) if storage.exists(uri) else None
    after = load(root_uri).with_ids(user_ids)
    content = json.dumps({"key": after.key, "hashes": sorted(after.hashes)}, indent=1).encode()
    if content != held:
        storage.replace(uri, content, held)
    return after


def rewritten(root_uri: str) -> frozenset[str]:
    """SHA-256 of every raw file as it was delivered, of those that an erasure has rewritten since.

    A source that lands the same delivery again finds other bytes in the lake, and this says why.
    """
    uri = _rewritten_uri(root_uri)
    return frozenset(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else frozenset()


def note_rewritten(root_uri: str, digests: Iterable[str]) -> None:
    """Remember deliveries that are about to be rewritten.

    Raises:
        ConflictError: another run changed the note at the same time.
    """
    uri = _rewritten_uri(root_uri)
    held = storage.read_bytes(uri) if storage.exists(uri) else None
    content = json.dumps(sorted(rewritten(root_uri) | set(digests)), indent=1).encode()
    if content != held:
        storage.replace(uri, content, held)


@cache
def _key_bytes(key: str) -> bytes:
    return bytes.fromhex(key)


def _hash(key: str, user_id: str) -> str:
    return hmac.new(_key_bytes(key), user_id.encode(), hashlib.sha256).hexdigest()


def _uri(root_uri: str) -> str:
    return storage.join(root_uri, "erasure", "do_not_ingest.json")


def _rewritten_uri(root_uri: str) -> str:
    return storage.join(root_uri, "erasure", "rewritten_deliveries.json")
