"""The committed deploy files, rendered once per environment; tests change copies of them."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

from couponflow.cloud import specs
from couponflow.cloud.rendering import Finding

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
ENVIRONMENTS = ("ci", "dev", "prod")
RELEASE = "0123456789abcdef"
#: Every committed spec.
NAMES = tuple(
    f"{kind}/{path.stem}"
    for kind in ("clusters", "autoscaling", "workflows")
    for path in sorted((DEPLOY / kind).glob("*.yaml"))
)
#: In place of a value: the name goes away.
GONE = object()


@cache
def environment(name: str) -> specs.Environment:
    """One of the committed environments."""
    return specs.load_environment(name, DEPLOY)


@cache
def rendered(name: str) -> dict[str, specs.Spec]:
    """All specs of an environment by kind/name."""
    found = specs.render(environment(name).cloud, RELEASE, DEPLOY)
    return {f"{spec.kind}/{spec.name}": spec for spec in found}


def changed(tree: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    """A copy of a tree with another value at a path; a place that is not there yet is made."""
    made = copy.deepcopy(tree)
    node: Any = made
    for part in path[:-1]:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    if value is GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return made


def texts(findings: list[Finding]) -> str:
    """All findings, for the message of an assertion."""
    return "\n".join(map(str, findings))
