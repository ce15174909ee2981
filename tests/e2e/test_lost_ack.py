"""A Delta commit whose answer is lost counts once: the log holds our mark, so the write is a success."""

import os
import subprocess
import sys
from pathlib import Path

import forgetful_store
import pytest

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
    if not forgetful_store.is_possible():
        pytest.skip(forgetful_store.MISSING)
    return forgetful_store.build(tmp_path_factory.mktemp("logstore"))


@pytest.mark.parametrize("kind", ["lost", "exists"])
def test_a_commit_whose_answer_is_lost_counts_once(kind: str, jar: Path, tmp_path: Path) -> None:
    here = Path(__file__).parents[1]
    paths = os.pathsep.join([str(here), str(here.parent / "lib")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "lake"), kind],
        env=os.environ | {"PYSPARK_SUBMIT_ARGS": forgetful_store.submit_arguments(jar), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ONE COMMIT" in done.stdout
