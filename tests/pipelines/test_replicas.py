"""Without DistributedDataParallel, towers are bitwise equal on all ranks and match one process with all rows."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from recis_hybrid import distributed, optim
from recis_hybrid.checkpointing import tables_apart
from recis_hybrid.columnio import ColumnDataset, Windows
from recis_hybrid.embedding import (
    Constant,
    EmbeddingConfig,
    EmbeddingEngine,
    ExchangeError,
    Normal,
    dense_parameters,
    leave_out_of_ddp,
)
from recis_hybrid.metrics import AUC, Calibration, LogLoss
from recis_hybrid.pipelines import (
    Evaluate,
    Mixture,
    NonFiniteGradientError,
    Objective,
    TorchStep,
    Train,
    Trainer,
    UncertaintyWeights,
    WindowStages,
)
from recis_hybrid.ragged import Batch
from tests.support.near import ROUNDINGS, assert_near
from tests.support.programs import free_port, in_processes
from tests.support.small import bce

ROWS, SIZE = 16, 9  # rows of each batch, number of batches
RANKS = 2


class Model(nn.Module):
    """Two heads, an unused parameter, one that only some batches use, a frozen one, and a buffer."""

    def __init__(
        self, *, norm: bool = False, jax: bool = False, private: bool = False, overflows: bool = False
    ) -> None:
        super().__init__()
        group: Any = False if private else None
        configs = {"id": EmbeddingConfig(dim=4, initializer=Normal(0.0, 0.5))}
        if overflows:
            configs["same"] = EmbeddingConfig(dim=4, initializer=Constant(0.0))
        self.overflows = overflows
        self.engine = EmbeddingEngine(configs, optimizer=optim.SGD, group=group)
        hidden: nn.Module = nn.Linear(4, 4)
        if jax:
            import jax.numpy as jnp

            from recis_hybrid.bridge import JaxTower

            hidden = JaxTower(lambda params, x: jnp.tanh(x @ params["w"]), {"w": torch.randn(4, 4)})
        self.hidden, self.head = hidden, nn.Linear(4, 2)
        self.norm: nn.Module = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.unused = nn.Parameter(torch.randn(3))
        self.sometimes = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("constant", torch.rand(3))

    def forward(self, batch: Batch) -> Any:
        ids = batch["id"]
        assert isinstance(ids, Tensor)
        embeddings = self.engine(batch)
        hidden = self.norm(torch.tanh(self.hidden(embeddings["id"])))
        outputs = self.head(hidden) * self.constant.mean() + self.frozen.mean()
        if self.overflows:
            # The scaled gradient of one row overflows float32 on the rank that owns the row.
            huge = 3e38 * (ids == 7).float()
            outputs = outputs + (embeddings["same"] * huge[:, None]).sum(1, keepdim=True)
        if bool((ids > 34).any()):
            outputs = outputs + self.sometimes
        return {"a": outputs[:, 0], "b": outputs[:, 1]}


class LearnedLoss(nn.Module):
    """A loss with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(2))
        self.register_buffer("constant", torch.rand(()))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return bce(outputs * self.factor[0] + self.constant, labels)


