"""The loop at group size 1, and two ranks as two threads around a barrier (real Gloo ranks are in e2e)."""

import copy
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from couponflow.errors import ConfigError, DataError
from couponflow.modelling import ModelConfig, TrainingConfig
from couponflow.models.batch import RANDOM_SIZES, Batch, empty_batch, random_batch
from couponflow.models.dien import Dien
from couponflow.training import devices, metrics, steps, trainer
from couponflow.training.workers import Workers

WIDE = 5


class Output(NamedTuple):
    logits: Tensor
    aux_sum: Tensor


class Linear(nn.Module):
    """No batch statistics: splitting a batch over ranks must not change its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 3, padding_idx=0)
        self.hidden = nn.Linear(WIDE, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, batch: Batch) -> Output:
        hidden = torch.tanh(self.hidden(batch.wide))
        pairs = batch.length.clamp_min(1) - 1
        auxiliary = (hidden.pow(2).sum(1) * pairs).sum() + self.embedding.weight[1:3].sum() * 0.1 * batch.size
        return Output(self.last(hidden)[:, 0], auxiliary)


class Threads(Workers):
    """A rank of a group of threads; every exchange is a list posted by all and read by all."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, object]) -> None:
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def _all(self, value: object) -> list:
        self._board[self.rank] = value
        self._barrier.wait(timeout=20)
        found = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(timeout=20)
        return found

    def allreduce_sum(self, values):
        return np.sum(self._all(np.atleast_1d(np.asarray(values, np.float64))), axis=0)

    def gather(self, values):
        return np.concatenate(self._all(np.asarray(values, np.float64)))

    def average(self, tensor):
        return torch.stack(self._all(tensor)).mean(0)

    def broadcast_state(self, state):
        for key, value in self._all(copy.deepcopy(state))[0].items():
            state[key].copy_(value)


def run_ranks(size: int, work: Callable[[Workers], object]) -> list:
    barrier, board, results = threading.Barrier(size), {}, [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, size, barrier, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


@pytest.fixture(autouse=True)
def _one_thread() -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_batch(size: int, seed: int = 0, **over: object) -> Batch:
    return random_batch(torch.Generator().manual_seed(seed), size, num_wide=WIDE, **over)


def make_network(seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    return Linear()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def learnable(size: int, seed: int, strength: float = 3.0) -> Batch:
    batch = make_batch(size, seed)
    chance = torch.sigmoid(strength * (batch.wide[:, 0] - 1.0))
    label = (torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)) < chance).float()
    return Batch(**(vars(batch) | {"label": label}))


def split(batch: Batch, rows: int) -> list[Batch]:
    return [batch.take(list(range(n, min(n + rows, batch.size)))) for n in range(0, batch.size, rows)]


def test_two_uneven_ranks_give_the_gradient_of_one() -> None:
    batch = make_batch(13, length=[0, 1, 5, 2, 7, 0, 3, 1, 1, 1, 9, 4, 2])
    parts = [batch.take([10, 2, 4]), batch.take([n for n in range(13) if n not in (10, 2, 4)])]
    whole = make_network()
    sums = steps.backward(whole, batch, steps.Objective(0.7), Workers())
    expected = gradients(whole)
    networks = [make_network(), make_network()]  # made here: threads share torch's random state

    def work(workers: Workers) -> tuple[tuple, dict[str, Tensor]]:
        network = networks[workers.rank]
        found = steps.backward(network, parts[workers.rank], steps.Objective(0.7), workers)
        return found, gradients(network)

    results = run_ranks(2, work)
    for found, gradient in results:
        assert found[:4] == pytest.approx(sums[:4], rel=1e-5)
        for name in expected:
            torch.testing.assert_close(gradient[name], expected[name], rtol=1e-4, atol=1e-6)
    own = np.array([found[4:] for found, _ in results])  # each rank's own, which add up
    assert own[:, 1].tolist() == [3.0, 10.0]
    assert own.sum(0) == pytest.approx(sums[:2], rel=1e-5)
    assert sums[4:] == sums[:2]


