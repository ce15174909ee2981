"""Rules for cluster specs and autoscaling policies that the types of Dataproc do not know.

An ETL cluster keeps its shuffle on a fixed number of primaries, so spot secondaries may come and go; a GPU
cluster has GPU primaries only, of fixed size. Every cluster ends by itself, has no public address, runs as
the account of its duty on an image of a fixed name, and holds no secret in its properties, which anybody who
may look at a cluster can read. Pure functions of rendered trees that ``spec_shape`` has accepted.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from couponflow.cloud.rendering import Finding, Place
from couponflow.clouding import MAX_AGE_SECONDS, MIN_AGE_SECONDS, MIN_IDLE_SECONDS, CloudConfig

#: GPU types that image 2.3 can drive, and the machine family that carries each.
ACCELERATORS = {
    "nvidia-l4": "g2",
    "nvidia-tesla-a100": "a2",
    "nvidia-tesla-p100": "n1",
    "nvidia-tesla-p4": "n1",
    "nvidia-tesla-t4": "n1",
    "nvidia-tesla-v100": "n1",
}
#: A cluster property says whose file it goes to; a property of a job does not.
_PREFIXES = {
    *("capacity-scheduler", "core", "dataproc", "hadoop-env", "hdfs", "hive", "mapred", "spark"),
    *("spark-env", "yarn", "yarn-env"),
}
_EFM = "dataproc:efm.spark.shuffle"
_PINNED = re.compile(r"projects/[a-z0-9-]+/global/images/[a-z][a-z0-9-]*-20[0-9]{6}")
_SECRET = re.compile(r"secret|passw|token|credential|private.?key|api.?key|user.?key", re.IGNORECASE)
_GROUPS = ("masterConfig", "workerConfig", "secondaryWorkerConfig")


def check_cluster(place: Place, cluster: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    """All findings about a cluster."""
    yield from _lifetime(place, cluster)
    yield from _images(place, cluster)
    yield from _machines(place, cluster, cloud)
    yield from _gpus(place, cluster)
    yield from _scaling(place, cluster)
    yield from _software(place, cluster)
    yield from _identity(place, cluster, cloud)
    yield from _initialisation(place, cluster, cloud)


def check_policy(place: Place, policy: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    """All findings about an autoscaling policy."""
    primaries, secondaries = policy.get("workerConfig", {}), policy.get("secondaryWorkerConfig", {})
    least, most = primaries.get("minInstances"), primaries.get("maxInstances")
    if least != most or least is None:
        yield place.finding(
            "workerConfig",
            f"primaries from {least} to {most}",
            "give minInstances = maxInstances; they hold HDFS",
        )
    if (total := (most or 0) + secondaries.get("maxInstances", 0)) > cloud.max_workers:
        yield place.finding(
            "secondaryWorkerConfig.maxInstances",
            f"{total} workers in all, above cloud.max_workers = {cloud.max_workers}",
            "lower it, or raise the limit of this environment",
        )
    yarn = policy.get("basicAlgorithm", {}).get("yarnConfig", {})
    timeout = yarn.get("gracefulDecommissionTimeout")
    if seconds(timeout) != 0:
        yield place.finding(
            "basicAlgorithm.yarnConfig.gracefulDecommissionTimeout",
            f"{timeout!r} makes an idle secondary wait for applications that need nothing of it",
            "write 0s; the shuffle lies on the primaries",
        )


def seconds(duration: object) -> float | None:
    """A duration in seconds; None where it is none."""
    if not isinstance(duration, str) or not re.fullmatch(r"[0-9]+(\.[0-9]+)?s", duration, re.ASCII):
        return None
    return float(duration[:-1])


def gpus_per_worker(cluster: Mapping[str, Any]) -> int:
    """GPUs of one primary worker; 0 on a CPU cluster."""
    accelerators = cluster.get("workerConfig", {}).get("accelerators", ())
    return sum(int(one.get("acceleratorCount", 0)) for one in accelerators)


def is_label(text: object) -> bool:
    """Whether a text can be the value of a label."""
    return isinstance(text, str) and bool(re.fullmatch("[a-z0-9_-]{1,63}", text, re.ASCII))


def check_labels(place: Place, labels: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[Finding]:
    """Labels that lack, and values that no label can have."""
    for name in names:
        if name not in labels:
            yield place.finding(
                f"labels['{name}']", "is missing", "add it; runs and costs are found by label"
            )
    for name, value in labels.items():
        if not is_label(value):
            yield place.finding(
                f"labels['{name}']", f"{value!r} is no label", "take 1 to 63 of a-z, 0-9, _ and -"
            )


def _lifetime(place: Place, cluster: Mapping[str, Any]) -> Iterator[Finding]:
    lifecycle = cluster.get("lifecycleConfig", {})
    for name, least, what in (
        ("idleDeleteTtl", MIN_IDLE_SECONDS, "an idle cluster would run on"),
        ("autoDeleteTtl", MIN_AGE_SECONDS, "a forgotten cluster would run on"),
    ):
        found = seconds(lifecycle.get(name))
        if found is None:
            yield place.finding(f"lifecycleConfig.{name}", f"is missing: {what}", "set it, in seconds")
        elif not least <= found <= MAX_AGE_SECONDS:
            yield place.finding(
                f"lifecycleConfig.{name}",
                f"{found:.0f} s is outside what Dataproc takes",
                f"set {least} to {MAX_AGE_SECONDS} seconds",
            )


def _images(place: Place, cluster: Mapping[str, Any]) -> Iterator[Finding]:
    for group in _GROUPS[:2]:
        image = cluster.get(group, {}).get("imageUri", "")
        if not _PINNED.fullmatch(image):
            yield place.finding(
                f"{group}.imageUri",
                f"{image!r} is not pinned" if image else "is missing: the newest image would be taken",
                "name one image, projects/P/global/images/NAME-YYYYMMDD; a family moves, and an image is "
                "refused a year after its build",
            )
    if version := cluster.get("softwareConfig", {}).get("imageVersion"):
        yield place.finding(
            "softwareConfig.imageVersion", f"{version!r} beside imageUri", "remove it; the image decides"
        )


def _machines(place: Place, cluster: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    for group in _GROUPS[:2]:
        kind = cluster.get(group, {}).get("preemptibility", "NON_PREEMPTIBLE")
        if kind not in ("NON_PREEMPTIBLE", "PREEMPTIBILITY_UNSPECIFIED"):
            yield place.finding(
                f"{group}.preemptibility", f"{kind}: primaries cannot be taken away", "remove it"
            )
    counts = {group: cluster.get(group, {}).get("numInstances", 0) for group in _GROUPS}
    if counts["masterConfig"] != 1:
        yield place.finding(
            "masterConfig.numInstances",
            f"{counts['masterConfig']} masters",
            "write 1; the cluster is short-lived",
        )
    if counts["workerConfig"] < 2:
        yield place.finding("workerConfig.numInstances", "fewer than two primaries", "write 2 or more")
    workers = counts["workerConfig"] + counts["secondaryWorkerConfig"]
    if workers > cloud.max_workers:
        yield place.finding(
            "workerConfig.numInstances",
            f"{workers} workers, above cloud.max_workers = {cloud.max_workers}",
            "lower it, or raise the limit of this environment",
        )


def _gpus(place: Place, cluster: Mapping[str, Any]) -> Iterator[Finding]:
    for group in _GROUPS:
        for number, accelerator in enumerate(cluster.get(group, {}).get("accelerators", ())):
            at = place.at(f"{group}.accelerators").at(f"[{number}]")
            name = accelerator.get("acceleratorTypeUri", "")
            family = str(cluster[group].get("machineTypeUri", "")).partition("-")[0]
            if name not in ACCELERATORS:
                yield at.finding(
                    "acceleratorTypeUri", f"unknown accelerator {name!r}", f"one of {', '.join(ACCELERATORS)}"
                )
            elif ACCELERATORS[name] != family:
                yield at.finding(
                    "acceleratorTypeUri",
                    f"{name} is not carried by {family} machines",
                    f"take a {ACCELERATORS[name]} machine",
                )
            if not accelerator.get("acceleratorCount"):
                yield at.finding("acceleratorCount", "is missing", "say how many GPUs a node has")
    if not gpus_per_worker(cluster):
        return
    for name in ("secondaryWorkerConfig", "autoscalingConfig"):
        if name in cluster:
            yield place.finding(
                name,
                "a lost or added worker ends the training",
                "remove it; a GPU cluster has primaries only",
            )
    properties = cluster.get("softwareConfig", {}).get("properties", {})
    if properties.get("spark:spark.dynamicAllocation.enabled") != "false":
        yield place.finding(
            "softwareConfig.properties['spark:spark.dynamicAllocation.enabled']",
            "ranks need all their executors at once",
            "write 'false'",
        )


def _scaling(place: Place, cluster: Mapping[str, Any]) -> Iterator[Finding]:
    properties = cluster.get("softwareConfig", {}).get("properties", {})
    efm = f"softwareConfig.properties['{_EFM}']"
    secondary = cluster.get("secondaryWorkerConfig", {})
    has_efm = properties.get(_EFM) == "primary-worker"
    is_scaled = "autoscalingConfig" in cluster
    if gpus_per_worker(cluster) or not (is_scaled or secondary):
        if has_efm:
            yield place.finding(efm, "has no use without secondaries", "remove it")
        return
    if is_scaled and secondary.get("preemptibility") != "SPOT":
        yield place.finding(
            "secondaryWorkerConfig.preemptibility", "autoscaled secondaries are not spot", "write SPOT"
        )
    if not has_efm:
        yield place.finding(efm, "a lost secondary loses its shuffle", "write primary-worker")


def _software(place: Place, cluster: Mapping[str, Any]) -> Iterator[Finding]:
    software = cluster.get("softwareConfig", {})
    if "DELTA" not in software.get("optionalComponents", ()):
        yield place.finding(
            "softwareConfig.optionalComponents", "lacks DELTA: the image removes Delta's jars", "add DELTA"
        )
    for name in software.get("properties", {}):
        at = place.at("softwareConfig").at(f"properties['{name}']")
        prefix, colon, _ = name.partition(":")
        if not colon or prefix not in _PREFIXES:
            yield at.finding(
                "", "does not say whose property it is", "begin with the file's name, such as spark:"
            )
        yield from check_property(at, name.rpartition(":")[2])
    for name in cluster.get("gceClusterConfig", {}).get("metadata", {}):
        yield from check_property(place.at("gceClusterConfig").at(f"metadata['{name}']"), name)


def check_property(at: Place, name: str) -> Iterator[Finding]:
    """A property or metadata that nobody may set: secrets, and packages resolved at run time."""
    if _SECRET.search(name):
        yield at.finding(
            "", "looks like a secret, and everybody who sees the job can read it", "keep it in Secret Manager"
        )
    if name in ("spark.jars.packages", "dataproc.pip.packages", "pip.packages", "conda.packages"):
        yield at.finding("", "resolves packages at every start", "put them into the image")


def _identity(place: Place, cluster: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    network = cluster.get("gceClusterConfig", {})
    accounts = cloud.service_accounts
    account = accounts.train if gpus_per_worker(cluster) else accounts.etl
    if network.get("serviceAccount") != account:
        yield place.finding(
            "gceClusterConfig.serviceAccount",
            f"{network.get('serviceAccount', 'the default account')} is not of this duty",
            f"write {account}",
        )
    if network.get("internalIpOnly") is not True:
        yield place.finding(
            "gceClusterConfig.internalIpOnly",
            "nodes would have public addresses; whoever reaches a rank can run code in it",
            "write true",
        )
    for name in ("configBucket", "tempBucket"):
        if cluster.get(name) != cloud.buckets.staging:
            yield place.finding(
                name,
                f"{cluster.get(name, 'a bucket of its own')!r} is not the staging bucket",
                "write {buckets.staging}",
            )


def _initialisation(place: Place, cluster: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    for number, action in enumerate(cluster.get("initializationActions", ())):
        at = place.at(f"initializationActions[{number}]")
        if not str(action.get("executableFile", "")).startswith(f"gs://{cloud.buckets.code}/"):
            yield at.finding(
                "executableFile", "is not in the code bucket and may change", "copy it into a release"
            )
        if seconds(action.get("executionTimeout")) is None:
            yield at.finding("executionTimeout", "is missing: ten minutes would hold", "set it, in seconds")
