"""Imports point one way; each outside system has one door; nothing reaches pyspark and torch together."""

import ast
from functools import cache
from pathlib import Path

LIB = Path(__file__).parents[2] / "lib" / "couponflow"

#: Layer of a module or folder, the longest name counts. Imports go to a strictly lower layer, or to a
#: neighbour in the same folder.
LAYERS = {
    "errors": 0,
    "dates": 1,
    # Declarations in plain Python, against which the config is checked.
    "lake.layouts": 1,
    "lake.declarations": 1,
    "lake.schemas": 1,
    "lake.contracts": 1,
    "values": 2,
    "sections": 3,
    "campaigning": 3,
    "clouding": 3,
    "world": 3,
    "mappings": 3,
    "modelling": 3,
    "config": 4,
    "prices": 4,
    "lake": 5,
    "scopes": 6,
    "campaign_file": 6,
    "costs": 6,
    "entry": 7,
    "sources": 7,
    "sequences": 7,
    "models": 7,
    "training": 8,
    "campaign.choice": 9,
    "campaign.scores": 9,
    "campaign.readouts": 10,
    "campaign.pages": 11,
    "campaign": 12,
    "monitoring": 12,
    "pipeline": 13,
    "erasing": 13,
    "cloud": 14,
    "maintenance": 13,
    "backfill_plan": 13,
    "backfill": 14,
    "commands": 15,
    "console": 15,
    "remote_backfill": 15,
    "checks": 16,
    "submit_commands": 16,
    "upkeep": 16,
    "model_commands": 16,
    "explanations": 16,
    "campaign_commands": 16,
    "cli": 17,
}

#: Heavy packages that a module or folder may import at module level; anything else is refused there.
AT_TOP = {
    "values": {"pydantic"},
    "sections": {"pydantic"},
    "campaigning": {"pydantic"},
    "clouding": {"pydantic"},
    "world": {"pydantic"},
    "mappings": {"pydantic"},
    "modelling": {"pydantic"},
    "config": {"pydantic"},
    "campaign_file": {"pydantic"},
    "entry": {"typer"},
    "cli": {"typer", "rich", "pydantic"},
    "console": {"rich"},
    "commands": {"typer"},
    "checks": {"typer"},
    "submit_commands": {"typer"},
    "upkeep": {"typer"},
    "model_commands": {"typer"},
    "explanations": {"typer"},
    "campaign_commands": {"typer"},
    "lake.tables": {"pyspark", "delta"},
    "lake.session": {"pyspark"},
    "lake.literals": {"pyspark"},
    "lake.failures": {"pyspark", "py4j"},
    "lake.erasure": {"pyspark"},
    "lake.upkeep": {"pyspark"},
    "lake.migrations": {"pyspark"},
    "sources": {"numpy", "pandas", "pyarrow"},
    "sequences": {"pyspark", "numpy", "pandas", "pyarrow"},
    "models": {"torch", "numpy", "pydantic"},
    "training": {"torch", "numpy", "pyarrow"},
    "campaign": {"pyspark", "numpy", "pandas", "pyarrow"},
    "monitoring": {"pyspark"},
}

#: Packages that only the named modules may import anywhere, inside functions too.
DOORS = {
    "delta": {"lake.tables"},
    "google": {"lake.storage", "lake.secret_store", "cloud.bigquery", "cloud.spec_shape", "cloud.dataproc"},
    "grpc": {"cloud.dataproc"},
    "yaml": {"cloud.rendering"},
    "petastorm": {"training.reader"},
    "gcsfs": {"training.reader"},
    "horovod": {"training.workers", "training.spark_launch"},
    "tomllib": {"config", "campaign_file"},
}

HEAVY = {
    "pyspark",
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "delta",
    "petastorm",
    "horovod",
    "sklearn",
    "scipy",
} | {
    "matplotlib",
    "jinja2",
    "typer",
    "rich",
    "pydantic",
    "google",
    "gcsfs",
    "py4j",
    "yaml",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(LIB).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(LIB.rglob("*.py")) if path.name != "__init__.py"}


@cache
def imports(name: str) -> tuple[tuple[str, bool, int], ...]:
    """Each import of a module: dotted name, whether at module level, line."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import; write it in full"
            if node.module == "couponflow" or f"{node.module}".removeprefix("couponflow.") in FOLDERS:
                found += [
                    (f"{node.module}.{alias.name}", id(node) in top, node.lineno) for alias in node.names
                ]
            else:
                found.append((str(node.module), id(node) in top, node.lineno))
    return tuple(found)


FOLDERS = {name.rpartition(".")[0] for name in MODULES if "." in name}


def ours(name: str) -> list[tuple[str, bool, int]]:
    inner = [
        (i.removeprefix("couponflow."), top, line)
        for i, top, line in imports(name)
        if i.startswith("couponflow.")
    ]
    return [(i, top, line) for i, top, line in inner if i in MODULES]


def layer(name: str) -> int:
    while name not in LAYERS:
        name = name.rpartition(".")[0]
    return LAYERS[name]


def folder(name: str) -> str:
    return name.rpartition(".")[0]


def permitted(table: dict[str, set[str]], name: str) -> set[str]:
    return table.get(name, table.get(name.split(".")[0], set()))


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[0] for name in MODULES} <= set(LAYERS)


def test_imports_go_down() -> None:
    wrong = [
        f"{name}:{line} imports {other}"
        for name in MODULES
        for other, _, line in ours(name)
        if not (layer(other) < layer(name) or ("." in name and folder(name) == folder(other)))
    ]
    assert not wrong, wrong


def test_no_module_imports_in_a_circle() -> None:
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other, _, _ in ours(name):
            visit(other, (*path, name))

    for name in MODULES:
        visit(name, ())


def test_python_workers_have_one_door() -> None:
    using = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("mapInArrow", "mapInPandas", "mapPartitions")
    }
    assert using == {"lake.python_tasks"}


def test_the_library_never_imports_jobs() -> None:
    wrong = [
        f"{name}:{line}" for name in MODULES for i, _, line in imports(name) if i.split(".")[0] == "jobs"
    ]
    assert not wrong, wrong


def test_heavy_packages_only_where_the_table_allows() -> None:
    wrong = [
        f"{name}:{line} imports {i} at module level"
        for name in MODULES
        for i, top, line in imports(name)
        if top and i.split(".")[0] in HEAVY and i.split(".")[0] not in permitted(AT_TOP, name)
    ]
    assert not wrong, wrong


def test_each_outside_system_has_one_door() -> None:
    wrong = [
        f"{name}:{line} imports {i}"
        for name in MODULES
        for i, _, line in imports(name)
        if i.split(".")[0] in DOORS and name not in DOORS[i.split(".")[0]]
    ]
    assert not wrong, wrong


def reached_at_import(name: str) -> set[str]:
    heavy = {i.split(".")[0] for i, top, _ in imports(name) if top and i.split(".")[0] in HEAVY}
    return heavy.union(*(reached_at_import(other) for other, top, _ in ours(name) if top))


def test_nothing_reaches_pyspark_and_torch_together() -> None:
    both = [name for name in MODULES if {"pyspark", "torch"} <= reached_at_import(name)]
    assert not both, both


def test_the_command_line_starts_light() -> None:
    assert reached_at_import("cli") <= {"pydantic", "typer", "rich"}