def test_golden_mean_over_ranks_is_sum_over_count() -> None:
    """Losses [4] and [1, 1, 1]: 1.75, not 2.5."""
    losses = [torch.tensor([4.0]), torch.tensor([1.0, 1.0, 1.0])]

    class Fixed(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.scale, self.rank = nn.Parameter(torch.ones(())), rank

        def forward(self, batch: Batch) -> Output:
            target = losses[self.rank]  # softplus(x) = loss for label 0
            return Output(torch.log(torch.expm1(target)) * self.scale, torch.zeros(()))

    def work(workers: Workers) -> float:
        rows = losses[workers.rank].numel()
        batch = Batch(**(vars(make_batch(rows)) | {"label": torch.zeros(rows)}))
        label_sum, count, *_ = steps.backward(Fixed(workers.rank), batch, steps.Objective(0.0), workers)
        return label_sum / count

    assert run_ranks(2, work) == pytest.approx([1.75, 1.75])


@pytest.mark.parametrize("kind", ["linear", "dien", "din"])
def test_a_filler_batch_has_no_effect(kind: str) -> None:
    config = ModelConfig(
        encoder="din" if kind == "din" else "dien",
        attention_activation="dice",
        dropout=0.0,
        hidden_dim=8,
        head_dims=(6,),
        attention_dims=(6,),
        auxiliary_dims=(6,),
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make_network() if kind == "linear" else Dien(config, RANDOM_SIZES, WIDE)

    batch = make_batch(9)
    alone = build()
    steps.backward(alone.train(), batch, steps.Objective(1.0), Workers())
    networks = [build().train(), build().train()]

    def work(workers: Workers) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        network = networks[workers.rank]
        steps.backward(network, empty_batch(WIDE) if workers.rank else batch, steps.Objective(1.0), workers)
        return gradients(network), {k: v.clone() for k, v in network.state_dict().items()}

    (gradient, _), (other, idle) = run_ranks(2, work)
    for name, value in gradients(alone).items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-4, atol=1e-7)
        assert torch.equal(other[name], gradient[name])
    fresh = build().state_dict()
    assert all(torch.equal(idle[name], fresh[name]) for name in fresh)  # running statistics included


@pytest.mark.parametrize("place", ["wide", "weight"])
def test_a_value_that_is_not_finite_stops_all_ranks_before_the_step(place: str) -> None:
    good = make_batch(4)
    bad = Batch(**(vars(good) | {place: getattr(good, place).clone().fill_(float("nan"))}))
    with pytest.raises(DataError, match="not finite on rank 0"):
        steps.backward(make_network(), bad, steps.Objective(1.0), Workers())
    networks = [make_network(), make_network()]

    def work(workers: Workers) -> object:
        network = networks[workers.rank]
        before = copy.deepcopy(network.state_dict())
        with pytest.raises(DataError, match=r"not finite on rank 1 \(rows \[0, 1, 2, 3\] of 1\); no step"):
            trainer.fit(
                network,
                trainer.Rows(
                    lambda epoch: [bad if workers.rank else good],
                    lambda: [good],
                    locate=lambda rows: f"rows {rows or [0, 1, 2, 3]} of {workers.rank}",
                ),
                TrainingConfig(),
                steps.Objective(1.0),
                workers,
            )
        return all(torch.equal(before[k], v) for k, v in network.state_dict().items())

    assert run_ranks(2, work) == [True, True]


def test_two_runs_are_equal_bit_for_bit() -> None:
    config = ModelConfig(dropout=0.3, hidden_dim=8, head_dims=(8,), attention_dims=(8,), auxiliary_dims=(8,))
    data, held = split(learnable(96, 3), 16), [learnable(64, 9)]

    def once() -> trainer.Fitted:
        torch.manual_seed(5)
        network = Dien(config, RANDOM_SIZES, WIDE)
        training = TrainingConfig(max_epochs=3, patience=3)
        return trainer.fit(
            network, trainer.Rows(lambda epoch: data, lambda: held), training, steps.Objective(1.0), Workers()
        )

    one, two = once(), once()
    assert one.epochs == two.epochs
    assert all(torch.equal(one.state[name], two.state[name]) for name in one.state)


def test_mixed_precision_learns_the_same_with_weights_in_single_precision() -> None:
    config = TrainingConfig(max_epochs=6, patience=6, learning_rate=0.02)
    mixed = config.model_copy(update={"precision": "bf16"})
    data, held = split(learnable(512, 1), 64), [learnable(400, 2)]
    found = {}
    for name, one in {"fp32": config, "bf16": mixed}.items():
        network = make_network()
        found[name] = trainer.fit(
            network, trainer.Rows(lambda epoch: data, lambda: held), one, steps.Objective(1.0), Workers()
        )
        assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert found["bf16"].epochs != found["fp32"].epochs, "precision changed nothing"
    assert found["bf16"].best.valid_auc == pytest.approx(found["fp32"].best.valid_auc, abs=0.02)
    assert found["bf16"].best.valid_log_loss == pytest.approx(found["fp32"].best.valid_log_loss, abs=0.02)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"training.device = 'cuda': torch sees no CUDA device"):
        devices.chosen(TrainingConfig(device="cuda"), Workers())
    assert devices.chosen(TrainingConfig(), Workers()) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    fifth = Workers()
    fifth.local_rank = 5
    assert devices.chosen(TrainingConfig(), fifth) == torch.device("cuda", 1)
    fifth.gpu = 0  # by Spark, whose executors on one machine each count their ranks from 0
    assert devices.chosen(TrainingConfig(), fifth) == torch.device("cuda", 0)
    assert devices.chosen(TrainingConfig(device="cpu"), fifth) == torch.device("cpu")


