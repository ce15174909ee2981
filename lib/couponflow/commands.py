"""What all commands of the command line share: exit codes, the default config, the session on demand."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from couponflow.config import Config
from couponflow.entry import set_up_logging
from couponflow.errors import CouponflowError

DEFAULT_CONFIG = Path("deploy/env/local.toml")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept on record.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")]


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """Our errors as one line on stderr and the exit codes 2 to 5."""
    set_up_logging()
    try:
        yield
    except CouponflowError as error:
        typer.echo(f"couponflow: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


class LazySpark:
    """The one Spark session of the process, started when a stage first asks for it."""

    def __init__(self, config: Config) -> None:
        """Take the config; nothing is started."""
        self._config = config
        self._session: Any = None

    def __call__(self) -> Any:
        """The session; starts it the first time."""
        if self._session is None:
            from couponflow.lake import session

            self._session = session.start(self._config.spark, "couponflow")
        return self._session

    def peek(self) -> Any:
        """The session, or None while nobody has asked for it."""
        return self._session
