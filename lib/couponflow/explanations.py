"""The command that says why a user gets a mail, or does not."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from couponflow import console
from couponflow.commands import DEFAULT_CONFIG, AsJson, LazySpark, errors_as_exit_codes
from couponflow.config import load_config
from couponflow.entry import Campaign, ConfigPath, Overrides


def explain(
    user: Annotated[str, typer.Option("--user", help="Raw user id, as delivered; - reads it from stdin.")],
    campaign: Campaign,
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say why a user gets the mail of a campaign, or does not, by its newest selection.

    Eligible or not and why, score, probability, rank, coupon and arm; which events and aggregates the score
    rests on: attention, and the probability without each of them. Nothing is written.

    Example: couponflow explain --user hh208 --campaign 18
    """
    with errors_as_exit_codes():
        from couponflow import erasing
        from couponflow.campaign import explain as explaining
        from couponflow.models.bundle import load_bundle
        from couponflow.training import registry

        settings = load_config(config, tuple(overrides or ()))
        raw_id = sys.stdin.readline().strip() if user == "-" else user
        user_id, root = erasing.find_person(settings, raw_id).user_id, settings.lake.root_uri
        decision = explaining.last_decision(root, campaign)
        spark = LazySpark(settings)()
        found = explaining.decided(spark, root, user_id, decision)
        if found["score"] is not None:
            with tempfile.TemporaryDirectory() as folder:
                bundle = load_bundle(registry.fetch(root, found["model_version"], Path(folder)))
            found |= explaining.rests_on(spark, root, user_id, decision, bundle)
        if as_json:
            console.show_json(found)
        else:
            typer.echo("\n".join(explaining.in_words(found)))
