"""Where a network trains: the host, or one of the GPUs that the ranks of a machine share."""

import torch
from torch import Tensor, nn

from couponflow.errors import ConfigError
from couponflow.modelling import TrainingConfig
from couponflow.training.workers import Workers


def chosen(config: TrainingConfig, workers: Workers) -> torch.device:
    """The device of this rank: the GPU that a scheduler gave it, else number local rank, or the host.

    Two executors of one machine see all its GPUs, and each counts its ranks from 0: only what Spark has given
    to a task tells them apart.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "training.device = 'cuda': torch sees no CUDA device here; set it to 'auto' or 'cpu'"
        )
    if config.device == "cpu" or not has_gpu:
        return torch.device("cpu")
    number = workers.local_rank if workers.gpu is None else workers.gpu
    return torch.device("cuda", number % torch.cuda.device_count())


def of(network: nn.Module) -> torch.device:
    """The device of a network's parameters; the host for one without any."""
    first = next(network.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def random_state(network: nn.Module) -> Tensor:
    """Of the host's generator, then of the network's GPU if it has one: uint8."""
    states = [torch.get_rng_state()]
    if (device := of(network)).type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(network: nn.Module, state: Tensor) -> None:
    """Put the generators where ``random_state`` found them."""
    host, own = state.tensor_split([torch.get_rng_state().numel()])
    torch.set_rng_state(host)
    if (device := of(network)).type == "cuda":
        torch.cuda.set_rng_state(own, device)
