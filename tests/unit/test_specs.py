"""Deploy files and environments: every pair is valid, rendering is pure, and a value stays one value."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from deploy_files import DEPLOY, ENVIRONMENTS, NAMES, RELEASE, ROOT, changed, environment, rendered, texts
from pydantic import BaseModel
from typer.testing import CliRunner

from couponflow.cli import app
from couponflow.cloud import specs
from couponflow.cloud.rendering import Place, fill, parse
from couponflow.clouding import CloudConfig
from couponflow.config import load_config
from couponflow.errors import ConfigError
from couponflow.prices import hourly_price

GOLDEN = ROOT / "tests" / "golden" / "deploy-dev.json"
PLACE = Place("spec.yaml")
EVERYWHERE = [(name, which) for name in ENVIRONMENTS for which in NAMES]


def message(name: str, which: str) -> Any:
    return specs.message(rendered(name)[which])


def clusters_of(name: str, which: str) -> list[Any]:
    """The clusters that a spec is or holds, as the library's type."""
    found = message(name, which)
    if which.startswith("workflows/"):
        return [found.placement.managed_cluster.config]
    return [found] if which.startswith("clusters/") else []


def jobs_of(name: str, which: str) -> list[Any]:
    return list(message(name, which).jobs) if which.startswith("workflows/") else []


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_spec_is_valid_in_every_environment(name: str) -> None:
    verdicts = specs.check(environment(name), RELEASE, DEPLOY)
    assert [verdict.file for verdict in verdicts] == [
        environment(name).file,
        *(spec.place.file for spec in rendered(name).values()),
    ]
    assert not [finding for verdict in verdicts for finding in verdict.findings], texts(
        [finding for verdict in verdicts for finding in verdict.findings]
    )
    for verdict in verdicts:
        if "/clusters/" in verdict.file:
            assert verdict.price is not None
            assert 0 < verdict.price.least <= verdict.price.most
        if "/workflows/" in verdict.file:
            assert verdict.run_amount is not None
            assert 0 < verdict.run_amount <= environment(name).cloud.budget_per_run_amount


def test_the_library_reads_back_what_was_written() -> None:
    from google.protobuf import json_format

    template = message("dev", "workflows/train")
    again = json_format.MessageToDict(type(template).pb(template))
    assert again["jobs"][4]["pysparkJob"] == rendered("dev")["workflows/train"].tree["jobs"][4]["pysparkJob"]
    assert template.dag_timeout.total_seconds() == 21_600
    assert template.placement.managed_cluster.config.lifecycle_config.idle_delete_ttl.total_seconds() == 1_800
    assert [parameter.name for parameter in template.parameters][:2] == ["RUN_DATE", "RUN_ID"]


#: Rules for the fleet, stated on the library's types and so apart from the code that checks trees.
@pytest.mark.parametrize(("name", "which"), EVERYWHERE)
def test_fleet_rules(name: str, which: str) -> None:
    cloud = environment(name).cloud
    for cluster in clusters_of(name, which):
        life = cluster.lifecycle_config
        assert (
            300 <= life.idle_delete_ttl.total_seconds() <= life.auto_delete_ttl.total_seconds() <= 14 * 86_400
        )
        assert "DELTA" in [component.name for component in cluster.software_config.optional_components]
        assert cluster.gce_cluster_config.internal_ip_only
        assert cluster.gce_cluster_config.service_account.endswith(
            f"@{cloud.project}.iam.gserviceaccount.com"
        )
        assert cluster.config_bucket == cluster.temp_bucket == cloud.buckets.staging
        groups = [cluster.master_config, cluster.worker_config]
        assert all(re.fullmatch(r"projects/\S+/images/[a-z0-9-]+-\d{8}", group.image_uri) for group in groups)
        assert all(group.preemptibility.name == "PREEMPTIBILITY_UNSPECIFIED" for group in groups)
        has_gpus = bool(cluster.worker_config.accelerators)
        assert cluster.gce_cluster_config.service_account.startswith("couponflow-train") == has_gpus
        assert bool(cluster.autoscaling_config.policy_uri) != has_gpus
        assert (cluster.secondary_worker_config.preemptibility.name == "SPOT") != has_gpus
        assert cluster.worker_config.num_instances <= cloud.max_workers
        assert not cluster.initialization_actions
    for job in jobs_of(name, which):
        assert {"app", "environment", "cost_center", "stage", "dt", "run", "version"} == set(job.labels)
        assert job.labels["version"] == RELEASE
        assert not job.scheduling.max_failures_per_hour
        program = job.pyspark_job
        stage = Path(program.main_python_file_uri).stem
        assert job.labels["stage"] == stage
        assert (ROOT / "jobs" / f"{stage}.py").is_file()
        assert "--config" in program.args
        assert options_of(stage) >= {arg for arg in program.args if arg.startswith("--")}
        (cluster,) = clusters_of(name, which)
        gpus = sum(one.accelerator_count for one in cluster.worker_config.accelerators)
        if gpus:
            amount = program.properties["spark.executor.resource.gpu.amount"]
            assert amount == (str(gpus) if "dien" in program.args else "0")
        else:
            assert "gpu" not in str(dict(program.properties))


