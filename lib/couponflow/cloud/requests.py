"""Requests to Dataproc, out of the rendered specs: one stage as a job, its cluster, a workflow of a day.

A job is the step of a workflow that has its stage: the same file, package, config, arguments and labels, with
the dates, campaign and model that are asked for. What a job is called follows from what it does, so that
whoever asks again, after a lost answer, a crash or at the same time, meets the first one:

    id of a job = request id = uuid5 of "stage|range|release|attempt"

The release is the hash of code and config (``releases``). Pure: trees in the JSON form of Dataproc's
messages, held against its types by ``spec_shape``.
"""

import copy
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from couponflow.cloud import spec_shape
from couponflow.cloud.rendering import Place
from couponflow.cloud.specs import Spec
from couponflow.clouding import MIN_IDLE_SECONDS, CloudConfig
from couponflow.dates import DateRange
from couponflow.errors import ConfigError
from couponflow.pipeline import OF_A_CAMPAIGN, Stage, check_arguments

Tree = dict[str, Any]
#: Of all ids of this program.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "couponflow")
#: Failures after which Dataproc starts a driver no more; a fourth within ten minutes would end it anyway.
_FAILURES_PER_HOUR, _FAILURES = 3, 6
#: A stage that no workflow has is shaped as this one.
_PATTERN = "clean_events"
_HEX = 12


@dataclass(frozen=True)
class Work:
    """One stage over one range. ``attempt``: another one is another job of the same work."""

    stage: str
    dates: DateRange
    campaign: str = ""
    model: str = ""
    attempt: int = 1

    @property
    def name(self) -> str:
        """The stage as a plan names it."""
        return Stage(self.stage, self.dates, (), campaign=self.campaign, model=self.model).name

    def job_id(self, release: str) -> str:
        """Id of the job and of the request."""
        return derived_id(self.name, str(self.dates), release, str(self.attempt))


def derived_id(*parts: str) -> str:
    """The same id for the same parts."""
    return str(uuid.uuid5(_NAMESPACE, "|".join(parts)))


def job_request(
    specs: Sequence[Spec], cloud: CloudConfig, release: str, work: Work, cluster: str, run: str = ""
) -> Tree:
    """The request for one job on a cluster; ``run`` is the label that joins the jobs of one command.

    Raises:
        ConfigError: no such job, it lacks an argument, or the types of Dataproc refuse the request.
    """
    step = _step(specs, work)
    job_id = work.job_id(release)
    program = copy.deepcopy(step["pysparkJob"])
    program["args"] = [*_arguments(program["args"], work), "--attempt-key", job_id]
    job = {
        "reference": {"projectId": cloud.project, "jobId": job_id},
        "placement": {"clusterName": cluster},
        "labels": {**step["labels"], "stage": work.stage, "dt": day_label(work.dates), "run": run or job_id},
        "pysparkJob": program,
        "scheduling": {"maxFailuresPerHour": _FAILURES_PER_HOUR, "maxFailuresTotal": _FAILURES},
    }
    tree = {"projectId": cloud.project, "region": cloud.region, "requestId": job_id, "job": job}
    return checked(spec_shape.JOB_REQUEST, tree, f"job {work.name} {work.dates}")


def cluster_request(specs: Sequence[Spec], cloud: CloudConfig, name: str, stages: Sequence[Work]) -> Tree:
    """The request for a cluster that lives for some work: the one of the stage's workflow, sooner idle.

    It ends itself by its own limits, so a command that dies leaves nothing that runs on. All stages must be
    of one kind of cluster.

    Raises:
        ConfigError: the stages belong on different clusters, or the types refuse the request.
    """
    templates = {template["id"]: template for template in (_home(specs, work) for work in stages)}
    clusters = [template["placement"]["managedCluster"] for template in templates.values()]
    if any(one["config"] != clusters[0]["config"] for one in clusters):
        raise ConfigError(
            f"cluster {name}: {', '.join(work.name for work in stages)} belong on different clusters; "
            "submit them apart"
        )
    config = copy.deepcopy(clusters[0]["config"])
    config["lifecycleConfig"]["idleDeleteTtl"] = f"{MIN_IDLE_SECONDS}s"
    cluster = {
        "projectId": cloud.project,
        "clusterName": name,
        "labels": clusters[0]["labels"],
        "config": config,
    }
    tree = {"projectId": cloud.project, "region": cloud.region, "cluster": cluster}
    return checked(spec_shape.CLUSTER_REQUEST, tree, f"cluster {name}")


