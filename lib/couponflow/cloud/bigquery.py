"""The only door to BigQuery: a list, or a day's predictions, as one load job that is done exactly once.

A load job commits all of its rows at once, or none. Its id is derived from the table and the checksum of the
content, so BigQuery itself refuses a second one: whoever submits again, after a lost answer, after a crash or
at the same time, meets the first job and waits for it. Only a job that has ended in an error, or whose table
was dropped since, is followed by another one, with the next attempt in its id.

An audience is a table of its own, written only while it is empty; predictions are one table per campaign, a
partition per run date, which is replaced. The schema is explicit and holds ids only. What BigQuery answers
for the moment (429, 5xx, no answer) is repeated until a deadline; the rest ends at once and says what to do.

BigQuery keeps replaced and dropped rows for its time travel (seven days unless the dataset says otherwise)
and seven days more, out of reach of any client.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from http import HTTPStatus
from typing import Any, BinaryIO

from couponflow.campaigning import ExportConfig
from couponflow.errors import ConflictError, CouponflowError, DataError, InfraError

#: Name, type, mode.
Schema = tuple[tuple[str, str, str], ...]
AUDIENCE: Schema = (
    ("user_id", "STRING", "REQUIRED"),
    ("campaign_id", "STRING", "REQUIRED"),
    ("version", "STRING", "REQUIRED"),
    ("coupon_id", "STRING", "NULLABLE"),
    ("rank", "INTEGER", "NULLABLE"),
    ("is_seed", "BOOLEAN", "REQUIRED"),
)
PREDICTIONS: Schema = (
    ("campaign_id", "STRING", "REQUIRED"),
    ("run_date", "DATE", "REQUIRED"),
    ("user_id", "STRING", "REQUIRED"),
    ("target_id", "STRING", "REQUIRED"),
    ("model_version", "STRING", "REQUIRED"),
    ("score", "FLOAT", "REQUIRED"),
    ("conversion_probability", "FLOAT", "REQUIRED"),
    ("is_cold_start", "BOOLEAN", "REQUIRED"),
)

_MAX_ATTEMPTS = 50
_FIRST_PAUSE_SECONDS = 1.0
_REQUEST_SECONDS = 120.0
_DEADLINE_SECONDS = 600.0
_JOB_SECONDS = 1800.0
_UNKNOWN_SECONDS = 30.0  # in which a read may miss a job that was just inserted
#: Reasons of an error that pass by themselves, of a request and of a job.
_PASSING = frozenset({"rateLimitExceeded", "backendError", "internalError", "badGateway"})
_PASSING_OF_JOBS = _PASSING | {
    "quotaExceeded",
    "stopped",
    "timeout",
    "jobBackendError",
    "jobInternalError",
    "jobRateLimitExceeded",
}


@dataclass(frozen=True)
class _Load:
    """What one load job brings where. ``occasion`` tells two loads of equal content into one table apart."""

    table: str
    location: str
    sha256: str
    num_rows: int
    schema: Schema
    labels: Mapping[str, str]
    description: str = ""
    is_replacing: bool = False
    partition: date | None = None
    expiration_days: int = 0
    occasion: str = ""

    @property
    def project(self) -> str:
        """Where the job runs: the project of the dataset."""
        return self.table.split(".")[0]

    @property
    def dataset(self) -> str:
        """With its project."""
        return self.table.rpartition(".")[0]

    @property
    def destination(self) -> str:
        """The table, or its partition."""
        return f"{self.table}${self.partition:%Y%m%d}" if self.partition else self.table

    def job_id(self, attempt: int) -> str:
        """The same for the same content at the same place, whoever asks."""
        text = "|".join((self.destination, self.sha256, self.occasion))
        return f"couponflow_{hashlib.sha256(text.encode()).hexdigest()[:40]}_{attempt}"


def audience_table(section: ExportConfig, campaign_id: str, version: str) -> str:
    """The table of one campaign version; empty where no BigQuery is configured."""
    return _table(section, "audience", campaign_id, version)


def predictions_table(section: ExportConfig, campaign_id: str) -> str:
    """The table of a campaign's predictions; empty where they are not exported."""
    return _table(section, "predictions", campaign_id) if section.bigquery_predictions else ""


