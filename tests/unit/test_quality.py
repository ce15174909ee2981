"""The harness of the verdicts: what counts as passed, what a row may show, origins in time.

Worlds are tiny and networks see them once or twice: nothing here says how good a model is.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.quality import __main__ as main
from bench.quality import rolling, rungs, samples, synthetic, tables, verdicts
from bench.quality.samples import COUNTS, Sample, Samples
from bench.quality.synthetic import Plan
from bench.quality.verdicts import Bench, Difference, Found
from couponflow.config import Config
from couponflow.lake import layouts
from couponflow.models.layers import GAP_EDGES_DAYS
from couponflow.sources.synthetic import draw_shard
from couponflow.sources.synthetic_world import CAMPAIGN_DAYS, ITEMS_PER_CATEGORY, draw_world
from couponflow.training import metrics
from couponflow.training.feed import Example

DAY = 24 * 60
TINY = (
    "source.num_users=150",
    "examples.history_length=12",
    "training.max_epochs=1",
    "model.category_dim=4",
    "model.hidden_dim=4",
    "model.attention_dims=[4]",
    "model.auxiliary_dims=[4]",
    "model.head_dims=[4]",
    "training.batch_size=512",
)
#: Few training days besides: every experiment in seconds.
SHORT = (*TINY, "source.num_users=80", "examples.train_start='2024-02-24'")


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rungs, "_TREES", rungs._TREES.model_copy(update={"max_trees": 5}))


@pytest.fixture(scope="module")
def config() -> Config:
    return Plan(1, TINY).config("order")


@pytest.fixture(scope="module")
def drawn(config: Config) -> Samples:
    return samples.draw(config)


# ------------------------------------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize(
    ("difference", "holds"),
    [
        (Difference(0.02, 0.01, 0.03), True),
        (Difference(0.019, 0.01, 0.03), False),
        (Difference(0.02, 0.0, 0.04), False),
        (Difference(-0.2, -0.3, -0.1), False),
    ],
)
def test_a_difference_has_to_reach_its_bound_and_to_be_above_zero(
    difference: Difference, holds: bool
) -> None:
    assert verdicts.exceeds("n", difference, 0.02, 3, "r").holds is holds


@pytest.mark.parametrize(
    ("difference", "holds"),
    [
        (Difference(0.01, 0.005, 0.015), True),
        (Difference(-0.01, -0.015, -0.005), True),
        (Difference(0.011, 0.005, 0.015), False),
        (Difference(0.03, -0.01, 0.07), True),
        (Difference(-0.03, -0.04, -0.02), False),
    ],
)
def test_nothing_is_a_small_difference_or_one_that_holds_zero(difference: Difference, holds: bool) -> None:
    assert verdicts.is_nothing("n", difference, 0.01, 1, "r").holds is holds


def test_no_gain_looks_at_one_side_only() -> None:
    found = [
        verdicts.is_no_gain("n", Difference(value, value, value), 0.01, 1, "r").holds
        for value in (-0.5, 0.01, 0.011)
    ]
    assert found == [True, True, False]


def test_a_share_of_the_gap_needs_both_conditions() -> None:
    assert verdicts.gap_share(0.6, 0.7, 0.8) == pytest.approx(0.5)
    sure, unsure = Difference(0.06, 0.01, 0.1), Difference(0.06, -0.01, 0.1)
    held = [
        verdicts.closes_gap("n", share, difference, 0.3, 1, "r").holds
        for share, difference in ((0.3, sure), (0.29, sure), (0.3, unsure))
    ]
    assert held == [True, False, False]


def test_one_model_above_is_enough_to_break_the_control() -> None:
    below, unsure = Difference(-0.1, -0.2, -0.01), Difference(0.1, -0.01, 0.2)
    above = Difference(0.01, 0.001, 0.02)
    verdict = verdicts.none_above("n", {"a": below, "b": unsure}, "r")
    assert (verdict.holds, verdict.value, verdict.interval) == (True, 0.1, (-0.01, 0.2))
    assert not verdicts.none_above("n", {"a": below, "b": unsure, "c": above}, "r").holds


def test_figures_have_a_direction() -> None:
    assert [verdicts.at_least("n", v, "u", 3.5, "r").holds for v in (3.4, 3.5)] == [False, True]
    assert [verdicts.at_most("n", v, "u", 0.02, "r").holds for v in (0.02, 0.03)] == [True, False]


def test_seeds_are_averaged_as_differences_and_users_are_drawn() -> None:
    generator = np.random.default_rng(0)
    label, user = generator.integers(0, 2, 400).astype(float), np.repeat(np.arange(40), 10)
    ours = [label + generator.normal(size=400) for _ in range(2)]
    rival = [label + 3.0 * generator.normal(size=400) for _ in range(3)]
    bench = Bench(label, user, num_draws=200)
    found = bench.difference(ours, rival)
    expected = np.mean([metrics.auc(s, label) for s in ours]) - np.mean(
        [metrics.auc(s, label) for s in rival]
    )
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high
    same = bench.difference(ours, ours)
    assert (same.value, same.low, same.high, same.holds_zero) == (0.0, 0.0, 0.0, True)
    alone = Bench(label, np.zeros(400), num_draws=20).interval_of(ours[0])  # one user: every draw is the same
    assert alone.low == pytest.approx(alone.value)
    assert alone.high == pytest.approx(alone.value)


# --------------------------------------------------------------------------------------------------- the rows
def _history(row: Example) -> np.ndarray:
    return np.frombuffer(row.history, "<i4").reshape(-1, 5)


def _negatives(row: Example) -> np.ndarray:
    return np.frombuffer(row.negatives, "<i4").reshape(-1, 2)


def _parts(drawn: Samples) -> tuple[Sample, ...]:
    return drawn.train, drawn.valid, drawn.test


def test_a_row_shows_what_its_user_did_by_himself_before_that_midnight(
    config: Config, drawn: Samples
) -> None:
    world = draw_world(config)
    past: dict[int, list[tuple[int, int, int, int]]] = {}
    for shard in range(2):
        happened = draw_shard(world, shard).happened
        columns = (happened[name].tolist() for name in ("owner", "time", "ingest", "item", "type", "order"))
        for owner, time, ingest, item, kind, order in zip(*columns, strict=True):
            if not 1_000_000 <= order < 2_000_000:
                past.setdefault(owner, []).append((time, ingest, item, kind))
    checked = 0
    for part in _parts(drawn):
        for n in range(0, len(part.rows), 97):
            row, counts = part.rows[n], dict(zip(COUNTS, part.counts[n].tolist(), strict=True))
            cut, category = row.as_of // 1_000_000, int(np.frombuffer(row.target, "<i4")[1]) - 2
            own = [event for event in sorted(past[int(row.user_id)]) if event[0] < cut]
            known = [event for event in own if event[1] < cut][-config.examples.history_length :]
            shown = _history(row)
            assert len(shown) == len(known)
            assert Counter(shown[:, 0].tolist()) == Counter(
                item + 2 if item >= 0 else 1 for _, _, item, _ in known
            )
            assert shown[:, 4].tolist() == [(cut - time) // 60 for time, _, _, _ in known]
            day_of = {time: int(np.searchsorted(world.midnights, time, side="right")) - 1 for time, *_ in own}
            start = int(np.searchsorted(world.midnights, cut))
            hits = [
                start - day_of[t]
                for t, _, item, _ in own
                if item >= 0 and item // ITEMS_PER_CATEGORY == category
            ]
            for days in layouts.WINDOWS:
                assert counts[f"target_events_{days}_days"] == sum(age <= days for age in hits)
            assert counts["target_event_age"] == min(hits, default=365)
            user_ages = [start - day_of[t] for t, _, item, _ in own if item >= 0]
            assert counts["user_events_7_days"] == sum(age <= 7 for age in user_ages)
            checked += len(hits) > 0
    assert checked > 10


def test_labels_are_final_before_the_next_split_begins(config: Config, drawn: Samples) -> None:
    days = samples.split_days(draw_world(config), config)
    assert days == {
        "train": list(range(27, 60, 3)),
        "valid": [66],
        "test": [75, 78, 81],
    }
    train, valid, test = _parts(drawn)
    assert max(row.mature_time for row in train.rows) <= min(row.as_of for row in valid.rows)
    assert max(row.mature_time for row in valid.rows) <= min(row.as_of for row in test.rows)
    assert {row.user_id for row in train.rows} <= {str(user) for user in range(150)}
    assert max(days["test"]) + CAMPAIGN_DAYS <= 90


def test_the_truth_is_not_in_the_row_but_beside_it(drawn: Samples) -> None:
    test = drawn.test
    assert 0.7 < metrics.auc(test.truth, test.label) < 0.95
    assert test.truth.mean() == pytest.approx(test.label.mean(), abs=0.04)
    chosen = test.take(test.is_order_only)
    assert 0.2 < len(chosen.rows) / len(test.rows) < 0.8
    assert chosen.is_order_only.all()
    per_day = Counter((row.user_id, row.as_of) for row in chosen.rows)
    assert set(per_day.values()) == {2}  # the wanted and the unwanted one


def test_negatives_are_beside_every_step_and_never_the_target(drawn: Samples) -> None:
    for row in drawn.valid.rows[::50]:
        negatives, shown = _negatives(row), _history(row)
        category = int(np.frombuffer(row.target, "<i4")[1])
        assert len(negatives) == len(shown)
        assert category not in negatives[:, 1]
        assert not (negatives[:, 0] == shown[:, 0])[negatives[:, 0] > 0].any()


def test_permuting_keeps_every_event_its_bucket_and_its_negative(drawn: Samples) -> None:
    mixed = samples.permuted(drawn.valid, seed=1)
    moved = 0
    orders: dict[tuple[str, int], bytes] = {}
    for before, after in zip(drawn.valid.rows, mixed.rows, strict=True):
        old, new = _history(before), _history(after)
        edges = np.array(GAP_EDGES_DAYS) * DAY
        np.testing.assert_array_equal(np.digitize(old[:, 4], edges), np.digitize(new[:, 4], edges))
        pairs = [
            Counter(
                zip(map(tuple, _history(row).tolist()), map(tuple, _negatives(row).tolist()), strict=True)
            )
            for row in (before, after)
        ]
        assert pairs[0] == pairs[1]
        assert orders.setdefault((after.user_id, after.as_of), after.history) == after.history
        moved += before.history != after.history
        assert before._replace(history=b"", negatives=b"") == after._replace(history=b"", negatives=b"")
    assert moved > len(mixed.rows) / 2
    np.testing.assert_array_equal(mixed.truth, drawn.valid.truth)


def test_an_epoch_has_every_row_once(drawn: Samples) -> None:
    rows = drawn.valid.rows
    found = list(rungs.shuffled(rows, 100, [0, 1]))
    assert [batch.size for batch in found] == [100] * (len(rows) // 100) + [len(rows) % 100]
    assert sum(float(batch.label.sum()) for batch in found) == drawn.valid.label.sum()
    again, other = (next(rungs.shuffled(rows, 100, [0, epoch])).label for epoch in (1, 2))
    assert (again == found[0].label).all()
    assert not (other == found[0].label).all()


# ----------------------------------------------------------------------------------------------- experiments
def test_every_experiment_gives_its_verdict_and_the_oracle_leads_the_ladder() -> None:
    plan = Plan(2, SHORT)
    found = {name: synthetic.EXPERIMENTS[name](plan) for name in ("order", "shuffled", "order_off")}
    names = [verdict.name for one in found.values() for verdict in one.verdicts]
    assert names == ["dien_minus_din_order_only", "dien_minus_din_shuffled", "dien_minus_din_rule_off"]
    lines = {line["model"]: line for line in found["order"].ladder_lines()}
    assert set(lines) == {"popularity", "logistic", "boosted", "blend", "oracle", *synthetic.LADDER}
    assert lines["oracle"]["auc"] > max(line["auc"] for name, line in lines.items() if name != "oracle")
    assert lines["oracle"]["gap_share"] == 1.0
    assert (lines["dien"]["seeds"], lines["gru"]["seeds"]) == (2, 1)
    assert len(found["order"].verdicts[0].details["by_seed"]) == 2


def test_the_control_has_no_structure_and_first_order_is_calibrated() -> None:
    plan = Plan(1, SHORT)
    dials = plan.config("control").world
    assert (dials.local, dials.chain, dials.drift) == (0.0, 0.0, 0.0)
    assert [verdict.name for verdict in synthetic.control(plan).verdicts] == ["negative_control"]
    found = synthetic.first_order(plan)
    assert [verdict.name for verdict in found.verdicts] == ["din_gap_share", "calibration_ece"]
    assert 0.0 < found.verdicts[1].details["mean_distance_to_truth"] < 0.3


def test_results_replace_their_lines_and_become_tables(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    for value in (0.3, 0.1):
        verdict = verdicts.exceeds("v", Difference(value, 0.01, 0.4), 0.2, 3, "DIN")
        line = {"world": "order", "model": "din", "auc": value, "interval": [0.1, 0.2], "gap_share": 0.51}
        main.store("order", Found([verdict], [line]), 12.3, path)
    main.store("control", Found(), 1.0, path)
    held = json.loads(path.read_text())
    assert list(held) == ["order", "control"]
    (line,) = held["order"]["verdicts"]
    fields = "name value unit bound holds runs rival machine commit"
    assert set(fields.split()) <= set(line)
    assert (line["value"], line["holds"], line["interval"]) == (0.1, False, [0.01, 0.4])
    text = tables.markdown(held)
    assert (
        "| `v` | +0.100 AUC [+0.010, +0.400] | difference >= 0.2 and its interval above 0 | **no** |" in text
    )
    assert "| din | 0.100 [0.100, 0.200] | 51% |" in text


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["odrer"])
    assert "'odrer' is no experiment" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- real data
def _example(number: int, campaign: int, kind: int, label: float, user: str, redemptions: int = 0) -> Example:
    wide = np.zeros(len(layouts.WIDE_FEATURES), "<f4")
    wide[layouts.WIDE_FEATURES.index("num_redemptions")] = np.log1p(redemptions)
    wide[layouts.WIDE_FEATURES.index(f"is_type_{'abc'[kind]}")] = 1.0
    wide[0] = label + number % 7
    history = np.array([[2, 2, 2, 2, 60]], "<i4")
    return Example(
        wide=wide.tobytes(),
        label=label,
        history=history.tobytes(),
        negatives=np.zeros((1, 2), "<i4").tobytes(),
        target=np.array([[0, 2, 0]], "<i4").tobytes(),
        example_id=f"{campaign}:{number}",
        user_id=user,
        target_id=str(campaign),
        as_of=campaign * 100,
        mature_time=campaign * 100 + 150,
    )


def _campaigns() -> rolling.Campaigns:
    rows = [
        _example(n, campaign, campaign % 2, float(n % 4 == 0), f"u{n % 50}", n % 5)
        for campaign in range(6)
        for n in range(60)
    ]
    return rolling.campaigns(rows, layouts.WIDE_FEATURES)


def test_an_origin_knows_the_latest_campaign_of_a_type_and_holds_households_back() -> None:
    held = _campaigns()
    train = np.flatnonzero([row.mature_time <= 400 for row in held.rows])  # campaigns 0, 1 and 2
    test = np.flatnonzero(held.campaign == "4")
    now = rolling.origin(held, train, test)
    assert set(held.campaign[now.latest[0]]) == {"2"}
    assert set(now.latest) == {0}
    assert set(now.inner) | set(now.outer) == set(train)
    assert not set(now.inner) & set(now.outer)
    assert not set(held.user[now.inner]) & set(held.user[now.outer])
    assert 0 < len(now.outer) < len(train) / 2
    assert set(now.asked) == set(test) | set(now.latest[0])
    assert now.of(test, now.asked.astype(float)).tolist() == test.tolist()


def test_rates_are_those_of_type_and_redemptions_drawn_towards_their_type() -> None:
    held = _campaigns()
    train = np.flatnonzero(np.isin(held.campaign, ["0", "1"]))
    found = 1.0 / (1.0 + np.exp(-rolling._cell_rates(held, train, held.redemptions)))
    rows = [n for n in train.tolist() if held.type[n] == 0]
    overall = held.label[train].mean()
    of_type = (sum(held.label[n] for n in rows) + 20 * overall) / (len(rows) + 20)
    cell = [held.label[n] for n in rows if held.redemptions[n] == 3]
    expected = (sum(cell) + 20 * of_type) / (len(cell) + 20)
    place = next(n for n in range(len(held.label)) if held.type[n] == 0 and held.redemptions[n] == 3)
    assert found[place] == pytest.approx(expected)


def test_a_correction_moves_a_type_to_its_latest_rate_and_leaves_unknown_types_alone() -> None:
    held = _campaigns()
    train, test = (np.flatnonzero(np.isin(held.campaign, names)) for names in (["0", "2"], ["4", "5"]))
    now = rolling.origin(held, train, test)
    logit = np.full(len(now.asked), 1.0)
    moved = rolling.corrected(held, now, logit)
    said, seen = 1.0 / (1.0 + np.exp(-1.0)), held.label[now.latest[0]].mean()
    rate = (60 * seen + 50 * said) / 110
    is_known = held.type[test] == 0
    assert moved[is_known] == pytest.approx(np.log(rate / (1 - rate)))
    assert (moved[~is_known] == 1.0).all()


def test_models_are_refitted_at_each_origin_and_judged_together() -> None:
    config = Plan(1, (*TINY, "training.num_ranks=1")).config("order")
    held, judged = _campaigns(), rolling.Judged()
    models = ("rate", "rule", "logistic", "boosted", "dien", "dien@1", "blend")
    for campaign in (3, 4, 5):
        train = np.flatnonzero([row.mature_time <= campaign * 100 for row in held.rows])
        test = np.flatnonzero(held.campaign == str(campaign))
        now = rolling.origin(held, train, test)
        rolling.judge(
            config, {"item": 3, "category": 3, "shop": 3, "event_type": 3}, held, now, models, judged
        )
    found = rolling.summary(held, judged)
    assert [line["model"] for line in found.ladder] == list(models)
    assert [verdict.name for verdict in found.verdicts] == [
        "rolling_logistic_auc",
        "rolling_logistic_ece",
        "rolling_dien_minus_logistic",
        "rolling_dien_ece",
        "rolling_dien_lift_10",
    ]
    seeds = found.verdicts[2].details["auc_by_seed"]
    expected = [line["auc"] for line in found.ladder if line["model"].startswith("dien")]
    assert seeds == pytest.approx(expected)
    assert len(set(seeds)) == 2
    logistic = next(line["auc"] for line in found.ladder if line["model"] == "logistic")
    assert found.verdicts[2].value == pytest.approx(np.mean(seeds) - logistic)
    details = found.verdicts[0].details
    assert (details["rows"], details["positives"], details["campaigns"]) == (180, 45, 3)
