"""training_examples of a pinned version -> a registered model bundle. The splits come from the config.

`--dates` are the as_of days of the examples; they are recorded and select no rows. A DIEN is trained on
`training.num_ranks` Horovod processes, and goes on where a run has died. The test split is never opened.
"""

from pathlib import Path
from typing import Annotated

import typer

from couponflow.entry import (
    ConfigPath,
    Dates,
    FromScratch,
    LogJson,
    Model,
    Overrides,
    Run,
    job_app,
    open_run,
    set_up_logging,
)
from couponflow.training import fitting

app = job_app(__doc__)
RunFolder = Annotated[Path | None, typer.Option("--run-folder", hidden=True, help="Folder of a rank's run.")]


def run(job: Run) -> None:
    """Fit, calibrate and register the model kind that the run names."""
    argv = fitting.rank_argv(__file__, str(job.dates), job.model)
    rows, facts = fitting.train(job.config, job.model, job.run_id, argv, job.from_scratch)
    job.rows.update(rows)
    job.facts.update(facts)


@app.command()
def main(
    config: ConfigPath,
    dates: Dates,
    model: Model,
    from_scratch: FromScratch = False,
    overrides: Overrides = None,
    log_json: LogJson = False,
    run_folder: RunFolder = None,
) -> None:
    """Train one model: rate, rule, logistic, boosted, dien or blend."""
    if run_folder is not None:  # one rank of a run that this job has started
        set_up_logging(log_json)
        fitting.run_rank(run_folder, model)
        return
    with open_run("train", config, overrides, dates, model=model, log_json=log_json) as job:
        job.from_scratch = from_scratch
        run(job)
        typer.echo(job.facts.get("model_version", ""))


if __name__ == "__main__":
    app()
