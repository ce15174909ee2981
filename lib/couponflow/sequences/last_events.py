"""The NumPy side of histories: the last L events known before each cut-off, packed. No Spark here.

Rows come as ``histories`` lays them out (``COLUMNS``): events and cut-offs of whole users, in any order.
Users are told apart by their full id, never by its hash; equal times are put in order by the full event id.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from couponflow.lake.layouts import HISTORY_FIELDS
from couponflow.sequences.packing import MICROS_PER_MINUTE, Int32, Int64, pack

#: ``key`` groups users by a hash and orders by whole seconds (``stream`` only), ``at`` and ``known_at`` are
#: microseconds, ``ids_1`` holds item and category, ``ids_2`` shop and event type, 32 bits each. A cut-off has
#: ``known_at`` = ``CUTOFF``, ``at`` = as_of and ``ids_2`` = as_of_date in days since 1970.
COLUMNS = ("key", "user_id", "at", "known_at", "event_id", "ids_1", "ids_2")
CUTOFF = -(2**63)
#: Rows that are packed at once, so that NumPy's cost per call does not matter; bounds the memory too.
_LEAST_ROWS = 65_536
_CHOSEN_AT_ONCE = 2_000_000
_LARGEST_KEY = 2**62
_LOW = np.int64(2**32 - 1)


def stream(batches: Iterable[pa.RecordBatch], length: int) -> Iterator[pa.RecordBatch]:
    """Pack rows sorted by ``key`` as they pass; memory is some batches plus the largest user."""
    for rows in whole_groups(batches, _LEAST_ROWS):
        yield from last_events(rows, length)


def at_once(batches: Iterable[pa.RecordBatch], length: int) -> Iterator[pa.RecordBatch]:
    """Pack rows in any order; memory is the whole partition."""
    held = [batch for batch in batches if batch.num_rows]
    if held:
        yield from last_events(pa.Table.from_batches(held), length)


def whole_groups(batches: Iterable[pa.RecordBatch], least_rows: int) -> Iterator[pa.Table]:
    """Regroup batches sorted by ``key``, so that no group of it (its upper 32 bits) is cut."""
    ready: list[pa.RecordBatch] = []
    last: list[pa.RecordBatch] = []  # the group that may go on in the next batch
    number = -1
    for batch in batches:
        if batch.num_rows == 0:
            continue
        groups = batch.column("key").to_numpy() >> 32
        first_of_last = int(np.searchsorted(groups, groups[-1]))
        if first_of_last > 0:
            ready += [*last, batch.slice(0, first_of_last)]
            last = [batch.slice(first_of_last)]
        elif groups[-1] != number:
            ready += last
            last = [batch]
        else:
            last.append(batch)
        number = int(groups[-1])
        if sum(part.num_rows for part in ready) >= least_rows:
            yield pa.Table.from_batches(ready)
            ready = []
    if ready or last:
        yield pa.Table.from_batches([*ready, *last])


def last_events(rows: pa.Table, length: int) -> Iterator[pa.RecordBatch]:
    """Pack the last ``length`` events known before each cut-off.

    Args:
        rows: whole users in any order, columns ``COLUMNS`` (``key`` is not read). An event that comes twice
            at one time counts once, from its earliest ``known_at``; equal cut-offs are one.
        length: events kept per cut-off, the most recent ones.

    Returns:
        One row per cut-off: user_id, as_of, as_of_date, length, history (oldest first, empty if none).
    """
    users = rows.column("user_id").dictionary_encode().combine_chunks().indices.to_numpy().astype(np.int64)
    at, known_at = rows.column("at").to_numpy(), rows.column("known_at").to_numpy()
    is_cutoff = known_at == CUTOFF
    cutoffs = _distinct_cutoffs(users, at, np.flatnonzero(is_cutoff))
    is_asked = np.zeros(int(users.max()) + 1, dtype=bool)
    is_asked[users[cutoffs]] = True
    events = np.flatnonzero(~is_cutoff & is_asked[users])
    offsets = _Offsets(at[events], len(is_asked))
    keys = users[events] * offsets.width + offsets.place(at[events])
    events, keys = _in_order(rows, events, keys)
    columns = [rows.column(name).to_numpy() for name in ("ids_1", "ids_2")]
    known = known_at[events]
    step = max(1, _CHOSEN_AT_ONCE // length)
    for first in range(0, len(cutoffs), step):
        part = cutoffs[first : first + step]
        base = users[part] * offsets.width
        starts = np.searchsorted(keys, base)
        stops = np.searchsorted(keys, base + offsets.place(at[part]))  # an equal time is not before
        chosen, sizes = choose(known, starts, stops, at[part], length)
        yield _packed(rows, part, events[chosen], sizes, at, *columns)


class _Offsets:
    """Times of events as small numbers, so that (user, time) fits one int64."""

    def __init__(self, times: Int64, num_users: int) -> None:
        """``place`` of a time is the number of micro-second steps, or of distinct times, before it."""
        self._first = int(times.min()) if len(times) else 0
        self._span = int(times.max()) + 1 - self._first if len(times) else 0
        self._distinct: Int64 | None = None
        if (self._span + 1) * num_users >= _LARGEST_KEY:
            self._distinct = np.unique(times)
            self._span = len(self._distinct)

    @property
    def width(self) -> int:
        """One more than any place."""
        return self._span + 1

    def place(self, times: Int64) -> Int64:
        """Ascending with time; the same for two times iff no event lies between them."""
        known = self._distinct
        places: Int64 = np.clip(times - self._first, 0, self._span)
        if known is not None:
            places = np.searchsorted(known, times)
        return places


def _distinct_cutoffs(users: Int64, at: Int64, cutoffs: Int64) -> Int64:
    """Rows of distinct (user, as_of), ascending."""
    ordered: Int64 = cutoffs[np.lexsort((at[cutoffs], users[cutoffs]))]
    if len(ordered) == 0:
        return ordered
    is_new = np.ones(len(ordered), dtype=bool)
    is_new[1:] = (np.diff(users[ordered]) != 0) | (np.diff(at[ordered]) != 0)
    distinct: Int64 = ordered[is_new]
    return distinct


def _in_order(rows: pa.Table, events: Int64, keys: Int64) -> tuple[Int64, Int64]:
    """Order events by (user, time, event_id) without copies; returns their rows and keys."""
    if (np.diff(keys) < 0).any():
        order = np.argsort(keys, kind="stable")
        events, keys = events[order], keys[order]
    is_same = keys[1:] == keys[:-1]
    if not is_same.any():
        return events, keys
    is_tied = np.zeros(len(keys), dtype=bool)
    is_tied[1:] |= is_same
    is_tied[:-1] |= is_same
    places = np.flatnonzero(is_tied)
    tied, is_copy = _settle(rows, events[places], keys[places])
    events[places] = tied
    stays = np.ones(len(keys), dtype=bool)
    stays[places[is_copy]] = False
    return events[stays], keys[stays]


def _settle(rows: pa.Table, events: Int64, keys: Int64) -> tuple[Int64, NDArray[np.bool_]]:
    """Order events of equal (user, time) by the bytes of event_id; say which repeat the one before."""
    ids = rows.column("event_id").take(pa.array(events)).combine_chunks()
    prefixes = first_bytes(ids)
    order = np.lexsort((prefixes, keys))
    is_same = (np.diff(keys[order]) == 0) & (prefixes[order][1:] == prefixes[order][:-1])
    is_copy = np.zeros(len(events), dtype=bool)
    if is_same.any():  # copies, or ids that differ later on
        is_open = np.zeros(len(events), dtype=bool)
        is_open[1:] |= is_same
        is_open[:-1] |= is_same
        places = np.flatnonzero(is_open)
        among = order[places]
        names = ["known_at", "ids_1", "ids_2"]
        table = rows.select(names).take(pa.array(events[among]))
        table = table.append_column("event_id", ids.take(pa.array(among))).append_column(
            "key", pa.array(keys[among])
        )
        by = [(name, "ascending") for name in ("key", "event_id", *names)]
        place = pc.sort_indices(table, sort_keys=by)
        table, among = table.take(place), among[place.to_numpy()]
        codes = table.column("event_id").combine_chunks().dictionary_encode().indices.to_numpy()
        again = (np.diff(codes) == 0) & (np.diff(table.column("key").to_numpy()) == 0)
        order[places] = among
        is_copy[places[1:][again]] = True
    return events[order], is_copy


def first_bytes(texts: pa.StringArray) -> NDArray[np.uint64]:
    """The first eight bytes of each text as a big-endian number; shorter ones are filled up with zeros."""
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
    held = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    held = np.concatenate([held[: starts[-1]], np.zeros(8, dtype=np.uint8)])
    numbers = np.zeros(len(texts), dtype=np.uint64)
    sizes = np.diff(starts)
    for place in range(8):
        byte = np.where(sizes > place, held[starts[:-1] + place], 0).astype(np.uint64)
        numbers |= byte << np.uint64(56 - 8 * place)
    return numbers


def choose(known: Int64, starts: Int64, stops: Int64, as_of: Int64, length: int) -> tuple[Int64, Int64]:
    """Places of the last ``length`` events with ``known`` < as_of in [start, stop), and their number.

    Most cut-offs need no more than the last ``length`` events; those with a late one among them look
    further back, twice as far each time.
    """
    firsts = np.maximum(starts, stops - length)
    sizes = stops - firsts
    places, owners = _ranges(firsts, sizes)
    is_late = known[places] >= as_of[owners]
    if not is_late.any():
        return places, sizes
    has_late = np.zeros(len(stops), dtype=bool)
    has_late[owners[is_late]] = True
    late = np.flatnonzero(has_late)
    more_places, more_owners = _look_back(known, starts[late], stops[late], as_of[late], length, 2 * length)
    stays = ~has_late[owners]
    owners = np.concatenate([owners[stays], late[more_owners]])
    places = np.concatenate([places[stays], more_places])
    order = np.lexsort((places, owners))
    return places[order], np.bincount(owners, minlength=len(stops)).astype(np.int64)


def _look_back(
    known: Int64, starts: Int64, stops: Int64, as_of: Int64, length: int, window: int
) -> tuple[Int64, Int64]:
    """Places and owners of the last ``length`` usable events, looking at ``window`` events at first."""
    firsts = np.maximum(starts, stops - window)
    sizes = stops - firsts
    if sizes.sum() > _CHOSEN_AT_ONCE and len(stops) > 1:
        half = len(stops) // 2
        one = _look_back(known, starts[:half], stops[:half], as_of[:half], length, window)
        two = _look_back(known, starts[half:], stops[half:], as_of[half:], length, window)
        return np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1] + half])
    places, owners = _ranges(firsts, sizes)
    usable = known[places] < as_of[owners]
    places, owners = places[usable], owners[usable]
    counts = np.bincount(owners, minlength=len(stops))
    is_done = (counts >= length) | (firsts == starts)
    from_end = np.cumsum(counts)[owners] - np.arange(len(owners))
    stays = (from_end <= length) & is_done[owners]
    places, owners = places[stays], owners[stays]
    rest = np.flatnonzero(~is_done)
    if len(rest) == 0:
        return places, owners
    far_places, far = _look_back(known, starts[rest], stops[rest], as_of[rest], length, 2 * window)
    return np.concatenate([places, far_places]), np.concatenate([owners, rest[far]])


def _ranges(firsts: Int64, sizes: Int64) -> tuple[Int64, Int64]:
    """All numbers of the ranges [first, first + size), and which range each is of."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    before = np.cumsum(sizes) - sizes
    return np.arange(len(owners)) + np.repeat(firsts - before, sizes), owners


def _packed(
    rows: pa.Table, cutoffs: Int64, events: Int64, sizes: Int64, at: Int64, ids_1: Int64, ids_2: Int64
) -> pa.RecordBatch:
    matrix: Int32 = np.empty((len(events), len(HISTORY_FIELDS)), dtype="<i4")
    for place, ids in ((0, ids_1[events]), (2, ids_2[events])):
        matrix[:, place], matrix[:, place + 1] = ids >> 32, ids & _LOW
    matrix[:, 4] = (np.repeat(at[cutoffs], sizes) - at[events]) // MICROS_PER_MINUTE
    return pa.RecordBatch.from_arrays(
        [
            rows.column("user_id").take(pa.array(cutoffs)).combine_chunks(),
            pa.array(at[cutoffs], pa.int64()).cast(pa.timestamp("us", tz="UTC")),
            pa.array(ids_2[cutoffs].astype(np.int32)).cast(pa.date32()),
            pa.array(sizes, pa.int32()),
            pack(matrix, sizes),
        ],
        names=["user_id", "as_of", "as_of_date", "length", "history"],
    )
