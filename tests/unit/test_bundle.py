import hashlib
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts
from couponflow.modelling import ModelConfig
from couponflow.models.batch import RANDOM_SIZES, random_batch
from couponflow.models.bundle import KINDS, Blend, Bundle, load_bundle, save_bundle
from couponflow.models.calibration import Calibrator
from couponflow.models.dien import Dien
from couponflow.models.tabular import Logistic, Rate, Rule, Trees
from couponflow.training import registry

NUM_WIDE = len(layouts.WIDE_FEATURES)
SMALL = ModelConfig(
    item_dim=3, category_dim=3, shop_dim=2, type_dim=1, gap_dim=1, hidden_dim=4, head_dims=(6, 4)
)
CALIBRATOR = Calibrator("platt", 0.9, -0.1)
METRICS = {"epochs": [{"epoch": 1, "train_loss": 0.3}], "valid": {"auc": 0.7}}
BATCH = random_batch(torch.Generator().manual_seed(0), 40)


def dien_bundle(seed: int = 0) -> Bundle:
    torch.manual_seed(seed)
    network = Dien(SMALL, RANDOM_SIZES, NUM_WIDE)
    network.set_wide_statistics(torch.rand(NUM_WIDE), torch.rand(NUM_WIDE) + 0.5)
    network.train()(BATCH)  # moves the running statistics
    return Bundle(network, "v1", dict(RANDOM_SIZES), calibrator=CALIBRATOR, metrics=METRICS)


def logistic_bundle() -> Bundle:
    generator = np.random.default_rng(0)
    sd = generator.random(NUM_WIDE) + 0.5
    sd[3] = 0.0
    model = Logistic(generator.normal(size=NUM_WIDE), -1.5, generator.random(NUM_WIDE), sd)
    return Bundle(model, "v1", dict(RANDOM_SIZES), calibrator=CALIBRATOR, metrics=METRICS)


def blend_bundle() -> Bundle:
    members = {"dien": dien_bundle(), "logistic": logistic_bundle()}
    return Bundle(Blend(0.25, {"dien": 0.5, "logistic": 2.0}, members), "v1", dict(RANDOM_SIZES))


def rate_bundle() -> Bundle:
    return replace(logistic_bundle(), model=Rate(-2.0, {"type_a": -1.5, "type_b": -2.5}))


def rule_bundle() -> Bundle:
    return replace(logistic_bundle(), model=Rule({"recency_days": -1 / 3, "num_redemptions": 1.0}, 0.7, -1.0))


def boosted_bundle() -> Bundle:
    """One split in the middle of the first aggregate."""
    cut = float(BATCH.wide[:, 0].median())
    model = Trees(
        -1.0, NUM_WIDE, [0], [0, 0, 0], [cut, 0.0, 0.0], [1, -1, -1], [2, -1, -1], [0, 0, 0], [0.0, -0.4, 0.6]
    )
    return replace(logistic_bundle(), model=model)


BUNDLES = {
    "dien": dien_bundle,
    "logistic": logistic_bundle,
    "blend": blend_bundle,
    "rate": rate_bundle,
    "rule": rule_bundle,
    "boosted": boosted_bundle,
}


def test_every_kind_is_under_test() -> None:
    assert set(BUNDLES) == set(KINDS) == set(registry.KINDS)


def saved(tmp_path: Path, bundle: Bundle | None = None) -> Path:
    folder = tmp_path / "bundle"
    save_bundle(bundle or dien_bundle(), folder)
    return folder


def edit_manifest(folder: Path, **over: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | over))


