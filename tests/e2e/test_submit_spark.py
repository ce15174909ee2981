"""A release in a real ``spark-submit``: package, config and key arrive, codes return, secrets stay secret."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from dataproc_world import State, World, world
from deploy_files import DEPLOY
from secret_server import serving
from spark_runner import SMALL_LAKE, SparkRunner

from couponflow.config import load_config
from couponflow.lake import contracts, program, runs, secret_store, storage
from couponflow.sequences import records
from couponflow.sequences.records import PseudonymKey

KEY = b"of a test, and long enough to be a key"
PERSON = "customer-4711@shop"


@pytest.fixture
def here(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    version = load_config(DEPLOY / "env" / "ci.toml").events.key_secret
    with serving(version, KEY) as keys:
        known = {secret_store.STAND_IN: keys.url}
        logged = SMALL_LAKE | {
            "spark.eventLog.enabled": "true",
            "spark.eventLog.dir": str(tmp_path),
            "spark.log.level": "INFO",
        }
        runner = SparkRunner(
            tmp_path / "drivers", server, master="local[1]", settings=logged, environment=known
        )
        with world(tmp_path, "grpc", runner) as made:
            yield made
        assert keys.asked, "the drivers took no key"


def test_missing_data_end_a_job_for_good_and_its_restarts_at_once(here: World) -> None:
    failed = here.call("submit", "clean_events", "--dates", "2017-10-01")
    assert failed.exit_code == 3, failed.output
    (job,) = here.jobs
    assert f"job {job.reference.job_id} failed: " in failed.stderr
    states = [status.state for status in (*job.status_history, job.status)]
    assert states.count(State.ATTEMPT_FAILURE) == 3  # Dataproc does not know that it is in vain
    (record,) = runs.load_all(here.lake)  # the restarts have not begun
    assert record.attempt_key == job.reference.job_id
    assert record.code_version == program.version()
    assert record.error in failed.stderr


def test_neither_the_key_nor_a_person_is_in_a_log_a_record_or_a_table(here: World, tmp_path: Path) -> None:
    row: dict[str, object] = dict.fromkeys(column.name for column in contracts.FEEDS["events"].columns)
    row |= {"event_id": "e1", "user_id": PERSON, "event_type": "view", "item_id": "i1", "price": 1.0}
    row |= {"category_id": "c1", "event_time": "2024-01-10T10:00:00Z", "ingest_time": "2024-01-10T10:00:00Z"}
    place = f"{here.lake}/raw/events/ingest_date=2024-01-10/part-0.jsonl"
    storage.create(place, json.dumps(row).encode() + b"\n", "landed")
    done = here.call("submit", "clean_events", "--dates", "2024-01-10")
    assert done.exit_code == 0, done.output
    (record,) = runs.load_all(here.lake)
    assert record.rows["events"] == 1
    key = PseudonymKey("v1", KEY)
    pseudonym = records.pseudonym(PERSON, key)
    assert pseudonym is not None
    texts = {str(path): path.read_bytes() for path in tmp_path.glob("*local-*")}
    texts |= {str(path): path.read_bytes() for path in tmp_path.glob("drivers/*/driveroutput")}
    assert len(texts) == 2, texts.keys()
    written = {name: storage.read_bytes(storage.join(here.lake, name)) for name in storage.walk(here.lake)}
    texts |= {name: content for name, content in written.items() if not name.startswith("raw/")}
    assert [name for name, content in texts.items() if KEY in content or KEY.hex().encode() in content] == []
    assert [name for name, content in texts.items() if PERSON.encode() in content] == []
    tables = [content for name, content in texts.items() if name.endswith(".parquet")]
    assert any(pseudonym.encode() in content for content in tables), "the search would find nothing"
