"""What all jobs share: argument types, the run record around a job, exit codes."""

import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer

from couponflow import campaign_file, costs, scopes
from couponflow.config import Config, load_config
from couponflow.dates import DateRange
from couponflow.errors import ConfigError, CouponflowError, DataError, InfraError
from couponflow.lake import attempts, faults, leases, runs

log = logging.getLogger("couponflow")


@dataclass
class Run:
    """One execution of a job: what it may read (config, dates, arguments) and the record it fills.

    ``from_scratch``: leave the checkpoints of a run that died; only training has any.
    """

    config: Config
    dates: DateRange
    record: runs.RunRecord
    campaign: str = ""
    model: str = ""
    from_scratch: bool = False

    @property
    def root_uri(self) -> str:
        """Root of the lake."""
        return self.config.lake.root_uri

    @property
    def run_id(self) -> str:
        """Id of this run."""
        return self.record.run_id

    @property
    def run_date(self) -> date:
        """The one business day of a job that prepares a campaign.

        Raises:
            ConfigError: the dates are a range.
        """
        if len(self.dates) != 1:
            raise ConfigError(f"--dates {self.dates}: a campaign is prepared on one run date; give one day")
        return self.dates.start

    @property
    def rows(self) -> dict[str, int]:
        """Row counts by name."""
        return self.record.rows

    @property
    def facts(self) -> dict[str, Any]:
        """Whatever else the record should show."""
        return self.record.facts