def load_audience(content: bytes, manifest: Mapping[str, Any]) -> None:
    """Load a list into the table that its manifest names, unless that is done already.

    Raises:
        DataError: BigQuery refuses the rows, has loaded another number, or there is no such dataset.
        ConflictError: the table holds another list.
        InfraError: access is denied, or BigQuery did not answer in time.
    """
    _run(_audience(content, manifest), io.BytesIO(content))


def replace_audience(content: bytes, manifest: Mapping[str, Any]) -> None:
    """Put a list from which people were erased in the place of the longer one; a dropped table stays so.

    Raises:
        DataError, InfraError: as ``load_audience``.
    """
    load = _audience(content, manifest, is_replacing=True)
    client = _client(load.project)
    with _errors(load):
        if _found(client.get_table, load.table) is None:
            return
    _run(load, io.BytesIO(content))
    with _errors(load):
        table = client.get_table(load.table, **_patience())
        table.labels, table.description = dict(load.labels), load.description
        client.update_table(table, ["labels", "description"], **_patience())


def drop_table(table: str, location: str) -> None:
    """Drop a table that nobody may read; an absent one is no error.

    Raises:
        InfraError: access is denied, or BigQuery did not answer in time.
    """
    load = _Load(table, location, "", 0, (), {})
    with _errors(load):
        _client(load.project).delete_table(table, not_found_ok=True, **_patience())


def load_predictions(file: BinaryIO, manifest: Mapping[str, Any]) -> None:
    """Replace the partition of a run date by the rows of a CSV file, unless that is done already.

    ``scored_by`` of the manifest is the run whose scores these are: equal scores that come back after others
    are another load.

    Raises:
        DataError, InfraError: as ``load_audience``.
    """
    load = _Load(
        table=manifest["table"],
        location=manifest["location"],
        sha256=manifest["sha256"],
        num_rows=manifest["num_rows"],
        schema=PREDICTIONS,
        labels=_labels(manifest, "campaign_id", "scored_by", "sha256"),
        is_replacing=True,
        partition=manifest["run_date"],
        expiration_days=manifest["expiration_days"],
        occasion=manifest["scored_by"],
    )
    client = _client(load.project)
    with _errors(load):
        if _found(client.get_table, load.table) is not None:  # it keeps its partitioning and expiration
            load = replace(load, expiration_days=0)
    _run(load, file)


def _audience(content: bytes, manifest: Mapping[str, Any], is_replacing: bool = False) -> _Load:
    if tuple(manifest["columns"]) != tuple(name for name, _, _ in AUDIENCE):
        raise DataError(
            f"{manifest['bigquery_table']}: the list has columns {manifest['columns']}, written by another "
            "version of couponflow; go on with that one"
        )
    return _Load(
        table=manifest["bigquery_table"],
        location=manifest["bigquery_location"],
        sha256=hashlib.sha256(content).hexdigest(),
        num_rows=manifest["num_recipients"] + manifest["num_seeds"],
        schema=AUDIENCE,
        labels=_labels(manifest, "campaign_id", "version", "run_id", "sha256"),
        description=(
            f"couponflow audience of campaign {manifest['campaign_id']}, version {manifest['version']}, "
            f"run {manifest['run_id']}, sha256 {manifest['sha256']}"
        ),
        is_replacing=is_replacing,
    )


def _table(section: ExportConfig, kind: str, *parts: str) -> str:
    """A name that BigQuery takes without quotes; where a part had to be changed, its hash keeps it unique."""
    if not section.bigquery_dataset:
        return ""
    name = re.sub(r"[^A-Za-z0-9_]", "_", "_".join((kind, *parts)))
    if len(parts) > 1 or not name.endswith(f"_{parts[0]}"):
        name += "_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
    return f"{section.bigquery_dataset}.{name}"


def _labels(manifest: Mapping[str, Any], *names: str) -> dict[str, str]:
    """Labels take lower case and at most 63 characters."""
    texts = {name: str(manifest[name]).lower() for name in names}
    return {name: re.sub(r"[^a-z0-9_-]", "_", text)[:63] for name, text in texts.items()}


