"""Put the Delta jars beside Spark's own, where a Dataproc image with the DELTA component has them.

Resolved once by Spark's Ivy into a local cache, checked by SHA-256, copied into ``pyspark/jars``. No job
ever resolves a package at run time.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PINS = {
    "delta-spark_2.12-3.3.2.jar": "4e92085d5d794cf949c50bb665b91384857cad58680c2d0bfc9c7ad353e98e85",
    "delta-storage-3.3.2.jar": "c096975a2ca97ccc9b4005aa5cce16c9ac3903139d340da6665b66ace67d7c36",
}
COORDINATE = "io.delta:delta-spark_2.12:3.3.2"


def main() -> None:
    """Resolve, verify and copy; a second call finds the jars in place and returns at once."""
    import pyspark

    target = Path(pyspark.__file__).parent / "jars"
    if all((target / name).exists() for name in PINS):
        return
    cache = Path(sys.argv[1]).resolve()
    program = (
        "from pyspark.sql import SparkSession;"
        "SparkSession.builder.master('local[1]').config('spark.ui.enabled', 'false')"
        f".config('spark.jars.packages', '{COORDINATE}').config('spark.jars.ivy', r'{cache}')"
        ".getOrCreate().stop()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    for name, pin in PINS.items():
        found = next(iter(sorted((cache / "jars").glob(f"*{name}"))), None)
        if found is None:
            reason = done.stderr[-2000:]
            sys.exit(f"{name} was not resolved into {cache}; is the Maven repository reachable?\n{reason}")
        digest = hashlib.sha256(found.read_bytes()).hexdigest()
        if digest != pin:
            sys.exit(
                f"{found}: expected sha256 {pin}, found {digest}; delete {cache} and run make install again"
            )
        shutil.copyfile(found, target / name)


if __name__ == "__main__":
    main()
