"""Two real Horovod ranks against one, and the share of a step that waits for data.

Ranks are started by ``training.launch``, read files of ``training_examples`` through the real feed and train
the network of ``bench.peers`` with the real trainer: a batch of 1024 rows per rank, one thread per rank, the
first epoch not counted. Value of ``scaling_2_ranks``: rows per second of both ranks over those of one.
``feed_bound``: what rank 0 of two spends inside the feed, waiting for its peer's rows included.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.feed import make_files
from bench.run import Claim
from bench.widths import MODEL
from couponflow.modelling import TrainingConfig
from couponflow.models.batch import Batch, random_batch
from couponflow.models.dien import Dien
from couponflow.training import feed, launch, manifests, steps, trainer
from couponflow.training.workers import Workers

CLAIMS = ("scaling_2_ranks", "feed_bound")
ROWS, BATCH, SHUFFLE, EPOCHS, RUNS = 16_384, 1024, 4096, 3, 3
_MANIFEST_RUN = "bench"


def train_rank(folder: Path, workers: Workers) -> None:
    """Train on this rank's shard and leave its rows, seconds and seconds of waiting in ``folder``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset = manifests.load(str(folder))
    source = feed.Feed(dataset, "train", workers, BATCH * workers.size, SHUFFLE)
    spent = {"rows": 0.0, "seconds": 0.0, "waited": 0.0}

    def watched(epoch: int) -> Iterator[Batch]:
        batches = source.epoch(epoch)
        start = began = time.perf_counter()
        while (batch := next(batches, None)) is not None:
            if epoch > 1:
                spent["waited"] += time.perf_counter() - start
                spent["rows"] += batch.size
            yield batch
            start = time.perf_counter()
        if epoch > 1:
            spent["seconds"] += time.perf_counter() - began

    network = Dien(MODEL, dataset.vocabulary_sizes, len(dataset.wide_features))
    sizes = dataset.vocabulary_sizes
    valid = random_batch(torch.Generator().manual_seed(0), 32, vocabulary_sizes=sizes)
    config = TrainingConfig(max_epochs=EPOCHS, patience=EPOCHS)
    trainer.fit(
        network,
        trainer.Rows(watched, lambda: [valid]),
        config,
        steps.Objective(MODEL.auxiliary_weight),
        workers,
    )
    (folder / f"rank-{workers.rank}.json").write_text(json.dumps(spent), encoding="utf-8")


def launched(num_ranks: int, rows: int) -> tuple[float, float]:
    """Rows per second of a group, and the share of its time that rank 0 waited."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifests.write(name, make_files(rows), _MANIFEST_RUN)
        launch.run(num_ranks, [sys.executable, "-m", "bench.ranks", name], folder)
        spent = [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(num_ranks)]
    rate = sum(rank["rows"] for rank in spent) / max(rank["seconds"] for rank in spent)
    return rate, spent[0]["waited"] / spent[0]["seconds"]


def measure(names: tuple[str, ...], rows: int = ROWS) -> list[Claim]:
    """Both claims come from the same rounds: one rank, then two."""
    rounds = [(launched(1, rows), launched(2, rows)) for _ in range(RUNS)]
    scaling = statistics.median(two[0] / one[0] for one, two in rounds)
    alone = statistics.median(one[0] for one, _ in rounds)
    waiting = statistics.median(100 * two[1] for _, two in rounds)
    both = {
        "scaling_2_ranks": Claim(
            "scaling_2_ranks", scaling, "x its rows/s", 1.6, RUNS, f"one rank, {alone:,.0f} rows/s"
        ),
        "feed_bound": Claim("feed_bound", waiting, "% of a step", 10.0, RUNS, "none", "at_most"),
    }
    return [both[name] for name in names]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    launch.run_rank(root, lambda workers: train_rank(root, workers))
