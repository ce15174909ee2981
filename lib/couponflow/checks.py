"""The command that checks without changing anything: contract of feeds, leaks of the future, deploy specs."""

import json
from dataclasses import asdict
from datetime import date
from pathlib import Path
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
    deploy: Annotated[
        str,
        typer.Option(
            "--deploy",
            metavar="ENV",
            help="Check every spec of deploy/ for an environment, such as dev, or for a TOML file.",
        ),
    ] = "",
    write: Annotated[
        Path | None,
        typer.Option(
            "--write",
            metavar="FOLDER",
            help="Write the specs of --deploy there, each as the file that gcloud imports.",
            show_default=False,
        ),
    ] = None,
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the data contract of the raw feeds, show that no feature leaks, or check the specs for Dataproc.

    --contract: columns with examples, reasons of refusal, drift rules. --leaks ends with 3 where a feature
    changed, or where nothing could be seen to change. --deploy: a verdict and an estimated price per spec;
    ends with 2 where one is wrong, and lists all that is. Asks no service, writes no more than --write names.

    Example: couponflow check --leaks --as-of 2017-10-30 --sample 200

    Example: couponflow check --deploy dev

    Example: couponflow check --deploy dev --write specs
    """
    with errors_as_exit_codes():
        if not contract and not leaks and not deploy:
            raise ConfigError("nothing to check; give --contract, --leaks or --deploy ENV")
        if write and not deploy:
            raise ConfigError(f"--write {write}: writes the specs of an environment; give --deploy ENV too")
        if contract:
            _show_contracts(feed, as_json)
        if leaks:
            if not as_of:
                raise ConfigError("check --leaks needs a cut-off; give --as-of D")
            _check_leaks(
                load_config(config, tuple(overrides or ())), parse_day(as_of), sample, campaign, seed
            )
        if deploy:
            _check_deploy(deploy, as_json, write)


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


def _check_deploy(name: str, as_json: bool, folder: Path | None) -> None:
    from couponflow.cloud import releases, run_dates, specs

    environment = specs.load_environment(name)
    release = releases.make(environment).name
    verdicts = specs.check(environment, release)
    prices = environment.cloud.prices
    if as_json:
        about = {"source_url": prices.source_url, "read_date": prices.read_date, "currency": prices.currency}
        # Scripts of deploy/ and Airflow take names and dates from here, so that each stands in one file.
        shown = {
            "environment": environment.cloud.environment,
            "release": release,
            "time_zone": environment.config.lake.time_zone,
            "cloud": environment.cloud.model_dump(mode="json", exclude={"prices"}),
            "dates": run_dates.rules(environment.config),
            "prices": about,
        }
        console.show_json({**shown, "specs": [asdict(verdict) for verdict in verdicts]})
    else:
        title = f"Specs of environment {environment.cloud.environment}"
        columns = ["file", "verdict", f"{prices.currency} an hour", "a run at most"]
        console.show_rows(title, columns, [_verdict_row(verdict) for verdict in verdicts])
        typer.echo(f"estimated with list prices of {prices.read_date}, {prices.source_url}")
    findings = [finding for verdict in verdicts for finding in verdict.findings]
    if not as_json:
        for finding in findings:
            typer.echo(str(finding))
    if findings:
        name = environment.cloud.environment
        raise ConfigError(
            f"environment {name}: {len(findings)} findings in its specs; correct them before a submission"
        )
    if folder is not None:
        _write_specs(environment, release, folder, as_json)


def _write_specs(environment: Any, release: str, folder: Path, is_quiet: bool) -> None:
    from couponflow.cloud import specs

    for name, content in specs.importable(environment.cloud, release).items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder") from error
        if not is_quiet:
            typer.echo(f"written: {path}")


def _verdict_row(verdict: Any) -> list[str]:
    price, amount = verdict.price, verdict.run_amount
    least, most = (f"{price.least:.2f}", f"{price.most:.2f}") if price else ("", "")
    hourly = least if least == most else f"{least} to {most}"
    found = f"{len(verdict.findings)} findings" if verdict.findings else "valid"
    return [verdict.file, found, hourly, f"{amount:.2f}" if amount is not None else ""]
