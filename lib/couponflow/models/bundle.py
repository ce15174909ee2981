"""A trained model as a folder of plain files: weights, configuration, calibrator, metrics, manifest.

No pickle: networks are a ``state_dict`` read with ``weights_only=True`` after their SHA-256 has been checked,
everything else is JSON. ``manifest.json`` is written last, so a folder without it is no bundle. A blend keeps
its members as bundles of their own under ``members/<kind>``.
"""

import hashlib
import io
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts
from couponflow.modelling import ModelConfig
from couponflow.models.batch import Array, Batch, Targets, beyond_vocabulary
from couponflow.models.calibration import IDENTITY, Calibrator
from couponflow.models.dien import Dien
from couponflow.models.tabular import FORMS, Tabular

BUNDLE_SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
KINDS = (*FORMS, "dien", "blend")


@dataclass(frozen=True, eq=False)
class Blend:
    """Logistic regression on the raw logits of member bundles: ``intercept + sum weights[kind] * logit``."""

    intercept: float
    weights: Mapping[str, float]
    members: Mapping[str, "Bundle"]

    def __post_init__(self) -> None:
        if set(self.weights) != set(self.members) or not self.members:
            raise ConfigError(f"blend: weights {sorted(self.weights)}, members {sorted(self.members)}")
        if not all(math.isfinite(number) for number in (self.intercept, *self.weights.values())):
            raise ConfigError("blend: a weight is not finite; fit it again")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; members are stored as bundles."""
        weights = {kind: float(self.weights[kind]) for kind in sorted(self.weights)}
        return {"intercept": float(self.intercept), "weights": weights}


@dataclass(frozen=True, eq=False)
class Bundle:
    """One immutable model with all that is needed to score.

    ``model`` decides the ``kind``. ``metrics`` (training curves, validation figures) travels along and is no
    part of the version. ``dataclasses.replace(bundle, calibrator=...)`` gives the recalibrated model.
    """

    model: Dien | Tabular | Blend
    vocabulary_version: str
    vocabulary_sizes: dict[str, int]
    wide_features: tuple[str, ...] = layouts.WIDE_FEATURES
    calibrator: Calibrator = IDENTITY
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``dien``, ``blend``, or the kind of a model of the aggregates."""
        match self.model:
            case Dien():
                return "dien"
            case Blend():
                return "blend"
            case _:
                return self.model.kind

    @cached_property
    def model_version(self) -> str:
        """Kind and 12 hex digits of the contents: an equal model has an equal name."""
        return f"{self.kind}-{_fingerprint(self)[:12]}"

    def logits(self, batch: Batch, chunk_rows: int = 512) -> Array:
        """Raw logits, float64 [B], of each row's target for its own history; as ``target_logits``."""
        return self.target_logits(batch, batch.targets, np.arange(batch.size), chunk_rows)

    def target_logits(
        self, histories: Batch, targets: Targets, history_row: Array, chunk_rows: int = 512
    ) -> Array:
        """Raw logits, float64 [R], of target r for the history of row ``history_row[r]``, in the given order.

        A network runs in eval mode without gradients, on histories sorted by length in chunks of
        ``chunk_rows`` that are trimmed to their longest, and reads each history once for all its targets; a
        logit does not depend on the other rows.

        Raises:
            DataError: there is another number of aggregates, or ids beyond the vocabulary.
        """
        if len(history_row) == 0:
            return np.zeros(0, np.float64)
        if targets.wide.shape[1] != len(self.wide_features):
            raise DataError(
                f"model {self.model_version} expects {len(self.wide_features)} aggregates, the batch has "
                f"{targets.wide.shape[1]}; rebuild the examples"
            )
        match self.model:
            case Blend():
                parts = [
                    self.model.weights[kind]
                    * member.target_logits(histories, targets, history_row, chunk_rows)
                    for kind, member in sorted(self.model.members.items())
                ]
                return np.asarray(np.sum(parts, axis=0) + self.model.intercept)
            case Dien():
                self._check_ids(histories, targets)
                return _network_logits(self.model, histories, targets, np.asarray(history_row), chunk_rows)
            case _:
                return self.model.logits(targets)

    def probabilities(self, logits: Array, types: Array | None = None) -> Array:
        """Calibrated P(conversion given send) of raw logits; ``types`` as in ``Calibrator.apply``."""
        return self.calibrator.apply(logits, types)

    def _check_ids(self, histories: Batch, targets: Targets) -> None:
        if beyond := beyond_vocabulary(histories, self.vocabulary_sizes, targets):
            name, largest = beyond
            raise DataError(
                f"{name} id {largest} is beyond vocabulary {self.vocabulary_version} of model "
                f"{self.model_version} ({self.vocabulary_sizes[name]} ids); rebuild the examples with it"
            )


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a bundle into a folder that holds none yet; the manifest comes last.

    Raises:
        ConfigError: the folder holds a bundle already; published models are never overwritten.
    """
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{folder} already holds a bundle; name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {
        "calibrator.json": _json(bundle.calibrator.to_dict()),
        "metrics.json": _json(_without_nan(bundle.metrics)),
    }
    match bundle.model:
        case Dien():
            stream = io.BytesIO()
            torch.save(_cpu_state(bundle.model), stream)
            files["network.pt"] = stream.getvalue()
            files["model_config.json"] = _json(bundle.model.config.model_dump(mode="json"))
        case Blend():
            files["blend.json"] = _json(bundle.model.to_dict())
            for kind, member in sorted(bundle.model.members.items()):
                place = folder / "members" / kind
                save_bundle(member, place)
                for path in sorted(place.rglob("*")):
                    if path.is_file():
                        files[path.relative_to(folder).as_posix()] = path.read_bytes()
        case _:
            files[f"{bundle.kind}.json"] = _json(bundle.model.to_dict())
    for name, content in files.items():
        if not name.startswith("members/"):
            (folder / name).write_bytes(content)
    manifest = {
        "schema_version": BUNDLE_SCHEMA_VERSION,
        "kind": bundle.kind,
        "model_version": bundle.model_version,
        "vocabulary_version": bundle.vocabulary_version,
        "vocabulary_sizes": bundle.vocabulary_sizes,
        "wide_features": list(bundle.wide_features),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }
    (folder / MANIFEST).write_bytes(_json(manifest))


def load_bundle(folder: Path, vocabulary_version: str | None = None) -> Bundle:
    """Read a bundle after checking every file against the manifest.

    ``vocabulary_version`` is that of the examples to be scored; None skips the comparison.

    Raises:
        ConfigError: no manifest, a file is missing or differs from its SHA-256, a newer schema version, an
            unknown kind, other aggregates or another vocabulary than expected, or content that is not plain
            weights.
    """
    manifest = _manifest(folder)
    kind, version = manifest["kind"], manifest["model_version"]
    if kind not in KINDS:
        raise ConfigError(f"{folder}: unknown kind {kind!r}, this code reads {', '.join(KINDS)}")
    if tuple(manifest["wide_features"]) != layouts.WIDE_FEATURES:
        differ = sorted(set(manifest["wide_features"]) ^ set(layouts.WIDE_FEATURES)) or ["their order"]
        raise ConfigError(
            f"model {version} was trained on other aggregates ({', '.join(differ)}); train again"
        )
    trained_with = manifest["vocabulary_version"]
    if vocabulary_version is not None and trained_with != vocabulary_version:
        raise ConfigError(
            f"model {version} expects vocabulary {trained_with}, table has {vocabulary_version}; "
            f"rebuild examples with {trained_with}, or train again and `couponflow models promote` that model"
        )
    files = {name: _verified(folder, name, digest) for name, digest in manifest["files"].items()}
    sizes = {str(name): int(size) for name, size in manifest["vocabulary_sizes"].items()}
    try:
        bundle = Bundle(
            model=_model(folder, kind, files, sizes, len(manifest["wide_features"]), trained_with),
            vocabulary_version=trained_with,
            vocabulary_sizes=sizes,
            wide_features=tuple(manifest["wide_features"]),
            calibrator=Calibrator.from_dict(json.loads(files["calibrator.json"])),
            metrics=json.loads(files["metrics.json"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: a file of the bundle is missing or malformed ({error!r})") from error
    if bundle.model_version != version:
        raise ConfigError(f"{folder}: contents are {bundle.model_version}, the manifest says {version}")
    return bundle


def _model(
    folder: Path, kind: str, files: Mapping[str, bytes], sizes: dict[str, int], num_wide: int, vocabulary: str
) -> Dien | Tabular | Blend:
    if kind in FORMS:
        return FORMS[kind](**json.loads(files[f"{kind}.json"]))
    if kind == "blend":
        stored = json.loads(files["blend.json"])
        members = {name: load_bundle(folder / "members" / name, vocabulary) for name in stored["weights"]}
        return Blend(float(stored["intercept"]), stored["weights"], members)
    try:
        model_config = ModelConfig.model_validate_json(files["model_config.json"])
        network = Dien(model_config, sizes, num_wide)
        # The bytes passed the SHA-256 check; weights_only keeps a forged bundle from running code.
        state = torch.load(io.BytesIO(files["network.pt"]), map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (ValidationError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise ConfigError(
            f"{folder}: network.pt or model_config.json holds something else than this network's weights "
            f"({type(error).__name__}); do not use this bundle"
        ) from error
    return network.eval()


def _network_logits(
    network: Dien, histories: Batch, targets: Targets, history_row: Array, chunk_rows: int
) -> Array:
    was_training = network.training
    device = next(network.parameters()).device
    by_history = np.argsort(history_row, kind="stable")
    num_asked = np.bincount(history_row, minlength=histories.size)
    first = np.cumsum(num_asked) - num_asked
    asked_rows = np.flatnonzero(num_asked)
    shortest_first = asked_rows[np.argsort(histories.length.cpu().numpy()[asked_rows], kind="stable")]
    logits = np.empty(len(history_row), np.float64)
    network.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(shortest_first), chunk_rows):
                rows = shortest_first[start : start + chunk_rows]
                is_whole = len(rows) == histories.size and bool((np.diff(rows) == 1).all())
                read = network.read((histories if is_whole else histories.take(rows)).to(device))
                # The n-th targets of all histories of the chunk together: no history twice in a pass.
                for number in range(num_asked[rows].max()):
                    places = np.flatnonzero(num_asked[rows] > number)
                    asked = by_history[first[rows[places]] + number]
                    own = read
                    if len(places) < len(rows):
                        own = read.select(torch.from_numpy(places).to(device))
                    found = network.judge(own, targets.take(asked).to(device))
                    logits[asked] = found.double().cpu().numpy()
    finally:
        network.train(was_training)
    return logits


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: no bundle, or one that was never finished; train again")
    try:
        manifest = json.loads(path.read_bytes())
        newest = int(manifest["schema_version"])
        missing = {
            "kind",
            "model_version",
            "vocabulary_version",
            "vocabulary_sizes",
            "wide_features",
            "files",
        }
        missing -= set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no bundle manifest ({error!r})") from error
    if newest > BUNDLE_SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {newest}, this code reads up to {BUNDLE_SCHEMA_VERSION}; "
            "install a newer couponflow"
        )
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}")
    forms = {"files": dict, "vocabulary_sizes": dict, "wide_features": list}
    if wrong := [name for name, form in forms.items() if not isinstance(manifest[name], form)]:
        raise ConfigError(f"{path} is no bundle manifest ({', '.join(wrong)}); copy the bundle again")
    return dict(manifest)


def _verified(folder: Path, name: str, digest: str) -> bytes:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ConfigError(f"{folder / MANIFEST} names {name!r} outside its folder; do not use this bundle")
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing; copy the bundle again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ConfigError(f"{path} differs from its SHA-256 in the manifest; copy the bundle again")
    return content


def _fingerprint(bundle: Bundle) -> str:
    """SHA-256 over what decides a score, in one canonical order."""
    contents: dict[str, Any] = {
        "kind": bundle.kind,
        "vocabulary_version": bundle.vocabulary_version,
        "vocabulary_sizes": bundle.vocabulary_sizes,
        "wide_features": list(bundle.wide_features),
        "calibrator": bundle.calibrator.to_dict(),
    }
    match bundle.model:
        case Dien():
            contents["config"] = bundle.model.config.model_dump(mode="json")
            contents["weights"] = {
                name: [str(tensor.dtype), list(tensor.shape), _digest(tensor)]
                for name, tensor in _cpu_state(bundle.model).items()
            }
        case Blend():
            members = bundle.model.members.items()
            contents["blend"] = bundle.model.to_dict()
            contents["members"] = {kind: member.model_version for kind, member in members}
        case _:
            contents[bundle.kind] = bundle.model.to_dict()
    return hashlib.sha256(_json(contents)).hexdigest()


def _cpu_state(network: Dien) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(network.state_dict().items())}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode()


def _without_nan(value: Any) -> Any:
    """Metrics without a value (one class only, say) are null: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {str(name): _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
