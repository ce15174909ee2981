"""The Spark session of a process, as every job expects it; no job builds its own."""

import os
import sys

from pyspark.sql import SparkSession

from couponflow.lake import connector, storage
from couponflow.sections import SparkConfig


def start(config: SparkConfig, app_name: str) -> SparkSession:
    """The session of this process: UTC, Delta, dates and partitions as the jobs expect them.

    Under ``spark-submit``, in every deploy mode, the cluster's own master, memory, partitions and log level
    stay; elsewhere the config decides. ``gs://`` works in both.

    Raises:
        ConfigError: a session that runs already would lose commits on ``gs://``.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = (
        SparkSession.builder.appName(app_name)
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.sql.execution.arrow.pyspark.enabled", "true")
    )
    is_submitted = (
        "PYSPARK_GATEWAY_PORT" in os.environ
    )  # the JVM that started this driver; PySpark's own test
    if not is_submitted:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        builder = (
            builder.master(config.master)
            .config("spark.driver.memory", config.driver_memory)
            .config("spark.sql.shuffle.partitions", str(config.shuffle_partitions))
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.ui.retainedJobs", "20")  # finished plans and tasks would fill the heap otherwise
            .config("spark.ui.retainedStages", "20")
            .config("spark.ui.retainedTasks", "500")
            .config("spark.sql.ui.retainedExecutions", "5")
            # Every hash map and sorter of a task takes a page, however few its rows. Spark sizes pages by the
            # heap (64 MB here), and a plan with dozens of them fills it.
            .config("spark.buffer.pageSize", "2m")
            .config("spark.shuffle.compress", "false")  # histories hardly shrink, and no network is saved
            .config("spark.sql.ui.explainMode", "simple")  # every plan is described, though nobody looks
            .config("spark.sql.codegen.cache.maxEntries", "1000")  # a backfill comes back to its plans
            .config("spark.driver.extraJavaOptions", "-Duser.timezone=UTC -XX:+UseParallelGC")
            .config("spark.databricks.delta.snapshotPartitions", "2")  # default 50 tasks per log read
            .config("spark.sql.sources.parallelPartitionDiscovery.parallelism", "4")
        )
    for name, value in connector.settings(is_submitted, storage.emulator()).items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    connector.check(spark)
    if not is_submitted:
        spark.sparkContext.setLogLevel("FATAL")  # errors reach the caller as ours, without JVM traces
    return spark
