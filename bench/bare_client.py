"""The job of stdin by Google's client alone: ``python -m bench.bare_client ENDPOINT PROJECT REGION``."""

import sys
from typing import Any

from google.auth.credentials import AnonymousCredentials
from google.cloud import dataproc_v1 as dp


def send(endpoint: str, project: str, region: str, job: str) -> None:
    """Submit a job, in Dataproc's JSON."""
    anonymous: Any = AnonymousCredentials  # untyped in the library
    client = dp.JobControllerClient(
        transport="rest", credentials=anonymous(), client_options={"api_endpoint": endpoint}
    )
    client.submit_job(project_id=project, region=region, job=dp.Job.from_json(job))


if __name__ == "__main__":
    send(sys.argv[1], sys.argv[2], sys.argv[3], sys.stdin.read())
