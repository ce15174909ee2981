"""The hand-over, exactly once: claim, list file, warehouse table, manifest. No manifest, no list.

``<lake>/handovers/<campaign>/<run date>.json``, the claim, names the one version, folder and table that a day
is handed over to. It is created first, so neither two versions at once nor another place mail anyone twice.

``<target>/<campaign>/<version>/audience.csv`` and ``manifest.json`` are each created once; only an erasure
replaces them (``erasing``). Both are pure functions of the version, the seed accounts and the consent known
when it is handed over, so a run that dies between any two steps is simply run again, and two runs at once
agree; where consent has changed in between, nothing is handed over until a person has removed the unfinished
file. Ids only: the address is joined in the mail system.

The table is loaded from the bytes of the list file, after that is fixed and before the manifest. Half a list
is never seen: a reader of files takes a list after its manifest; a table is whole from the moment at which it
is there, since a load commits at once; who reads both waits for the manifest, which names the table. A table
without a manifest belongs to a run that died, and the next run completes it.

Seed accounts are mailed with every list, to see what recipients see. They stand at its end under ``is_seed``,
are in no ledger and no recipient count; an account that the ledger knows, in whatever arm, is no seed.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Protocol

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign import assignment, eligibility
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import erased, faults, runs, storage
from couponflow.lake.erased import TOMBSTONE
from couponflow.sections import ExportConfig, SelectionConfig

EXPORT_SCHEMA_VERSION = 2
COLUMNS = ("user_id", "campaign_id", "version", "coupon_id", "rank", "is_seed")
FILE, MANIFEST = "audience.csv", "manifest.json"
_JOB = "export_audience"


class Warehouse(Protocol):
    """Where a list becomes a table; ``cloud.bigquery`` is one."""

    def load_audience(self, content: bytes, manifest: Mapping[str, Any]) -> None:
        """Load the list into the table that the manifest names, unless that is done already."""

    def replace_audience(self, content: bytes, manifest: Mapping[str, Any]) -> None:
        """Put a list from which people were erased in the place of the longer one."""

    def drop_table(self, table: str, location: str) -> None:
        """Drop a table that nobody may read."""


@dataclass(frozen=True)
class Handover:
    """Which version goes where, and the run that does it; an empty ``table`` means files only."""

    root_uri: str
    target_uri: str
    campaign_id: str
    version: str
    run_date: date
    run_id: str
    table: str = ""
    table_location: str = ""

    @property
    def folder(self) -> str:
        """Where list and manifest of this version lie."""
        return storage.join(self.target_uri, self.campaign_id, self.version)

    def note(self, kind: str) -> str:
        """Object on the lake that a person's ``approvals`` or ``recalls`` command has left."""
        return _note_uri(self.root_uri, kind, self.campaign_id, self.version)


@dataclass(frozen=True)
class Recipients:
    """The rows of a list, in the order of choice; how many of the audience have withdrawn since; seeds."""

    rows: Sequence[tuple[str, str, str, str | None, int]]
    num_withdrawn: int
    seeds: Sequence[str] = ()


def export_audience(
    handover: Handover,
    audience: DataFrame,
    assignments: DataFrame,
    consents: DataFrame,
    users: DataFrame,
    section: SelectionConfig,
    export: ExportConfig,
    warehouse: Warehouse | None = None,
) -> dict[str, Any]:
    """Hand a version over unless that is done already; returns the export facts.

    The frames are the whole tables, read lazily. Consent is checked again with the snapshots as they are
    now; who has withdrawn is dropped and counted as ``num_withdrawn``.

    Raises:
        ConfigError: not approved, or recalled.
        DataError: consent is missing, stale or too small, the tables disagree, or a list was tampered with.
        ConflictError: another version of this run date was handed over, or this one to another place.
    """
    check_approval(handover, export.auto_approve)
    done = finished(handover)
    if done is not None:
        return done
    check_only_version(handover)
    of_version = (F.col("campaign_id") == handover.campaign_id) & (F.col("version") == handover.version)
    ledger = assignments.where(of_version)
    decided_by = ledger.agg(F.min("run_id")).collect()[0][0]
    if decided_by is None:
        raise DataError(
            f"table assignments, campaign {handover.campaign_id}: no rows of version {handover.version}; "
            "run select_audience again"
        )
    master = eligibility.user_master(users, handover.run_date)
    consent = eligibility.consent_at_export(consents, master, handover.run_date, section)
    found = recipients(audience.where(of_version), ledger, consent)
    seeds = seeds_of(export.seed_user_ids, ledger, consent, erased.load(handover.root_uri).contains)
    return hand_over(handover, replace(found, seeds=seeds), str(decided_by), warehouse)


