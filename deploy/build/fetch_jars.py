"""Put Delta and the Cloud Storage connector beside Spark's own jars, where a Dataproc image has them.

Resolved once, by the Ivy that Spark carries, into a local cache; checked by SHA-256; copied into
``pyspark/jars``. No job ever resolves a package at run time. A JVM that meets no ``gs://`` pays nothing that
could be measured for the connector on its class path.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Jar:
    """One artifact of a Maven repository and what its bytes must be."""

    group: str
    name: str
    revision: str
    sha256: str
    classifier: str = ""

    @property
    def file_name(self) -> str:
        """As the repository names it."""
        return "-".join(filter(None, [self.name, self.revision, self.classifier])) + ".jar"

    @property
    def dependency(self) -> str:
        """The line of ``ivy.xml`` that asks for it alone, without what it depends on."""
        classifier = f' m:classifier="{self.classifier}"' if self.classifier else ""
        artifact = f'<artifact name="{self.name}" type="jar" ext="jar"{classifier}/>'
        where = f'org="{self.group}" name="{self.name}" rev="{self.revision}"'
        return f'<dependency {where} conf="default->default" transitive="false">{artifact}</dependency>'


JARS = (
    Jar(
        "io.delta",
        "delta-spark_2.12",
        "3.3.2",
        "4e92085d5d794cf949c50bb665b91384857cad58680c2d0bfc9c7ad353e98e85",
    ),
    Jar(
        "io.delta",
        "delta-storage",
        "3.3.2",
        "c096975a2ca97ccc9b4005aa5cce16c9ac3903139d340da6665b66ace67d7c36",
    ),
    # Of PySpark's Hadoop 3.3.4; the 3.x of a Dataproc image needs 3.3.5.
    Jar(
        "com.google.cloud.bigdataoss",
        "gcs-connector",
        "hadoop3-2.2.26",
        "cbaa2773283c2237f933f48deb77a6f912619e367b26efe186aee74f4b35d89c",
        "shaded",
    ),
)


def main() -> None:
    """Resolve, verify and copy; a second call finds the right jars in place and resolves nothing."""
    import pyspark

    target = Path(pyspark.__file__).parent / "jars"
    lacking = tuple(jar for jar in JARS if digest(target / jar.file_name) != jar.sha256)
    if not lacking:
        return
    cache = Path(sys.argv[1]).resolve()
    reason = resolve(lacking, cache, next(target.glob("ivy-*.jar")))
    for jar in lacking:
        place(jar, cache, target, reason)


def resolve(jars: tuple[Jar, ...], cache: Path, ivy: Path) -> str:
    """Bring the jars into ``cache/jars``; returns the last words of Ivy, in case one is not there."""
    lines = [
        '<ivy-module version="2.0" xmlns:m="http://ant.apache.org/ivy/maven">',
        '<info organisation="couponflow" module="jars"/>',
        '<configurations><conf name="default"/></configurations>',
        "<dependencies>",
        *[jar.dependency for jar in jars],
        "</dependencies>",
        "</ivy-module>",
    ]
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "ivy.xml")
        wanted.write_text("\n".join(lines), encoding="utf-8")
        pattern = cache / "jars" / "[artifact]-[revision](-[classifier]).[ext]"
        command = [str(java), "-jar", str(ivy), "-cache", str(cache / "cache"), "-ivy", str(wanted)]
        done = subprocess.run([*command, "-retrieve", str(pattern)], capture_output=True, text=True)
    return (done.stdout + done.stderr)[-2000:]


def place(jar: Jar, cache: Path, target: Path, reason: str) -> None:
    """Copy one resolved jar beside Spark's, or end the process naming it."""
    found = cache / "jars" / jar.file_name
    if not found.is_file():
        sys.exit(
            f"{jar.file_name} was not resolved into {cache}; is the Maven repository reachable?\n{reason}"
        )
    if (got := digest(found)) != jar.sha256:
        sys.exit(
            f"{found}: expected sha256 {jar.sha256}, found {got}; delete {cache} and run make install again"
        )
    unfinished = target / f".{jar.file_name}"
    shutil.copyfile(found, unfinished)
    unfinished.replace(target / jar.file_name)


def digest(path: Path) -> str:
    """SHA-256 of a file; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


if __name__ == "__main__":
    main()
