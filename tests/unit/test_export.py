import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from couponflow.campaign import export
from couponflow.errors import ConfigError, ConflictError, DataError, InfraError
from couponflow.lake import faults, runs, storage

DAY = date(2024, 1, 10)
ROWS = export.Recipients([("u1", "18", "v1", None, 1), ('u,"2', "18", "v1", "c9", 3)], num_withdrawn=1)


def handover(folder: Path, version: str = "v1", run_id: str = "export-1", day: date = DAY) -> export.Handover:
    return export.Handover(str(folder / "lake"), str(folder / "out"), "18", version, day, run_id)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_list_is_plain_csv() -> None:
    assert export.render(ROWS.rows) == (
        b'user_id,campaign_id,version,coupon_id,rank,is_seed\nu1,18,v1,,1,false\n"u,""2",18,v1,c9,3,false\n'
    )


def test_list_then_manifest_and_a_second_hand_over_changes_nothing(tmp_path: Path) -> None:
    first = export.hand_over(handover(tmp_path), ROWS, "select-1")
    before = contents(tmp_path / "out")
    assert set(before) == {"18/v1/audience.csv", "18/v1/manifest.json"}
    manifest = json.loads(before["18/v1/manifest.json"])
    assert manifest == {
        "schema_version": 2,
        "campaign_id": "18",
        "version": "v1",
        "run_date": "2024-01-10",
        "run_id": "select-1",
        "file": "audience.csv",
        "columns": list(export.COLUMNS),
        "num_recipients": 2,
        "num_withdrawn": 1,
        "num_seeds": 0,
        "sha256": storage.sha256(before["18/v1/audience.csv"]),
    }
    again = export.finished(handover(tmp_path, run_id="export-2"))
    assert again == first | {"already_exported": True}
    # Two runs that both missed the manifest agree as well.
    assert export.hand_over(handover(tmp_path, run_id="export-3"), ROWS, "select-1") == first
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("point", faults.HANDOVER_POINTS)
@pytest.mark.parametrize("action", ["exc", "enospc"])
def test_a_crash_between_any_two_steps_is_no_list_or_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    """Whoever reads manifests sees nothing or all of it; the rerun leaves the same bytes."""
    whole = contents_after(tmp_path / "whole")
    monkeypatch.setenv(faults.VARIABLE, f"export_audience@{DAY}:{point}:{action}")
    folder = tmp_path / "crashed"
    with pytest.raises((InfraError, OSError), match=r"on purpose|No space"):
        export.hand_over(handover(folder), ROWS, "select-1")
    is_finished = export.finished(handover(folder)) is not None
    assert is_finished == (point == "after_manifest")
    assert set(contents(folder / "out")) <= set(whole)
    assert contents_after(folder) == whole
    assert contents_after(folder) == whole


def contents_after(folder: Path) -> dict[str, bytes]:
    export.hand_over(handover(folder, run_id="export-2"), ROWS, "select-1")
    assert export.finished(handover(folder)) is not None
    return contents(folder / "out")


@pytest.mark.parametrize("point", faults.HANDOVER_POINTS)
def test_another_version_after_a_crash_is_refused_whatever_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv(faults.VARIABLE, f"export_audience:{point}:exc")
    with pytest.raises(InfraError, match="on purpose"):
        export.hand_over(handover(tmp_path), ROWS, "select-1")
    with pytest.raises(ConflictError, match="version v1 is handed over to"):
        export.hand_over(handover(tmp_path, "v2"), ROWS, "select-2")
    assert not (tmp_path / "out" / "18" / "v2").exists()


def test_seeds_stand_at_the_end_and_are_counted_apart(tmp_path: Path) -> None:
    facts = export.hand_over(handover(tmp_path), replace(ROWS, seeds=["seed-a", "seed-b"]), "select-1")
    assert (facts["num_recipients"], facts["num_seeds"], facts["num_withdrawn"]) == (2, 2, 1)
    lines = Path(facts["file"]).read_text().splitlines()
    assert lines[-2:] == ["seed-a,18,v1,,,true", "seed-b,18,v1,,,true"]
    assert all(line.endswith(",false") for line in lines[1:-2])
    assert export.finished(handover(tmp_path)) == facts | {"already_exported": True}


@pytest.mark.parametrize("seeds", [["u1"], ["seed-a", "seed-a"]])
def test_a_seed_is_nobody_else_and_stands_once(tmp_path: Path, seeds: list[str]) -> None:
    with pytest.raises(DataError, match=r"correct export\.seed_user_ids"):
        export.hand_over(handover(tmp_path), replace(ROWS, seeds=seeds), "select-1")
    assert not (tmp_path / "lake").exists()


def test_a_list_of_older_code_is_still_finished(tmp_path: Path) -> None:
    export.hand_over(handover(tmp_path), ROWS, "select-1")
    path = tmp_path / "out" / "18" / "v1" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["num_seeds"]
    path.write_text(json.dumps(manifest))
    done = export.finished(handover(tmp_path))
    assert done is not None
    assert (done["num_seeds"], done["bigquery_table"]) == (0, "")


def test_a_changed_list_is_noticed(tmp_path: Path) -> None:
    export.hand_over(handover(tmp_path), ROWS, "select-1")
    path = tmp_path / "out" / "18" / "v1" / "audience.csv"
    path.write_bytes(path.read_bytes().replace(b"u1", b"u9"))
    with pytest.raises(DataError, match="another checksum"):
        export.finished(handover(tmp_path))