def approve(root_uri: str, campaign_id: str, version: str, by: str) -> None:
    """Leave the approval of one version; the first approval stays.

    Raises:
        DataError: no selection has decided that version.
    """
    _leave_note(root_uri, "approvals", campaign_id, version, {"approved_by": by})


def recall(root_uri: str, campaign_id: str, version: str, by: str, reason: str) -> None:
    """Mark a version so that it is not handed over any more; the first recall stays.

    Raises:
        DataError: no selection has decided that version.
    """
    _leave_note(root_uri, "recalls", campaign_id, version, {"recalled_by": by, "reason": reason})


def decided_version(root_uri: str, campaign_id: str, dates: str) -> str:
    """The version that the newest successful selection of a campaign and day has written.

    Raises:
        DataError: there is none.
    """
    found = [
        record.facts["version"]
        for record in runs.load_all(root_uri, "select_audience")
        if record.status == "ok" and record.dates == dates and record.facts.get("campaign_id") == campaign_id
    ]
    if not found:
        raise DataError(f"campaign {campaign_id}, {dates}: nothing selected; run select_audience first")
    return str(found[-1])


def is_final(handover: Handover) -> bool:
    """Whether a version is approved or handed over, so that its rows may not change."""
    return storage.exists(handover.note("approvals")) or storage.exists(
        storage.join(handover.folder, MANIFEST)
    )


def check_approval(handover: Handover, auto_approve: bool) -> None:
    """Refuse a version that nobody has approved, or that was recalled.

    Raises:
        ConfigError: no approval, or a recall.
    """
    name = f"campaign {handover.campaign_id}, version {handover.version}"
    if storage.exists(handover.note("recalls")):
        raise ConfigError(f"{name}: recalled; select again under other rules for a new version")
    if not auto_approve and not storage.exists(handover.note("approvals")):
        raise ConfigError(
            f"{name}: not approved; look at it, then run `couponflow campaign approve "
            f"--campaign {handover.campaign_id} --version {handover.version} --by NAME`"
        )


def finished(handover: Handover) -> dict[str, Any] | None:
    """The facts of a hand-over that is complete, after checking file against manifest; else None.

    Raises:
        DataError: the list differs from its manifest.
        ConflictError: it is complete without the table that is asked for.
    """
    uri = storage.join(handover.folder, MANIFEST)
    if not storage.exists(uri):
        return None
    manifest = read_manifest(uri)
    if handover.table and handover.table != manifest.get("bigquery_table"):
        raise ConflictError(
            f"campaign {handover.campaign_id}, version {handover.version}: handed over to {handover.folder} "
            f"and {manifest.get('bigquery_table') or 'no table'}; loading it into {handover.table} as well "
            "could mail its users again. Prepare the campaign for another run date"
        )
    content = storage.read_bytes(storage.join(handover.folder, str(manifest["file"])))
    num_rows = content.count(b"\n") - 1  # the header
    if storage.sha256(content) != manifest["sha256"] or num_rows != num_listed(manifest):
        raise DataError(
            f"{handover.folder}: the list has {num_rows} rows and another checksum than its manifest "
            f"({num_listed(manifest)} rows); someone has changed it, stop the mailing and recall it"
        )
    return _facts(handover, manifest, already_exported=True)


def recipients(audience: DataFrame, ledger: DataFrame, consent: DataFrame) -> Recipients:
    """The users of a version who may still be mailed, by rank.

    Inputs: ``audience`` and ``ledger`` rows of the one version; ``consent`` of
    ``eligibility.consent_status``. A user who is not granted any more, or has no record, is left out and
    counted. The list is the deliverable, so it meets on the driver, streamed by partition.

    Raises:
        DataError: a user of the audience is not in the ledger as mailed (holdout, control, unknown), or the
            ledger mails someone whom the audience lacks.
    """
    named = ledger.where(~F.col("user_id").startswith(TOMBSTONE))  # an erased person is on no list
    arms = named.select("user_id", "arm").distinct()
    may_mail = consent.where(F.col("consent_reason").isNull()).select(
        "user_id", F.lit(True).alias("may_mail")
    )
    joined = (
        audience.join(arms, "user_id", "full")
        .where(F.col("rank").isNotNull() | (F.col("arm") == assignment.TREAT))
        .join(may_mail, "user_id", "left")
        .select("user_id", "campaign_id", "version", "coupon_id", "rank", "arm", "may_mail")
        .orderBy("rank", "user_id")
    )
    rows, num_withdrawn, seen = [], 0, set()
    for row in joined.toLocalIterator():
        if row["arm"] != assignment.TREAT or row["rank"] is None:
            raise DataError(
                f"audience and ledger disagree: a user with arm {row['arm']} and rank {row['rank']}; "
                "nothing handed over, run select_audience again"
            )
        if row["user_id"] in seen:
            raise DataError("audience: a user stands in it twice; run select_audience again")
        seen.add(row["user_id"])
        if row["may_mail"]:
            rows.append(tuple(row[name] for name in COLUMNS[:-1]))
        else:
            num_withdrawn += 1
    return Recipients(rows, num_withdrawn)


