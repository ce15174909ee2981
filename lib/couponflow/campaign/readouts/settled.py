"""The readout of a campaign version as a record: made once, when all of it is known, and never again.

``<lake>/readouts/<campaign>/<version>.json`` is created once. Whoever asks later gets what it says; under
other settings he is refused, since a result that may be made anew until it pleases shows nothing. What is
refused for want of a control is kept too, with expected against actual. A campaign that was mailed without a
ledger has the version ``delivered``.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from couponflow.campaign.choice import options
from couponflow.campaign.readouts import actuals, outcomes, readout
from couponflow.campaign.readouts.effects import Cell, Money
from couponflow.campaign.readouts.outcomes import Span, Version
from couponflow.config import Config
from couponflow.errors import ConfigError, DataError
from couponflow.lake import runs, storage, tables
from couponflow.training.evaluation import without_nan

SCHEMA_VERSION = 1
DELIVERED = "delivered"
#: What the course of calibration over campaigns shows of each.
_DRIFT = (
    "model_version",
    "num_users",
    "expected_conversions",
    "actual_conversions",
    "ratio",
    "ratio_interval",
    "ece",
    "is_drifted",
)


def uri_of(root_uri: str, campaign_id: str, version: str) -> str:
    """Where the readout of a version lies; an empty version names mails without a ledger."""
    return storage.join(root_uri, "readouts", campaign_id, f"{version or DELIVERED}.json")


def read_out(
    config: Config, session: Callable[[], Any], campaign_id: str, version: str, run_id: str
) -> dict[str, Any]:
    """The readout of a version, made now if there is none; ``version`` "" is for mails without a ledger.

    A record whose ``refusal`` is not empty has no effects.

    Raises:
        ConfigError: it was made under other settings.
        DataError: no such version, another one was handed over, nothing was delivered, or a label window is
            not final.
    """
    root_uri = config.lake.root_uri
    uri = uri_of(root_uri, campaign_id, version)
    if not storage.exists(uri):
        spark = session()
        if version:
            record = _of_ledger(spark, config, campaign_id, version)
        else:
            record = _of_deliveries(spark, config, campaign_id)
        content = json.dumps(without_nan(record), indent=1, sort_keys=True, allow_nan=False).encode()
        storage.create(uri, content, run_id)
    return _checked(config, uri)


def kept(config: Config, campaign_id: str, version: str) -> dict[str, Any]:
    """The stored readout of a version, or else of mails without a ledger; empty where there is none."""
    for name in (version, ""):
        uri = uri_of(config.lake.root_uri, campaign_id, name)
        if storage.exists(uri):
            return dict(json.loads(storage.read_bytes(uri)))
    return {}


def _checked(config: Config, uri: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(uri))
        made, wanted = record["settings"], settings(config)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{uri} is no readout ({error!r}); delete it and read out again") from error
    changed = [name for name in wanted if made.get(name) != wanted[name]]
    if changed:
        raise ConfigError(
            f"{uri} was made with {changed[0]} = {made.get(changed[0])!r}, the config says "
            f"{wanted[changed[0]]!r}; a readout is settled once, give --set with the value it was made with"
        )
    return record


def settings(config: Config) -> dict[str, Any]:
    """All of the config that a readout depends on, by dotted name."""
    found = {
        f"conversions.{name}": value for name, value in config.conversions.model_dump(mode="json").items()
    }
    for name in ("margin_amount", "mail_cost_amount", "discount_amount"):
        found[f"selection.{name}"] = config.selection.model_dump()[name]
    if config.selection.coupons:
        found["selection.coupons"] = config.selection.model_dump(mode="json")["coupons"]
    return found | {
        "lake.time_zone": config.lake.time_zone,
        "lake.currency": config.lake.currency,
        "evaluation.num_bins": config.evaluation.num_bins,
    }


def _of_ledger(spark: Any, config: Config, campaign_id: str, name: str) -> dict[str, Any]:
    root_uri = config.lake.root_uri
    ledger = tables.read_or_empty(spark, root_uri, "assignments")
    version = outcomes.find_version(ledger, campaign_id, name)
    _check_handed_over(root_uri, campaign_id, name, version)
    span = _mature_span(spark, config, campaign_id, version, f"campaign {campaign_id}, version {name}")
    cells = outcomes.ledger_cells(spark, config, campaign_id, name, version, span)
    section = config.selection
    money = Money(
        section.margin_amount,
        section.mail_cost_amount,
        section.discount_amount,
        outcomes.costs_of(spark, config, campaign_id, version.run_date, span),
        {
            coupon.coupon_id: (options.margin_amount(coupon, section), coupon.discount_amount)
            for coupon in section.coupons
        },
    )
    return {
        **_frame(config, campaign_id, name, version.run_date.isoformat(), span),
        "num_erased": version.num_erased,
        **readout.measure(cells, money),
        "expected_actual": _actuals(config, cells, _model_of(root_uri, campaign_id, name)),
    }


def _of_deliveries(spark: Any, config: Config, campaign_id: str) -> dict[str, Any]:
    ledger = tables.read_or_empty(spark, config.lake.root_uri, "assignments")
    known = {
        row["version"]
        for row in ledger.where(ledger.campaign_id == campaign_id).select("version").distinct().collect()
    }
    if known:
        raise DataError(
            f"campaign {campaign_id} has a ledger; name one of its versions: --version {sorted(known)[-1]}"
        )
    span = _mature_span(spark, config, campaign_id, None, f"campaign {campaign_id}")
    cells, model_version = outcomes.delivered_cells(spark, config, campaign_id)
    reason = (
        f"no randomised control: campaign {campaign_id} has no ledger of who was withheld, and the "
        f"propensity of {span.num_without_propensity:,} of {span.num_sends:,} sends is unknown"
    )
    return {
        **_frame(config, campaign_id, DELIVERED, span.mail_date.isoformat(), span),
        "num_erased": 0,
        "arms": {},
        "checks": {},
        "refusal": reason,
        "effects": {},
        "cost": None,
        "verdict": readout.refused(reason),
        "expected_actual": _actuals(config, cells, model_version),
    }


def _frame(config: Config, campaign_id: str, version: str, run_date: str, span: Span) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "campaign_id": campaign_id,
        "campaign_type": span.campaign_type,
        "version": version,
        "run_date": run_date,
        "mail_date": span.mail_date.isoformat(),
        "outcome": "orders",
        "label_start": span.label_start.isoformat(),
        "label_end": span.label_end.isoformat(),
        "mature_time": span.mature_time.isoformat(),
        "num_sends": span.num_sends,
        "settings": settings(config),
    }


def _mature_span(spark: Any, config: Config, campaign_id: str, version: Version | None, name: str) -> Span:
    span = outcomes.find_span(spark, config, campaign_id, version)
    zone = config.lake.time_zone
    outcomes.check_mature(span, outcomes.complete_until(spark, config.lake.root_uri, zone), zone, name)
    return span


def _check_handed_over(root_uri: str, campaign_id: str, name: str, version: Version) -> None:
    """Refuse a version whose day was handed over to another one: the mails are not its own."""
    uri = storage.join(root_uri, "handovers", campaign_id, f"{version.run_date.isoformat()}.json")
    if not storage.exists(uri):
        return
    mailed = json.loads(storage.read_bytes(uri)).get("version")
    if mailed != name:
        raise DataError(
            f"campaign {campaign_id}, {version.run_date}: version {mailed} was mailed, {name} was not; "
            f"read out --version {mailed}"
        )


def _actuals(config: Config, cells: list[Cell], model_version: str) -> dict[str, Any]:
    records = _evaluations(config.lake.root_uri)
    evaluated = actuals.find_evaluated(records, model_version) if model_version else None
    found = actuals.expected_against_actual(cells, config.evaluation.num_bins, evaluated)
    return {**found, "model_version": model_version, "label": config.conversions.source}


def _evaluations(root_uri: str) -> Iterator[dict[str, Any]]:
    """Evaluation records, oldest first, each read when it is asked for."""
    folder = storage.join(root_uri, "evaluations")
    for name in storage.list_names(folder):
        if name.endswith(".json"):
            yield json.loads(storage.read_bytes(storage.join(folder, name)))


def _model_of(root_uri: str, campaign_id: str, version: str) -> str:
    """The model whose predictions a version was selected by, as its selection recorded; else ""."""
    for record in runs.load_all(root_uri, "select_audience"):
        facts = record.facts
        if facts.get("campaign_id") == campaign_id and facts.get("version") == version:
            return str(facts.get("model_version", ""))
    return ""


def last_of_type(root_uri: str, campaign_type: str, before: str) -> dict[str, Any] | None:
    """The newest readout of a campaign type that has a control and a run date before ``before``, or None."""
    found = [
        record
        for record in _all_records(root_uri)
        if record.get("campaign_type") == campaign_type
        and not record.get("refusal")
        and record["run_date"] < before
    ]
    return max(found, key=lambda record: (record["run_date"], record["version"]), default=None)


def calibration_by_campaign(root_uri: str) -> list[dict[str, Any]]:
    """Expected against actual conversions of each readout whose users had predictions, oldest mails first."""
    rows = [
        {name: record[name] for name in ("mail_date", "campaign_id", "campaign_type", "version")}
        | {name: record["expected_actual"][name] for name in _DRIFT}
        for record in _all_records(root_uri)
        if record["expected_actual"]["num_users"]
    ]
    return sorted(rows, key=lambda row: (row["mail_date"], row["campaign_id"], row["version"]))


def _all_records(root_uri: str) -> Iterator[dict[str, Any]]:
    folder = storage.join(root_uri, "readouts")
    for campaign in storage.list_names(folder):
        for name in storage.list_names(storage.join(folder, campaign)):
            yield json.loads(storage.read_bytes(storage.join(folder, campaign, name)))