def test_learns_planted_signal_and_finds_none_in_noise() -> None:
    def best(strength: float) -> float:
        config = TrainingConfig(max_epochs=15, patience=15, learning_rate=0.02)
        data, held = split(learnable(512, 1, strength), 64), [learnable(1000, 2, strength)]
        return trainer.fit(
            make_network(),
            trainer.Rows(lambda epoch: data, lambda: held),
            config,
            steps.Objective(0.0),
            Workers(),
        ).best.valid_auc

    assert best(3.0) > 0.85
    assert abs(best(0.0) - 0.5) < 0.06


def test_early_stop_keeps_the_earlier_of_equal_epochs() -> None:
    """A network that cannot move: every epoch ties, so the first is best and patience ends the run."""
    config = TrainingConfig(max_epochs=10, patience=2, learning_rate=1e-30)
    seen: list[int] = []

    def train(epoch: int) -> list[Batch]:
        seen.append(epoch)
        return [make_batch(8)]

    fitted = trainer.fit(
        make_network(),
        trainer.Rows(train, lambda: [make_batch(50, 2)]),
        config,
        steps.Objective(0.0),
        Workers(),
    )
    assert (fitted.best.epoch, len(fitted.epochs), seen) == (1, 3, [1, 2, 3])


def test_the_best_weights_are_left_in_the_network() -> None:
    config = TrainingConfig(max_epochs=8, patience=8, learning_rate=0.5)  # overshoots
    network, held = make_network(), [learnable(200, 2)]
    fitted = trainer.fit(
        network,
        trainer.Rows(lambda e: split(learnable(64, 1), 8), lambda: held),
        config,
        steps.Objective(0.0),
        Workers(),
    )
    logit, label = trainer.score(network, held, Workers())
    assert np.array_equal(logit, fitted.valid_logit)
    assert np.array_equal(label, fitted.valid_label)
    losses = [epoch.valid_log_loss for epoch in fitted.epochs]
    assert fitted.best.valid_log_loss == min(losses)
    assert fitted.best.epoch == 1 + losses.index(min(losses))


def test_the_shift_of_sampled_rows_enters_the_validation_loss_only() -> None:
    config = TrainingConfig(max_epochs=1)
    held = learnable(200, 3)
    plain, shifted = (
        trainer.fit(
            make_network(),
            trainer.Rows(lambda e: split(learnable(64, 1), 8), lambda: [held], valid_shift=shift),
            config,
            steps.Objective(0.0),
            Workers(),
        )
        for shift in (0.0, -1.5)
    )
    assert [e.train_loss for e in shifted.epochs] == [e.train_loss for e in plain.epochs]
    assert shifted.best.valid_auc == plain.best.valid_auc
    label = shifted.valid_label
    assert shifted.best.valid_log_loss == metrics.log_loss(shifted.valid_logit - 1.5, label)
    assert plain.best.valid_log_loss == metrics.log_loss(plain.valid_logit, label)


