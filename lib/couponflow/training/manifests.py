"""A dataset as its manifest: what training may read, and what of it can still be read.

A manifest is an object: the files of one version of ``training_examples`` with the rows of each split and of
each row group in them, written by the job that builds the examples. A versioned one promises that its files
can be read. VACUUM removes files; a manifest that names such a file is removed before it, so that training on
that version is refused by name instead of in the middle.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import unquote, urlparse

from couponflow.errors import ConfigError, DataError
from couponflow.lake import layouts, schemas, storage
from couponflow.training import reader

TABLE = "training_examples"
#: What a network is trained on.
COLUMNS = ("split", "vocabulary_version", "history", "negatives", "target", "wide", "label")
_ARROW_TYPES = {
    "string": ("string",),
    "binary": ("binary",),
    "int": ("int32",),
    "timestamp": ("timestamp[ns]", "timestamp[us]", "timestamp[us, tz=UTC]"),
}


@dataclass(frozen=True)
class Dataset:
    """Files of one table version.

    ``files`` maps a split to {file URI: rows of the split in it}, ``row_groups`` a file URI to the rows of
    its row groups. ``sampling_rate`` is the share of training negatives that was kept; ``folds`` are the
    cut-offs of the back-test with the rows that train and test each.
    """

    table_version: int
    vocabulary_version: str
    vocabulary_sizes: dict[str, int]
    wide_features: tuple[str, ...]
    files: dict[str, dict[str, int]]
    row_groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sampling_rate: float = 1.0
    folds: tuple[dict[str, Any], ...] = ()

    def rows(self, split: str) -> int:
        """Rows of a split over all files."""
        return sum(self.files.get(split, {}).values())

    def shard_rows(self, uris: Sequence[str], size: int) -> list[int]:
        """Rows of each of ``size`` shards of these files, all splits; row group n belongs to n mod size."""
        groups = [rows for uri in uris for rows in self.row_groups[uri]]
        return [sum(groups[rank::size]) for rank in range(size)]


def write(root_uri: str, dataset: Dataset, run_id: str) -> str:
    """Publish what training may read; returns the URI of the versioned manifest.

    Rows per row group are read off the files' footers, unless the dataset brings them.
    Writes ``datasets/training_examples-v<version>.json`` once, then moves the pointer
    ``datasets/training_examples.json``.

    Raises:
        DataError: a file is missing or damaged, or holds other rows than the snapshot.
    """
    files = {split: dict(sorted(named.items())) for split, named in sorted(dataset.files.items())}
    if not dataset.row_groups:
        uris = sorted({uri for named in files.values() for uri in named})
        row_groups = {uri: reader.row_groups(_footer(dataset, uri)) for uri in uris}
        dataset = replace(dataset, row_groups=row_groups)
        for uri in uris:
            _check_rows(dataset, uri, row_groups[uri])
    dataset = replace(dataset, files=files)
    content = json.dumps({"table": TABLE, **asdict(dataset)}, indent=1, sort_keys=True).encode()
    uri = storage.join(root_uri, "datasets", f"{TABLE}-v{dataset.table_version}.json")
    storage.create(uri, content, run_id)
    pointer = _pointer(root_uri)
    held = storage.read_bytes(pointer) if storage.exists(pointer) else None
    storage.replace(pointer, content, held)
    return uri


def load(root_uri: str, table_version: int | None = None) -> Dataset:
    """The newest manifest, or that of one table version.

    Raises:
        DataError: there is none, it is damaged, or its aggregates are those of other code.
    """
    name = TABLE if table_version is None else f"{TABLE}-v{table_version}"
    uri = storage.join(root_uri, "datasets", f"{name}.json")
    try:
        tree = json.loads(storage.read_bytes(uri))
        dataset = Dataset(
            int(tree["table_version"]),
            str(tree["vocabulary_version"]),
            {str(key): int(size) for key, size in tree["vocabulary_sizes"].items()},
            tuple(tree["wide_features"]),
            {split: {str(u): int(n) for u, n in named.items()} for split, named in tree["files"].items()},
            {str(u): tuple(int(n) for n in sizes) for u, sizes in tree["row_groups"].items()},
            float(tree["sampling_rate"]),
            tuple(dict(fold) for fold in tree["folds"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{uri} is no dataset manifest ({error!r}); run build_examples again") from error
    if dataset.wide_features != layouts.WIDE_FEATURES:
        raise DataError(
            f"{uri} lists {len(dataset.wide_features)} aggregates that differ from the "
            f"{len(layouts.WIDE_FEATURES)} of this code; run build_examples again"
        )
    return dataset


def _footer(dataset: Dataset, uri: str) -> Any:
    try:
        return reader.read_footer(uri)
    except FileNotFoundError as error:
        raise DataError(
            f"{uri} of {TABLE} version {dataset.table_version} does not exist (vacuumed?); "
            "run build_examples again"
        ) from error


def _check_rows(dataset: Dataset, uri: str, groups: tuple[int, ...]) -> None:
    """A file must hold the snapshot's rows and no other: Petastorm reads rows that Delta has only marked."""
    expected = sum(named.get(uri, 0) for named in dataset.files.values())
    if sum(groups) != expected:
        raise DataError(
            f"{uri} holds {sum(groups)} rows, {TABLE} version {dataset.table_version} {expected} of them: "
            "rows are deleted by deletion vectors or the file was changed; rewrite it (REORG ... APPLY "
            "(PURGE)) or run build_examples again"
        )
    if groups != dataset.row_groups.get(uri):
        raise DataError(
            f"{uri} has row groups of {list(groups)} rows, the manifest says "
            f"{list(dataset.row_groups.get(uri, ()))}; the file was rewritten, run build_examples again"
        )


