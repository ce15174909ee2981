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
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Protocol

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign import contact_rules, eligibility
from couponflow.campaign.recipients import COLUMNS, Recipients, check_ids, recipients, render, seeds_of
from couponflow.campaigning import ExportConfig, SelectionConfig
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import erased, faults, runs, storage

EXPORT_SCHEMA_VERSION = 2
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
        ConfigError: not approved, or recalled, or the run date is a quiet day.
        DataError: consent is missing, stale or too small, the tables disagree, or a list was tampered with.
        ConflictError: another version of this run date was handed over, or this one to another place.
    """
    check_approval(handover, export.auto_approve)
    done = finished(handover)
    if done is not None:
        return done
    contact_rules.check_quiet_day(handover.run_date, section.quiet_days)
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


def num_listed(manifest: Mapping[str, Any]) -> int:
    """Rows of a list: its recipients and its seeds, of which older lists have none."""
    return int(manifest["num_recipients"]) + int(manifest.get("num_seeds", 0))


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
    check_ids(found)
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
