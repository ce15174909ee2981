"""A Delta commit whose answer is lost counts once: the log holds our mark, so the write is a success.

The double is a log store in Java that writes the commit and then throws, once, as a store does that has
answered too late (IOException) or whose client has repeated its own request (FileAlreadyExistsException).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

JAVA = """
import java.io.IOException;
import java.nio.file.FileAlreadyExistsException;
import java.util.Iterator;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.Path;

public class ForgetfulLogStore extends io.delta.storage.HDFSLogStore {
    public static volatile int failures = 0;
    public static volatile boolean exists = false;

    public ForgetfulLogStore(Configuration conf) { super(conf); }

    @Override
    public void write(Path path, Iterator<String> actions, Boolean overwrite, Configuration conf)
            throws IOException {
        super.write(path, actions, overwrite, conf);
        if (failures > 0) {
            failures--;
            if (exists) throw new FileAlreadyExistsException(path.toString());
            throw new IOException("answer lost");
        }
    }
}
"""

CHILD = """
import sys
from datetime import date
from couponflow.dates import DateRange
from couponflow.lake import session, tables
from couponflow.sections import SparkConfig
from builders import make_event, make_frame

root, kind = sys.argv[1:]
spark = session.start(SparkConfig(), "lost-ack")
day = DateRange.day(date(2024, 1, 10))
tables.overwrite(make_frame(spark, "events", [make_event("before")]), root, "events", day, "run-1")
jvm = spark._jvm
loader = jvm.java.lang.Thread.currentThread().getContextClassLoader()
store = loader.loadClass("ForgetfulLogStore")
store.getField("exists").setBoolean(None, kind == "exists")
store.getField("failures").setInt(None, 1)
rows = [make_event(f"u{n}") for n in range(3)]
written = tables.overwrite(make_frame(spark, "events", rows), root, "events", day, "run-2")
assert store.getField("failures").getInt(None) == 0, "the double was not asked"
assert written == 3, written
found = sorted(row.user_id for row in tables.read(spark, root, "events").collect())
assert found == ["u0", "u1", "u2"], found
print("ONE COMMIT")
"""


@pytest.fixture(scope="module")
def jar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("javac") is None:
        pytest.skip("javac is missing: install a JDK (Debian: apt-get install openjdk-17-jdk-headless)")
    folder = tmp_path_factory.mktemp("logstore")
    source = folder / "ForgetfulLogStore.java"
    source.write_text(JAVA)
    jars = Path(pyspark.__file__).parent / "jars"
    needed = [next(jars.glob(f"{name}-*.jar")) for name in ("delta-storage", "hadoop-client-api")]
    subprocess.run(["javac", "-cp", os.pathsep.join(map(str, needed)), str(source)], check=True)
    archive = folder / "store.jar"
    subprocess.run(["jar", "cf", str(archive), "-C", str(folder), "ForgetfulLogStore.class"], check=True)
    return archive


@pytest.mark.parametrize("kind", ["lost", "exists"])
def test_a_commit_whose_answer_is_lost_counts_once(kind: str, jar: Path, tmp_path: Path) -> None:
    here = Path(__file__).parents[1]
    settings = f"--jars {jar} --conf spark.delta.logStore.file.impl=ForgetfulLogStore pyspark-shell"
    paths = os.pathsep.join([str(here), str(here.parent / "lib")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "lake"), kind],
        env=os.environ | {"PYSPARK_SUBMIT_ARGS": settings, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ONE COMMIT" in done.stdout
