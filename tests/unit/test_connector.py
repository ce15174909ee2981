"""Settings of Spark for ``gs://``: the cluster's own stand, a local server's are complete. No JVM."""

from typing import Any

import pytest

from couponflow.errors import ConfigError
from couponflow.lake import connector, storage

SERVER = "http://127.0.0.1:4443"


class Session:
    """A session that was built with some settings."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.sparkContext: Any = self
        self._settings = settings

    def getConf(self) -> dict[str, str]:  # noqa: N802 - Spark's name
        return self._settings


def test_on_a_cluster_nothing_but_the_log_store_is_set() -> None:
    assert connector.settings(True, None) == {"spark.delta.logStore.gs.impl": "io.delta.storage.GCSLogStore"}


def test_elsewhere_the_connector_is_named_and_logs_in_as_usual() -> None:
    found = connector.settings(False, None)
    assert found["spark.hadoop.fs.gs.impl"].endswith(".GoogleHadoopFileSystem")
    assert not [name for name in found if "auth" in name or "root.url" in name or "upload" in name]


@pytest.mark.parametrize("is_submitted", [True, False])
def test_a_local_server_needs_its_address_no_log_in_and_whole_uploads(is_submitted: bool) -> None:
    found = connector.settings(is_submitted, SERVER)
    assert found.items() >= connector.settings(False, None).items()
    assert found["spark.hadoop.fs.gs.storage.root.url"] == SERVER + "/"
    assert found["spark.hadoop.fs.gs.auth.null.enable"] == "true"
    assert found["spark.hadoop.fs.gs.outputstream.direct.upload.enable"] == "true"


def test_the_switch_is_the_storage_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("", None), (SERVER, SERVER)):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", value)
        assert storage.emulator() == expected


@pytest.mark.parametrize("other", [{}, {"spark.delta.logStore.gs.impl": "io.delta.storage.HDFSLogStore"}])
def test_a_session_that_would_lose_commits_is_refused(other: dict[str, str]) -> None:
    connector.check(Session(connector.settings(True, None)))
    with pytest.raises(ConfigError, match=r"expected io\.delta\.storage\.GCSLogStore, found .*Spark session"):
        connector.check(Session(other))
