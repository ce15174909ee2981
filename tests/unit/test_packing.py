"""Packed bytes, and auxiliary negatives against a slow obvious version. No JVM."""

import random
from datetime import date

import numpy as np
import pytest

from couponflow.sequences import packing

DAY_MINUTES = 1440


@pytest.mark.parametrize("sizes", [[], [0], [1], [2, 0, 3], [0, 0, 4, 0]])
def test_unpack_inverts_pack_and_bytes_are_row_major_little_endian(sizes: list[int]) -> None:
    counts = np.array(sizes, dtype=np.int64)
    matrix = np.arange(sum(sizes) * 3, dtype="<i4").reshape(-1, 3)
    packed = packing.pack(matrix, counts)
    first = np.cumsum(counts) - counts
    assert packed.to_pylist() == [
        b"".join(int(v).to_bytes(4, "little") for v in matrix[f : f + n].ravel())
        for f, n in zip(first, sizes, strict=True)
    ]
    found, found_sizes = packing.unpack(packed, 3)
    assert found.tolist() == matrix.tolist()
    assert found_sizes.tolist() == sizes


def test_unpack_of_a_sliced_column_reads_the_slice() -> None:
    packed = packing.pack(np.arange(12, dtype="<i4").reshape(-1, 2), np.array([1, 2, 3]))
    found, sizes = packing.unpack(packed.slice(1), 2)
    assert found.tolist() == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert sizes.tolist() == [2, 3]


def test_splitmix64_gives_the_published_numbers() -> None:
    # Reference stream of seed 1234567 (Vigna, splitmix64.c): state advances by the golden gamma per call.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * gamma) % 2**64 for n in range(3)], dtype=np.uint64)
    assert packing.splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def _popularity(rng: random.Random, days: int = 6, power: float = 0.75) -> tuple[packing.Popularity, dict]:
    pairs = [(rng.randint(1, 6), rng.randint(1, 4)) for _ in range(12)]
    counts = [(rng.randint(1, days), pair, rng.randint(1, 9)) for pair in pairs for _ in range(2)]
    by_refresh = {
        refresh: {
            pair: sum(n for seen, other, n in counts if other == pair and seen <= refresh) for pair in pairs
        }
        for refresh in range(days + 1)
    }
    made = packing.Popularity.from_counts(
        np.array([seen for seen, _, _ in counts]),
        np.array([pair for _, pair, _ in counts], dtype=np.int32),
        np.array([n for _, _, n in counts]),
        np.arange(days + 1, dtype=np.int64) * DAY_MINUTES,
        power,
    )
    return made, by_refresh


def test_negatives_are_possible_and_never_the_own_item_nor_a_target_category() -> None:
    drawn_pairs = 0
    for case in range(60):
        rng = random.Random(case)
        popularity, by_refresh = _popularity(rng)
        sizes = [rng.choice([0, 1, 5]) for _ in range(4)]
        as_of = [rng.randint(1, 6) * DAY_MINUTES for _ in sizes]
        ages = [sorted((rng.randint(0, 6 * DAY_MINUTES) for _ in range(n)), reverse=True) for n in sizes]
        steps = [(rng.randint(1, 6), 1, 1, 2, age) for row in ages for age in row]
        blocked = [frozenset(rng.sample(range(1, 5), rng.randint(0, 4))) for _ in sizes]
        history = np.array(steps, dtype=np.int32).reshape(-1, 5)
        keys = np.array([rng.getrandbits(62) for _ in sizes], dtype=np.int64)
        found = packing.draw_negatives(
            history, np.array(sizes), np.array(as_of), keys, blocked, popularity, seed=7
        )
        rows = [row for row, size in enumerate(sizes) for _ in range(size)]
        for (item, category), step, row in zip(found.tolist(), steps, rows, strict=True):
            refresh = (as_of[row] - step[4] - 1) // DAY_MINUTES
            allowed = {
                pair
                for pair, count in by_refresh.get(refresh, {}).items()
                if count and pair[0] != step[0] and pair[1] not in blocked[row]
            }
            assert (item, category) in (allowed or {(0, 0)}), (case, step, blocked[row])
            drawn_pairs += bool(allowed)
    assert drawn_pairs > 100


