"""The erasure of a person in all that couponflow keeps: phase one now, and the proof after retention.

Order: the do-not-ingest list first, then raw, then tables from upstream to downstream, then lists and texts,
so that a job that runs meanwhile cannot bring the person back. Each step asks the list who is to go and may
be repeated: a run that died is simply run again. Phase two is ``maintain``, which removes the old versions of
the tables; ``verify`` then reads every byte.

The tables of lists in BigQuery lose the person like the lists; a day's predictions there are replaced when
``export_audience`` of that day runs again, and expire otherwise: the erasure names them.

Not reached from here: what a mail system has been handed, what BigQuery keeps for its time travel, copies
that an object store keeps of replaced objects (versioning, soft delete), Spark's event logs, and the download
cache of a source.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from couponflow.config import Config
from couponflow.entry import Run, log
from couponflow.errors import ConflictError, DataError
from couponflow.lake import erased, needles, runs, storage
from couponflow.lake.erased import Erased
from couponflow.lake.needles import Needles
from couponflow.sequences.records import PseudonymKey

if TYPE_CHECKING:
    from couponflow.campaign.export import Warehouse

#: Texts in which an id may stand, beside the raw files and the tables, which have steps of their own.
TEXT_KINDS = (".json", ".jsonl", ".html", ".csv", ".txt", ".log", ".toml", ".md")
_OWN_STEP = ("raw/", "tables/", "models/")  # a bundle holds sums only, under checksums
_SHOWN = 20


@dataclass(frozen=True)
class Person:
    """Who is to be erased; ids are never shown."""

    raw_id: str = field(repr=False)
    user_id: str = field(repr=False)
    key: PseudonymKey | None = field(repr=False)

    @property
    def needles(self) -> Needles:
        """The texts to search for."""
        return Needles(tuple(sorted({self.raw_id, self.user_id})))


def find_person(config: Config, raw_id: str) -> Person:
    """The person behind a raw id, by the key under which deliveries are read.

    Raises:
        ConfigError: no key, or no id.
    """
    from couponflow.sequences import feeds, records

    Needles((raw_id,))  # refuses what is no id
    key = feeds.load_key(config.events)
    return Person(raw_id, records.pseudonym(raw_id, key), key)


def erase(
    spark: Any, job: Run, person: Person, dry_run: bool = False, warehouse: "Warehouse | None" = None
) -> dict[str, int]:
    """Phase one; returns the rows gone, per place. With ``dry_run`` they are only counted.

    Someone unknown is put on the list all the same, so that a later delivery does not bring them in.
    ``warehouse`` is where the tables of the lists are.

    Raises:
        ConflictError: another run has written meanwhile; run again.
        DataError: a file or table cannot be read, or a raw file is named after the person.
    """
    from couponflow.campaign import erasing as lists
    from couponflow.campaign import export, publication
    from couponflow.lake import erasure

    root = job.root_uri
    listed = _listed(root, [person.user_id], dry_run)
    request = erasure.Request(root, listed.hash_of(person.user_id))
    is_repeated = request.content.get("status") == "open"
    if not dry_run:
        request.open(job.run_id, job.record.started_time)
    visitors = erasure.own_visitors(spark, root, person.user_id)
    listed, counts = _erase_raw(spark, job, person, visitors, listed, dry_run)
    if not dry_run:
        request.done("raw", counts)
    if dry_run:
        counts |= erasure.count_rows(spark, root, listed)
    else:
        taken = _erase_tables(spark, job, listed)
        counts |= taken
        request.done("tables", taken)
        _renew_manifest(spark, job)
    target, begun = job.config.export.target_uri, export.claimed_tables(root)
    handed = lists.prune(target, listed.contains, job.run_id, dry_run, warehouse, begun)
    counts |= handed
    _name_predictions(job)
    if dry_run:
        return counts
    request.done("lists", handed)
    storage.remove_folder(storage.join(root, *publication.PARTS))  # of runs that died; scored anew
    texts = needles.redact(root, person.needles, TEXT_KINDS, _OWN_STEP)
    request.done("texts", {"files": len(texts)})
    if counts or is_repeated:  # what the run that died has taken is not counted here
        runs.mark_not_reproducible(root, job.run_id)
    if back := erasure.count_rows(spark, root, listed):
        raise ConflictError(
            f"tables {', '.join(back)} got rows of an erased person again while this ran: another job had "
            "read its input before; when it has ended, erase again"
        )
    request.close("deleted")
    return counts


def verify(config: Config, person: Person) -> None:
    """Search every file of lake and export target for the id, as delivered and as pseudonym.

    Raises:
        DataError: it still stands somewhere; the message names the files.
    """
    from couponflow.lake import erasure

    found = [
        f"{uri} ({where})"
        for place in (config.lake.root_uri, config.export.target_uri)
        for uri, where in needles.search(place, person.needles)
    ]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DataError(
            f"{len(found)} files may still hold this person: {'; '.join(found[:_SHOWN])}{more}. Old versions "
            f"of tables go with `couponflow maintain` after {config.maintenance.retention_hours} hours; "
            "erase again for the others, then verify again"
        )
    listed = erased.load(config.lake.root_uri)
    if listed.contains(person.user_id):
        erasure.Request(config.lake.root_uri, listed.hash_of(person.user_id)).close("verified")


def _listed(root_uri: str, user_ids: list[str], dry_run: bool) -> Erased:
    return erased.load(root_uri).with_ids(user_ids) if dry_run else erased.add(root_uri, user_ids)


def _erase_raw(
    spark: Any, job: Run, person: Person, visitors: list[str], listed: Erased, dry_run: bool
) -> tuple[Erased, dict[str, int]]:
    """Blank the person's records, and those of the visitors that are the person; returns the longer list."""
    from couponflow.lake import erasure
    from couponflow.sequences import erasing as raw

    root, texts, reader = job.root_uri, person.needles, raw.Reader(person.key, job.config.feeds)
    files = raw.raw_files(root)
    raw.check_names(files, texts)
    known = set(visitors)
    listed = _with_visitors(root, listed, known, dry_run)
    found = raw.scan(spark, files, listed, person.user_id, texts, reader)
    own = set(erasure.without_other_owner(spark, root, set(found.visitors - known), person.user_id))
    if own:  # delivered and not cleaned yet: no link is in the tables
        listed = _with_visitors(root, listed, known | own, dry_run)
        found = raw.scan(spark, files, listed, person.user_id, texts, reader)
    log.info("raw: %d of %d files hold the person", len(found.affected), len(files))
    counts = found.rows
    if not dry_run:
        refused = erasure.take_out_refused(spark, root, found.refused_positions, job.run_id)
        counts |= {"quarantine": refused} if refused else {}
        erased.note_rewritten(root, raw.digests(found.affected))
        raw.rewrite_all(found.affected, listed, person.user_id, texts, reader)
    return listed, counts


