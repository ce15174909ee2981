"""What the ranks of a training exchange: the door to a Horovod group that a launcher has started.

``Workers`` is one process' view of the group. At size 1 it does nothing and never imports Horovod, so that
training code has one form. Every method of it but ``beat`` is collective: all ranks call it, in the same
order. How ranks are started is in ``launch`` and ``spark_launch``.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from couponflow.training.watchdog import Pulse

if TYPE_CHECKING:
    from torch import Tensor

#: Waits for an exchange that is under way.
Pending = Callable[[], NDArray[np.float64]]


class Workers:
    """A group of one: every exchange returns what it was given."""

    rank = 0
    size = 1
    #: Of the ranks on this machine, or in this container of YARN.
    local_rank = 0
    #: Number of the GPU that a scheduler has given to this rank alone, if one did.
    gpu: int | None = None

    def beat(self, phase: str, epoch: int = 0, step: int = 0) -> None:
        """Tell who watches what this rank is about to do; a group of one is not watched."""

    def allreduce_sum(self, values: ArrayLike) -> NDArray[np.float64]:
        """Sum over ranks of equally long vectors, float64."""
        return np.atleast_1d(np.asarray(values, np.float64))

    def start_sum(self, name: str, values: ArrayLike) -> Pending:
        """Begin ``allreduce_sum`` and go on; the answer is there by the time that all ranks have begun it.

        A name may be under way once at a time.
        """
        found = self.allreduce_sum(values)
        return lambda: found

    def allreduce_max(self, value: float) -> float:
        """Largest value over ranks."""
        return float(value)

    def gather(self, values: ArrayLike) -> NDArray[np.float64]:
        """All ranks' vectors, of any length each, one after another by rank."""
        return np.asarray(values, np.float64)

    def average(self, tensor: "Tensor") -> "Tensor":
        """Mean over ranks of equally shaped tensors, in place."""
        return tensor

    def broadcast_state(self, state: "dict[str, Tensor]") -> None:
        """Overwrite every tensor by rank 0's, in place."""


class HorovodWorkers(Workers):
    """The group of a Horovod launcher, over Gloo."""

    def __init__(self, pulse: Pulse | None = None, gpu: int | None = None) -> None:
        """Join the group that the launcher describes; ``pulse`` is this rank's heartbeat."""
        import horovod.torch as hvd

        self._pulse, self.gpu = pulse, gpu
        hvd.init()
        self._hvd: Any = hvd
        self.rank = int(hvd.rank())
        self.size = int(hvd.size())
        self.local_rank = int(hvd.local_rank())

    def beat(self, phase: str, epoch: int = 0, step: int = 0) -> None:  # noqa: D102 - as in Workers
        if self._pulse is not None:
            self._pulse.beat(phase, epoch, step)

    def allreduce_sum(self, values: ArrayLike) -> NDArray[np.float64]:  # noqa: D102 - as in Workers
        return self._reduce(np.atleast_1d(np.asarray(values, np.float64)), self._hvd.Sum, "sum")

    def start_sum(self, name: str, values: ArrayLike) -> Pending:  # noqa: D102 - as in Workers
        return self._start(np.atleast_1d(np.asarray(values, np.float64)), self._hvd.Sum, f"sum_of_{name}")

    def allreduce_max(self, value: float) -> float:  # noqa: D102 - as in Workers
        return float(self._reduce(np.array([value], np.float64), self._hvd.Max, "max")[0])

    def gather(self, values: ArrayLike) -> NDArray[np.float64]:  # noqa: D102 - as in Workers
        import torch

        self._exchange()
        # Gloo's allgather wants a row of every rank: each sends one more than it has.
        own = torch.from_numpy(np.append(np.asarray(values, np.float64), np.nan))
        sizes = self._hvd.allgather(torch.tensor([own.numel()]), name="gather_sizes").tolist()
        parts = torch.split(self._hvd.allgather(own, name="gather"), sizes)
        return np.concatenate([part.numpy()[:-1] for part in parts])

    def average(self, tensor: "Tensor") -> "Tensor":  # noqa: D102 - as in Workers
        self._exchange()
        sent = tensor.cpu()  # Gloo knows host memory only; on the host this copies nothing
        found = self._hvd.allreduce_(sent, op=self._hvd.Average, name=f"average_{tensor.numel()}")
        return tensor.copy_(found)

    def broadcast_state(self, state: "dict[str, Tensor]") -> None:  # noqa: D102 - as in Workers
        self._exchange()
        for name, tensor in sorted(state.items()):
            tensor.copy_(self._hvd.broadcast(tensor.cpu(), root_rank=0, name=f"state_{name}"))

    def _reduce(self, values: NDArray[np.float64], operation: Any, name: str) -> NDArray[np.float64]:
        return self._start(values, operation, f"{name}_{values.size}")()

    def _start(self, values: NDArray[np.float64], operation: Any, name: str) -> Pending:
        import torch

        self._exchange()
        handle = self._hvd.allreduce_async_(torch.from_numpy(values.copy()), op=operation, name=name)
        return lambda: np.asarray(self._hvd.synchronize(handle).numpy())

    def _exchange(self) -> None:
        if self._pulse is not None:
            self._pulse.exchange()


def launched_rank() -> int | None:
    """The number that a Horovod launcher gave this process; None if none has started it."""
    rank = os.environ.get("HOROVOD_RANK")  # the launcher's own protocol, not a setting of ours
    return None if rank is None else int(rank)


def connect(pulse: Pulse | None = None, gpu: int | None = None) -> Workers:
    """The group of this process: Horovod's under its launcher, else a group of one.

    ``pulse`` is the heartbeat of a rank, begun before it meets the others.
    """
    return Workers() if launched_rank() is None else HorovodWorkers(pulse, gpu)
