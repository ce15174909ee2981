"""Rules for workflow templates that the types of Dataproc do not know, and which spec has which rules.

A template is a graph of our jobs on one managed cluster. What differs between two runs comes in by
parameters: no date stands in a template. Pure functions of rendered trees that ``spec_shape`` has accepted.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from couponflow.cloud.cluster_rules import (
    check_cluster,
    check_labels,
    check_policy,
    check_property,
    gpus_per_worker,
    seconds,
)
from couponflow.cloud.rendering import Finding, Place
from couponflow.clouding import CloudConfig
from couponflow.pipeline import JOBS, UPKEEP

#: Labels that make the list of jobs the register of runs, besides those of the environment.
JOB_LABELS = ("app", "environment", "stage", "dt", "run", "version")
CLUSTER_LABELS = ("app", "environment")
_MIN_DAG_SECONDS, _MAX_DAG_SECONDS = 600, 86_400
_STEP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{1,48}[A-Za-z0-9]", re.ASCII)
_TEMPLATE = re.compile(r"[a-z][a-z0-9-]{1,48}[a-z0-9]", re.ASCII)
_CLUSTER = re.compile(r"[a-z][a-z0-9-]{0,33}[a-z0-9]", re.ASCII)
_PARAMETER = re.compile(r"[A-Z0-9_]{1,40}", re.ASCII)
#: Fields that a parameter may replace: labels, arguments, properties and URIs, each a single value.
_FIELD = re.compile(
    r"(?:(?P<root>labels|placement\.managedCluster\.labels)\['(?P<root_key>[^']+)'\]"
    r"|jobs\['(?P<step>[^']+)'\]\.(?:labels\['(?P<label>[^']+)'\]"
    r"|pySparkJob\.(?:properties\['(?P<property>[^']+)'\]"
    r"|(?P<list>args|pythonFileUris|fileUris|jarFileUris|archiveUris)\[(?P<index>[0-9]+)\]"
    r"|(?P<main>mainPythonFileUri))))",
    re.ASCII,
)
#: Parameters that every template has, and the label of each job that they fill.
_FILLED = {"RUN_DATE": "dt", "RUN_ID": "run"}
#: Of the one stage that may take GPUs.
_GPU_STAGE = "train"
_AMOUNT = "spark.executor.resource.gpu.amount"
_TASK_AMOUNT = "spark.task.resource.gpu.amount"

Rules = Callable[[Place, Mapping[str, Any], CloudConfig], Iterator[Finding]]


def check(kind: str, tree: Mapping[str, Any], place: Place, cloud: CloudConfig) -> list[Finding]:
    """All findings of our own rules about a spec of one kind."""
    rules: dict[str, Rules] = {
        "clusters": check_cluster,
        "autoscaling": check_policy,
        "workflows": check_workflow,
    }
    return list(rules[kind](place, tree, cloud))


def check_workflow(place: Place, template: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    """All findings about a workflow template."""
    jobs = template.get("jobs", [])
    if not _TEMPLATE.fullmatch(template.get("id", "")):
        yield place.finding("id", f"{template.get('id')!r}", "take 3 to 50 of a-z, 0-9 and -, a letter first")
    if not jobs:
        yield place.finding("jobs", "has no job", "add one")
    yield from check_labels(place, template.get("labels", {}), (*CLUSTER_LABELS, *cloud.labels))
    cluster = template.get("placement", {}).get("managedCluster", {})
    yield from _placement(place.at("placement.managedCluster"), cluster, cloud)
    yield from _duration(place, template, cluster.get("config", {}))
    yield from _graph(place, jobs)
    fields = {field for parameter in template.get("parameters", ()) for field in parameter.get("fields", ())}
    for number, job in enumerate(jobs):
        at = place.at(f"jobs[{number}]")
        yield from _job(at, job, cloud)
        yield from _dates(at, job, fields)
        yield from _gpu_job(at, job, cluster.get("config", {}))
    yield from _parameters(place, template)


def _placement(place: Place, cluster: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    if not cluster:
        yield place.finding("", "is missing", "give the template a cluster that lives as long as it runs")
        return
    if not _CLUSTER.fullmatch(cluster.get("clusterName", "")):
        yield place.finding(
            "clusterName", f"{cluster.get('clusterName')!r}", "take 2 to 35 of a-z, 0-9 and -, a letter first"
        )
    yield from check_labels(place, cluster.get("labels", {}), (*CLUSTER_LABELS, *cloud.labels))


def _duration(place: Place, template: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[Finding]:
    found = seconds(template.get("dagTimeout"))
    if found is None:
        yield place.finding("dagTimeout", "is missing: a hanging job would run on", "set it, in seconds")
        return
    if not _MIN_DAG_SECONDS <= found <= _MAX_DAG_SECONDS:
        yield place.finding(
            "dagTimeout",
            f"{found:.0f} s is outside what Dataproc takes",
            f"set {_MIN_DAG_SECONDS} to {_MAX_DAG_SECONDS} seconds",
        )
    age = seconds(cluster.get("lifecycleConfig", {}).get("autoDeleteTtl"))
    if age is not None and age < found:
        yield place.finding(
            "dagTimeout",
            f"{found:.0f} s is longer than the cluster lives ({age:.0f} s)",
            "lower it, or raise age_seconds of the environment",
        )


def _graph(place: Place, jobs: list[Mapping[str, Any]]) -> Iterator[Finding]:
    steps = [job.get("stepId", "") for job in jobs]
    for number, step in enumerate(steps):
        if not _STEP.fullmatch(step):
            yield place.finding(
                f"jobs[{number}].stepId",
                f"{step!r}",
                "take 3 to 50 of letters, digits, _, -; no _ or - at the ends",
            )
        elif steps.index(step) < number:
            yield place.finding(
                f"jobs[{number}].stepId", f"{step!r} stands twice", "give each step its own id"
            )
    for number, job in enumerate(jobs):
        for index, before in enumerate(job.get("prerequisiteStepIds", ())):
            if before not in steps:
                near = difflib.get_close_matches(before, steps, n=1)
                hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(steps)}"
                yield place.finding(
                    f"jobs[{number}].prerequisiteStepIds[{index}]", f"no step {before!r}", hint
                )
    if circle := _circle({job.get("stepId", ""): job.get("prerequisiteStepIds", ()) for job in jobs}):
        yield place.finding(
            "jobs", f"steps wait for each other: {' -> '.join(circle)}", "remove one of these"
        )


def _circle(before: Mapping[str, Any]) -> list[str]:
    """Steps of a circle, the first one again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(step: str, path: list[str]) -> list[str]:
        if step in path:
            return [*path[path.index(step) :], step]
        if step in done:
            return []
        for other in before.get(step, ()):
            if found := visit(other, [*path, step]):
                return found
        done.add(step)
        return []

    return next((found for step in before if (found := visit(step, []))), [])


