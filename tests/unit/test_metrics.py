"""Metrics against golden values and against slow, obvious oracles."""

import itertools

import numpy as np
import pytest

from couponflow.training import metrics

P22 = np.array([0.05, 0.15, 0.15, 0.35, 0.55, 0.65, 0.85, 0.95])
Y22 = np.array([0, 0, 1, 0, 1, 1, 1, 1])
LOGIT22 = np.log(P22 / (1 - P22))


def oracle_auc(score, label, weight=None) -> float:
    weight = np.ones(len(score)) if weight is None else weight
    wins = pairs = 0.0
    for i, j in itertools.product(range(len(score)), repeat=2):
        if label[i] == 1 and label[j] == 0:
            pairs += weight[i] * weight[j]
            wins += weight[i] * weight[j] * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    return wins / pairs if pairs else float("nan")


def oracle_pr_auc(score, label) -> float:
    total, area, hits_before = sum(label), 0.0, 0
    for value in sorted(set(score), reverse=True):
        taken = [y for s, y in zip(score, label, strict=True) if s >= value]
        area += (sum(taken) - hits_before) / total * sum(taken) / len(taken)
        hits_before = sum(taken)
    return area


def oracle_captured(score, label, k) -> float:
    """Mean over all orders that sort by falling score."""
    found = []
    for order in itertools.permutations(range(len(score))):
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order)):
            found.append(sum(label[i] for i in order[:k]) / sum(label))
    return float(np.mean(found))


