"""The network on a CUDA device; skipped, with a word, where there is none."""

import copy

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from couponflow.modelling import ModelConfig, TrainingConfig
from couponflow.models.batch import RANDOM_SIZES, Batch, random_batch
from couponflow.models.dien import Dien
from couponflow.training import devices, steps, trainer
from couponflow.training.progress import Progress, restore, snapshot
from couponflow.training.workers import Workers

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the network ran on CPU only"
)
NUM_WIDE = 5


def network_and_batch() -> tuple[Dien, Batch]:
    torch.manual_seed(0)
    network = Dien(ModelConfig(dropout=0.0), RANDOM_SIZES, NUM_WIDE)
    return network, random_batch(torch.Generator().manual_seed(0), 64, max_length=40, num_wide=NUM_WIDE)


def loss_of(network: Dien, batch: Batch) -> torch.Tensor:
    output = network(batch)
    label_loss = binary_cross_entropy_with_logits(output.logits, batch.label)
    return label_loss + output.aux_sum / max(batch.num_pairs, 1)


def test_logits_agree_with_the_cpu() -> None:
    network, batch = network_and_batch()
    network.eval()
    other = copy.deepcopy(network).cuda()
    with torch.inference_mode():
        expected, found = network(batch).logits, other(batch.to("cuda")).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_gradients_agree_with_the_cpu() -> None:
    network, batch = network_and_batch()
    other = copy.deepcopy(network).cuda()
    loss_of(network, batch).backward()
    loss_of(other, batch.to("cuda")).backward()
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None, name
        assert two.grad is not None, name
        torch.testing.assert_close(two.grad.cpu(), one.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_mixed_precision_stays_finite() -> None:
    network, batch = network_and_batch()
    network, batch = network.cuda(), batch.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(network, batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in network.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_the_gpu_learns_as_on_the_cpu(precision: str) -> None:
    """The whole loop: batches from the host, curves and best weights back on it."""
    generator = torch.Generator().manual_seed(1)
    batches = [random_batch(generator, 64, max_length=20, num_wide=NUM_WIDE) for _ in range(4)]
    found = {}
    for device in ("cpu", "cuda"):
        network, _ = network_and_batch()
        given = {"device": device, "precision": precision, "max_epochs": 2, "patience": 2}
        config = TrainingConfig.model_validate(given)
        found[device] = trainer.fit(
            network,
            trainer.Rows(lambda epoch: batches, lambda: batches[:1]),
            config,
            steps.Objective(1.0),
            Workers(),
        )
        assert devices.of(network) == torch.device("cpu")
    tolerance = 1e-3 if precision == "fp32" else 2e-2
    for one, two in zip(found["cpu"].epochs, found["cuda"].epochs, strict=True):
        assert two.train_loss == pytest.approx(one.train_loss, abs=tolerance)
        assert two.valid_log_loss == pytest.approx(one.valid_log_loss, abs=tolerance)


def test_a_run_on_the_gpu_goes_on_where_it_stopped() -> None:
    network, batch = network_and_batch()
    network.cuda()
    optimiser = torch.optim.AdamW(network.parameters())
    steps.backward(network, batch, steps.Objective(1.0), Workers())
    optimiser.step()
    tree = snapshot(network, optimiser, Progress(step=1), Workers())
    drawn = torch.rand(3, device="cuda")
    other, _ = network_and_batch()
    other.cuda()
    resumed = restore(tree, other, torch.optim.AdamW(other.parameters()), Workers())
    assert resumed.step == 1
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