def plant(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and make its checksum agree, as someone with write access could."""
    (folder / name).write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files=files | {name: hashlib.sha256(content).hexdigest()})


@pytest.mark.parametrize("kind", BUNDLES)
def test_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    bundle = BUNDLES[kind]()
    loaded = load_bundle(saved(tmp_path, bundle), "v1")
    assert loaded.kind == kind
    assert loaded.model_version == bundle.model_version
    assert loaded.model_version.startswith(f"{kind}-")
    assert len(loaded.model_version) == len(kind) + 13
    assert loaded.vocabulary_sizes == RANDOM_SIZES
    assert loaded.wide_features == layouts.WIDE_FEATURES
    assert loaded.calibrator == bundle.calibrator
    assert loaded.metrics == bundle.metrics
    logits = bundle.logits(BATCH)
    assert logits.dtype == np.float64
    assert loaded.logits(BATCH).tobytes() == logits.tobytes()
    assert loaded.probabilities(logits).tolist() == bundle.calibrator.apply(logits).tolist()


@pytest.mark.parametrize("encoder", ["mean_pool", "static", "din", "gru", "gru_att", "dien"])
def test_every_encoder_travels_with_its_options(encoder: str, tmp_path: Path) -> None:
    options = {"encoder": encoder, "normalise": "sigmoid", "attention_activation": "dice", "position_dim": 2}
    config = ModelConfig.model_validate(SMALL.model_dump() | options | {"match_features": True})
    torch.manual_seed(0)
    network = Dien(config, RANDOM_SIZES, NUM_WIDE)
    network.train()(BATCH)
    bundle = Bundle(network, "v1", dict(RANDOM_SIZES))
    loaded = load_bundle(saved(tmp_path, bundle))
    assert isinstance(loaded.model, Dien)
    assert loaded.model.config == config
    assert loaded.logits(BATCH).tobytes() == bundle.logits(BATCH).tobytes()
    assert loaded.logits(BATCH, chunk_rows=7) == pytest.approx(bundle.logits(BATCH), abs=1e-6)


def test_equal_models_have_equal_names_and_other_models_others() -> None:
    bundle = dien_bundle()
    same = {dien_bundle().model_version, replace(bundle, metrics={}).model_version}
    assert same == {bundle.model_version}
    others = {
        dien_bundle(seed=1).model_version,
        replace(bundle, calibrator=Calibrator("platt", 0.9, -0.2)).model_version,
        replace(bundle, calibrator=replace(CALIBRATOR, shifts={"type_a": 0.1})).model_version,
        replace(bundle, vocabulary_version="v2").model_version,
        logistic_bundle().model_version,
        blend_bundle().model_version,
    }
    assert len(others | same) == 7


def test_a_statistic_is_part_of_the_name() -> None:
    bundle, moved = dien_bundle(), dien_bundle()
    assert isinstance(moved.model, Dien)
    moved.model.set_wide_statistics(torch.zeros(NUM_WIDE), torch.ones(NUM_WIDE))
    assert moved.model_version != bundle.model_version


def test_logistic_equals_its_formula() -> None:
    bundle = logistic_bundle()
    model = bundle.model
    assert isinstance(model, Logistic)
    for row in (0, 17):
        wide = BATCH.wide[row].tolist()
        terms = [
            weight * (value - mean) / (sd or 1.0)
            for weight, value, mean, sd in zip(model.coef, wide, model.mean, model.sd, strict=True)
        ]
        assert bundle.logits(BATCH)[row] == pytest.approx(sum(terms) - 1.5)


def test_blend_weighs_raw_logits_of_its_members() -> None:
    expected = 0.25 + 0.5 * dien_bundle().logits(BATCH) + 2.0 * logistic_bundle().logits(BATCH)
    assert blend_bundle().logits(BATCH) == pytest.approx(expected)


@pytest.mark.parametrize("kind", BUNDLES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
def test_many_targets_of_a_history_score_as_rows_of_their_own(kind: str, chunk_rows: int) -> None:
    """Some histories are asked nothing, one most often, in no order."""
    bundle, draw = BUNDLES[kind](), np.random.default_rng(0)
    of = np.concatenate([draw.integers(0, BATCH.size, 40), np.full(9, 3)])
    draw.shuffle(of)
    asked = draw.integers(0, BATCH.size, of.size)
    own = vars(BATCH.targets.take(asked))
    expected = [bundle.logits(replace(BATCH.take(of[n : n + 1]), **{
        name: tensor[n : n + 1] for name, tensor in own.items()
    }))[0] for n in range(of.size)]  # fmt: skip
    found = bundle.target_logits(BATCH, BATCH.targets.take(asked), of, chunk_rows)
    assert found == pytest.approx(expected, abs=1e-6)
    assert bundle.target_logits(BATCH, BATCH.targets.take([]), of[:0], chunk_rows).shape == (0,)


@pytest.mark.parametrize("kind", BUNDLES)
def test_logits_do_not_depend_on_chunks_order_or_mates(kind: str) -> None:
    bundle = BUNDLES[kind]()
    logits = bundle.logits(BATCH)
    assert bundle.logits(BATCH, chunk_rows=7) == pytest.approx(logits, abs=1e-6)
    order = torch.randperm(BATCH.size, generator=torch.Generator().manual_seed(1))
    assert bundle.logits(BATCH.take(order)) == pytest.approx(logits[order.numpy()], abs=1e-6)
    assert bundle.logits(BATCH.take([5])) == pytest.approx(logits[5:6], abs=1e-6)
    assert bundle.logits(BATCH.take([])).shape == (0,)
    assert logits.std() > 1e-3


def test_scoring_leaves_training_as_it_was() -> None:
    bundle = dien_bundle()
    assert isinstance(bundle.model, Dien)
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    bundle.model.train()
    first = bundle.logits(BATCH)
    assert bundle.model.training
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
    assert np.array_equal(first, bundle.logits(BATCH))  # no dropout


def test_foreign_batches_are_refused() -> None:
    with pytest.raises(DataError, match=f"expects {len(layouts.WIDE_FEATURES)} aggregates, the batch has 3"):
        logistic_bundle().logits(random_batch(torch.Generator(), 2, num_wide=3))
    large = random_batch(torch.Generator(), 9, vocabulary_sizes=RANDOM_SIZES | {"item": 5000})
    with pytest.raises(DataError, match=r"item id \d+ is beyond vocabulary v1 of model dien-.*50 ids"):
        dien_bundle().logits(large)


# -------------------------------------------------------------------------------------------------- refusals
def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    version = dien_bundle().model_version
    with pytest.raises(ConfigError) as caught:
        load_bundle(folder, "v2")
    assert str(caught.value) == (
        f"model {version} expects vocabulary v1, table has v2; rebuild examples with v1, or train again and "
        "`couponflow models promote` that model"
    )


@pytest.mark.parametrize("kind", BUNDLES)
def test_every_tampered_or_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    original = saved(tmp_path, BUNDLES[kind]())
    names = sorted(json.loads((original / "manifest.json").read_text())["files"])
    assert len(names) >= 3
    for name in names:
        for change in ("flip", "remove"):
            folder = tmp_path / "copy"
            shutil.copytree(original, folder)
            content = bytearray((folder / name).read_bytes())
            content[-1] ^= 1
            (folder / name).write_bytes(content) if change == "flip" else (folder / name).unlink()
            with pytest.raises(ConfigError, match=name):
                load_bundle(folder)
            shutil.rmtree(folder)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json does not exist"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"schema_version": 2}, "schema version 2, this code reads up to 1; install a newer couponflow"),
        ({"kind": "oracle"}, "unknown kind 'oracle'"),
        ({"kind": "logistic"}, "missing or malformed"),
        (
            {"wide_features": [*layouts.WIDE_FEATURES[:-1], "shoe_size"]},
            f"{layouts.WIDE_FEATURES[-1]}, shoe_size",
        ),
        ({"wide_features": list(reversed(layouts.WIDE_FEATURES))}, "their order"),
        ({"model_version": "dien-000000000000"}, "the manifest says dien-000000000000"),
        ({"vocabulary_sizes": RANDOM_SIZES | {"item": 51}}, "something else than this network's weights"),
        ({"schema_version": None}, "is no bundle manifest"),
        ({"files": ["network.pt"]}, r"no bundle manifest \(files\)"),
        ({"vocabulary_sizes": 3, "wide_features": None}, r"\(vocabulary_sizes, wide_features\)"),
        ({"files": {"../secret": ""}}, "outside its folder"),
        ({"files": {"/etc/hostname": ""}}, "outside its folder"),
    ],
)
def test_a_wrong_manifest_is_refused(over: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit_manifest(folder, **over)
    with pytest.raises(ConfigError, match=message):
        load_bundle(folder)


def test_a_manifest_without_its_parts_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(ConfigError, match="lacks files, kind"):
        load_bundle(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="is no bundle manifest"):
        load_bundle(folder)


class _Bomb:
    """Unpickles into a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_bomb_is_refused_and_never_runs(tmp_path: Path) -> None:
    folder, marker = saved(tmp_path), tmp_path / "marker"
    stream = io.BytesIO()
    torch.save({"item.weight": _Bomb(marker)}, stream)
    plant(folder, "network.pt", stream.getvalue())
    with pytest.raises(ConfigError, match="something else than this network's weights"):
        load_bundle(folder)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04", b"\x80\x02}q\x00."], ids=repr)
