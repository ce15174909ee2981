"""What a run has used, what that costs by list prices, and a limit on what it may begin.

    core_seconds    time of Spark's tasks x cores of a task, and CPU time of this process and of those it
                    waited for, such as ranks
    gpu_seconds     time of Spark's tasks x GPUs of a task
    bytes_read      what Spark's tasks read from files; bytes_written: files committed to tables
    amount          cores and GPUs at the price of the worker machine; none without a ``[cloud]``

Spark's own sums per executor are read before and after, so that nothing is added to a run. Cores that idle
while they are paid for, disks and what runs on a master are not in it: it is less than the bill. Runs side by
side in one process see one another's: ``is_shared`` says so.
"""

import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from couponflow import prices
from couponflow.clouding import CloudConfig
from couponflow.config import Config
from couponflow.lake import metering

log = logging.getLogger("couponflow")

#: Jobs that the GPU cluster runs (deploy/workflows/train.yaml).
_ON_GPU_CLUSTER = ("train", "evaluate")
_GIB = 2**30
_running: set["Meter"] = set()


@dataclass(frozen=True)
class _Totals:
    """Of this process, and of the executors that its Spark session has or had; what a task holds."""

    task_ms: int = 0
    read: int = 0
    written: int = 0
    cpu_seconds: float = 0.0
    task_cpus: float = 1.0
    task_gpus: float = 0.0


class Meter:
    """What is used between its making and ``usage``."""

    def __init__(self) -> None:
        """Begin to count."""
        self._before, self._is_shared = _totals(), bool(_running)
        for other in tuple(_running):  # runs side by side have threads of their own
            other._is_shared = True
        _running.add(self)

    def usage(self, job: str, config: Config) -> dict[str, float]:
        """What was used until now, for a run record; ends the count."""
        _running.discard(self)
        now, before = _totals(), self._before
        task_seconds = max(0, now.task_ms - before.task_ms) / 1000
        used = {
            "core_seconds": round(task_seconds * now.task_cpus + now.cpu_seconds - before.cpu_seconds, 2),
            "gpu_seconds": round(task_seconds * now.task_gpus, 2),
            "bytes_read": max(0, now.read - before.read),
            "bytes_written": now.written - before.written,
        }
        if self._is_shared:
            used["is_shared"] = 1
        if config.cloud is not None:
            used["amount"] = round(amount(used["core_seconds"], used["gpu_seconds"], job, config.cloud), 4)
        return used


def amount(core_seconds: float, gpu_seconds: float, job: str, cloud: CloudConfig) -> float:
    """What cores and GPUs of the cluster of a job cost by list prices, in the currency of the price table."""
    machine = (cloud.gpu if job in _ON_GPU_CLUSTER else cloud.etl).worker_machine
    per_core = prices.core_hour_price(machine, cloud.prices)
    per_gpu = prices.gpu_hour_price(cloud.gpu.accelerator, cloud.prices)
    return (core_seconds * per_core + gpu_seconds * per_gpu) / 3600


@contextmanager
def within_budget(job: str, dates: str, config: Config) -> Iterator[None]:
    """Stop a job before a write whose input would cost more than a run may. Without ``[cloud]`` none is.

    Raises:
        ConfigError: the estimate of what it reads, by ``cloud.core_seconds_per_gib``, is above the budget.
    """
    cloud = config.cloud
    if cloud is None:
        yield
        return
    per_byte = amount(cloud.core_seconds_per_gib / _GIB, 0.0, job, cloud)

    def refusal(size: int) -> str:
        return (
            f"{job} {dates}: would read {size / _GIB:.2f} GiB, estimated at {size * per_byte:.2f} "
            f"{cloud.prices.currency} by cloud.core_seconds_per_gib, above cloud.budget_per_run_amount = "
            f"{cloud.budget_per_run_amount:.2f}; give fewer --dates, or raise it with "
            "--set cloud.budget_per_run_amount=AMOUNT"
        )

    with metering.limited(cloud.budget_per_run_amount / per_byte, refusal):
        yield


def text(usage: dict[str, float], currency: str = "") -> str:
    """A run's usage for a table; empty for a record of older code."""
    if not usage:
        return ""
    parts = [f"{usage['core_seconds']:,.0f} core-s"]
    if usage.get("gpu_seconds"):
        parts.append(f"{usage['gpu_seconds']:,.0f} GPU-s")
    parts += [f"{usage['bytes_read'] / 1e6:,.1f} MB in", f"{usage['bytes_written'] / 1e6:,.1f} MB out"]
    if "amount" in usage:
        parts.append(f"{usage['amount']:.2f} {currency}".strip())
    return ", ".join(parts) + (" (shared)" if usage.get("is_shared") else "")


def _totals() -> _Totals:
    kinds = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    cpu = sum(kind.ru_utime + kind.ru_stime for kind in kinds)
    if (session := _session()) is None:
        return _Totals(written=metering.written(), cpu_seconds=cpu)
    from py4j.protocol import Py4JError

    try:
        context = session._jsc.sc()
        context.listenerBus().waitUntilEmpty()  # what has ended is counted
        executors = context.statusStore().executorList(False)
        summaries = [executors.apply(n) for n in range(executors.size())]
        task_ms = sum(int(one.totalDuration()) for one in summaries)
        read = sum(int(one.totalInputBytes()) for one in summaries)
        conf = session.getConf()
        cpus = float(conf.get("spark.task.cpus", "1"))
        gpus = float(conf.get("spark.task.resource.gpu.amount", "0"))
    except (Py4JError, OSError) as error:  # a JVM that has died must not hide why
        log.debug("usage: %s", error)
        return _Totals(written=metering.written(), cpu_seconds=cpu)
    return _Totals(task_ms, read, metering.written(), cpu, cpus, gpus)


def _session() -> Any:
    """The Spark context of this process; None without one. Starts and imports nothing."""
    pyspark = sys.modules.get("pyspark")
    found = pyspark.SparkContext._active_spark_context if pyspark is not None else None
    return None if found is None or found._jsc is None else found
