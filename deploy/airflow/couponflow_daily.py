"""Airflow: every day the delivery, once a week the training, then the campaigns that are due.

Lay this file and ``couponflow.json`` beside it into the DAG folder, one folder per environment:

    couponflow check --deploy prod --json > couponflow.json

The JSON holds the specs as rendered and checked for one release, and the rule by which a workflow's dates
follow from the run date. So Airflow, whose packages contradict couponflow's, never imports couponflow, and no
name, size or date stands here. A new release is a new JSON.

Why stored templates and not inline ones: an inline workflow takes no parameters, and the provider renders the
request id of stored ones only. A template's id ends with its release, so that it never changes; to create it
twice is no error. The run date is the day, in the lake's time zone, on which the data interval starts.

What a retry is: the same call, once more. The id of a request follows from workflow, run date, campaign and
release; Dataproc runs one workflow of an id at a time. So a retry after a lost answer or a lost worker of
Airflow meets the workflow that still runs, and one after a failure starts it again. Jobs replace date ranges
and hold leases: a workflow that ran twice leaves the same tables. A driver's exit code 2 or 3 (configuration,
data) needs a person and is not retried; 4 and 5 (conflict, infrastructure), and what names no code, are.

Airflow variable ``couponflow_campaigns`` (JSON) says which campaigns are prepared on which day:
``{"18": "2026-11-30"}``. Approving and handing over stay a person's act. Airflow's own account, connection
``google_cloud_default``, acts as the submit account: it needs ``roles/iam.serviceAccountTokenCreator`` on it.
"""

import json
import re
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_DNS, uuid5
from zoneinfo import ZoneInfo

from airflow.providers.google.cloud.operators.dataproc import (
    DataprocCreateWorkflowTemplateOperator,
    DataprocInstantiateWorkflowTemplateOperator,
)
from airflow.sdk import DAG, Variable, get_current_context, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.timetables.interval import CronDataIntervalTimetable
from google.cloud.dataproc_v1 import WorkflowTemplate

FILE = Path(__file__).with_name("couponflow.json")
if not FILE.exists():
    raise FileNotFoundError(f"{FILE}: write it with couponflow check --deploy ENV --json > {FILE.name}")
DEPLOYED = json.loads(FILE.read_text(encoding="utf-8"))
RELEASE, ZONE = DEPLOYED["release"], ZoneInfo(DEPLOYED["time_zone"])
PLACE = {
    "project_id": DEPLOYED["cloud"]["project"],
    "region": DEPLOYED["cloud"]["region"],
    "impersonation_chain": DEPLOYED["cloud"]["service_accounts"]["submit"],
}
RENDERED = {
    Path(spec["file"]).stem: spec["rendered"] for spec in DEPLOYED["specs"] if "jobs" in spec["rendered"]
}
#: Monday; a training takes what the week before has added.
TRAINING_WEEKDAY = 0
#: Exit codes of a driver that the same call would meet again.
FINAL_CODES = (2, 3)
_EXIT_CODE = re.compile(r"(?:SystemExit: |\bexit(?:ed)?(?: with)?(?: code)? )(\d+)")
_NAMESPACE = uuid5(NAMESPACE_DNS, "couponflow.airflow")


class Workflow(DataprocInstantiateWorkflowTemplateOperator):
    """Runs a template to its end; a failure that a retry would meet again ends the task for good."""

    def execute(self, context: Any) -> None:
        """Wait for the workflow.

        Raises:
            AirflowFailException: a driver ended with a code that needs a person.
            AirflowException: it failed otherwise.
        """
        try:
            super().execute(context)
        except AirflowException as error:
            found = _EXIT_CODE.search(str(error))
            if found and int(found[1]) in FINAL_CODES:
                raise AirflowFailException(
                    f"{error}; exit code {found[1]} is not retried, see deploy/runbooks/exit-{found[1]}.md"
                ) from error
            raise


def template_id(name: str) -> str:
    """Of a workflow and this release."""
    return f"{RENDERED[name]['id']}-{RELEASE}"


