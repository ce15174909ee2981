"""A campaign as its owner declares it: a TOML file whose sections replace the config's for its jobs alone.

``couponflow campaign create`` keeps it as ``campaigns/<id>.toml`` on the lake; every job that is given that
campaign reads it there. A section of the file changes the values that it names; the config decides the rest.
Once a version of the campaign is approved or handed over the declaration stays as it is.
"""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from couponflow.config import Config, explained
from couponflow.errors import ConfigError, ConflictError
from couponflow.lake import storage
from couponflow.values import Section

#: Sections of the config that a campaign may decide for itself.
SECTIONS = ("selection", "scoring", "export")
_FOLDER = "campaigns"
#: What a person has said of a version, or a hand-over has claimed; either settles the declaration.
_SETTLED = ("approvals", "handovers")


class CampaignFile(Section):
    """The file's own section; the others are those of ``SECTIONS``."""

    campaign_id: str = Field(
        pattern="^[A-Za-z0-9_.:-]{1,128}$", description="Id of the campaign in the campaigns feed."
    )
    name: str = Field(default="", description="For people; shown by `couponflow campaign create`.")


def parse(content: bytes, where: str) -> tuple[CampaignFile, dict[str, dict[str, Any]]]:
    """The declaration and the values by section that it sets.

    Raises:
        ConfigError: not TOML, an unknown section or name, a wrong type or a value out of range; the message
            names the file and the dotted name.
    """
    try:
        tree = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"campaign file {where}: not valid TOML ({error}); correct that line") from error
    unknown = sorted(set(tree) - {"campaign", *SECTIONS})
    if unknown:
        raise ConfigError(
            f"campaign file {where}: unknown section [{unknown[0]}]; a campaign has [campaign] and, where it "
            f"differs from the config, [{'], ['.join(SECTIONS)}]"
        )
    try:
        own = CampaignFile.model_validate(tree.get("campaign", {}))
    except ValidationError as error:
        texts = [explained(problem, f"campaign file {where}", ("campaign",)) for problem in error.errors()]
        raise ConfigError("; ".join(texts)) from error
    return own, {name: tree[name] for name in SECTIONS if name in tree}


def merged(config: Config, values: Mapping[str, dict[str, Any]], where: str) -> Config:
    """The config with these values in place of its own; ``where`` they come from.

    Raises:
        ConfigError: an unknown name, a wrong type or a value out of range, by dotted name.
    """
    tree = config.model_dump(mode="json")
    for section, changes in values.items():
        if not isinstance(changes, dict):
            raise ConfigError(
                f"campaign file {where}: {section} is a value, not a section; write [{section}]"
            )
        tree[section] |= changes
    try:
        return Config.model_validate_json(json.dumps(tree, default=str))  # days of TOML become their text
    except ValidationError as error:
        texts = [explained(problem, where) for problem in error.errors()]
        raise ConfigError("; ".join(texts)) from error


def declare(config: Config, content: bytes, where: str, run_id: str) -> Config:
    """Keep a declaration on the lake; returns the config of the campaign's jobs.

    The same file again changes nothing.

    Raises:
        ConfigError: as ``parse`` and ``merged``.
        ConflictError: another declaration of this campaign is settled by an approval or a hand-over.
    """
    own, values = parse(content, where)
    made = merged(config, values, where)
    root, campaign_id = config.lake.root_uri, own.campaign_id
    uri = _uri(root, campaign_id)
    held = storage.read_bytes(uri) if storage.exists(uri) else None
    if held == content:
        return made
    if held is None:
        storage.create(uri, content, run_id)
        return made
    if any(storage.list_names(storage.join(root, kind, campaign_id)) for kind in _SETTLED):
        raise ConflictError(
            f"campaign {campaign_id} was declared otherwise and a version of it is approved or handed over; "
            "declare the new one under an id of its own"
        )
    storage.replace(uri, content, held)
    return made


def applied(config: Config, campaign_id: str) -> Config:
    """The config of a campaign's jobs: as declared on the lake, or as given where nothing is declared.

    Raises:
        ConfigError: the kept declaration does not fit this code; declare it again.
    """
    if not campaign_id:
        return config
    uri = _uri(config.lake.root_uri, campaign_id)
    if not storage.exists(uri):
        return config
    _, values = parse(storage.read_bytes(uri), uri)
    return merged(config, values, uri)


def _uri(root_uri: str, campaign_id: str) -> str:
    return storage.join(root_uri, _FOLDER, f"{campaign_id}.toml")