def seeds_of(
    user_ids: Sequence[str], ledger: DataFrame, consent: DataFrame, is_erased: Callable[[str], bool]
) -> list[str]:
    """The seed accounts of a version, sorted: those that its ledger does not know, and nobody has to spare.

    An account in the ledger is what the ledger says, recipient or withheld. One that refuses mail, or was
    erased, is left out as well.
    """
    if not user_ids:
        return []
    asked = F.col("user_id").isin(*user_ids)
    refusing = consent.where(asked & F.col("consent_reason").isNotNull()).select("user_id")
    known = ledger.where(asked).select("user_id").union(refusing).distinct().collect()
    left_out = {row["user_id"] for row in known} | {user for user in user_ids if is_erased(user)}
    return sorted(set(user_ids) - left_out)


def num_listed(manifest: Mapping[str, Any]) -> int:
    """Rows of a list: its recipients and its seeds, of which older lists have none."""
    return int(manifest["num_recipients"]) + int(manifest.get("num_seeds", 0))


def render(rows: Iterable[Sequence[Any]], seeds: Iterable[Sequence[Any]] = ()) -> bytes:
    """The list as CSV: header, recipients, seeds, ``\\n`` line ends, an absent coupon or rank is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*row, "false") for row in rows)
    writer.writerows((*row, "true") for row in seeds)
    return text.getvalue().encode()


def hand_over(
    handover: Handover, found: Recipients, decided_by: str, warehouse: Warehouse | None = None
) -> dict[str, Any]:
    """Create the list, load the table, create the manifest; returns the facts.

    ``decided_by`` is the run that selected the version; the manifest holds nothing that differs between two
    hand-overs of one version.

    Raises:
        ConflictError: this version was written with other content, the day belongs to another version, or
            the version to another folder or table.
        DataError: an id looks like a mail address, a seed is a recipient, or the table refuses the list.
    """
    seeds = [(user, handover.campaign_id, handover.version, None, None) for user in found.seeds]
    _check_ids(found)
    _claim(handover)
    _fire(handover, "after_claim")
    content = render(found.rows, seeds)
    manifest = {
        "schema_version": EXPORT_SCHEMA_VERSION,
        "campaign_id": handover.campaign_id,
        "version": handover.version,
        "run_date": handover.run_date.isoformat(),
        "run_id": decided_by,
        "file": FILE,
        "columns": list(COLUMNS),
        "num_recipients": len(found.rows),
        "num_withdrawn": found.num_withdrawn,
        "num_seeds": len(seeds),
        "sha256": storage.sha256(content),
    }
    if handover.table:
        manifest |= {"bigquery_table": handover.table, "bigquery_location": handover.table_location}
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    file = storage.join(handover.folder, FILE)
    try:
        storage.create(file, content, handover.run_id)
    except ConflictError as error:
        table = f", and drop the table {handover.table} unless it was mailed" if handover.table else ""
        raise ConflictError(
            f"{file} was begun by another run with other content, as consent has changed since; run again. "
            "If this stays, that run has died: remove the file, which nobody reads without its manifest"
            + table
        ) from error
    _fire(handover, "after_list")
    if handover.table:
        required(warehouse, handover.table).load_audience(content, manifest)
    _fire(handover, "after_load")
    storage.create(storage.join(handover.folder, MANIFEST), text, handover.run_id)
    _fire(handover, "after_manifest")
    return _facts(handover, manifest, already_exported=False)


def check_only_version(handover: Handover) -> None:
    """Refuse a second version of a campaign for one run date: it would mail the same users again.

    Raises:
        ConflictError: there is one.
    """
    place = storage.join(handover.target_uri, handover.campaign_id)
    for version in storage.list_names(place):
        uri = storage.join(place, version, MANIFEST)
        if version == handover.version or not storage.exists(uri):
            continue
        if read_manifest(uri)["run_date"] == handover.run_date.isoformat():
            raise ConflictError(
                f"campaign {handover.campaign_id}, {handover.run_date}: version {version} was handed over "
                f"already, {handover.version} would mail its users again; prepare it for another run date"
            )


def _claim(handover: Handover) -> None:
    """Reserve the campaign's run date for this version and folder; the first claim stays."""
    uri = storage.join(_claims(handover.root_uri, handover.campaign_id), f"{handover.run_date}.json")
    claim = {"version": handover.version, "folder": handover.folder}
    if handover.table:
        claim |= {"bigquery_table": handover.table, "bigquery_location": handover.table_location}
    try:
        storage.create(uri, json.dumps(claim, indent=1, sort_keys=True).encode(), handover.run_id)
    except ConflictError as error:
        first = json.loads(storage.read_bytes(uri))
        places = [
            f"{place} and {table}" if table else place
            for place, table in (
                (first["folder"], first.get("bigquery_table")),
                (handover.folder, handover.table),
            )
        ]
        raise ConflictError(
            f"campaign {handover.campaign_id}, {handover.run_date}: version {first['version']} is handed "
            f"over to {places[0]}; {handover.version} in {places[1]} would mail its users again. "
            "Go on with the first one, or prepare the campaign for another run date"
        ) from error