def template(name: str) -> dict[str, Any]:
    """A workflow as the provider takes it."""
    found = WorkflowTemplate.from_json(json.dumps({**RENDERED[name], "id": template_id(name)}))
    return dict(WorkflowTemplate.to_dict(found))


def run_date(start: datetime) -> date:
    """Business day of a data interval."""
    return start.astimezone(ZONE).date()


def bound(rule: int | str, day: date) -> date:
    """A bound of a rule: days from the run date, or a fixed day."""
    return day + timedelta(days=rule) if isinstance(rule, int) else date.fromisoformat(rule)


def parameters(name: str, day: date, try_number: int) -> dict[str, str]:
    """Parameters of a workflow on a run date."""
    rules = DEPLOYED["dates"].get(name, {})
    dates = {key: ":".join(str(bound(rule, day)) for rule in both) for key, both in rules.items()}
    return {"RUN_DATE": str(day), "RUN_ID": f"airflow-{day}-{try_number}", **dates}


def request_id(name: str, day: date, campaign: str = "") -> str:
    """Of one run: asked again with it, the service gives back the workflow that still runs."""
    return str(uuid5(_NAMESPACE, f"{name}|{day}|{campaign}|{RELEASE}"))


def templated(name: str) -> dict[str, Any]:
    """Arguments of a workflow's task; what depends on the run is rendered when it runs."""
    arguments = f"'{name}', run_date(data_interval_start)"
    keys = ("RUN_DATE", "RUN_ID", *DEPLOYED["dates"][name])
    return {
        "template_id": template_id(name),
        "parameters": {key: f"{{{{ parameters({arguments}, ti.try_number)['{key}'] }}}}" for key in keys},
        "request_id": f"{{{{ request_id({arguments}) }}}}",
    }


with DAG(
    dag_id=f"couponflow_daily_{DEPLOYED['environment']}",
    description="Delivery, weekly training, campaigns that are due",
    schedule=CronDataIntervalTimetable("0 5 * * *", timezone=DEPLOYED["time_zone"]),
    start_date=datetime(2026, 1, 1, tzinfo=ZONE),
    catchup=False,  # past deliveries are couponflow backfill's, which knows what they reach
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10)},
    user_defined_macros={"run_date": run_date, "parameters": parameters, "request_id": request_id},
    tags=["couponflow", DEPLOYED["environment"]],
) as dag:
    stored = {
        name: DataprocCreateWorkflowTemplateOperator(
            task_id=f"store_{name}", template=template(name), **PLACE
        )
        for name in ("daily", "train", "campaign")
    }
    daily = Workflow(task_id="daily", **templated("daily"), **PLACE)

    @task.short_circuit(ignore_downstream_trigger_rules=False)
    def is_training_day() -> bool:
        """Whether the run date is the weekday of trainings."""
        return run_date(get_current_context()["data_interval_start"]).weekday() == TRAINING_WEEKDAY

    train = Workflow(task_id="train", **templated("train"), **PLACE)

    # A training that failed or is not due leaves the champion as it was, so campaigns go on; without the
    # day's delivery neither of the two has succeeded, and they do not.
    @task(trigger_rule="all_done_min_one_success")
    def due_campaigns() -> list[dict[str, Any]]:
        """Arguments of each campaign that is prepared on the run date."""
        context = get_current_context()
        day = run_date(context["data_interval_start"])
        planned = Variable.get("couponflow_campaigns", default={}, deserialize_json=True)
        tries = context["ti"].try_number
        return [
            {
                "parameters": {**parameters("campaign", day, tries), "CAMPAIGN_ID": campaign},
                "request_id": request_id("campaign", day, campaign),
            }
            for campaign, wanted in sorted(planned.items())
            if wanted == str(day)
        ]

    due = due_campaigns()
    # One after another: each counts the mails of those before it, under one lease.
    campaign = Workflow.partial(
        task_id="campaign", template_id=template_id("campaign"), max_active_tis_per_dagrun=1, **PLACE
    ).expand_kwargs(due)

    stored["daily"] >> daily >> is_training_day() >> train >> due
    stored["train"] >> train
    daily >> due
    stored["campaign"] >> campaign