def test_a_file_that_holds_no_weights_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    plant(folder, "network.pt", content)
    with pytest.raises(ConfigError):
        load_bundle(folder)


def test_malformed_json_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, logistic_bundle())
    plant(folder, "logistic.json", b'{"coef": [1.0], "intercept": 0.0, "mean": [1.0, 2.0], "sd": [1.0]}')
    with pytest.raises(ConfigError, match="logistic: shapes"):
        load_bundle(folder)
    plant(folder, "logistic.json", b"[]")
    with pytest.raises(ConfigError, match="malformed"):
        load_bundle(folder)


def test_a_published_bundle_is_not_overwritten(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = (folder / "network.pt").read_bytes()
    with pytest.raises(ConfigError, match="already holds a bundle"):
        save_bundle(dien_bundle(seed=1), folder)
    assert (folder / "network.pt").read_bytes() == before


def test_metrics_without_a_value_become_null(tmp_path: Path) -> None:
    bundle = replace(logistic_bundle(), metrics={"auc": math.nan, "curve": [1.0, math.inf]})
    assert load_bundle(saved(tmp_path, bundle)).metrics == {"auc": None, "curve": [1.0, None]}


def test_bad_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        Logistic(np.array([math.nan]), 0.0, np.zeros(1), np.ones(1))
    with pytest.raises(ConfigError, match="weights"):
        Blend(0.0, {"dien": 1.0}, {"logistic": logistic_bundle()})
    with pytest.raises(ConfigError, match="not finite"):
        Blend(math.inf, {"logistic": 1.0}, {"logistic": logistic_bundle()})
