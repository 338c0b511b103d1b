"""Launches, copies and host synchronizations of a training step, against the table of ``benchmarks/GPU.md``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Placement
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support import emulated

ROWS = 256


def single(number: int, device: str) -> torch.Tensor:
    return (torch.arange(ROWS) * 7919 % (100 + number)).to(device)


def bags(number: int, device: str) -> RaggedTensor:
    lengths = torch.arange(ROWS) % 4
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return RaggedTensor(torch.arange(int(offsets[-1])) * 31 % (50 + number), offsets).to(device)


CACHED = Placement(id_map="cuda", blocks="pinned", cache_bytes=1 << 20)
"""A cache for 1,300 records of 64 elements with the state of Adam, more than the rows of a batch."""

Make = Callable[[int, str], Any]
ONE = {"f": EmbeddingConfig(dim=64)}
CLIP: dict[str, Callable[[EmbeddingEngine], Any]] = {
    "one feature, clipped by the norm": lambda engine: torch.nn.utils.clip_grad_norm_(engine.parameters(), 1.0),
    "one feature, each row clipped": lambda engine: optim.clip_row_norm_(engine.parameters(), 1.0),
}
CASES: dict[str, tuple[dict[str, EmbeddingConfig], Make, str]] = {
    "one feature": (ONE, single, "emulated"),
    **dict.fromkeys(CLIP, (ONE, single, "emulated")),
    "one feature, cached blocks": ({"f": EmbeddingConfig(dim=64, placement=CACHED)}, single, "emulated"),
    "100 features, one table": ({f"f{n}": EmbeddingConfig(dim=16) for n in range(100)}, single, "emulated"),
    "the same, batch on the CPU": ({f"f{n}": EmbeddingConfig(dim=16) for n in range(100)}, single, "cpu"),
    "4 features, 4 tables": ({f"f{dim}": EmbeddingConfig(dim=dim) for dim in (8, 16, 32, 64)}, single, "emulated"),
    "10 features of pooled bags, one table": (
        {f"f{n}": EmbeddingConfig(dim=16, combiner=("sum", "mean")[n % 2]) for n in range(10)},
        bags,
        "emulated",
    ),
}


def counted(case: str) -> str:
    """Return the row of the table for a case."""
    configs, make, where = CASES[case]
    engine = EmbeddingEngine(configs, optimizer=optim.Adam, device="emulated")
    optimizer = engine.make_optimizer(lr=0.1)
    batch: Batch = {name: make(number, where) for number, name in enumerate(configs)}
    gradients = None
    for _ in range(4):
        emulated.clear_counts()
        optimizer.zero_grad()
        outputs = list(engine(batch).values())
        gradients = gradients or [torch.ones_like(output) for output in outputs]
        torch.autograd.backward(outputs, gradients)
        if case in CLIP:
            CLIP[case](engine)
        optimizer.step()
        of = emulated.counts()
    from_host = f"{of['copies_to_device']} ({of['pageable_copies']})"
    columns = (of["launches"], of["cub_calls"], of["memsets"], from_host, of["copies_from_device"])
    columns += (of["copies_on_device"], of["synchronizations"], of["fallbacks"])
    return f"| {case} | {' | '.join(map(str, columns))} |"


@pytest.mark.emulated
@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_the_device_as_often_as_documented(root: Path, case: str) -> None:
    row = counted(case)
    assert row in (root / "benchmarks" / "GPU.md").read_text().splitlines(), f"put into benchmarks/GPU.md: {row}"


@pytest.mark.emulated
@pytest.mark.parametrize("clip", CLIP.values(), ids=CLIP)
def test_clipping_writes_only_rows_in_use(clip: Callable[[EmbeddingEngine], Any]) -> None:
    engine = EmbeddingEngine(ONE, device="emulated")
    ids = single(0, "emulated")
    outputs = engine({"f": ids})["f"]
    outputs.backward(torch.ones_like(outputs))
    clip(engine)
    gradients = engine.tables[0].pending.gradients()
    (sums,), count = gradients.values, int(gradients.groups.count)
    words = sums.cpu().view(torch.int32)
    assert (list(sums.shape), count) == ([ROWS, 64], 100)
    poison = torch.frombuffer(bytearray(b"\xa5" * 4), dtype=torch.int32)  # of fresh memory
    assert not bool((words[:count] == poison).any())
    assert bool((words[count:] == poison).all())