def required(warehouse: Warehouse | None, table: str) -> Warehouse:
    """The warehouse that a table needs.

    Raises:
        ConfigError: there is none.
    """
    if warehouse is None:
        raise ConfigError(f"table {table} cannot be reached from here; run the job that has BigQuery")
    return warehouse


def claimed_tables(root_uri: str) -> dict[str, tuple[str, str]]:
    """Table and its location by the folder of the list, of every hand-over that was begun with a table."""
    found = {}
    for campaign in storage.list_names(_claims(root_uri)):
        place = _claims(root_uri, campaign)
        for name in storage.list_names(place):
            claim = json.loads(storage.read_bytes(storage.join(place, name)))
            if "bigquery_table" in claim:
                found[str(claim["folder"])] = str(claim["bigquery_table"]), str(claim["bigquery_location"])
    return found


def _claims(root_uri: str, *campaign_id: str) -> str:
    return storage.join(root_uri, "handovers", *campaign_id)


def _fire(handover: Handover, point: str) -> None:
    faults.fire(handover.root_uri, _JOB, point, handover.run_date)


def _check_ids(found: Recipients) -> None:
    """Ids only, each once.

    Raises:
        DataError: see above.
    """
    mailed = {row[0] for row in found.rows}
    ids = [*found.seeds, *(text for row in found.rows for text in (row[0], row[3] or ""))]
    if any("@" in text for text in ids):
        raise DataError("audience: an id holds '@'; mail addresses must not enter, nothing handed over")
    if mailed & set(found.seeds) or len(set(found.seeds)) < len(found.seeds):
        raise DataError(
            "audience: a seed account is a recipient, or a seed twice; correct export.seed_user_ids"
        )


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a list.

    Raises:
        DataError: it does not exist, or is damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(uri))
        missing = {"file", "sha256", "num_recipients", "num_withdrawn", "run_date"} - set(manifest)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{uri} is no manifest ({error}); someone has changed it, stop the mailing"
        ) from error
    if missing:
        raise DataError(f"{uri} lacks {sorted(missing)[0]}; someone has changed it, stop the mailing")
    return manifest


def _note_uri(root_uri: str, kind: str, campaign_id: str, version: str) -> str:
    return storage.join(root_uri, kind, campaign_id, f"{version}.json")


def _leave_note(root_uri: str, kind: str, campaign_id: str, version: str, note: dict[str, str]) -> None:
    decisions = [
        record.facts
        for record in runs.load_all(root_uri, "select_audience")
        if record.status == "ok"
        and record.facts.get("campaign_id") == campaign_id
        and record.facts.get("version") == version
    ]
    if not decisions:
        raise DataError(
            f"campaign {campaign_id}: no selection has decided version {version}; see `couponflow status`"
        )
    uri = _note_uri(root_uri, kind, campaign_id, version)
    if not storage.exists(uri):
        seen = {name: decisions[-1].get(name) for name in ("mailed_users", "expected_cost_amount")}
        content = {"campaign_id": campaign_id, "version": version, **note, **seen}
        storage.create(uri, json.dumps(content, indent=1, sort_keys=True).encode(), "command line")


def _facts(handover: Handover, manifest: dict[str, Any], already_exported: bool) -> dict[str, Any]:
    return {
        "campaign_id": handover.campaign_id,
        "version": handover.version,
        "folder": handover.folder,
        "file": storage.join(handover.folder, str(manifest["file"])),
        "manifest": storage.join(handover.folder, MANIFEST),
        "num_recipients": manifest["num_recipients"],
        "num_withdrawn": manifest["num_withdrawn"],
        "num_seeds": manifest.get("num_seeds", 0),
        "bigquery_table": manifest.get("bigquery_table", ""),
        "sha256": manifest["sha256"],
        "already_exported": already_exported,
    }
