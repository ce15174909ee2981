"""Upkeep of the whole lake: erased people kept out, small files joined, files of old versions removed.

Tables of older code are brought to the schema of this one when asked for.

Nothing that a current reader needs changes: the rows stay, and what is removed was replaced longer ago than
``maintenance.retention_hours``. This is also phase two of an erasure.
"""

from typing import Any

from couponflow.config import Config
from couponflow.entry import Run, log
from couponflow.lake import erased, schemas


def maintain(spark: Any, job: Run, vacuum: bool, optimize: bool, dry_run: bool) -> dict[str, int]:
    """Do the parts asked for; returns counts per table. With ``dry_run`` nothing changes.

    Counts: ``erased TABLE`` rows of erased people that a job had brought back, ``compacted TABLE`` files
    less, ``removed TABLE`` stale files, ``retired manifests``.

    Raises:
        ConfigError: the retention is too short.
        DataError: training's manifest needs a file that would be removed.
        ConflictError: another run has changed a table meanwhile; run again.
    """
    from couponflow.lake import erasure, tables, upkeep

    if vacuum:
        upkeep.check_retention(
            job.config.maintenance.retention_hours, job.config.maintenance.allow_short_retention
        )
    counts = _keep_out(spark, job, dry_run)
    there = [name for name in schemas.TABLES if tables.exists(spark, job.root_uri, name)]
    if optimize:
        counts |= _compact(spark, job.root_uri, there, job.config.maintenance.max_files, dry_run)
    if vacuum:
        counts |= _vacuum(spark, job.root_uri, there, job.config, dry_run)
    for person in erasure.open_requests(job.root_uri):
        log.warning("erasure %s... was begun and not ended: run `couponflow erase` for it again", person[:12])
    return counts


def migrate(spark: Any, job: Run, dry_run: bool) -> dict[str, int]:
    """Bring the tables of older code to this code's schema; returns the columns that each gets.

    With ``dry_run`` nothing changes. All tables are looked at before the first is changed.

    Raises:
        DataError: a table is too old, of newer code, or not as its version says.
        ConflictError: another run has changed a table meanwhile; run again.
    """
    from couponflow.lake import migrations

    counts = {}
    for migration in migrations.planned(spark, job.root_uri):
        counts[f"migrated {migration.table}"] = len(migration.columns)
        names = ", ".join(column.name for column in migration.columns) or "no column"
        log.info(
            "%s: schema version %d to %d, with %s",
            migration.table,
            migration.version,
            schemas.SCHEMA_VERSION,
            names,
        )
        if not dry_run:
            migrations.apply(spark, job.root_uri, migration)
    return counts


def _keep_out(spark: Any, job: Run, dry_run: bool) -> dict[str, int]:
    """A job that had read its input before an erasure may have written the person again."""
    from couponflow.lake import erasure

    listed = erased.load(job.root_uri)
    if dry_run:
        found = erasure.count_rows(spark, job.root_uri, listed)
    else:
        found = erasure.take_out(spark, job.root_uri, listed, job.run_id)
    return {f"erased {table}": number for table, number in found.items()}


def _compact(spark: Any, root_uri: str, names: list[str], max_files: int, dry_run: bool) -> dict[str, int]:
    from couponflow.lake import upkeep

    counts: dict[str, int] = {}
    for table in names:
        crowded = upkeep.crowded_partitions(spark, root_uri, table, max_files)
        for partition, number in crowded:
            less = number - 1 if dry_run else upkeep.compact(spark, root_uri, table, partition)
            counts[f"compacted {table}"] = counts.get(f"compacted {table}", 0) + less
    return counts


def _vacuum(spark: Any, root_uri: str, names: list[str], config: Config, dry_run: bool) -> dict[str, int]:
    """Manifests that name a stale file are retired first: training on them is then refused by name."""
    from couponflow.lake import upkeep
    from couponflow.training import manifests

    hours = config.maintenance.retention_hours
    stale = {table: upkeep.stale_files(spark, root_uri, table, hours) for table in names}
    retired = manifests.retire(root_uri, stale.get("training_examples", []), dry_run)
    for table in [] if dry_run else names:
        upkeep.vacuum(spark, root_uri, table, hours)
    counts = {f"removed {table}": len(files) for table, files in stale.items() if files}
    return counts | ({"retired manifests": len(retired)} if retired else {})
