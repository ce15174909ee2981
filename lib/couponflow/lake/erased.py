"""The do-not-ingest list: people who were erased, so that no delivery and no backfill brings them back.

The list holds keyed hashes, never an id: a byte search for an erased person's id must find nothing. The key
lies beside them, so this hides ids from a search, not from somebody who tries all of them.
"""

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from functools import cache

from couponflow.errors import DataError
from couponflow.lake import storage


@dataclass(frozen=True)
class Erased:
    """Who was erased, as hashes under ``key``."""

    key: str
    hashes: frozenset[str] = frozenset()

    def contains(self, user_id: str) -> bool:
        """Whether this (pseudonymous) id was erased."""
        return bool(self.hashes) and _hash(self.key, user_id) in self.hashes


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
    before = load(root_uri)
    key = before.key or secrets.token_hex(16)
    after = Erased(key, before.hashes | {_hash(key, user_id) for user_id in user_ids})
    content = json.dumps({"key": after.key, "hashes": sorted(after.hashes)}, indent=1).encode()
    if content != held:
        storage.replace(uri, content, held)
    return after


@cache
def _key_bytes(key: str) -> bytes:
    return bytes.fromhex(key)


def _hash(key: str, user_id: str) -> str:
    return hmac.new(_key_bytes(key), user_id.encode(), hashlib.sha256).hexdigest()


def _uri(root_uri: str) -> str:
    return storage.join(root_uri, "erasure", "do_not_ingest.json")
