"""What the stand-in of Dataproc refuses, how it filters, and how it fills a template: pure functions.

Requests and answers are the types of google-cloud-dataproc. A refusal carries the code of gRPC by name.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from dataproc_messages import parsed, raw
from google.cloud import dataproc_v1 as dp
from google.protobuf import json_format

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,40}")
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
BATCH_ID = re.compile(r"[a-z0-9][a-z0-9-]{2,61}[a-z0-9]")
TEMPLATE_ID = re.compile(r"[A-Za-z][A-Za-z0-9_-]{1,48}[A-Za-z0-9]")
CLUSTER = re.compile(r"[a-z]([a-z0-9-]{0,49}[a-z0-9])?")
CLUSTER_PREFIX = re.compile(r"[a-z][a-z0-9-]{0,33}[a-z0-9]")
STEP_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{1,48}[A-Za-z0-9])")
PARAMETER = re.compile(r"[A-Z0-9_]{1,40}")
LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
CUSTOM_IMAGE = re.compile(r"(https://www\.googleapis\.com/compute/v1/)?projects/[^/]+/global/images/[^/]+")
IMAGE_VERSION = re.compile(r"[1-9]\.[0-9]+(\.[0-9]+)?(-(ml-)?[a-z]+[0-9]+(-arm)?)?")
_TERM = re.compile(r"(?P<field>[A-Za-z_]+(\.[\w-]+)?)\s*=\s*(?P<value>\"[^\"]*\"|[^\s\"]+)\s*")
_PATH_PART = re.compile(r"(?:^|\.)(?P<field>[A-Za-z]+)|\['(?P<key>[^']+)'\]|\[(?P<index>\d+)\]")


class ServiceError(Exception):
    """An error of the service: the code of gRPC by name, and its text."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def check(name: str, value: str, pattern: re.Pattern[str]) -> None:
    """Refuse a value that does not match as a whole."""
    if not pattern.fullmatch(value):
        raise ServiceError("INVALID_ARGUMENT", f"Invalid {name} '{value}'; expected {pattern.pattern}")


def check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > 32:
        raise ServiceError("INVALID_ARGUMENT", f"{len(labels)} labels; no more than 32 are allowed")
    for key, value in labels.items():
        check("label key", key, LABEL_KEY)
        check(f"value of label {key}", value, LABEL_VALUE)


def check_job(job: Any) -> None:
    """A ``Job`` or an ``OrderedJob``: its labels, its kind and how often it may be restarted."""
    check_labels(job.labels)
    if raw(job).WhichOneof("type_job" if isinstance(job, dp.Job) else "job_type") is None:
        raise ServiceError("INVALID_ARGUMENT", "One of the job types must be set")
    if "pyspark_job" in job and not job.pyspark_job.main_python_file_uri:
        raise ServiceError("INVALID_ARGUMENT", "pysparkJob.mainPythonFileUri must be set")
    if not 0 <= job.scheduling.max_failures_per_hour <= 10:
        raise ServiceError("INVALID_ARGUMENT", "scheduling.maxFailuresPerHour must be at most 10")
    if not 0 <= job.scheduling.max_failures_total <= 240:
        raise ServiceError("INVALID_ARGUMENT", "scheduling.maxFailuresTotal must be at most 240")


def check_image(config: dp.ClusterConfig) -> None:
    """Forms only: what a name says, its date for example, is a rule of ours and none of the service."""
    for group in (config.master_config, config.worker_config, config.secondary_worker_config):
        if group.image_uri:
            check("imageUri", group.image_uri, CUSTOM_IMAGE)
    if config.software_config.image_version:
        check("imageVersion", config.software_config.image_version, IMAGE_VERSION)


def matcher(
    text: str, values: Callable[[Any, str], Iterable[str]], fields: Mapping[str, Collection[str]]
) -> Callable[[Any], bool]:
    """Predicate of a filter such as ``labels.stage = train AND status.state = ACTIVE``.

    ``values(one, field)`` are the values that a field has. ``fields`` are those known besides labels, with
    what may be asked of each, nothing for anything. A blank between two terms is an AND; ``*`` is any value
    of a label.
    """
    terms, rest = [], text.strip()
    while rest:
        term = _TERM.match(rest)
        wrong = ServiceError("INVALID_ARGUMENT", f"Invalid list filter '{text}' at '{rest}'")
        if term is None:
            raise wrong
        field, value = term["field"], term["value"].strip('"')
        if not field.startswith("labels.") and (
            field not in fields or (fields[field] and value not in fields[field])
        ):
            raise wrong
        terms.append((field, value))
        rest = re.sub(r"^AND\s+", "", rest[term.end() :])

    def matches(one: Any) -> bool:
        for field, value in terms:
            if field.startswith("labels."):
                found = one.labels.get(field.removeprefix("labels."))
                if found is None or value not in ("*", found):
                    return False
            elif value not in values(one, field):
                return False
        return True

    return matches


