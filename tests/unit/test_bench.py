"""What the benchmarks store: bounds have a direction, claims are found by file and by name. No JVM."""

import json
import sys
from pathlib import Path

import pytest

from bench import peers, run
from bench.run import Claim

NAMES = {
    "history_vs_naive_spark",
    "history_fast_vs_naive_spark",
    "history_vs_spark_floor",
    "history_fast_vs_spark_floor",
    "history_scaling",
    "history_1g",
    "skew_50k_user",
    "skew_1m_user",
    "selection_scaling",
    "selection_scaling_growth",
    "one_day_vs_full",
    "feed_vs_pyarrow",
    "raw_to_examples",
    "gs_overhead",
    "submit_latency",
    "augru_vs_gru",
    "memory",
    "scaling_2_ranks",
    "feed_bound",
    *(
        f"dien_{mode}_vs_{peer}_{shape}"
        for mode in ("train", "infer")
        for peer in ("deepctr", "best_peer")
        for shape in ("padded", "ragged")
    ),
}


def test_a_bound_is_reached_or_stayed_within() -> None:
    at_least = [Claim("a", value, "x", 2.0, 3, "r").holds for value in (1.9, 2.0, 2.1)]
    at_most = [Claim("a", value, "x", 2.0, 3, "r", "at_most").holds for value in (1.9, 2.0, 2.1)]
    assert (at_least, at_most) == ([False, True, True], [True, True, False])
    assert Claim("a", 0.0, "s", None, 1, "r").holds


def test_claims_are_chosen_by_file_or_by_name() -> None:
    assert set().union(*run.chosen([]).values()) >= NAMES
    assert run.chosen(["history_scaling", "feed"]) == {
        "feed": ("feed_vs_pyarrow",),
        "histories": ("history_scaling",),
    }
    with pytest.raises(SystemExit, match="'histery' is neither a benchmark nor a claim"):
        run.chosen(["histery"])


def test_measured_claims_replace_their_lines_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    run.store(
        [Claim("history_1g", 0.0, "passes", 1.0, 1, "r"), Claim("skew_50k_user", 3.0, "s", 10.0, 3, "r")]
    )
    run.store([Claim("history_1g", 1.0, "passes", 1.0, 1, "r"), Claim("of old code", 1.0, "x", None, 1, "r")])
    run.store([])
    lines = json.loads((tmp_path / "results.json").read_text())
    assert [(line["name"], line["value"]) for line in lines] == [("history_1g", 1.0), ("skew_50k_user", 3.0)]
    fields = "name value unit bound holds runs rival machine commit"
    assert set(lines[0]) == set(fields.split())


def test_a_benchmark_that_fails_leaves_the_others_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(module: str, names: tuple[str, ...]) -> list[Claim]:
        if module == "feed":
            raise RuntimeError("no room")
        return [Claim(name, 2.0, "x", 1.0, 1, "r") for name in names]

    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(run, "measured", measured)
    assert run.main(["feed", "one_day"]) == 1
    assert [line["name"] for line in json.loads((tmp_path / "results.json").read_text())] == [
        "one_day_vs_full"
    ]
    assert "nothing is said of them: feed" in capsys.readouterr().out
    assert run.main(["one_day"]) == 0


def test_the_error_of_a_benchmark_comes_out_of_its_process() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_benchmark"):
        run.measured("no_such_benchmark", ())
    assert "bench.no_such_benchmark" not in sys.modules


def test_ratios_are_medians_over_rounds() -> None:
    rounds = [{"a": 4.0, "b": 2.0}, {"a": 9.0, "b": 3.0}, {"a": 1.0, "b": 1.0}]
    assert run.median_ratio(rounds, "a", "b") == 2.0


def test_peer_claims_come_from_the_rounds_of_their_cell() -> None:
    names = ("dien_train_vs_best_peer_ragged", "dien_train_vs_deepctr_ragged", "dien_infer_vs_deepctr_padded")
    assert peers.cells(names) == ["train_ragged", "infer_padded"]
    rounds = [
        {"couponflow": 1.0, "deepctr-torch": 6.0, "torch-rechub": 3.0, "fuxictr": 2.0},
        {"couponflow": 2.0, "deepctr-torch": 8.0, "torch-rechub": 4.0, "fuxictr": 2.0},
        {"couponflow": 1.0, "deepctr-torch": 5.0, "torch-rechub": 3.0, "fuxictr": 2.0},
    ]
    best, reference = sorted(peers.claims_of("train_ragged", rounds, names), key=lambda claim: claim.name)
    assert (best.value, reference.value) == (3.0, 5.0)  # fuxictr trains without the auxiliary loss
    assert best.rival.startswith("torch-rechub, 341 rows/s against 1,024")
    scored = peers.claims_of("infer_padded", rounds, ("dien_infer_vs_best_peer_padded",))
    assert [(claim.value, claim.bound) for claim in scored] == [(2.0, 1.4)]
    assert set(peers.BOUNDS) == set(peers.CLAIMS)
