"""Each rule about deploy specs: a valid spec, changed in one place, gives that finding and no other."""

from datetime import date
from typing import Any

import pytest
from deploy_files import GONE, NAMES, changed, environment, rendered, texts

from couponflow.cloud import spec_rules, spec_shape
from couponflow.cloud.rendering import Finding, Place
from couponflow.cloud.specs import Spec

PLACE = Place("spec.yaml")
CODE = "gs://couponflow-dev-code/releases/0123456789abcdef"


def found(kind: str, tree: dict[str, Any]) -> list[Finding]:
    """What a check of one spec finds: shape first, as the rules read what the types accept."""
    return spec_shape.check(kind, tree, PLACE) or spec_rules.check(
        kind, tree, PLACE, environment("dev").cloud
    )


def spec(name: str) -> Spec:
    return rendered("dev")[name]


#: Changed spec, path of the change, new value, field of the finding, words of its message.
CASES: dict[str, tuple[str, tuple[Any, ...], Any, str, str]] = {
    # What the types say, all of it at once and by place.
    "misspelt field": (
        "workflows/daily",
        ("jobs", 0, "pysparkJob", "mainPythonFileURI"),
        "gs://x/y.py",
        "jobs[0].pysparkJob.mainPythonFileURI",
        "no such field; write mainPythonFileUri",
    ),
    "field in snake case": (
        "clusters/etl",
        ("workerConfig", "num_instances"),
        3,
        "workerConfig.num_instances",
        "no such field; write numInstances",
    ),
    "unknown component": (
        "clusters/etl",
        ("softwareConfig", "optionalComponents", 0),
        "DELTAS",
        "softwareConfig.optionalComponents[0]",
        "no value of Component; did you mean DELTA?",
    ),
    "enum by number": (
        "clusters/etl",
        ("secondaryWorkerConfig", "preemptibility"),
        3,
        "secondaryWorkerConfig.preemptibility",
        "3 is no value of Preemptibility; one of",
    ),
    "number as text": (
        "clusters/etl",
        ("workerConfig", "numInstances"),
        "2",
        "workerConfig.numInstances",
        "expected a number, found '2'; write it without quotes",
    ),
    "true as number": (
        "clusters/etl",
        ("workerConfig", "numInstances"),
        True,
        "workerConfig.numInstances",
        "expected a number, found True",
    ),
    "number too large for its field": (
        "clusters/etl",
        ("workerConfig", "numInstances"),
        2**31,
        "the file",
        "Dataproc's types refuse it",
    ),
    "text as boolean": (
        "clusters/etl",
        ("gceClusterConfig", "internalIpOnly"),
        "yes",
        "gceClusterConfig.internalIpOnly",
        "expected true or false, found 'yes'",
    ),
    "unquoted property": (
        "clusters/gpu",
        ("softwareConfig", "properties", "spark:spark.dynamicAllocation.enabled"),
        False,
        "softwareConfig.properties['spark:spark.dynamicAllocation.enabled']",
        "False is no text; put it in quotes",
    ),
    "unquoted date in a label": (
        "workflows/daily",
        ("jobs", 0, "labels", "dt"),
        date(2024, 1, 3),
        "jobs[0].labels['dt']",
        "YAML reads 2024-01-03 as a date; put it in quotes",
    ),
    "unquoted date in an argument": (
        "workflows/daily",
        ("jobs", 0, "pysparkJob", "args", 3),
        date(2024, 1, 3),
        "jobs[0].pysparkJob.args[3]",
        "YAML reads 2024-01-03 as a date",
    ),
    "duration in minutes": (
        "clusters/etl",
        ("lifecycleConfig", "idleDeleteTtl"),
        "30m",
        "lifecycleConfig.idleDeleteTtl",
        "'30m' is no duration; write seconds, such as 1800s",
    ),
    "empty value": (
        "clusters/etl",
        ("softwareConfig", "properties"),
        None,
        "softwareConfig.properties",
        "has no value",
    ),
    "value for a list": (
        "workflows/daily",
        ("jobs", 0, "pysparkJob", "args"),
        "--config",
        "jobs[0].pysparkJob.args",
        "expected a list",
    ),
    "value for fields": ("workflows/daily", ("placement",), "etl", "placement", "expected fields"),
    "value for a map": ("workflows/daily", ("labels",), "etl", "labels", "expected names and values"),
    "two kinds of job": (
        "workflows/daily",
        ("jobs", 0, "sparkJob"),
        {"mainClass": "M"},
        "jobs[0]",
        "sparkJob and pysparkJob exclude each other; keep one",
    ),
    # Clusters end by themselves.
    "no idle ttl": (
        "clusters/etl",
        ("lifecycleConfig", "idleDeleteTtl"),
        GONE,
        "lifecycleConfig.idleDeleteTtl",
        "is missing: an idle cluster would run on",
    ),
    "no age ttl": (
        "clusters/gpu",
        ("lifecycleConfig", "autoDeleteTtl"),
        GONE,
        "lifecycleConfig.autoDeleteTtl",
        "is missing: a forgotten cluster would run on",
    ),
    "idle ttl too short": (
        "clusters/etl",
        ("lifecycleConfig", "idleDeleteTtl"),
        "60s",
        "lifecycleConfig.idleDeleteTtl",
        "60 s is outside what Dataproc takes; set 300 to 1209600 seconds",
    ),
    # Machines.
    "preemptible primaries": (
        "clusters/etl",
        ("workerConfig", "preemptibility"),
        "SPOT",
        "workerConfig.preemptibility",
        "SPOT: primaries cannot be taken away; remove it",
    ),
    "too many workers": (
        "clusters/etl",
        ("workerConfig", "numInstances"),
        7,
        "workerConfig.numInstances",
        "7 workers, above cloud.max_workers = 6",
    ),
    "one worker": (
        "clusters/etl",
        ("workerConfig", "numInstances"),
        1,
        "workerConfig.numInstances",
        "fewer than two primaries",
    ),
    "three masters": (
        "clusters/etl",
        ("masterConfig", "numInstances"),
        3,
        "masterConfig.numInstances",
        "write 1",
    ),
    "image of a family": (
        "clusters/etl",
        ("workerConfig", "imageUri"),
        "projects/couponflow-dev/global/images/family/couponflow-etl",
        "workerConfig.imageUri",
        "is not pinned; name one image",
    ),
    "image without a date": (
        "clusters/gpu",
        ("masterConfig", "imageUri"),
        "projects/couponflow-dev/global/images/couponflow-gpu-latest",
        "masterConfig.imageUri",
        "is not pinned",
    ),
    "no image": (
        "clusters/etl",
        ("masterConfig", "imageUri"),
        GONE,
        "masterConfig.imageUri",
        "is missing: the newest image would be taken",
    ),
    "image version beside the image": (
        "clusters/etl",
        ("softwareConfig", "imageVersion"),
        "2.3-debian12",
        "softwareConfig.imageVersion",
        "remove it; the image decides",
    ),
    # GPUs.
    "unknown accelerator": (
        "clusters/gpu",
        ("workerConfig", "accelerators", 0, "acceleratorTypeUri"),
        "nvidia-tesla-k80",
        "workerConfig.accelerators[0].acceleratorTypeUri",
        "unknown accelerator 'nvidia-tesla-k80'; one of nvidia-l4, ",
    ),
    "accelerator on the wrong machine": (
        "clusters/gpu",
        ("workerConfig", "accelerators", 0, "acceleratorTypeUri"),
        "nvidia-l4",
        "workerConfig.accelerators[0].acceleratorTypeUri",
        "nvidia-l4 is not carried by n1 machines; take a g2 machine",
    ),
    "accelerator without a count": (
        "clusters/gpu",
        ("masterConfig", "accelerators"),
        [{"acceleratorTypeUri": "nvidia-tesla-t4"}],
        "masterConfig.accelerators[0].acceleratorCount",
        "is missing; say how many",
    ),
    "autoscaled training": (
        "clusters/gpu",
        ("autoscalingConfig",),
        {},
        "autoscalingConfig",
        "a lost or added worker ends the training",
    ),
    "spot secondaries of a GPU cluster": (
        "clusters/gpu",
        ("secondaryWorkerConfig",),
        {"numInstances": 1, "preemptibility": "SPOT"},
        "secondaryWorkerConfig",
        "a lost or added worker ends the training; remove it; a GPU cluster has primaries only",
    ),
    "dynamic allocation of ranks": (
        "clusters/gpu",
        ("softwareConfig", "properties", "spark:spark.dynamicAllocation.enabled"),
        "true",
        "softwareConfig.properties['spark:spark.dynamicAllocation.enabled']",
        "ranks need all their executors at once; write 'false'",
    ),
    # Scaling.
    "secondaries that are not spot": (
        "clusters/etl",
        ("secondaryWorkerConfig", "preemptibility"),
        "NON_PREEMPTIBLE",
        "secondaryWorkerConfig.preemptibility",
        "autoscaled secondaries are not spot; write SPOT",
    ),
    "shuffle on secondaries": (
        "clusters/etl",
        ("softwareConfig", "properties", "dataproc:efm.spark.shuffle"),
        GONE,
        "softwareConfig.properties['dataproc:efm.spark.shuffle']",
        "a lost secondary loses its shuffle; write primary-worker",
    ),
    "flexibility mode without secondaries": (
        "clusters/gpu",
        ("softwareConfig", "properties", "dataproc:efm.spark.shuffle"),
        "primary-worker",
        "softwareConfig.properties['dataproc:efm.spark.shuffle']",
        "has no use without secondaries",
    ),
    "primaries that scale": (
        "autoscaling/etl",
        ("workerConfig", "maxInstances"),
        1,
        "workerConfig",
        "primaries from 2 to 1; give minInstances = maxInstances",
    ),
    "policy above the maximum": (
        "autoscaling/etl",
        ("secondaryWorkerConfig", "maxInstances"),
        5,
        "secondaryWorkerConfig.maxInstances",
        "7 workers in all, above cloud.max_workers = 6",
    ),
    "secondaries that linger": (
        "autoscaling/etl",
        ("basicAlgorithm", "yarnConfig", "gracefulDecommissionTimeout"),
        "3600s",
        "basicAlgorithm.yarnConfig.gracefulDecommissionTimeout",
        "write 0s; the shuffle lies on the primaries",
    ),
    # Software, identity, network.
    "no Delta": (
        "clusters/etl",
        ("softwareConfig", "optionalComponents"),
        ["JUPYTER"],
        "softwareConfig.optionalComponents",
        "lacks DELTA",
    ),
    "property without its file": (
        "clusters/etl",
        ("softwareConfig", "properties", "spark.executor.memory"),
        "4g",
        "softwareConfig.properties['spark.executor.memory']",
        "does not say whose property it is; begin with the file's name, such as spark:",
    ),
    "secret in a property": (
        "clusters/etl",
        ("softwareConfig", "properties", "spark-env:COUPONFLOW_USER_KEY"),
        "k",
        "softwareConfig.properties['spark-env:COUPONFLOW_USER_KEY']",
        "looks like a secret, and everybody who sees the job can read it",
    ),
    "secret in metadata": (
        "clusters/etl",
        ("gceClusterConfig", "metadata"),
        {"webhook-token": "t"},
        "gceClusterConfig.metadata['webhook-token']",
        "keep it in Secret Manager",
    ),
    "secret of a job": (
        "workflows/daily",
        ("jobs", 0, "pysparkJob", "properties"),
        {"spark.yarn.appMasterEnv.DB_PASSWORD": "p"},
        "jobs[0].pysparkJob.properties['spark.yarn.appMasterEnv.DB_PASSWORD']",
        "looks like a secret",
    ),
    "packages at start": (
        "clusters/etl",
        ("softwareConfig", "properties", "spark:spark.jars.packages"),
        "io.delta:delta-spark_2.12:3.3.2",
        "softwareConfig.properties['spark:spark.jars.packages']",
        "resolves packages at every start; put them into the image",
    ),
    "training as the account of ETL": (
        "clusters/gpu",
        ("gceClusterConfig", "serviceAccount"),
        "couponflow-etl@couponflow-dev.iam.gserviceaccount.com",
        "gceClusterConfig.serviceAccount",
        "is not of this duty; write couponflow-train@couponflow-dev.iam.gserviceaccount.com",
    ),
    "default account": (
        "clusters/etl",
        ("gceClusterConfig", "serviceAccount"),
        GONE,
        "gceClusterConfig.serviceAccount",
        "the default account is not of this duty",
    ),
    "public addresses": (
        "clusters/gpu",
        ("gceClusterConfig", "internalIpOnly"),
        False,
        "gceClusterConfig.internalIpOnly",
        "nodes would have public addresses",
    ),
    "no staging bucket": ("clusters/etl", ("configBucket",), GONE, "configBucket", "write {buckets.staging}"),
    "public init action": (
        "clusters/gpu",
        ("initializationActions",),
        [{"executableFile": "gs://goog-public/install.sh", "executionTimeout": "1200s"}],
        "initializationActions[0].executableFile",
        "is not in the code bucket and may change",
    ),
    "init action without time": (
        "clusters/gpu",
        ("initializationActions",),
        [{"executableFile": f"{CODE}/install.sh"}],
        "initializationActions[0].executionTimeout",
        "is missing: ten minutes would hold",
    ),
    # The template and its graph.
    "template id": ("workflows/daily", ("id",), "Daily!", "id", "'Daily!'; take 3 to 50 of"),
    "unknown prerequisite": (
        "workflows/daily",
        ("jobs", 5, "prerequisiteStepIds", 0),
        "sesionize",
        "jobs[5].prerequisiteStepIds[0]",
        "no step 'sesionize'; did you mean sessionize?",
    ),
    "cycle": (
        "workflows/daily",
        ("jobs", 0, "prerequisiteStepIds"),
        ["sessionize"],
        "jobs",
        "steps wait for each other: clean-events -> sessionize -> clean-events; remove one of these",
    ),
    "step that waits for itself": (
        "workflows/campaign",
        ("jobs", 0, "prerequisiteStepIds"),
        ["build-examples"],
        "jobs",
        "build-examples -> build-examples",
    ),
    "cluster name": (
        "workflows/daily",
        ("placement", "managedCluster", "clusterName"),
        "couponflow-daily-with-a-name-too-long",
        "placement.managedCluster.clusterName",
        "take 2 to 35",
    ),
    "no dag timeout": ("workflows/daily", ("dagTimeout",), GONE, "dagTimeout", "is missing: a hanging job"),
    "dag timeout too short": (
        "workflows/daily",
        ("dagTimeout",),
        "300s",
        "dagTimeout",
        "300 s is outside what Dataproc takes; set 600 to 86400 seconds",
    ),
    "dag outlives its cluster": (
        "workflows/daily",
        ("dagTimeout",),
        "36000s",
        "dagTimeout",
        "36000 s is longer than the cluster lives (32400 s)",
    ),
    # Jobs.
    "scheduling inside a template": (
        "workflows/daily",
        ("jobs", 0, "scheduling"),
        {"maxFailuresPerHour": 3},
        "jobs[0].scheduling",
        "restarts are not possible inside a template; remove it",
    ),
    "empty main file": (
        "workflows/daily",
        ("jobs", 0, "pysparkJob", "mainPythonFileUri"),
        "",
        "jobs[0].pysparkJob.mainPythonFileUri",
        "is empty; name the job's file",
    ),
    "unknown job": (
        "workflows/daily",
        ("jobs", 2, "pysparkJob", "mainPythonFileUri"),
        f"{CODE}/jobs/sesionize.py",
        "jobs[2].pysparkJob.mainPythonFileUri",
        "no job 'sesionize'; did you mean sessionize.py?",
    ),
    "stage of another job": (
        "workflows/daily",
        ("jobs", 2, "labels", "stage"),
        "score",
        "jobs[2].labels['stage']",
        "'score' names another job; write sessionize",
    ),
    "main file outside a release": (
        "workflows/daily",
        ("jobs", 2, "pysparkJob", "mainPythonFileUri"),
        "gs://somewhere/jobs/sessionize.py",
        "jobs[2].pysparkJob.mainPythonFileUri",
        "is not of a release; put it under gs://couponflow-dev-code/releases/",
    ),
    "package outside a release": (
        "workflows/daily",
        ("jobs", 2, "pysparkJob", "pythonFileUris", 0),
        "gs://somewhere/couponflow.zip",
        "jobs[2].pysparkJob.pythonFileUris[0]",
        "is not of a release",
    ),
    "wheel that no executor imports": (
        "workflows/daily",
        ("jobs", 2, "pysparkJob", "pythonFileUris", 0),
        f"{CODE}/couponflow-0.1.0-py3-none-any.whl",
        "jobs[2].pysparkJob.pythonFileUris[0]",
        "executors import .py, .egg and .zip; ship the wheel as .zip",
    ),
    "config that is not shipped": (
        "workflows/daily",
        ("jobs", 2, "pysparkJob", "args", 1),
        "prod.toml",
        "jobs[2].pysparkJob.args[1]",
        "'prod.toml' is not among fileUris",
    ),
    "cluster property on a job": (
        "workflows/daily",
        ("jobs", 2, "pysparkJob", "properties"),
        {"spark:spark.executor.memory": "4g"},
        "jobs[2].pysparkJob.properties['spark:spark.executor.memory']",
        "write spark.executor.memory",
    ),
    "missing job label": (
        "workflows/daily",
        ("jobs", 2, "labels", "version"),
        GONE,
        "jobs[2].labels['version']",
        "is missing; add it; runs and costs are found by label",
    ),
    "missing label of the environment": (
        "workflows/daily",
        ("placement", "managedCluster", "labels", "cost_center"),
        GONE,
        "placement.managedCluster.labels['cost_center']",
        "is missing",
    ),
    "label of another alphabet": (
        "workflows/daily",
        ("jobs", 2, "labels", "dt"),
        "2024-01-03:2024-01-04",
        "jobs[2].labels['dt']",
        "is no label; take 1 to 63 of a-z, 0-9, _ and -",
    ),
    # GPUs of jobs.
    "job that does not say its GPUs": (
        "workflows/train",
        ("jobs", 0, "pysparkJob", "properties"),
        GONE,
        "jobs[0].pysparkJob.properties['spark.executor.resource.gpu.amount']",
        "is missing: the cluster's default is 1; write '0' for a CPU job",
    ),
    "task GPUs of a CPU job": (
        "workflows/train",
        ("jobs", 0, "pysparkJob", "properties", "spark.task.resource.gpu.amount"),
        "1",
        "jobs[0].pysparkJob.properties['spark.task.resource.gpu.amount']",
        "a GPU setting on a CPU job; remove it",
    ),
    "GPU job on a CPU cluster": (
        "workflows/daily",
        ("jobs", 2, "pysparkJob", "properties"),
        {"spark.executor.resource.gpu.amount": "1"},
        "jobs[2].pysparkJob.properties['spark.executor.resource.gpu.amount']",
        "a GPU setting on a CPU job: the cluster has no GPUs",
    ),
    "evaluation on GPUs": (
        "workflows/train",
        ("jobs", 6, "pysparkJob", "properties", "spark.executor.resource.gpu.amount"),
        "1",
        "jobs[6].pysparkJob.properties['spark.executor.resource.gpu.amount']",
        "a GPU setting on a CPU job: evaluate needs none",
    ),
    "executor with half of the GPUs": (
        "workflows/train",
        ("jobs", 4, "pysparkJob", "properties", "spark.executor.resource.gpu.amount"),
        "2",
        "jobs[4].pysparkJob.properties['spark.executor.resource.gpu.amount']",
        "one rank is one task on one GPU, one executor a node; write '1'",
    ),
    "two tasks on a GPU": (
        "workflows/train",
        ("jobs", 4, "pysparkJob", "properties", "spark.task.resource.gpu.amount"),
        "0.5",
        "jobs[4].pysparkJob.properties['spark.task.resource.gpu.amount']",
        "write '1'",
    ),
    "cores that fit more tasks than GPUs": (
        "workflows/train",
        ("jobs", 4, "pysparkJob", "properties", "spark.executor.cores"),
        "8",
        "jobs[4].pysparkJob.properties['spark.executor.cores']",
        "write '6'",
    ),
    "more executors than nodes": (
        "workflows/train",
        ("jobs", 4, "pysparkJob", "properties", "spark.executor.instances"),
        "4",
        "jobs[4].pysparkJob.properties['spark.executor.instances']",
        "write '2'",
    ),
    "a rank that is retried": (
        "workflows/train",
        ("jobs", 4, "pysparkJob", "properties", "spark.task.maxFailures"),
        GONE,
        "jobs[4].pysparkJob.properties['spark.task.maxFailures']",
        "None: one rank is one task",
    ),
    # Parameters.
    "parameter name": (
        "workflows/daily",
        ("parameters", 2, "name"),
        "event-dates",
        "parameters[2].name",
        "'event-dates'; take 1 to 40 of A-Z, 0-9 and _",
    ),
    "parameter twice": (
        "workflows/daily",
        ("parameters", 3, "name"),
        "EVENT_DATES",
        "parameters[3].name",
        "'EVENT_DATES' stands twice",
    ),
    "no run id": (
        "workflows/daily",
        ("parameters", 1, "name"),
        "ID",
        "parameters",
        "no parameter RUN_ID; add it",
    ),
    "parameter that takes anything": (
        "workflows/daily",
        ("parameters", 2, "validation"),
        GONE,
        "parameters[2].validation",
        "is missing: any text would reach the jobs",
    ),
    "fixed dates": (
        "workflows/backfill",
        ("parameters", 2, "fields"),
        ["jobs['clean-events'].pySparkJob.args[3]"],
        "jobs[1].pysparkJob.args[3]",
        "--dates INGEST_DATES would be the same in every run; add jobs['clean-feeds'].pySparkJob.args[3]",
    ),
    "fixed campaign": (
        "workflows/campaign",
        ("parameters", 2, "fields", 0),
        "jobs['build-examples'].pySparkJob.args[6]",
        "jobs[0].pysparkJob.args[5]",
        "--campaign CAMPAIGN_ID would be the same in every run",
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_broken_rule_is_the_one_finding(name: str) -> None:
    which, path, value, field, words = CASES[name]
    kind = which.partition("/")[0]
    assert not found(kind, spec(which).tree)
    (finding,) = found(kind, changed(spec(which).tree, *path, value=value))
    assert finding.field == field
    assert finding.file == "spec.yaml"
    assert words in str(finding), finding
    assert finding.next_step


#: Changes that cannot break one rule alone: every finding's field and words, in order.
COMBINED: dict[str, tuple[str, tuple[Any, ...], Any, list[tuple[str, str]]]] = {
    "no job": (
        "workflows/campaign",
        ("jobs",),
        [],
        [("jobs", "has no job")] + [("parameters", "no step")] * 12,
    ),
    "no cluster": (
        "workflows/daily",
        ("placement",),
        {},
        [("placement.managedCluster", "is missing; give the template a cluster")],
    ),
    "step id": (
        "workflows/campaign",
        ("jobs", 2, "stepId"),
        "-select-",
        [
            ("jobs[2].stepId", "no _ or - at the ends"),
            ("jobs[2].pysparkJob.args[3]", "would be the same in every run"),
            ("jobs[2].pysparkJob.args[5]", "would be the same in every run"),
            ("jobs[2].labels['dt']", "add it to the fields of RUN_DATE"),
            ("jobs[2].labels['run']", "add it to the fields of RUN_ID"),
        ]
        + [("parameters", "no step 'select-audience'; correct the step id")] * 4,
    ),
    "duplicate step id": (
        "workflows/campaign",
        ("jobs", 2, "stepId"),
        "score",
        [("jobs[2].stepId", "'score' stands twice; give each step its own id")]
        # The first of the two is taken for the step that other lines name.
        + [("jobs", "steps wait for each other: score -> score")]
        + [("parameters", "no step 'select-audience'")] * 4,
    ),
    "no Python program": (
        "workflows/campaign",
        ("jobs", 2, "pysparkJob"),
        GONE,
        [("jobs[2].pysparkJob", "is missing: our jobs are PySpark programs")]
        + [("parameters", "the step has 0 of these")] * 2,
    ),
    "field in two parameters": (
        "workflows/daily",
        ("parameters", 3, "fields"),
        ["jobs['attribute-conversions'].pySparkJob.args[3]", "jobs['sessionize'].pySparkJob.args[3]"],
        [
            (
                "parameters[2].fields[0]",
                "jobs['sessionize'].pySparkJob.args[3] is in two parameters; keep one",
            ),
            ("parameters[3].fields[1]", "is in two parameters"),
        ],
    ),
    "parameter without fields": (
        "workflows/daily",
        ("parameters", 2, "fields"),
        [],
        [
            ("jobs[2].pysparkJob.args[3]", "--dates EVENT_DATES would be the same in every run"),
            ("parameters[2].fields", "is empty; name what it replaces"),
        ],
    ),
    "no config": (
        "workflows/campaign",
        ("jobs", 1, "pysparkJob", "args"),
        ["--dates", "RUN_DATE"],
        [
            ("jobs[1].pysparkJob.args", "no --config; give the file of the environment"),
            ("jobs[1].pysparkJob.args[1]", "would be the same in every run"),
            ("parameters[0].fields", "the step has 2 of these; correct the index"),
            ("parameters[2].fields", "the step has 2 of these"),
        ],
    ),
}


@pytest.mark.parametrize("name", sorted(COMBINED))
def test_every_finding_is_listed(name: str) -> None:
    which, path, value, expected = COMBINED[name]
    findings = found(which.partition("/")[0], changed(spec(which).tree, *path, value=value))
    assert len(findings) == len(expected), texts(findings)
    for finding, (field, words) in zip(findings, expected, strict=True):
        assert finding.field.startswith(field), texts(findings)
        assert words in str(finding), texts(findings)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("jobs['score'].pySparkJob.args[9]", "the step has 7 of these; correct the index; it counts from 0"),
        ("jobs['scorn'].pySparkJob.args[3]", "no step 'scorn'"),
        ("jobs['score'].labels['team']", "no such label"),
        ("labels['team']", "no such label"),
        ("jobs['score'].pySparkJob.properties['spark.x']", "no such property"),
        (
            "placement.managedCluster.config.workerConfig.machineTypeUri",
            "no single field that a parameter may",
        ),
        ("jobs['score'].pySparkJob.args", "no single field"),
        ("jobs['score'].pysparkJob.args[3]", "no single field"),
        ("dagTimeout", "machines and their number are the environment's"),
    ],
)
def test_a_parameter_replaces_single_fields_that_are_there(field: str, words: str) -> None:
    tree = spec("workflows/campaign").tree
    fields = [*tree["parameters"][2]["fields"], field]
    (finding,) = found("workflows", changed(tree, "parameters", 2, "fields", value=fields))
    assert finding.field == "parameters[2].fields[3]"
    assert words in str(finding)


