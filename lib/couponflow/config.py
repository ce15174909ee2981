"""Every knob of couponflow, as one frozen tree read from TOML.

Three layers, in order: defaults, the file, ``--set a.b=value``. Unknown names, loose types and values out
of range are refused by name. What differs between two dates of a backfill is an argument, never config.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from couponflow.campaigning import ExportConfig, ScoringConfig, SelectionConfig
from couponflow.clouding import CloudConfig
from couponflow.errors import ConfigError
from couponflow.mappings import FeedsConfig
from couponflow.modelling import BoostingConfig, CalibrationConfig, ModelConfig, TrainingConfig
from couponflow.sections import (
    ConversionsConfig,
    EvaluationConfig,
    EventsConfig,
    ExamplesConfig,
    LakeConfig,
    MaintenanceConfig,
    MonitoringConfig,
    RunConfig,
    SessionsConfig,
    SourceConfig,
    SparkConfig,
    VocabularyConfig,
)
from couponflow.values import Section
from couponflow.world import WorldConfig


class Config(Section):
    """The whole tree."""

    lake: LakeConfig = LakeConfig()
    source: SourceConfig = SourceConfig()
    world: WorldConfig = WorldConfig()
    events: EventsConfig = EventsConfig()
    feeds: FeedsConfig = FeedsConfig()
    sessions: SessionsConfig = SessionsConfig()
    conversions: ConversionsConfig = ConversionsConfig()
    vocabulary: VocabularyConfig = VocabularyConfig()
    examples: ExamplesConfig = ExamplesConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    boosting: BoostingConfig = BoostingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    scoring: ScoringConfig = ScoringConfig()
    selection: SelectionConfig = SelectionConfig()
    export: ExportConfig = ExportConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    maintenance: MaintenanceConfig = MaintenanceConfig()
    run: RunConfig = RunConfig()
    spark: SparkConfig = SparkConfig()
    cloud: CloudConfig | None = None  # of a deployed environment only

    def fingerprint(self, *names: str) -> str:
        """Hash the named sections or values only, so that a new learning rate leaves sessions fresh."""
        return fingerprint_of(self.model_dump(mode="json"), *names)


def fingerprint_of(tree: dict[str, Any], *names: str) -> str:
    """``Config.fingerprint`` of a tree that a run record has kept; a name that it lacks counts as null."""
    chosen = {name: reduce(_below, name.split("."), tree) for name in names or sorted(tree)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _below(tree: Any, name: str) -> Any:
    return tree.get(name) if isinstance(tree, dict) else None


def load_config(path: str | Path | None, overrides: tuple[str, ...] = ()) -> Config:
    """Read defaults < file < ``a.b=value`` overrides into one frozen tree.

    Raises:
        ConfigError: unreadable file, bad TOML, unknown name, wrong type or value out of range; the message
            names the file, the dotted name and the nearest valid name.
    """
    where = str(path) if path else "defaults"
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"config file {path}: cannot be read ({error.strerror}); give --config an existing file"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {path}: not valid TOML ({error}); correct that line") from error
    for text in overrides:
        _apply_override(tree, text)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(explained(problem, where) for problem in error.errors())) from error


def _apply_override(tree: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {text!r}: expected section.name=value, such as sessions.gap_minutes=20")
    try:
        parsed: Any = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    if _declared(name.split(".")) is str and not isinstance(parsed, str):
        parsed = value  # so is the 18 of run.campaign_id=18
    *parents, leaf = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {text!r}: {parent} is a value, not a section; check the dotted name")
    tree[leaf] = parsed


def explained(problem: Any, where: str, below: tuple[str, ...] = ()) -> str:
    """One of pydantic's findings as a sentence; ``below`` is where in the tree its location begins."""
    location = (*below, *(str(part) for part in problem["loc"]))
    name = ".".join(location) or "the tree"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _names(_declared(location[:-1])), n=1)
        near = near or [
            f"{s}.{location[-1]}" for s in Config.model_fields if location[-1] in _names(_declared([s]))
        ]
        hint = f"did you mean {near[0]}?" if near else "remove it"
        return f"{where}: unknown config name {name}; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {name} is missing; set it"
    return f"{where}: {name} = {problem['input']!r}: {problem['msg']}; correct the value"


def _declared(location: Sequence[str]) -> Any:
    """The declared type at a dotted name (of one element, where it is a tuple); None where there is none."""
    found: Any = Config
    for part in location:
        if part.isdigit():
            continue
        field = getattr(found, "model_fields", {}).get(part)
        found = field.annotation if field else None
        # Of a tuple its element, of an optional section the section.
        found = get_args(found)[0] if get_origin(found) in (tuple, UnionType) else found
    return found


def _names(declared: Any) -> list[str]:
    return list(getattr(declared, "model_fields", {}))