def _run(load: _Load, file: BinaryIO) -> None:
    """Submit the load, or meet the job that does it already, and wait for its end."""
    client = _client(load.project)
    with _errors(load):
        for attempt in range(_MAX_ATTEMPTS):
            earlier = _found(client.get_job, load.job_id(attempt), load.project, load.location)
            job = earlier or _submit(client, load, load.job_id(attempt), file)
            _wait(job)
            if job.error_result:
                if earlier:
                    continue
                if job.error_result.get("reason") == "duplicate" and _is_loaded(client, load):
                    return  # by a job that BigQuery has forgotten
                raise _job_error(load, job)
            if earlier and _found(client.get_table, load.table) is None:
                continue
            _check_count(load, job.output_rows, "the job has loaded")
            return
    raise InfraError(
        f"{load.destination}: {_MAX_ATTEMPTS} load jobs have failed; look at them in the job history of "
        f"project {load.project}"
    )


def _submit(client: Any, load: _Load, job_id: str, file: BinaryIO) -> Any:
    """Insert the job; one that is there already is the answer that was lost, or another run's."""
    from google.api_core import exceptions, retry
    from google.cloud.bigquery import LoadJobConfig

    def insert() -> Any:
        return client.load_table_from_file(
            file,
            load.destination,
            rewind=True,
            size=file.seek(0, os.SEEK_END),
            num_retries=0,  # repeated here, the whole request, under one deadline
            job_id=job_id,
            project=load.project,
            location=load.location,
            job_config=LoadJobConfig.from_api_repr(_job_config(load)),
            timeout=_REQUEST_SECONDS,
        )

    try:
        return _retry()(insert)()
    except exceptions.Conflict:
        unknown = retry.Retry(
            predicate=retry.if_exception_type(exceptions.NotFound),
            initial=_FIRST_PAUSE_SECONDS,
            timeout=_UNKNOWN_SECONDS,
        )
        return unknown(client.get_job)(job_id, load.project, load.location, **_patience())


def _job_config(load: _Load) -> dict[str, Any]:
    config: dict[str, Any] = {
        "sourceFormat": "CSV",
        "skipLeadingRows": "1",
        "encoding": "UTF-8",
        "autodetect": False,
        "maxBadRecords": 0,
        "schema": {
            "fields": [{"name": name, "type": kind, "mode": mode} for name, kind, mode in load.schema]
        },
        "createDisposition": "CREATE_IF_NEEDED",
        "writeDisposition": "WRITE_TRUNCATE" if load.is_replacing else "WRITE_EMPTY",
    }
    if not load.is_replacing:  # BigQuery refuses a job that would change them
        config["destinationTableProperties"] = {
            "description": load.description,
            "labels": dict(load.labels),
        }
    if load.expiration_days:
        config["timePartitioning"] = {
            "type": "DAY",
            "field": "run_date",
            "expirationMs": str(load.expiration_days * 86_400_000),
        }
    return {"jobType": "LOAD", "labels": dict(load.labels), "load": config}


def _wait(job: Any) -> None:
    """Until the job has ended, well or badly."""
    from google.api_core.exceptions import GoogleAPICallError

    try:
        job.result(retry=_retry(), timeout=_JOB_SECONDS)
    except GoogleAPICallError:
        if not job.error_result:
            raise


def _found(read: Callable[..., Any], *arguments: str) -> Any:
    """What a read finds; None where there is nothing."""
    from google.api_core.exceptions import NotFound

    try:
        return read(*arguments, **_patience())
    except NotFound:
        return None


def _is_loaded(client: Any, load: _Load) -> bool:
    """Whether the table holds what this load brings."""
    table = _found(client.get_table, load.table)
    if table is None or table.description != load.description:
        return False
    _check_count(load, table.num_rows, "the table holds")
    return True


def _check_count(load: _Load, found: int | None, what: str) -> None:
    if (found or 0) != load.num_rows:  # no count is a count of none
        raise DataError(
            f"{load.destination}: {what} {found or 0} rows, the file has {load.num_rows}; nobody may read "
            "the table: drop it, then run again"
        )