def whole(batches: int = SIZE, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    result: list[Batch] = []
    for number in range(batches):
        # The last batch is short.
        ids = torch.randint(0, 40, (ROWS if number < batches - 1 else 5,), generator=generator)
        result.append({"id": ids, "same": ids, "label": (ids % 2).float(), "other": (ids % 3 == 0).float()})
    return result


def joint(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}  # type: ignore[misc]


def rank_batches(batches: list[Batch]) -> list[Batch]:
    """Return this rank's batches; rank 1 has one less. One process gets the batches of each step joined."""
    if distributed.world_size() == 1:
        return [joint(batches[turn : turn + RANKS]) for turn in range(0, len(batches), RANKS)]
    return batches[distributed.rank() :: RANKS]


@dataclass
class Case:
    """Settings of a training."""

    model: dict[str, bool] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    decay: float = 0.0
    ddp: Callable[[Model], nn.Module] = lambda model: model
    close: bool = True
    """True if one process computes the same values."""
    prefetch: int | None = None


def partly(model: Model) -> nn.Module:
    if distributed.world_size() > 1:
        model.head = DistributedDataParallel(model.head)  # type: ignore[assignment]
    return model


def wholly(model: Model) -> nn.Module:
    if distributed.world_size() == 1:
        return model
    leave_out_of_ddp(model)
    return DistributedDataParallel(model, find_unused_parameters=True)


CASES = {
    "plain": Case(),
    "clipped": Case(step={"clip_grad_norm": 0.05}),
    "accumulated": Case(accumulate=3, step={"clip_grad_norm": 0.5}),
    "decayed": Case(decay=0.1),
    "not ahead": Case(prefetch=0),
    "far ahead": Case(prefetch=1, accumulate=2),
    "weighted": Case(step={"weighting": True}),
    "float16": Case(step={"precision": "float16", "loss_scale": 2.0**40, "clip_grad_norm": 1.0}, close=False),
    "overflow on one rank": Case(
        model={"overflows": True}, step={"precision": "float16", "loss_scale": 4096.0}, close=False
    ),
    "bfloat16": Case(step={"precision": "bfloat16"}, close=False),
    "norm": Case(model={"norm": True}, close=False),
    # DistributedDataParallel weights ranks equally, regardless of their numbers of rows.
    "partly in DDP": Case(ddp=partly, close=False),
    "in DDP": Case(ddp=wholly, close=False),
    "jax": Case(model={"jax": True}),
}
if importlib.util.find_spec("jax") is None:
    del CASES["jax"]


def run(case: Case) -> dict[str, Tensor]:
    """Train, and return all values that must be equal on all ranks."""
    # Ranks start with different parameters. Rank 0 starts with those of the single process.
    torch.manual_seed(distributed.rank())
    model = Model(**case.model)
    options = dict(case.step)
    weights = UncertaintyWeights(["a", "b"])
    weight_parameters = []
    if options.pop("weighting", False):
        options["weighting"], weight_parameters = weights, [*weights.parameters()]
    learned_loss = LearnedLoss()  # belongs to no model
    if case.prefetch and model.engine.prefetch_depth:
        model.engine.prefetch_depth = (case.prefetch + 1) * case.accumulate
        model.engine._prefetcher._depth = model.engine.prefetch_depth  # type: ignore[union-attr]
    wrapped = case.ddp(model)

    dense_and_loss = [*dense_parameters(model), *weight_parameters, *learned_loss.parameters()]
    dense = torch.optim.SGD(dense_and_loss, lr=0.5, weight_decay=case.decay)
    sparse = optim.SGD(model.engine.parameters(), lr=0.5)
    step = TorchStep(
        wrapped,
        {"a": Objective(loss=learned_loss), "b": Objective(loss=bce, label="other", weight=0.5)},
        {"dense": dense, "sparse": sparse},
        **options,
    )
    trainer = Trainer(
        step,
        rank_batches(whole()),
        rank_batches(whole(3, seed=1)),
        accumulate=case.accumulate,
        log_every=2,
        prefetch=case.prefetch,
        metrics={"a": {"loss": LogLoss(), "auc": AUC(), "calibration": Calibration()}},
    )
    figures = trainer.fit([Train(epochs=2), Evaluate()])
    rows = (SIZE - 1) * ROWS + 5
    samples = torch.tensor(trainer.samples)
    if distributed.world_size() > 1:
        dist.all_reduce(samples)
    assert int(samples) == 2 * rows
    assert trainer.steps_done == 2 * math.ceil(math.ceil(SIZE / RANKS) / case.accumulate)
    with tables_apart():
        names = {name.replace("module.", ""): value for name, value in model.state_dict().items()}
    values = {name: value for name, value in names.items() if isinstance(value, Tensor)}
    values |= {"loss": learned_loss.factor.detach(), "weights": weights.log_variances.detach()}
    values |= {name: torch.tensor(value) for name, value in figures["eval"].items()}
    if options.get("precision") == "float16":
        values["scale"] = torch.tensor(step._scaler.get_scale())
        # Some updates were skipped, but not all.
        assert 2.0**-30 < float(values["scale"]) < options["loss_scale"]
    return values


def check_errors(rank: int, folder: Path) -> None:
    """Check that all ranks raise, and none hangs, for models that cannot be trained on several ranks."""

    def trainer(model: Model, data: Any, **options: Any) -> Trainer:
        optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.1), optim.SGD(model.engine.parameters(), lr=0.1)]
        return Trainer(TorchStep(model, {"a": Objective(loss=bce)}, optimizers), data, **options)

    with pytest.raises(ValueError, match="the tables of the step are shared by 1, and ranks would train different"):
        trainer(Model(private=True), rank_batches(whole())).fit([Train()])
    model = Model()
    if rank == 1:
        model.head = nn.Linear(4, 2, bias=False)
    with pytest.raises(ValueError, match="parameters or buffers of towers differ"):
        trainer(model, rank_batches(whole())).fit([Train()])
    model = Model()
    dense = torch.optim.Adam(dense_parameters(model), lr=0.1 * (1 + rank))
    sparse = optim.SGD(model.engine.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=f"hyperparameters of optimizers differ.* Rank {rank} has .*{dense.defaults['lr']}"
    ):
        Trainer(TorchStep(model, {"a": Objective(loss=bce)}, [dense, sparse]), rank_batches(whole())).fit([Train()])
    model = Model()
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.1), optim.SGD(model.engine.parameters(), lr=0.1)]
    step = TorchStep(model, {"a": Objective(loss=bce)}, optimizers, check_gradients=True)
    batch = rank_batches(whole())[0]
    step(batch)
    before = [parameter.clone() for parameter in dense_parameters(model)]
    label = batch["label"]
    assert isinstance(label, Tensor)
    # The gradients of towers are averaged before they are checked, those of rows are not.
    message = r"updated: on rank 0, parameter .*; on rank 1, feature 'id' of the table 'id' .*columns 'label' .* of the"
    with pytest.raises(NonFiniteGradientError, match=message):
        step({**batch, "label": label * math.nan} if rank == 1 else batch)
    assert all(map(torch.equal, before, dense_parameters(model)))
    step(batch)
    for stage in (Train(), Evaluate(data="train")):
        data: list[Batch] = whole(3) if rank == 0 else []
        with pytest.raises(ValueError, match=r"ranks \[1\] have no batch, but others do"):
            trainer(Model(), data).fit([stage])
        with pytest.raises(ValueError, match="yielded no"):
            trainer(Model(), []).fit([stage])

    def failing() -> Iterator[Batch]:
        yield from whole(3)
        if rank == 1:
            raise OSError("the disk is gone")
        yield from whole(3)

    class Failing:
        def __iter__(self) -> Iterator[Batch]:
            return failing()

    for stage in (Train(epochs=1), Evaluate(data="train")):
        with pytest.raises((OSError, ExchangeError)) as caught:
            trainer(Model(), Failing()).fit([stage])
        expected = ["ranks [1] could not read their next batch", "the disk is gone"]
        assert expected[rank] in str(caught.value)

    class NoSync:
        def __init__(self) -> None:
            self.engines = [Model().engine]

        def __call__(self, *batches: Batch) -> dict[str, Tensor]:
            return {"loss": torch.zeros(())}

        def predict(self, batch: Batch) -> dict[str, Any]:
            return {}

        def parts(self) -> dict[str, object]:
            return {}

    with pytest.raises(ValueError, match=r"the step \(NoSync\) has no synchronize\(\) and expect\(\)"):
        Trainer(NoSync(), whole()).fit([Train()])

    class Sparse(Model):
        def __init__(self) -> None:
            super().__init__()
            self.pooled = nn.EmbeddingBag(50, 1, sparse=True)

        def forward(self, batch: Batch) -> Any:
            outputs = super().forward(batch)
            return {"a": outputs["a"] + self.pooled(batch["id"][:, None])[:, 0]}  # type: ignore[index]

    with pytest.raises(ValueError, match="the gradient of pooled.weight is sparse"):
        trainer(Sparse(), rank_batches(whole())).fit([Train()])