def check_template(template: dp.WorkflowTemplate) -> None:
    """The rules of a template that its types do not know.

    Raises:
        ServiceError: no jobs, an unknown prerequisite, a cycle, a path of a parameter that leads nowhere.
    """
    check_labels(template.labels)
    if not template.jobs:
        raise ServiceError("INVALID_ARGUMENT", "A workflow template must have at least one job")
    if template.dag_timeout and not 600 <= template.dag_timeout.total_seconds() <= 86400:
        raise ServiceError("INVALID_ARGUMENT", "dagTimeout must be from 600s to 86400s")
    steps = [job.step_id for job in template.jobs]
    if doubled := sorted({step for step in steps if steps.count(step) > 1}):
        raise ServiceError("INVALID_ARGUMENT", f"Duplicate step id '{doubled[0]}'")
    for job in template.jobs:
        check("step id", job.step_id, STEP_ID)
        check_job(job)
        for before in job.prerequisite_step_ids:
            if before not in steps:
                raise ServiceError("INVALID_ARGUMENT", f"Step '{job.step_id}' needs unknown step '{before}'")
    left = {job.step_id: set(job.prerequisite_step_ids) for job in template.jobs}
    while ready := [step for step, needs in left.items() if not needs & left.keys()]:
        left = {step: needs for step, needs in left.items() if step not in ready}
    if left:
        raise ServiceError("INVALID_ARGUMENT", f"Steps {sorted(left)} wait for each other")
    _check_placement(template)
    _check_parameters(template)


def _check_placement(template: dp.WorkflowTemplate) -> None:
    placement = template.placement
    if "managed_cluster" in placement:
        check("managed cluster name", placement.managed_cluster.cluster_name, CLUSTER_PREFIX)
        check_labels(placement.managed_cluster.labels)
        check_image(placement.managed_cluster.config)
    elif not placement.cluster_selector.cluster_labels:
        raise ServiceError("INVALID_ARGUMENT", "placement needs a managed cluster or labels of one")


def _check_parameters(template: dp.WorkflowTemplate) -> None:
    tree = _tree(template)
    used: set[str] = set()
    for parameter in template.parameters:
        check("parameter name", parameter.name, PARAMETER)
        if not parameter.fields:
            raise ServiceError("INVALID_ARGUMENT", f"Parameter {parameter.name} has no fields")
        for path in parameter.fields:
            if path in used:
                raise ServiceError("INVALID_ARGUMENT", f"Field '{path}' is in two parameters")
            used.add(path)
            _locate(tree, path)


def filled(template: dp.WorkflowTemplate, values: Mapping[str, str]) -> dp.WorkflowTemplate:
    """A copy with the value of each parameter in each of its fields, and without parameters.

    Raises:
        ServiceError: an unknown or missing parameter, or a value that its validation does not allow.
    """
    known = {parameter.name for parameter in template.parameters}
    if unknown := sorted(values.keys() - known):
        raise ServiceError("INVALID_ARGUMENT", f"Template has no parameters {unknown}")
    if missing := sorted(known - values.keys()):
        raise ServiceError("INVALID_ARGUMENT", f"Missing values for parameters {missing}")
    tree = _tree(template)
    for parameter in template.parameters:
        value = values[parameter.name]
        if len(value) > 1000:
            raise ServiceError("INVALID_ARGUMENT", f"Value of {parameter.name} exceeds 1000 characters")
        regexes, allowed = parameter.validation.regex.regexes, parameter.validation.values.values
        if (regexes and not any(re.fullmatch(one, value) for one in regexes)) or (
            allowed and value not in allowed
        ):
            raise ServiceError("INVALID_ARGUMENT", f"Invalid value '{value}' of parameter {parameter.name}")
        for path in parameter.fields:
            node, key = _locate(tree, path)
            node[key] = value
    tree.pop("parameters", None)
    return parsed(dp.WorkflowTemplate, tree)


def _tree(template: dp.WorkflowTemplate) -> dict[str, Any]:
    return dict(json_format.MessageToDict(dp.WorkflowTemplate.pb(template)))


def _locate(tree: dict[str, Any], path: str) -> tuple[Any, Any]:
    """The node that holds a field, and its key there. Case does not count: pages say ``pySparkJob``."""
    wrong = ServiceError("INVALID_ARGUMENT", f"Invalid field path '{path}'")
    parts = list(_PATH_PART.finditer(path))
    if "".join(part[0] for part in parts) != path or not parts:
        raise wrong
    node: Any = tree
    found: tuple[Any, Any] | None = None
    for part in parts:
        keys: list[Any] = []
        if isinstance(node, list) and part["index"]:
            keys = [n for n in range(len(node)) if n == int(part["index"])]
        elif isinstance(node, list) and part["key"]:
            keys = [n for n, job in enumerate(node) if job.get("stepId") == part["key"]]
        elif isinstance(node, dict):
            keys = [key for key in node if key == part["key"] or key.lower() == (part["field"] or "").lower()]
        if not keys:
            raise wrong
        found = node, keys[0]
        node = node[keys[0]]
    if found is None or not isinstance(node, str):
        raise wrong
    return found