def options_of(job: str) -> set[str]:
    """Options of a job's command, as its source declares them."""
    tree = ast.parse((ROOT / "jobs" / f"{job}.py").read_text(encoding="utf-8"))
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    return {f"--{argument.arg.replace('_', '-')}" for argument in main.args.args}


def test_the_budget_holds_the_dearest_run() -> None:
    """The estimate of dev by hand, from the rows of its price table."""
    fee, disk = 0.010, 100 * 0.10 / 730
    master = 4 * (0.031611 + fee) + 16 * 0.004237 + disk
    worker = 4 * (0.031611 + fee) + 32 * 0.004237 + disk
    spot = 4 * (0.018967 + fee) + 32 * 0.002542 + disk
    cluster = rendered("dev")["clusters/etl"].tree
    price = hourly_price(cluster, environment("dev").cloud, max_secondaries=4)
    assert price.least == pytest.approx(master + 2 * worker)
    assert price.most == pytest.approx(master + 2 * worker + 4 * spot)
    node = 8 * (0.031611 + fee) + 30 * 0.004237 + 0.35 + disk
    gpu = hourly_price(rendered("dev")["clusters/gpu"].tree, environment("dev").cloud)
    assert gpu.least == gpu.most == pytest.approx(4 * (0.031611 + fee) + 15 * 0.004237 + disk + 2 * node)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("workerConfig", "machineTypeUri"), "e2-standard-4", "add family e2 to cloud.prices.machines"),
        (("workerConfig", "machineTypeUri"), "m3-ultramem-32", "has no known size"),
        (("workerConfig", "machineTypeUri"), "", "has no known size"),
        (
            ("workerConfig", "accelerators"),
            [{"acceleratorTypeUri": "nvidia-tesla-p4", "acceleratorCount": 1}],
            "add it to cloud.prices.gpus",
        ),
    ],
)
def test_what_has_no_price_is_named(path: tuple[str, ...], value: Any, words: str) -> None:
    cluster = changed(rendered("dev")["clusters/etl"].tree, *path, value=value)
    with pytest.raises(ConfigError, match=re.escape(words)):
        hourly_price(cluster, environment("dev").cloud)


