"""Erasure in the lists that were handed over: the copies under the export target lose the person.

The mail system has its own copy: a hand-over cannot be undone here, and what was handed over stays so. A
list is never overwritten: a new file beside it, then the manifest that names it, then the old one goes.
"""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

from couponflow.campaign import export
from couponflow.errors import DataError
from couponflow.lake import storage


def prune(
    target_uri: str, is_erased: Callable[[str], bool], run_id: str, dry_run: bool = False
) -> dict[str, int]:
    """Take erased people out of every list below the target; returns the rows gone per campaign version.

    The manifest takes the new file, count and checksum, and notes the erasure. A list without a manifest, or
    beside the one that it names, was left by a run that died, and is removed.

    Raises:
        DataError: a list differs from its manifest: somebody else has changed it.
        ConflictError: another run changed the manifest meanwhile.
    """
    counts: dict[str, int] = {}
    for campaign in storage.list_names(target_uri):
        for version in storage.list_names(storage.join(target_uri, campaign)):
            folder = storage.join(target_uri, campaign, version)
            gone = _prune_folder(folder, is_erased, run_id, dry_run)
            counts.update({f"list {campaign}/{version}": gone} if gone else {})
    return counts


def _prune_folder(folder: str, is_erased: Callable[[str], bool], run_id: str, dry_run: bool) -> int:
    uri = storage.join(folder, export.MANIFEST)
    held = storage.read_bytes(uri) if storage.exists(uri) else None
    manifest: dict[str, Any] = export.read_manifest(uri) if held else {}
    num_gone, left_over = 0, []
    for name in storage.list_names(folder):
        if not name.endswith(".csv"):
            continue
        file = storage.join(folder, name)
        content = storage.read_bytes(file)
        kept, found = _without(content, is_erased)
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
            "num_recipients": manifest["num_recipients"] - found,
            "erasures": [*manifest.get("erasures", []), {"run_id": run_id, "num_rows": found}],
        }
        storage.replace(uri, json.dumps(manifest, indent=1, sort_keys=True).encode(), held)
    for file in [] if dry_run else left_over:
        storage.remove(file)
    return num_gone


def _without(content: bytes, is_erased: Callable[[str], bool]) -> tuple[bytes, int]:
    """The list without erased people, and how many those were."""
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    if not rows or "user_id" not in rows[0]:
        return content, 0
    place = rows[0].index("user_id")
    kept = [row for row in rows[1:] if not is_erased(row[place])]
    if len(kept) == len(rows) - 1:
        return content, 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(kept)
    return text.getvalue().encode(), len(rows) - 1 - len(kept)
