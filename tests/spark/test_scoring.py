"""The Spark score equals the direct one, the bundle is loaded once per worker, bad scores are held back."""

import io
import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import D0, make_frame, make_row
from packed_users import CAMPAIGNS, NUM_WIDE, Packed, packed_users
from pyspark.sql import DataFrame, SparkSession

from couponflow.campaign import publication, scoring
from couponflow.campaign.scores import gates, shipping
from couponflow.campaigning import ScoringConfig
from couponflow.errors import ConfigError, DataError, InfraError
from couponflow.lake import faults, literals, schemas, storage, tables
from couponflow.modelling import ModelConfig
from couponflow.models import tabular
from couponflow.models.batch import RANDOM_SIZES, decode
from couponflow.models.bundle import Bundle, save_bundle
from couponflow.models.calibration import Calibrator
from couponflow.models.dien import Dien

SECTION = ScoringConfig(arrow_batch_rows=16, chunk_rows=7)


def examples_frame(spark: SparkSession, users: list[Packed], vocabulary: str = "v1") -> DataFrame:
    over = {"vocabulary_version": vocabulary, "as_of_date": D0}
    return make_frame(spark, "scoring_examples", [make_row("scoring_examples", **u, **over) for u in users])


def direct(bundle: Bundle, users: list[Packed], campaign: str) -> dict[str, tuple[float, float]]:
    """One user at a time, without Spark, Arrow or chunks."""
    place, found = CAMPAIGNS.index(campaign), {}
    for user in users:
        first = 12 * sum(user["target_sizes"][:place])
        target = user["targets"][first : first + 12 * user["target_sizes"][place]]
        wide = user["wide"][4 * NUM_WIDE * place : 4 * NUM_WIDE * (place + 1)]
        logit = bundle.logits(decode([user["history"]], [target], [wide]))
        found[user["user_id"]] = (
            float(torch.sigmoid(torch.tensor(logit[0]))),
            float(bundle.probabilities(logit, tabular.campaign_types(np.frombuffer(wide, "<f4")[None]))[0]),
        )
    return found


def scores_in_order(bundle: Bundle, users: list[Packed]) -> tuple[float, ...]:
    """The users' scores, by id, as one batch of this order."""
    (rows,) = pa.Table.from_pylist(users).to_batches()
    found = scoring.score_rows(bundle, rows, ["18"], D0).to_pylist()
    return tuple(row["score"] for row in sorted(found, key=lambda row: str(row["user_id"])))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    network = Dien(ModelConfig(hidden_dim=8), dict(RANDOM_SIZES), NUM_WIDE)
    with torch.no_grad():  # an untrained head is nearly constant; spread it
        for parameter in network.parameters():
            parameter.mul_(1.5)
    shifts = {"type_a": -0.7, "type_c": 0.4}
    calibrator = Calibrator("platt", slope=0.8, intercept=-1.0, shifts=shifts)
    return Bundle(network.eval(), "v1", dict(RANDOM_SIZES), calibrator=calibrator)


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle") / "model"
    save_bundle(bundle, place)
    return place


def request(tmp_path: Path, **over: Any) -> publication.Request:
    return publication.Request(
        str(tmp_path / "lake"), "18", D0, "0", SECTION.model_copy(update=over), ("18",)
    )


def master_of(spark: SparkSession, users: list[Packed]) -> DataFrame:
    return literals.frame(spark, [(user["user_id"],) for user in users], "user_id string")


