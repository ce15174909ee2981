"""The hand-over, exactly once: a list file, then its manifest. No manifest, no list.

``<target>/<campaign>/<version>/audience.csv`` and ``manifest.json`` are each created once; only an
erasure replaces them (``erasing``).
Both are pure functions of the version and of the consent known when it is handed over, so a run that dies
between them is simply run again, and two runs at once agree; where consent has changed in between, nothing
is handed over until a person has removed the unfinished file. A mail system reads a list only after its
manifest. Ids only: the address is joined there.

``<lake>/handovers/<campaign>/<run date>.json`` names the one version and folder that a day is handed over
to. It is created before the list, so neither two versions at once nor another target mail anyone twice.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from couponflow.campaign import assignment, contact_rules, eligibility
from couponflow.errors import ConfigError, ConflictError, DataError
from couponflow.lake import runs, storage
from couponflow.lake.erased import TOMBSTONE
from couponflow.sections import SelectionConfig

EXPORT_SCHEMA_VERSION = 1
COLUMNS = ("user_id", "campaign_id", "version", "coupon_id", "rank")
FILE, MANIFEST = "audience.csv", "manifest.json"


@dataclass(frozen=True)
class Handover:
    """Which version goes where, and the run that does it."""

    root_uri: str
    target_uri: str
    campaign_id: str
    version: str
    run_date: date
    run_id: str

    @property
    def folder(self) -> str:
        """Where list and manifest of this version lie."""
        return storage.join(self.target_uri, self.campaign_id, self.version)

    def note(self, kind: str) -> str:
        """Object on the lake that a person's ``approvals`` or ``recalls`` command has left."""
        return _note_uri(self.root_uri, kind, self.campaign_id, self.version)


@dataclass(frozen=True)
class Recipients:
    """The rows of a list, in the order of choice, and how many of the audience have withdrawn since."""

    rows: Sequence[tuple[str, str, str, str | None, int]]
    num_withdrawn: int


def export_audience(
    handover: Handover,
    audience: DataFrame,
    assignments: DataFrame,
    consents: DataFrame,
    users: DataFrame,
    section: SelectionConfig,
    auto_approve: bool,
) -> dict[str, Any]:
    """Hand a version over unless that is done already; returns the export facts.

    The frames are the whole tables, read lazily. Consent is checked again with the snapshots as they are
    now; who has withdrawn is dropped and counted as ``num_withdrawn``.

    Raises:
        ConfigError: not approved, or recalled, or the run date is a quiet day.
        DataError: consent is missing, stale or too small, the tables disagree, or a list was tampered with.
        ConflictError: another version of this run date was handed over, or this one to another place.
    """
    check_approval(handover, auto_approve)
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
    return hand_over(handover, recipients(audience.where(of_version), ledger, consent), str(decided_by))


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
    """
    uri = storage.join(handover.folder, MANIFEST)
    if not storage.exists(uri):
        return None
    manifest = read_manifest(uri)
    content = storage.read_bytes(storage.join(handover.folder, str(manifest["file"])))
    num_rows = content.count(b"\n") - 1  # the header
    if storage.sha256(content) != manifest["sha256"] or num_rows != manifest["num_recipients"]:
        raise DataError(
            f"{handover.folder}: the list has {num_rows} rows and another checksum than its manifest "
            f"({manifest['num_recipients']} rows); someone has changed it, stop the mailing and recall it"
        )
    return _facts(handover, manifest, already_exported=True)


def recipients(audience: DataFrame, ledger: DataFrame, consent: DataFrame) -> Recipients:
    """The users of a version who may still be mailed, by rank.

    Inputs: ``audience`` and ``ledger`` rows of the one version; ``consent`` of
    ``eligibility.consent_status``. A user who is not granted any more, or has no record, is left out and
    counted. The list is the deliverable, so it meets on the driver, streamed by partition.

    Raises:
        DataError: a user of the audience is not in the ledger as mailed (holdout, control, unknown), an id
            looks like a mail address, or the ledger mails someone whom the audience lacks.
    """
    named = ledger.where(~F.col("user_id").startswith(TOMBSTONE))  # an erased person is on no list
    arms = named.select("user_id", "arm").distinct()
    may_mail = consent.where(F.col("consent_reason").isNull()).select(
        "user_id", F.lit(True).alias("may_mail")
    )
    joined = (
        audience.join(arms, "user_id", "full")
        .where(F.col("rank").isNotNull() | F.col("arm").isin(*assignment.MAILED))
        .join(may_mail, "user_id", "left")
        .select("user_id", "campaign_id", "version", "coupon_id", "rank", "arm", "may_mail")
        .orderBy("rank", "user_id")
    )
    rows, num_withdrawn, seen = [], 0, set()
    for row in joined.toLocalIterator():
        if row["arm"] not in assignment.MAILED or row["rank"] is None:
            raise DataError(
                f"audience and ledger disagree: a user with arm {row['arm']} and rank {row['rank']}; "
                "nothing handed over, run select_audience again"
            )
        if "@" in row["user_id"] or "@" in (row["coupon_id"] or ""):
            raise DataError("audience: an id holds '@'; mail addresses must not enter, nothing handed over")
        if row["user_id"] in seen:
            raise DataError("audience: a user stands in it twice; run select_audience again")
        seen.add(row["user_id"])
        if row["may_mail"]:
            rows.append(tuple(row[name] for name in COLUMNS))
        else:
            num_withdrawn += 1
    return Recipients(rows, num_withdrawn)


def render(rows: Iterable[Sequence[Any]]) -> bytes:
    """The list as CSV: header, one line per recipient, ``\\n`` line ends, an absent coupon is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue().encode()


def hand_over(handover: Handover, found: Recipients, decided_by: str) -> dict[str, Any]:
    """Create the list, then the manifest; returns the facts.

    ``decided_by`` is the run that selected the version; the manifest holds nothing that differs between two
    hand-overs of one version.

    Raises:
        ConflictError: this version was written with other content, the day belongs to another version, or
            the version to another folder.
    """
    _claim(handover)
    content = render(found.rows)
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
        "sha256": storage.sha256(content),
    }
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    file = storage.join(handover.folder, FILE)
    try:
        storage.create(file, content, handover.run_id)
    except ConflictError as error:
        raise ConflictError(
            f"{file} was begun by another run with other content, as consent has changed since; run again. "
            "If this stays, that run has died: remove the file, which nobody reads without its manifest"
        ) from error
    storage.create(storage.join(handover.folder, MANIFEST), text, handover.run_id)
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
    uri = storage.join(
        handover.root_uri, "handovers", handover.campaign_id, f"{handover.run_date.isoformat()}.json"
    )
    claim = {"version": handover.version, "folder": handover.folder}
    try:
        storage.create(uri, json.dumps(claim, indent=1, sort_keys=True).encode(), handover.run_id)
    except ConflictError as error:
        first = json.loads(storage.read_bytes(uri))
        raise ConflictError(
            f"campaign {handover.campaign_id}, {handover.run_date}: version {first['version']} is handed "
            f"over to {first['folder']}; {handover.version} in {handover.folder} would mail its users again. "
            "Go on with the first one, or prepare the campaign for another run date"
        ) from error


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
        "sha256": manifest["sha256"],
        "already_exported": already_exported,
    }