def test_negatives_follow_popularity_to_the_power() -> None:
    popularity = packing.Popularity.from_counts(
        np.zeros(4, dtype=np.int64),
        np.array([[2, 2], [3, 2], [4, 3], [5, 3]], dtype=np.int32),
        np.array([1, 16, 81, 10_000]),
        np.array([0], dtype=np.int64),
        0.75,
    )
    size = 40_000
    history = np.tile(np.array([[5, 3, 1, 2, 0]], dtype=np.int32), (size, 1))
    found = packing.draw_negatives(
        history, np.array([size]), np.array([DAY_MINUTES]), np.array([1]), [frozenset()], popularity, 0
    )
    share = {item: float((found[:, 0] == item).mean()) for item in (2, 3, 4, 5)}
    # Item 5 is the step's own; the others weigh 1, 8 and 27. Three standard errors are .008.
    assert share == pytest.approx({2: 1 / 36, 3: 8 / 36, 4: 27 / 36, 5: 0.0}, abs=0.008)


def test_a_draw_depends_on_its_row_and_position_alone() -> None:
    popularity, _ = _popularity(random.Random(1))
    sizes = np.array([3, 0, 2, 4])
    as_of = np.array([5, 5, 6, 4]) * DAY_MINUTES
    history = np.array([[n % 6 + 1, 1, 1, 2, 100 * n] for n in range(9)], dtype=np.int32)
    keys = np.array([11, 12, 13, 14])
    blocked = [frozenset({1}), frozenset(), frozenset({2}), frozenset({1})]

    def draw(rows: list[int], seed: int = 0) -> list[list[list[int]]]:
        ends = np.cumsum(sizes)
        part = np.concatenate([history[ends[r] - sizes[r] : ends[r]] for r in rows])
        found = packing.draw_negatives(
            part, sizes[rows], as_of[rows], keys[rows], [blocked[r] for r in rows], popularity, seed
        )
        return [block.tolist() for block in np.split(found, np.cumsum(sizes[rows])[:-1])]

    together = draw([0, 1, 2, 3])
    assert [draw([r])[0] for r in range(4)] == together
    assert draw([3, 1, 0, 2]) == [together[r] for r in (3, 1, 0, 2)]
    assert draw([0, 1, 2, 3], seed=1) != together


def test_later_events_and_unseen_pairs_change_no_earlier_draw() -> None:
    rng = random.Random(5)
    base = [(1, (2, 2), 5), (1, (4, 3), 7), (2, (6, 2), 3)]
    later = [*base, (3, (2, 2), 900), (3, (3, 2), 50), (3, (9, 4), 1)]
    rng.shuffle(later)

    def popularity(counts: list, refreshes: int) -> packing.Popularity:
        return packing.Popularity.from_counts(
            np.array([c[0] for c in counts]),
            np.array([c[1] for c in counts], dtype=np.int32),
            np.array([c[2] for c in counts]),
            np.arange(refreshes, dtype=np.int64) * DAY_MINUTES,
            0.75,
        )

    ages = [int(age) for age in np.linspace(0, 2 * DAY_MINUTES - 2, 50)]
    history = np.array([[1, 1, 1, 2, age] for age in ages], dtype=np.int32)
    arguments = (history, np.array([50]), np.array([3 * DAY_MINUTES]), np.array([4]), [frozenset()])
    before = packing.draw_negatives(*arguments, popularity(base, 3), 0)
    after = packing.draw_negatives(*arguments, popularity(later, 4), 0)
    assert before.tolist() == after.tolist()
    assert set(before[:, 0].tolist()) <= {2, 4, 6}


def test_no_popularity_at_all_gives_zeros() -> None:
    empty = packing.Popularity.from_counts(
        np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int32), np.zeros(0, dtype=np.int64),
        np.zeros(0, dtype=np.int64), 0.75,
    )  # fmt: skip
    minutes = (date(2024, 1, 1) - date(1970, 1, 1)).days * DAY_MINUTES
    history = np.array([[2, 2, 2, 2, 10]], dtype=np.int32)
    found = packing.draw_negatives(
        history, np.array([1]), np.array([minutes]), np.array([1]), [frozenset()], empty, 0
    )
    assert found.tolist() == [[0, 0]]
