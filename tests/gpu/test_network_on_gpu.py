"""The network on a CUDA device; skipped, with a word, where there is none."""

import copy

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from couponflow.modelling import ModelConfig
from couponflow.models.batch import RANDOM_SIZES, Batch, random_batch
from couponflow.models.dien import Dien

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
    return label_loss + output.aux_sum / output.aux_count.clamp_min(1)


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
