"""Segments are read off stored rows, and a segment that shows nothing says so."""

import numpy as np
import pytest

from couponflow.lake import layouts
from couponflow.training import metrics, segments
from couponflow.training.feed import Example


def make_row(categories: tuple[int, ...] = (7,), **aggregates: float) -> Example:
    """A stored row; counts and days are given as they are and stored as log1p."""
    wide = np.zeros(len(layouts.WIDE_FEATURES))
    for name, value in aggregates.items():
        wide[layouts.WIDE_FEATURES.index(name)] = value if name.startswith("is_") else np.log1p(value)
    target = np.zeros((len(categories), len(layouts.TARGET_FIELDS)), "<i4")
    target[:, layouts.TARGET_FIELDS.index("category")] = categories
    return Example(wide=wide.astype("<f4").tobytes(), label=0.0, target=target.tobytes())


def test_users_are_new_for_four_weeks() -> None:
    rows = [make_row(tenure_days=days) for days in (0, 1, 28, 29, 300)]
    assert segments.assign(rows)["user"].tolist() == ["new", "new", "new", "returning", "returning"]


def test_campaign_type_and_category_come_from_flags_and_target() -> None:
    rows = [
        make_row((7,), is_type_a=1.0),
        make_row((7, 7, 0), is_type_c=1.0),
        make_row((7, 8)),
        make_row(()),
        make_row((0,), is_type_b=1.0),
    ]
    found = segments.assign(rows)
    assert found["campaign_type"].tolist() == ["Type A", "Type C", "other", "other", "Type B"]
    assert found["category"].tolist() == [
        "category 7",
        "category 7",
        "several categories",
        "no category",
        "no category",
    ]


def test_activity_counts_lines_and_browsing_of_three_months() -> None:
    rows = [make_row(num_lines_91_days=n % 3, num_views_91_days=n, num_lines_all=500 - n) for n in range(50)]
    total = np.array([n % 3 + n for n in range(50)], float)
    assert segments.assign(rows)["activity"].tolist() == segments.deciles(total).tolist()


def test_deciles_keep_equal_values_together_and_are_tenths_without_ties() -> None:
    values = np.random.default_rng(0).permutation(200).astype(float)
    names, counts = np.unique(segments.deciles(values), return_counts=True)
    assert names.tolist() == [f"{n:02}" for n in range(1, 11)]
    assert counts.tolist() == [20] * 10
    assert values[segments.deciles(values) == "10"].min() == 180
    assert segments.deciles(np.zeros(30)).tolist() == ["01"] * 30
    assert segments.deciles(np.zeros(0)).size == 0
    mixed = segments.deciles(np.r_[np.zeros(50), np.ones(50)])
    assert set(mixed[:50]) == {"01"}
    assert set(mixed[50:]) == {"06"}


def test_each_segment_is_judged_alone_and_says_what_is_missing() -> None:
    generator = np.random.default_rng(1)
    probability = generator.uniform(0.05, 0.6, 400)
    label = (generator.random(400) < probability).astype(float)
    names = np.array(["big"] * 300 + ["small"] * 49 + ["none"] * 51)
    label[names == "none"] = 0.0
    found = segments.judge(np.log(probability), probability, label, {"d": names}, 15)["d"]
    rows = names == "big"
    assert found["big"] == {
        "rows": 300,
        "positives": int(label[rows].sum()),
        "auc": metrics.auc(probability[rows], label[rows]),
        "calibration_ratio": pytest.approx(probability[rows].sum() / label[rows].sum()),
        "ece": metrics.ece(probability[rows], label[rows], 6),
        "note": "",
    }
    assert found["small"]["note"] == "too few rows (fewer than 50)"
    assert [found["small"][key] for key in ("auc", "calibration_ratio", "ece")] == [None] * 3
    assert found["none"]["note"] == "one class only"
    assert (found["none"]["auc"], found["none"]["calibration_ratio"]) == (None, None)
    assert found["none"]["ece"] == pytest.approx(probability[names == "none"].mean())
    assert sum(entry["rows"] for entry in found.values()) == 400
    some = probability[:60]
    labels_of_one = segments.judge(some, some, np.ones(60), {"d": np.array(["a"] * 60)}, 15)
    assert labels_of_one["d"]["a"]["note"] == "one class only"
    assert segments.judge([], [], [], {"d": np.array([], "U1")}, 15) == {"d": {}}
