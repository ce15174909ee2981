"""The command that checks without changing anything: the feeds' contract, and leaks of the future."""

import json
from datetime import date
from typing import Annotated, Any

import typer

from couponflow import console
from couponflow.commands import DEFAULT_CONFIG, AsJson, LazySpark, errors_as_exit_codes
from couponflow.config import Config, load_config
from couponflow.dates import parse_day
from couponflow.entry import ConfigPath, Overrides
from couponflow.errors import ConfigError
from couponflow.lake import contracts


def check(
    feed: Annotated[str, typer.Argument(help="Only this feed of the contract.")] = "",
    contract: Annotated[bool, typer.Option("--contract", help="Print what each feed delivers.")] = False,
    leaks: Annotated[
        bool,
        typer.Option(
            "--leaks",
            help="Change, delete and add facts at or after --as-of; no feature of before may change.",
        ),
    ] = False,
    as_of: Annotated[str, typer.Option("--as-of", help="Day whose start is the cut-off of --leaks.")] = "",
    sample: Annotated[int, typer.Option("--sample", help="Users that --leaks looks at.")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Which users --leaks looks at.")] = 0,
    campaign: Annotated[str, typer.Option("--campaign", help="Campaign of --leaks; default run's.")] = "",
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the data contract of the raw feeds, or show on this lake that no feature leaks.

    --contract: columns with examples, reasons of refusal, drift rules. --leaks ends with 3 where a feature
    changed, or where nothing could be seen to change. Writes nothing.

    Example: couponflow check --leaks --as-of 2017-10-30 --sample 200
    """
    with errors_as_exit_codes():
        if not contract and not leaks:
            raise ConfigError("nothing to check; give --contract or --leaks")
        if contract:
            _show_contracts(feed, as_json)
        if leaks:
            if not as_of:
                raise ConfigError("check --leaks needs a cut-off; give --as-of D")
            _check_leaks(
                load_config(config, tuple(overrides or ())), parse_day(as_of), sample, campaign, seed
            )


def _show_contracts(feed: str, as_json: bool) -> None:
    if feed and feed not in contracts.FEEDS:
        raise ConfigError(f"unknown feed {feed!r}; one of {', '.join(contracts.FEEDS)}")
    found = [contracts.FEEDS[name].describe() for name in ([feed] if feed else contracts.FEEDS)]
    if as_json:
        console.show_json(found)
        return
    for one in found:
        _show_contract(one)
    kinds = {f".{extension}": text for extension, text in contracts.KINDS.items()}
    _show_pairs("Files, on disk or gs://", ["extension", "what it is"], kinds)
    _show_pairs("When a delivery is not as declared", ["found", "what happens"], contracts.DRIFT_RULES)


def _show_contract(feed: dict[str, Any]) -> None:
    rows = [
        [c["name"], c["type"], "yes" if c["nullable"] else "no", c["meaning"], _example(c["example"])]
        for c in feed["columns"]
    ]
    title = f"{feed['feed']}: {feed['place']}, {feed['cadence']}"
    console.show_rows(title, ["column", "type", "null", "meaning", "example"], rows)
    _show_pairs(f"{feed['feed']}: why a row goes to quarantine", ["reason", "meaning"], feed["reasons"])


def _show_pairs(title: str, columns: list[str], pairs: dict[str, str]) -> None:
    console.show_rows(title, columns, [list(pair) for pair in pairs.items()])


def _example(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_leaks(settings: Config, day: date, sample: int, campaign: str, seed: int) -> None:
    from couponflow.sequences import leaks

    found = leaks.audit(LazySpark(settings)(), settings, day, sample, campaign, seed)
    console.show_rows(
        f"Leak audit at the start of {day}",
        ["features", "verdict", "users", "changed by later facts", "by earlier facts", "first user"],
        [[f.group, f.verdict, f.rows, f.leaked, f.moved, f.first_user] for f in found],
    )
    leaks.check(found, day)
