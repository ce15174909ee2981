"""From the deploy files and one environment to checked requests of Dataproc; nothing is sent from here.

``deploy/{clusters,autoscaling,workflows}/*.yaml`` hold what is the same everywhere, ``deploy/env/*.toml``
what differs. ``render`` joins them: the same files, environment and release give the same trees. ``check``
asks the library's types (``spec_shape``), then our rules (``spec_rules``), then what several files have to
agree on. ``message`` is the type that the client sends, of a spec without findings.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from couponflow.cloud import spec_rules, spec_shape
from couponflow.cloud.cluster_rules import seconds
from couponflow.cloud.rendering import Finding, Place, fill, parse, read_text
from couponflow.clouding import CloudConfig
from couponflow.config import Config, load_config
from couponflow.errors import ConfigError
from couponflow.prices import HourlyPrice, hourly_price

DEPLOY = Path("deploy")
_RELEASE = re.compile(r"[a-z0-9]{7,40}", re.ASCII)
_EMBEDDED = "placement.managedCluster.config"


@dataclass(frozen=True)
class Environment:
    """One environment: its file, its config, and the section that only a deployed one has."""

    file: str
    config: Config
    cloud: CloudConfig


@dataclass(frozen=True)
class Spec:
    """One deploy file as rendered for an environment; ``findings`` are what kept it from being rendered."""

    kind: str
    name: str
    place: Place
    tree: dict[str, Any]
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a file (nothing: it is valid), and what its cluster would cost by list prices.

    ``run_amount``: a workflow at its largest size for its longest time.
    """

    file: str
    findings: tuple[Finding, ...]
    rendered: dict[str, Any]
    price: HourlyPrice | None = None
    run_amount: float | None = None


def load_environment(name: str, folder: Path = DEPLOY) -> Environment:
    """The environment of a name, ``deploy/env/NAME.toml``, or of a file.

    Raises:
        ConfigError: no such file, a value that is refused, or no [cloud] in it.
    """
    is_name = re.fullmatch("[A-Za-z0-9_-]+", name) is not None
    path = folder / "env" / f"{name}.toml" if is_name else Path(name)
    if is_name and not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml")))
        raise ConfigError(f"environment {name!r}: no file {path}; one of {known or 'none here'}")
    config = load_config(path)
    if config.cloud is None:
        raise ConfigError(
            f"{path}: has no [cloud], so nothing of it runs on Dataproc; see deploy/env/dev.toml"
        )
    return Environment(path.as_posix(), config, config.cloud)


def placeholders(cloud: CloudConfig, release: str) -> dict[str, Any]:
    """What the specs may name: the texts and counts of [cloud] by dotted name, what follows from them, and
    the release: the hash under which a version's files were uploaded.

    Raises:
        ConfigError: no such release can be.
    """
    if not _RELEASE.fullmatch(release):
        raise ConfigError(
            f"release {release!r}: expected 7 to 40 of a-z and 0-9; take the hash of the upload"
        )
    tree = cloud.model_dump(mode="json", exclude={"prices", "budget_per_run_amount", "endpoint"})
    computed = {
        "release": release,
        "etl.zone_uri": cloud.etl.zone_uri,
        "gpu.zone_uri": cloud.gpu.zone_uri,
        "gpu.executor_cores": cloud.gpu.executor_cores,
        "gpu.num_ranks": cloud.gpu.num_ranks,
    }
    return {**dict(_leaves(tree, "")), **computed}


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def render(cloud: CloudConfig, release: str, folder: Path = DEPLOY) -> list[Spec]:
    """Every spec, filled for an environment; a workflow holds its cluster, which ``{clusters.NAME}`` names.

    Raises:
        ConfigError: no spec is there, or one cannot be read.
    """
    values = placeholders(cloud, release)
    found = []
    for kind in spec_shape.KINDS:  # clusters first
        for path in sorted((folder / kind).glob("*.yaml")):
            place = Place(path.as_posix())
            tree, wrong = parse(read_text(path), place)
            if kind == "workflows" and not wrong:
                wrong = _inlined(tree, place)
            if not wrong:
                tree, wrong = fill(tree, values, place)
            if kind == "clusters":
                values[f"clusters.{path.stem}"] = tree
            found.append(Spec(kind, path.stem, place, tree, tuple(wrong)))
    if not found:
        raise ConfigError(f"{folder}: holds no spec; call from the project's root")
    return found


def _inlined(template: dict[str, Any], place: Place) -> list[Finding]:
    """A cluster written into a workflow, where the rules for clusters would not look."""
    node: Any = template
    for name in _EMBEDDED.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, str) and re.fullmatch(r"\{clusters\.[a-z0-9_-]+\}", node):
        return []
    return [place.finding(_EMBEDDED, "is not a cluster of deploy/clusters", 'write "{clusters.NAME}"')]


def message(spec: Spec) -> Any:
    """A spec as the type that the Dataproc client sends.

    Raises:
        ConfigError: the spec has findings; ``check`` lists them.
    """
    findings = spec.findings or tuple(spec_shape.check(spec.kind, spec.tree, spec.place))
    if findings:
        raise ConfigError("; ".join(map(str, findings)))
    return spec_shape.parsed(spec.kind, spec.tree)


def importable(cloud: CloudConfig, release: str, folder: Path = DEPLOY) -> dict[str, str]:
    """Every spec as `gcloud dataproc ... import --source` reads it, by file name, such as clusters/etl.json.

    What is imported as a cluster is more than its config: the labels say whose it is.

    Raises:
        ConfigError: as ``render``.
    """
    labels = {"app": "couponflow", "environment": cloud.environment, **cloud.labels}
    return {
        f"{spec.kind}/{spec.name}.json": json.dumps(
            {"labels": labels, "config": spec.tree} if spec.kind == "clusters" else spec.tree, indent=1
        )
        + "\n"
        for spec in render(cloud, release, folder)
    }