def check_sources(rank: int, folder: Path) -> None:
    """Check that every row of loaders, mixtures and windows of unequal length is read once, and ranks end together."""

    def train(data: Any, stages: Any, **options: Any) -> tuple[int, list[int]]:
        model = Model()
        optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.1), optim.SGD(model.engine.parameters(), lr=0.1)]
        seen: list[int] = []

        def record(batch: Batch) -> Batch:
            seen.extend(batch["id"].tolist())  # type: ignore[union-attr]
            return batch

        step = TorchStep(model, {"a": Objective(loss=bce)}, optimizers)
        trainer = Trainer(step, data, transform=record, **options)
        trainer.fit(stages)
        digests = [""] * RANKS
        dist.all_gather_object(digests, digest({name: p.detach() for name, p in model.named_parameters()}))
        assert digests[0] == digests[1]
        every: list[Any] = [None] * RANKS
        dist.all_gather_object(every, seen)
        return trainer.steps_done, sorted(row for rows in every for row in rows)

    ids = sorted(joint(whole())["id"].tolist())  # type: ignore[union-attr]
    loader: Any = DataLoader(rank_batches(whole()), batch_size=None)  # type: ignore[arg-type]
    assert train(loader, [Train()]) == (5, ids)
    steps, rows = train(
        Mixture({"a": rank_batches(whole()), "b": whole(2)}, {"a": 1, "b": 1}, seed=1), [Train(max_steps=8)]
    )
    assert (steps, len(rows) > 0) == (8, True)
    days = WindowStages(
        Windows([["0"], ["1"]]), lambda day: [Evaluate(window=day, metrics={}), Train(window=day, epochs=1)]
    )
    steps, rows = train(None, days, open_window=lambda day: rank_batches(whole(3, seed=int(day.name))))
    assert (steps, len(rows)) == (4, 2 * 2 * (2 * ROWS + 5))
    # A file whose last step has fewer rows than there are ranks.
    data = ColumnDataset(folder / "rows.parquet", ["id", "label", "other"], 8)
    assert len(data) == 4
    assert train(data, [Train(), Evaluate(data="train", metrics={"a": {"auc": AUC()}})])[1] == sorted([*range(49)] * 2)


