"""Training under many schedules of threads, on the emulated device: bitwise that of the CPU, whatever the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Placement, StateField, Uniform
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support import emulated
from tests.support.caches import cached
from tests.support.schedules import Schedule, on_schedules


class InPython(optim.Custom):
    """Adagrad."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        return (StateField("sum"),)

    @staticmethod
    def update(rows: Tensor, gradients: Tensor, state: Any, settings: Any, step: int) -> None:
        state["sum"] += gradients * gradients
        rows -= settings["lr"] * gradients / (state["sum"].sqrt() + 1e-8)


RULES: dict[str, Any] = {
    "sgd": optim.SGD,
    "momentum": optim.SGD.spec(momentum=0.9),
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
}
VARIANTS: dict[str, Any] = {
    "nesterov": optim.SGD.spec(momentum=0.9, weight_decay=0.1, nesterov=True),
    "adagrad_decay": optim.Adagrad.spec(weight_decay=0.1, lr_decay=0.1),
    "rowwise_adagrad_counter": optim.RowwiseAdagrad.spec(weight_decay=0.1, counter_halflife=2.0),
    "adam_l2": optim.AdamL2.spec(weight_decay=0.1),
    "amsgrad": optim.AMSGrad.spec(weight_decay=0.1),
    "rmsprop": optim.RMSprop,
    "ftrl": optim.FTRL.spec(l1=0.1, l2=0.1),
    "lion": optim.Lion.spec(weight_decay=0.1),
    "lamb": optim.LAMB.spec(weight_decay=0.1),
    "rowwise_adam": optim.RowwiseAdam,
    "custom": InPython,
}
BY_NORM = {"rowwise_adagrad", "rowwise_adagrad_counter", "lamb", "rowwise_adam"}
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.02}
COMBINERS: dict[str, dict[str, Any]] = {
    "one": {"combiner": None},
    "mean": {"combiner": "mean"},
    "sqrtn": {"combiner": "sqrtn", "table": "mean"},
    "greatest": {"combiner": "max"},
    "tile": {"combiner": "tile", "max_length": 2},
    "rare": {"combiner": "sum", "admission": MinFrequency(2)},
}


def batch_of(generator: torch.Generator) -> Batch:
    batch: Batch = {}
    for name in COMBINERS:
        lengths = torch.randint(0, 4, (12,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = torch.randint(-5, 15, (int(offsets[-1]),), generator=generator)
        weights = torch.rand(ids.numel(), generator=generator) if name in ("mean", "rare") else None
        batch[name] = RaggedTensor(ids, offsets, weights)
    return batch


def trained(device: str, rule: Any, config: dict[str, Any], batches: list[Batch], max_norm: float | None) -> list[Any]:
    """Return the vectors of each step, and all rows with their optimizer state by id."""
    configs = {name: EmbeddingConfig(**config, **COMBINERS[name]) for name in COMBINERS}
    engine = EmbeddingEngine(configs, optimizer=rule, device=device)
    optimizer = engine.make_optimizer(lr=0.05)
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        vectors = engine({name: column.to(device) for name, column in batch.items()})
        found.append({name: part.detach() for name, part in vectors.items()})
        torch.stack([((part - 0.5) ** 2).sum() for part in vectors.values()]).sum().backward()
        if max_norm is not None:
            optim.clip_row_norm_(engine.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    found += [member for table in engine.tables for member in table.export_all()]
    return [{name: values.cpu() for name, values in each.items()} for each in found]


@pytest.mark.parametrize("rule", RULES)
@on_schedules(10)
def test_training_is_that_of_the_cpu(rule: str, schedule: Schedule) -> None:
    compare(RULES[rule], schedule, by_norm=rule in BY_NORM)


@pytest.mark.parametrize("rule", VARIANTS)
@on_schedules(2)
def test_training_by_variants_is_that_of_the_cpu(rule: str, schedule: Schedule) -> None:
    compare(VARIANTS[rule], schedule, by_norm=rule in BY_NORM)


def compare(rule: Any, schedule: Schedule, *, by_norm: bool) -> None:
    with schedule.running() as generator:
        draw = torch.randint(0, 2**30, (4,), generator=generator).tolist()
        dtype = [torch.float32, torch.bfloat16][draw[0] % 2]
        dim = [1, 6, 16, 33, 64][draw[1] % 5]
        max_norm = [None, 0.3][draw[2] % 2]
        config = {"dim": dim, "dtype": dtype, "initializer": Uniform(-1, 1)}
        batches = [batch_of(generator) for _ in range(3)]
        expected = trained("cpu", rule, config, batches, max_norm)
        config["placement"] = [
            Placement(id_map="cuda", blocks="cuda"),
            Placement(id_map="cuda", blocks="pinned"),
            cached(1, rule, **config),
            cached(2, rule, "cpu", **config),
        ][draw[3] % 4]
        found = trained("emulated", rule, config, batches, max_norm)
        assert [each.keys() for each in found] == [each.keys() for each in expected]
        if by_norm:  # sums over the lanes of a row, which the CPU adds in another order
            for ours, theirs in zip(found, expected, strict=True):
                for name, values in theirs.items():
                    torch.testing.assert_close(ours[name], values, rtol=NEAR[dtype], atol=NEAR[dtype])
            emulated.configure()
            expected = trained("emulated", rule, config, batches, max_norm)
        for ours, theirs in zip(found, expected, strict=True):
            assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
