"""The stages of the whole job in order, and how a rerun skips what is finished.

A stage's fingerprint covers its arguments, the config values it reads, what the model names it reads stand
for, the code and, through the stages before it, everything upstream. A finished run record with that
fingerprint, whose tables nobody has written since, means there is nothing to do: the stage is skipped and no
table gets another copy.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from couponflow import campaign_file, scopes
from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.entry import Run, record_run
from couponflow.errors import ConfigError
from couponflow.lake import runs, storage
from couponflow.training import registry

#: Jobs that a command may start, and those among them that run without Spark.
JOBS = (
    "clean_events",
    "clean_feeds",
    "sessionize",
    "attribute_conversions",
    "build_vocabulary",
    "build_examples",
    "train",
    "evaluate",
    "score",
    "select_audience",
    "export_audience",
    "monitor",
)
#: Jobs of the whole lake, outside the plan; each has a command of its own.
UPKEEP = ("erase_user", "maintain")
WITHOUT_SPARK = ("train", "evaluate")
OF_A_CAMPAIGN = ("score", "select_audience", "export_audience")
_COMMIT_HEAD_BYTES = 1_024  # a commit's first words say which operation it was
#: Facts of a record that name an object the stage has published; a stage whose object is gone runs again.
_PUBLISHED = ("manifest", "evaluation", "decision", "dataset")


@dataclass(frozen=True)
class Stage:
    """One job over one range. ``sections`` are the config sections, or single values, that it reads;
    ``writes`` the tables that it alone writes in the pipeline; of a campaign's tables, its part.
    """

    job: str
    dates: DateRange
    sections: tuple[str, ...]
    after: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    campaign: str = ""
    model: str = ""
    uses_spark: bool = True

    @property
    def name(self) -> str:
        """Unique inside a plan."""
        target = f"campaign {self.campaign}" if self.campaign else ""
        return " ".join(filter(None, [self.job, self.model, target]))


@dataclass
class Outcome:
    """What became of one stage: its record, and whether it was skipped because nothing had changed."""

    stage: Stage
    record: runs.RunRecord
    is_skipped: bool


@dataclass
class Progress:
    """Where the execution tells what it is doing; the command line draws it."""

    start: Callable[[int, int, Stage], None] = field(default=lambda done, total, stage: None)
    end: Callable[[int, int, Outcome], None] = field(default=lambda done, total, outcome: None)
    step: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)


def plan(config: Config) -> list[Stage]:
    """The stages of the main job for the config's campaigns, in an order that honours ``after``.

    Raises:
        ConfigError: the dates of ``run`` and ``examples`` contradict each other.
    """
    run, examples = config.run, config.examples
    in_order = run.first_date < examples.valid_start and examples.test_start <= run.last_date
    if not in_order or run.first_as_of > run.last_date:
        raise ConfigError(
            f"run.first_date {run.first_date} < examples.valid_start {examples.valid_start} and "
            f"examples.test_start {examples.test_start} <= run.last_date {run.last_date} >= "
            f"run.first_as_of {run.first_as_of} must hold; correct these dates"
        )
    data = DateRange(run.first_date, run.last_date + timedelta(days=1))
    touched = scopes.touched_dates(data, config)
    as_ofs = DateRange(run.first_as_of, data.end)
    before_valid = DateRange(run.first_date, examples.valid_start)
    fitting = DateRange(examples.train_start, examples.test_start)
    judging = DateRange(examples.test_start, data.end)
    day = DateRange.day(run.run_date)
    campaigns = ",".join(_targets(config))  # one pass over the users builds the examples of all
    baselines = {
        "rate": ("calibration",),
        "rule": ("calibration",),
        "boosted": ("boosting", "training.seed", "calibration"),
    }
    models = tuple(f"train {kind}" for kind in ("logistic", "dien", "blend", *baselines))
    fit = ("model", "training", "calibration")
    return [
        Stage("land", data, ("lake", "source", "world", "sessions.gap_minutes", "run"), uses_spark=False),
        Stage(
            "clean_events",
            data,
            ("lake", "events", "feeds"),
            ("land",),
            ("events", "user_days", "identity_links"),
        ),
        Stage(
            "clean_feeds",
            data,
            ("lake", "events", "feeds"),
            ("land",),
            ("orders", "sends", "campaigns", "redemptions", "consents", "users", "catalogue", "costs"),
        ),
        Stage(
            "sessionize",
            touched,
            ("lake", "sessions"),
            ("clean_events",),
            ("session_segments", "sessions"),
        ),
        Stage("attribute_conversions", as_ofs, ("lake", "conversions"), ("clean_feeds",), ("conversions",)),
        Stage("build_vocabulary", before_valid, ("lake", "vocabulary"), ("clean_events",), ("vocabularies",)),
        Stage(
            "build_examples",
            as_ofs,
            ("lake", "examples", "conversions", "training.num_ranks"),
            ("clean_events", "attribute_conversions", "build_vocabulary"),
            ("training_examples",),
        ),
        Stage("train", fitting, fit, ("build_examples",), model="logistic", uses_spark=False),
        Stage("train", fitting, fit, ("build_examples",), model="dien", uses_spark=False),
        Stage("train", fitting, fit, models[:2], model="blend", uses_spark=False),
        *[
            Stage("train", fitting, sections, ("build_examples",), model=kind, uses_spark=False)
            for kind, sections in baselines.items()
        ],
        Stage("evaluate", judging, ("evaluation",), models, uses_spark=False),
        Stage(
            "build_examples",
            day,
            ("lake", "examples", "conversions"),
            ("build_examples",),
            ("scoring_examples", "histories"),
            campaigns,
        ),
        *_campaign_stages(day, run.campaign_ids, (f"build_examples campaign {campaigns}", *models)),
        Stage(
            "monitor",
            day,
            ("lake", "monitoring"),
            (*(f"export_audience campaign {one}" for one in run.campaign_ids), "sessionize", "evaluate"),
            ("verdicts",),
        ),
    ]


def _targets(config: Config) -> list[str]:
    """The targets that users are scored for: the campaigns', then those that only coupons name."""
    named = [
        campaign_file.applied(config, campaign).selection.targets(campaign)
        for campaign in config.run.campaign_ids
    ]
    return list(dict.fromkeys([*config.run.campaign_ids, *(target for one in named for target in one)]))


