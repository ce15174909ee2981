"""Load jobs by the real client against a served BigQuery: whatever goes wrong, one list, loaded once."""

import io
import multiprocessing
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from bigquery_server import BigQuery, serving

from couponflow.campaign import erasing, export, predictions
from couponflow.campaigning import ExportConfig
from couponflow.cloud import bigquery
from couponflow.config import load_config
from couponflow.errors import ConfigError, ConflictError, CouponflowError, DataError, InfraError
from couponflow.lake import faults, runs, storage

DAY = date(2024, 1, 10)
DATASET = "shop-project.mails"
SECTION = ExportConfig(bigquery_dataset=DATASET, bigquery_predictions=True, bigquery_predictions_days=7)
ROWS = export.Recipients(
    [("u1", "18", "v1", None, 1), ('u,"2', "18", "v1", "c9", 3)], num_withdrawn=1, seeds=("seed-a",)
)
LOADED = [
    ["u1", "18", "v1", None, 1, False],
    ['u,"2', "18", "v1", "c9", 3, False],
    ["seed-a", "18", "v1", None, None, True],
]
FINISHED = {"audience.csv", "manifest.json"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BigQuery]:
    monkeypatch.setattr(bigquery, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(bigquery, "_DEADLINE_SECONDS", 2.0)
    with serving(DATASET) as server:
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", server.url)
        yield server


def handover(folder: Path, version: str = "v1", run_id: str = "export-1", day: date = DAY) -> export.Handover:
    table = bigquery.audience_table(SECTION, "18", version)
    return export.Handover(
        str(folder / "lake"),
        str(folder / "out"),
        "18",
        version,
        day,
        run_id,
        table,
        SECTION.bigquery_location,
    )


def hand_over(folder: Path, found: export.Recipients = ROWS, **changes: Any) -> dict[str, Any]:
    return export.hand_over(handover(folder, **changes), found, "select-1", bigquery)


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out").rglob("*") if path.is_file()}


def the_table(server: BigQuery) -> list[list[Any]]:
    (table,) = server.tables.values()
    return table.rows


def test_a_list_is_loaded_once_with_schema_and_proof_of_origin(tmp_path: Path, server: BigQuery) -> None:
    facts = hand_over(tmp_path)
    (name,) = server.tables
    table = server.tables[name]
    assert re.fullmatch("audience_18_v1_[0-9a-f]{8}", name)
    assert facts["bigquery_table"] == f"{DATASET}.{name}"
    assert table.rows == LOADED
    assert [(c["name"], c["type"], c["mode"]) for c in table.schema] == list(bigquery.AUDIENCE)
    assert facts["sha256"] in table.description
    assert table.labels == {
        "campaign_id": "18",
        "version": "v1",
        "run_id": "select-1",
        "sha256": facts["sha256"][:63],
    }
    (job,) = server.jobs.values()
    assert job["configuration"]["load"]["autodetect"] is False
    requests = len(server.requests)
    assert export.finished(handover(tmp_path, run_id="export-2")) == facts | {"already_exported": True}
    assert len(server.requests) == requests  # a second run asks nobody
    assert hand_over(tmp_path, run_id="export-3") == facts  # as does one that missed the manifest
    assert len(server.jobs) == 1
    manifest = export.read_manifest(facts["manifest"])
    assert (manifest["num_recipients"], manifest["num_seeds"]) == (2, 1)
    assert manifest["bigquery_table"] == facts["bigquery_table"]


def test_an_empty_list_is_an_empty_table(tmp_path: Path, server: BigQuery) -> None:
    assert hand_over(tmp_path, export.Recipients([], 0))["num_recipients"] == 0
    assert the_table(server) == []
    hand_over(tmp_path, export.Recipients([], 0))
    assert len(server.jobs) == 1


def test_two_versions_are_two_tables(tmp_path: Path, server: BigQuery) -> None:
    hand_over(tmp_path)
    hand_over(tmp_path, version="v-1", day=date(2024, 1, 11))
    hand_over(tmp_path, version="v_1", day=date(2024, 1, 12))
    assert (len(server.tables), len(server.jobs)) == (3, 3)


def test_no_two_campaigns_share_a_table() -> None:
    pairs = [("a", "b_c"), ("a_b", "c"), ("a.b", "c"), ("a:b", "c"), ("a-b", "c")]
    assert len({bigquery.audience_table(SECTION, *pair) for pair in pairs}) == len(pairs)
    names = [bigquery.predictions_table(SECTION, campaign) for campaign in ("18", "a_b", "a-b", "a.b")]
    assert len(set(names)) == 4
    assert names[:2] == [f"{DATASET}.predictions_18", f"{DATASET}.predictions_a_b"]
    assert bigquery.audience_table(ExportConfig(), "18", "v1") == ""
    assert bigquery.predictions_table(ExportConfig(bigquery_dataset=DATASET), "18") == ""


@pytest.mark.parametrize("how", ["close", "reset", "cut", "slow"])
@pytest.mark.parametrize("hidden", [0, 2])
def test_a_lost_answer_loads_nothing_twice(
    tmp_path: Path, server: BigQuery, monkeypatch: pytest.MonkeyPatch, how: str, hidden: int
) -> None:
    """Accepted and not answered: the client asks again and meets its own job; nor is a read answered."""
    monkeypatch.setattr(bigquery, "_REQUEST_SECONDS", 0.5)
    server.losses = [how, how]
    server.hidden = hidden  # reads of a job just inserted may not find it
    hand_over(tmp_path)
    assert server.losses == []
    assert len(server.jobs) == 1
    assert the_table(server) == LOADED
    assert files(tmp_path) == FINISHED


def test_runs_at_the_same_time_share_one_job(tmp_path: Path, server: BigQuery) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: hand_over(tmp_path, run_id=f"export-{n}"), range(6)))
    assert all(facts == found[0] for facts in found)
    assert len(server.jobs) == 1
    assert the_table(server) == LOADED


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (503, "backendError"),
        (500, "internalError"),
        (429, "rateLimitExceeded"),
        (403, "rateLimitExceeded"),
        (408, "timeout"),
        (504, ""),
    ],
)
def test_what_passes_is_repeated(tmp_path: Path, server: BigQuery, status: int, reason: str) -> None:
    server.refusals = [(status, reason)] * 5
    hand_over(tmp_path)
    assert server.refusals == []
    assert len(server.jobs) == 1
    assert files(tmp_path) == FINISHED


