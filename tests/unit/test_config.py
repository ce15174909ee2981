"""The config tree: layers, refusals by name, fingerprints."""

from datetime import date
from pathlib import Path

import pytest
from pydantic import ValidationError

from couponflow.campaigning import ScoringConfig
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
        ("run.run_date=0", "run.run_date = 0"),  # no seconds since 1970
        ("run.run_date='86400'", "expected a calendar day"),
        ("run.run_date=2017-10-30T00:00:00", "run.run_date = datetime"),
        ("run.last_date=9999-12-31", "run.last_date"),
        ("lake.closed_days=[86400]", "lake.closed_days.0"),
        ("lake.closed_days=2017-12-25", "lake.closed_days"),
        ("model.attention_dims=[true]", "model.attention_dims.0 = True"),
        ("model.attention_dims=[0]", "greater than or equal to 1"),
        ("selection.budget_amount=inf", "finite"),
        ("selection.control_share=nan", "selection.control_share"),
        ("selection.budget_amount=true", "selection.budget_amount = True"),
        ("events.quarantine_rules=[{reasn='a', where='b'}]", "rules.0.reasn; did you mean reason?"),
        (
            "selection.coupons=[{coupon_id='a', discount_amount=1.0, margin_amount=-1.0}]",
            "0.margin_amount = -1.0",
        ),
        (
            "selection.coupons=[{coupon_id='a', discount=1.0}]",
            "unknown config name selection.coupons.0.discount;",
        ),
        (
            "selection.coupons=[{coupon_id='a', discount_amount=1.0}, {coupon_id='a', discount_amount=2.0}]",
            "each coupon_id and each segment name may stand once",
        ),
        (
            "selection.segments=[{name='a', where='true', min_recipients=2, max_recipients=1}]",
            "min_recipients <= max_recipients must hold",
        ),
        ("gap_minutes=10", "did you mean sessions.gap_minutes?"),
        ("run.campaign_id=", "run.campaign_id = ''"),
        ("run.campaign_id=a/../b", "run.campaign_id"),
        ("lake.root_uri=", "expected a folder or gs://bucket/prefix"),  # else the root of the disk
        ("lake.root_uri=s3://bucket/lake", "expected a folder or gs://bucket/prefix"),
        ("lake.root_uri=gs://", "expected a folder or gs://bucket/prefix"),
        ("export.target_uri=~/out", "expected a folder or gs://bucket/prefix"),
        ("sessions.gap_minutes.x=1", "is a value, not a section"),
        ("nonsense", "expected section.name=value"),
        ("cloud.project=p", "cloud.region is missing; set it"),
        ("cloud.projct=p", "unknown config name cloud.projct; did you mean project?"),
        ("cloud.etl.zne=a", "unknown config name cloud.etl.zne; did you mean zone?"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path: Path, override: str, words: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[sessions]\ngap_minutes = 20\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, (override,))
    assert words in str(caught.value)


def test_overrides_need_no_quotes() -> None:
    overrides = (
        "run.campaign_id=18",
        "run.run_date=2017-10-31",
        "lake.root_uri=var/lake.v2=x",
        "events.key_version=2.0",
    )
    config = load_config(None, (*overrides, "lake.closed_days=[2017-12-25, '2017-12-26']"))
    assert (config.run.campaign_id, config.run.run_date) == ("18", date(2017, 10, 31))
    assert (config.lake.root_uri, config.events.key_version) == ("var/lake.v2=x", "2.0")
    assert config.lake.closed_days == (date(2017, 12, 25), date(2017, 12, 26))
    assert Config.model_validate_json(config.model_dump_json()) == config  # as the ranks read it


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
    assert base.fingerprint("training.num_ranks") == other.fingerprint("training.num_ranks")
    assert base.fingerprint("training.learning_rate") != other.fingerprint("training.learning_rate")


def test_every_field_is_described() -> None:
    deployed = load_config(ROOT / "deploy" / "env" / "dev.toml")  # has the sections that defaults lack
    bare = [
        f"{section}.{name}"
        for section in Config.model_fields
        for name, field in type(getattr(deployed, section)).model_fields.items()
        if not field.description
    ]
    assert not bare


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "env").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).lake.root_uri


@pytest.mark.parametrize(
    ("users", "tasks"),
    [
        (0, 1),
        (1, 1),
        (10_000, 1),
        (10_001, 2),
        (40_000, 4),
        (100_000, 4),
        (120_000, 4),
        (120_001, 5),
        (10**6, 34),
    ],
)
def test_scoring_tasks_by_the_number_of_users(users: int, tasks: int) -> None:
    assert ScoringConfig().num_tasks(users) == tasks
