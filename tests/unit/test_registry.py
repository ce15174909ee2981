"""The registry: immutable versions, pointers, roll-back. A bundle is a folder with a manifest here."""

import json
from pathlib import Path

import pytest

from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import storage
from couponflow.training import registry


def make_bundle(folder: Path, kind: str = "logistic", number: int = 0, text: str = "{}") -> Path:
    (folder / "members").mkdir(parents=True)
    (folder / "a.json").write_text(text)
    (folder / "members" / "b.json").write_text("b")
    version = f"{kind}-{number:012x}"
    (folder / "manifest.json").write_text(json.dumps({"model_version": version, "kind": kind}))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "lake")


def test_register_publishes_all_files_and_is_repeatable(root: str, tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "one")
    version = registry.register(root, folder, "run-1")
    assert version == "logistic-000000000000"
    local = registry.fetch(root, version, tmp_path / "copy")
    files = {p.relative_to(local).as_posix(): p.read_text() for p in local.rglob("*") if p.is_file()}
    assert files == {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }
    before = registry.pointed(root, "logistic")
    assert registry.register(root, folder, "run-2") == version
    assert registry.pointed(root, "logistic") == before


def test_the_manifest_is_created_last(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    create = storage.create

    def failing(uri: str, content: bytes, run_id: str) -> None:
        if uri.endswith("/manifest.json"):
            raise ConflictError("stop")
        written.append(uri.rpartition("/")[2])
        create(uri, content, run_id)

    folder = make_bundle(tmp_path / "one")
    monkeypatch.setattr(storage, "create", failing)
    with pytest.raises(ConflictError):
        registry.register(root, folder, "run-1")
    assert sorted(written) == ["a.json", "b.json"]
    assert registry.versions(root) == []
    with pytest.raises(DataError, match="is not in"):
        registry.resolve(root, "logistic-000000000000")
    monkeypatch.undo()
    registry.register(root, folder, "run-2")  # the leftovers of the first try are ours
    assert registry.versions(root) == ["logistic-000000000000"]


def test_a_published_file_is_never_overwritten(root: str, tmp_path: Path) -> None:
    version = registry.register(root, make_bundle(tmp_path / "one"), "run-1")
    registry.register(root, make_bundle(tmp_path / "two", text="other metrics"), "run-2")
    assert (registry.fetch(root, version, tmp_path) / "a.json").read_text() == "{}"
    half = Path(root) / "models" / "dien-000000000007"
    half.mkdir()
    (half / "a.json").write_text("of another run")
    with pytest.raises(ConflictError, match="other content"):
        registry.register(root, make_bundle(tmp_path / "three", "dien", 7), "run-3")


def test_newest_of_a_kind_champion_and_roll_back(root: str, tmp_path: Path) -> None:
    a, b, c = (
        registry.register(root, make_bundle(tmp_path / str(n), kind, n), f"run-{n}")
        for n, kind in ((9, "logistic"), (1, "logistic"), (5, "dien"))
    )
    assert registry.resolve(root, "logistic") == b  # by registration, not by name
    assert registry.resolve(root, a) == a
    with pytest.raises(DataError, match="has no champion model"):
        registry.resolve(root, "champion")
    for name in (a, "logistic", "dien"):
        registry.set_champion(root, name, "run-x", "gate")
    pointer = registry.pointed(root, "champion")
    assert pointer == {
        "model_version": c,
        "kind": "dien",
        "run_id": "run-x",
        "reason": "gate",
        "previous": [a, b],
    }
    assert registry.roll_back(root, "run-y", "worse") == b
    assert registry.roll_back(root, "run-z", "worse") == a == registry.resolve(root, "champion")
    with pytest.raises(DataError, match="no champion before"):
        registry.roll_back(root, "run-z", "worse")
    assert registry.versions(root) == sorted([a, b, c])


def test_a_pointer_moved_by_another_run_is_a_conflict(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = registry.register(root, make_bundle(tmp_path / "a", number=1), "run-1")
    b = registry.register(root, make_bundle(tmp_path / "b", number=2), "run-2")
    registry.set_champion(root, a, "run-3", "first")
    stale = Path(root, "models/champion.json").read_bytes()
    registry.set_champion(root, b, "run-4", "second")
    monkeypatch.setattr(registry, "_held", lambda uri: stale)
    with pytest.raises(ConflictError, match="changed meanwhile"):
        registry.set_champion(root, b, "run-5", "late")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_a_damaged_pointer_is_named(root: str, tmp_path: Path, content: str) -> None:
    version = registry.register(root, make_bundle(tmp_path / "one"), "run-1")
    (Path(root) / "models" / "champion.json").write_text(content)
    for call in (
        lambda: registry.resolve(root, "champion"),
        lambda: registry.set_champion(root, version, "run-2", "gate"),
        lambda: registry.roll_back(root, "run-3", "worse"),
    ):
        with pytest.raises(DataError, match=r"champion.json is no model pointer .* promote a version"):
            call()


@pytest.mark.parametrize("name", ["best", "logistic-xyz", "../champion", "logistic-00000000000g", ""])
def test_unknown_names_are_refused(root: str, name: str) -> None:
    with pytest.raises(ConfigError, match="expected champion"):
        registry.resolve(root, name)


def test_an_unfinished_folder_is_no_bundle(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished bundle"):
        registry.register(root, tmp_path, "run-1")
    (tmp_path / "manifest.json").write_text(json.dumps({"model_version": "dien-1", "kind": "dien"}))
    with pytest.raises(ConfigError, match="no model version"):
        registry.register(root, tmp_path, "run-1")
