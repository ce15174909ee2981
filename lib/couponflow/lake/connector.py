"""How Spark reaches ``gs://``: Delta's log store for it and the settings of the Cloud Storage connector.

The connector lies beside Spark's jars, on a cluster as on a laptop. On Cloud Storage itself its defaults
stand. A local server, which the storage library's own switch names, knows no log-in; and it would not honour
a generation precondition on a resumable upload, so that of two writers of one commit both would win.
"""

from typing import Any

from couponflow.errors import ConfigError

#: Creates a commit with a generation precondition: of two writers of one version, one wins.
LOG_STORE = "io.delta.storage.GCSLogStore"
_LOG_STORE_KEY = "spark.delta.logStore.gs.impl"
_CLASSES = {
    "spark.hadoop.fs.gs.impl": "com.google.cloud.hadoop.fs.gcs.GoogleHadoopFileSystem",
    "spark.hadoop.fs.AbstractFileSystem.gs.impl": "com.google.cloud.hadoop.fs.gcs.GoogleHadoopFS",
}


def settings(is_submitted: bool, emulator: str | None) -> dict[str, str]:
    """What a session is built with. Under ``spark-submit`` the cluster knows its connector.

    ``emulator``: address of a local server, as ``storage.emulator`` gives it.
    """
    found = {_LOG_STORE_KEY: LOG_STORE}
    if emulator is not None:
        found |= {
            "spark.hadoop.fs.gs.storage.root.url": emulator.rstrip("/") + "/",
            "spark.hadoop.fs.gs.project.id": "test",
            "spark.hadoop.fs.gs.auth.service.account.enable": "false",
            "spark.hadoop.fs.gs.auth.null.enable": "true",
            "spark.hadoop.fs.gs.outputstream.direct.upload.enable": "true",
        }
    return found if is_submitted and emulator is None else found | _CLASSES


def check(spark: Any) -> None:
    """Refuse a session in which two writers could commit one version of a table on ``gs://``.

    Raises:
        ConfigError: another log store is in force, which a session built elsewhere may have brought.
    """
    found = spark.sparkContext.getConf().get(_LOG_STORE_KEY)
    if found != LOG_STORE:
        raise ConfigError(
            f"{_LOG_STORE_KEY}: expected {LOG_STORE}, found {found}; let couponflow start the Spark session, "
            "or build it with that setting"
        )