def test_a_slow_job_is_waited_for(tmp_path: Path, server: BigQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    server.slow = 2
    hand_over(tmp_path)
    assert files(tmp_path) == FINISHED
    monkeypatch.setattr(bigquery, "_JOB_SECONDS", 0.05)
    server.slow = 1000
    with pytest.raises(InfraError, match=r"still runs after .* run again, which waits for the same job"):
        hand_over(tmp_path, version="v2", day=date(2024, 1, 11))
    server.slow = 0
    hand_over(tmp_path, version="v2", day=date(2024, 1, 11))
    assert len(server.jobs) == 2


def test_no_answer_until_the_deadline_is_our_error(
    tmp_path: Path, server: BigQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigquery, "_DEADLINE_SECONDS", 0.2)
    server.refusals = [(503, "backendError")] * 1000
    with pytest.raises(InfraError, match=r"shop-project\.mails\.audience_18_.*BigQuery failed.*run again"):
        hand_over(tmp_path)
    assert files(tmp_path) == {"audience.csv"}
    server.refusals = []
    hand_over(tmp_path)
    assert the_table(server) == LOADED


def test_a_refusal_names_dataset_and_roles_at_once(tmp_path: Path, server: BigQuery) -> None:
    server.refusals = [(403, "accessDenied")]
    with pytest.raises(InfraError) as caught:
        hand_over(tmp_path)
    assert "roles/bigquery.jobUser on project shop-project" in str(caught.value)
    assert "roles/bigquery.dataEditor on dataset shop-project.mails" in str(caught.value)
    assert len(server.requests) == 1
    assert files(tmp_path) == {"audience.csv"}


def test_a_missing_dataset_is_named_with_its_location(tmp_path: Path, server: BigQuery) -> None:
    server.datasets = ()
    with pytest.raises(DataError, match=r"create dataset shop-project\.mails in US, or correct export\.big"):
        hand_over(tmp_path)


@pytest.mark.parametrize(
    ("reason", "expected", "words"),
    [
        ("invalid", DataError, "nothing was loaded: compare the table's schema with the file"),
        ("backendError", InfraError, "nothing was loaded, run again"),
        ("quotaExceeded", InfraError, "nothing was loaded, run again"),
        ("accessDenied", InfraError, "roles/bigquery.dataEditor on dataset shop-project.mails"),
        ("notFound", DataError, "create dataset shop-project.mails"),
    ],
)
def test_a_job_that_ends_badly_says_why_and_the_next_run_takes_another(
    tmp_path: Path, server: BigQuery, reason: str, expected: type[CouponflowError], words: str
) -> None:
    server.job_errors = [{"reason": reason, "message": "row 7 is odd"}] * 2
    for attempt in range(2):
        with pytest.raises(expected) as caught:
            hand_over(tmp_path, run_id=f"export-{attempt}")
        for part in (f"{DATASET}.audience_18_v1_", f"ended with {reason} (row 7 is odd)", words):
            assert part in str(caught.value)
        assert files(tmp_path) == {"audience.csv"}
        assert server.tables == {}
    hand_over(tmp_path)
    assert [name.rpartition("_")[2] for name in server.jobs] == ["0", "1", "2"]
    assert the_table(server) == LOADED
    assert hand_over(tmp_path)["num_recipients"] == 2
    assert len(server.jobs) == 3


def test_another_number_of_rows_is_refused_until_the_table_is_dropped(
    tmp_path: Path, server: BigQuery
) -> None:
    server.num_lost_rows = 1
    for _ in range(2):  # the next run meets the same job
        with pytest.raises(DataError, match=r"loaded 2 rows, the file has 3; nobody may read .* drop it"):
            hand_over(tmp_path)
        server.num_lost_rows = 0
        assert files(tmp_path) == {"audience.csv"}
    server.tables.clear()
    hand_over(tmp_path)
    assert the_table(server) == LOADED


def test_a_dropped_table_is_loaded_again_before_the_manifest(tmp_path: Path, server: BigQuery) -> None:
    dies(tmp_path, "after_load")
    server.tables.clear()
    hand_over(tmp_path)
    assert the_table(server) == LOADED
    assert len(server.jobs) == 2


def test_a_table_of_a_forgotten_job_is_ours_and_another_list_is_not(tmp_path: Path, server: BigQuery) -> None:
    dies(tmp_path, "after_load")
    server.jobs.clear()
    hand_over(tmp_path)
    assert the_table(server) == LOADED
    fewer = replace(ROWS, rows=ROWS.rows[:1], num_withdrawn=2)
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(ConflictError, match="holds another list, which a run that died has left"):
        hand_over(tmp_path, fewer)
    assert the_table(server) == LOADED  # never overwritten
    server.tables.clear()
    assert hand_over(tmp_path, fewer)["num_recipients"] == 1


def dies(folder: Path, point: str) -> int:
    """A hand-over in a process of its own that is killed at a point; returns how it ended."""
    child = multiprocessing.get_context("fork").Process(target=_hand_over_with_fault, args=(folder, point))
    child.start()
    child.join(60)
    return int(child.exitcode or 0)


def _hand_over_with_fault(folder: Path, point: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, f"export_audience@{DAY}:{point}:kill")
        bigquery._client_for.cache_clear()  # a connection is not shared with the parent
        hand_over(folder, run_id="export-dies")


@pytest.mark.parametrize("point", faults.HANDOVER_POINTS)
def test_killed_between_any_two_steps_there_is_no_list_or_the_whole_one(
    tmp_path: Path, server: BigQuery, point: str
) -> None:
    """What a rerun leaves is byte for byte what an undisturbed run leaves."""
    assert dies(tmp_path / "killed", point) == -signal.SIGKILL
    expected = {"after_claim": set(), "after_manifest": FINISHED}.get(point, {"audience.csv"})
    assert files(tmp_path / "killed") == expected
    assert [table.rows for table in server.tables.values()] in ([], [LOADED])
    is_finished = export.finished(handover(tmp_path / "killed")) is not None
    assert is_finished == (point == "after_manifest")
    facts = hand_over(tmp_path / "killed", run_id="export-2")
    assert len(server.jobs) == 1
    assert the_table(server) == LOADED
    requests = len(server.requests)
    assert export.finished(handover(tmp_path / "killed")) == facts | {"already_exported": True}
    assert len(server.requests) == requests
    hand_over(tmp_path / "whole", run_id="export-3")
    found = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "out").rglob("*.*")}
        for name in ("killed", "whole")
    ]
    assert found[0] == found[1]


