"""Tables under torch.compile, torch.export and TorchScript."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, FeatureIds, dense_parameters
from recis_hybrid.features import Feature, FeatureEngine, Mod
from recis_hybrid.ops.gather import MAX, MEAN
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support import sharded
from tests.support.near import OF_ADAM, assert_near
from tests.support.rank_processes import Ranks
from tests.support.sharded import Job, assert_same

pytestmark = [
    # Raised by torch: when inductor is imported, and when Dynamo inspects the outputs of a graph break.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

COMBINERS: list[Any] = ["sum", "mean", "sqrtn", "max", "tile", None]
FORMS = [("dense", combiner) for combiner in COMBINERS] + [("ragged", combiner) for combiner in COMBINERS]
COMPILED = [(backend, dynamic) for backend in ("eager", "inductor") for dynamic in (None, True, False)]
PAIRS = [list(pair) for pair in itertools.combinations(FORMS, 2)]


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def column(form: str, rows: int, shift: int) -> Tensor | RaggedTensor:
    """Return a column in which rows share some ids."""
    if form == "dense":
        return (torch.arange(rows)[:, None] + torch.tensor([1, 2, 3, 3])) + shift
    weights = [[0.5 + n for n in range(row % 3)] for row in range(rows)] if form == "weighted" else None
    return RaggedTensor.from_lists([[row + shift, 2, 3][: row % 3] for row in range(rows)], weights=weights)


def configs(forms: list[tuple[str, Any]]) -> dict[str, EmbeddingConfig]:
    return {
        f"f{number}": EmbeddingConfig(dim=4 * (number + 1), combiner=each, max_length=2 if each == "tile" else None)
        for number, (_, each) in enumerate(forms)
    }


def trained(forms: list[tuple[str, Any]], compiled: Callable[[nn.Module], Any]) -> list[Tensor]:
    """Return outputs in training and in evaluation, and the final rows."""
    engine = EmbeddingEngine(configs(forms))
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    call, seen = compiled(engine), []
    for step, rows in enumerate((5, 3, 7)):
        batch = {f"f{number}": column(form, rows, step) for number, (form, _) in enumerate(forms)}
        outputs = call(batch)
        sum((value * torch.arange(1, 1 + value.shape[-1])).sum() for value in outputs.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.eval()
        with torch.no_grad():
            seen += [*(value.detach() for value in outputs.values()), *call({**batch, "f0": batch["f0"]}).values()]
        engine.train()
    return seen + [rows for table in engine.tables for rows in table.export(0).values()]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


@pytest.mark.parametrize(("backend", "dynamic"), COMPILED)
def test_a_compiled_engine_trains_like_an_eager_one(backend: str, dynamic: bool | None) -> None:
    # All pairs with one way of compiling; with the others, all forms together, and a mean table alone.
    for forms in [FORMS, [("dense", "mean")], *(PAIRS if (backend, dynamic) == ("eager", None) else [])]:
        expected = trained(forms, lambda engine: engine)
        got = trained(forms, lambda engine: torch.compile(engine, backend=backend, dynamic=dynamic))
        assert same(got, expected), forms


@pytest.mark.parametrize(("backend", "dynamic"), COMPILED)
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_weighted_bags_under_compile(combiner: str, backend: str, dynamic: bool | None) -> None:
    forms = [("weighted", combiner), ("ragged", "max"), ("weighted", "mean")]
    got = trained(forms, lambda engine: torch.compile(engine, backend=backend, dynamic=dynamic))
    assert same(got, trained(forms, lambda engine: engine))


def test_a_mean_divides_the_gradient() -> None:
    # Each of the four ids gets a quarter of the gradient 1.
    engine = EmbeddingEngine({"a": EmbeddingConfig(dim=4), "b": EmbeddingConfig(dim=8, combiner="mean")})
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    ids = {name: torch.tensor([[1, 2, 3, 4]]) for name in "ab"}
    engine(ids)
    before = engine.tables[1].export(0)["embedding"]
    sum(value.sum() for value in torch.compile(engine, backend="eager")(ids).values()).backward()
    optimizer.step()
    assert_near(engine.tables[1].export(0)["embedding"], before - 0.25)


class Model(nn.Module):
    """Feature operations, tables and a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.features = FeatureEngine([Feature("f0", ops=[Mod(3)]), Feature("f1", ops=[Mod(5)])])
        self.engine = EmbeddingEngine(configs([("dense", "mean"), ("ragged", "max")]), optimizer=optim.Adam)
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, batch: Batch) -> Tensor:
        found = self.engine(self.features(batch))
        return self.tower(torch.cat([found["f0"], found["f1"]], 1))[:, 0]  # type: ignore[no-any-return]


