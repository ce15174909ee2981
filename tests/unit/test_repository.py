"""Facts about the tree that a reader relies on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("lib", "jobs", "bench", "deploy") for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_git_does_not_ignore_the_package() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "check-ignore", "lib/couponflow/config.py"], cwd=ROOT, capture_output=True)
    assert done.returncode == 1


def test_jobs_are_thin() -> None:
    long = {
        path.name: n
        for path in (ROOT / "jobs").glob("*.py")
        if (n := len(path.read_text().splitlines())) > 60
    }
    assert not long, long


def test_modules_have_one_reason_to_change() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 500
    }
    assert not long, long


def test_every_suppression_carries_a_reason() -> None:
    bare = re.compile(r"# (?:type: ignore\S*|noqa\S*(?: [A-Z]+\d+)*)\s*$")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bare.search(line)
    ]
    assert not wrong, wrong


def test_nothing_is_left_unfinished() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    wrong = [str(path.relative_to(ROOT)) for path in SOURCES if words.search(path.read_text())]
    assert not wrong, wrong


def test_no_unsafe_loading() -> None:
    unsafe = re.compile(r"weights_only ?= ?False|pickle\.loads?\(|cloudpickle|\beval\(|shell ?= ?True")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unsafe.search(line) and "network.eval(" not in line and ".eval()" not in line
    ]
    assert not wrong, wrong


def test_every_pin_in_the_lock_is_hashed() -> None:
    lock = (ROOT / "uv.lock").read_text()
    assert lock.count('hash = "sha256:') > 500


def test_missing_prerequisites_are_named_with_the_debian_command() -> None:
    script = ROOT / "deploy" / "build" / "prerequisites.sh"
    environment = {"PATH": "/usr/bin:/bin", "JAVA_HOME": "/nonexistent"}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "missing: a JDK 17 (found: none)" in done.stderr
    assert "apt-get install openjdk-17-jdk-headless" in done.stderr


def test_plain_make_lists_the_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for target in ("run", "test", "check", "fmt", "bench", "clean", "install", "demo"):
        assert f"make {target} " in done.stdout


def test_every_pin_carries_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    group = text[text.index("spark = [") : text.index("dev = [")]
    pins = [line for line in group.splitlines() if line.strip().startswith('"')]
    assert pins
    assert [line for line in pins if "#" not in line] == []
