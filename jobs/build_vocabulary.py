"""events -> a vocabulary version, built from a range of event dates; becomes the current one.

With vocabulary.extend the version before keeps its ids and the range's new values follow.
"""

from pyspark.sql import SparkSession

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.lake import session, tables
from couponflow.sequences import vocabulary

app = job_app(__doc__)


@tables.retried
def run(spark: SparkSession, job: Run) -> None:
    """Build, write and publish the version of a range; an equal range and events give the same version."""
    section = job.config.vocabulary
    with vocabulary.making(spark, job.root_uri, job.dates, section) as (terms, parent):
        version = vocabulary.version_of(terms)
        job.facts.update(vocabulary_version=version, parent=parent, oov_share=vocabulary.oov_shares(terms))
        job.rows["vocabularies"] = tables.overwrite(
            terms.coalesce(1), job.root_uri, "vocabularies", None, job.run_id, version=version
        )
    fingerprint = job.config.fingerprint("vocabulary")
    made = vocabulary.Current(version, str(job.dates), fingerprint, parent)
    vocabulary.publish(job.root_uri, made, job.run_id, section.extend)


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Build a vocabulary from events."""
    with open_run("build_vocabulary", config, overrides, dates, log_json=log_json) as job:
        run(session.start(job.config.spark, f"build_vocabulary {dates}"), job)


if __name__ == "__main__":
    app()