def check(dataset: Dataset, split: str, num_ranks: int = 1, columns: Sequence[str] = COLUMNS) -> None:
    """Open every footer of a split before anything is read.

    Raises:
        DataError: no rows, a file that is missing or damaged, other rows than the manifest (deletion vectors
            included), a column that is missing or of another type, or pickled metadata.
        ConfigError: fewer row groups than ranks.
    """
    if not dataset.rows(split):
        raise DataError(
            f"{TABLE} version {dataset.table_version} has no rows of split {split}; "
            "widen the dates of build_examples"
        )
    uris = list(dataset.files[split])
    check_files(dataset, uris, columns)
    num_groups = sum(len(dataset.row_groups[uri]) for uri in uris)
    if num_groups < num_ranks:
        raise ConfigError(
            f"split {split} of {TABLE} version {dataset.table_version} has {num_groups} row groups, need >= "
            f"{num_ranks} for {num_ranks} ranks; lower training.num_ranks or rebuild with fewer rows per file"
        )


def check_files(dataset: Dataset, uris: Sequence[str], columns: Sequence[str]) -> None:
    """The part of ``check`` that is about files and columns, whatever the split."""
    declared = {column.name: column.type for column in schemas.TABLES[TABLE].columns}
    for uri in uris:
        footer = _footer(dataset, uri)
        _check_rows(dataset, uri, reader.row_groups(footer))
        found = {field.name: str(field.type) for field in footer.schema.to_arrow_schema()}
        for name in columns:
            wanted = _ARROW_TYPES[declared[name]]
            if found.get(name) not in wanted:
                raise DataError(
                    f"column {name} of {uri}: expected {wanted[0]}, found {found.get(name, 'nothing')}; "
                    "run build_examples again"
                )
    for folder in sorted({uri.rpartition("/")[0] for uri in uris}):
        reader.refuse_pickled_metadata(folder)


def current(root_uri: str) -> Dataset | None:
    """What training reads now; None before the first build."""
    return load(root_uri) if storage.exists(_pointer(root_uri)) else None


def renew(root_uri: str, counted: Mapping[str, Any], run_id: str) -> tuple[str, list[str]]:
    """Publish a manifest of a snapshot that has fewer rows, and retire all others.

    ``counted``: the fields of ``Dataset`` that were counted anew; all others, such as the vocabulary,
    are those of the manifest before, and row groups are read off the files. Returns its URI and what was
    removed.

    Raises:
        DataError: there is no manifest before.
    """
    before = load(root_uri)
    uri = write(root_uri, replace(before, **({"row_groups": {}} | dict(counted))), run_id)
    older = [found for found in _versioned(root_uri) if found != uri]
    for found in older:
        storage.remove(found)
    return uri, older


def retire(root_uri: str, gone: Collection[str], dry_run: bool) -> list[str]:
    """Remove the versioned manifests that name a file which will be gone, or is gone; returns them.

    ``gone``: files that are about to be removed, as paths or URIs.

    Raises:
        DataError: the manifest that training reads now names one, so nothing may be removed.
    """
    names = {_base_name(uri) for uri in gone}
    pointer = _pointer(root_uri)
    if storage.exists(pointer) and (lost := _lost(pointer, names)):
        raise DataError(
            f"{pointer} names {lost}, which is replaced and old enough to be removed; training would "
            "fail: run build_examples, then maintain again"
        )
    retired = [uri for uri in _versioned(root_uri) if _lost(uri, names)]
    for uri in [] if dry_run else retired:
        storage.remove(uri)
    return retired


def _lost(uri: str, names: set[str]) -> str:
    """The first file of a manifest that is, or will be, gone; empty if all stay."""
    try:
        files = json.loads(storage.read_bytes(uri))["files"].values()
        listed = sorted({file for of_split in files for file in of_split})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{uri} is no dataset manifest ({error!r}); run build_examples again") from error
    return next((file for file in listed if _base_name(file) in names or not _is_there(file)), "")


def _is_there(uri: str) -> bool:
    return storage.exists(uri if storage.is_remote(uri) else unquote(urlparse(uri).path))


def _base_name(uri: str) -> str:
    """Spark names files uniquely, and writes their folders in several ways."""
    return uri.rpartition("/")[2]


def _pointer(root_uri: str) -> str:
    return storage.join(root_uri, "datasets", f"{TABLE}.json")


def _versioned(root_uri: str) -> list[str]:
    folder = storage.join(root_uri, "datasets")
    names = [name for name in storage.list_names(folder) if name.startswith(f"{TABLE}-v")]
    return [storage.join(folder, name) for name in names]