@pytest.fixture
def cases() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random rows with many ties; the first has one class only."""
    generator = np.random.default_rng(5)
    made = [(np.arange(4.0), np.ones(4, int), np.ones(4, int))]
    for _ in range(60):
        size = int(generator.integers(2, 25))
        score = generator.integers(0, 6, size) / 5
        made.append((score, generator.integers(0, 2, size), generator.integers(0, 4, size)))
    return made


def test_auc_equals_the_pairwise_oracle(cases) -> None:
    for score, label, weight in cases:
        assert metrics.auc(score, label) == pytest.approx(oracle_auc(score, label), nan_ok=True)
        explicit = np.repeat(np.arange(len(score)), weight)
        weighted = metrics.auc(score, label, weight)
        assert weighted == pytest.approx(oracle_auc(score, label, weight), nan_ok=True)
        assert weighted == pytest.approx(metrics.auc(score[explicit], label[explicit]), abs=0, nan_ok=True)


def test_pr_auc_equals_the_oracle(cases) -> None:
    for score, label, weight in cases:
        if label.sum():
            assert metrics.pr_auc(score, label) == pytest.approx(oracle_pr_auc(score, label))
        explicit = np.repeat(np.arange(len(score)), weight)
        resampled = metrics.pr_auc(score[explicit], label[explicit])
        assert metrics.pr_auc(score, label, weight) == pytest.approx(resampled, abs=1e-12, nan_ok=True)


def test_golden_auc() -> None:
    assert metrics.auc([0.9, 0.8, 0.3, 0.2], [1, 0, 1, 0]) == pytest.approx(0.75)
    assert metrics.auc([0.5, 0.5], [1, 0]) == 0.5
    assert np.isnan(metrics.auc([0.5, 0.4], [1, 1]))
    assert np.isnan(metrics.auc([], []))


def test_golden_gauc_leaves_single_class_groups_out() -> None:
    label = [1, 0, 1, 0, 0, 1, 0, 1, 1]
    score = [0.9, 0.8, 0.3, 0.2, 0.6, 0.5, 0.1, 0.7, 0.6]
    group = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    value, covered = metrics.gauc(score, label, group)
    assert (value, covered) == (pytest.approx(0.642857, abs=1e-6), pytest.approx(7 / 9))
    assert metrics.gauc(score, label, group, "positives")[0] == pytest.approx(0.666667, abs=1e-6)
    assert metrics.auc(score, label) == pytest.approx(0.675)
    assert np.isnan(metrics.gauc([0.1, 0.2], [1, 1], ["a", "a"])[0])


def test_golden_calibration_errors() -> None:
    widths = {2: 0.1625, 5: 0.25, 10: 0.2625}
    assert {m: metrics.equal_width_ece(P22, Y22, m) for m in widths} == pytest.approx(widths)
    masses = {2: 0.1625, 4: 0.2125}
    assert {m: metrics.ece(P22, Y22, m) for m in masses} == pytest.approx(masses)
    assert metrics.brier(P22, Y22) == pytest.approx(0.1525)
    assert metrics.equal_width_ece([1.0], [1], 2) == 0.0  # p = 1 lies in the last bin
    assert metrics.calibration_ratio(P22, Y22) == pytest.approx(P22.sum() / 5)


def oracle_brier_parts(probability, label, num_bins) -> list[float]:
    """Row by row: the rows in order of p, cut into bins of equal counts."""
    order = sorted(range(len(label)), key=lambda row: probability[row])
    size, rate, parts = len(order), sum(label) / len(label), [0.0] * 5
    parts[2] = rate * (1 - rate)
    for rows in np.array_split(order, num_bins):
        if not len(rows):
            continue
        p = sum(probability[row] for row in rows) / len(rows)
        y = sum(label[row] for row in rows) / len(rows)
        for row in rows:
            parts[0] += (p - y) ** 2 / size
            parts[1] += (y - rate) ** 2 / size
            parts[3] += (probability[row] - p) ** 2 / size
            parts[4] += 2 * (probability[row] - p) * (label[row] - y) / size
    return parts


@pytest.mark.parametrize("num_bins", [1, 2, 3, 15, 400])
@pytest.mark.parametrize("size", [1, 2, 300])
def test_brier_parts_add_up_exactly(size: int, num_bins: int) -> None:
    generator = np.random.default_rng(size * 1000 + num_bins)
    probability = np.round(generator.random(size) ** 3, 2)  # with ties
    label = (generator.random(size) < probability).astype(int)
    parts = metrics.brier_parts(probability, label, num_bins)
    reliability, resolution, uncertainty, variance, covariance = parts.values()
    total = reliability - resolution + uncertainty + variance - covariance
    assert total == pytest.approx(metrics.brier(probability, label), abs=1e-13)
    assert list(parts.values()) == pytest.approx(oracle_brier_parts(probability, label, num_bins), abs=1e-13)


def test_golden_brier_parts() -> None:
    """G22 rows in two bins of four: mean p .175 and .75, rates .25 and 1, base rate .625."""
    parts = metrics.brier_parts(P22, Y22, 2)
    assert parts["reliability"] == pytest.approx((0.075**2 + 0.25**2) / 2)
    assert parts["resolution"] == pytest.approx(0.375**2)
    assert parts["uncertainty"] == pytest.approx(0.625 * 0.375)
    assert sum(parts.values()) - 2 * parts["resolution"] - 2 * parts["within_bin_covariance"] == (
        pytest.approx(0.1525)
    )
    one_value_each = metrics.brier_parts([0.2] * 5 + [0.8] * 5, [0, 0, 0, 0, 1, 1, 1, 1, 1, 0], 2)
    assert one_value_each["within_bin_variance"] == pytest.approx(0.0, abs=1e-30)  # Murphy's three suffice
    assert one_value_each["within_bin_covariance"] == pytest.approx(0.0, abs=1e-15)
    assert one_value_each["reliability"] == pytest.approx(0.0, abs=1e-30)
    assert np.isnan(metrics.brier_parts([], [])["reliability"])


def test_golden_log_loss_and_entropy() -> None:
    assert metrics.log_loss(LOGIT22, Y22) == pytest.approx(0.473018, abs=1e-6)
    assert metrics.normalised_entropy(LOGIT22, Y22) == pytest.approx(0.715001, abs=1e-6)
    constant = np.full(8, np.log(5 / 3))
    assert metrics.normalised_entropy(constant, Y22) == pytest.approx(1.0)
    assert metrics.log_loss([1000.0], [0]) == pytest.approx(1000.0)


def test_golden_average_precision_and_lift() -> None:
    assert metrics.pr_auc(P22, Y22) == pytest.approx(0.942857, abs=1e-6)
    assert metrics.lift(P22, Y22, 2) == pytest.approx(1.6)
    assert metrics.lift(P22, Y22, 6) == pytest.approx(1.2)  # a tie of two rows at the cut counts half


def test_captured_is_the_mean_over_all_tie_orders() -> None:
    generator = np.random.default_rng(2)
    for _ in range(15):
        score, label = generator.integers(0, 3, 6), generator.integers(0, 2, 6)
        label[0] = 1
        for k in range(7):
            assert metrics.captured(score, label, k) == pytest.approx(oracle_captured(score, label, k))


def test_reliability_and_gain_cover_all_rows() -> None:
    table = metrics.reliability(P22, Y22, 3)
    assert [entry["rows"] for entry in table] == [3, 3, 2]
    assert table[0] == {
        "predicted": pytest.approx(0.35 / 3),
        "observed": pytest.approx(1 / 3),
        "rows": 3,
    }
    curve = metrics.gain_curve(P22, Y22, 5)
    assert [point["captured"] for point in curve] == pytest.approx([0.0, 0.4, 0.8, 0.9, 1.0])


def test_row_order_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(8)
    for function in (metrics.auc, metrics.pr_auc, metrics.brier):
        assert function(P22, Y22) == pytest.approx(function(P22[order], Y22[order]), abs=1e-15)
    assert metrics.lift(P22, Y22, 6) == metrics.lift(P22[order], Y22[order], 6)
