from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

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
    auc,
    gauc,
    logloss,
)
from recis_hybrid.metrics._metric import SumMetric
from tests.support import emulated
from tests.support.devices import no_synchronization, on_accelerators

LABELS = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0, 1, 1])
SCORES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])

both_classes = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40).filter(
    lambda rows: 0 < sum(label for label, _ in rows) < len(rows)
)


def test_auc_of_the_known_vector() -> None:
    assert auc(LABELS, SCORES) == pytest.approx(19 / 24, rel=1e-14)


@given(both_classes)
def test_auc_is_the_share_of_correctly_ordered_pairs(rows: list[tuple[bool, int]]) -> None:
    positives = [score for label, score in rows if label]
    negatives = [score for label, score in rows if not label]
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    labels, scores = (torch.tensor(column) for column in zip(*rows, strict=True))
    assert auc(labels, scores.float()) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(-2, 2), st.integers(0, 4)), min_size=2, max_size=25))
def test_an_integer_weight_repeats_a_row(rows: list[tuple[bool, int, int]]) -> None:
    labels, scores, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    repeated = [(label, score) for label, score, weight in rows for _ in range(weight)]
    if len({label for label, _ in repeated}) < 2:
        with pytest.warns(RuntimeWarning, match="needs both classes"):
            assert math.isnan(auc(labels, scores.float(), weights))
        return
    many_labels, many_scores = (torch.tensor(column) for column in zip(*repeated, strict=True))
    assert auc(labels, scores.float(), weights) == pytest.approx(auc(many_labels, many_scores.float()), rel=1e-12)
    weighted = logloss(labels, scores.double().sigmoid(), weights)
    assert weighted == pytest.approx(logloss(many_labels, many_scores.double().sigmoid()), rel=1e-12)


def test_auc_of_a_perfect_order_is_exactly_one() -> None:
    labels = torch.arange(10_007) % 3 == 0
    assert auc(labels, labels + torch.rand(10_007, generator=torch.Generator().manual_seed(0)) / 2) == 1.0


@pytest.mark.parametrize("metric", [AUC, LogLoss])
def test_metrics_copy_their_input(metric: type[AUC] | type[LogLoss]) -> None:
    scores, labels, weights = SCORES.clone(), LABELS.clone(), torch.rand(10)
    overwritten, whole = metric(), metric()
    overwritten.update(scores, labels, weights)
    whole.update(SCORES, LABELS, weights.clone())
    for buffer in (scores, labels, weights):
        buffer.zero_()
    assert overwritten.compute() == whole.compute()


@on_accelerators
@pytest.mark.parametrize(
    "build", [AUC, BinnedAUC, Calibration, GAUC, LogLoss, MSE, NormalizedEntropy, lambda: NDCGAtK(3)]
)
def test_batches_on_a_gpu_are_added_without_waiting(device: str, build: Callable[[], Any]) -> None:
    metrics = {where: build() for where in ("cpu", device)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        columns = [torch.rand(64, generator=generator), torch.randint(0, 2, (64,), generator=generator)]
        if not isinstance(metrics["cpu"], SumMetric | AUC):
            columns.append(torch.randint(0, 9, (64,), generator=generator))
        on_device = [column.to(device) for column in columns]
        metrics["cpu"].update(*columns)
        with no_synchronization(device):
            metrics[device].update(*on_device)
    assert metrics[device].compute() == pytest.approx(metrics["cpu"].compute(), rel=1e-12)
    restored = build()
    restored.load_state_dict(metrics[device].state_dict())
    restored.merge(metrics[device])
    metrics["cpu"].merge(metrics["cpu"])
    assert restored.compute() == pytest.approx(metrics["cpu"].compute(), rel=1e-12)


@pytest.mark.parametrize("metric", [AUC, LogLoss])
def test_batches_without_weights_have_weight_one(metric: type[AUC] | type[LogLoss]) -> None:
    some, explicit = metric(), metric()
    weights = torch.tensor([2.0, 0.5, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    some.update(SCORES[:3], LABELS[:3], weights[:3])
    some.update(SCORES[3:], LABELS[3:])
    explicit.update(SCORES, LABELS, weights)
    assert some.compute() == pytest.approx(explicit.compute(), rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"weights must be \[N\] with N = 2 like labels, got \[1\]"),
        ([1.0, -1.0], "weights must be finite and non-negative, 1 of 2 are not"),
        ([math.inf, math.nan], "weights must be finite and non-negative, 2 of 2 are not"),
    ],
)
def test_invalid_weights_are_rejected(weights: list[float], message: str) -> None:
    for metric in (auc, logloss):
        with pytest.raises(ValueError, match=f"{metric.__name__}: {message}"):
            metric(torch.tensor([0, 1]), torch.tensor([0.1, 0.2]), torch.tensor(weights))


def test_auc_distinguishes_close_float32_scores() -> None:
    near = torch.tensor([0.5, 0.5 + 2**-24 * 2])
    assert auc(torch.tensor([0, 1]), near) == 1.0


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 0.999)), min_size=1, max_size=30))
def test_logloss_is_the_mean_negative_log_likelihood(rows: list[tuple[bool, float]]) -> None:
    expected = -sum(math.log(p if label else 1 - p) for label, p in rows) / len(rows)
    labels = torch.tensor([label for label, _ in rows])
    scores = torch.tensor([score for _, score in rows], dtype=torch.float64)
    assert logloss(labels, scores) == pytest.approx(expected, rel=1e-9)


