"""A log store in Java that writes a commit of Delta and then throws, as a store whose answer is lost.

It throws an ``IOException``, as a store does that has answered too late, or a ``FileAlreadyExistsException``,
as one whose client has repeated its own request. Built with the JDK's compiler, for sessions of their own.
"""

import os
import shutil
import subprocess
from pathlib import Path

JAVA = """
import java.io.IOException;
import java.nio.file.FileAlreadyExistsException;
import java.util.Iterator;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.Path;

public class ForgetfulLogStore extends io.delta.storage.HDFSLogStore {
    public static int passes = 0;
    public static volatile int failures = 0;
    public static volatile boolean exists = false;

    static {
        String wish = System.getenv("FORGETFUL_STORE");
        if (wish != null) {
            passes = Integer.parseInt(wish.split(":")[0]);
            exists = wish.endsWith(":exists");
            failures = 1;
        }
    }

    public ForgetfulLogStore(Configuration conf) { super(conf); }

    @Override
    public void write(Path path, Iterator<String> actions, Boolean overwrite, Configuration conf)
            throws IOException {
        super.write(path, actions, overwrite, conf);
        synchronized (ForgetfulLogStore.class) {
            if (passes-- > 0 || failures <= 0) return;
            failures--;
        }
        System.err.println("answer lost: " + path);
        if (exists) throw new FileAlreadyExistsException(path.toString());
        throw new IOException("answer lost");
    }
}
"""
MISSING = "javac is missing: install a JDK (Debian: apt-get install openjdk-17-jdk-headless)"
#: ``N:lost`` or ``N:exists``: after N commits one answer is lost, by either exception.
VARIABLE = "FORGETFUL_STORE"


def is_possible() -> bool:
    """Whether there is a compiler."""
    return shutil.which("javac") is not None


def build(folder: Path) -> Path:
    """The jar."""
    import pyspark

    source = folder / "ForgetfulLogStore.java"
    source.write_text(JAVA)
    jars = Path(pyspark.__file__).parent / "jars"
    needed = [next(jars.glob(f"{name}-*.jar")) for name in ("delta-storage", "hadoop-client-api")]
    subprocess.run(["javac", "-cp", os.pathsep.join(map(str, needed)), str(source)], check=True)
    archive = folder / "store.jar"
    subprocess.run(["jar", "cf", str(archive), "-C", str(folder), "ForgetfulLogStore.class"], check=True)
    return archive


def submit_arguments(archive: Path) -> str:
    """What a session of its own needs in ``PYSPARK_SUBMIT_ARGS``."""
    return f"--jars {archive} --conf spark.delta.logStore.file.impl=ForgetfulLogStore pyspark-shell"