def _campaign_stages(day: DateRange, campaigns: tuple[str, ...], scoring: tuple[str, ...]) -> list[Stage]:
    """Score, choice and hand-over of each campaign; who decides later counts what was decided before."""
    stages: list[Stage] = []
    for number, campaign in enumerate(campaigns):
        earlier = (f"select_audience campaign {one}" for one in campaigns[:number])
        stages += [
            Stage("score", day, ("scoring", "selection.coupons"), scoring, ("predictions",), campaign),
            Stage(
                "select_audience",
                day,
                ("lake", "selection", "events.staff_user_ids", "export.target_uri"),
                (f"score campaign {campaign}", "clean_feeds", *earlier),
                ("assignments", "audience"),
                campaign,
            ),
            Stage(
                "export_audience",
                day,
                ("export", "selection"),
                (f"select_audience campaign {campaign}",),
                (),
                campaign,
            ),
        ]
    return stages


def execute(
    config: Config, stages: list[Stage], spark: Callable[[], Any], progress: Progress
) -> list[Outcome]:
    """Run or skip each stage in order; the first failure ends the run, what was finished stays.

    ``spark`` gives the one session of the process when a stage first needs it.
    """
    outcomes: dict[str, Outcome] = {}
    for number, stage in enumerate(stages):
        progress.start(number, len(stages), stage)
        own = campaign_file.applied(config, stage.campaign)
        fingerprint = _fingerprint(own, stage, [outcomes[name] for name in stage.after])
        record = finished(config.lake.root_uri, stage, fingerprint)
        if record is not None:
            outcome = Outcome(stage, record, True)
        else:
            with record_run(stage.job, config, stage.dates, stage.campaign, stage.model, fingerprint) as run:
                _call(stage, run, spark, progress)
                run.record.versions = versions(config.lake.root_uri, stage.writes, stage.campaign)
            outcome = Outcome(stage, run.record, False)
        outcomes[stage.name] = outcome
        progress.end(number + 1, len(stages), outcome)
    return list(outcomes.values())


def finished(root_uri: str, stage: Stage, fingerprint: str) -> runs.RunRecord | None:
    """The stage's newest record, if it ended well under this fingerprint and its results are untouched."""
    same = [record for record in runs.load_all(root_uri, stage.job) if _is_of(record, stage)]
    if not same or same[-1].status != "ok" or same[-1].fingerprint != fingerprint:
        return None
    published = [same[-1].facts[name] for name in _PUBLISHED if name in same[-1].facts]
    if versions(root_uri, stage.writes, stage.campaign) != same[-1].versions or not all(
        map(storage.exists, published)
    ):
        return None
    if stage.job == "train" and not _is_newest(root_uri, stage.model, same[-1].facts.get("model_version")):
        return None
    return same[-1]


def _is_newest(root_uri: str, kind: str, version: object) -> bool:
    """Whether a trained bundle is there and is what its kind means: another training may have come since."""
    pointer = registry.pointed(root_uri, kind)
    return (
        pointer is not None and pointer["model_version"] == version and version in registry.versions(root_uri)
    )


def recorded(config: Config, stages: list[Stage]) -> list[Outcome]:
    """The newest successful record of each stage that has one, whatever its fingerprint."""
    outcomes = []
    for stage in stages:
        same = [
            r for r in runs.load_all(config.lake.root_uri, stage.job) if _is_of(r, stage) and r.status == "ok"
        ]
        outcomes += [Outcome(stage, same[-1], True)] if same else []
    return outcomes


