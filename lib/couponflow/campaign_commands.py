"""Commands of ``couponflow campaign``: declare, plan, approve, recall, and read out what the mail caused."""

from pathlib import Path
from typing import Annotated, Any

import typer

from couponflow import campaign_file, console
from couponflow.commands import DEFAULT_CONFIG, AsJson, DryRun, LazySpark, Reason, errors_as_exit_codes
from couponflow.config import load_config
from couponflow.entry import Campaign, ConfigPath, Dates, Overrides
from couponflow.errors import ConfigError, DataError


def create(
    file: Annotated[Path, typer.Argument(help="TOML file, such as deploy/campaigns/example.toml.")],
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Declare a campaign: what its file names replaces the config's values for the jobs of this campaign.

    With --dry-run it is only checked. Once a version is approved or handed over it stays as declared.

    Example: couponflow campaign create deploy/campaigns/example.toml --dry-run
    """
    with errors_as_exit_codes():
        settings = load_config(config, tuple(overrides or ()))
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"campaign file {file}: cannot be read ({error.strerror}); name one") from error
        own, values = campaign_file.parse(content, str(file))
        if dry_run:
            campaign_file.merged(settings, values, str(file))
        else:
            campaign_file.declare(settings, content, str(file), "command line")
        console.show_rows(
            f"Campaign {own.campaign_id} {own.name}".strip(),
            ["setting", "value"],
            [
                [f"{section}.{name}", str(value)]
                for section, part in values.items()
                for name, value in part.items()
            ],
        )
        typer.echo("checked, nothing written" if dry_run else f"declared on {settings.lake.root_uri}")


def plan(
    campaign: Campaign,
    dates: Dates,
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    control_share: Annotated[
        float | None,
        typer.Option("--control-share", help="Instead of selection.control_share.", show_default=False),
    ] = None,
    base_rate: Annotated[
        float,
        typer.Option(
            "--base-rate",
            help="Share of users who order without the mail; 0: from the last readout of the campaign's "
            "type, else from the predictions.",
        ),
    ] = 0.0,
    effect: Annotated[
        float, typer.Option("--effect", help="An effect, as a share such as 0.004, to ask about.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Show who would be mailed and withheld, and the smallest effect that could be shown. Writes nothing.

    Needs the predictions of the day. Two-sided test at 5 %, power 80 %.

    Example: couponflow campaign plan --campaign 18 --dates 2017-10-30 --control-share 0.2
    """
    with errors_as_exit_codes():
        from couponflow.campaign import planning

        if len(dates) != 1:
            raise ConfigError(f"--dates {dates}: a campaign is prepared on one run date; give one day")
        changes = {} if control_share is None else {"selection": {"control_share": control_share}}
        settings = load_config(config, tuple(overrides or ()))
        settings = campaign_file.merged(campaign_file.applied(settings, campaign), changes, "--control-share")
        found = planning.plan(LazySpark(settings)(), settings, campaign, dates.start, base_rate, effect)
        if as_json:
            console.show_json(found)
            return
        console.show_rows(
            f"Plan of campaign {campaign}, {dates.start}",
            ["", "value"],
            plan_rows(found, settings.lake.currency),
        )
        typer.echo(found["forecast_words"])
        typer.echo(found["words"])


def approve(
    campaign: Campaign,
    version: Annotated[str, typer.Option("--version", help="Audience version, as the selection printed it.")],
    by: Annotated[str, typer.Option("--by", help="Who approves.")],
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Approve one audience version for export.

    Example: couponflow campaign approve --campaign 18 --version 2017-10-30-dien-0123456789ab --by kim
    """
    with errors_as_exit_codes():
        from couponflow.campaign import export

        export.approve(load_config(config, tuple(overrides or ())).lake.root_uri, campaign, version, by)
        typer.echo(f"campaign {campaign}, version {version}: approved")


def recall(
    campaign: Campaign,
    version: Annotated[str, typer.Option("--version", help="Audience version, as the selection printed it.")],
    by: Annotated[str, typer.Option("--by", help="Who recalls it.")],
    reason: Reason,
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
) -> None:
    """Block the hand-over of one audience version for good.

    Example: couponflow campaign recall --campaign 18 --version V --by kim --reason "wrong coupon"
    """
    with errors_as_exit_codes():
        from couponflow.campaign import export

        export.recall(
            load_config(config, tuple(overrides or ())).lake.root_uri, campaign, version, by, reason
        )
        typer.echo(f"campaign {campaign}, version {version}: recalled")


def readout(
    campaign: Campaign,
    version: Annotated[
        str,
        typer.Option(
            "--version", help="Audience version, as the selection printed it; none: mails without a ledger."
        ),
    ] = "",
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tell what the mails of one audience version caused: mailed against withheld users. Kept for good.

    Ends with 3 before the label windows are final (naming the day), and where there is no sound control;
    then only expected against actual conversions are shown.

    Example: couponflow campaign readout --campaign 18 --version 2017-10-30-dien-0123456789ab-1a2b3c
    """
    with errors_as_exit_codes():
        from couponflow.campaign.readouts import settled

        settings = campaign_file.applied(load_config(config, tuple(overrides or ())), campaign)
        record = settled.read_out(settings, LazySpark(settings), campaign, version, "command line")
        if as_json:
            console.show_json(record)
        else:
            show_readout(record)
        if record["refusal"]:
            raise DataError(record["refusal"])


def plan_rows(found: dict[str, Any], currency: str) -> list[list[Any]]:
    """The lines of a plan, as a person reads them; an expected value with its 95 % interval."""
    from couponflow.campaign.pages import formats, prospects

    def money(name: str) -> str:
        return formats.money(found[name], currency)

    rows: list[list[Any]] = [
        ["users selected", formats.number(found["selected_users"])],
        ["recipients", formats.number(found["mailed_users"])],
        ["withheld: campaign control", formats.number(found["control_users"])],
        ["withheld: global holdout", formats.number(found["holdout_users"])],
        ["list ends by", found["binding_constraint"]],
        ["base rate", f"{formats.percent(found['base_rate'], 2)} ({found['base_rate_source']})"],
        ["smallest effect, points of conversion", points(found["smallest_effect"])],
        ["smallest effect, of the base rate", formats.percent(found["smallest_lift"], 1)],
        ["smallest effect, margin per recipient", money("smallest_margin_amount")],
        ["smallest effect, margin in all", money("smallest_margin_total_amount")],
        ["smallest effect, revenue per recipient", money("smallest_revenue_amount")],
        ["effect that pays for the mail, points", points(found["break_even_effect"])],
        *(
            [label, f"{value} (95 %: {ends})"]
            for label, value, ends in prospects.forecast_rows(found, currency)
        ),
    ]
    if found["wanted_effect"] is not None:
        wanted = points(found["wanted_effect"])
        rows.append([f"chance to show {wanted} points", formats.percent(found["wanted_effect_power"], 0)])
        needed = formats.number(found["wanted_effect_users"])
        rows.append([f"selected users that show {wanted} points in 4 of 5", needed])
    return rows


def points(share: float | None) -> str:
    """A difference of shares in percentage points."""
    from couponflow.campaign.pages import formats

    return formats.decimal(None if share is None else share * 100, 2, is_signed=True)


def show_readout(record: dict[str, Any]) -> None:
    """Print effects first, then arms, then expected against actual; a refused readout has no effects."""
    from couponflow.campaign.pages import formats

    currency = record["settings"]["lake.currency"]

    def shown(name: str, value: float | None) -> str:
        return points(value) if name == "conversion" else formats.money(value, currency)

    title = f"Campaign {record['campaign_id']}, version {record['version']}, mailed {record['mail_date']}"
    if record["effects"]:
        names = [name for name in ("conversion", "revenue", "margin", "profit") if name in record["effects"]]
        rows = []
        for name in names:
            one = record["effects"][name]
            ends = " to ".join(shown(name, end) for end in one["interval"])
            whole = one["total"] if name == "conversion" else None
            total = formats.number(whole) if name == "conversion" else formats.money(one["total"], currency)
            low, high = one["lift_interval"]
            lift = formats.percent(one["lift"], 1)
            if low is not None and high is not None:
                lift += f" ({formats.percent(low, 1)} to {formats.percent(high, 1)})"
            rows.append([name, shown(name, one["difference"]), ends, total, lift])
        columns = ["caused by the mail", "per mailed user", "95 % interval", "in all", "lift"]
        console.show_rows(title, columns, rows)
    console.show_rows(
        "Arms" if record["effects"] else title,
        ["arm", "users", "with a send", "ordered", "rate", "revenue per user"],
        [
            [
                name,
                arm["num_users"],
                arm["num_mailed"],
                arm["num_converted"],
                formats.percent(arm["conversion_rate"], 2),
                formats.money(arm["revenue_per_user"], currency),
            ]
            for name, arm in record["arms"].items()
        ],
    )
    actual = record["expected_actual"]
    console.show_rows(
        "Expected against actual conversions of mailed users, by decile of probability",
        ["decile", "users", "expected", "actual", "expected rate", "actual rate", "95 % interval"],
        [
            [
                row["decile"],
                row["num_users"],
                formats.decimal(row["expected_conversions"], 1),
                row["actual_conversions"],
                formats.percent(row["expected_rate"], 2),
                formats.percent(row["actual_rate"], 2),
                " to ".join(formats.percent(end, 2) for end in row["actual_interval"]),
            ]
            for row in actual["deciles"]
        ],
    )
    typer.echo(record["verdict"])
    typer.echo(actual["words"])
