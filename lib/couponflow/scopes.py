"""What each job reads of the config, and which dates of which tables it replaces.

Leases are taken on what a job writes; a backfill compares what a job read with what it would read now, and
follows the dates that a delivery touches. The widths are those of the jobs themselves, see their modules.
"""

from couponflow.config import Config
from couponflow.dates import DateRange
from couponflow.lake.leases import WHOLE_LAKE, Scope

#: Sections and single values of the config on which the rows of a job depend. Where the lake lies does not
#: change them, nor does a closed day.
READS: dict[str, tuple[str, ...]] = {
    "clean_events": ("lake.time_zone", "lake.lateness_days", "events", "feeds.events"),
    "clean_feeds": ("lake.time_zone", "events.pseudonymise", "events.key_version", "feeds"),
    "sessionize": ("sessions",),
    "attribute_conversions": ("lake.time_zone", "conversions"),
    "build_vocabulary": ("vocabulary",),
    "build_examples": ("lake.time_zone", "examples", "conversions", "training.num_ranks"),
    "monitor": ("lake.closed_days", "monitoring"),
}


def writes(job: str, dates: DateRange, config: Config, campaign: str = "") -> tuple[Scope, ...]:
    """What one run of a job replaces; empty for jobs whose results are new objects of their own.

    Dates are those of the table's own date column: ingest, event, session, send or as_of dates.
    Examples of training are one dataset; the ledger is one per lake, so that campaigns share their caps.
    """
    if job == "build_examples":
        return (("scoring_examples", dates),) if campaign else (("training_examples", None),)
    table: dict[str, tuple[Scope, ...]] = {
        "clean_events": (("events", dates), ("user_days", touched_dates(dates, config))),
        "clean_feeds": (("feeds", dates),),
        "sessionize": (("session_segments", dates), ("sessions", dates.widen(before=1, after=2))),
        "attribute_conversions": (("conversions", dates),),
        "build_vocabulary": (("vocabularies", None),),
        "score": ((f"predictions of {campaign}", dates),),
        "select_audience": (("assignments", None),),
        "monitor": (("verdicts", dates),),
        "erase_user": ((WHOLE_LAKE, None),),
        "migrate": ((WHOLE_LAKE, None),),
    }
    return table.get(job, ())


def touched_dates(ingest_dates: DateRange, config: Config) -> DateRange:
    """Event dates that a delivery may hold: from the lateness horizon to the day after (fast clocks)."""
    return ingest_dates.widen(before=config.lake.lateness_days, after=1)
