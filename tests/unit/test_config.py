"""The config tree: layers, refusals by name, fingerprints."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from couponflow.config import Config, load_config
from couponflow.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_layers_in_order(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[sessions]\ngap_minutes = 20\n[lake]\ntime_zone = 'Asia/Tokyo'\n")
    assert load_config(None).sessions.gap_minutes == 30
    assert load_config(file).sessions.gap_minutes == 20
    config = load_config(file, ("sessions.gap_minutes=10", "lake.root_uri=gs://b/lake"))
    assert (config.sessions.gap_minutes, config.lake.root_uri) == (10, "gs://b/lake")
    assert config.lake.time_zone == "Asia/Tokyo"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sessions.gap_minute=10", "sessions.gap_minute; did you mean gap_minutes?"),
        ("session.gap_minutes=10", "unknown config name session; did you mean sessions?"),
        ("sessions.gap_minutes=0", "sessions.gap_minutes = 0"),
        ("sessions.gap_minutes=1441", "less than or equal to 1440"),
        ("sessions.gap_minutes=true", "sessions.gap_minutes = True"),
        ("sessions.gap_minutes='30'", "sessions.gap_minutes = '30'"),
        ("sessions.gap_minutes=3.5", "sessions.gap_minutes = 3.5"),
        ("lake.time_zone=Mars/Olympus", "unknown time zone"),
        ("lake.closed_days=['2017-13-01']", "lake.closed_days"),
        ("examples.valid_start='2016-01-01'", "train_start < valid_start < test_start"),
        ("sessions.gap_minutes.x=1", "is a value, not a section"),
        ("nonsense", "expected section.name=value"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path: Path, override: str, words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[sessions]\ngap_minutes = 20\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, (override,))
    assert words in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read"):
        load_config(tmp_path / "missing.toml")
    file = tmp_path / "bad.toml"
    file.write_text("[lake\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load_config(file)


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().sessions.gap_minutes = 5  # type: ignore[misc]  # the refusal is under test


def test_a_fingerprint_is_stable_and_local_to_its_sections() -> None:
    base = load_config(None)
    other = load_config(None, ("training.learning_rate=0.5",))
    assert base.fingerprint() == load_config(None).fingerprint()
    assert base.fingerprint("lake", "sessions") == other.fingerprint("lake", "sessions")
    assert base.fingerprint("training") != other.fingerprint("training")
    assert base.fingerprint() != other.fingerprint()


def test_every_field_is_described() -> None:
    bare = [
        f"{section}.{name}"
        for section in Config.model_fields
        for name, field in type(getattr(Config(), section)).model_fields.items()
        if not field.description
    ]
    assert not bare


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "env").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).lake.root_uri