def cluster_name(run: str) -> str:
    """Name of the cluster that lives for one run: of the same run always the same."""
    return f"couponflow-{uuid.uuid5(_NAMESPACE, run).hex[:_HEX]}"


def day_label(dates: DateRange) -> str:
    """Dates as the value of a label, which takes no colon."""
    return str(dates.start) if len(dates) == 1 else f"{dates.start}_{dates.last}"


def checked(kind: str, tree: Tree, what: str) -> Tree:
    """The tree, if the types of Dataproc take it."""
    findings = spec_shape.check(kind, tree, Place(what))
    if findings:
        raise ConfigError("; ".join(map(str, findings)))
    return tree


def argument(args: Sequence[str], option: str) -> str:
    """Value of an option among the arguments of a job; empty where it is not given."""
    return args[args.index(option) + 1] if option in args else ""


def _steps(specs: Sequence[Spec]) -> Iterator[tuple[Tree, Tree]]:
    """Every step with its workflow."""
    for spec in specs:
        if spec.kind == "workflows":
            for step in spec.tree["jobs"]:
                yield spec.tree, step


def _found(specs: Sequence[Spec], work: Work) -> tuple[Tree, Tree]:
    """The first step with the stage, the model, and a campaign or none, as asked for; and its workflow."""
    check_arguments(work.stage, work.campaign, work.model)
    if work.campaign and len(work.dates) != 1:
        raise ConfigError(
            f"job {work.name} {work.dates}: a campaign is prepared on one run date; give one day"
        )
    same = [pair for pair in _steps(specs) if pair[1]["labels"]["stage"] == work.stage]
    for template, step in same:
        args = step["pysparkJob"]["args"]
        if argument(args, "--model") == work.model and ("--campaign" in args) == bool(work.campaign):
            return template, step
    if not same and not work.model and bool(work.campaign) == (work.stage in OF_A_CAMPAIGN):
        return next(pair for pair in _steps(specs) if pair[1]["labels"]["stage"] == _PATTERN)
    known = sorted({argument(step["pysparkJob"]["args"], "--model") for _, step in same} - {""})
    raise ConfigError(
        f"job {work.name}: no step of deploy/workflows has it so; "
        + (f"--model is one of {', '.join(known)}" if known else "leave --campaign and --model out")
    )


def _home(specs: Sequence[Spec], work: Work) -> Tree:
    return _found(specs, work)[0]


def _step(specs: Sequence[Spec], work: Work) -> Tree:
    step = _found(specs, work)[1]
    if step["labels"]["stage"] == work.stage:
        return step
    made = copy.deepcopy(step)
    program = made["pysparkJob"]
    program["mainPythonFileUri"] = program["mainPythonFileUri"].replace(
        f"/{_PATTERN}.py", f"/{work.stage}.py"
    )
    if work.campaign:
        at = program["args"].index("--dates") + 2
        program["args"][at:at] = ["--campaign", work.campaign]
    return made


def _arguments(args: list[str], work: Work) -> list[str]:
    """The step's arguments with the values of this work in the place of the names of parameters."""
    values = {"--dates": str(work.dates), "--campaign": work.campaign, "--model": work.model}
    made = list(args)
    for option, value in values.items():
        if option in made:
            made[made.index(option) + 1] = value
    return made