def test_logloss_of_confident_wrong_predictions_is_finite() -> None:
    assert logloss(torch.tensor([1.0]), torch.tensor([0.0])) == pytest.approx(-math.log(2**-52))


@pytest.mark.parametrize("metric", [AUC, LogLoss])
def test_accumulators_merge_and_reset(metric: type[AUC] | type[LogLoss]) -> None:
    whole, first, second = metric(), metric(), metric()
    whole.update(SCORES, LABELS)
    first.update(SCORES[:4], LABELS[:4])
    second.update(SCORES[4:], LABELS[4:])
    first.merge(second)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-14)
    first.reset()
    with pytest.raises(ValueError, match="nothing to compute; call update first"):
        first.compute()


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 2], [0.1, 0.2], "auc: labels must be 0 or 1, got values from 1 to 2"),
        ([0, 1], [0.1, math.nan], "auc: 1 of 2 scores are NaN"),
        ([0, 1, 1], [0.1, 0.2], r"auc: labels and scores must be \[N\] each, got \[3\] and \[2\]"),
    ],
)
def test_auc_rejects_invalid_input(labels: list[int], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auc(torch.tensor(labels), torch.tensor(scores))


def test_logloss_rejects_logits_and_empty_input() -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], 2 of 2 are not; apply a sigmoid"):
        logloss(torch.tensor([0, 1]), torch.tensor([-2.0, 3.0]))
    with pytest.raises(ValueError, match="must be rows of weight above 0, got 0 rows"):
        logloss(torch.tensor([]), torch.tensor([]))


@pytest.mark.parametrize("make", [PrecisionAtK, RecallAtK, NDCGAtK, HitRateAtK, lambda k: BinnedAUC(bins=k)])
def test_integer_settings_accept_only_integers(make: Any) -> None:
    for wrong in (2.5, 2.0, True, "2", None, np.float64(2), torch.tensor(2.5)):
        with pytest.raises(TypeError, match="must be an integer, got"):
            make(wrong)
    for right in (2, np.int64(2)):
        make(right)
    with pytest.raises(TypeError, match="sync must be True or False, got 'no'"):
        AUC(sync="no")  # type: ignore[arg-type]


def test_repr_shows_settings_and_accumulated_state() -> None:
    loss, ranking, bins = LogLoss(), NDCGAtK(5), BinnedAUC(10)
    assert [repr(metric) for metric in (loss, ranking, bins)] == [
        "LogLoss()",
        "NDCGAtK(k=5, rows=0)",
        "BinnedAUC(bins=10)",
    ]
    loss.update(torch.tensor([0.5]), torch.tensor([1]))
    ranking.update(torch.tensor([0.5]), torch.tensor([1]), torch.tensor([7]))
    bins.update(torch.tensor([0.5]), torch.tensor([1]))  # undefined with one class, but repr does not warn
    assert [repr(metric) for metric in (loss, ranking, bins)] == [
        "LogLoss(value=0.693147)",
        "NDCGAtK(k=5, rows=1)",
        "BinnedAUC(bins=10, value=nan)",
    ]
    loss.update(torch.tensor([2.0]), torch.tensor([1]))  # compute() raises
    assert repr(loss) == "LogLoss()"


@pytest.mark.emulated
def test_exact_metrics_wait_once_for_their_rows() -> None:
    draw = torch.Generator().manual_seed(1)
    scores, weights = torch.rand(50, generator=draw).half(), torch.rand(50, generator=draw)
    labels, groups = torch.rand(50, generator=draw) < 0.3, torch.randint(0, 5, (50,), generator=draw)

    def run(device: str) -> list[tuple[Any, int]]:
        rows = [column.to(device) for column in (scores, labels, groups, weights)]
        metrics = [AUC(), GAUC(), NDCGAtK(3)]
        metrics[0].update(rows[0], rows[1], rows[3])
        metrics[1].update(*rows)
        metrics[2].update(*rows[:3])
        calls = [
            lambda: auc(rows[1], rows[0], rows[3]),
            lambda: gauc(rows[1], rows[0], rows[2], rows[3]),
            *[metric.compute for metric in metrics],
        ]
        found: list[tuple[Any, int]] = []
        for call in calls:
            value: list[float] = []
            waits = emulated.synchronizations(lambda call=call, value=value: value.append(call()))
            found.append((value[0], waits))
        return found

    expected = run("cpu")
    assert run("emulated") == [(value, 1) for value, _ in expected]