def check(environment: Environment, release: str, folder: Path = DEPLOY) -> list[Verdict]:
    """A verdict on the environment's file and on every spec rendered for it.

    Raises:
        ConfigError: no spec is there, or one cannot be read.
    """
    cloud = environment.cloud
    specs = render(cloud, release, folder)
    shaped = {spec.place.file: _shape(spec) for spec in specs}
    broken = [spec.tree for spec in specs if spec.kind == "clusters" and shaped[spec.place.file]]
    policies = {
        spec.tree.get("id"): spec.tree
        for spec in specs
        if spec.kind == "autoscaling" and not shaped[spec.place.file]
    }
    verdicts = [Verdict(environment.file, tuple(_agreement(environment)), {})]
    for spec in specs:
        findings = shaped[spec.place.file]
        if findings or any(_cluster(spec) is tree for tree in broken):  # rules read what the types accept
            verdicts.append(Verdict(spec.place.file, tuple(findings), spec.tree))
            continue
        findings = spec_rules.check(spec.kind, spec.tree, spec.place, cloud)
        is_priced = spec.kind != "autoscaling"
        plain = Verdict(spec.place.file, tuple(findings), spec.tree)
        verdicts.append(_priced(spec, findings, policies, cloud) if is_priced else plain)
    return verdicts


def _cluster(spec: Spec) -> dict[str, Any]:
    """The cluster that a spec is or holds, as rendered; empty where there is none."""
    if spec.kind != "workflows":
        return spec.tree if spec.kind == "clusters" else {}
    node: Any = spec.tree
    for name in _EMBEDDED.split("."):
        node = node.get(name, {}) if isinstance(node, dict) else {}
    return node if isinstance(node, dict) else {}


def _shape(spec: Spec) -> list[Finding]:
    """What kept a spec from being rendered, or what the types refuse; a cluster's own file says its part."""
    if spec.findings:
        return list(spec.findings)
    found = spec_shape.check(spec.kind, spec.tree, spec.place)
    return [one for one in found if spec.kind != "workflows" or not one.field.startswith(_EMBEDDED)]


def _agreement(environment: Environment) -> Iterator[Finding]:
    """What the sections of an environment have to agree on."""
    config, cloud = environment.config, environment.cloud
    place = Place(environment.file)
    lake = f"gs://{cloud.buckets.lake}/"
    if not config.lake.root_uri.startswith(lake):
        yield place.finding(
            "lake.root_uri", f"{config.lake.root_uri} is not in the lake's bucket", f"begin with {lake}"
        )
    if not config.export.target_uri.startswith("gs://"):
        yield place.finding(
            "export.target_uri", f"{config.export.target_uri} ends with its cluster", "name a gs:// prefix"
        )
    if config.training.num_ranks != cloud.gpu.num_ranks:
        yield place.finding(
            "training.num_ranks",
            f"{config.training.num_ranks} ranks on {cloud.gpu.num_ranks} GPUs",
            f"write {cloud.gpu.num_ranks}, cloud.gpu.num_workers x cloud.gpu.gpus_per_worker",
        )
    if config.training.launcher != "spark":
        yield place.finding(
            "training.launcher", "ranks would run on the master, which has no GPU", 'write "spark"'
        )
    if config.events.pseudonymise and not config.events.key_secret:
        yield place.finding(
            "events.key_secret",
            "jobs on Dataproc find no pseudonym key in a variable",
            "name a secret's version, projects/P/secrets/S/versions/N (deploy/iam/setup.sh makes the secret)",
        )


def _priced(
    spec: Spec, findings: list[Finding], policies: dict[Any, dict[str, Any]], cloud: CloudConfig
) -> Verdict:
    """The verdict on a spec with a cluster, its price, and whether a run of it stays in the budget."""
    is_workflow = spec.kind == "workflows"
    cluster = _cluster(spec)
    policy_id = cluster.get("autoscalingConfig", {}).get("policyUri", "").rpartition("/")[2]
    if policy_id and policy_id not in policies and not is_workflow:
        known = ", ".join(map(str, policies)) or "none that is valid"
        findings.append(
            spec.place.finding(
                "autoscalingConfig.policyUri",
                f"no policy {policy_id!r} in deploy/autoscaling",
                f"one of {known}",
            )
        )
    secondaries = policies.get(policy_id, {}).get("secondaryWorkerConfig", {}).get("maxInstances", 0)
    try:
        price = hourly_price(cluster, cloud, secondaries)
    except ConfigError as error:
        if not is_workflow:
            findings.append(spec.place.finding("", str(error), "or take another machine"))
        return Verdict(spec.place.file, tuple(findings), spec.tree)
    longest = seconds(spec.tree.get("dagTimeout")) if is_workflow else None
    if longest is None:
        return Verdict(spec.place.file, tuple(findings), spec.tree, price)
    amount = price.most * longest / 3600
    if amount > cloud.budget_per_run_amount:
        findings.append(
            spec.place.finding(
                "dagTimeout",
                f"a run may cost {amount:.2f} {cloud.prices.currency}, above "
                f"cloud.budget_per_run_amount = {cloud.budget_per_run_amount:.2f}",
                "lower it or the cluster, or raise the budget of this environment",
            )
        )
    return Verdict(spec.place.file, tuple(findings), spec.tree, price, amount)
