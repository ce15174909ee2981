"""A run that is stopped anywhere and started again ends as one that never stopped, bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_trainer import WIDE, learnable, run_ranks, split
from torch import nn

from couponflow.errors import DataError
from couponflow.modelling import ModelConfig, TrainingConfig
from couponflow.models.batch import RANDOM_SIZES, Batch, empty_batch
from couponflow.models.dien import Dien
from couponflow.training import progress, steps, trainer
from couponflow.training.checkpoints import Identity, Store
from couponflow.training.workers import Workers

MODEL = ModelConfig(dropout=0.3, hidden_dim=6, head_dims=(6,), attention_dims=(6,), auxiliary_dims=(6,))
#: Every rule whose state a checkpoint has to hold: dropout, running statistics, warm-up, plateaus, patience.
CONFIG = TrainingConfig(
    max_epochs=3, patience=3, learning_rate=0.05, warmup_steps=4, plateau_epochs=1, checkpoint_steps=2
)
DATA = [split(learnable(24, 3), 8), split(learnable(15, 7), 5)]
HELD = [[learnable(40, 9)], [learnable(20, 11)]]


class StoppedError(BaseException):
    """What kills a process: nothing that it held in memory is left."""


def make_network(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(5)
    return Dien(MODEL.model_copy(update={"dropout": dropout}), RANDOM_SIZES, WIDE)


def order(epoch: int, batches: list[Batch]) -> list[Batch]:
    """Another order each epoch, the same each time."""
    places = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist()
    return [batches[place] for place in places]


def run(
    store: Store | None,
    workers: Workers,
    network: nn.Module,
    report: Callable[[str, int, int], None] = lambda phase, epoch, step: None,
    config: TrainingConfig = CONFIG,
) -> trainer.Fitted:
    data, held = DATA[workers.rank], HELD[workers.rank]
    resumed = store.load() if store else None
    return trainer.fit(
        network,
        trainer.Rows(lambda epoch: order(epoch, data), lambda: held),
        config,
        steps.Objective(1.0),
        workers,
        store,
        resumed,
        report,
    )


def make_store(folder: Path, num_ranks: int = 1) -> Store:
    return Store(str(folder), Identity("settings", "data", num_ranks))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def places() -> list[tuple[str, int, int]]:
    """Every place of an uninterrupted run at which it reports."""
    torch.set_num_threads(1)
    seen: list[tuple[str, int, int]] = []
    run(None, Workers(), make_network(), lambda *place: seen.append(place))
    return seen


def assert_same(left: trainer.Fitted, right: trainer.Fitted) -> None:
    assert left.epochs == right.epochs
    assert left.best == right.best
    assert left.train_rows == right.train_rows
    assert left.valid_logit.tobytes() == right.valid_logit.tobytes()
    assert left.valid_label.tobytes() == right.valid_label.tobytes()
    assert all(torch.equal(left.state[name], right.state[name]) for name in left.state)


def test_stopped_at_every_place_and_resumed(tmp_path: Path, places: list[tuple[str, int, int]]) -> None:
    whole = run(None, Workers(), make_network())
    assert len(whole.epochs) == 3
    assert len({epoch.learning_rate for epoch in whole.epochs}) > 1
    checkpoints = [("checkpoint", 1, 2), ("checkpoint", 2, 2), ("checkpoint", 2, 0), ("checkpoint", 4, 0)]
    stops = list(dict.fromkeys([*places, *checkpoints]))
    assert len(stops) > 25
    for number, stop in enumerate(stops):
        store = make_store(tmp_path / str(number))

        def report(*place: object, stop: object = stop) -> None:
            if place == stop:
                raise StoppedError

        with pytest.raises(StoppedError):
            run(store, Workers(), make_network(), report)
        torch.manual_seed(number)  # a new process knows nothing of the old one's random state
        assert_same(run(store, Workers(), make_network()), whole)


def test_stopped_at_each_step_of_one_run(tmp_path: Path) -> None:
    """Each life of the process gets a checkpoint further; progress is never lost twice."""
    whole = run(None, Workers(), make_network())
    store, lives = make_store(tmp_path), 0
    while True:
        taken = 0

        def report(phase: str, epoch: int, step: int) -> None:
            nonlocal taken
            taken += phase == "step"
            if taken > 2:
                raise StoppedError

        lives += 1
        try:
            found = run(store, Workers(), make_network(), report)
            break
        except StoppedError:
            continue
    assert lives > 3
    assert_same(found, whole)


def test_a_run_that_died_after_its_last_epoch_trains_no_more(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    whole = run(store, Workers(), make_network())

    def never(phase: str, epoch: int, step: int) -> None:
        raise AssertionError((phase, epoch, step))

    assert_same(run(store, Workers(), make_network(), never), whole)


@pytest.mark.parametrize("stop", [("load", 1, 0), ("step", 1, 3), ("step", 2, 1), ("checkpoint", 2, 2)])
def test_two_ranks_resume_with_what_is_their_own(tmp_path: Path, stop: tuple[str, int, int]) -> None:
    """Running statistics differ between ranks inside an epoch. No dropout: threads share a random state."""

    def group(store: Store | None, stopped: bool) -> list:
        networks = [make_network(0.0), make_network(0.0)]

        def work(workers: Workers) -> trainer.Fitted:
            def report(*place: object) -> None:
                if stopped and place == stop:
                    workers._barrier.abort()
                    raise RuntimeError("stopped")

            return run(store, workers, networks[workers.rank], report)

        return run_ranks(2, work)

    whole = group(None, False)
    store = make_store(tmp_path, 2)
    assert all(isinstance(found, Exception) for found in group(store, True))
    for left, right in zip(group(store, False), whole, strict=True):
        assert isinstance(left, trainer.Fitted), left
        assert_same(left, right)


def test_a_ranks_random_state_comes_back_to_it(tmp_path: Path) -> None:
    network = make_network()
    optimiser = torch.optim.AdamW(network.parameters())
    torch.manual_seed(77)
    tree = progress.snapshot(network, optimiser, progress.Progress(), Workers())
    expected = torch.rand(3)
    torch.manual_seed(1)
    progress.restore(tree, network, optimiser, Workers())
    assert torch.equal(torch.rand(3), expected)


def test_ranks_that_stand_on_different_checkpoints_are_stopped() -> None:
    networks = [make_network(), make_network()]

    def work(workers: Workers) -> object:
        network = networks[workers.rank]
        optimiser = torch.optim.AdamW(network.parameters())
        tree = progress.snapshot(network, optimiser, progress.Progress(), workers)
        state = copy.deepcopy(tree["network"])
        if workers.rank:
            state[next(name for name, _ in network.named_parameters())] += 1.0
        return progress.restore(tree | {"network": state}, network, optimiser, workers)

    for found in run_ranks(2, work):
        assert isinstance(found, DataError)
        assert "ranks resume from different checkpoints" in str(found)


@pytest.mark.parametrize("damage", ["other network", "missing", "no tensor"])
def test_a_state_of_another_network_is_refused(damage: str) -> None:
    network = make_network()
    optimiser = torch.optim.AdamW(network.parameters())
    tree = progress.snapshot(network, optimiser, progress.Progress(), Workers())
    match damage:
        case "other network":
            tree["network"] = {"weight": torch.zeros(1)}
        case "missing":
            del tree["best"]
        case _:
            tree["ranks"] = 5
    with pytest.raises(DataError, match=r"of another network or of other code .* --from-scratch"):
        progress.restore(tree, network, optimiser, Workers())


def test_checkpoints_at_the_ends_of_epochs_only(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    config = CONFIG.model_copy(update={"checkpoint_steps": 0, "max_epochs": 2})
    run(make_store(tmp_path), Workers(), make_network(), lambda *place: seen.append(place), config)
    assert [place for place in seen if place[0] == "checkpoint"] == [
        ("checkpoint", 2, 0),
        ("checkpoint", 3, 0),
    ]


def test_a_rank_without_rows_resumes_too(tmp_path: Path) -> None:
    data = {0: DATA[0], 1: [empty_batch(WIDE)] * len(DATA[0])}

    def group(store: Store) -> list:
        networks = [make_network(0.0), make_network(0.0)]

        def work(workers: Workers) -> trainer.Fitted:
            batches = data[workers.rank]
            rows = trainer.Rows(lambda n: batches, lambda: HELD[0])
            network = networks[workers.rank]
            return trainer.fit(network, rows, CONFIG, steps.Objective(1.0), workers, store, store.load())

        return run_ranks(2, work)

    store = make_store(tmp_path, 2)
    first = group(store)
    again = group(store)
    for found in (*first, *again):
        for name in [name for name in found.state if name.endswith("num_batches_tracked")]:
            del found.state[name]  # a rank without rows has seen none; nothing reads it
    for left, right in zip(again, first, strict=True):
        assert_same(left, right)
