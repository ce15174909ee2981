"""Whether a person's id still stands anywhere: a search over all bytes of a lake, Parquet and gzip decoded.

Plain text is searched as it is, so also the Delta logs, run records, reports and lists. An id that is too
plain to be searched as text (a few digits stand everywhere) is looked for as the value of a user column only.
"""

import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote

from couponflow.errors import ConfigError
from couponflow.lake import storage

USER_COLUMNS = ("user_id", "visitor_id")
#: What stands where an id was taken out of a text.
REDACTED = "erased"
#: An id shorter than this, or shorter than the second where it is all digits, is found in any text.
_MIN_LENGTH, _MIN_DIGITS = 6, 10
_MAX_LENGTH = 1_000


@dataclass(frozen=True)
class Needles:
    """The ids of one person; never shown."""

    ids: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no id.

        Raises:
            ConfigError: an id is empty, very long, or holds control characters.
        """
        for found in self.ids:
            if not found.strip() or len(found) > _MAX_LENGTH or not found.isprintable():
                raise ConfigError("--user: expected one id, found no printable text; give the raw user id")

    @property
    def is_plain(self) -> bool:
        """Whether one of the ids is too plain to be searched as text."""
        return any(map(_is_plain, self.ids))

    @cached_property
    def _pattern(self) -> "re.Pattern[bytes]":
        parts, plain = [], []
        for found in self.ids:
            written = {found, json.dumps(found)[1:-1], quote(found, safe=""), found.replace('"', '""')}
            either = b"|".join(re.escape(text.encode()) for text in sorted(written))
            if _is_plain(found):
                plain.append(either)
            else:  # a longer id that begins or ends like this one is another person's
                parts.append(b"(?<![A-Za-z0-9])(?:" + either + b")(?![A-Za-z0-9])")
        if plain:
            name = b'"(?:' + "|".join(USER_COLUMNS).encode() + rb')"\s*:\s*"'
            parts.append(b"(?P<name>" + name + b")(?:" + b"|".join(plain) + b')(?=")')
        return re.compile(b"|".join(parts))

    def in_bytes(self, content: bytes) -> bool:
        """Whether an id stands in a text."""
        return self._pattern.search(content) is not None

    def in_value(self, value: str | bytes, column: str) -> bool:
        """Whether an id stands in one cell of a table."""
        content = value.encode() if isinstance(value, str) else value
        plain = [found.encode() for found in self.ids if _is_plain(found)]
        return (column in USER_COLUMNS and content in plain) or self.in_bytes(content)

    def redacted(self, content: bytes) -> bytes:
        """The text without the ids."""

        def without(match: "re.Match[bytes]") -> bytes:
            return (match.groupdict().get("name") or b"") + REDACTED.encode()

        return self._pattern.sub(without, content)


def _is_plain(user_id: str) -> bool:
    return len(user_id) < (_MIN_DIGITS if user_id.isdigit() else _MIN_LENGTH)


def search(root_uri: str, needles: Needles) -> Iterator[tuple[str, str]]:
    """Each file below a place that holds an id, or may hold one unseen, with where in it.

    Cost: every byte is read once.
    """
    for name in storage.walk(root_uri):
        uri = f"{root_uri.rstrip('/')}/{name}"
        if needles.in_bytes(name.encode()):
            yield uri, "its name"
        for where in _in_file(uri, needles):
            yield uri, where


def redact(root_uri: str, needles: Needles, kinds: tuple[str, ...], skip: tuple[str, ...]) -> list[str]:
    """Take the ids out of the text objects below a place; returns which were changed.

    ``kinds`` are endings of names, ``skip`` folders whose objects are left alone. A hidden file that holds an
    id was left by a writer that died, wherever it lies, and is removed.
    """
    changed = []
    for name in storage.walk(root_uri):
        uri = f"{root_uri.rstrip('/')}/{name}"
        hidden = not storage.is_remote(uri) and name.rpartition("/")[2].startswith(".")
        if name.endswith(".crc") or (not hidden and (name.startswith(skip) or not name.endswith(kinds))):
            continue
        content = storage.read_bytes(uri)
        if not needles.in_bytes(content):
            continue
        if hidden:
            storage.remove(uri)
        else:
            storage.replace(uri, needles.redacted(content), content)
        changed.append(uri)
    return changed


def _in_file(uri: str, needles: Needles) -> Iterator[str]:
    content = storage.read_bytes(uri)
    if uri.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError):
            yield "unknown: not readable as gzip"
            return
    if needles.in_bytes(content):
        yield "its bytes"
        return
    if content[:4] == b"PAR1" or uri.endswith(".parquet"):
        yield from _in_parquet(content, needles)


def _in_parquet(content: bytes, needles: Needles) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content))
        statistics = _statistics(file.metadata)
        found = {name for name, value in statistics if needles.in_value(value, name)}
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            for name in table.column_names:
                if name not in found and _in_column(table.column(name), name, needles):
                    found.add(name)
    except (pa.ArrowException, OSError):
        yield "unknown: not readable as Parquet"
        return
    if found:
        yield f"column {', '.join(sorted(found))}"


def _statistics(metadata: Any) -> Iterator[tuple[str, str | bytes]]:
    """Smallest and largest value that the footer keeps of each column and row group."""
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            kept = column.statistics
            if kept is not None and kept.has_min_max:
                for value in (kept.min, kept.max):
                    if isinstance(value, str | bytes):
                        yield column.path_in_schema, value


def _in_column(column: Any, name: str, needles: Needles) -> bool:
    """Whether an id stands in a column; a value is looked at only if Arrow finds the bare text in it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for chunk in column.chunks:
        for values in _leaves(chunk):
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                for found in needles.ids:
                    near = pc.filter(values, pc.match_substring(values, found)).unique().to_pylist()
                    if any(value is not None and needles.in_value(value, name) for value in near):
                        return True
            elif any(value and needles.in_bytes(value) for value in values.to_pylist()):
                return True
    return False


def _leaves(values: Any) -> Iterator[Any]:
    """The texts and bytes inside an array, however nested."""
    import pyarrow as pa

    kind = values.type
    if pa.types.is_dictionary(kind):
        yield from _leaves(values.dictionary)
    elif pa.types.is_map(kind):
        yield from _leaves(values.keys)
        yield from _leaves(values.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(values.flatten())
    elif pa.types.is_struct(kind):
        for part in values.flatten():
            yield from _leaves(part)
    elif any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    ):
        yield values