def batches() -> list[Batch]:
    return [
        {"f0": column("dense", rows, step), "f1": column("ragged", rows, step)} for step, rows in enumerate((6, 2, 9))
    ]


def rows_and_towers(model: Model) -> list[Tensor]:
    rows = [value for table in model.engine.tables for value in table.export(0).values()]
    return rows + [parameter.detach() for parameter in dense_parameters(model)]


def train_model(compiled: Callable[[Any], Any], whole_step: bool = False) -> list[Tensor]:
    model = Model()
    sparse = optim.Adam(model.engine.parameters(), lr=0.1)
    dense = torch.optim.SGD(dense_parameters(model), lr=0.1)
    call = model if whole_step else compiled(model)

    def step(batch: Batch) -> Tensor:
        sparse.zero_grad()
        dense.zero_grad()
        loss = call(batch).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optim.clip_row_norm_(model.parameters(), 0.05)
        sparse.step()
        dense.step()
        return loss.detach()  # type: ignore[no-any-return]

    run = compiled(step) if whole_step else step
    seen = [run(batch) for batch in batches()]
    model.eval()
    with torch.no_grad():
        seen.append(call(batches()[0]))
    return seen + rows_and_towers(model)


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, OF_ADAM)  # a compiled tower sums in another order


@pytest.mark.parametrize("whole_step", [False, True])
def test_a_compiled_model_trains_like_an_eager_one(whole_step: bool) -> None:
    got = train_model(lambda each: torch.compile(each, backend="eager", dynamic=whole_step), whole_step)
    close(got, train_model(lambda each: each, whole_step))


def test_a_model_that_is_partitioned_like_inductor_trains_like_an_eager_one() -> None:
    # This backend has inductor's decompositions and its partition into forward and backward. Generating code for the
    # tower, which is torch's part alone, would take twenty times as long.
    backend = "aot_eager_decomp_partition"
    close(train_model(lambda each: torch.compile(each, backend=backend)), train_model(lambda each: each))


def test_lookup_and_apply_gradients_in_a_compiled_step() -> None:
    results = []
    for compiled in (False, True):
        engine = EmbeddingEngine(configs([("dense", "max"), ("ragged", "sqrtn")]))
        optimizer = optim.SGD(engine.parameters(), lr=1.0)

        def step(batch: Batch, engine: EmbeddingEngine = engine, optimizer: optim.SGD = optimizer) -> Tensor:
            values, ctx = engine.lookup(batch)
            engine.apply_gradients(ctx, {name: 2 * value for name, value in values.items()}, optimizer)
            return torch.cat([value.flatten() for value in values.values()])

        run = torch.compile(step, backend="eager", dynamic=True) if compiled else step
        results.append([*map(run, batches()), *(table.export(0)["embedding"] for table in engine.tables)])
    assert same(results[1], results[0])


@pytest.mark.slow
def test_tables_without_an_engine_in_a_compiled_step() -> None:
    # Dynamo traces as far as it can, so combiner numbers are symbols here.
    results = []
    for compiled in (False, True):
        engine = EmbeddingEngine({name: EmbeddingConfig(dim=4) for name in "ab"})
        table, optimizer = engine.tables[0], optim.SGD(engine.parameters(), lr=1.0)

        def step(ids: Tensor, table: Any = table, optimizer: optim.SGD = optimizer) -> Tensor:
            offsets = 4 * torch.arange(ids.shape[0] + 1)
            features = [
                FeatureIds(ids.reshape(-1), ids.shape[0], member, offsets, None, combiner)
                for member, combiner in ((0, MAX), (1, MEAN))
            ]
            lookup = table.lookup(features, train=True)
            ones = [torch.ones(ids.numel(), 4), torch.ones(ids.shape[0], 4)]
            optimizer.update_table(table.anchor, table.gradients_of(lookup, ones))
            return ids.sum()

        run = torch.compile(step, backend="eager", dynamic=True) if compiled else step
        seen = [run(torch.arange(1, 5).repeat(rows, 1)) for rows in (1, 3, 2)]
        results.append([*seen, *(table.export(member)["embedding"] for member in (0, 1))])
    assert same(results[1], results[0])