def test_rendered_specs_are_the_golden_text() -> None:
    trees = {which: spec.tree for which, spec in rendered("dev").items()}
    text = json.dumps(trees, indent=1, sort_keys=True) + "\n"
    if os.environ.get("COUPONFLOW_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "run `make golden` and review the difference"


def test_rendering_is_pure_and_follows_its_arguments_alone() -> None:
    cloud = environment("dev").cloud
    before = cloud.model_dump_json()
    one, two = (specs.render(cloud, RELEASE, DEPLOY) for _ in range(2))
    assert one == two
    assert cloud.model_dump_json() == before
    other = specs.render(cloud, "fedcba9876543210", DEPLOY)
    rewritten = json.dumps([spec.tree for spec in other]).replace("fedcba9876543210", RELEASE)
    assert rewritten == json.dumps([spec.tree for spec in one])
    assert not [text for text in _strings([spec.tree for spec in one]) if "{" in text]


def _strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [*map(str, node), *(text for value in node.values() for text in _strings(value))]
    if isinstance(node, list):
        return [text for value in node for text in _strings(value)]
    return [node] if isinstance(node, str) else []


INJECTIONS = (
    "a\nworkers: 9",
    'a"',
    "a'",
    "{project}",
    "a}",
    "a b",
    "a#",
    "a: b",
    "ä",
    "a\x00",
    "$(id)",
    "a\\n",
)


@pytest.mark.parametrize("value", INJECTIONS)
def test_a_value_cannot_become_more_than_one_value(value: str) -> None:
    tree = {"bucket": "gs://{name}/x", "alone": "{name}", "list": ["{name!s}"]}
    filled, findings = fill(tree, {"name": value, "project": "p"}, PLACE)
    assert filled == tree
    assert [finding.field for finding in findings] == ["bucket", "alone", "list[0]"]
    assert all(f"{{name}} is {value!r}" in str(finding) for finding in findings)


@pytest.mark.parametrize("value", INJECTIONS)
@pytest.mark.parametrize("name", ["project", "subnetwork", "buckets.code", "etl.image", "gpu.accelerator"])
def test_the_config_takes_no_such_value_either(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cloud.{name}")):
        load_config(DEPLOY / "env" / "dev.toml", (f"cloud.{name}={json.dumps(value)}",))


@pytest.mark.parametrize(
    "release", ["", "0123", "v1.2.3", "A" * 12, "0123456789abcdef\n", "../0123456789", "a" * 41]
)
def test_a_release_is_a_hash(release: str) -> None:
    with pytest.raises(ConfigError, match="take the hash of the upload"):
        specs.render(environment("dev").cloud, release, DEPLOY)


def test_placeholders_take_the_type_of_their_value() -> None:
    values = {"count": 3, "name": "x", "tree": {"a": 1}}
    tree = {
        "number": "{count}",
        "text": "{count!s}",
        "inside": "{count}s of {name}",
        "whole": "{tree}",
        "plain": 1,
    }
    filled, findings = fill(tree, values, PLACE)
    assert filled == {"number": 3, "text": "3", "inside": "3s of x", "whole": {"a": 1}, "plain": 1}
    assert not findings


@pytest.mark.parametrize(
    ("tree", "field", "words"),
    [
        ({"a": "{projct}"}, "a", "unknown placeholder {projct}; did you mean {project}?"),
        ({"a": ["x", "{}"]}, "a[1]", "unknown placeholder {}; placeholders are the names under [cloud]"),
        ({"a": "{buckets}"}, "a", "unknown placeholder {buckets}"),
        ({"a": "{prices.read_date}"}, "a", "unknown placeholder"),
        ({"a": "{project"}, "a", "a single brace in '{project'; write placeholders as {name}"),
        ({"a": "{{project}}"}, "a", "a single brace"),
        ({"a": {"{project}": 1}}, "a.{project}", "a brace in a name; placeholders stand in values only"),
        ({"a": "x{clusters.etl}"}, "a", "{clusters.etl} is a whole tree; let it stand alone"),
    ],
)
def test_placeholders_are_strict(tree: dict[str, Any], field: str, words: str) -> None:
    values = {**specs.placeholders(environment("dev").cloud, RELEASE), "clusters.etl": {}}
    _, (finding,) = fill(tree, values, PLACE)
    assert finding.field == field
    assert words in str(finding)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "'a' stands twice"),
        ("a: {b: 1, b: 2}\n", "'b' stands twice"),
        ("a: [1\n", "not valid YAML"),
        ("- a\n", "no mapping at the top"),
        ("", "no mapping at the top"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
    ],
)
def test_yaml_is_read_strictly(text: str, words: str) -> None:
    tree, (finding,) = parse(text, PLACE)
    assert tree == {}
    assert words in str(finding)