def versions(root_uri: str, tables: tuple[str, ...], campaign: str = "") -> dict[str, int]:
    """Newest version of each existing table that changed rows, read off its log without Spark.

    With a campaign, of a table that is partitioned by campaign: the newest that changed its rows.
    """
    found = {}
    for table in tables:
        log = storage.join(root_uri, "tables", table, "_delta_log")
        names = [name.removesuffix(".json") for name in storage.list_names(log) if name.endswith(".json")]
        commits = [int(name) for name in names if name.isdecimal()]  # beside them: checkpoints
        if commits:
            found[table] = _last_change(log, sorted(commits), campaign)
    return found


def _last_change(log_uri: str, commits: list[int], campaign: str) -> int:
    """The newest commit that is more than the joining of files, which leaves results as they are."""
    for number in reversed(commits):
        uri = storage.join(log_uri, f"{number:020d}.json")
        if b'"operation":"OPTIMIZE"' in storage.read_head(uri, _COMMIT_HEAD_BYTES):
            continue
        if not campaign or _has_changed(storage.read_bytes(uri), campaign):
            return number
    return commits[0] if campaign else commits[-1]


def _has_changed(commit: bytes, campaign: str) -> bool:
    """Whether a commit adds or removes files of a campaign, or of a table that has no such partitions."""
    actions = [json.loads(line) for line in commit.splitlines()]
    files = [action.get("add") or action.get("remove") for action in actions]
    partitions = [file.get("partitionValues") or {} for file in files if file]
    return any(values.get("campaign_id", campaign) == campaign for values in partitions)


def content(root_uri: str, spark: Any) -> Iterator[tuple[str, int, int, str]]:
    """Name, version, rows and content hash of every table that exists."""
    from couponflow.lake import schemas, tables

    for table in sorted(schemas.TABLES):
        for name, version in versions(root_uri, (table,)).items():
            frame = tables.read(spark, root_uri, name)
            yield name, version, frame.count(), tables.content_hash(frame)


def _is_of(record: runs.RunRecord, stage: Stage) -> bool:
    arguments = {key: value for key, value in (("campaign", stage.campaign), ("model", stage.model)) if value}
    return record.dates == str(stage.dates) and record.arguments == arguments


def _fingerprint(config: Config, stage: Stage, upstream: list[Outcome]) -> str:
    parts: dict[str, Any] = {
        "stage": [stage.job, str(stage.dates), stage.campaign, stage.model],
        "config": config.fingerprint(*stage.sections),
        "code": runs.code_version(),
        "upstream": [[outcome.record.fingerprint, outcome.record.versions] for outcome in upstream],
    }
    if models := _models_read(config, stage):
        parts["models"] = models
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _models_read(config: Config, stage: Stage) -> dict[str, str]:
    """What the model names that a stage reads mean now: a promotion makes its results stale."""
    root_uri = config.lake.root_uri
    names: tuple[str, ...] = ()
    if stage.job == "evaluate":
        names = (registry.CHAMPION, *registry.KINDS)
    elif stage.job == "score":
        names = (config.scoring.model,)
    pointers = {name: registry.pointed(root_uri, name) for name in names}
    return {name: str(pointer["model_version"]) for name, pointer in pointers.items() if pointer}


def check_arguments(job: str, campaign: str, model: str) -> None:
    """Refuse a call that lacks what its job needs, before anything starts.

    Raises:
        ConfigError: unknown job, or no campaign or model.
    """
    if job not in JOBS:
        raise ConfigError(f"unknown job {job!r}; one of {', '.join(sorted(JOBS))}")
    lacking = "--campaign ID" if job in OF_A_CAMPAIGN and not campaign else ""
    lacking = "--model KIND" if job == "train" and not model else lacking
    if lacking:
        raise ConfigError(
            f"job {job} needs {lacking}; start it with `couponflow job {job} {lacking} --dates D`"
        )


def load_job(name: str) -> Any:
    """The module of a job.

    Raises:
        ConfigError: it, or a package that it needs, is not installed.
    """
    try:
        return importlib.import_module(f"jobs.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"job {name} needs {error.name}, which is not installed; run `make install`, "
            "or use the wheel that carries jobs/"
        ) from error


def _call(stage: Stage, run: Run, spark: Callable[[], Any], progress: Progress) -> None:
    if stage.job == "land":
        run.rows.update(land(run.config, progress.step))
        return
    job = load_job(stage.job)
    if stage.uses_spark:
        job.run(spark(), run)
    else:
        job.run(run)


def land(config: Config, report: Callable[[str, int, int], None]) -> dict[str, int]:
    """Land the configured source's raw feeds; returns rows per feed."""
    if config.source.name == "completejourney":
        from couponflow.sources import completejourney

        return completejourney.land(config, report)
    from couponflow.sources import synthetic

    return synthetic.land(config, report)
