from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.saver import CheckpointError, CheckpointMismatch, CorruptCheckpoint, Saver
from recis_hybrid.saver.parts.state_tree import pack, unpack

schedulers = torch.optim.lr_scheduler
SCHEDULERS = [
    lambda o: schedulers.StepLR(o, 2, 0.5),
    lambda o: schedulers.MultiStepLR(o, [2, 2, 5]),
    lambda o: schedulers.CosineAnnealingLR(o, 10),
    lambda o: schedulers.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)], [3]),
    lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
]


def scheduler_of(make: Any, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=0.3)
    scheduler = make(optimizer)
    advance(optimizer, scheduler, steps)
    return optimizer, scheduler


def advance(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers_resume(make: Any, tmp_path: Path) -> None:
    optimizer, scheduler = scheduler_of(make, 4)
    Saver(tmp_path).save(4, {"optimizer": optimizer, "scheduler": scheduler})
    again, other = scheduler_of(make, 1)
    Saver(tmp_path).load({"optimizer": again, "scheduler": other})
    assert other.state_dict() == scheduler.state_dict()
    assert {k: type(v) for k, v in vars(other).items()} == {k: type(v) for k, v in vars(scheduler).items()}
    assert advance(again, other, 5) == advance(optimizer, scheduler, 5)


def test_generators_resume(tmp_path: Path) -> None:
    generator, other = torch.Generator().manual_seed(3), torch.Generator()
    torch.rand(5, generator=generator)
    Saver(tmp_path).save(1, {"generator": generator})
    expected = torch.rand(5, generator=generator)
    Saver(tmp_path).load({"generator": other})
    assert torch.equal(torch.rand(5, generator=other), expected)


def test_a_reading_position_is_restored(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": list(range(10))}), tmp_path / "data.parquet")  # type: ignore[no-untyped-call]
    data, again = (ColumnDataset(tmp_path / "data.parquet", ["x"], 3, shuffle=True) for _ in range(2))
    batches = iter(data)
    next(batches)
    Saver(tmp_path / "run").save(1, {"data": data})
    Saver(tmp_path / "run").load({"data": again})
    for mine, other in zip(batches, again, strict=True):
        assert torch.equal(mine["x"], other["x"])  # type: ignore[arg-type]


def test_another_class_is_refused(tmp_path: Path) -> None:
    _, scheduler = scheduler_of(SCHEDULERS[0], 1)
    Saver(tmp_path).save(1, {"scheduler": scheduler})
    with pytest.raises(CheckpointMismatch, match="class: checkpoint StepLR, live object CosineAnnealingLR"):
        Saver(tmp_path).load({"scheduler": scheduler_of(SCHEDULERS[2], 1)[1]})


class Holder:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def test_state_that_is_not_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="part 'it'.*a.1 cannot be saved"):
        Saver(tmp_path).save(1, {"it": Holder({"a": [1, object()]})})
    assert Saver(tmp_path).steps() == []


plain = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text(max_size=4)
trees = st.recursive(
    plain | st.lists(st.floats(-1, 1, width=32), max_size=3).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@given(trees)
def test_nested_state_round_trips(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    packed = pack("it", value, tensors)
    assert same(unpack("it", packed, tensors), value)


def test_numbers_that_json_lacks_round_trip() -> None:
    packed = pack("it", [math.inf, -math.inf, math.nan], {})
    assert str(unpack("it", packed, {})) == "[inf, -inf, nan]"


@pytest.mark.parametrize(
    "packed", [[1], {}, {"dict": [1]}, {"list": {}}, {"pairs": [[1]]}, {"tensor": "x"}, {"float": "1"}, {"eval": "1"}]
)
def test_invalid_packed_state_is_refused(packed: Any) -> None:
    with pytest.raises(CorruptCheckpoint, match="it: its state is not as it was written"):
        unpack("it", packed, {})
