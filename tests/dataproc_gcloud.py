#!/usr/bin/env python3
"""A stand-in for ``gcloud`` as a person uses it on Dataproc: specs imported, clusters, workflows, objects.

It reads a file as gcloud does, into the message of Google's library, which refuses what it does not know, and
sends it by the real client. Addresses, project and switches are the variables that gcloud itself reads, so
that ``test_gcloud_stand_in.py`` can hold the two against each other. A login and the project are kept in the
folder ``CLOUDSDK_CONFIG``: what comes before them ends with 1, as there.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from dataproc_drivers import POLLING
from dataproc_messages import parsed
from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.auth.credentials import AnonymousCredentials
from google.cloud import dataproc_v1 as dp
from google.cloud import storage
from google.protobuf import json_format

Command = Callable[[argparse.Namespace], None]


def login(asked: argparse.Namespace) -> None:
    """A browser would open here."""
    remember(account="somebody@example.com")


def set_project(asked: argparse.Namespace) -> None:
    remember(project=asked.project)


def import_policy(asked: argparse.Namespace) -> None:
    service, policy = client(dp.AutoscalingPolicyServiceClient), message(dp.AutoscalingPolicy, asked)
    policy.id = asked.id
    name = f"{parent(asked)}/autoscalingPolicies/{asked.id}"
    try:
        service.get_autoscaling_policy(name=name)
    except NotFound:
        service.create_autoscaling_policy(parent=parent(asked), policy=policy)
    else:
        policy.name = name
        service.update_autoscaling_policy(policy=policy)


def import_cluster(asked: argparse.Namespace) -> None:
    cluster = message(dp.Cluster, asked)
    cluster.cluster_name, cluster.project_id = asked.id, project()
    made = client(dp.ClusterControllerClient).create_cluster(
        project_id=project(), region=asked.region, cluster=cluster
    )
    made.result(polling=POLLING)


def describe_cluster(asked: argparse.Namespace) -> None:
    place = {"project_id": project(), "region": asked.region}
    found = client(dp.ClusterControllerClient).get_cluster(**place, cluster_name=asked.id)
    if asked.format != "value(status.state)":
        sys.exit(f"ERROR: this stand-in prints value(status.state), not {asked.format}")
    tell(found.status.state.name)


def list_clusters(asked: argparse.Namespace) -> None:
    found = list(client(dp.ClusterControllerClient).list_clusters(project_id=project(), region=asked.region))
    tell("NAME  STATUS", *(f"{one.cluster_name}  {one.status.state.name}" for one in found))


def delete_cluster(asked: argparse.Namespace) -> None:
    place = {"project_id": project(), "region": asked.region}
    client(dp.ClusterControllerClient).delete_cluster(**place, cluster_name=asked.id).result(polling=POLLING)


def import_template(asked: argparse.Namespace) -> None:
    service, template = client(dp.WorkflowTemplateServiceClient), message(dp.WorkflowTemplate, asked)
    template.id = asked.id
    name = f"{parent(asked)}/workflowTemplates/{asked.id}"
    try:
        known = service.get_workflow_template(name=name)
    except NotFound:
        service.create_workflow_template(parent=parent(asked), template=template)
    else:
        template.name, template.version = name, known.version
        service.update_workflow_template(template=template)


def instantiate(asked: argparse.Namespace) -> None:
    values = dict(pair.split("=", 1) for pair in asked.parameters.split(","))
    name = f"{parent(asked)}/workflowTemplates/{asked.id}"
    started = client(dp.WorkflowTemplateServiceClient).instantiate_workflow_template(
        name=name, parameters=values
    )
    started.result(polling=POLLING)


def copy(asked: argparse.Namespace) -> None:
    """Upload files, and folders below their own names, as gcloud does where the target ends with a slash."""
    *sources, target = asked.paths
    bucket, prefix = in_store(target)
    if not target.endswith("/"):
        sys.exit(f"ERROR: this stand-in copies into a folder; end {target} with a slash")
    for source in map(Path, sources):
        if not source.exists():
            sys.exit(f"ERROR: The following URLs matched no objects or files:\n{source}")
        if source.is_dir() and not asked.r:
            sys.exit(f"ERROR: Omitting prefix {source} because --recursive was not specified")
        files = [one for one in source.rglob("*") if one.is_file()] if source.is_dir() else [source]
        for file in files:
            bucket.blob(prefix + file.relative_to(source.parent).as_posix()).upload_from_filename(file)


def show(asked: argparse.Namespace) -> None:
    """All objects below a name."""
    bucket, prefix = in_store(asked.path)
    found = [f"gs://{bucket.name}/{blob.name}" for blob in bucket.list_blobs(prefix=prefix)]
    if not found:
        sys.exit("ERROR: One or more URLs matched no objects.")
    tell(*found)


#: Each command with the options that it takes here; a star takes any number of arguments.
COMMANDS: dict[str, tuple[Command, str]] = {
    "auth login": (login, ""),
    "auth application-default login": (login, ""),
    "config set project": (set_project, "project"),
    "dataproc autoscaling-policies import": (import_policy, "id --region --source"),
    "dataproc clusters import": (import_cluster, "id --region --source"),
    "dataproc clusters describe": (describe_cluster, "id --region --format"),
    "dataproc clusters list": (list_clusters, "--region"),
    "dataproc clusters delete": (delete_cluster, "id --region"),
    "dataproc workflow-templates import": (import_template, "id --region --source"),
    "dataproc workflow-templates instantiate": (instantiate, "id --region --parameters"),
    "storage cp": (copy, "paths* -r"),
    "storage ls": (show, "path"),
}


def main(argv: list[str]) -> int:
    """Run one command; 1 where it is refused, 2 where it cannot be read."""
    name = next((one for one in COMMANDS if argv[: len(one.split())] == one.split()), None)
    if name is None:
        sys.stderr.write(f"ERROR: (gcloud) Invalid choice: {' '.join(argv)}\n")
        return 2
    run, options = COMMANDS[name]
    reader = argparse.ArgumentParser(f"gcloud {name}", allow_abbrev=False)
    for option in options.split():
        if option == "-r":
            reader.add_argument("-r", "--recursive", action="store_true", dest="r")
        elif option.startswith("--"):
            reader.add_argument(option, required=True)
        else:
            reader.add_argument(option.rstrip("*"), nargs="+" if option.endswith("*") else None)
    try:
        run(reader.parse_args(argv[len(name.split()) :]))
    except GoogleAPICallError as refusal:
        sys.exit(f"ERROR: (gcloud.{name.replace(' ', '.')}) {refusal.message}")
    return 0


def tell(*lines: str) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


def message(kind: Any, asked: argparse.Namespace) -> Any:
    """The file of ``--source`` as a message of the library."""
    try:
        return parsed(kind, yaml.safe_load(Path(asked.source).read_text(encoding="utf-8")))
    except (OSError, json_format.ParseError) as error:
        sys.exit(f"ERROR: {asked.source}: cannot be imported: {error}")


def client(kind: Any) -> Any:
    """A client of the library at the address of the stand-in."""
    logged_in()
    address = os.environ["CLOUDSDK_API_ENDPOINT_OVERRIDES_DATAPROC"].rstrip("/")
    options = {"api_endpoint": address}
    return kind(transport="rest", credentials=AnonymousCredentials(), client_options=options)


def in_store(uri: str) -> tuple[Any, str]:
    """The bucket of a ``gs://`` name, and what follows it."""
    logged_in()
    name, _, prefix = uri.removeprefix("gs://").partition("/")
    store = storage.Client(project=project(), credentials=AnonymousCredentials())
    return store.bucket(name), prefix


def logged_in() -> None:
    if os.environ.get("CLOUDSDK_AUTH_DISABLE_CREDENTIALS") != "true" and "account" not in remembered():
        sys.exit("ERROR: You do not currently have an active account selected. Please run: gcloud auth login")


def project() -> str:
    found = os.environ.get("CLOUDSDK_CORE_PROJECT") or remembered().get("project")
    if not found:
        sys.exit("ERROR: The required property [project] is not currently set.")
    return str(found)


def parent(asked: argparse.Namespace) -> str:
    return f"projects/{project()}/regions/{asked.region}"


def remember(**values: str) -> None:
    (Path(os.environ["CLOUDSDK_CONFIG"]) / "stand-in.json").write_text(json.dumps(remembered() | values))


def remembered() -> dict[str, str]:
    file = Path(os.environ["CLOUDSDK_CONFIG"]) / "stand-in.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
