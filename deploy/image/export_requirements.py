"""Write what an image needs into a folder: ``python deploy/image/export_requirements.py FOLDER``.

``etl.txt`` and ``gpu.txt`` are the locked packages of the two roles with their hashes, ``horovod.txt`` is
the sdist that the GPU role builds. All three are read off ``uv.lock``, so a pin stands in one place: they are
build products like the wheel, not committed, and not part of a release, since an image follows the lock and
a release the code. The scripts and the files of the build lie beside them. The folder's content decides its
name in the bucket, which is printed: the same lock gives the same name.

Spark is the image's own: pyspark and py4j are left out, and delta-spark, whose jars are the image's too, is
kept for its Python side. ``pip`` is the image's as well. pip resolves nothing (``--no-deps``): it could not
express that petastorm's bound on setuptools is overridden.
"""

import hashlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
_UV = ROOT / ".tools" / "uv" / "bin" / "uv"
#: Packages of the groups spark and train that a role does without, and with them what only they need.
PRUNED = {
    "etl": ("pyspark", "pip", "horovod", "petastorm", "gcsfs", "scikit-learn", "lightgbm"),
    "gpu": ("pyspark", "pip", "horovod"),
}
FILES = (
    "deploy/image/customize.sh",
    "deploy/image/smoke_test.py",
    "deploy/image/build.txt",
    "deploy/build/toolchain.cmake",
    "deploy/build/cxx17_after_project.cmake",
)


def exported(role: str) -> str:
    """The locked packages of a role as pip takes them, each with its hashes."""
    options = [part for name in PRUNED[role] for part in ("--prune", name)]
    command = [str(_UV), "export", "--frozen", "--no-emit-project", "--no-default-groups", "--quiet"]
    command += ["--group", "spark", "--group", "train", "--no-header", "--no-annotate", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"uv.lock: cannot be exported ({done.stderr.strip()}); run make lock and look at its errors")
    return done.stdout


def horovod() -> str:
    """The pinned sdist of Horovod with its hash."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    (package,) = [one for one in lock["package"] if one["name"] == "horovod"]
    return f"horovod=={package['version']} --hash={package['sdist']['hash']}\n"


def fingerprint(folder: Path) -> str:
    """A hash of names and bytes, under which the folder is uploaded."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def main() -> None:
    """Fill the folder anew."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for role in PRUNED:
        (folder / f"{role}.txt").write_text(exported(role), encoding="utf-8")
    (folder / "horovod.txt").write_text(horovod(), encoding="utf-8")
    for file in FILES:
        shutil.copy(ROOT / file, folder)
    print(f"{folder}: gcloud storage cp -r {folder}/* gs://CODE/image/{fingerprint(folder)}/")


if __name__ == "__main__":
    main()
