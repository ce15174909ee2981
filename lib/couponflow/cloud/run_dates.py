"""Which dates a workflow's parameters get on a run date, and the same as a rule that needs no couponflow.

A delivery reaches event dates inside the lateness horizon and send dates whose label windows it may fill
(``scopes``, ``backfill_plan``). A scheduler outside this package, such as Airflow, gets a bound either as a
whole number of days from its run date or as a fixed day.
"""

from collections.abc import Mapping
from datetime import date, timedelta

from couponflow import backfill_plan, scopes
from couponflow.config import Config
from couponflow.dates import DateRange

_DAY = timedelta(days=1)
#: Farther from every date of a config than any horizon, window or lateness that it can hold.
_FAR_DAYS = 500

#: A bound: days from the run date, or a fixed day.
Bound = int | str
#: Workflow -> parameter -> first and last day, inclusive.
Rules = Mapping[str, Mapping[str, tuple[Bound, Bound]]]


def ranges(config: Config, run_date: date) -> dict[str, dict[str, DateRange]]:
    """The dates of every workflow that a schedule runs, by parameter: a delivery's and the training's.

    ``RUN_DATE`` is not among them: it is the run date itself.
    """
    delivery = DateRange.day(run_date)
    sends = backfill_plan.reached_sends(config, delivery)
    examples = config.examples
    return {
        "daily": {
            "EVENT_DATES": scopes.touched_dates(delivery, config),
            "SEND_DATES": sends,
            "AS_OF_DATES": sends,
        },
        "train": {
            "AS_OF_DATES": DateRange(examples.train_start, examples.test_start),
            "TEST_DATES": DateRange(examples.test_start, max(delivery.end, examples.test_start + _DAY)),
        },
    }


def rules(config: Config) -> Rules:
    """``ranges`` of any run date after the dates of the config: what moves with it is an offset."""
    day = max(config.run.last_date, config.examples.test_start) + timedelta(days=_FAR_DAYS)
    now, later = ranges(config, day), ranges(config, day + _DAY)
    return {
        workflow: {
            name: (
                _bound(found.start, later[workflow][name].start, day),
                _bound(found.last, later[workflow][name].last, day),
            )
            for name, found in by_name.items()
        }
        for workflow, by_name in now.items()
    }


def _bound(now: date, a_day_later: date, day: date) -> Bound:
    return now.isoformat() if now == a_day_later else (now - day).days
