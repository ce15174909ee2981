"""Erasure in the lists that were handed over: the copies under the export target lose the person.

The mail system has its own copy: a hand-over cannot be undone here, and what was handed over stays so. A
list is never overwritten: a new file beside it, then the table that was loaded from it, then the manifest
that names both, then the old file goes. The table of a list without a manifest is dropped.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from couponflow.campaign import export
from couponflow.errors import DataError
from couponflow.lake import storage


def prune(
    target_uri: str,
    is_erased: Callable[[str], bool],
    run_id: str,
    dry_run: bool = False,
    warehouse: export.Warehouse | None = None,
    begun: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, int]:
    """Take erased people out of every list below the target; returns the rows gone per campaign version.

    The manifest takes the new file, counts and checksum, and notes the erasure. A list without a manifest, or
    beside the one that it names, was left by a run that died, and is removed. ``begun`` tells its table, as
    ``export.claimed_tables``; ``warehouse`` is where tables are.

    Raises:
        ConfigError: a list has a table, and no warehouse was given.
        DataError: a list differs from its manifest: somebody else has changed it.
        ConflictError: another run changed the manifest meanwhile.
    """
    counts: dict[str, int] = {}
    for campaign in storage.list_names(target_uri):
        for version in storage.list_names(storage.join(target_uri, campaign)):
            folder = storage.join(target_uri, campaign, version)
            gone = _prune_folder(folder, is_erased, run_id, dry_run, warehouse, begun or {})
            counts.update({f"list {campaign}/{version}": gone} if gone else {})
    return counts


def _prune_folder(
    folder: str,
    is_erased: Callable[[str], bool],
    run_id: str,
    dry_run: bool,
    warehouse: export.Warehouse | None,
    begun: Mapping[str, tuple[str, str]],
) -> int:
    uri = storage.join(folder, export.MANIFEST)
    held = storage.read_bytes(uri) if storage.exists(uri) else None
    manifest: dict[str, Any] = export.read_manifest(uri) if held else {}
    num_gone, left_over = 0, []
    for name in storage.list_names(folder):
        if not name.endswith(".csv"):
            continue
        file = storage.join(folder, name)
        content = storage.read_bytes(file)
        kept, found, num_seeds = _without(content, is_erased)
        if not found:
            continue
        num_gone += found
        left_over.append(file)
        if dry_run or held is None or name != manifest["file"]:
            continue
        if storage.sha256(content) != manifest["sha256"]:
            raise DataError(
                f"{folder}: the list has another checksum than its manifest; someone has changed it, "
                "stop the mailing, restore the list, then erase again"
            )
        digest = storage.sha256(kept)
        new_name = f"{export.FILE.removesuffix('.csv')}-{digest[:8]}.csv"
        storage.create(storage.join(folder, new_name), kept, run_id)
        manifest |= {
            "file": new_name,
            "sha256": digest,
            "num_recipients": manifest["num_recipients"] - (found - num_seeds),
            "num_seeds": manifest.get("num_seeds", 0) - num_seeds,
            "erasures": [*manifest.get("erasures", []), {"run_id": run_id, "num_rows": found}],
        }
        if table := manifest.get("bigquery_table"):
            export.required(warehouse, table).replace_audience(kept, manifest)
        storage.replace(uri, json.dumps(manifest, indent=1, sort_keys=True).encode(), held)
    if left_over and held is None and folder in begun and not dry_run:
        table, location = begun[folder]
        export.required(warehouse, table).drop_table(table, location)
    for file in [] if dry_run else left_over:
        storage.remove(file)
    return num_gone


def _without(content: bytes, is_erased: Callable[[str], bool]) -> tuple[bytes, int, int]:
    """The list without erased people, how many rows those were, and how many of them were seeds."""
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    if not rows or "user_id" not in rows[0]:
        return content, 0, 0
    place = rows[0].index("user_id")
    seed = rows[0].index("is_seed") if "is_seed" in rows[0] else None
    gone = [row for row in rows[1:] if is_erased(row[place])]
    if not gone:
        return content, 0, 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(row for row in rows[1:] if not is_erased(row[place]))
    num_seeds = sum(row[seed] == "true" for row in gone) if seed is not None else 0
    return text.getvalue().encode(), len(gone), num_seeds
