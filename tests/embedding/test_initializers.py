from __future__ import annotations

import math

import pytest
import torch

from recis_hybrid.embedding import (
    HashTable,
    Initializer,
    KaimingNormal,
    KaimingUniform,
    MemberTable,
    RecordLayout,
    TruncatedNormal,
    XavierNormal,
    XavierUniform,
)
from tests.support.devices import on_devices
from tests.support.tables import values_of

DIM, ROWS = 32, 5_000


def drawn(initializer: Initializer, device: str) -> torch.Tensor:
    table = HashTable([MemberTable("t", initializer)], RecordLayout(DIM), torch.device(device), 1)
    return values_of(table, list(range(ROWS))).double().flatten()


@on_devices
@pytest.mark.parametrize(
    ("initializer", "bound"),
    [
        (XavierUniform(), math.sqrt(6 / (2 * DIM))),
        (XavierUniform(gain=2.0, fan_in=10, fan_out=90), 2 * math.sqrt(6 / 100)),
        (KaimingUniform(), math.sqrt(2.0) * math.sqrt(3 / DIM)),
        (KaimingUniform(gain=1.0, fan_in=12), 0.5),
    ],
)
def test_uniform_values_fill_their_bounds(device: str, initializer: Initializer, bound: float) -> None:
    values = drawn(initializer, device)
    assert float(values.abs().max()) <= bound * (1 + 1e-6)
    assert float(values.abs().max()) > 0.999 * bound
    # The variance of a uniform variable is bound^2 / 3; tolerance: five standard errors of 160,000 numbers.
    assert abs(float(values.square().mean()) / (bound**2 / 3) - 1) < 5 * 0.9 / values.numel() ** 0.5


@on_devices
@pytest.mark.parametrize(
    ("initializer", "std"),
    [
        (XavierNormal(), math.sqrt(2 / (2 * DIM))),
        (XavierNormal(gain=3.0, fan_in=1, fan_out=7), 3 * math.sqrt(2 / 8)),
        (KaimingNormal(), math.sqrt(2 / DIM)),
        (KaimingNormal(gain=1.0, fan_in=4), 0.5),
    ],
)
def test_normal_values_have_their_standard_deviation(device: str, initializer: Initializer, std: float) -> None:
    values = drawn(initializer, device)
    assert abs(float(values.mean())) < 5 * std / values.numel() ** 0.5
    assert abs(float(values.square().mean()) / std**2 - 1) < 5 * (2 / values.numel()) ** 0.5


@on_devices
@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.0), (-1.0, 3.0), (0.5, 1.0), (-4.0, 4.0)])
def test_truncated_normal_is_normal_between_its_bounds(device: str, low: float, high: float) -> None:
    mean, std = 0.5, 0.2
    values = drawn(TruncatedNormal(mean, std, low, high), device)
    assert float(values.min()) >= mean + std * low - 1e-7
    assert float(values.max()) <= mean + std * high + 1e-7
    below, above = (0.5 * (1 + math.erf(end / math.sqrt(2))) for end in (low, high))
    # Kolmogorov-Smirnov: the largest distance between the two cumulative distributions.
    standard = ((values - mean) / std).sort().values
    want = (0.5 * (1 + torch.erf(standard / math.sqrt(2))) - below) / (above - below)
    got = (torch.arange(values.numel(), dtype=torch.float64) + 0.5) / values.numel()
    assert float((want - got).abs().max()) < 1.95 / values.numel() ** 0.5  # p = 0.001


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedNormal(low=1.0, high=1.0), "the bounds must be -4 <= low < high <= 4"),
        (lambda: TruncatedNormal(low=-9.0), "the bounds must be -4 <= low < high <= 4"),
        (lambda: TruncatedNormal(std=-1.0), "TruncatedNormal: std must not be negative"),
        (lambda: XavierUniform(fan_in=0), "XavierUniform: a fan must be at least 1"),
        (lambda: KaimingNormal(gain=float("nan")), "KaimingNormal: values must be finite"),
    ],
)
def test_bad_parameters_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
