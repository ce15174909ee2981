"""The jars beside Spark's: pinned by SHA-256, the connector by its classifier; a changed byte is refused."""

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "build" / "fetch_jars.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_jars", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_jars"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_spark_has_every_pinned_jar(script: ModuleType) -> None:
    import pyspark

    beside = Path(pyspark.__file__).parent / "jars"
    assert {jar.file_name: script.digest(beside / jar.file_name) for jar in script.JARS} == {
        jar.file_name: jar.sha256 for jar in script.JARS
    }
    assert "gcs-connector-hadoop3-2.2.26-shaded.jar" in {jar.file_name for jar in script.JARS}


def test_what_is_in_place_is_not_resolved_again(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[object] = []
    monkeypatch.setattr(script, "resolve", lambda *arguments: resolved.append(arguments))
    script.main()
    assert resolved == []


def test_a_jar_with_one_byte_changed_is_refused_and_not_copied(script: ModuleType, tmp_path: Path) -> None:
    cache, target = tmp_path / "cache", tmp_path / "target"
    (cache / "jars").mkdir(parents=True)
    target.mkdir()
    jar = replace(script.JARS[-1], sha256=hashlib.sha256(b"bytes of a jar").hexdigest())
    with pytest.raises(SystemExit, match=r"was not resolved .*\n.*no such host"):
        script.place(jar, cache, target, "no such host")
    resolved = cache / "jars" / jar.file_name
    resolved.write_bytes(b"bytes of a jaR")
    with pytest.raises(SystemExit, match=r"expected sha256 .* delete .* run make install again"):
        script.place(jar, cache, target, "")
    assert list(target.iterdir()) == []
    resolved.write_bytes(b"bytes of a jar")
    script.place(jar, cache, target, "")
    assert [path.name for path in target.iterdir()] == [jar.file_name]