def _with_visitors(root_uri: str, listed: Erased, visitors: set[str], dry_run: bool) -> Erased:
    from couponflow.sequences import records

    new = sorted(records.VISITOR + visitor for visitor in visitors)
    if not new:
        return listed
    return listed.with_ids(new) if dry_run else erased.add(root_uri, new)


def _erase_tables(spark: Any, job: Run, listed: Erased) -> dict[str, int]:
    from couponflow.lake import erasure

    taken = erasure.take_out(spark, job.root_uri, listed, job.run_id)
    for table, rows in taken.items():
        log.info("table %s: %d rows", table, rows)
    return taken


def _name_predictions(job: Run) -> None:
    """Say which day's predictions in BigQuery may hold the person: they are renewed by their own job."""
    from couponflow.campaign import predictions

    today = datetime.fromisoformat(job.record.started_time).date()
    left = predictions.still_loaded(job.root_uri, job.config.export.bigquery_predictions_days, today)
    job.facts["bigquery_predictions_left"] = [f"{table} of {day}" for table, _, day in left]
    for table, campaign, day in left:
        log.warning(
            "%s may hold the person in its rows of %s: run export_audience --campaign %s --dates %s again, "
            "which replaces them, or let them expire",
            table,
            day,
            campaign,
            day,
        )


def _renew_manifest(spark: Any, job: Run) -> None:
    """Training goes on with the rows that are left, if an erasure was all that changed them."""
    from couponflow.lake import erasure, tables
    from couponflow.sequences import datasets
    from couponflow.training import manifests

    before = manifests.current(job.root_uri)
    if before is None or tables.version(spark, job.root_uri, "training_examples") == before.table_version:
        return
    if not erasure.is_merged_only(spark, job.root_uri, "training_examples", before.table_version):
        log.warning("training_examples has changed since its manifest: run build_examples before you train")
        return
    counted = datasets.count(spark, job.config)
    job.facts["dataset"], retired = manifests.renew(job.root_uri, counted, job.run_id)
    job.facts["retired_manifests"] = len(retired)