def test_engines_are_never_compiled(caplog: pytest.LogCaptureFixture) -> None:
    # If they were compiled, each would need another version of the same code, and Dynamo gives up after eight.
    for _ in range(5):
        assert same(
            trained([("dense", "mean")], lambda engine: torch.compile(engine, backend="eager")),
            trained([("dense", "mean")], lambda engine: engine),
        )
    assert "recompile_limit" not in caplog.text


def compiled_train(group: dist.ProcessGroup, job: Job) -> dict[str, Any]:
    """Train with a temporarily compiled forward method."""
    forward = sharded.Model.forward
    sharded.Model.forward = torch.compile(forward, backend="eager", dynamic=True)  # type: ignore[method-assign]
    try:
        return sharded.train(group, job)
    finally:
        sharded.Model.forward = forward  # type: ignore[method-assign]
        torch._dynamo.reset()


def test_compiled_models_on_two_ranks_with_prefetching(ranks: Ranks) -> None:
    job = Job(rule="Adagrad", steps=3, prefetch=2, clip=0.5, engine={"prefetch_depth": 2})
    assert_same(ranks.run(2, compiled_train, job), ranks.run(2, sharded.train, job))


def test_a_full_graph_is_refused_except_for_towers() -> None:
    model = Model()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="omit fullgraph=True, or compile only the towers"):
        torch.compile(model, backend="eager", fullgraph=True)(batches()[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="omit fullgraph=True, or compile only the towers"):
        torch.compile(model.engine, backend="eager", fullgraph=True)(batches()[0])
    expected = model(batches()[0])
    model.tower = torch.compile(model.tower, backend="eager", fullgraph=True)  # type: ignore[assignment]
    assert torch.equal(model(batches()[0]), expected)


class Dense(nn.Module):
    """A model with a tensor as input, which exporters require."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = EmbeddingEngine({"a": EmbeddingConfig(dim=4, combiner="mean")})
        self.tower = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(self.engine({"a": ids})["a"])  # type: ignore[no-any-return]


IDS = torch.tensor([[1, 2], [3, 4]])
EXPORTERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.export": lambda model, ids: torch.export.export(model, (ids,)),
    "torch.jit.trace": lambda model, ids: torch.jit.trace(model, (ids,)),
    "torch.jit.trace, module": lambda model, ids: torch.jit.trace_module(model, {"forward": (ids,)}),
    "torch.jit.trace, onnx": lambda model, ids: torch.onnx.export(model, (ids,), io.BytesIO(), dynamo=False),
    "torch.jit.script": lambda model, ids: torch.jit.script(model),
    "torch.fx.symbolic_trace": lambda model, ids: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore:EmbeddingEngine. the rows of embedding tables are not in the state_dict")  # onnx
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", EXPORTERS)
def test_recording_a_model_with_tables_is_refused(name: str, mode: str) -> None:
    model = Dense().train(mode == "train")
    model(IDS)
    by = name.split(",")[0].replace(".", r"\.")
    for module in (model, nn.Sequential(model)):
        with pytest.raises(NotImplementedError, match=f"^{by} cannot record .* `recis-hybrid export`, or export only"):
            EXPORTERS[name](module, IDS)
    assert model(IDS).shape == (2, 1)  # the model still works


def test_a_strict_export_is_refused() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="recis-hybrid export"):
        torch.export.export(Dense(), (IDS,), strict=True)


def test_towers_can_be_recorded() -> None:
    model = Dense()
    found = model.engine({"a": IDS})["a"].detach()
    expected = model.tower(found)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model.tower, (found,), dynamic_shapes=({0: batch},))
    for program in (exported.module(), torch.jit.trace(model.tower, (found,)), torch.jit.script(model.tower)):
        assert_near(program(found), expected)
    assert exported.module()(found.repeat(3, 1)).shape == (6, 1)
