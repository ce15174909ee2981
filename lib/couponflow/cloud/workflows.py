"""A workflow for given dates: the values of its parameters, and the request with all of them in place.

Dataproc takes no parameters with a template that comes inline, so they are put into their fields here. The
template then holds one run: nothing has to be imported into the project before. Pure.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from couponflow.cloud import run_dates, spec_shape
from couponflow.cloud.requests import Tree, checked, derived_id
from couponflow.cloud.specs import Spec
from couponflow.clouding import CloudConfig
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError

#: Parts of a parameter's path: a name, a key in quotes or an index.
_PART = re.compile(r"(?:^|\.)([A-Za-z]+)|\['([^']+)'\]|\[([0-9]+)\]", re.ASCII)
#: Paths spell some fields as Google's reference does, JSON as its library does.
_SPELLED = {"pySparkJob": "pysparkJob"}


def template(specs: Sequence[Spec], name: str) -> Tree:
    """The rendered template of a name, ``deploy/workflows/NAME.yaml``.

    Raises:
        ConfigError: there is none.
    """
    found = {spec.name: spec.tree for spec in specs if spec.kind == "workflows"}
    if name not in found:
        raise ConfigError(f"unknown workflow {name!r}; one of {', '.join(sorted(found))}")
    return found[name]


def request_id(name: str, dates: DateRange, release: str, campaign: str = "", attempt: int = 1) -> str:
    """Id of the request, and the label ``run`` of every job of it: of the same run always the same."""
    return derived_id(f"workflow {name} {campaign}".strip(), str(dates), release, str(attempt))


def values(config: Config, name: str, dates: DateRange, run: str, campaign: str = "") -> dict[str, str]:
    """The value of every parameter that a template may declare, for ingest dates, or a run date."""
    found = {parameter: str(held) for parameter, held in run_dates.ranges(config, name, dates).items()}
    found |= {"RUN_DATE": str(dates.last), "RUN_ID": run}
    return found | ({"CAMPAIGN_ID": campaign} if campaign else {})


def bound(tree: Tree, given: Mapping[str, str]) -> Tree:
    """A template with the values in their fields, and no parameters left.

    Raises:
        ConfigError: a parameter has no value, or one that its expression refuses.
    """
    made = copy.deepcopy(tree)
    for parameter in made.pop("parameters", ()):
        name = parameter["name"]
        if name not in given:
            step = {
                "CAMPAIGN_ID": "give --campaign ID",
                "TEST_DATES": "give dates from examples.test_start on",
            }
            raise ConfigError(
                f"workflow {tree['id']}: no value for parameter {name}; "
                + step.get(name, "teach cloud/workflows.py that parameter")
            )
        expressions = parameter.get("validation", {}).get("regex", {}).get("regexes", ())
        for expression in expressions:
            if not re.fullmatch(expression, given[name], re.ASCII):
                raise ConfigError(
                    f"workflow {tree['id']}: {name} = {given[name]!r} does not match {expression}; correct it"
                )
        for field in parameter["fields"]:
            _put(made, field, given[name])
    return made


def workflow_request(
    specs: Sequence[Spec],
    config: Config,
    cloud: CloudConfig,
    release: str,
    name: str,
    dates: DateRange,
    campaign: str = "",
    attempt: int = 1,
) -> Tree:
    """The request that starts a workflow, every value in place.

    Raises:
        ConfigError: no such workflow, a value that it lacks, or the types of Dataproc refuse the request.
    """
    if name != "backfill" and len(dates) != 1:
        raise ConfigError(f"workflow {name} {dates}: prepares one run date; give one day")
    run = request_id(name, dates, release, campaign, attempt)
    given = values(config, name, dates, run, campaign)
    tree = {
        "parent": f"projects/{cloud.project}/regions/{cloud.region}",
        "requestId": run,
        "template": bound(template(specs, name), given),
    }
    return checked(spec_shape.WORKFLOW_REQUEST, tree, f"workflow {name} {dates}")


def _put(tree: Tree, field: str, value: str) -> None:
    """Replace what a parameter's path names; ``spec_rules`` has checked that it is there."""
    node: Any = tree
    *parents, last = [key or index or name for name, key, index in _PART.findall(field)]
    for part in parents:
        if isinstance(node, list):
            node = next(step for step in node if step["stepId"] == part)
        else:
            node = node[_SPELLED.get(part, part)]
    node[int(last) if isinstance(node, list) else last] = value
