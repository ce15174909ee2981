"""A rendered spec against the message type of Dataproc that it stands for.

``check`` finds everything at once, with its place: unknown and misspelt names, wrong types, and what the
library's own parser would let through: numbers as text, snake_case names that rules would miss, numbered
enum values, empty values, two kinds of job in one step. ``parsed`` is that parser, for what passed.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from datetime import date
from functools import cache
from typing import Any

from couponflow.cloud.rendering import Finding, Place

#: Folders of specs under ``deploy/``; each holds one message of google-cloud-dataproc, see ``_type``.
KINDS = ("clusters", "autoscaling", "workflows")
#: Requests that are made of specs (``requests``).
JOB_REQUEST, CLUSTER_REQUEST, WORKFLOW_REQUEST = "a job", "a cluster", "a workflow"
_DURATION = re.compile(r"[0-9]+(\.[0-9]{1,9})?s", re.ASCII)


def check(kind: str, tree: Mapping[str, Any], place: Place) -> list[Finding]:
    """All differences between a tree and the message of its kind; empty where the parser will take it."""
    found = list(_message(tree, _empty(kind).DESCRIPTOR, place))
    if found:
        return found
    from google.protobuf.json_format import ParseError

    try:
        parsed(kind, tree)
    except ParseError as error:
        reason = " ".join(str(error).split())
        return [place.finding("", f"Dataproc's types refuse it ({reason})", "correct that field")]
    return []


def parsed(kind: str, tree: Mapping[str, Any]) -> Any:
    """The spec as the type that the client library sends.

    Raises:
        google.protobuf.json_format.ParseError: ``check`` was not asked before.
    """
    from google.protobuf import json_format

    message = _type(kind)
    return message.wrap(json_format.ParseDict(tree, _empty(kind)))


def _type(kind: str) -> Any:
    from google.cloud import dataproc_v1

    types = {
        "clusters": dataproc_v1.ClusterConfig,
        "autoscaling": dataproc_v1.AutoscalingPolicy,
        "workflows": dataproc_v1.WorkflowTemplate,
        JOB_REQUEST: dataproc_v1.SubmitJobRequest,
        CLUSTER_REQUEST: dataproc_v1.CreateClusterRequest,
        WORKFLOW_REQUEST: dataproc_v1.InstantiateInlineWorkflowTemplateRequest,
    }
    return types[kind]


def _empty(kind: str) -> Any:
    message = _type(kind)
    return message.pb(message())


def _message(tree: Any, descriptor: Any, place: Place) -> Iterator[Finding]:
    if descriptor.full_name == "google.protobuf.Duration":
        if not (isinstance(tree, str) and _DURATION.fullmatch(tree)):
            yield place.finding("", f"{tree!r} is no duration", "write seconds, such as 1800s")
        return
    if not isinstance(tree, dict):
        yield place.finding("", f"expected fields, found {tree!r}", "write field: value lines")
        return
    by_name = {field.json_name: field for field in descriptor.fields}
    for key, value in tree.items():
        field = by_name.get(key)
        if field is None:
            yield _unknown(str(key), by_name, place)
        else:
            yield from _field(value, field, place.at(key))
    for oneof in descriptor.oneofs:
        names = [field.json_name for field in oneof.fields if field.json_name in tree]
        if len(names) > 1:
            yield place.finding("", f"{' and '.join(names)} exclude each other", "keep one of them")


def _unknown(key: str, by_name: Mapping[str, Any], place: Place) -> Finding:
    same = [name for name, field in by_name.items() if field.name == key]
    near = same or difflib.get_close_matches(key, by_name, n=1)
    hint = f"write {near[0]}" if near else "remove it"
    return place.finding(key, "no such field", hint)


def _field(value: Any, field: Any, place: Place) -> Iterator[Finding]:
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if value is None:
        yield place.finding("", "has no value", "give one, or remove the name")
    elif is_map:
        yield from _map(value, field.message_type.fields_by_name["value"], place)
    elif field.is_repeated:
        if not isinstance(value, list):
            yield place.finding("", f"expected a list, found {value!r}", "write - value lines")
            return
        for number, one in enumerate(value):
            yield from _value(one, field, place.at(f"[{number}]"))
    else:
        yield from _value(value, field, place)


def _map(tree: Any, value_field: Any, place: Place) -> Iterator[Finding]:
    if not isinstance(tree, dict):
        yield place.finding("", f"expected names and values, found {tree!r}", "write name: value lines")
        return
    for key, value in tree.items():
        if not isinstance(key, str):
            yield place.finding(str(key), "the name is no text", "put it in quotes")
        yield from _value(value, value_field, place.at(f"['{key}']"))


def _value(value: Any, field: Any, place: Place) -> Iterator[Finding]:
    if field.message_type is not None:
        yield from _message(value, field.message_type, place)
        return
    if field.enum_type is not None:
        names = [one.name for one in field.enum_type.values]
        if value not in names:
            near = difflib.get_close_matches(str(value).upper(), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
            yield place.finding("", f"{value!r} is no value of {field.enum_type.name}", hint)
        return
    expected = _python_types()[field.cpp_type]
    if isinstance(value, expected) and (bool in expected or not isinstance(value, bool)):
        return
    if isinstance(value, date):
        yield place.finding("", f"YAML reads {value} as a date", "put it in quotes")
    elif str in expected:
        yield place.finding("", f"{value!r} is no text", "put it in quotes")
    else:
        kind = "true or false" if bool in expected else "a number"
        yield place.finding("", f"expected {kind}, found {value!r}", "write it without quotes")


@cache
def _python_types() -> dict[int, tuple[type, ...]]:
    """Types of Python that a plain field takes."""
    from google.protobuf.descriptor import FieldDescriptor as Field

    return {
        Field.CPPTYPE_INT32: (int,),
        Field.CPPTYPE_INT64: (int,),
        Field.CPPTYPE_UINT32: (int,),
        Field.CPPTYPE_UINT64: (int,),
        Field.CPPTYPE_DOUBLE: (int, float),
        Field.CPPTYPE_FLOAT: (int, float),
        Field.CPPTYPE_BOOL: (bool,),
        Field.CPPTYPE_STRING: (str,),
    }
