"""Training on two real Gloo ranks, and the jobs train and evaluate on a small dataset with planted signal.

Run as a script, this file is one rank of the first test.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from couponflow.errors import DataError
from couponflow.lake import layouts, runs
from couponflow.models.batch import Batch, empty_batch, random_batch
from couponflow.sections import TrainingConfig
from couponflow.training import feed, launch, registry, trainer

SIZES = {"item": 40, "category": 12, "shop": 6, "event_type": 9}
WIDE = 4


class Output(NamedTuple):
    logits: Tensor
    aux_sum: Tensor
    aux_count: Tensor


class Plain(nn.Module):
    """Without batch statistics, so that one rank and two must agree."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.last = nn.Linear(WIDE, 6), nn.Linear(6, 1)

    def forward(self, batch: Batch) -> Output:
        hidden = torch.tanh(self.hidden(batch.wide))
        pairs = batch.length.float()
        return Output(self.last(hidden)[:, 0], (hidden.pow(2).sum(1) * pairs).sum(), pairs.sum())


def one_rank(workers: launch.Workers) -> None:
    """Same gradients as one rank, a rank without data, uneven gathers, then a NaN on rank 1 only."""
    batches = [random_batch(torch.Generator().manual_seed(n), 8, num_wide=WIDE) for n in range(3)]
    own = [b.take([0, 1, 2] if workers.rank == 0 else [3, 4, 5, 6, 7]) for b in batches]
    config = TrainingConfig(max_epochs=2, patience=2, learning_rate=0.05)
    alone, together = Plain(), Plain()
    trainer.backward(alone, batches[0], 0.5, launch.Workers())
    trainer.backward(together, own[0], 0.5, workers)
    for left, right in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)
    expected = trainer.fit(alone, lambda n: batches, lambda: batches, config, 0.5, launch.Workers())
    found = trainer.fit(together, lambda n: own, lambda: own, config, 0.5, workers)
    for left, right in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    assert found.train_rows == expected.train_rows == 24
    assert abs(found.best.valid_auc - expected.best.valid_auc) < 1e-9
    idle = [empty_batch(WIDE)] if workers.rank else [batches[0]]
    trainer.backward(together, idle[0], 0.5, workers)
    trainer.backward(alone.train(), batches[0], 0.5, launch.Workers())
    for left, right in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-2, atol=1e-4)
    assert workers.gather([] if workers.rank else [1.0, 2.0]).tolist() == [1.0, 2.0]
    assert workers.allreduce_max(workers.rank) == 1.0
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(float(workers.rank))
    trainer.average_statistics(norm, workers, 3)
    assert (norm.running_mean.item(), norm.running_var.item()) == pytest.approx((0.5, 1.25))
    before = [p.clone() for p in together.parameters()]
    bad = Batch(**(vars(own[0]) | {"wide": own[0].wide * float("nan")})) if workers.rank else own[0]
    try:
        trainer.fit(together, lambda n: [bad], lambda: own, config, 0.5, workers)
    finally:
        assert all(torch.equal(a, b) for a, b in zip(before, together.parameters(), strict=True))


def test_two_gloo_ranks_equal_one_and_a_nan_stops_both(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rank 0: loss is not finite on rank 1"):
        launch.run(2, [sys.executable, str(Path(__file__).resolve()), str(tmp_path)], tmp_path)
    notes = [json.loads((tmp_path / f"error-{rank}.json").read_text()) for rank in range(2)]
    assert notes[0] == notes[1]


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
        "label": int(generator.random() < 1 / (1 + np.exp(-logit))),
        "history": history.astype("<i4").tobytes(),
        "negatives": generator.integers(1, 12, (length, 2)).astype("<i4").tobytes(),
        "target": target.astype("<i4").tobytes(),
        "wide": wide.astype("<f4").tobytes(),
    }


@pytest.fixture
def lake(tmp_path: Path) -> tuple[str, str]:
    """Config file and root of a lake with 900 examples in 3 files."""
    root = tmp_path / "lake"
    files: dict[str, dict[str, int]] = {split: {} for split in ("train", "valid", "test")}
    folder = root / "tables" / "training_examples"
    folder.mkdir(parents=True)
    for place in range(3):
        splits = ["train"] * (170 + 7 * place) + ["valid"] * 60 + ["test"] * 60
        rows = [make_row(1000 * place + n, split) for n, split in enumerate(splits)]
        table = pa.Table.from_pylist(rows)
        index = table.schema.get_field_index("label")
        pq.write_table(
            table.set_column(index, "label", table["label"].cast("int32")), folder / f"{place}.parquet"
        )
        for split in files:
            files[split][(folder / f"{place}.parquet").as_uri()] = splits.count(split)
    feed.write_manifest(str(root), feed.Dataset(0, "voc-1", SIZES, layouts.WIDE_FEATURES, files), "build-1")
    config = tmp_path / "test.toml"
    config.write_text(
        f"[lake]\nroot_uri = '{root}'\n"
        "[model]\nhidden_dim = 8\nhead_dims = [8]\nattention_dims = [8]\n"
        "auxiliary_dims = [8]\ndropout = 0.0\n"
        "[training]\nnum_ranks = 2\nbatch_size = 32\nmax_epochs = 3\nlearning_rate = 0.01\n"
        "start_timeout_seconds = 60\n"
        "[evaluation]\nnum_draws = 100\n"
    )
    return str(config), str(root)


def test_train_and_evaluate_jobs(lake: tuple[str, str], tmp_path: Path) -> None:
    from jobs import evaluate, train

    config, root = lake
    arguments = ["--config", config, "--dates", "2024-01-10"]
    for model in ("logistic", "dien", "blend"):
        train.app([*arguments, "--model", model], standalone_mode=False)
    evaluate.app(arguments, standalone_mode=False)
    records = {record.arguments["model"]: record for record in runs.load_all(root, "train")}
    assert set(records) == {"logistic", "dien", "blend"}
    assert records["dien"].rows == {"training_examples.train": 531, "training_examples.valid": 180}
    assert records["dien"].facts["num_ranks"] == 2
    assert len(records["dien"].facts["epochs"]) == 3
    assert registry.resolve(root, "champion") == records["logistic"].facts["model_version"]
    assert not list(Path(root, "work").iterdir())  # published runs leave nothing behind
    (evaluated,) = runs.load_all(root, "evaluate")
    record = json.loads(Path(root, "evaluations", f"{evaluated.run_id}.json").read_text())
    assert (record["num_rows"], record["split"], record["training_examples_version"]) == (180, "test", 0)
    assert set(record["models"]) == {"logistic", "dien", "blend"}
    assert min(found["metrics"]["auc"] for found in record["models"].values()) > 0.75
    assert record["gate"]["champion"] == "logistic"
    assert {found["challenger"] for found in record["comparisons"]} == {"dien", "blend"}
    assert record["training"]["dien"]["num_ranks"] == 2
    for kind in ("logistic", "dien", "blend"):
        assert record["models"][kind]["model_version"] == records[kind].facts["model_version"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch.run_rank(Path(sys.argv[1]), one_rank)