def test_only_the_row_without_a_finite_score_is_named() -> None:
    batch = make_batch(6)
    wide = batch.wide.clone()
    wide[4] = float("inf")
    bad = Batch(**(vars(batch) | {"wide": wide}))

    class Normed(Linear):
        """Batch statistics: one bad row spoils all rows of the step."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDE)

        def forward(self, batch: Batch) -> Output:
            return super().forward(Batch(**(vars(batch) | {"wide": self.norm(batch.wide)})))

    torch.manual_seed(0)
    network = Normed().train()
    # inf times 0 in the first layer: the row has no score; tanh would squash inf alone.
    network.hidden.weight.data[:, 0] = 0.0
    with pytest.raises(DataError, match=r"loss is not finite on rank 0 \(rows \[4\]\)"):
        steps.backward(network, bad, steps.Objective(1.0), Workers(), lambda rows: f"rows {rows}")
    assert network.training


def test_each_ranks_own_loss_is_in_the_curves() -> None:
    parts = [
        [learnable(10, 1), learnable(6, 2)],
        [learnable(30, 3), empty_batch(WIDE)],
        [empty_batch(WIDE)] * 2,
    ]
    networks = [make_network() for _ in parts]
    config = TrainingConfig(max_epochs=2, learning_rate=1e-30)

    def work(workers: Workers) -> trainer.Fitted:
        held = [learnable(20, 5)]
        data = parts[workers.rank]
        return trainer.fit(
            networks[workers.rank],
            trainer.Rows(lambda epoch: data, lambda: held),
            config,
            steps.Objective(0.0),
            workers,
        )

    def mean(batches: list[Batch]) -> float:
        logit, label = trainer.score(make_network(), batches, Workers())
        return metrics.log_loss(logit, label)

    for fitted in run_ranks(3, work):
        for epoch in fitted.epochs:
            one, two, none = epoch.train_loss_by_rank
            assert (one, two) == pytest.approx((mean(parts[0]), mean(parts[1])), rel=1e-5)
            assert none == 0.0
            assert epoch.train_loss == pytest.approx((16 * one + 30 * two) / 46, rel=1e-6)
        assert fitted.curves()[0]["train_loss_by_rank"] == fitted.epochs[0].train_loss_by_rank


@pytest.mark.parametrize(
    ("scaling", "ranks", "expected"),
    [("none", 4, 0.1), ("linear", 4, 0.4), ("sqrt", 4, 0.2), ("linear", 1, 0.1)],
)
def test_the_learning_rate_follows_the_ranks(scaling: str, ranks: int, expected: float) -> None:
    config = TrainingConfig(learning_rate=0.1, lr_scaling=scaling)
    assert trainer.learning_rate(config, ranks, 1) == pytest.approx(expected)


def test_the_learning_rate_rises_over_its_first_steps() -> None:
    config = TrainingConfig(learning_rate=0.1, warmup_steps=4, lr_scaling="linear")
    found = [trainer.learning_rate(config, 2, steps) for steps in (1, 2, 3, 4, 5, 100)]
    assert found == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert trainer.learning_rate(config, 2, 100, 0.25) == pytest.approx(0.05)


def test_plateaus_halve_the_learning_rate() -> None:
    """A network that cannot move ties in every epoch, so the first is the best."""

    def rates(plateau: int) -> list[float]:
        config = TrainingConfig(max_epochs=6, patience=9, learning_rate=1e-30, plateau_epochs=plateau)
        data = [make_batch(8)]
        fitted = trainer.fit(
            make_network(),
            trainer.Rows(lambda epoch: data, lambda: data),
            config,
            steps.Objective(0.0),
            Workers(),
        )
        return [epoch.learning_rate / 1e-30 for epoch in fitted.epochs]

    assert rates(0) == pytest.approx([1.0] * 6)
    assert rates(1) == pytest.approx([1.0, 1.0, 0.5, 0.25, 0.125, 0.0625])
    assert rates(2) == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.5, 0.25])


def test_the_rate_of_the_curve_is_the_rate_of_the_step() -> None:
    """Warm-up over the whole run moves the weights less than none."""
    data, held = split(learnable(64, 1), 16), [learnable(50, 2)]

    def moved(warmup: int) -> tuple[float, float]:
        network, start = make_network(), make_network()
        config = TrainingConfig(max_epochs=1, learning_rate=0.01, warmup_steps=warmup)
        fitted = trainer.fit(
            network, trainer.Rows(lambda epoch: data, lambda: held), config, steps.Objective(0.0), Workers()
        )
        distance = (network.last.weight - start.last.weight).abs().max().item()
        return distance, fitted.best.learning_rate

    (whole, full_rate), (part, last_rate) = moved(0), moved(8)
    assert (full_rate, last_rate) == pytest.approx((0.01, 0.005))
    assert whole == pytest.approx(0.04, rel=0.2)  # Adam: about one rate a step
    assert part == pytest.approx(0.0125, rel=0.2)


def test_half_precision_travels_and_rounds_little() -> None:
    batch = make_batch(12)
    parts = [batch.take(list(range(5))), batch.take(list(range(5, 12)))]
    whole = make_network()
    steps.backward(whole, batch, steps.Objective(0.7, is_half=True), Workers())  # one rank sends nothing
    exact = make_network()
    steps.backward(exact, batch, steps.Objective(0.7), Workers())
    assert all(torch.equal(value, gradients(exact)[name]) for name, value in gradients(whole).items())
    networks, sent = [make_network(), make_network()], []

    class Seen(Threads):
        def average(self, tensor: Tensor) -> Tensor:
            sent.append(tensor.dtype)
            return super().average(tensor)

    def work(workers: Threads) -> dict[str, Tensor]:
        workers.__class__ = Seen
        steps.backward(
            networks[workers.rank], parts[workers.rank], steps.Objective(0.7, is_half=True), workers
        )
        return gradients(networks[workers.rank])

    left, right = run_ranks(2, work)
    assert sent == [torch.float16] * 2
    for name, value in gradients(exact).items():
        assert torch.equal(left[name], right[name])
        assert left[name].dtype == torch.float32
        torch.testing.assert_close(left[name], value, rtol=2e-3, atol=2e-4)


def test_every_validation_row_counts_once_over_ranks() -> None:
    held = learnable(31, 4)
    parts = [[held.take(list(range(20))), empty_batch(WIDE)], split(held.take(list(range(20, 31))), 6)]
    network = make_network()
    found = run_ranks(2, lambda workers: trainer.score(network, parts[workers.rank], workers))
    expected = trainer.score(network, [held], Workers())
    for logit, label in found:
        np.testing.assert_allclose(logit, expected[0], rtol=1e-4)
        assert np.array_equal(label, expected[1])


def test_running_statistics_are_those_of_the_mixture() -> None:
    data = [torch.randn(900, 3) * 2 + 1, torch.randn(300, 3) - 4]

    def work(workers: Workers) -> tuple[Tensor, Tensor]:
        norm = nn.BatchNorm1d(3, momentum=None)
        norm(data[workers.rank])
        steps.average_statistics(norm, workers, len(data[workers.rank]))
        return norm.running_mean, norm.running_var

    for mean, variance in run_ranks(2, work):
        torch.testing.assert_close(mean, torch.cat(data).mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(variance, torch.cat(data).var(0), rtol=5e-3, atol=1e-3)


def test_a_rank_without_rows_does_not_dilute_the_statistics() -> None:
    def work(workers: Workers) -> tuple[Tensor, Tensor]:
        norm = nn.BatchNorm1d(1)
        if not workers.rank:
            norm.running_mean.fill_(4.0)
            norm.running_var.fill_(9.0)
        steps.average_statistics(norm, workers, 0 if workers.rank else 50)
        return norm.running_mean.item(), norm.running_var.item()

    for found in run_ranks(2, work):
        assert found == pytest.approx((4.0, 9.0))


@pytest.mark.parametrize("held", [[], [make_batch(4)]], ids=["no rows", "not finite"])
def test_validation_rows_that_cannot_be_judged_stop_the_run(held: list[Batch]) -> None:
    """The first epoch would stay the best for ever: nothing is below a loss that is not a number."""
    held = [Batch(**(vars(batch) | {"wide": batch.wide * float("nan")})) for batch in held]
    with pytest.raises(DataError, match=f"{len(held) * 4} validation rows, 0 of them"):
        trainer.fit(
            make_network(),
            trainer.Rows(lambda epoch: [make_batch(8)], lambda: held),
            TrainingConfig(),
            steps.Objective(0.0),
            Workers(),
        )


def test_only_matrices_decay() -> None:
    network = make_network()
    groups = steps.parameter_groups(network, 0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(network.hidden.weight), id(network.last.weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_no_training_rows_are_refused() -> None:
    with pytest.raises(DataError, match="none were fed"):
        trainer.fit(
            make_network(),
            trainer.Rows(lambda epoch: [empty_batch(WIDE)], lambda: [make_batch(4)]),
            TrainingConfig(),
            steps.Objective(0.0),
            Workers(),
        )