def _parse_dates(text: str | DateRange) -> DateRange:
    if isinstance(text, DateRange):
        return text
    try:
        return DateRange.parse(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


ConfigPath = Annotated[Path, typer.Option("--config", help="TOML file, such as deploy/env/local.toml.")]
Dates = Annotated[
    DateRange,
    typer.Option(
        "--dates", parser=_parse_dates, metavar="D|A:B", help="Inclusive days, such as 2017-10-01:2017-10-31."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override one config value; may be repeated."),
]
Campaign = Annotated[str, typer.Option("--campaign", help="Campaign id, such as 18.")]
Model = Annotated[str, typer.Option("--model", help="Model kind, such as logistic or dien.")]
FromScratch = Annotated[
    bool, typer.Option("--from-scratch", help="Train without the checkpoints of a run that died.")
]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log lines as JSON, for machines.")]
AttemptKey = Annotated[
    str,
    typer.Option(
        "--attempt-key", help="Id of the job on Dataproc; one that may not start again ends at once."
    ),
]
_Main = TypeVar("_Main", bound=Callable[..., Any])
#: Of the job that this process was started for; empty where nobody starts it again.
_ATTEMPT_KEY: ContextVar[str] = ContextVar("attempt key", default="")


def today() -> DateRange:
    """The day of a job that is not about dates, UTC; for its run record."""
    return DateRange.day(datetime.now(UTC).date())


class _JobApp(typer.Typer):
    """Gives every job, besides its own options, ``--attempt-key``, which ``open_run`` reads of this call."""

    def command(self, *args: Any, **kwargs: Any) -> Callable[[_Main], _Main]:
        """Register a job's ``main``."""
        decorate = super().command(*args, **kwargs)

        def register(main: _Main) -> _Main:
            decorate(_with_attempt_key(main))
            return main

        return register


def _with_attempt_key(main: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(main)
    def call(*args: Any, attempt_key: str = "", **kwargs: Any) -> Any:
        token = _ATTEMPT_KEY.set(attempt_key)
        try:
            return main(*args, **kwargs)
        finally:
            _ATTEMPT_KEY.reset(token)

    own = inspect.signature(main)
    added = inspect.Parameter(
        "attempt_key", inspect.Parameter.KEYWORD_ONLY, default="", annotation=AttemptKey
    )
    call.__signature__ = own.replace(parameters=[*own.parameters.values(), added])  # type: ignore[attr-defined]  # any function takes it
    call.__annotations__ = {**main.__annotations__, "attempt_key": AttemptKey}
    return call


def job_app(doc: str | None) -> typer.Typer:
    """The Typer app of one job: plain help and plain tracebacks, for cluster logs."""
    return _JobApp(help=doc, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        )


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever stderr is when a line is logged."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Nothing to keep: the base class sets it once."""


def set_up_logging(as_json: bool = False) -> None:
    """Log to stderr, once per process."""
    if log.handlers:
        return
    handler = _Stderr()
    handler.setFormatter(
        _JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    )
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _as_ours(where: str, error: BaseException) -> CouponflowError | None:
    """A failure of Spark or the disk as our error; anything else is a bug and keeps its traceback."""
    family = type(error).__module__.partition(".")[0]
    if family not in ("py4j", "pyspark", "delta") and not isinstance(error, OSError | MemoryError):
        return None
    if family in ("py4j", "pyspark"):
        from couponflow.lake import failures  # brings pyspark, which is there by now

        if ours := failures.store_error(error, where) or failures.damage(error, where):
            return ours
    cause = getattr(error, "java_exception", None)
    text = str(cause.getMessage() if cause is not None else error).strip()
    reason = f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"
    log.debug("%s", where, exc_info=error)
    if type(error).__name__ in ("AnalysisException", "ParseException"):
        return DataError(
            f"{where}: the data do not fit the query ({reason}); check its tables and the config"
        )
    return InfraError(f"{where}: failed midway ({reason}); published tables are whole, run again")


def _record_failure(root_uri: str, record: runs.RunRecord, reason: str) -> None:
    try:
        runs.finish(root_uri, record, "failed", reason[:2000])
    except CouponflowError as error:  # must not hide why the job failed
        log.warning("the run record of %s is not written: %s", record.run_id, error)


@contextmanager
def record_run(
    name: str,
    config: Config,
    dates: DateRange,
    campaign: str = "",
    model: str = "",
    fingerprint: str = "",
    within: str = "",
    attempt_key: str = "",
) -> Iterator[Run]:
    """Hold a job's lease and its run record around it; the record is written once, with how the job ended.

    A job of a campaign gets the config as the campaign's declaration changes it (``campaign_file``).
    ``within`` is the run, such as a backfill, whose own lease covers this one; ``attempt_key`` the id of the
    job on a cluster that this is.

    Raises:
        ConflictError: another run holds a range that the job writes. It has not started: no record.
    """
    config = campaign_file.applied(config, campaign)
    root_uri = config.lake.root_uri
    arguments = {key: value for key, value in (("campaign", campaign), ("model", model)) if value}
    record = runs.start(name, str(dates), arguments, config.fingerprint())
    record.fingerprint, record.attempt_key = fingerprint, attempt_key
    record.config = config.model_dump(mode="json")
    faults.check(root_uri, config.spark.master)
    scope = scopes.writes(name, dates, config, campaign)
    with leases.held(root_uri, record, scope, within) as lease, costs.within_budget(name, str(dates), config):
        meter = costs.Meter()
        if lease.taken_over:
            record.facts["leases_taken_over"] = lease.taken_over
        try:
            faults.fire(root_uri, name, "before_run", dates.start)
            yield Run(config, dates, record, campaign, model)
            faults.fire(root_uri, name, "before_record", dates.start)
            lease.check()
        except BaseException as error:
            ours = error if isinstance(error, CouponflowError) else _as_ours(f"{name} {dates}", error)
            record.usage = meter.usage(name, config)
            _record_failure(root_uri, record, str(ours or f"{type(error).__name__}: {error}"))
            if ours is None or ours is error:
                raise
            raise ours from error
        record.usage = meter.usage(name, config)
        runs.finish(root_uri, record, "ok")
        faults.fire(root_uri, name, "after_record", dates.start)
    log.info(
        "%s %s: ok in %.1f s, rows %s", name, dates, record.seconds, json.dumps(record.rows, sort_keys=True)
    )


@contextmanager
def open_run(
    name: str,
    config_path: Path,
    overrides: list[str] | None,
    dates: DateRange,
    campaign: str = "",
    model: str = "",
    log_json: bool = False,
) -> Iterator[Run]:
    """The frame of a job's ``main``: config, record, and our errors as exit codes 2 to 5.

    A job that Dataproc may start again says so by ``--attempt-key``: what would fail again ends at once then.
    """
    set_up_logging(log_json)
    key = _ATTEMPT_KEY.get()
    try:
        config = load_config(config_path, tuple(overrides or ()))
        with (
            attempts.guarded(config.lake.root_uri, key),
            record_run(name, config, dates, campaign, model, attempt_key=key) as run,
        ):
            yield run
    except CouponflowError as error:
        typer.echo(f"couponflow {name}: {error}", err=True)
        if key:  # Dataproc itself does not tell the code; who waits for the job reads it here
            typer.echo(f"couponflow {name}: exit code {error.exit_code}", err=True)
        raise typer.Exit(error.exit_code) from error