def test_other_content_under_the_same_version_is_a_conflict(tmp_path: Path) -> None:
    export.hand_over(handover(tmp_path), ROWS, "select-1")
    with pytest.raises(ConflictError, match="other content"):
        export.hand_over(handover(tmp_path), export.Recipients(ROWS.rows[:1], 2), "select-1")


def test_a_list_begun_under_other_consent_waits_for_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = storage.create

    def dies_before_manifest(uri: str, content: bytes, run_id: str) -> None:
        if uri.endswith("manifest.json"):
            raise OSError("killed")
        create(uri, content, run_id)

    monkeypatch.setattr(storage, "create", dies_before_manifest)
    with pytest.raises(OSError, match="killed"):
        export.hand_over(handover(tmp_path), ROWS, "select-1")
    monkeypatch.undo()
    fewer = export.Recipients(ROWS.rows[:1], 2)
    with pytest.raises(ConflictError, match=r"audience\.csv was begun .* remove the file"):
        export.hand_over(handover(tmp_path, run_id="export-2"), fewer, "select-1")
    assert export.finished(handover(tmp_path)) is None
    (tmp_path / "out" / "18" / "v1" / "audience.csv").unlink()
    assert export.hand_over(handover(tmp_path, run_id="export-3"), fewer, "select-1")["num_recipients"] == 1


def test_one_version_and_one_place_per_run_date(tmp_path: Path) -> None:
    """Even two exporters that passed every check at the same moment hand one list over."""
    export.hand_over(handover(tmp_path), ROWS, "select-1")
    with pytest.raises(ConflictError, match="version v1 is handed over to"):
        export.hand_over(handover(tmp_path, "v2"), ROWS, "select-2")
    elsewhere = replace(handover(tmp_path), target_uri=str(tmp_path / "elsewhere"))
    with pytest.raises(ConflictError, match="would mail its users again"):
        export.hand_over(elsewhere, ROWS, "select-1")
    assert set(contents(tmp_path / "out")) == {"18/v1/audience.csv", "18/v1/manifest.json"}
    assert not (tmp_path / "elsewhere").exists()
    export.hand_over(handover(tmp_path, "v2", day=date(2024, 1, 11)), ROWS, "select-2")


@pytest.mark.parametrize("text", ["{", "[]", '{"file": "audience.csv"}'])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    export.hand_over(handover(tmp_path), ROWS, "select-1")
    (tmp_path / "out" / "18" / "v1" / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"v1/manifest\.json"):
        export.finished(handover(tmp_path))


def test_a_second_version_of_the_same_run_date_is_refused(tmp_path: Path) -> None:
    export.hand_over(handover(tmp_path), ROWS, "select-1")
    export.check_only_version(handover(tmp_path))
    export.check_only_version(handover(tmp_path, "v2", day=date(2024, 1, 11)))
    with pytest.raises(ConflictError, match="v1 was handed over already"):
        export.check_only_version(handover(tmp_path, "v2"))


def select(root: str, version: str, number: int = 0, campaign: str = "18", status: str = "ok") -> None:
    record = runs.start("select_audience", "2024-01-10:2024-01-10", {"campaign": campaign}, "f")
    record.started_time = f"2024-01-10T00:00:0{number}+00:00"
    record.facts = {"campaign_id": campaign, "version": version, "mailed_users": 2}
    runs.finish(root, record, status)


def test_approval_and_recall(tmp_path: Path) -> None:
    task = handover(tmp_path)
    export.check_approval(task, auto_approve=True)
    with pytest.raises(ConfigError, match="couponflow campaign approve --campaign 18 --version v1"):
        export.check_approval(task, auto_approve=False)
    assert not export.is_final(task)
    with pytest.raises(DataError, match="no selection has decided version v1"):
        export.approve(task.root_uri, "18", "v1", "kim")
    select(task.root_uri, "v1")
    export.approve(task.root_uri, "18", "v1", "kim")
    export.approve(task.root_uri, "18", "v1", "lee")
    note = json.loads(storage.read_bytes(task.note("approvals")))
    assert (note["approved_by"], note["mailed_users"]) == ("kim", 2)
    export.check_approval(task, auto_approve=False)
    assert export.is_final(task)
    export.recall(task.root_uri, "18", "v1", "lee", "wrong coupon")
    with pytest.raises(ConfigError, match="recalled"):
        export.check_approval(task, auto_approve=True)


def test_an_empty_list_is_a_list(tmp_path: Path) -> None:
    assert export.hand_over(handover(tmp_path), export.Recipients([], 0), "s")["num_recipients"] == 0
    done = export.finished(handover(tmp_path))
    assert done is not None
    assert done["num_recipients"] == 0


def test_the_newest_successful_selection_names_the_version(tmp_path: Path) -> None:
    root = str(tmp_path)
    with pytest.raises(DataError, match="run select_audience first"):
        export.decided_version(root, "18", "2024-01-10:2024-01-10")
    for number, (campaign, status) in enumerate([("18", "ok"), ("18", "ok"), ("19", "ok"), ("18", "failed")]):
        select(root, f"v{number}", number, campaign, status)
    assert export.decided_version(root, "18", "2024-01-10:2024-01-10") == "v1"