def test_a_finished_list_is_not_loaded_elsewhere(tmp_path: Path, server: BigQuery) -> None:
    plain = replace(handover(tmp_path), table="")
    export.hand_over(plain, ROWS, "select-1")
    with pytest.raises(
        ConflictError, match=r"and no table; loading it into shop-project\.mails\.audience_18"
    ):
        export.finished(handover(tmp_path))
    with pytest.raises(ConflictError, match="would mail its users again"):  # the claim says so as well
        hand_over(tmp_path)
    assert server.requests == []
    other = tmp_path / "other"
    hand_over(other)
    assert export.finished(replace(handover(other), table="")) is not None  # BigQuery switched off since


def test_addresses_never_leave(tmp_path: Path, server: BigQuery) -> None:
    for found in (
        export.Recipients([("kim@example.org", "18", "v1", None, 1)], 0),
        export.Recipients([("u1", "18", "v1", "kim@example.org", 1)], 0),
        replace(ROWS, seeds=("kim@example.org",)),
    ):
        with pytest.raises(DataError, match="an id holds '@'"):
            hand_over(tmp_path, found)
    with pytest.raises(DataError, match="an id holds '@'"):
        predictions.write_rows([prediction("kim@example.org")], io.BytesIO())
    assert server.requests == []
    assert not (tmp_path / "lake").exists()


