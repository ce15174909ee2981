"""Which dates a workflow's parameters get, and the same as a rule that needs no couponflow.

A delivery reaches the event dates of its lateness, and the sends whose label windows it may still fill
(``scopes``, ``backfill_plan``); the training rows that it changes end with it. A training takes the config's
splits, the test rows up to the run date. A scheduler outside this package, such as Airflow, gets a bound
either as a whole number of days from its run date or as a fixed day.
"""

from collections.abc import Mapping
from datetime import date, timedelta

from couponflow import scopes
from couponflow.backfill_plan import reached_sends
from couponflow.config import Config
from couponflow.dates import DateRange

_DAY = timedelta(days=1)
#: Farther from every date of a config than any horizon, window or lateness that it can hold.
_FAR_DAYS = 500
#: Workflows that a schedule runs, with the parameters that are ranges; ``RUN_DATE`` is the run date itself.
_SCHEDULED = {"daily": ("EVENT_DATES", "SEND_DATES", "AS_OF_DATES"), "train": ("AS_OF_DATES", "TEST_DATES")}

#: A bound: days from the run date, or a fixed day.
Bound = int | str
#: Workflow -> parameter -> first and last day, inclusive.
Rules = Mapping[str, Mapping[str, tuple[Bound, Bound]]]


def ranges(config: Config, workflow: str, dates: DateRange) -> dict[str, DateRange]:
    """The range of every parameter that is one, for ingest dates, or a run date.

    ``TEST_DATES`` is missing where the dates end before the test rows begin.
    """
    examples, sends = config.examples, reached_sends(config, dates)
    fitting = DateRange(examples.train_start, examples.test_start)
    found = {
        "INGEST_DATES": dates,
        "EVENT_DATES": scopes.touched_dates(dates, config),
        "SEND_DATES": sends,
        "AS_OF_DATES": fitting if workflow == "train" else DateRange(sends.start, dates.end),
    }
    if dates.end > examples.test_start:
        found["TEST_DATES"] = DateRange(examples.test_start, dates.end)
    return found


def rules(config: Config) -> Rules:
    """``ranges`` of any run date after the dates of the config: what moves with it is an offset."""
    day = max(config.run.last_date, config.examples.test_start) + timedelta(days=_FAR_DAYS)
    made = {}
    for workflow, names in _SCHEDULED.items():
        now, later = (ranges(config, workflow, DateRange.day(one)) for one in (day, day + _DAY))
        made[workflow] = {
            name: (
                _bound(now[name].start, later[name].start, day),
                _bound(now[name].last, later[name].last, day),
            )
            for name in names
        }
    return made


def _bound(now: date, a_day_later: date, day: date) -> Bound:
    return now.isoformat() if now == a_day_later else (now - day).days
