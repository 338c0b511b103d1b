"""Lists of any number of features reach an accelerator without a copy, so that a CUDA graph can hold the calls."""

from __future__ import annotations

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.features import Bucketize, Feature, FeatureEngine, Hash, Mod
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support import emulated
from tests.support.devices import on_devices

NAMES = [f"f{k}" for k in range(100)]


def batch_of(device: str, seed: int) -> Batch:
    """Return 100 columns, of one id or of up to four ids per row."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (6,), generator=draw)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    batch: Batch = {}
    for number, name in enumerate(NAMES):
        ids = torch.randint(0, 50, (int(offsets[-1]) if number % 2 else 6,), generator=draw).to(device)
        batch[name] = RaggedTensor(ids, offsets.to(device)) if number % 2 else ids
    return batch


def trained(device: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], dict[str, int]]:
    """Train three steps; return the rows, the vectors of the last step, and what the device did in it."""
    config = EmbeddingConfig(dim=4, table="shared", combiner="mean")
    engine = EmbeddingEngine(dict.fromkeys(NAMES, config), optimizer=optim.Adam, device=device)
    optimizer = engine.make_optimizer(lr=0.1)
    counts, vectors = {}, []
    for number in range(3):
        batch = batch_of(device, number)
        if device == "emulated":
            emulated.clear_counts()
        optimizer.zero_grad()
        vectors = list(engine(batch).values())
        torch.stack(vectors).square().sum().backward()
        optimizer.step()
        if device == "emulated":
            counts = emulated.counts()
    (rows,) = engine.tables[0].export_all()
    return rows, vectors, counts


@on_devices
def test_a_step_of_a_hundred_features(device: str) -> None:
    rows, vectors, counts = trained(device)
    expected, expected_vectors, _ = trained("cpu")
    assert [name for name in expected if not torch.equal(rows[name].cpu(), expected[name])] == []
    assert all(torch.equal(one.cpu(), other) for one, other in zip(vectors, expected_vectors, strict=True))
    assert counts.get("pageable_copies", 0) == 0


@pytest.mark.emulated
@pytest.mark.parametrize("fuse", [True, False])
def test_operations_on_a_hundred_columns(fuse: bool) -> None:
    features = [
        Feature(name, ops=[Hash(), Mod(97 + number)] if number % 2 else [Mod(11), Bucketize([2, 5])])
        for number, name in enumerate(NAMES)
    ]
    engine, expected = FeatureEngine(features, fuse=fuse), FeatureEngine(features)(batch_of("cpu", 0))
    batch = batch_of("emulated", 0)
    engine(batch)
    emulated.clear_counts()
    found = engine(batch)
    assert emulated.counts()["pageable_copies"] == 0
    for name, column in expected.items():
        for one, other in zip(parts(found[name]), parts(column), strict=True):
            assert torch.equal(one.cpu(), other)


def parts(column: torch.Tensor | RaggedTensor) -> list[torch.Tensor]:
    return [column] if isinstance(column, torch.Tensor) else [column.values, column.offsets]
