"""Training for tests of sharded tables: each rank trains on its share of the same global batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Normal, Placement, Uniform
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support import rank_processes
from tests.support.devices import EDGE_IDS
from tests.support.near import ROUNDINGS, assert_near

OPTIMIZERS: dict[str, Any] = {
    "SGD": optim.SGD,
    "Adagrad": optim.Adagrad.spec(initial_accumulator_value=0.1),
    "Adam": optim.Adam,
    "AdamL2": optim.AdamL2,
    "RowwiseAdagrad": optim.RowwiseAdagrad.spec(initial_accumulator_value=0.1),
}


def configs(sharding: str = "row", dim: int = 4) -> dict[str, EmbeddingConfig]:
    """Return configs with all combiners, shared and several logical tables.

    Among them are a table with an admission gate, one with an optimizer of its own, a read-only one, and a frozen
    feature of a trained table.
    """
    narrow = "row" if sharding == "column" else sharding
    normal: dict[str, Any] = {"initializer": Normal(0, 0.1), "sharding": sharding}
    return {
        "user": EmbeddingConfig(dim=dim, **normal),
        "item": EmbeddingConfig(dim=dim, **normal, combiner="mean", weights="item_weight"),
        "item_too": EmbeddingConfig(dim=dim, **normal, table="item", combiner="sqrtn", unknown="zeros"),
        "best": EmbeddingConfig(dim=dim, combiner="max", initializer=Uniform(-1, 1), sharding=sharding),
        "tiled": EmbeddingConfig(dim=dim, **normal, combiner="tile", max_length=2),
        "each": EmbeddingConfig(dim=dim, **normal, combiner=None, table="each"),
        "narrow": EmbeddingConfig(dim=3, **{**normal, "sharding": narrow}, optimizer=OPTIMIZERS["Adagrad"]),
        "rare": EmbeddingConfig(dim=dim, **normal, admission=MinFrequency(4), unknown="zeros"),
        "frozen": EmbeddingConfig(dim=dim, **normal, trainable=False),
        "item_frozen": EmbeddingConfig(dim=dim, **normal, table="item", unknown="zeros", trainable=False),
    }


def global_batch(seed: int, samples: int = 24, ids: int = 30) -> Batch:
    """Return the global batch of all ranks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        few = torch.cat([torch.tensor(EDGE_IDS), torch.arange(100, 100 + ids)])
        return few[torch.randint(0, len(few), shape, generator=generator)]

    def lists(longest: int) -> RaggedTensor:
        lengths = torch.randint(0, longest + 1, (samples,), generator=generator)
        return RaggedTensor(draw(int(lengths.sum())), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))

    item = lists(5)
    weight = torch.rand(item.values.numel(), generator=generator) + 0.5
    return {
        "user": draw(samples),
        "item": item,
        "item_weight": RaggedTensor(weight, item.offsets),
        "item_too": lists(3),
        "best": lists(4),
        "tiled": lists(4),
        "each": draw(samples, 2),
        "narrow": draw(samples),
        "rare": draw(samples),
        "frozen": draw(samples),
        "label": torch.rand(samples, generator=generator),
        "item_frozen": lists(3),
    }


def part_of(batch: Batch, begin: int, end: int) -> Batch:
    """Return the samples ``begin`` to ``end`` of a batch."""
    return {name: column[begin:end] for name, column in batch.items()}


