"""Every metric matches scikit-learn or its definition."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn import metrics as sklearn
from torch import Tensor

from recis_hybrid.metrics import (
    AUC,
    GAUC,
    MSE,
    BinnedAUC,
    Calibration,
    HitRateAtK,
    LogLoss,
    NDCGAtK,
    NormalizedEntropy,
    PrecisionAtK,
    RecallAtK,
    gauc,
    normalized_entropy,
)

ROWS = 3_000


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores (with ties), labels, weights and groups."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(ROWS, generator=generator, dtype=torch.float64) * 500).round() / 500
    labels = (torch.rand(ROWS, generator=generator) < scores * 0.7).long()
    weights = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    groups = torch.randint(-5, 200, (ROWS,), generator=generator)
    return scores, labels, weights, groups


def test_auc_logloss_and_mse_match_scikit_learn() -> None:
    scores, labels, weights, _ = rows()
    expected = {
        AUC: sklearn.roc_auc_score(labels, scores, sample_weight=weights),
        LogLoss: sklearn.log_loss(labels, scores, sample_weight=weights),
        MSE: sklearn.mean_squared_error(labels, scores, sample_weight=weights),
    }
    for kind, value in expected.items():
        metric = kind()
        for part in torch.arange(ROWS).split(700):
            metric.update(scores[part], labels[part], weights[part])
        assert metric.compute() == pytest.approx(value, rel=1e-11)


def test_auc_and_gauc_of_known_vectors() -> None:
    auc, by_group = AUC(), GAUC()
    auc.update(
        torch.tensor([0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]), torch.tensor([0, 0, 1, 0, 0, 0, 1, 0, 1, 1])
    )
    assert auc.compute() == pytest.approx(19 / 24, rel=1e-14)
    by_group.update(
        torch.tensor([0.6, 0.4, 0.55, 0.45, 0.5]), torch.tensor([1, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 1])
    )
    assert by_group.compute() == 0.75


def test_gauc_is_the_mean_of_scikit_learns_aucs() -> None:
    scores, labels, weights, groups = rows(1)
    aucs, counts = [], {"groups": [], "rows": [], "positives": []}
    for group in groups.unique():
        own = groups == group
        if len(labels[own].unique()) == 2:
            aucs.append(sklearn.roc_auc_score(labels[own], scores[own], sample_weight=weights[own]))
            counts["groups"].append(1.0)
            counts["rows"].append(float(weights[own].sum()))
            counts["positives"].append(float(weights[own][labels[own] == 1].sum()))
    for average, shares in counts.items():
        value = gauc(labels, scores, groups, weights, average=average)  # type: ignore[arg-type]
        assert value == pytest.approx(np.average(aucs, weights=shares), rel=1e-11)
    with pytest.raises(ValueError, match="average must be one of"):
        gauc(labels, scores, groups, average="users")  # type: ignore[arg-type]


@pytest.mark.parametrize("bins", [2, 50, 65_536])
def test_binned_auc_is_within_its_bound(bins: int) -> None:
    generator = torch.Generator().manual_seed(bins)
    scores = torch.rand(ROWS, generator=generator, dtype=torch.float64) ** 4
    labels = (torch.rand(ROWS, generator=generator) < scores).long()
    weights = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    metric = BinnedAUC(bins)
    metric.update(scores, labels, weights)
    error = abs(metric.compute() - sklearn.roc_auc_score(labels, scores, sample_weight=weights))
    assert error <= metric.error_bound() + 1e-12
    assert metric.error_bound() < 3 / bins + 1e-4 * (bins == 65_536)


def test_binned_auc_is_exact_for_scores_in_different_bins() -> None:
    metric = BinnedAUC(10)
    scores, labels = torch.tensor([0.0, 0.15, 0.25, 0.35, 1.0]), torch.tensor([0, 1, 0, 1, 1])
    metric.update(scores, labels)
    assert (metric.compute(), metric.error_bound()) == (pytest.approx(5 / 6), 0.0)


def test_normalized_entropy_and_calibration_match_their_definitions() -> None:
    scores, labels, weights, _ = rows(2)
    rate = float((weights * labels).sum() / weights.sum())
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    value = sklearn.log_loss(labels, scores, sample_weight=weights) / entropy
    assert normalized_entropy(labels, scores, weights) == pytest.approx(value, rel=1e-11)
    metric, calibration = NormalizedEntropy(), Calibration()
    metric.update(scores, labels, weights)
    calibration.update(scores, labels, weights)
    assert metric.compute() == pytest.approx(value, rel=1e-11)
    assert calibration.compute() == pytest.approx(float((weights * scores).sum() / (weights * labels).sum()), rel=1e-11)


def test_ndcg_matches_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 6, (40, 9), generator=generator).double()
    labels = torch.randint(0, 4, (40, 9), generator=generator)
    groups = torch.arange(40)[:, None].expand(40, 9)
    shuffled = torch.randperm(360, generator=generator)
    for k in (1, 4, 9, 20):
        metric = NDCGAtK(k)
        metric.update(*(values.flatten()[shuffled] for values in (scores, labels, groups)))
        assert metric.compute() == pytest.approx(sklearn.ndcg_score(labels.numpy(), scores.numpy(), k=k), rel=1e-11)


def test_precision_recall_and_hit_rate_match_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(30, 8, generator=generator)
    # With one relevant row in each group, the hit rate is scikit-learn's top-k accuracy.
    one = torch.nn.functional.one_hot(torch.randint(0, 8, (30,), generator=generator), 8)
    some = (torch.rand(30, 8, generator=generator) < 0.4).long() | one
    groups = torch.arange(30)[:, None].expand(30, 8).flatten()
    for k in (1, 3, 7):
        chosen = torch.zeros_like(some).scatter_(1, scores.topk(k).indices, 1).numpy()
        expected = {
            PrecisionAtK: (some, sklearn.precision_score(some.numpy(), chosen, average="samples")),
            RecallAtK: (some, sklearn.recall_score(some.numpy(), chosen, average="samples")),
            HitRateAtK: (
                one,
                sklearn.top_k_accuracy_score(one.argmax(1).numpy(), scores.numpy(), k=k, labels=range(8)),
            ),
        }
        for kind, (labels, value) in expected.items():
            metric = kind(k)
            metric.update(scores.flatten(), labels.flatten(), groups)
            assert metric.compute() == pytest.approx(value, rel=1e-11), kind


ranking = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=5)


@given(ranking, st.integers(1, 6))
def test_top_k_metrics_are_means_over_all_orders_of_ties(items: list[tuple[int, int]], k: int) -> None:
    orders = [o for o in permutations(items) if all(a[0] >= b[0] for a, b in zip(o, o[1:], strict=False))]
    relevant = sum(label > 0 for _, label in items)
    hits = [sum(label > 0 for _, label in order[:k]) for order in orders]
    expected = {PrecisionAtK: np.mean(hits) / k}
    if relevant:
        expected |= {RecallAtK: np.mean(hits) / relevant, HitRateAtK: np.mean([hit > 0 for hit in hits])}
        gains = [sum(label / math.log2(i + 2) for i, (_, label) in enumerate(order[:k])) for order in orders]
        best = sorted((label for _, label in items), reverse=True)[:k]
        expected[NDCGAtK] = np.mean(gains) / sum(label / math.log2(i + 2) for i, label in enumerate(best))
    scores, labels = torch.tensor(items).T
    for kind, value in expected.items():
        metric = kind(k)
        metric.update(scores.float(), labels, torch.full((len(items),), 3))
        # A group without a relevant row counts only for precision.
        metric.update(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([4]))
        assert metric.compute() == pytest.approx(value / (2 if kind is PrecisionAtK else 1), rel=1e-11)


def test_undefined_values_are_nan_with_a_warning() -> None:
    ones, scores, groups = torch.ones(3), torch.tensor([0.2, 0.4, 0.6]), torch.tensor([1, 1, 2])
    for kind in (AUC, BinnedAUC, NormalizedEntropy):
        metric = kind()
        metric.update(scores, ones)
        with pytest.warns(RuntimeWarning, match=f"^{kind.__name__} is undefined, .* got 3 positives and 0 negatives"):
            assert math.isnan(metric.compute())
    calibration, by_group, recall = Calibration(), GAUC(), RecallAtK(2)
    calibration.update(scores, 0 * ones)
    with pytest.warns(RuntimeWarning, match="Calibration is undefined, .* none of 3 rows are positive"):
        assert math.isnan(calibration.compute())
    by_group.update(scores, ones, groups)
    with pytest.warns(RuntimeWarning, match="GAUC is undefined, .* none of 2 groups have both classes"):
        assert math.isnan(by_group.compute())
    recall.update(scores, 0 * ones, groups)
    with pytest.warns(RuntimeWarning, match="RecallAtK is undefined, .* none of 2 groups have a relevant row"):
        assert math.isnan(recall.compute())


def test_invalid_rows_are_rejected_and_counted() -> None:
    bad, labels = torch.tensor([math.nan, 1.5, 0.5]), torch.tensor([0, 1, 1])
    for kind in (LogLoss, NormalizedEntropy, Calibration, BinnedAUC):
        metric = kind()
        metric.update(bad, labels)
        with pytest.raises(ValueError, match=f"{kind.__name__}: 1 of 3 scores are NaN"):
            metric.compute()
        metric.reset()
        metric.update(bad[1:], labels[1:])
        with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\], 1 of 2 are not"):
            metric.compute()
        metric.reset()
        metric.update(torch.tensor([math.inf, -math.inf, 0.5]), labels)
        with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\], 2 of 3 are not"):
            metric.compute()
        metric.reset()
        metric.update(bad[2:], labels[2:] + 1)
        with pytest.raises(ValueError, match="labels must be 0 or 1, 1 of 1 are not"):
            metric.compute()
    with pytest.raises(ValueError, match=r"groups must be \[N\] with N = 2 like labels, got \[1\]"):
        GAUC().update(torch.rand(2), torch.ones(2), torch.tensor([1]))
    with pytest.raises(ValueError, match="GAUC: groups must be integers, got torch.float32"):
        GAUC().update(torch.rand(2), torch.ones(2), torch.rand(2))
    for call, message in ((lambda: RecallAtK(0), "k must be at least 1, got 0"), (lambda: BinnedAUC(1), "got 1")):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="rows of a ranking have no weights"):
        RecallAtK(1).update(torch.rand(1), torch.ones(1), torch.tensor([1]), torch.ones(1))
