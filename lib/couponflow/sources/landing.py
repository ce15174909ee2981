"""Raw feeds as JSON Lines: the rows of one feed and one ingest date become one object, or one per part.

A column is a list of JSON texts, or one JSON text that all rows share. A line is then one string
formatting, which lands 1.5 million rows in seconds; strings are escaped once per distinct value and floats
keep full precision, because rounding dust such as 5.55e-17 changes which lines a quarantine rule meets.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from couponflow.errors import ConflictError, DataError
from couponflow.lake import contracts, erased, storage

#: JSON texts of one column, or the one text of all rows.
Column = list[str] | str
Array = NDArray[Any]

NULL = "null"


def texts(values: Iterable[str | None]) -> list[str]:
    """JSON strings; None becomes null."""
    known: dict[str | None, str] = {None: NULL}
    found = []
    for value in values:
        text = known.get(value)
        if text is None:
            text = known[value] = json.dumps(value)
        found.append(text)
    return found


def text(value: str) -> str:
    """The JSON string that all rows of a column share."""
    return json.dumps(value)


def numbers(values: Array) -> list[str]:
    """JSON numbers that read back bit for bit.

    Raises:
        DataError: a value is not finite, which JSON cannot hold.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(
            "a money column of the source holds NaN or infinity; repair the source and land again"
        )
    return list(map(repr, values.tolist()))


def times(values: Array) -> list[str]:
    """ISO-8601 UTC texts of ``datetime64`` instants; a fraction only where some instant has one."""
    seconds = values.astype("datetime64[s]")
    precise = seconds if (values == seconds).all() else values.astype("datetime64[us]")
    return [f'"{value}Z"' for value in np.datetime_as_string(precise).tolist()]


def instant(value: datetime) -> str:
    """ISO-8601 UTC text of one aware instant, in whole seconds."""
    return f'"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%S}Z"'


def local_days(values: Array, time_zone: str) -> Array:
    """Business day (``datetime64[D]``) of each UTC instant."""
    local = pd.DatetimeIndex(values).tz_localize("UTC").tz_convert(time_zone)
    return local.tz_localize(None).to_numpy().astype("datetime64[D]")


def by_day(days: Array) -> Iterator[tuple[date, Array]]:
    """Each distinct day, oldest first, with the positions of its rows in their given order."""
    order = np.argsort(days, kind="stable")
    distinct, starts = np.unique(days[order], return_index=True)
    yield from zip(distinct.tolist(), np.split(order, starts[1:]), strict=True)


def snapshot_days(starts: Iterable[date], first: date, last: date, run_date: date) -> list[date]:
    """Days that need a consent snapshot: every campaign start inside the data, and the run date."""
    return sorted({day for day in starts if first <= day <= last} | {run_date})


@dataclass
class Landing:
    """Lands days of feeds under one lake root and counts their rows.

    Landing the same rows again is a no-op; other rows under a day that exists are refused.
    """

    root_uri: str
    source: str
    rows: dict[str, int] = field(default_factory=dict)

    def day(
        self,
        feed: str,
        day: date,
        columns: Mapping[str, Column],
        part: int = 0,
        extra: Mapping[str, Column] | None = None,
        broken: Iterable[int] = (),
    ) -> str:
        """Land the rows of one feed for one ingest date, or one part of them; no rows is an empty delivery.

        ``extra``: columns that the contract does not know. ``broken``: positions of lines to cut in the
        middle. Returns the name of the file.

        Raises:
            ConflictError: the day holds other rows, from another source, seed or version.
        """
        lines = _lines(feed, columns, extra or {})
        for position in broken:
            lines[position] = lines[position][: len(lines[position]) // 2]
        name = f"part-{part:04d}.jsonl"
        self._create(storage.join(self.root_uri, "raw", feed, f"ingest_date={day}", name), lines)
        self.rows[feed] = self.rows.get(feed, 0) + len(lines)
        return name

    def truth(self, name: str, lines: list[str], part: int = 0) -> None:
        """Write one part of a truth table, which tests read and jobs never do."""
        self._create(storage.join(self.root_uri, "truth", name, f"part-{part:04d}.jsonl"), lines)

    def _create(self, uri: str, lines: list[str]) -> None:
        content = "".join(line + "\n" for line in lines).encode("ascii")
        if storage.exists(uri) and storage.read_bytes(uri) == content:
            return  # spares a second landing the writes
        try:
            storage.create(uri, content, run_id=f"land-{self.source}")
        except ConflictError as error:
            if storage.sha256(content) in erased.rewritten(self.root_uri):
                return  # landed before, and an erased person's rows are blank in it
            raise ConflictError(
                f"{uri} was landed before with other rows; give a new lake.root_uri, or remove this lake "
                "(make clean) and land again"
            ) from error


def _lines(feed: str, columns: Mapping[str, Column], extra: Mapping[str, Column]) -> list[str]:
    names = [column.name for column in contracts.FEEDS[feed].columns]
    assert sorted(names) == sorted(columns), f"{feed}: {sorted(columns)} are not its columns"
    parts, varying = [], []
    for name, column in [*((name, columns[name]) for name in names), *extra.items()]:
        if isinstance(column, str):
            parts.append(f"{json.dumps(name)}:{column.replace('%', '%%')}")
        else:
            parts.append(f"{json.dumps(name)}:%s")
            varying.append(column)
    template = "{" + ",".join(parts) + "}"
    return [template % row for row in zip(*varying, strict=True)]