def shares(samples: int, ranks: int, uneven: bool) -> list[int]:
    """Return the boundaries of the ranks' samples, one more than the number of ranks."""
    if uneven:  # the second to last rank has none
        cuts = sorted(samples * k * k // (ranks * ranks) for k in range(ranks + 1))
        if ranks > 1:
            cuts[-2] = cuts[-1]
        return cuts
    return [samples * k // ranks for k in range(ranks + 1)]


class Model(nn.Module):
    """An engine and a linear tower over all its outputs."""

    def __init__(self, engine: EmbeddingEngine, width: int) -> None:
        super().__init__()
        self.engine = engine
        self.tower = nn.Linear(width, 1)
        with torch.no_grad():
            self.tower.weight.copy_(torch.linspace(-1, 1, width).view(1, -1))
            self.tower.bias.fill_(0.1)

    def forward(self, batch: Batch) -> Tensor:
        parts = [part.flatten(1) for part in self.engine(batch).values()]
        return self.tower(torch.cat(parts, 1))[:, 0]  # type: ignore[no-any-return]


@dataclass
class Job:
    """Training settings."""

    rule: str = "SGD"
    steps: int = 1
    sharding: str = "row"
    dim: int = 4
    uneven: bool = False
    clip: float | None = None
    accumulate: int = 1
    lr: float = 0.1
    engine: dict[str, Any] = field(default_factory=dict)
    functional: bool = False
    samples: int = 24
    prefetch: int = 0
    placement: Placement | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def train(group: dist.ProcessGroup, job: Job) -> dict[str, Any]:
    """Train; return losses, predictions, the tower and this rank's rows."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(
        {name: replace(config, placement=job.placement) for name, config in configs(job.sharding, job.dim).items()},
        optimizer=OPTIMIZERS[job.rule],
        seed=3,
        group=group,
        prefetch_group=rank_processes.AHEAD.get(ranks),
        **job.engine,
    )
    width = sum(config.width for config in engine.configs.values()) + engine.configs["each"].dim
    model = Model(engine, width)
    sparse = getattr(optim, job.rule)(engine.parameters(), lr=job.lr, **job.settings)
    dense = torch.optim.SGD(model.tower.parameters(), lr=job.lr)
    losses = []
    cuts = shares(job.samples, ranks, job.uneven)
    batches = [
        part_of(global_batch(number, job.samples), cuts[rank], cuts[rank + 1])
        for number in range(job.steps * job.accumulate)
    ]
    ahead = 0
    for step in range(job.steps):
        sparse.zero_grad()
        dense.zero_grad()
        total = torch.zeros(())
        for micro in range(job.accumulate):
            number = step * job.accumulate + micro
            while job.prefetch and ahead < min(len(batches), number + job.prefetch):
                engine.prefetch(batches[ahead])
                ahead += 1
            batch = batches[number]
            mine = batch["label"].shape[0]
            loss = (model(batch) - batch["label"]).square().mean() if mine else model(batch).sum() * 0
            loss.backward()
            if job.engine.get("staleness") and step + 1 < job.steps:
                engine.prefetch_rows()
            total += loss.detach() * mine / job.samples
        for parameter in model.tower.parameters():
            # Like DistributedDataParallel, but weighted by samples, so that it equals the mean of one process.
            assert parameter.grad is not None
            gradient = parameter.grad * (cuts[rank + 1] - cuts[rank]) / job.samples
            dist.all_reduce(gradient, group=group)
            parameter.grad = gradient
        if job.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        sparse.step()
        dense.step()
        dist.all_reduce(total, group=group)
        losses.append(total.item())
    return {
        "losses": losses,
        "tables": rows_of(engine),
        "tower": model.tower.weight.detach(),
        "predictions": predictions(model, rank, ranks),
        "evicted": sum(use.written_back for table in engine.tables if (use := table.cache_statistics()) is not None),
    }


def rows_of(engine: EmbeddingEngine) -> dict[str, dict[str, Tensor]]:
    """Return this rank's rows by member table."""
    return {member.name: table.export(number) for table in engine.tables for number, member in enumerate(table.members)}


@torch.no_grad()
def predictions(model: Model, rank: int, ranks: int) -> Tensor:
    """Return the predictions in eval mode for this rank's samples of a batch with unknown ids."""
    model.eval()
    before = sum(len(table) for table in model.engine.tables)
    cuts = shares(24, ranks, False)
    found = model(part_of(global_batch(10_000, ids=300), cuts[rank], cuts[rank + 1]))
    assert sum(len(table) for table in model.engine.tables) == before
    return found


def merged(results: list[dict[str, Any]], *, sharding: str = "row") -> dict[str, dict[str, Tensor]]:
    """Return the rows of all ranks in order of ids, with the columns of column-sharded rows concatenated.

    Replicated rows are compared and returned once.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    for name in results[0]["tables"]:
        each = [result["tables"][name] for result in results]
        if sharding == "replicated" or (sharding == "column" and name != "narrow"):
            each = [{key: values[part["ids"].argsort()] for key, values in part.items()} for part in each]
            same = [key for key, values in each[0].items() if sharding == "replicated" or values.dim() == 1]
            for other in each[1:]:
                assert all(torch.equal(other[key], each[0][key]) for key in same), name
            split = {key: torch.cat([part[key] for part in each], 1) for key in each[0] if key not in same}
            each = [{**each[0], **split}]
        whole = {column: torch.cat([part[column] for part in each]) for column in each[0]}
        order = whole["ids"].argsort()
        tables[name] = {column: values[order] for column, values in whole.items()}
    return tables


def assert_same(
    got: list[dict[str, Any]], expected: list[dict[str, Any]], allowed: float = ROUNDINGS, *, sharding: str = "row"
) -> None:
    """Assert that losses, rows and predictions agree within ``allowed`` roundings."""
    assert_near(got[0]["losses"], expected[0]["losses"], allowed, where="losses")
    ours, theirs = merged(got, sharding=sharding), merged(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert_near(ours[name], theirs[name], allowed, where=name)
    predicted = [torch.cat([each["predictions"] for each in results]) for results in (got, expected)]
    assert_near(*predicted, allowed, where="predictions")


USES = [
    # For each step and each of two parts, the features in its loss; an empty list means no backward.
    [["user", "item", "best"], ["item", "best", "tiled", "narrow"]],
    [["user", "each"], []],
    [[], []],
    [["item_too", "user"], ["item"]],
    [[], ["user", "item", "item_too", "best", "tiled", "each", "narrow"]],
]


def train_parts(group: dist.ProcessGroup, sharding: str, rule: str, dim: int = 4) -> dict[str, Any]:
    """Train on two parts of each batch with separate losses: on two ranks, or sequentially in one process."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    named = {name: config for name, config in configs(sharding, dim).items() if name != "rare"}
    engine = EmbeddingEngine(named, optimizer=OPTIMIZERS[rule], seed=3, group=group, reduce="sum")
    sparse = getattr(optim, rule)(engine.parameters(), lr=0.1)
    cuts = shares(24, 2, False)
    for step, uses in enumerate(USES):
        outputs = []
        for part in [rank] if ranks == 2 else [0, 1]:
            outputs.append((uses[part], engine(part_of(global_batch(step), cuts[part], cuts[part + 1]))))
        sparse.zero_grad()  # some programs call this between forward and backward
        for used, values in outputs:
            for times in range(2 if used and step == 0 else 1):
                if used:
                    loss = sum((values[name] - 0.3).square().sum() for name in used)
                    assert isinstance(loss, Tensor)
                    loss.backward(retain_graph=times == 0)
        if step == 3:
            nn.utils.clip_grad_norm_(engine.parameters(), 0.5)
        sparse.step()
    return {"losses": [], "tables": rows_of(engine), "predictions": torch.zeros(0), "watched": watched(engine)}


def watched(engine: EmbeddingEngine) -> int:
    """Return the number of lookups that still expect gradients."""
    sharded = engine._sharded
    return 0 if sharded is None else sum(len(table.gradients._lookups) for table in sharded.tables)