def _job_error(load: _Load, job: Any) -> CouponflowError:
    """The end of a job as our error: its reason, and the next step."""
    reason = str(job.error_result.get("reason"))
    messages = [str(error.get("message")) for error in (job.error_result, *(job.errors or ()))]
    text = " ".join("; ".join(dict.fromkeys(messages)).split())[:300]
    where = f"{load.destination}: load job {job.job_id} ended with {reason} ({text})"
    if reason == "duplicate":
        return ConflictError(
            f"{where}; the table holds another list, which a run that died has left: make sure that nobody "
            "mails it, drop the table, run again"
        )
    if reason == "accessDenied":
        return InfraError(f"{where}; {_roles(load)}, then run again")
    if reason == "notFound":
        return DataError(f"{where}; {_place(load)}")
    if reason in _PASSING_OF_JOBS:
        return InfraError(f"{where}; nothing was loaded, run again")
    return DataError(f"{where}; nothing was loaded: compare the table's schema with the file, then run again")


def _roles(load: _Load) -> str:
    return (
        f"grant this service account roles/bigquery.jobUser on project {load.project} and "
        f"roles/bigquery.dataEditor on dataset {load.dataset}"
    )


def _place(load: _Load) -> str:
    return (
        f"create dataset {load.dataset} in {load.location}, or correct export.bigquery_dataset and "
        "export.bigquery_location"
    )


@contextmanager
def _errors(load: _Load) -> Iterator[None]:
    """Errors of the service as ours; what passes by itself has been repeated until the deadline."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except exceptions.NotFound as error:
        raise DataError(f"{load.destination}: {_text(error)}; {_place(load)}") from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        if _reason(error) in ("quotaExceeded", "rateLimitExceeded"):
            raise InfraError(f"{load.destination}: {_text(error)}; run again later") from error
        raise InfraError(f"{load.destination}: access denied ({_text(error)}); {_roles(load)}") from error
    except TimeoutError as error:
        raise InfraError(
            f"{load.destination}: the load job still runs after {_JOB_SECONDS:.0f} seconds; run again, which "
            "waits for the same job"
        ) from error
    except (exceptions.GoogleAPIError, GoogleAuthError, OSError) as error:
        raise InfraError(
            f"{load.destination}: BigQuery failed ({type(error).__name__}: {_text(error)}); "
            "check network and credentials, then run again"
        ) from error


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _reason(error: BaseException) -> str:
    errors = getattr(error, "errors", None) or [{}]
    return str(errors[0].get("reason", "")) if isinstance(errors[0], dict) else ""


def _is_passing(error: BaseException) -> bool:
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError
    from requests import exceptions as requests

    passing = exceptions.TooManyRequests, exceptions.ServerError, TransportError
    lost = requests.ConnectionError, requests.Timeout, requests.ChunkedEncodingError
    if isinstance(error, requests.SSLError):
        return False
    is_late = getattr(error, "code", None) == HTTPStatus.REQUEST_TIMEOUT
    return is_late or isinstance(error, (*passing, *lost)) or _reason(error) in _PASSING


def _retry() -> Any:
    from google.api_core.retry import Retry

    return Retry(predicate=_is_passing, initial=_FIRST_PAUSE_SECONDS, maximum=30.0, timeout=_DEADLINE_SECONDS)


def _patience() -> dict[str, Any]:
    """How long one request may take, and how often it is repeated."""
    return {"retry": _retry(), "timeout": _REQUEST_SECONDS}


def _client(project: str) -> Any:
    # The library's own switch, set by tests.
    return _client_for(project, os.environ.get("BIGQUERY_EMULATOR_HOST"))


@cache
def _client_for(project: str, emulator: str | None) -> Any:
    """One client, so one log-in and one connection pool, per project and process."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import bigquery

    if emulator:
        anonymous: Any = AnonymousCredentials  # untyped in the library
        return bigquery.Client(project=project, credentials=anonymous())
    return bigquery.Client(project=project)
