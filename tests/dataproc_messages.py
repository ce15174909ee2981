"""Messages of google-cloud-dataproc, as the modules of its stand-in handle them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format


def raw(message: Any) -> Any:
    """The protobuf message inside the library's wrapper, or the message itself."""
    return type(message).pb(message) if hasattr(type(message), "pb") else message


def snapshot(message: Any) -> Any:
    """A copy that later changes do not reach."""
    copy = type(message)()
    raw(copy).CopyFrom(raw(message))
    return copy


def parsed(kind: Any, tree: Mapping[str, Any]) -> Any:
    """A message of the library from its JSON form.

    Raises:
        json_format.ParseError: a field is unknown or has another type.
    """
    return kind.wrap(json_format.ParseDict(tree, kind.pb(kind())))


def paged(found: list[Any], request: Any) -> tuple[list[Any], str]:
    """One page of a list and the token of the next; a token is where that page begins."""
    start = int(request.page_token or 0)
    size = request.page_size or 100
    return found[start : start + size], str(start + size) if len(found) > start + size else ""


def last_line(text: str) -> str:
    """What a driver said last, cut to what fits into a message."""
    return (text.strip().splitlines() or [""])[-1][:200]


def now() -> datetime:
    return datetime.now(UTC)
