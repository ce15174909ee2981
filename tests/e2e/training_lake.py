"""A small lake of training examples with planted signal, for tests that train on real ranks."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from couponflow.lake import layouts
from couponflow.training import manifests

SIZES = {"item": 40, "category": 12, "shop": 6, "event_type": 9}
FILES, TRAIN, HELD = 3, 170, 60


def make_row(number: int, split: str) -> dict[str, object]:
    """The label depends on the first aggregate and on whether the history holds the target's category."""
    generator = np.random.default_rng(number)
    length = int(generator.integers(0, 9))
    history = np.c_[
        generator.integers(1, 40, length),
        generator.integers(2, 12, length),
        generator.integers(1, 6, length),
        generator.integers(2, 9, length),
        np.sort(generator.integers(0, 90_000, length))[::-1],
    ]
    target = np.array([[0, generator.integers(2, 12), 0], [5, 0, 0]])
    wide = generator.normal(size=len(layouts.WIDE_FEATURES))
    logit = 2.0 * wide[0] + 2.0 * bool(np.isin(history[:, 1], target[0, 1]).any()) - 1.5
    return {
        "example_id": f"c{number % 2}:u{number // 2}:2024-01-10",
        "user_id": f"u{number // 2}",
        "target_id": f"c{number % 2}",
        "split": split,
        "vocabulary_version": "voc-1",
        "as_of": datetime(2024, 1, 10 + number % 3, 5, tzinfo=UTC),
        "label": int(generator.random() < 1 / (1 + np.exp(-logit))),
        "history": history.astype("<i4").tobytes(),
        "negatives": generator.integers(1, 12, (length, 2)).astype("<i4").tobytes(),
        "target": target.astype("<i4").tobytes(),
        "wide": wide.astype("<f4").tobytes(),
    }


def make_lake(folder: Path) -> tuple[str, str]:
    """Config file and root of a lake with 900 examples in 3 files."""
    root = folder / "lake"
    files: dict[str, dict[str, int]] = {split: {} for split in ("train", "valid", "test")}
    tables = root / "tables" / "training_examples"
    tables.mkdir(parents=True)
    for place in range(FILES):
        splits = ["train"] * (TRAIN + 7 * place) + ["valid"] * HELD + ["test"] * HELD
        rows = [make_row(1000 * place + n, split) for n, split in enumerate(splits)]
        table = pa.Table.from_pylist(rows)
        index = table.schema.get_field_index("label")
        path = tables / f"{place}.parquet"
        pq.write_table(table.set_column(index, "label", table["label"].cast("int32")), path)
        for split in files:
            files[split][path.as_uri()] = splits.count(split)
    manifests.write(str(root), manifests.Dataset(0, "voc-1", SIZES, layouts.WIDE_FEATURES, files), "build-1")
    config = folder / "test.toml"
    config.write_text(
        f"[lake]\nroot_uri = '{root}'\n"
        "[model]\nhidden_dim = 8\nhead_dims = [8]\nattention_dims = [8]\n"
        "auxiliary_dims = [8]\ndropout = 0.0\n"
        "[training]\nnum_ranks = 2\nbatch_size = 32\nmax_epochs = 3\nlearning_rate = 0.01\n"
        "start_timeout_seconds = 240\n"
        "[evaluation]\nnum_draws = 100\n"
    )
    return str(config), str(root)
