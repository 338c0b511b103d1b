"""Merged, saved and distributed metrics equal one metric over all rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

from recis_hybrid.metrics import (
    AUC,
    GAUC,
    MSE,
    BinnedAUC,
    Calibration,
    HitRateAtK,
    LogLoss,
    Metric,
    NDCGAtK,
    NormalizedEntropy,
    PrecisionAtK,
    RecallAtK,
)
from tests.support.programs import free_port, in_processes

KINDS: list[Callable[..., Metric]] = [
    AUC,
    BinnedAUC,
    Calibration,
    GAUC,
    partial(HitRateAtK, 2),
    LogLoss,
    MSE,
    partial(NDCGAtK, 3),
    NormalizedEntropy,
    partial(PrecisionAtK, 2),
    partial(RecallAtK, 2),
]


def update(metric: Metric, start: int, stop: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, generator=generator)
    labels = (torch.rand(60, generator=generator) < scores).long()
    groups = torch.randint(0, 8, (60,), generator=generator)
    columns = [scores, labels, *([groups] if metric.takes_groups else [])]
    metric.update(*(column[start:stop] for column in columns))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_merge_state_and_reset(kind: Callable[..., Metric]) -> None:
    whole, first, second, again = kind(), kind(), kind(), kind()
    update(whole, 0, 60)
    update(first, 0, 20)
    update(second, 20, 60)
    first.merge(second)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-14)
    again.load_state_dict(first.state_dict())
    assert again.compute() == first.compute()
    again.merge(kind())
    assert again.compute() == first.compute()
    again.reset()
    again.merge(first)
    update(again, 0, 1)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-14)
    first.reset()
    with pytest.raises(ValueError, match="nothing to compute; call update first"):
        first.compute()


@pytest.mark.parametrize("kind", KINDS)
def test_state_can_cross_inference_mode(kind: Callable[..., Metric]) -> None:
    """State created inside inference mode can be used outside, and vice versa."""
    whole, fresh = kind(), kind()
    update(whole, 0, 60)
    with torch.inference_mode():
        first, second = kind(), kind()
        update(first, 0, 10)
    update(first, 10, 20)
    with torch.inference_mode():
        update(first, 20, 30)
        update(second, 30, 40)
        fresh.merge(second)
        state = first.state_dict()
        first.load_state_dict(state)
    update(fresh, 40, 50)
    second = kind()
    second.load_state_dict(state)
    update(second, 50, 60)
    second.merge(fresh)
    assert second.compute() == pytest.approx(whole.compute(), rel=1e-14)
    with torch.inference_mode():
        assert second.compute() == pytest.approx(whole.compute(), rel=1e-14)
        second.reset()
        update(second, 0, 30)
    update(second, 30, 60)
    assert second.compute() == pytest.approx(whole.compute(), rel=1e-14)
    assert not any(tensor.is_inference() for tensor in second.state_dict().values())


def on_rank(rank: int, port: int, expected: list[float]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for kind, value in zip(KINDS, expected, strict=True):
        # Unequal parts, then all rows on one rank and none on the other.
        for parts in ((0, 50), (50, 60)), ((0, 60), None):
            metric = kind()
            if parts[rank] is not None:
                update(metric, *parts[rank])
            assert metric.compute() == pytest.approx(value, rel=1e-12), kind
        local = kind(sync=False)
        update(local, 0, 60)
        if rank == 0:  # not collective: the other rank does not take part
            assert local.compute() == value
    dist.destroy_process_group()


def test_two_ranks_compute_the_value_of_one() -> None:
    expected = []
    for kind in KINDS:
        metric = kind()
        update(metric, 0, 60)
        expected.append(metric.compute())
    port = free_port()
    in_processes(on_rank, (port, expected), 2)
