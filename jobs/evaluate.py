"""Registered models on the test split -> one evaluation record: intervals, calibration, back-test, the gate.

`--dates` names the as_of days the examples cover; it is recorded and does not select rows.
"""

from couponflow.entry import ConfigPath, Dates, LogJson, Overrides, Run, job_app, open_run
from couponflow.training import judging

app = job_app(__doc__)


def run(job: Run) -> None:
    """Judge the champion and the newest model of each kind on the same rows."""
    rows, facts = judging.evaluate_models(job.config, job.run_id, str(job.dates))
    job.rows.update(rows)
    job.facts.update(facts)


@app.command()
def main(config: ConfigPath, dates: Dates, overrides: Overrides = None, log_json: LogJson = False) -> None:
    """Evaluate all registered models once; the record is never overwritten."""
    with open_run("evaluate", config, overrides, dates, log_json=log_json) as job:
        run(job)


if __name__ == "__main__":
    app()
