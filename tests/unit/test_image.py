"""Images of Dataproc: what is exported for them, what customize.sh would run, what smoke_test.py finds."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from deploy_files import ROOT

IMAGE = ROOT / "deploy" / "image"
GOLDEN = ROOT / "tests" / "golden"
#: No Spark of its own: the pyspark of these tests is on the path already.
NO_SPARK = {"PATH": "/usr/bin:/bin", "SPARK_HOME": "/nonexistent"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make image-requirements` writes."""
    folder = tmp_path_factory.mktemp("image") / "image"
    command = [sys.executable, str(IMAGE / "export_requirements.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    """smoke_test.py as a module; it is a program of its own, not part of the package."""
    spec = importlib.util.spec_from_file_location("smoke_test", IMAGE / "smoke_test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements(text: str) -> dict[str, str]:
    """Name -> version; every requirement has to carry a hash."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if "--hash=sha256:" not in line] == []
    return {line.partition("==")[0]: line.partition("==")[2].split()[0] for line in lines}


def test_exported_pins_are_those_of_the_lock(exported: Path) -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {one["name"]: one["version"] for one in lock["package"]}
    for name in ("etl", "gpu", "horovod"):
        pins = requirements((exported / f"{name}.txt").read_text())
        assert pins
        assert {one: version for one, version in pins.items() if locked[one] != version} == {}


def test_each_role_gets_what_its_jobs_import_and_spark_stays_the_images(exported: Path) -> None:
    etl, gpu = (requirements((exported / f"{name}.txt").read_text()) for name in ("etl", "gpu"))
    assert {"pydantic", "typer", "pyarrow", "delta-spark", "torch", "google-cloud-storage"} <= set(etl)
    assert {"petastorm", "gcsfs", "scikit-learn", "lightgbm"} <= set(gpu)
    assert not {"petastorm", "lightgbm"} & set(etl)
    assert not {"pyspark", "py4j", "pip", "horovod", "pytest", "mypy"} & set(gpu)
    assert set(etl) < set(gpu)


def test_an_export_is_the_same_every_time(exported: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(IMAGE / "export_requirements.py"), str(tmp_path / "image")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for path in exported.iterdir():
        assert path.read_bytes() == (tmp_path / "image" / path.name).read_bytes()
    assert re.search(r"gs://CODE/image/[0-9a-f]{16}/$", told.strip())


def customize(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(IMAGE / "customize.sh"), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )


@pytest.mark.parametrize("role", ["etl", "gpu"])
def test_the_dry_run_is_the_golden_text(role: str) -> None:
    done = customize(role, "--files", "gs://couponflow-dev-code/image/0123456789abcdef", "--dry-run")
    assert done.returncode == 0, done.stderr
    file = GOLDEN / f"customize-{role}.txt"
    if os.environ.get("COUPONFLOW_GOLDEN"):
        file.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == file.read_text(encoding="utf-8"), "run `make golden` and review the difference"
    for line in done.stdout.splitlines():
        if " install " in line or " wheel " in line:
            assert "--no-deps" in line
            assert "--require-hashes" in line or "--no-index" in line


def test_the_build_has_the_switches_of_the_local_build_and_nccl() -> None:
    """pyproject.toml says how Horovod is built here; on a GPU it is the same and NCCL."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    golden = (GOLDEN / "customize-gpu.txt").read_text()
    for name, value in tool["extra-build-variables"]["horovod"].items():
        assert f" {name}={value} " in golden
    for switch in ("HOROVOD_GPU=CUDA", "HOROVOD_GPU_OPERATIONS=NCCL", "CMAKE_TOOLCHAIN_FILE="):
        assert f" {switch}" in golden
    build = requirements((IMAGE / "build.txt").read_text())
    assert int(build["cmake"].partition(".")[0]) < 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "role '': expected etl or gpu, as argument or metadata couponflow-role"),
        (["cpu"], "unknown argument cpu"),
        (
            ["etl", "--files", "/nonexistent"],
            "no /nonexistent/etl.txt; give --files, or metadata couponflow-files",
        ),
        (["gpu", "--dry-run", "--nccl"], "unknown argument --nccl"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], words: str) -> None:
    done = customize(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_gpu_role_without_a_compiler_stops_before_it_builds(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "gpu.txt").touch()
    done = customize(
        "gpu", "--files", str(tmp_path), "--python", f"{tmp_path}/python", "--cuda", str(tmp_path)
    )
    assert done.returncode == 2
    assert f"no {tmp_path}/bin/nvcc; take a base image with the CUDA toolkit" in done.stderr


def smoke_run(exported: Path, role: str, *files: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(IMAGE / "smoke_test.py"), role]
    for file in files:
        command += ["--requirements", str(exported / file)]
    return subprocess.run(command, capture_output=True, text=True, env=NO_SPARK)


def test_the_smoke_test_passes_where_the_locked_stack_is(exported: Path) -> None:
    done = smoke_run(exported, "etl", "etl.txt")
    assert done.returncode == 0, done.stderr
    for line in (
        "python 3.11.",
        "pyspark 3.5.3",
        "pyarrow 14.0.2",
        "numpy 1.26.4",
        "torch 2.13.0",
        "smoke test of etl: ",
    ):
        assert line in done.stdout


def test_a_horovod_without_nccl_is_no_gpu_image(exported: Path) -> None:
    """Of this machine everything else is right: it is the only finding."""
    done = smoke_run(exported, "gpu", "gpu.txt", "horovod.txt")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "WRONG horovod: AssertionError: built without NCCL",
        "smoke test of gpu: 1 findings; this image must not be used",
    ]
    assert "petastorm 0.12.1" in done.stdout


def test_the_smoke_test_names_what_is_not_as_pinned(smoke: ModuleType) -> None:
    wanted = smoke.pins(
        "numpy==1.26.3 \\\n    --hash=sha256:0\nno-such-package==1.0 \\\n"
        "colorama==0.4.6 ; sys_platform == 'win32' \\\nrich==15.0.0 --hash=sha256:0\n"
    )
    assert wanted == {"numpy": "1.26.3", "no-such-package": "1.0", "rich": "15.0.0"}
    assert list(smoke.installed(wanted)) == [
        "no-such-package: expected 1.0, found none",
        "numpy: expected 1.26.3, found 1.26.4",
    ]


def test_what_a_package_raises_is_a_finding(smoke: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setitem(smoke.MODULES, "etl", ("no_such_module",))
    monkeypatch.setitem(smoke.CHECKS, "etl", (smoke.check_python, broken))
    assert list(smoke.findings("etl", {})) == [
        "broken: OSError: libcudart.so.13: cannot open shared object file",
        "import no_such_module: ModuleNotFoundError: No module named 'no_such_module'",
    ]
