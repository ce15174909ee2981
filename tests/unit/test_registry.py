"""The registry: immutable versions, pointers, roll-back, and what may not become champion.

A bundle is a folder with a manifest here, but where the check of bundles itself is tested.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from couponflow.config import Config
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import layouts, storage
from couponflow.models.bundle import Bundle, load_bundle, save_bundle
from couponflow.models.calibration import Calibrator
from couponflow.models.tabular import Logistic
from couponflow.training import manifests, registry

NUM_WIDE = len(layouts.WIDE_FEATURES)
SIZES = {"item": 50, "category": 20, "shop": 8, "event_type": 9}


def make_bundle(folder: Path, kind: str = "logistic", number: int = 0, text: str = "{}") -> Path:
    (folder / "members").mkdir(parents=True)
    (folder / "a.json").write_text(text)
    (folder / "members" / "b.json").write_text("b")
    version = f"{kind}-{number:012x}"
    (folder / "manifest.json").write_text(json.dumps({"model_version": version, "kind": kind}))
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "check_bundle", lambda root_uri, version: None)
    return str(tmp_path / "lake")


def register_real(root_uri: str, folder: Path, intercept: float, vocabulary: str = "v1") -> str:
    """A logistic bundle of its own calibrator, registered."""
    model = Logistic(np.zeros(NUM_WIDE), intercept, np.zeros(NUM_WIDE), np.ones(NUM_WIDE))
    calibrator = Calibrator("platt", 1.0, intercept / 2)
    save_bundle(Bundle(model, vocabulary, SIZES, calibrator=calibrator), folder)
    return registry.register(root_uri, folder, "run")


def write_examples(root_uri: str, vocabulary: str) -> None:
    files = {"train": {"file:///nowhere": 0}}
    dataset = manifests.Dataset(1, vocabulary, SIZES, layouts.WIDE_FEATURES, files, {"file:///nowhere": ()})
    uri = Path(manifests.write(root_uri, dataset, "r"))
    uri.unlink()  # so that the next one may have the same table version


def test_promotion_and_roll_back_move_model_calibrator_and_vocabulary_together(
    root_uri: str, tmp_path: Path
) -> None:
    old, new = (
        register_real(root_uri, tmp_path / name, intercept, vocabulary)
        for name, intercept, vocabulary in (("old", 1.0, "v1"), ("new", 2.0, "v2"))
    )

    def champion() -> tuple[float, float, str]:
        bundle = load_bundle(registry.fetch(root_uri, "champion", tmp_path), None)
        assert isinstance(bundle.model, Logistic)
        return bundle.model.intercept, bundle.calibrator.intercept, bundle.vocabulary_version

    write_examples(root_uri, "v1")
    registry.promote(root_uri, old, "r1", "first")
    assert champion() == (1.0, 0.5, "v1")
    write_examples(root_uri, "v2")
    registry.promote(root_uri, new, "r2", "better")
    assert champion() == (2.0, 1.0, "v2")
    with pytest.raises(ConfigError, match="expects vocabulary v1, table has v2; rebuild examples with v1"):
        registry.roll_back(root_uri, "r3", "worse")
    assert champion() == (2.0, 1.0, "v2")
    write_examples(root_uri, "v1")
    assert registry.roll_back(root_uri, "r4", "worse") == old
    assert champion() == (1.0, 0.5, "v1")


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap_calibrator(folder: Path) -> None:
    """Another calibrator, with its right hash in the manifest: contents and version disagree."""
    content = json.dumps(replace(Calibrator(), intercept=3.0).to_dict()).encode()
    (folder / "calibrator.json").write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files=files | {"calibrator.json": hashlib.sha256(content).hexdigest()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "calibrator.json").write_text("{}"), "differs from its SHA-256"),
        (lambda folder: (folder / "logistic.json").unlink(), "is missing"),
        (swap_calibrator, "contents are logistic-"),
        (lambda folder: edit_manifest(folder, schema_version=99), "schema version 99"),
        (lambda folder: edit_manifest(folder, wide_features=["a"]), "trained on other aggregates"),
        (
            lambda folder: edit_manifest(folder, vocabulary_version="v7"),
            "expects vocabulary v7, table has v1",
        ),
    ],
)
def test_what_cannot_be_scored_with_never_becomes_champion(
    root_uri: str, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    good, bad = (register_real(root_uri, tmp_path / str(n), float(n)) for n in (1, 2))
    write_examples(root_uri, "v1")
    registry.promote(root_uri, bad, "r0", "was good then")
    registry.promote(root_uri, good, "r1", "first")
    before = registry.pointed(root_uri, "champion")
    damage(Path(root_uri, "models", bad))
    with pytest.raises(ConfigError, match=message):
        registry.promote(root_uri, bad, "r2", "better")
    with pytest.raises(ConfigError, match=message):
        registry.roll_back(root_uri, "r3", "worse")
    assert registry.pointed(root_uri, "champion") == before


def test_a_lake_without_examples_has_no_vocabulary_to_compare(root_uri: str, tmp_path: Path) -> None:
    version = register_real(root_uri, tmp_path / "one", 1.0, "v9")
    assert registry.promote(root_uri, version, "r", "first") == version


def test_the_challenger_stands_beside_the_champion(root: str, tmp_path: Path, config: Config) -> None:
    a, b, c = (
        registry.register(root, make_bundle(tmp_path / str(n), kind, n), f"run-{n}")
        for n, kind in ((1, "logistic"), (2, "dien"), (3, "dien"))
    )
    registry.set_champion(root, a, "r", "first")
    with pytest.raises(DataError, match="has no challenger model; run the evaluate job first"):
        registry.resolve(root, "challenger")
    assert registry.roles(root) == {a: "champion"}
    registry.set_challenger(root, b, "e1", "keep_champion")
    registry.set_challenger(root, c, "e2", "promote")
    assert registry.resolve(root, "challenger") == c
    assert registry.pointed(root, "challenger") == {
        "model_version": c,
        "kind": "dien",
        "run_id": "e2",
        "reason": "promote",
        "previous": [b],
    }
    assert registry.roles(root) == {a: "champion", c: "challenger"}
    registry.promote(root, "challenger", "r2", "the gate says so")
    assert registry.roles(root) == {c: "champion"}
    assert registry.versions(root) == sorted([a, b, c])  # pointers are no versions


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