def _job(place: Place, job: Mapping[str, Any], cloud: CloudConfig) -> Iterator[Finding]:
    if "scheduling" in job:
        yield place.finding(
            "scheduling",
            "restarts are not possible inside a template",
            "remove it; instantiate the template again",
        )
    yield from check_labels(place, job.get("labels", {}), (*JOB_LABELS, *cloud.labels))
    if "pysparkJob" not in job:
        yield place.finding("pysparkJob", "is missing: our jobs are PySpark programs", "add it")
        return
    program = job["pysparkJob"]
    at = place.at("pysparkJob")
    main = program.get("mainPythonFileUri", "")
    stage = PurePosixPath(main).stem
    releases = f"gs://{cloud.buckets.code}/releases/"
    if not main:
        yield at.finding("mainPythonFileUri", "is empty", "name the job's file in the release")
    elif stage not in (*JOBS, *UPKEEP):
        near = difflib.get_close_matches(stage, (*JOBS, *UPKEEP), n=1)
        hint = f"did you mean {near[0]}.py?" if near else "see jobs/"
        yield at.finding("mainPythonFileUri", f"no job {stage!r}", hint)
    elif job.get("labels", {}).get("stage", stage) != stage:
        yield place.finding(
            "labels['stage']", f"{job['labels']['stage']!r} names another job", f"write {stage}"
        )
    for field in ("pythonFileUris", "fileUris"):
        for number, uri in enumerate(program.get(field, ())):
            if not uri.startswith(releases):
                yield at.finding(
                    f"{field}[{number}]", f"{uri!r} is not of a release", f"put it under {releases}"
                )
    if main and not main.startswith(releases):
        yield at.finding("mainPythonFileUri", f"{main!r} is not of a release", f"put it under {releases}")
    for number, uri in enumerate(program.get("pythonFileUris", ())):
        if PurePosixPath(uri).suffix not in (".py", ".egg", ".zip"):
            yield at.finding(
                f"pythonFileUris[{number}]",
                f"{uri!r}: executors import .py, .egg and .zip",
                "ship the wheel as .zip",
            )
    yield from _config_file(at, program)
    for name in program.get("properties", {}):
        where = at.at(f"properties['{name}']")
        if ":" in name:
            yield where.finding(
                "", "a job's property has no file's name before it", f"write {name.split(':')[-1]}"
            )
        yield from check_property(where, name)


def _config_file(place: Place, program: Mapping[str, Any]) -> Iterator[Finding]:
    config = _option(program, "--config")
    files = [PurePosixPath(uri).name for uri in program.get("fileUris", ())]
    if config is None:
        yield place.finding("args", "no --config", "give the file of the environment")
    elif config[1] not in files:
        yield place.finding(
            f"args[{config[0]}]",
            f"{config[1]!r} is not among fileUris",
            "add it; the driver finds it beside itself",
        )


def _option(program: Mapping[str, Any], name: str) -> tuple[int, str] | None:
    """Index and value of an option of a job; None where it is not given."""
    args = list(program.get("args", ()))
    if name not in args[:-1]:
        return None
    index = args.index(name) + 1
    return index, args[index]