@pytest.mark.parametrize(
    "field",
    [
        "labels['cost_center']",
        "placement.managedCluster.labels['cost_center']",
        "jobs['score'].pySparkJob.mainPythonFileUri",
        "jobs['score'].pySparkJob.fileUris[0]",
    ],
)
def test_other_single_fields_may_be_replaced(field: str) -> None:
    tree = spec("workflows/campaign").tree
    fields = [*tree["parameters"][2]["fields"], field]
    assert not found("workflows", changed(tree, "parameters", 2, "fields", value=fields))


def test_an_init_action_of_a_release_is_fine() -> None:
    action = {"executableFile": f"{CODE}/customize.sh", "executionTimeout": "1200s"}
    assert not found("clusters", changed(spec("clusters/gpu").tree, "initializationActions", value=[action]))


def test_several_kinds_of_wrong_are_all_found() -> None:
    tree = changed(spec("clusters/etl").tree, "gceClusterConfig", "internalIpOnly", value="no")
    tree = changed(tree, "workerConfig", "numInstances", value="2")
    tree = changed(tree, "lifecycleConfig", "idleDeletTtl", value="1800s")
    assert sorted(finding.field for finding in found("clusters", tree)) == [
        "gceClusterConfig.internalIpOnly",
        "lifecycleConfig.idleDeletTtl",
        "workerConfig.numInstances",
    ]


def test_the_cases_cover_every_kind() -> None:
    kinds = {which.partition("/")[0] for which, *_ in CASES.values()}
    assert kinds == {name.partition("/")[0] for name in NAMES}