def test_a_table_without_a_warehouse_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be reached from here"):
        export.hand_over(handover(tmp_path), ROWS, "select-1")
    assert files(tmp_path) == {"audience.csv"}


def prune(folder: Path, dry_run: bool = False) -> dict[str, int]:
    task = handover(folder)
    begun = export.claimed_tables(task.root_uri)
    return erasing.prune(
        task.target_uri, lambda user: user in ("u1", "seed-a"), "e", dry_run, bigquery, begun
    )


@pytest.mark.parametrize("dies_at", ["", "replace", "remove"])
def test_an_erasure_reaches_the_table(
    tmp_path: Path, server: BigQuery, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    first = hand_over(tmp_path)
    assert prune(tmp_path, dry_run=True) == {"list 18/v1": 2}
    assert the_table(server) == LOADED
    if dies_at:

        def dies(*arguments: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(storage, dies_at, dies)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path)
        monkeypatch.undo()
        monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", server.url)
    assert prune(tmp_path) == {"list 18/v1": 2}
    assert the_table(server) == [LOADED[1]]
    done = export.finished(handover(tmp_path))
    assert done is not None
    assert (done["num_recipients"], done["num_seeds"]) == (1, 0)
    (table,) = server.tables.values()
    assert done["sha256"] in table.description
    assert first["sha256"] not in table.description
    assert table.labels["sha256"] == done["sha256"][:63]
    assert prune(tmp_path) == {}
    assert len(server.jobs) == 2


def test_an_erasure_drops_the_table_of_a_run_that_died(tmp_path: Path, server: BigQuery) -> None:
    dies(tmp_path, "after_load")
    assert the_table(server) == LOADED
    prune(tmp_path, dry_run=True)
    assert the_table(server) == LOADED
    prune(tmp_path)
    assert (files(tmp_path), server.tables) == (set(), {})
    hand_over(tmp_path, replace(ROWS, rows=ROWS.rows[1:], seeds=()))
    assert the_table(server) == [LOADED[1]]


def test_an_erasure_leaves_a_dropped_table_dropped(tmp_path: Path, server: BigQuery) -> None:
    hand_over(tmp_path)
    server.tables.clear()
    prune(tmp_path)
    assert server.tables == {}
    assert len(server.jobs) == 1
    bigquery.drop_table(handover(tmp_path).table, "US")  # absent: no error
    server.refusals = [(403, "accessDenied")]
    with pytest.raises(InfraError, match="roles/bigquery"):
        bigquery.drop_table(handover(tmp_path).table, "US")


def prediction(user: str, probability: float = 0.125) -> tuple[Any, ...]:
    return ("18", DAY, user, "t1", "dien-1", 0.5, probability, user == "u2")


def load_day(rows: list[tuple[Any, ...]], scored_by: str = "score-1") -> None:
    with io.BytesIO() as file:
        digest, num_rows = predictions.write_rows(rows, file)
        manifest = {
            "table": bigquery.predictions_table(SECTION, "18"),
            "location": "US",
            "expiration_days": 7,
            "campaign_id": "18",
            "run_date": rows[0][1],
            "scored_by": scored_by,
            "sha256": digest,
            "num_rows": num_rows,
        }
        bigquery.load_predictions(file, manifest)


def test_predictions_replace_their_day_and_no_other(server: BigQuery) -> None:
    rows = [prediction("u1"), prediction("u2")]
    load_day(rows)
    load_day(rows)
    assert len(server.jobs) == 1
    other_day = [("18", date(2024, 1, 11), *row[2:]) for row in rows]
    load_day(other_day)
    table = server.tables["predictions_18"]
    assert table.partitions == {
        "20240110": [list(row) for row in rows],
        "20240111": [list(row) for row in other_day],
    }
    assert table.partitioning == {"type": "DAY", "field": "run_date", "expirationMs": str(7 * 86_400_000)}
    assert [(c["name"], c["type"], c["mode"]) for c in table.schema] == list(bigquery.PREDICTIONS)
    newer = [prediction("u1", 0.25)]
    load_day(newer, "score-2")
    assert table.partitions["20240110"] == [list(newer[0])]
    load_day(rows, "score-3")  # the first scores again: another load, not the job that is done
    assert table.partitions["20240110"] == [list(row) for row in rows]
    assert len(server.jobs) == 4
    given = ["timePartitioning" in job["configuration"]["load"] for job in server.jobs.values()]
    assert given == [True, False, False, False]  # a table keeps its own
    labels = [job["configuration"]["labels"]["scored_by"] for job in server.jobs.values()]
    assert labels == ["score-1", "score-1", "score-2", "score-3"]


def test_a_large_file_goes_up_in_one_resumable_upload(server: BigQuery) -> None:
    rows = [prediction(f"u{number:07d}{'x' * 100}") for number in range(40_000)]
    server.refusals = [(404, "notFound")] * 2 + [(503, "backendError")]
    load_day(rows)
    assert len(server.uploads) == 1
    assert len(server.tables["predictions_18"].partitions["20240110"]) == 40_000


def test_the_predictions_file_is_plain_csv() -> None:
    file = io.BytesIO()
    digest, num_rows = predictions.write_rows([prediction("u1"), prediction("u2", 0.1 + 0.2)], file)
    content = file.getvalue()
    assert content.decode().splitlines() == [
        ",".join(predictions.COLUMNS),
        "18,2024-01-10,u1,t1,dien-1,0.5,0.125,false",
        "18,2024-01-10,u2,t1,dien-1,0.5,0.30000000000000004,true",
    ]
    assert (digest, num_rows) == (storage.sha256(content), 2)
    with pytest.raises(DataError, match="run score first"):
        predictions.write_rows([], io.BytesIO())
    assert tuple(name for name, _, _ in bigquery.PREDICTIONS) == predictions.COLUMNS
    assert tuple(name for name, _, _ in bigquery.AUDIENCE) == export.COLUMNS


def test_what_is_still_loaded_is_named_until_it_expires(tmp_path: Path) -> None:
    for day, table in (("2024-01-01", "t"), ("2024-01-09", "t"), ("2024-01-10", ""), ("2024-01-09", "t")):
        record = runs.start("export_audience", f"{day}:{day}", {"campaign": "18"}, "f")
        record.facts = {"bigquery_predictions": table} if table else {}
        runs.finish(str(tmp_path), record, "ok")
    assert predictions.still_loaded(str(tmp_path), 7, DAY) == [("t", "18", "2024-01-09")]
    assert len(predictions.still_loaded(str(tmp_path), 9, DAY)) == 1
    assert len(predictions.still_loaded(str(tmp_path), 10, DAY)) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("export.bigquery_dataset=mails", "export.bigquery_dataset"),
        ("export.bigquery_dataset=shop-project.mails;drop", "export.bigquery_dataset"),
        ("export.bigquery_dataset=Shop-Project.mails", "export.bigquery_dataset"),
        ("export.bigquery_predictions=true", "bigquery_predictions needs bigquery_dataset"),
        ("export.bigquery_predictions_days=0", "export.bigquery_predictions_days"),
        ("export.seed_user_ids=['kim@example.org']", "export.seed_user_ids"),
        ("export.seed_user_ids=['a', 'a']", "names an account twice"),
    ],
)
def test_bad_values_are_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, (override,))
    assert words in str(caught.value)
    good = ("export.bigquery_dataset=shop-project.mails", "export.seed_user_ids=['seed-1', 'seed-2']")
    assert load_config(None, good).export.seed_user_ids == ("seed-1", "seed-2")
