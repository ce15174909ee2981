"""Does this interpreter hold the pinned stack? ``smoke_test.py etl|gpu --requirements FILE [...]``.

Prints every version it asks for and ends with 1 and a line per finding where one is not as pinned, does not
import, or cannot do its part. The last step of ``customize.sh``; it needs nothing of couponflow and no GPU.
"""

import argparse
import importlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

SPARK = "3.5.3"  # of Dataproc image 2.3
_ETL_MODULES = (
    *("pydantic", "typer", "rich", "yaml", "google.cloud.storage", "google.cloud.bigquery"),
    *("numpy", "pandas", "pyarrow", "delta", "torch"),
)
_TRAIN_MODULES = ("petastorm", "gcsfs", "sklearn", "lightgbm", "horovod.torch")
MODULES = {"etl": _ETL_MODULES, "gpu": (*_ETL_MODULES, *_TRAIN_MODULES)}
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(?:;([^\\]*))?")


def pins(text: str) -> dict[str, str]:
    """Name -> version of the packages that a requirements file asks for on this machine."""
    from packaging.markers import Marker

    found = {}
    for line in text.splitlines():
        if (match := _PIN.match(line)) and (match[3] is None or Marker(match[3].strip()).evaluate()):
            found[match[1]] = match[2]
    return found


def installed(wanted: dict[str, str]) -> Iterator[str]:
    """What is not installed as pinned."""
    for name, version in sorted(wanted.items()):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield f"{name}: expected {version}, found none"
            continue
        print(f"{name} {found}")
        if found.partition("+")[0] != version:
            yield f"{name}: expected {version}, found {found}"


def check_python() -> None:
    """3.11, which petastorm and the image's Spark agree on."""
    print(f"python {sys.version.split()[0]}")
    assert sys.version_info[:2] == (3, 11), f"expected Python 3.11, found {sys.version.split()[0]}"


def check_spark() -> None:
    """The image's Spark, which is on nobody's path outside a Spark job."""
    home = Path(os.environ.get("SPARK_HOME", "/usr/lib/spark")) / "python"
    if home.is_dir():
        sys.path[:0] = [str(home), *map(str, home.glob("lib/py4j-*.zip"))]
    import pyspark

    print(f"pyspark {pyspark.__version__}")
    assert pyspark.__version__ == SPARK, f"expected Spark {SPARK}, found {pyspark.__version__}"


def check_pyarrow() -> None:
    """Older ones run code out of a file (CVE-2023-47248)."""
    import pyarrow

    assert tuple(map(int, pyarrow.__version__.split(".")[:3])) >= (14, 0, 1), "older than 14.0.1"


def check_torch() -> None:
    """A product, and loading without unpickling of objects."""
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs visible")
    assert float(torch.ones(3) @ torch.ones(3)) == 3.0
    with tempfile.TemporaryFile() as file:
        torch.save({"weight": torch.ones(2)}, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["weight"].sum() == 2.0


def check_petastorm() -> None:
    """Every row of a small data set is read once: 0.13.1 loses some, pyarrow 15 lacks what it reads with."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from petastorm import make_batch_reader

    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table({"row": list(range(60))}), f"{folder}/a.parquet", row_group_size=10)
        reader = make_batch_reader(
            f"file://{folder}", num_epochs=1, reader_pool_type="thread", workers_count=2
        )
        with reader:
            rows = sorted(int(row) for batch in reader for row in batch.row)
    assert rows == list(range(60)), f"wrote 60 rows, read {len(rows)}"


def check_horovod() -> None:
    """Built with Gloo, and with NCCL for GPUs."""
    import horovod.torch as hvd

    print(f"horovod: Gloo {bool(hvd.gloo_built())}, NCCL {bool(hvd.nccl_built())}")
    assert hvd.gloo_built(), "built without Gloo"
    assert hvd.nccl_built(), "built without NCCL"


CHECKS: dict[str, tuple[Callable[[], None], ...]] = {
    "etl": (check_python, check_spark, check_pyarrow, check_torch),
    "gpu": (check_python, check_spark, check_pyarrow, check_torch, check_petastorm, check_horovod),
}


def findings(role: str, wanted: dict[str, str]) -> Iterator[str]:
    """Everything that is wrong, in the order in which it is looked at."""
    yield from installed(wanted)
    for check in CHECKS[role][:2]:  # Spark comes onto the path before anything imports it
        yield from _outcome(check.__name__.removeprefix("check_"), check)
    for module in MODULES[role]:
        yield from _outcome(f"import {module}", partial(importlib.import_module, module))
    for check in CHECKS[role][2:]:
        yield from _outcome(check.__name__.removeprefix("check_"), check)


def _outcome(name: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except (
        Exception
    ) as error:  # whatever a foreign package raises is a finding, and the next check still runs
        yield f"{name}: {type(error).__name__}: {error}"


def main() -> None:
    """Look at everything, then say what is wrong."""
    parser = argparse.ArgumentParser(description="Does this interpreter hold the pinned stack?")
    parser.add_argument("role", choices=sorted(CHECKS))
    parser.add_argument("--requirements", action="append", type=Path, required=True)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # of foreign packages about one another
    wanted: dict[str, str] = {}
    for file in chosen.requirements:
        wanted |= pins(file.read_text(encoding="utf-8"))
    if not wanted:
        sys.exit(f"smoke test of {chosen.role}: no pin in {chosen.requirements}; export them anew")
    wrong = list(findings(chosen.role, wanted))
    for one in wrong:
        print(f"WRONG {one}", file=sys.stderr)
    if wrong:
        sys.exit(f"smoke test of {chosen.role}: {len(wrong)} findings; this image must not be used")
    print(
        f"smoke test of {chosen.role}: {len(wanted)} packages as pinned, {len(MODULES[chosen.role])} imports"
    )


if __name__ == "__main__":
    main()