def test_spark_scores_equal_direct_scores(
    spark: SparkSession, bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    users = packed_users(150)
    expected = direct(bundle, users, "18")
    assert expected != direct(bundle, users, "17")
    master, total_loads = master_of(spark, users), 0
    for partitions, part_users in ((1, 1000), (5, 60)):
        examples = examples_frame(spark, users).repartition(partitions)
        asked = request(tmp_path, part_users=part_users)
        with publication.scored(asked, examples, master, None, folder) as (predictions, facts):
            assert facts["num_parts"] == (1 if part_users > 150 else 3)
            rows = {row.user_id: row for row in predictions.collect()}
            assert predictions.count() == len(rows)
        assert set(rows) == set(expected)
        for user, (score, probability) in expected.items():
            assert rows[user].score == pytest.approx(score, abs=1e-6)
            assert rows[user].conversion_probability == pytest.approx(probability, abs=1e-6)
        cold = {u["user_id"] for u in users if u["length"] == 0}
        assert {user for user, row in rows.items() if row.is_cold_start} == cold != set()
        assert (facts["num_users"], facts["cold_start_users"]) == (150, len(cold))
        assert facts["mean_probability"] == pytest.approx(np.mean([p for _, p in expected.values()]))
        assert (facts["model_version"], facts["kind"]) == (bundle.model_version, "dien")
        assert {(r.campaign_id, r.target_id, r.run_date) for r in rows.values()} == {("18", "18", D0)}
        total_loads += facts["bundle_loads"]
        assert not list((tmp_path / "lake").rglob("*.parquet"))  # published: the parts are gone
    assert total_loads >= 1


def test_the_same_users_get_the_same_bits_however_they_are_stored(
    spark: SparkSession, bundle: Bundle, folder: Path
) -> None:
    """Rows beside a user change his last bits: the orders tried are those that do so on this processor."""
    users = packed_users(40)
    orders = {scores_in_order(bundle, users): users}
    for seed in range(300):
        shuffled = random.Random(seed).sample(users, len(users))
        orders.setdefault(scores_in_order(bundle, shuffled), shuffled)
    tried = list(orders.values())[:4]
    tried += [users[::-1]] * (len(tried) == 1)
    shipped, hashes = shipping.ship_bundle(spark, folder), set()
    for order in tried:
        rows = examples_frame(spark, order).coalesce(1)
        scored = scoring.score_users(rows, shipped, ["18"], D0, 512, 1)
        hashes.add(tables.content_hash(scored.select("user_id", "score")))
    assert len(hashes) == 1


def test_other_targets_of_a_campaign_are_scored_for_all_or_refused(
    spark: SparkSession, bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    users = packed_users(60)
    master, examples = master_of(spark, users), examples_frame(spark, users)
    asked = replace(request(tmp_path), target_ids=("18", "17"))
    with publication.scored(asked, examples, master, None, folder) as (predictions, facts):
        rows = predictions.collect()
    assert {row.campaign_id for row in rows} == {"18"}
    for target in ("18", "17"):
        expected = direct(bundle, users, target)
        found = {row.user_id: row.conversion_probability for row in rows if row.target_id == target}
        assert found == pytest.approx({user: p for user, (_, p) in expected.items()}, abs=1e-6)
    assert (facts["num_scores"], facts["target_ids"]) == (120, ["18", "17"])
    assert facts["mean_probability"] == pytest.approx(
        np.mean([probability for _, probability in direct(bundle, users, "18").values()])
    )
    unknown = replace(asked, target_ids=("18", "99"))
    with (
        pytest.raises(
            DataError, match=r"target 99 of campaign 18: .*60 users.*build_examples needs --campaign 18,99"
        ),
        publication.scored(unknown, examples, master, None, folder),
    ):
        raise AssertionError("nothing may be lent")


def test_a_worker_process_loads_the_bundle_once(spark: SparkSession, folder: Path) -> None:
    """Every batch of a process, in whatever task, gets the very same object."""
    archive = shipping.pack_folder(folder)
    path = folder.parent / "bundle.tar"
    path.write_bytes(archive)
    digest = storage.sha256(archive)

    def probe(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            found = id(shipping.open_bundle(path, digest))
            yield pa.RecordBatch.from_pydict({"pid": [os.getpid()], "bundle": [found]})

    rows = spark.range(40).repartition(20).mapInArrow(probe, "pid long, bundle long").collect()
    assert len(rows) == 20
    assert len({(row.pid, row.bundle) for row in rows}) == len({row.pid for row in rows})


def test_rows_are_independent_of_batch_and_chunk(bundle: Bundle) -> None:
    users = packed_users(40)
    rows = pa.RecordBatch.from_pylist(users)
    whole = scoring.score_rows(bundle, rows, ["18"], D0, 512)
    assert whole.column("user_id").to_pylist() == [u["user_id"] for u in users]
    assert whole.schema.names == list(schemas.TABLES["predictions"].column_names)
    for chunk_rows, size in ((1, 40), (7, 40), (512, 1), (5, 13)):
        parts = [
            scoring.score_rows(bundle, rows.slice(start, size), ["18"], D0, chunk_rows)
            for start in range(0, 40, size)
        ]
        joined = pa.Table.from_batches(parts)
        for name in ("score", "conversion_probability"):
            # float32 sums of another shape of batch
            np.testing.assert_allclose(joined.column(name), whole.column(name), atol=1e-6, rtol=0)
    assert scoring.score_rows(bundle, rows, ["99"], D0).num_rows == 0
    assert scoring.score_rows(bundle, rows.slice(0, 0), ["18"], D0).num_rows == 0


def test_many_campaigns_score_as_each_alone(bundle: Bundle) -> None:
    """Users in their order, campaigns as given, a target that a user does not have left out."""
    users = packed_users(30)
    for user in users[::3]:
        user["target_ids"] = ["17", "19"]
    found = scoring.score_rows(
        bundle, pa.RecordBatch.from_pylist(users), ["18", "99", "17"], D0, 7
    ).to_pylist()
    expected = {name: direct(bundle, users, name) for name in CAMPAIGNS}
    pairs = [(u["user_id"], name) for u in users for name in ("18", "17") if name in u["target_ids"]]
    assert [(row["user_id"], row["campaign_id"]) for row in found] == pairs
    for row in found:
        score, probability = expected[row["campaign_id"]][row["user_id"]]
        assert row["score"] == pytest.approx(score, abs=1e-6)
        assert row["conversion_probability"] == pytest.approx(probability, abs=1e-6)


def test_a_bundle_is_checked_and_kept(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    content = shipping.pack_folder(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert shipping.pack_folder(copy) == content
    archive = tmp_path / "bundle.tar"
    archive.write_bytes(content)
    digest = storage.sha256(content)
    threads = torch.get_num_threads()
    try:
        opened = shipping.open_bundle(archive, digest)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert opened.model_version == bundle.model_version
    archive.write_bytes(b"gone")
    assert shipping.open_bundle(archive, digest) is opened
    with pytest.raises(ConfigError, match="differs from what the driver has sent"):
        shipping.open_bundle(archive, "0" * 64)


def test_an_archive_gives_back_its_files_and_nothing_outside(tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "place"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "one.bin").write_bytes(b"1")
    (source / "two.json").write_bytes(b"{}")
    place.mkdir()
    shipping.unpack(shipping.pack_folder(source), place)
    assert {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()} == {
        "deep/one.bin": b"1",
        "two.json": b"{}",
    }
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for member in (tarfile.TarInfo("../out"), tarfile.TarInfo(str(tmp_path / "out")), link):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(member, io.BytesIO(b""))
        with pytest.raises(ConfigError, match="is no file of a bundle"):
            shipping.unpack(stream.getvalue(), place)
    assert not (tmp_path / "out").exists()


def test_the_udf_gives_the_scores_of_the_job(spark: SparkSession, bundle: Bundle, folder: Path) -> None:
    """In any DataFrame, whatever its partitions."""
    users = packed_users(40)
    expected = direct(bundle, users, "17")
    rows = [
        (u["user_id"], u["history"], u["targets"][: 12 * u["target_sizes"][0]], u["wide"][: 4 * NUM_WIDE])
        for u in users
    ]
    frame = literals.frame(spark, rows, "user_id string, history binary, target binary, wide binary")
    made = scoring.score_udf(shipping.ship_bundle(spark, folder))
    scores = frame.repartition(3).select("user_id", made("history", "target", "wide").alias("made"))
    found = {row.user_id: row.made for row in scores.collect()}
    assert set(found) == set(expected)
    for user, (score, probability) in expected.items():
        assert found[user].score == pytest.approx(score, abs=1e-6)
        assert found[user].conversion_probability == pytest.approx(probability, abs=1e-6)


def test_a_run_that_died_goes_on_with_what_is_finished(
    spark: SparkSession, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three parts are written; the rerun computes the last one, and gives what one run gives."""
    users = packed_users(50)
    examples, master = examples_frame(spark, users), master_of(spark, users)
    asked = request(tmp_path, part_users=20)
    monkeypatch.setenv(faults.VARIABLE, "score@1:part:exc")
    with (
        pytest.raises(InfraError, match="on purpose"),
        publication.scored(asked, examples, master, None, folder),
    ):
        raise AssertionError("nothing is lent")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "lake").rglob("*.parquet")}
    assert {path.parent.name for path in kept} == {"part-00000", "part-00001"}
    with publication.scored(asked, examples, master, None, folder) as (predictions, facts):
        now = {path: path.stat().st_mtime_ns for path in (tmp_path / "lake").rglob("*.parquet")}
        assert now.items() > kept.items()
        assert facts["num_users"] == 50
        resumed = tables.content_hash(predictions)
    monkeypatch.delenv(faults.VARIABLE)
    assert not list((tmp_path / "lake").rglob("*.parquet"))
    undisturbed = request(tmp_path / "other", part_users=20)
    with publication.scored(undisturbed, examples, master, None, folder) as (predictions, _):
        assert resumed == tables.content_hash(predictions)


def test_parts_that_nobody_will_finish_go_with_the_next_run_of_the_day(
    spark: SparkSession, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples changed between a run that died and the next; another day's parts stay."""
    users = packed_users(20)
    examples, master = examples_frame(spark, users), master_of(spark, users)
    day_after = D0 + timedelta(1)
    for day in (D0, day_after):
        monkeypatch.setenv(faults.VARIABLE, "score:part:exc")
        for marker in (tmp_path / "lake").glob(".fault-*"):
            marker.unlink()
        asked = replace(request(tmp_path), run_date=day)
        with (
            pytest.raises(InfraError, match="on purpose"),
            publication.scored(asked, examples, master, None, folder),
        ):
            raise AssertionError("nothing is lent")
    monkeypatch.delenv(faults.VARIABLE)
    newer = replace(request(tmp_path), data_version="1")
    with publication.scored(newer, examples, master, None, folder):
        pass
    left = {path.parents[2].name for path in (tmp_path / "lake").rglob("_SUCCESS")}
    assert left == {f"18_{day_after}"}


def test_other_vocabulary_or_malformed_examples_stop(
    spark: SparkSession, folder: Path, tmp_path: Path
) -> None:
    users = packed_users(6)
    master = master_of(spark, users)

    def attempt(examples: DataFrame, task_users: int = 16) -> None:
        asked = request(tmp_path, arrow_batch_rows=task_users)
        with publication.scored(asked, examples, master, None, folder):
            raise AssertionError("the gates are open")

    with pytest.raises(ConfigError, match="expects vocabulary v1, table scoring_examples has v2"):
        attempt(examples_frame(spark, users, "v2"))
    with pytest.raises(DataError, match="run build_examples"):
        attempt(examples_frame(spark, []))
    broken = [*users[:-1], users[-1] | {"length": users[-1]["length"] + 1}]
    for task_users in (16, 1):  # alone in a task, a row is met before the task's first write
        with pytest.raises(DataError, match="length and history disagree"):
            attempt(examples_frame(spark, broken), task_users)
    other = [*users[:-1], users[-1] | {"target_ids": ["17", "19"]}]
    with pytest.raises(DataError, match="1 users of the master without a score"):
        attempt(examples_frame(spark, other))
    assert not list((tmp_path / "lake").rglob("_SUCCESS"))  # no part stays: scored again it would be the same


def test_gates_before_publishing(spark: SparkSession) -> None:
    master = literals.frame(spark, [(f"u{n}",) for n in range(3)], "user_id string").coalesce(1)
    good = {"u0": 0.1, "u1": 0.2, "u2": 0.0}

    def check(rows: list[tuple[str, float | None]]) -> dict[str, Any]:
        made = [
            make_row(
                "predictions", user_id=u, score=0.5, conversion_probability=p, run_date=D0 + timedelta(1)
            )
            for u, p in rows
        ]
        return gates.check_predictions(make_frame(spark, "predictions", made).coalesce(1), master)

    assert check([*good.items()])["num_users"] == 3
    bad: dict[str, list[tuple[str, float | None]]] = {
        "1 users of the master without a score": [("u0", 0.1), ("u1", 0.2)],
        "1 scored users who are not in the master": [*good.items(), ("u9", 0.3)],
        "1 users with several scores": [*good.items(), ("u1", 0.2)],
        "2 scores that are null, NaN or outside": [("u0", None), ("u1", float("nan")), ("u2", 0.2)],
        "1 scores that are null, NaN or outside": [("u0", 1.0000001), ("u1", 1.0), ("u2", 0.2)],
        "the model is constant": [("u0", 0.2), ("u1", 0.2), ("u2", 0.2)],
    }
    for message, rows in bad.items():
        with pytest.raises(DataError, match=message):
            check(rows)


def test_gates_against_the_scores_before(spark: SparkSession) -> None:
    """Base rate, number of users and distribution; the slow index is numpy's."""
    draw = np.random.default_rng(0)
    usual, shifted = draw.beta(2, 20, 400), draw.beta(4, 20, 400)

    def frame(values: np.ndarray) -> DataFrame:
        rows = [(f"u{n}", float(value)) for n, value in enumerate(values)]
        return literals.frame(spark, rows, "user_id string, conversion_probability double").coalesce(1)

    def slow(before: np.ndarray, after: np.ndarray) -> float:
        places = [n / 10 for n in range(1, 10)]
        edges = frame(before).approxQuantile("conversion_probability", places, 0.001)
        a, b = (
            np.maximum(np.bincount(np.searchsorted(edges, part), minlength=10) / len(part), 1e-4)
            for part in (before, after)
        )
        return float(((b - a) * np.log(b / a)).sum())

    before, mean = frame(usual), float(usual.mean())
    fine = gates.check_drift(frame(draw.beta(2, 20, 390)), before, mean, SECTION)
    assert fine["previous_users"] == 400
    assert fine["psi"] < 0.1
    assert fine["mean_ratio"] == pytest.approx(1.0, abs=0.1)
    assert gates.stability_index(before, before) == 0.0
    assert gates.stability_index(before, frame(shifted)) == pytest.approx(slow(usual, shifted))
    assert gates.check_drift(before, None, None, SECTION) == {
        "mean_ratio": None,
        "psi": None,
        "previous_users": None,
    }
    closed = {
        "population stability index": (frame(shifted), before, None),
        "300 users, 400 the last time": (frame(usual[:300]), before, None),
        "is 5.00 times the rate": (before, None, mean / 5),
        "is 0.20 times the rate": (before, None, mean * 5),
    }
    for message, given in closed.items():
        with pytest.raises(DataError, match=message):
            gates.check_drift(*given, SECTION)
