"""The pseudonym key out of Secret Manager: its REST interface, served here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from secret_server import Service, serving

from couponflow.errors import ConfigError, InfraError
from couponflow.lake import secret_store
from couponflow.sections import EventsConfig
from couponflow.sequences import feeds

VERSION = "projects/p/secrets/user-key/versions/3"
KEY = b"0123456789abcdef"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_store, "_FIRST_PAUSE_SECONDS", 0)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with serving(VERSION, KEY) as running:
        monkeypatch.setenv(secret_store.STAND_IN, running.url)
        yield running


def test_the_bytes_of_a_version_without_the_line_break_of_a_file(service: Service) -> None:
    assert secret_store.read(VERSION) == KEY
    service.put(KEY + b"\n")
    assert secret_store.read(VERSION) == KEY


def test_what_passes_is_asked_again_and_what_stays_is_told(service: Service) -> None:
    service.statuses = [503, 429]
    assert secret_store.read(VERSION) == KEY
    assert len(service.asked) == 3
    service.statuses = [503] * 9
    with pytest.raises(InfraError, match="answered 503; run again"):
        secret_store.read(VERSION)
    assert len(service.statuses) == 3  # the first and five more


@pytest.mark.parametrize(
    ("status", "error", "text"),
    [(403, InfraError, "roles/secretmanager.secretAccessor"), (404, ConfigError, "no such version")],
)
def test_a_refusal_names_the_version_and_the_next_step(
    service: Service, status: int, error: type[Exception], text: str
) -> None:
    service.statuses = [status]
    with pytest.raises(error, match=f"secret {VERSION}: .*{text}"):
        secret_store.read(VERSION)
    assert len(service.asked) == 1


def test_bytes_that_are_not_what_was_stored_are_refused(service: Service) -> None:
    service.checksum += 1
    with pytest.raises(InfraError, match="arrived damaged") as refused:
        secret_store.read(VERSION)
    assert KEY.decode() not in str(refused.value)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(VERSION, KEY) as gone:
        monkeypatch.setenv(secret_store.STAND_IN, gone.url)
    gone.server_close()
    with pytest.raises(InfraError, match="did not answer"):
        secret_store.read(VERSION)


def test_a_stand_in_on_another_machine_gets_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(secret_store.STAND_IN, "http://example.org:80")
    with pytest.raises(ConfigError, match="has to be on this machine; unset it"):
        secret_store.read(VERSION)


def test_without_a_login_the_next_step_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(secret_store.STAND_IN, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(InfraError, match=r"DefaultCredentialsError.*; check the login"):
        secret_store.read(VERSION)


def test_the_key_of_the_config_is_that_of_the_secret(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUPONFLOW_USER_KEY", "another key of 16 bytes")
    key = feeds.load_key(EventsConfig(key_secret=VERSION, key_version="v3"))
    assert key is not None
    assert (key.secret, key.version) == (KEY, "v3")
    service.put(b"short")
    with pytest.raises(ConfigError, match=f"secret {VERSION} holds no pseudonym key of at least 16"):
        feeds.load_key(EventsConfig(key_secret=VERSION))


@pytest.mark.parametrize("name", ["projects/p/secrets/s/versions/latest", "user-key", "projects/p/secrets/s"])
def test_only_a_numbered_version_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="key_secret"):
        EventsConfig(key_secret=name)