def test_a_merged_key_may_be_overridden() -> None:
    tree, findings = parse("a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, y: 3}\n", PLACE)
    assert not findings
    assert (tree["b"], tree["c"]) == ({"x": 1, "y": 2}, {"x": 1, "y": 3})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cloud.etl.zone=europe-west1-b", "etl.zone = europe-west1-b is not in region us-west1"),
        ("cloud.buckets.code=couponflow-dev-lake", "buckets must differ"),
        (
            "cloud.service_accounts.etl=couponflow-train@couponflow-dev.iam.gserviceaccount.com",
            "accounts must differ",
        ),
        (
            "cloud.service_accounts.etl=couponflow-etl@couponflow-prod.iam.gserviceaccount.com",
            "is not of project",
        ),
        ("cloud.etl.worker_machine=e2-standard-4", "prices.machines has no family e2"),
        ("cloud.gpu.accelerator=nvidia-tesla-p4", "prices.gpus has no accelerator nvidia-tesla-p4"),
        ("cloud.etl.idle_seconds=40000", "idle_seconds <= age_seconds must hold"),
        ("cloud.etl.idle_seconds=60", "greater than or equal to 300"),
        ("cloud.etl.num_workers=1", "greater than or equal to 2"),
        ("cloud.etl.image=projects/couponflow-dev/global/images/family/etl", "cloud.etl.image"),
        ("cloud.labels.Team=x", "cloud.labels.Team"),
        ("cloud.prices.machines=[]", "cloud.prices.machines"),
        ("cloud.prices.currency=EUR", "cloud.prices.currency"),
        ("cloud.prices.read_date=2026-02-30", "cloud.prices.read_date"),
        ("cloud.budget_per_run_amount=0.0", "greater than 0"),
        ("cloud.budget_per_run=1.0", "did you mean budget_per_run_amount?"),
        ("cloud.etl.spot=true", "unknown config name cloud.etl.spot"),
    ],
)
def test_an_environment_is_refused_by_name(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEPLOY / "env" / "dev.toml", (override,))
    assert words in str(caught.value)


def test_a_price_stands_once() -> None:
    text = (DEPLOY / "env" / "dev.toml").read_text(encoding="utf-8")
    tree = tomllib.loads(text.replace('family = "g2"', 'family = "n1"'))
    with pytest.raises(ValueError, match="may stand once"):
        CloudConfig.model_validate(tree["cloud"])


def test_every_field_of_the_section_is_described() -> None:
    def bare(model: BaseModel, prefix: str) -> list[str]:
        found = [
            f"{prefix}{name}" for name, field in type(model).model_fields.items() if not field.description
        ]
        for name, value in model:
            for one in value if isinstance(value, tuple) else [value]:
                found += bare(one, f"{prefix}{name}.") if isinstance(one, BaseModel) else []
        return found

    assert not bare(environment("dev").cloud, "cloud.")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lake.root_uri=gs://other/lake", "lake.root_uri: gs://other/lake is not in the lake's bucket"),
        ("export.target_uri=var/export", "export.target_uri: var/export ends with its cluster"),
        ("training.num_ranks=3", "training.num_ranks: 3 ranks on 2 GPUs; write 2"),
        ("events.key_secret=", "events.key_secret: jobs on Dataproc find no pseudonym key in a variable"),
        ("training.launcher=processes", "training.launcher: ranks would run on the master, which has no GPU"),
        ("cloud.budget_per_run_amount=5.0", "above cloud.budget_per_run_amount = 5.00"),
        ("cloud.max_workers=3", "6 workers in all, above cloud.max_workers = 3"),
        ("cloud.labels={}", "unknown placeholder {labels.cost_center}"),
        ("cloud.labels={cost_center='crm', team='ml'}", "labels['team']: is missing; add it"),
        ("cloud.etl.age_seconds=7200", "is longer than the cluster lives (7200 s)"),
        ("cloud.gpu.worker_machine=n2-standard-8", "is not carried by n2 machines"),
    ],
)
def test_an_environment_has_to_fit_the_specs(override: str, words: str) -> None:
    config = load_config(DEPLOY / "env" / "dev.toml", (override,))
    assert config.cloud is not None
    changed_environment = specs.Environment("dev.toml", config, config.cloud)
    verdicts = specs.check(changed_environment, RELEASE, DEPLOY)
    assert words in texts([finding for verdict in verdicts for finding in verdict.findings])


