"""One self-contained HTML file per campaign: who gets the mail and why, how good the model is, what ran.

The report computes no result: it shows the records that select, export, evaluate, score and monitor wrote,
and checks that they agree with each other. What disagrees is listed at the top. No script, no request to
another place, no user id. Equal inputs give equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from couponflow.campaign.pages import agreement, charts, formats, modelcard, prospects
from couponflow.lake import storage

if TYPE_CHECKING:
    from jinja2 import Template

Facts = Mapping[str, Any]

MILESTONES = {"user_master", "eligible", "would_select", "mailed"}  # waterfall lines that exclude nobody
OBJECTIVES = {
    "expected_profit": "The list was chosen for the highest expected profit inside the budget.",
    "incremental_profit": "The list was chosen for the highest profit that would not come without the mail.",
    "top_k": "The list holds the users who are most likely to convert.",
    "threshold": "The list holds everyone above the probability threshold.",
}
CONSTRAINTS = {
    "budget": ("The budget limits the list", "one more {unit} of budget"),
    "max_recipients": ("The upper bound of recipients limits the list", "one more recipient"),
    "stock": ("The stock of a coupon limits the list", "one more coupon of it"),
    "segment_max": ("The upper bound of a segment limits the list", "one more recipient in it"),
    "value": ("No limit binds: everyone worth a mail was selected", ""),
    "none": ("No limit binds: all eligible users were selected", ""),
}


@dataclass(frozen=True)
class ReportInputs:
    """Everything a report shows, as plain dicts read from run records; each part may be empty.

    ``evaluation`` is the evaluation record, ``selection`` and ``export`` are the facts of those jobs,
    ``score`` has model_version, kind, num_users, cold_start_users, users_per_second, mean_probability.
    ``score_histogram`` has edges (n + 1), counts (n) and selected_counts (n). ``stages``, ``conservation``
    and ``verdicts`` are lists of rows; ``has_randomised_control`` says whether past sends had one, None where
    that is not known. ``readout`` is the stored readout of the campaign's mails. ``hindsight`` is what the
    choice is worth by the true chances, where a synthetic shop tells them; ``calibration`` has one row per
    readout of this lake.
    """

    campaign: Facts = field(default_factory=dict)
    selection: Facts = field(default_factory=dict)
    export: Facts = field(default_factory=dict)
    score: Facts = field(default_factory=dict)
    score_histogram: Facts = field(default_factory=dict)
    evaluation: Facts = field(default_factory=dict)
    stages: Sequence[Facts] = ()
    conservation: Sequence[Facts] = ()
    verdicts: Sequence[Facts] = ()
    readout: Facts = field(default_factory=dict)
    hindsight: Facts = field(default_factory=dict)
    calibration: Sequence[Facts] = ()
    table_versions: Mapping[str, int] = field(default_factory=dict)
    run_id: str = ""
    config_fingerprint: str = ""
    code_version: str = ""
    data_note: str = ""
    notes: Sequence[str] = ()
    has_randomised_control: bool | None = None
    currency: str = "USD"
    time_zone: str = "UTC"


def render(inputs: ReportInputs) -> str:
    """The whole page as HTML text; every value is escaped, missing parts become notices."""
    return _template().render(_context(inputs)).strip() + "\n"


def write(root_or_path: str, html: str, run_id: str) -> str:
    """Write the page and return its URI.

    A lake root gets ``reports/<run_id>.html``, written once; a path that ends in ``.html`` is replaced.

    Raises:
        ConflictError: the run's report exists with other content, or the file changed meanwhile.
        InfraError: the store refused the write.
    """
    content = html.encode()
    if root_or_path.endswith(".html"):
        found = storage.read_bytes(root_or_path) if storage.exists(root_or_path) else None
        storage.replace(root_or_path, content, found)
        return root_or_path
    uri = storage.join(root_or_path, "reports", f"{run_id}.html")
    storage.create(uri, content, run_id)
    return uri


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined, pass_context
    from jinja2.runtime import Context

    @pass_context
    def in_currency(context: Context, amount: Any) -> str:
        return formats.money(amount, context["inputs"].currency)

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        num=formats.number,
        pct=formats.percent,
        dec=formats.decimal,
        signed=lambda value: formats.decimal(value, is_signed=True),
        dur=formats.duration,
        money=in_currency,
    )
    source = (
        resources.files("couponflow.campaign.pages").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return environment.from_string(source)


def _context(inputs: ReportInputs) -> dict[str, Any]:
    from markupsafe import Markup

    scored = inputs.selection.get("model_version") or inputs.score.get("model_version", "")
    models = modelcard.model_rows(inputs.evaluation, scored, inputs.score.get("kind", ""))
    gate = modelcard.gate(inputs.evaluation, models)
    waterfall = agreement.waterfall_problems(inputs.selection)
    conservation = [agreement.with_gap(row) for row in inputs.conservation]
    verdicts = sorted(inputs.verdicts, key=lambda row: row.get("verdict") == "ok")  # stable: problems first
    used = next((model for model in models if model["is_used"]), None)
    comparisons = modelcard.comparisons(inputs.evaluation, models)
    bars = _histogram_rows(inputs.score_histogram)
    learning = modelcard.learning(inputs.evaluation, used)
    losses = modelcard.validation_losses(inputs.evaluation)
    attention = modelcard.attention(inputs.evaluation, used)
    made = charts.draw_all(models, used, comparisons, bars, losses, learning["series"], attention)
    context = {
        "inputs": inputs,
        "selection": inputs.selection,
        "evaluation": inputs.evaluation,
        "steps": _steps(inputs.selection),
        "waterfall_problems": waterfall,
        "constraint": _constraint(inputs),
        "objective": OBJECTIVES.get(inputs.selection.get("objective", ""), ""),
        "models": models,
        "used": used,
        "gate": gate,
        "comparisons": comparisons,
        "conservation": conservation,
        "verdicts": verdicts,
        "stages": _stages(inputs.stages),
        "seconds": _seconds(inputs.stages, is_skipped=False),
        "recorded_seconds": _seconds(inputs.stages, is_skipped=True),
        "num_skipped": sum(bool(stage.get("skipped")) for stage in inputs.stages),
        "charts": {name: Markup(svg) for name, svg in made.items()},  # charts escape every text they show
        "histogram": bars,
        "forecast": prospects.forecast_context(inputs.selection, inputs.currency),
        "reach": [
            part | {"chart": Markup(part["chart"])} for part in prospects.reach_context(inputs.selection)
        ],
        "effects": _effects(inputs),
        "actual": inputs.readout.get("expected_actual") or {},
        "segments": modelcard.segments(used),
        "backtest": modelcard.backtest(inputs.evaluation),
        "learning": learning,
        "attention": attention,
        "training_legend": [(curve.name, curve.colour, curve.dash) for curve in losses],
        "learning_legend": [(curve.name, curve.colour, curve.dash) for curve in learning["series"]],
        "gain_rows": modelcard.gain_rows(used),
        "gain_legend": [(m["label"], m["colour"], m["dash"]) for m in models if m["gain_curve"]],
    }
    context["problems"] = agreement.find_problems(
        inputs.selection,
        inputs.export,
        inputs.score,
        inputs.verdicts,
        inputs.stages,
        conservation,
        used,
        inputs.currency,
    )
    context["chips"] = _chips(inputs, waterfall, conservation, gate)
    return context


def _steps(selection: Facts) -> list[dict[str, Any]]:
    rows = selection.get("waterfall") or []
    whole = max([1, *(agreement.count(row, "remaining") + agreement.count(row, "excluded") for row in rows)])
    return [
        {
            "label": row.get("label") or row.get("reason", ""),
            "reason": row.get("reason", ""),
            "excluded": agreement.count(row, "excluded"),
            "remaining": agreement.count(row, "remaining"),
            "kept_width": f"{100 * max(0, agreement.count(row, 'remaining')) / whole:.2f}",
            "lost_width": f"{100 * max(0, agreement.count(row, 'excluded')) / whole:.2f}",
            "is_milestone": row.get("reason") in MILESTONES or index in (0, len(rows) - 1),
            "is_last": index == len(rows) - 1,
        }
        for index, row in enumerate(rows)
    ]


def _constraint(inputs: ReportInputs) -> str:
    name = inputs.selection.get("binding_constraint") or "none"
    text, unit = CONSTRAINTS.get(
        name, (f"The limit that binds is “{str(name).replace('_', ' ')}”", "one more unit of it")
    )
    price = inputs.selection.get("shadow_price")
    if unit and charts.is_number(price) and price:
        gain = formats.money(price, inputs.currency)
        return f"{text}: {unit.format(unit=inputs.currency)} would add about {gain} of expected profit."
    return f"{text}."


def _seconds(stages: Sequence[Facts], is_skipped: bool) -> float:
    found = [stage.get("seconds") for stage in stages if bool(stage.get("skipped")) == is_skipped]
    return sum(float(seconds) for seconds in found if seconds is not None and charts.is_number(seconds))


def _stages(stages: Sequence[Facts]) -> list[dict[str, Any]]:
    longest = max([1e-9, *(s["seconds"] for s in stages if charts.is_number(s.get("seconds")))])
    return [
        {
            **{name: stage.get(name) for name in ("job", "dates", "seconds", "status", "run_id")},
            "skipped": bool(stage.get("skipped")),
            "rows": sorted((stage.get("rows") or {}).items()),
            "width": f"{100 * stage['seconds'] / longest:.2f}"
            if charts.is_number(stage.get("seconds"))
            else "0",
        }
        for stage in stages
    ]


def _chips(
    inputs: ReportInputs, waterfall: Sequence[str], doors: Sequence[Facts], gate: Facts | None
) -> list[dict[str, str]]:
    """Status marks under the headline: ``tone`` is good, warn or info."""
    selection, export, chips = inputs.selection, inputs.export, []

    def chip(tone: str, text: str, anchor: str) -> None:
        chips.append({"tone": tone, "text": text, "anchor": anchor})

    if not export:
        chip("warn", "Not exported", "decision")
    else:
        text = "Exported before, nothing sent again" if export.get("already_exported") else "Exported once"
        chip("good", text, "record")
    if selection.get("waterfall"):
        chip(
            *(("warn", "Waterfall does not add up") if waterfall else ("good", "Waterfall adds up")),
            "decision",
        )
    if selection.get("consent_snapshot_date"):
        source = selection.get("consent_source")
        tone = "warn" if source == "constructed" else "good"
        suffix = " (constructed)" if source == "constructed" else ""
        chip(tone, f"Consent of {selection['consent_snapshot_date']}{suffix}", "notes")
    elif selection:
        chip("warn", "Consent snapshot unknown", "notes")
    fresh = sum(row.get("verdict") == "ok" for row in inputs.verdicts)
    if inputs.verdicts:
        tone = "good" if fresh == len(inputs.verdicts) else "warn"
        chip(tone, f"Data checks: {fresh} of {len(inputs.verdicts)} ok", "freshness")
    else:
        chip("info", "No data checks", "freshness")
    if doors:
        good = sum(door["is_balanced"] for door in doors)
        chip(
            "good" if good == len(doors) else "warn", f"Rows balance at {good} of {len(doors)} doors", "rows"
        )
    if gate is None:
        chip("info", "Model not evaluated", "model")
    else:
        text = "Gate chose this model" if gate["is_used_choice"] else f"Gate would choose {gate['choice']}"
        chip("good" if gate["is_used_choice"] else "warn", text, "model")
    return chips


def _effects(inputs: ReportInputs) -> list[dict[str, str]]:
    """What the mails caused, in words of the reader's units; empty for a readout without a sound control."""
    rows = []
    for name, effect in (inputs.readout.get("effects") or {}).items():
        is_share = name == "conversion"

        def shown(value: Any, is_share: bool = is_share) -> str:
            return formats.percent(value, 2) if is_share else formats.money(value, inputs.currency)

        total = (
            formats.number(effect["total"]) if is_share else formats.money(effect["total"], inputs.currency)
        )
        interval = " to ".join(shown(end) for end in effect["interval"])
        rows.append({"name": name, "each": shown(effect["difference"]), "interval": interval, "total": total})
    return rows


def _histogram_rows(histogram: Facts) -> list[tuple[float, float, int, int]]:
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    chosen = histogram.get("selected_counts") or [0] * len(counts)
    if not counts or len(edges) != len(counts) + 1 or len(chosen) != len(counts):
        return []
    return list(zip(edges[:-1], edges[1:], counts, chosen, strict=True))
