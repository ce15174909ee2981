"""Checkpoints: the newest good one or a refusal, never half of one, and no pickle runs."""

import errno
import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from couponflow.errors import ConfigError, DataError, InfraError
from couponflow.lake import storage
from couponflow.training.checkpoints import Identity, Store

OURS = Identity("settings-1", "training_examples-v3-abc", 2)


def make_store(folder: Path, **over: object) -> Store:
    return Store(str(folder / "checkpoints"), Identity(**(vars(OURS) | over)))


def tree(number: int) -> dict[str, object]:
    return {"number": number, "weights": torch.arange(500) + number}


def number(store: Store, said: list[str] | None = None) -> object:
    found = store.load((said if said is not None else []).append)
    return None if found is None else found["number"]


def contents(folder: Path) -> list[Path]:
    """The content files, oldest first."""
    return sorted((folder / "checkpoints").glob("*.pt"))


def manifests(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*.json"))


def filled(folder: Path, many: int = 2) -> Store:
    store = make_store(folder)
    for n in range(1, many + 1):
        store.save(1, n, tree(n))
    return store


def test_the_newest_of_the_last_two_is_read(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.load() is None
    for epoch, step in ((1, 9), (2, 0), (2, 10), (2, 100), (10, 0)):
        store.save(epoch, step, tree(epoch * 1000 + step))
        assert number(store) == epoch * 1000 + step
    assert [path.name[:15] for path in contents(tmp_path)] == ["00002-000000100", "00010-000000000"]
    assert len(manifests(tmp_path)) == 2
    found = store.load()
    assert found is not None
    assert torch.equal(found["weights"], tree(10_000)["weights"])


def test_writing_the_same_state_again_is_no_conflict(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.save(1, 2, tree(2))
    assert number(store) == 2
    assert len(contents(tmp_path)) == 2


@pytest.mark.parametrize("many", [0, 1, 2])
def test_a_writer_killed_midway_leaves_the_ones_before(tmp_path: Path, many: int) -> None:
    store = filled(tmp_path, many)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(2, 0, tree(99), killed)
    assert len(contents(tmp_path)) == many + 1
    assert number(store) == (many or None)
    store.save(2, 0, tree(99))  # the rerun comes to the same point
    assert number(store) == 99


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    match kind:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "empty":
            path.write_bytes(b"")
        case _:
            path.unlink()


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "lost"])
def test_damaged_content_falls_back_to_the_one_before(tmp_path: Path, kind: str) -> None:
    store = filled(tmp_path)
    damage(contents(tmp_path)[-1], kind)
    said: list[str] = []
    assert number(store, said) == 1
    (line,) = said
    assert line.startswith(f"checkpoint {store.uri}/00001-000000002-")
    assert ("its content is lost" if kind == "lost" else "its content is damaged") in line
    assert line.endswith("trying the one before it")
    damage(contents(tmp_path)[0], kind)
    with pytest.raises(DataError, match=r"none of the 2 checkpoints in .* pass --from-scratch") as caught:
        store.load(said.append)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 1}'])
def test_a_damaged_manifest_falls_back(tmp_path: Path, text: str) -> None:
    store = filled(tmp_path)
    manifests(tmp_path)[-1].write_text(text)
    said: list[str] = []
    assert number(store, said) == 1
    assert "its manifest is damaged" in said[0]


@pytest.mark.parametrize("over", [{"settings": "settings-2"}, {"data": "training_examples-v4-abc"}])
def test_a_foreign_checkpoint_is_not_ours(tmp_path: Path, over: dict[str, object]) -> None:
    filled(tmp_path, 1)
    make_store(tmp_path, **over).save(5, 0, tree(50))
    said: list[str] = []
    assert number(make_store(tmp_path), said) == 1
    assert "it belongs to other settings or another dataset" in said[0]
    with pytest.raises(DataError, match="none of the 2"):
        make_store(tmp_path, settings="a third").load(said.append)


def test_other_ranks_are_refused_with_the_way_on(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError, match=r"is of 2 ranks and this run has 3: set training.num_ranks = 2 to"):
        make_store(tmp_path, num_ranks=3).load()


def test_other_code_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path)
    path = manifests(tmp_path)[-1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    said: list[str] = []
    assert number(store, said) == 1
    assert "written by other code (schema 99, expected 1)" in said[0]


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def hostile(marker: Path, kind: str) -> bytes:
    if kind == "plain":
        return pickle.dumps(Evil(marker))
    stream = io.BytesIO()
    torch.save({"number": Evil(marker)}, stream)
    if kind == "torch":
        return stream.getvalue()
    whole = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stream.getvalue())) as source, zipfile.ZipFile(whole, "w") as target:
        for name in source.namelist():
            target.writestr(
                name, pickle.dumps(Evil(marker)) if name.endswith("data.pkl") else source.read(name)
            )
    return whole.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "torch", "replaced"])
def test_a_malicious_pickle_never_runs(tmp_path: Path, kind: str) -> None:
    """Even with a manifest that vouches for it."""
    marker = tmp_path / "ran"
    store = filled(tmp_path)
    content = hostile(marker, kind)
    contents(tmp_path)[-1].write_bytes(content)
    path = manifests(tmp_path)[-1]
    vouched = {"sha256": storage.sha256(content), "bytes": len(content)}
    path.write_text(json.dumps(json.loads(path.read_text()) | vouched))
    said: list[str] = []
    assert number(store, said) == 1
    assert "something else than values and tensors" in said[0]
    assert not marker.exists()
    if kind == "plain":  # the fixture is a live one
        pickle.loads(content)
        assert marker.exists()


def test_a_full_disk_is_named_and_leaves_the_ones_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(InfraError, match=r"\.pt: \d+ bytes cannot be written \(No space left on device\)"):
        store.save(3, 0, tree(3))
    monkeypatch.undo()
    assert number(store) == 2
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_clearing_leaves_nothing_behind(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (tmp_path / "checkpoints" / ".half").write_bytes(b"what a killed writer left")
    (tmp_path / "checkpoints" / "00009-000000000-x.pt").write_bytes(b"content without manifest")
    store.clear()
    assert list(tmp_path.iterdir()) == []
    store.clear()
    assert store.load() is None