# The command.


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of deploy/ to break."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "deploy"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def checked(name: str, *more: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["check", "--deploy", name, *more])
    return done.exit_code, done.stdout, done.stderr


def test_check_prints_every_spec_with_verdict_and_price(copied: Path) -> None:
    code, out, _ = checked("dev")
    assert code == 0, out
    for which in NAMES:
        (line,) = [line for line in out.splitlines() if f"deploy/{which}.yaml" in line]
        assert "valid" in line
    assert "estimated with list prices of 2026-09-27, https://" in out
    (etl,) = [line for line in out.splitlines() if "deploy/clusters/etl.yaml" in line]
    assert re.search(r"\d+\.\d\d to \d+\.\d\d", etl)
    assert checked("deploy/env/prod.toml")[0] == 0


def test_check_speaks_json(copied: Path) -> None:
    code, out, _ = checked("ci", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["environment"] == "ci"
    assert shown["prices"]["read_date"] == "2026-09-27"
    assert [one["file"] for one in shown["specs"]] == [
        "deploy/env/ci.toml",
        *(f"deploy/{which}.yaml" for which in NAMES),
    ]
    assert not any(one["findings"] for one in shown["specs"])
    assert shown["specs"][1]["price"]["least"] > 0
    assert shown["specs"][1]["rendered"]["configBucket"] == "couponflow-ci-staging"


def test_check_writes_the_files_that_gcloud_imports(copied: Path, tmp_path: Path) -> None:
    """A cluster there is a ``Cluster``, with the labels of the environment; the rest is as rendered."""
    folder = tmp_path / "specs"
    code, out, _ = checked("dev", "--write", str(folder))
    assert code == 0
    written = {
        path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")
    }
    assert set(written) == {f"{which}.json" for which in NAMES}
    assert all(f"written: {folder / name}" in out for name in written)
    shown = json.loads(checked("dev", "--json")[1])
    for one in shown["specs"][1:]:
        name = one["file"].removeprefix("deploy/").replace(".yaml", ".json")
        tree = written[name]
        if name.startswith("clusters/"):
            assert tree.pop("labels") == {"app": "couponflow", "environment": "dev", "cost_center": "crm"}
            tree = tree["config"]
        assert tree == one["rendered"]
    json.loads(checked("dev", "--json", "--write", str(folder))[1])  # nothing but JSON


def test_nothing_is_written_of_specs_with_findings_or_without_an_environment(
    copied: Path, tmp_path: Path
) -> None:
    edit(copied / "env" / "dev.toml", "num_ranks = 2", "num_ranks = 5")
    assert checked("dev", "--write", str(tmp_path / "specs"))[0] == 2
    assert not (tmp_path / "specs").exists()
    done = CliRunner().invoke(app, ["check", "--contract", "--write", str(tmp_path / "specs")])
    assert done.exit_code == 2
    assert "writes the specs of an environment; give --deploy ENV too" in done.stderr
    (tmp_path / "specs").write_text("a file")
    code, _, err = checked("ci", "--write", str(tmp_path / "specs"))
    assert code == 2
    assert "cannot be written (" in err


def test_check_lists_all_findings_and_ends_with_2(copied: Path) -> None:
    edit(copied / "clusters" / "etl.yaml", "internalIpOnly: true", "internalIpOnly: false")
    edit(copied / "autoscaling" / "etl.yaml", "scaleUpFactor: 0.5", "scaleUpFacto: 0.5")
    edit(copied / "workflows" / "daily.yaml", "dagTimeout: 14400s", "dagTimeout: 4h")
    edit(
        copied / "workflows" / "campaign.yaml",
        "prerequisiteStepIds: [score]",
        "prerequisiteStepIds: [scores]",
    )
    edit(copied / "env" / "dev.toml", "num_ranks = 2", "num_ranks = 5")
    code, out, err = checked("dev")
    assert code == 2
    for words in (
        "deploy/env/dev.toml: training.num_ranks: 5 ranks on 2 GPUs; write 2",
        "deploy/clusters/etl.yaml: gceClusterConfig.internalIpOnly: nodes would have public addresses",
        "basicAlgorithm.yarnConfig.scaleUpFacto: no such field; write scaleUpFactor",
        "deploy/workflows/daily.yaml: dagTimeout: '4h' is no duration",
        "deploy/workflows/campaign.yaml: jobs[2].prerequisiteStepIds[0]: no step 'scores'; did you mean",
        # Its policy is no longer valid.
        "deploy/clusters/etl.yaml: autoscalingConfig.policyUri: no policy 'couponflow-etl'",
    ):
        assert words in out, out
    assert "environment dev: 6 findings in its specs; correct them" in err
    code, out, _ = checked("dev", "--json")
    assert code == 2
    found = [finding for one in json.loads(out)["specs"] for finding in one["findings"]]
    assert len(found) == 6
    assert all(set(finding) == {"file", "field", "problem", "next_step"} for finding in found)


def test_a_broken_cluster_is_told_once(copied: Path) -> None:
    edit(copied / "clusters" / "gpu.yaml", "numInstances: 1", 'numInstances: "1"')
    code, out, _ = checked("dev", "--json")
    found = [finding for one in json.loads(out)["specs"] for finding in one["findings"]]
    assert code == 2
    assert [(one["file"], one["field"]) for one in found] == [
        ("deploy/clusters/gpu.yaml", "masterConfig.numInstances")
    ]


def test_a_cluster_inside_a_workflow_is_refused(copied: Path) -> None:
    edit(copied / "workflows" / "train.yaml", 'config: "{clusters.gpu}"', "config: {configBucket: b}")
    code, out, _ = checked("dev")
    assert code == 2
    assert (
        'placement.managedCluster.config: is not a cluster of deploy/clusters; write "{clusters.NAME}"' in out
    )


def test_files_that_are_not_there_are_named(copied: Path, tmp_path: Path) -> None:
    assert "environment 'stage': no file deploy/env/stage.toml; one of ci, demo, dev, " in checked("stage")[2]
    assert "deploy/env/local.toml: has no [cloud]" in checked("local")[2]
    assert "missing.toml: cannot be read" in checked("./missing.toml")[2]
    (copied / "clusters" / "etl.yaml").write_bytes(b"\xff\xfe")
    assert "deploy/clusters/etl.yaml: cannot be read" in checked("dev")[2]
    for kind in ("clusters", "autoscaling", "workflows"):
        shutil.rmtree(copied / kind)
    assert "deploy: holds no spec; call from the project's root" in checked("dev")[2]
    for name in ("stage", "local", "dev"):
        assert checked(name)[0] == 2


def test_a_spec_with_findings_becomes_no_request() -> None:
    spec = rendered("dev")["clusters/etl"]
    broken = specs.Spec(spec.kind, spec.name, spec.place, changed(spec.tree, "workerCofig", value={}))
    with pytest.raises(ConfigError, match="workerCofig: no such field"):
        specs.message(broken)


def test_the_command_line_loads_no_google_library() -> None:
    """Types and clients take a second or two: only a check or a submission pays them."""
    code = (
        "import sys; from couponflow import cli; from couponflow.cloud import specs; "
        "heavy = ('google.cloud.dataproc_v1', 'google.protobuf', 'grpc', 'yaml'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
