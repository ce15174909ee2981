"""events -> a vocabulary version, built from a range of event dates; becomes the current one."""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.errors import DataError
from couponflow.lake import tables
from couponflow.sequences import events, vocabulary

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Build, write and publish the version of a range; an equal range and events give the same version."""
    min_count = job.config.vocabulary.min_count
    counts = vocabulary.count_values(events.read_events(spark, job.root_uri, job.dates)).persist()
    try:
        if counts.where((counts.field == "item") & (counts.num_events >= min_count)).isEmpty():
            raise DataError(
                f"no item of {job.dates} has {min_count} events; run clean_events for these dates first"
            )
        terms = vocabulary.build(counts, min_count, job.dates)
        version = vocabulary.version_of(terms)
        job.facts.update(vocabulary_version=version, oov_share=vocabulary.oov_shares(terms))
        job.rows["vocabularies"] = tables.overwrite(
            terms.coalesce(1), job.root_uri, "vocabularies", None, job.run_id, version=version
        )
    finally:
        counts.unpersist()
    fingerprint = job.config.fingerprint("vocabulary")
    vocabulary.publish(job.root_uri, vocabulary.Current(version, str(job.dates), fingerprint))


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Build a vocabulary from events."""
    with open_run("build_vocabulary", config, overrides, dates, log_json=log_json) as job:
        run(tables.spark_session(job.config.spark, f"build_vocabulary {dates}"), job)


if __name__ == "__main__":
    app()