def _dates(place: Place, job: Mapping[str, Any], fields: set[str]) -> Iterator[Finding]:
    """Whatever tells one run from another has to come from a parameter."""
    step = job.get("stepId", "")
    for name in ("--dates", "--campaign"):
        option = _option(job.get("pysparkJob", {}), name)
        if option and f"jobs['{step}'].pySparkJob.args[{option[0]}]" not in fields:
            yield place.finding(
                f"pysparkJob.args[{option[0]}]",
                f"{name} {option[1]} would be the same in every run",
                f"add jobs['{step}'].pySparkJob.args[{option[0]}] to a parameter",
            )
    for parameter, label in _FILLED.items():
        if f"jobs['{step}'].labels['{label}']" not in fields:
            yield place.finding(
                f"labels['{label}']", "would be the same in every run", f"add it to the fields of {parameter}"
            )


def _gpu_job(place: Place, job: Mapping[str, Any], cluster: Mapping[str, Any]) -> Iterator[Finding]:
    """GPUs of a job: none, said so where the cluster has some; or all of them, one per task."""
    gpus = gpus_per_worker(cluster)
    at = place.at("pysparkJob")
    properties = job.get("pysparkJob", {}).get("properties", {})
    amount = properties.get(_AMOUNT)
    if amount is None and gpus:
        yield at.finding(
            f"properties['{_AMOUNT}']", "is missing: the cluster's default is 1", "write '0' for a CPU job"
        )
        return
    if amount in (None, "0"):
        if _TASK_AMOUNT in properties:
            yield at.finding(f"properties['{_TASK_AMOUNT}']", "a GPU setting on a CPU job", "remove it")
        return
    stage = job.get("labels", {}).get("stage")
    if not gpus or stage != _GPU_STAGE:
        why = "the cluster has no GPUs" if not gpus else f"{stage} needs none"
        yield at.finding(
            f"properties['{_AMOUNT}']", f"a GPU setting on a CPU job: {why}", "remove it, or write '0'"
        )
        return
    cpus = properties.get("spark.task.cpus", "1")
    expected = {
        _AMOUNT: str(gpus),
        _TASK_AMOUNT: "1",
        "spark.executor.cores": str(gpus * int(cpus)) if cpus.isdecimal() else "cores of all ranks",
        "spark.executor.instances": str(cluster["workerConfig"].get("numInstances")),
        "spark.dynamicAllocation.enabled": "false",
        "spark.yarn.unmanagedAM.enabled": "false",
        "spark.task.maxFailures": "1",
    }
    for name, value in expected.items():
        if properties.get(name) != value:
            yield at.finding(
                f"properties['{name}']",
                f"{properties.get(name)!r}: one rank is one task on one GPU, one executor a node",
                f"write '{value}'",
            )


def _parameters(place: Place, template: Mapping[str, Any]) -> Iterator[Finding]:
    parameters = template.get("parameters", [])
    names = [parameter.get("name", "") for parameter in parameters]
    for name in _FILLED:
        if name not in names:
            yield place.finding(
                "parameters", f"no parameter {name}", f"add it; it fills label {_FILLED[name]}"
            )
    used = Counter(field for parameter in parameters for field in parameter.get("fields", ()))
    for number, parameter in enumerate(parameters):
        at = place.at(f"parameters[{number}]")
        name = parameter.get("name", "")
        if not _PARAMETER.fullmatch(name):
            yield at.finding("name", f"{name!r}", "take 1 to 40 of A-Z, 0-9 and _")
        elif names.index(name) < number:
            yield at.finding("name", f"{name!r} stands twice", "join the two")
        if not parameter.get("validation"):
            yield at.finding("validation", "is missing: any text would reach the jobs", "add regex or values")
        if not parameter.get("fields"):
            yield at.finding("fields", "is empty", "name what it replaces, or remove the parameter")
        for index, field in enumerate(parameter.get("fields", ())):
            if used[field] > 1:
                yield at.finding(f"fields[{index}]", f"{field} is in two parameters", "keep one of them")
            if problem := _unresolved(template, field):
                yield at.finding(f"fields[{index}]", f"{field}: {problem[0]}", problem[1])


def _unresolved(template: Mapping[str, Any], field: str) -> tuple[str, str] | None:
    """Why a parameter cannot replace a field, and what to do; None where it can."""
    match = _FIELD.fullmatch(field)
    if match is None:
        return (
            "no single field that a parameter may replace",
            "take a label, an argument by index, a property or a URI; machines and their number are the "
            "environment's",
        )
    if match["root"]:
        placement = template.get("placement", {}).get("managedCluster", {})
        owner = template if match["root"] == "labels" else placement
        return None if match["root_key"] in owner.get("labels", {}) else ("no such label", "add the label")
    job = next((job for job in template.get("jobs", ()) if job.get("stepId") == match["step"]), None)
    if job is None:
        return f"no step {match['step']!r}", "correct the step id"
    program = job.get("pysparkJob", {})
    if match["label"]:
        return None if match["label"] in job.get("labels", {}) else ("no such label", "add the label")
    if match["property"]:
        return None if match["property"] in program.get("properties", {}) else ("no such property", "add it")
    if match["list"] and int(match["index"]) >= (length := len(program.get(match["list"], ()))):
        return f"the step has {length} of these", "correct the index; it counts from 0"
    return None
