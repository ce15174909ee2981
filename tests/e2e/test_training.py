"""Training on two real Gloo ranks, and the jobs train and evaluate on a small dataset with planted signal.

Run as a script, this file is one rank of the first test.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_lake import make_lake, make_row

from couponflow.errors import DataError
from couponflow.lake import layouts, runs
from couponflow.modelling import TrainingConfig
from couponflow.models.batch import Batch, empty_batch, random_batch
from couponflow.models.bundle import load_bundle
from couponflow.models.calibration import fit_platt
from couponflow.models.tabular import CAMPAIGN_TYPES
from couponflow.training import calibrators, feed, fitting, launch, manifests, registry, steps, trainer
from couponflow.training.checkpoints import Identity, Store
from couponflow.training.workers import Workers

WIDE = 4


class Output(NamedTuple):
    logits: Tensor
    aux_sum: Tensor


class Plain(nn.Module):
    """Without batch statistics, so that one rank and two must agree."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.last = nn.Linear(WIDE, 6), nn.Linear(6, 1)

    def forward(self, batch: Batch) -> Output:
        hidden = torch.tanh(self.hidden(batch.wide))
        pairs = (batch.length - 1).clamp_min(0).float()
        return Output(self.last(hidden)[:, 0], (hidden.pow(2).sum(1) * pairs).sum())


class Poisoned(Plain):
    """No score for the row whose first aggregate is this."""

    def __init__(self, poison: float, num_wide: int) -> None:
        super().__init__()
        self.hidden, self.poison = nn.Linear(num_wide, 6), poison

    def forward(self, batch: Batch) -> Output:
        found = super().forward(batch)
        bad = batch.wide[:, 0] == self.poison
        return Output(torch.where(bad, torch.full_like(found.logits, torch.nan), found.logits), *found[1:])


#: A row of the second file, whose one row group is the second rank's.
POISON = 1033


def one_rank(workers: Workers, root: str) -> None:
    """Same gradients as one rank, a rank without data, uneven gathers, then a NaN on rank 1 only."""
    batches = [random_batch(torch.Generator().manual_seed(n), 8, num_wide=WIDE) for n in range(3)]
    own = [b.take([0, 1, 2] if workers.rank == 0 else [3, 4, 5, 6, 7]) for b in batches]
    config = TrainingConfig(max_epochs=2, patience=2, learning_rate=0.05)
    alone, together = Plain(), Plain()
    steps.backward(alone, batches[0], steps.Objective(0.5), Workers())
    steps.backward(together, own[0], steps.Objective(0.5), workers)
    for left, right in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)
    expected = trainer.fit(
        alone,
        trainer.Rows(lambda n: batches, lambda: batches),
        config,
        steps.Objective(0.5),
        Workers(),
    )
    found = trainer.fit(
        together, trainer.Rows(lambda n: own, lambda: own), config, steps.Objective(0.5), workers
    )
    for left, right in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    assert found.train_rows == expected.train_rows == 24
    assert abs(found.best.valid_auc - expected.best.valid_auc) < 1e-9
    idle = [empty_batch(WIDE)] if workers.rank else [batches[0]]
    steps.backward(together, idle[0], steps.Objective(0.5), workers)
    steps.backward(alone.train(), batches[0], steps.Objective(0.5), Workers())
    for left, right in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-2, atol=1e-4)
    assert workers.gather([] if workers.rank else [1.0, 2.0]).tolist() == [1.0, 2.0]
    assert workers.allreduce_max(workers.rank) == 1.0
    under_way = [workers.start_sum(name, [workers.rank, len(name)]) for name in ("a", "bc")]
    assert [pending().tolist() for pending in reversed(under_way)] == [[1.0, 4.0], [1.0, 2.0]]
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(float(workers.rank))
    steps.average_statistics(norm, workers, 3)
    assert (norm.running_mean.item(), norm.running_var.item()) == pytest.approx((0.5, 1.25))
    exact = [p.grad.clone() for p in together.parameters()]
    steps.backward(together, idle[0], steps.Objective(0.5, is_half=True), workers)
    for left, right in zip(exact, together.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left, rtol=2e-3, atol=2e-4)
        assert not torch.equal(right.grad, left)
    opened = feed.Feed(manifests.load(root), "train", workers, 64, 1000, 1)
    row = make_row(POISON, "train")
    network = Poisoned(float(np.frombuffer(row["wide"], "<f4")[0]), len(layouts.WIDE_FEATURES))
    seen: list[int] = []
    store = Store(f"{root}/work/checkpoints-test", Identity("s", "d", 2))
    config = TrainingConfig(checkpoint_steps=1)
    try:
        trainer.fit(
            network,
            trainer.Rows(opened.epoch, lambda: own, locate=opened.locate),
            config,
            steps.Objective(0.5),
            workers,
            store,
            report=lambda phase, epoch, step: seen.append(step),
        )
    finally:
        Path(root, f"steps-{workers.rank}").write_text(str(max(seen)))


