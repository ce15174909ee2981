"""Commands of ``couponflow models`` that do more than move a pointer."""

from typing import Annotated

import typer

from couponflow import console
from couponflow.commands import DEFAULT_CONFIG, DryRun, errors_as_exit_codes
from couponflow.config import load_config
from couponflow.entry import ConfigPath, Dates, Overrides


def recalibrate(
    dates: Dates,
    name: Annotated[str, typer.Argument(help="A version, a kind or 'champion'.")] = "champion",
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Fit a model's calibrator anew on the as_of days of --dates, and register it as a new version.

    Weights stay as they are. Only rows whose labels are final on run.run_date are used, and none that trained
    the model. [calibration] chooses the method. Calibration after is judged across two halves of the users.

    Example: couponflow models recalibrate champion --dates 2017-08-08:2017-10-03 --dry-run
    """
    with errors_as_exit_codes():
        from couponflow.training import recalibration

        settings = load_config(config, tuple(overrides or ()))
        done = recalibration.recalibrate(settings, name, dates, "command line", dry_run)
        console.show_rows(
            f"Calibration of {done.parent} on {done.rows} rows, {done.positives} positives",
            ["", "calibration error", "expected over observed"],
            [
                [when, f"{found.ece:.4f}", f"{found.ratio:.3f}"]
                for when, found in (("before", done.before), ("after", done.after))
            ],
        )
        if dry_run:
            typer.echo(f"nothing was registered; it would be {done.version}")
        elif done.version == done.parent:
            typer.echo(f"the calibrator is the one that {done.parent} has")
        else:
            typer.echo(f"registered {done.version}; `couponflow models promote` makes it the champion")