def check_warning_for_same_batches(rank: int) -> None:
    """Check that rank 0 warns once if all ranks train on the same rows."""
    model = Model()
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.1), optim.SGD(model.engine.parameters(), lr=0.1)]
    for data, count in ((whole(), 1 - rank), (rank_batches(whole()), 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(TorchStep(model, {"a": Objective(loss=bce)}, optimizers), data).fit([Train(epochs=2)])
        matching = [each for each in caught if "have the same first batch" in str(each.message)]
        assert len(matching) == count


def digest(tensors: dict[str, Tensor]) -> str:
    return sha256(b"".join(value.contiguous().numpy().tobytes() for value in tensors.values())).hexdigest()


def on_rank(rank: int, port: int, folder: Path, expected: dict[str, dict[str, np.ndarray]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    for name, case in CASES.items():
        values = run(case)
        digests = [""] * RANKS
        dist.all_gather_object(digests, digest(values))
        assert digests[0] == digests[1], name
        if case.close:
            for key, value in values.items():
                assert_near(value, expected[name][key], 4 * ROUNDINGS, where=f"{name}.{key}")
    check_errors(rank, folder)
    check_sources(rank, folder)
    check_warning_for_same_batches(rank)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_train_like_one_process_without_ddp(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"id": range(49), "label": [float(n % 2) for n in range(49)], "other": [0.0] * 49}),
        tmp_path / "rows.parquet",
    )
    expected = {
        name: {key: value.numpy() for key, value in run(case).items()} for name, case in CASES.items() if case.close
    }
    port = free_port()
    in_processes(on_rank, (port, tmp_path, expected), RANKS)