def test_two_gloo_ranks_equal_one_and_a_nan_stops_both(lake: tuple[str, str], tmp_path: Path) -> None:
    """Both stop at the same step, name the row, and leave what they had learnt before it."""
    _, root = lake
    file = f"{Path(root, 'tables/training_examples/1.parquet').as_uri()}"
    place = rf"^rank 0: loss is not finite on rank 1 \(row 33 of row group 0 of {file}\); no step was taken"
    with pytest.raises(DataError, match=place) as caught:
        launch.run(2, [sys.executable, str(Path(__file__).resolve()), str(tmp_path), root], tmp_path)
    assert caught.value.exit_code == 3
    notes = [json.loads((tmp_path / f"error-{rank}.json").read_text()) for rank in range(2)]
    assert notes[0]["message"] == notes[1]["message"]
    steps = [int(Path(root, f"steps-{rank}").read_text()) for rank in range(2)]
    assert steps[0] == steps[1] > 1
    kept = Store(f"{root}/work/checkpoints-test", Identity("s", "d", 2)).load()
    assert kept is not None
    assert (kept["epoch"], kept["step"]) == (1, steps[0] - 1)
    assert all(bool(torch.isfinite(value).all()) for value in kept["network"].values())


@pytest.fixture
def lake(tmp_path: Path) -> tuple[str, str]:
    """Config file and root of a lake with 900 examples in 3 files."""
    return make_lake(tmp_path)


def check_segments(root: str, version: str) -> None:
    """Types met their own logits though two ranks scored them: the fit of one process is the same."""
    bundle = load_bundle(Path(root, "models", version))
    rows = feed.read_all(manifests.load(root), "valid")
    logit, types = fitting.score_rows(bundle, rows), calibrators.row_types(rows)
    again = fit_platt(logit, np.array([row.label for row in rows]), types=types)
    assert set(bundle.calibrator.segments) == set(CAMPAIGN_TYPES)
    for name, pair in again.segments.items():
        assert bundle.calibrator.segments[name] == pytest.approx(pair, abs=1e-3)


def test_train_and_evaluate_jobs(lake: tuple[str, str], tmp_path: Path) -> None:
    from jobs import evaluate, train

    config, root = lake
    arguments = ["--config", config, "--dates", "2024-01-10", "--set", "calibration.by=campaign_type"]
    for model in ("logistic", "dien", "blend", "rate", "rule", "boosted"):
        train.app([*arguments, "--model", model], standalone_mode=False)
    evaluate.app(arguments, standalone_mode=False)
    records = {record.arguments["model"]: record for record in runs.load_all(root, "train")}
    assert set(records) == set(registry.KINDS)
    assert records["dien"].rows == {"training_examples.train": 531, "training_examples.valid": 180}
    assert records["dien"].facts["num_ranks"] == 2
    assert len(records["dien"].facts["epochs"]) == 3
    assert registry.resolve(root, "champion") == records["logistic"].facts["model_version"]
    assert not list(Path(root, "work").iterdir())  # published runs leave nothing behind
    (evaluated,) = runs.load_all(root, "evaluate")
    record = json.loads(Path(root, "evaluations", f"{evaluated.run_id}.json").read_text())
    assert (record["num_rows"], record["split"], record["training_examples_version"]) == (180, "test", 0)
    assert set(record["models"]) == set(record["calibration"]) == set(registry.KINDS)
    auc = {name: found["metrics"]["auc"] for name, found in record["models"].items()}
    assert min(auc[name] for name in ("logistic", "dien", "blend", "boosted")) > 0.7
    assert max(auc["rate"], auc["rule"]) < 0.7  # the label depends on neither
    assert record["gate"]["champion"] == "logistic"
    assert {found["challenger"] for found in record["comparisons"]} == set(registry.KINDS) - {"logistic"}
    assert sum(part["num_rows"] for part in record["gate"]["cutoffs"]) == 180
    assert set(record["models"]["dien"]["segments"]) == {"user", "campaign_type", "category", "activity"}
    decision = json.loads(Path(root, "decisions", f"{evaluated.run_id}.json").read_text())
    assert decision["reasons"] == record["gate"]["reasons"]
    assert decision["data"]["training_examples_version"] == 0
    assert registry.resolve(root, "challenger") == decision["challenger"]["model_version"]
    assert record["training"]["dien"]["num_ranks"] == 2
    check_segments(root, registry.resolve(root, "dien"))
    for kind in registry.KINDS:
        assert record["models"][kind]["model_version"] == records[kind].facts["model_version"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch.run_rank(Path(sys.argv[1]), lambda workers: one_rank(workers, sys.argv[2]))
