"""Ranks as tasks of a Spark application, one on each of its slots: the other door to Horovod.

``horovod.spark.run`` asks Spark for as many tasks as there are ranks and starts a process beside each. Driver
and ranks share nothing but the lake: below one place of it ranks leave heartbeats and errors, and whoever
needs more puts it there. Horovod's own messages are pickles, signed with a key of the run, between machines
that must be in a private network.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from couponflow.errors import ConfigError, InfraError
from couponflow.training import launch, rank_errors
from couponflow.training.watchdog import LakePulse, Watch
from couponflow.training.workers import Workers, connect, launched_rank

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("couponflow")

#: Between two looks at the slots, and at the heartbeats: the latter are objects of the lake, one per rank.
_SLOT_SECONDS, _LOOK_SECONDS = 0.5, 2.0
#: A process whose main thread has ended is given so long to end.
_EXIT_SECONDS = 30.0
#: Tells the main thread that a rank hangs; nothing else here uses it.
_SIGNAL = signal.SIGUSR1


def run(
    spark: "SparkSession",
    num_ranks: int,
    target: str,
    arguments: Sequence[str],
    uri: str,
    start_timeout_seconds: int,
    stall_seconds: float = launch.STALL_SECONDS,
) -> None:
    """Call ``target``, a ``module:function``, on each rank, pass their lines on, raise what stopped them.

    ``uri`` is the place on the lake where ranks leave heartbeats and errors (``run_rank``). Only the main
    thread may call this: it is the one that gets signals, with which a rank that makes no progress for
    ``stall_seconds`` ends the wait. Spark then takes all tasks down, and with them the ranks.

    Raises:
        ConfigError: too few slots, or executors that come and go.
        ConfigError, DataError, ConflictError, InfraError: the error of the first rank that named one;
            InfraError when a rank died without a word or made no progress.
    """
    import horovod.spark

    check_slots(spark, num_ranks, start_timeout_seconds)
    rank_errors.forget(uri, num_ranks)
    watch = Watch(uri, num_ranks, start_timeout_seconds, stall_seconds)
    tail: deque[str] = deque(maxlen=20)
    lines = _Lines(tail)
    environment = {
        "HOROVOD_CYCLE_TIME": str(launch.CYCLE_MS),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(launch.patience(start_timeout_seconds, stall_seconds)),
        "OMP_NUM_THREADS": "1",  # as on one machine, so that the numbers are the same
    }
    root = logging.getLogger()
    if not root.handlers:  # Horovod logs there, which would give it one that prints our lines too
        root.addHandler(logging.NullHandler())
    packages = [name for name in map(os.path.basename, spark.sparkContext.listFiles) if name.endswith(".zip")]
    found: list[InfraError] = []
    try:
        with _watched(watch, found):
            horovod.spark.run(
                _entry(packages, target, tuple(arguments)),
                num_proc=num_ranks,
                start_timeout=start_timeout_seconds,
                use_gloo=True,
                env=environment,
                stdout=lines,
                stderr=lines,
                verbose=0,
            )
    except Exception as error:
        log.debug("ranks on Spark", exc_info=error)
        watch.refresh()
        if found:  # a rank hangs, perhaps for another that has named its error
            named = rank_errors.named(uri, num_ranks)
            ours = found[0] if named is None or isinstance(named, InfraError) else named
        else:
            words = [*tail, *filter(None, str(error).splitlines())]
            ours = rank_errors.first(uri, num_ranks, type(error).__name__, words, watch.beats())
        _end_soon(ours.exit_code)
        raise ours from error


def check_slots(spark: "SparkSession", num_ranks: int, seconds: float) -> None:
    """Wait until Spark can run all ranks at the same time: cores, and GPUs where a task asks for one.

    Raises:
        ConfigError: it cannot after ``seconds``, in which executors may come; or it may take some away again.
    """
    conf = spark.sparkContext.getConf()
    if conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise ConfigError(
            "training.launcher = 'spark' with spark.dynamicAllocation.enabled = true: the executors of ranks "
            "must stay; set it to false for this job"
        )
    context: Any = spark.sparkContext._jsc.sc()
    # What a barrier stage is checked against; there is no public way to ask.
    profile = context.resourceProfileManager().defaultResourceProfile()
    deadline = time.monotonic() + (0 if context.isLocal() else seconds)
    while (slots := int(context.maxNumConcurrentTasks(profile))) < num_ranks:
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"training.num_ranks = {num_ranks}: Spark has slots for {slots}, each of "
                f"{conf.get('spark.task.cpus', '1')} cores and "
                f"{conf.get('spark.task.resource.gpu.amount', '0')} GPUs; lower it, or give the job "
                "more executors"
            )
        time.sleep(_SLOT_SECONDS)


def run_rank(uri: str, work: Callable[[Workers], None]) -> None:
    """Run ``work`` as one rank of ``run``, whose heartbeat and error go below ``uri``."""
    from horovod.spark.task import get_available_devices

    rank = launched_rank()
    assert rank is not None  # started by Horovod
    gpus = [int(address) for address in get_available_devices() if address.isdecimal()]
    pulse = LakePulse(uri, rank)
    try:
        rank_errors.guard(uri, connect(pulse, gpus[0] if gpus else None), work)
    finally:
        pulse.close()


def _entry(packages: Sequence[str], target: str, arguments: tuple[str, ...]) -> Callable[[], None]:
    """What a rank runs first. It travels by value: only after it does a rank find this package."""
    module, _, function = target.partition(":")

    def start() -> None:
        import importlib
        import sys
        from pathlib import Path

        # Spark puts the files of the job into the executor's folder, and tells its own Python only.
        sys.path[:0] = [str(Path(name).resolve()) for name in packages if Path(name).exists()]
        importlib.import_module("couponflow.entry").set_up_logging()
        getattr(importlib.import_module(module), function)(*arguments)

    return start


class _Lines:
    """A text stream that logs whole lines, however they are cut; each rank has a thread that writes."""

    def __init__(self, tail: deque[str]) -> None:
        self._tail, self._rest = tail, threading.local()

    def write(self, text: str) -> None:
        *whole, self._rest.text = (getattr(self._rest, "text", "") + text).split("\n")
        for line in map(launch.plain, whole):
            if line.strip():
                self._tail.append(line.rstrip())
                log.info("%s", line.rstrip())

    def flush(self) -> None:
        """Nothing to do: a line is passed on when it ends."""


@contextmanager
def _watched(watch: Watch, found: list[InfraError]) -> Iterator[None]:
    """Raise in the main thread, in the midst of what it waits for, when a rank makes no progress.

    What is raised stands in ``found`` too, as it may reach the caller in another's words. Horovod then
    cancels its Spark job and closes what it has opened. It also takes SIGTERM and SIGINT, and its thread
    prints how the job ended: both are as before afterwards.
    """
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_SECONDS):
            try:
                watch.look()
            except InfraError as error:
                found.append(error)
                signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
                return

    def leave(number: int, frame: object) -> None:
        if not is_over.is_set():
            is_over.set()
            raise found[0]

    def say(arguments: threading.ExceptHookArgs) -> None:
        log.debug("a thread of Horovod ended with %s", arguments.exc_value)

    handlers = {number: signal.getsignal(number) for number in (_SIGNAL, signal.SIGTERM, signal.SIGINT)}
    hook, threading.excepthook = threading.excepthook, say
    signal.signal(_SIGNAL, leave)
    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python cannot restore


def _end_soon(code: int) -> None:
    """End this process soon after its main thread.

    Horovod's threads, for which the interpreter would wait, may wait for a machine that is gone.
    """

    def end() -> None:
        threading.main_thread().join()
        time.sleep(_EXIT_SECONDS)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()
