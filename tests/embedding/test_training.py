"""Gradients of tables: accumulation, clipping, scaling, several losses, overrides, coalescing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from recis_hybrid import ops, optim
from recis_hybrid.checkpointing import PartState
from recis_hybrid.embedding import (
    Constant,
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    Normal,
    Uniform,
)
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.devices import on_devices
from tests.support.near import assert_near


class Twin:
    """A table of an engine, and an nn.Embedding with the same rows."""

    def __init__(self, device: str, dim: int = 6, ids: int = 20) -> None:
        self.engine = EmbeddingEngine({"id": EmbeddingConfig(dim=dim, initializer=Normal(0, 1))}, device=device)
        self.table, self.ids, self.device = self.engine.tables[0], torch.arange(ids), device
        self.table.insert(0, self.ids)
        self.dense = torch.nn.Embedding(ids, dim)
        self.dense.weight.data.copy_(self.values())

    def values(self) -> torch.Tensor:
        return self.table.export(0, self.ids)["embedding"].cpu()

    def backward(self, ids: list[int], seed: int, scale: float = 1.0) -> None:
        gradient = scale * torch.randn(len(ids), self.table.layout.dim, generator=torch.Generator().manual_seed(seed))
        self.engine({"id": torch.tensor(ids, device=self.device)})["id"].backward(gradient.to(self.device))
        self.dense(torch.tensor(ids)).backward(gradient)

    def optimizers(self, lr: float = 0.5) -> list[torch.optim.Optimizer]:
        return [optim.SGD(self.engine.parameters(), lr=lr), torch.optim.SGD(self.dense.parameters(), lr=lr)]

    def check(self) -> None:
        assert_near(self.values(), self.dense.weight)


@on_devices
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clip_grad_norm_includes_tables_and_dense_parameters(device: str, max_norm: float) -> None:
    twin = Twin(device)
    tower, other = (torch.nn.Parameter(torch.ones(3, device=where)) for where in (device, "cpu"))
    for parameter in (tower, other):
        (parameter * 2).sum().backward()
    for seed, ids in enumerate(([1, 2, 1], [2, 2, 5])):
        twin.backward(ids, seed)
    norms = [
        torch.nn.utils.clip_grad_norm_([*twin.engine.parameters(), tower], max_norm),
        torch.nn.utils.clip_grad_norm_([*twin.dense.parameters(), other], max_norm),
    ]
    assert_near(norms[0].float(), norms[1])
    assert tower.grad is not None
    assert other.grad is not None
    assert_near(tower.grad, other.grad)
    for optimizer in twin.optimizers():
        optimizer.step()
    twin.check()


@on_devices
def test_clipping_between_micro_batches_clips_the_accumulated_gradients(device: str) -> None:
    twin = Twin(device)
    for seed, ids in enumerate(([1, 2, 1], [2, 2, 5], [7])):
        twin.backward(ids, seed)
        for parameters in (twin.engine.parameters(), twin.dense.parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, 0.7)
    for optimizer in twin.optimizers():
        optimizer.step()
    twin.check()


@on_devices
def test_each_row_is_clipped_separately(device: str) -> None:
    twin = Twin(device)
    twin.backward([1, 2, 1, 3, 2, 1], 0, scale=3.0)
    twin.backward([4], 1, scale=1e-3)
    optim.clip_row_norm_(twin.engine.parameters(), 0.5)
    gradient = twin.dense.weight.grad
    assert gradient is not None
    gradient *= (0.5 / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
    assert float(gradient.norm(dim=1).max()) > 0.49
    for optimizer in twin.optimizers():
        optimizer.step()
    twin.check()
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        optim.clip_row_norm_(twin.engine.parameters(), 0)


@on_devices
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaling_works_as_for_dense_parameters(device: str, unscale: bool) -> None:
    twin = Twin(device)
    optimizers = twin.optimizers()
    scalers = [torch.amp.GradScaler(where, init_scale=1024.0, growth_interval=2) for where in (device, "cpu")]
    for seed in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        before = twin.values()
        for scaler, where in zip(scalers, (device, "cpu"), strict=True):
            scaler.scale(torch.ones(1, device=where))  # in place of a loss; the test computes gradients itself
        # The third step overflows: it is skipped, and the scale is halved.
        twin.backward([1, 2, 1, seed], seed, scale=torch.inf if seed == 2 else scalers[0].get_scale())
        for scaler, optimizer in zip(scalers, optimizers, strict=True):
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 2.0)
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(before, twin.values()) == (seed == 2)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        twin.check()


@on_devices
def test_gradients_of_several_losses_add_up(device: str) -> None:
    twin = Twin(device)
    ids = torch.tensor([1, 2, 1])
    for module, column in ((twin.engine, ids.to(device)), (twin.dense, ids)):
        values = module({"id": column})["id"] if module is twin.engine else module(column)
        (values**2).sum().backward(retain_graph=True)
        values.exp().mean().backward()
    for optimizer in twin.optimizers():
        optimizer.step()
    twin.check()


@on_devices
def test_reading_the_gradient_changes_nothing(device: str) -> None:
    results = []
    for read_gradient in (False, True):
        twin = Twin(device)
        gradient = torch.tensor([[1.0] * 6, [torch.inf] + [1.0] * 5])
        twin.engine({"id": torch.tensor([1, 2], device=device)})["id"].backward(gradient.to(device))
        if read_gradient:
            assert not torch.isfinite(twin.table.anchor.grad).all()  # type: ignore[arg-type]
        twin.optimizers()[0].step()
        results.append(twin.values())
    assert torch.equal(results[0], results[1])
    assert torch.isfinite(results[0][1]).all()


def test_clipping_by_an_infinite_norm_matches_dense_parameters() -> None:
    twin = Twin("cpu")
    gradient = torch.tensor([[1.0] * 6, [torch.inf] + [1.0] * 5])
    twin.engine({"id": torch.tensor([1, 2])})["id"].backward(gradient)
    twin.dense(torch.tensor([1, 2])).backward(gradient)
    for parameters in (twin.engine.parameters(), twin.dense.parameters()):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in twin.optimizers():
        optimizer.step()
    twin.check()


def test_each_output_may_be_modified_in_place() -> None:
    engine = EmbeddingEngine({name: EmbeddingConfig(dim=16, initializer=Constant(1.0)) for name in "ab"})
    outputs = engine({name: torch.tensor([1, 2]) for name in "ab"})
    square = outputs["b"].square()
    torch.nn.functional.relu_(outputs["a"].mul_(3.0)).sum().backward()
    square.sum().backward()
    optim.SGD(engine.parameters(), lr=0.1).step()
    after = engine.eval()({name: torch.tensor([1]) for name in "ab"})
    assert_near(after["a"], torch.full((1, 16), 1.0 - 0.3))
    assert_near(after["b"], torch.full((1, 16), 1.0 - 0.2))


def test_the_caller_may_reuse_offsets() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, initializer=Constant(0.0))})
    column = RaggedTensor(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))
    output = engine({"id": column})["id"]
    column.offsets.mul_(10**6)
    output.sum().backward()
    optim.SGD(engine.parameters(), lr=1.0).step()
    assert engine.tables[0].export(0)["embedding"].tolist() == [[-1.0, -1.0]] * 3


def test_gradients_of_wrong_shapes_change_neither_tables_nor_steps() -> None:
    engine = EmbeddingEngine({"a": EmbeddingConfig(dim=2), "b": EmbeddingConfig(dim=3)}, optimizer=optim.Adam)
    optimizer = optim.Adam(engine.parameters())
    batch: Batch = {"a": torch.tensor([1]), "b": torch.tensor([1])}
    values, ctx = engine.lookup(batch)
    with pytest.raises(ValueError, match=r"table b: a gradient must be float32 \[1, 3\], got torch.float32 \[2, 3\]"):
        engine.apply_gradients(ctx, {"a": torch.ones(1, 2), "b": torch.ones(2, 3)}, optimizer)
    assert torch.equal(engine(batch)["a"], values["a"])
    assert all(not optimizer.state[table.anchor].get("step") for table in engine.tables)


def test_to_does_not_move_an_engine() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    model = torch.nn.ModuleDict({"engine": engine, "tower": torch.nn.Linear(2, 1)})
    with pytest.warns(UserWarning, match="tables keep the dtypes of their configs"):
        model.to(torch.float64).to("cpu")
    assert model["tower"].weight.dtype == torch.float64
    assert engine.tables[0].anchor is next(iter(engine.parameters()))
    with pytest.raises(RuntimeError, match="tables cannot be on the meta device"):
        model.to("meta")


def test_two_runs_are_bitwise_equal() -> None:
    before, results = torch.get_num_threads(), []
    torch.set_num_threads(2)
    for _ in range(2):
        engine = EmbeddingEngine(MIXED, optimizer=optim.Adam)
        optimizer = optim.Adam(engine.parameters(), lr=0.1)
        for step in range(6):
            torch.cat([v.flatten() for v in engine(mixed_batch(step, "cpu")).values()]).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append(engine.checkpoint_state())
    torch.set_num_threads(before)
    for name, table in results[0].tables.items():
        assert all(torch.equal(v, results[1].tables[name].columns[c]) for c, v in table.columns.items()), name


def test_zero_grad_of_model_optimizer_and_parameter_drops_gradients() -> None:
    twin = Twin("cpu")
    before = twin.values()
    optimizer = twin.optimizers()[0]
    for drop in (twin.engine.zero_grad, optimizer.zero_grad, lambda: setattr(twin.table.anchor, "grad", None)):
        twin.backward([1, 2], 0)
        assert twin.table.anchor.grad is not None
        drop()
        assert twin.table.anchor.grad is None
        optimizer.step()
    assert torch.equal(before, twin.values())
    with pytest.raises(ValueError, match="the gradient of an embedding table cannot be set"):
        twin.table.anchor.grad = torch.ones(1)


def test_no_grad_in_training_mode_inserts_and_takes_no_gradient() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    with torch.no_grad():
        output = engine({"id": torch.tensor([1, 2])})["id"]
    assert not output.requires_grad
    assert len(engine.tables[0]) == 2


def test_a_frozen_table_next_to_a_trained_one() -> None:
    engine = EmbeddingEngine(
        {
            "a": EmbeddingConfig(dim=2, initializer=Constant(1.0)),
            "b": EmbeddingConfig(dim=2, initializer=Constant(1.0), trainable=False),
        }
    )
    assert len(engine.tables) == 2
    optimizer = optim.SGD(engine.parameters(), lr=0.5)
    batch: Batch = {"a": torch.tensor([1]), "b": torch.tensor([1])}
    for _ in range(2):
        outputs = engine(batch)
        (outputs["a"] * outputs["b"]).sum().backward()
        optimizer.step()
    assert (outputs["a"] - 0.5).tolist() == [[0.0, 0.0]]
    assert engine(batch)["b"].tolist() == [[1.0, 1.0]]
    _, ctx = engine.lookup(batch)
    engine.apply_gradients(ctx, {"a": torch.ones(1, 2)}, optimizer)
    assert engine(batch)["a"].tolist() == [[-0.5, -0.5]]


def test_overrides_of_a_table_get_a_group_that_schedules_change() -> None:
    engine = EmbeddingEngine(
        {
            "a": EmbeddingConfig(dim=2, initializer=Constant(0.0)),
            "b": EmbeddingConfig(dim=2, initializer=Constant(0.0), optimizer_overrides={"lr": 10.0}),
            "c": EmbeddingConfig(dim=2, initializer=Constant(0.0)),
        }
    )
    assert len(engine.tables) == 2
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        outputs = engine({name: torch.tensor([1]) for name in "abc"})
        torch.cat(list(outputs.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    engine.eval()
    outputs = engine({name: torch.tensor([1]) for name in "abc"})
    assert [outputs[name][0, 0].item() for name in "abc"] == [-1.5, -15.0, -1.5]
    config = EmbeddingConfig(dim=2, optimizer_overrides={"betas": (0.5, 0.9)})
    other = EmbeddingEngine({"x": config}, optimizer=optim.Adagrad)
    with pytest.raises(ValueError, match=r"Adagrad has no hyperparameter \['betas'\].*table x sets; it has"):
        optim.Adagrad(other.parameters())


def test_gradients_of_a_lookup_in_evaluation_mode_are_refused() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}).eval()
    _, ctx = engine.lookup({"id": torch.tensor([1])})
    with pytest.raises(RuntimeError, match="the lookup ran in evaluation mode"):
        engine.apply_gradients(ctx, {"id": torch.zeros(1, 2)}, optim.SGD(engine.parameters()))


def test_outputs_without_a_gradient_do_not_affect_the_others() -> None:
    twin = EmbeddingEngine({"a": EmbeddingConfig(dim=2), "b": EmbeddingConfig(dim=2, combiner="mean")})
    batch: Batch = {"a": torch.tensor([1, 2]), "b": torch.tensor([[1, 2], [3, 3]])}
    before = twin(batch)
    before["b"].sum().backward()
    optim.SGD(twin.parameters(), lr=1.0).step()
    after = twin(batch)
    assert torch.equal(after["a"], before["a"])
    assert_near(after["b"], before["b"] - torch.tensor([[0.5], [1.0]]))


MIXED = {
    "one": EmbeddingConfig(dim=8, initializer=Normal(0, 0.1)),
    "mean": EmbeddingConfig(dim=8, combiner="mean", initializer=Uniform(-1, 1)),
    "greatest": EmbeddingConfig(dim=8, combiner="max"),
    "tile": EmbeddingConfig(dim=8, combiner="tile", max_length=2),
    "each": EmbeddingConfig(dim=8, combiner=None),
    "shared": EmbeddingConfig(dim=8, combiner="sqrtn", table="one", initializer=Normal(0, 0.1)),
    "narrow": EmbeddingConfig(dim=8, dtype=torch.bfloat16, combiner="sum"),
    "narrower": EmbeddingConfig(dim=8, dtype=torch.bfloat16, combiner="mean"),
    "rare": EmbeddingConfig(dim=8, admission=MinFrequency(2), unknown="zeros"),
    "rare_too": EmbeddingConfig(dim=8, admission=MinFrequency(2)),
}


def mixed_batch(seed: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {}
    for name in MIXED:
        lengths = torch.randint(0, 4, (6,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = torch.randint(0, 9, (int(offsets[-1]),), generator=generator)
        batch[name] = RaggedTensor(ids.to(device), offsets.to(device))
    return batch


@on_devices
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("rule", ["SGD", "Adagrad", "RowwiseAdagrad", "Adam", "AdamW"])
def test_coalescing_changes_no_bit_of_any_combiner(device: str, rule: str, max_norm: float | None) -> None:
    # Also if gradients are clipped by the norm over tables and tower, however many tables there are.
    results = [trained_mixed(device, rule, coalesce=coalesce, max_norm=max_norm) for coalesce in (True, False)]
    for name in [*MIXED, "tower"]:
        assert torch.equal(results[0][0][name], results[1][0][name])
    for name, table in results[0][1].tables.items():
        assert all(torch.equal(v, results[1][1].tables[name].columns[c]) for c, v in table.columns.items())


def trained_mixed(
    device: str, rule: str, *, coalesce: bool, max_norm: float | None, seed: int = 0
) -> tuple[dict[str, torch.Tensor], PartState]:
    """Train an engine and a tower for four steps; return their outputs for a batch, and the engine's state."""
    make = getattr(optim, rule)
    engine = EmbeddingEngine(MIXED, optimizer=make, device=device, coalesce=coalesce, seed=seed)
    assert len(engine.tables) == (3 if coalesce else 9)
    optimizer = make(engine.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    tower = [torch.nn.Parameter(torch.randn(8, 3, generator=generator).to(device)) for _ in range(4)]
    dense = torch.optim.SGD(tower, lr=0.1)
    for step in range(4):
        outputs = engine(mixed_batch(8 * seed + step, device))
        # In step 1, only one feature has a gradient, but all tables count the step.
        used = list(outputs.values())[: 1 if step == 1 else None]
        loss = torch.stack([((value - 0.5) ** 2).sum() for value in used]).sum()
        (loss + sum((used[0][:, :8] @ each).square().sum() for each in tower)).backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            parameters = [*tower[:2], *engine.parameters(), *tower[2:]]
            assert float(torch.nn.utils.clip_grad_norm_(parameters, max_norm)) > 2 * max_norm
        for each in (optimizer, dense):
            each.step()
            each.zero_grad()
    return engine(mixed_batch(9, device)) | {"tower": torch.stack(tower)}, engine.checkpoint_state()


@on_devices
def test_another_engine_loads_the_whole_state_and_continues(device: str) -> None:
    engines = [EmbeddingEngine(MIXED, optimizer=optim.Adam, device=device) for _ in range(2)]
    optimizers = [optim.Adam(engine.parameters(), lr=0.1) for engine in engines]

    def train(number: int, steps: range) -> None:
        for step in steps:
            torch.cat([v.flatten() for v in engines[number](mixed_batch(step, device)).values()]).sum().backward()
            optimizers[number].step()
            optimizers[number].zero_grad()

    train(0, range(4))
    engines[1].load_checkpoint_state(engines[0].checkpoint_state())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for number in range(2):
        train(number, range(4, 8))
    states = [engine.checkpoint_state() for engine in engines]
    assert states[0].meta == states[1].meta
    for name, table in states[0].tables.items():
        assert all(torch.equal(v, states[1].tables[name].columns[c]) for c, v in table.columns.items()), name


@settings(max_examples=20)
@given(st.integers(1, 70), st.integers(1, 6), st.sampled_from(["Adagrad", "RowwiseAdagrad", "Adam"]))
def test_training_does_not_depend_on_the_number_of_threads(dim: int, spread: int, rule: str) -> None:
    make, before, results = getattr(optim, rule), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        config = EmbeddingConfig(dim=dim, dtype=torch.bfloat16 if dim % 2 else torch.float32)
        engine = EmbeddingEngine({"id": config}, optimizer=make)
        optimizer, generator = make(engine.parameters(), lr=0.1), torch.Generator().manual_seed(dim)
        for _ in range(3):
            # Several chunks of 4,096 positions, so that threads insert concurrently.
            ids = torch.randint(0, 10**spread, (20_000,), generator=generator)
            engine({"id": ids})["id"].backward(torch.randn(20_000, dim, generator=generator))
            optimizer.step()
        results.append(engine.tables[0].export(0))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_rows_catch_up_before_they_are_read() -> None:
    """Apply exact decoupled weight decay to a row at its next lookup."""
    decay, lr, dim = 0.9, 0.5, 3
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=dim, initializer=Normal(0, 1))})
    table, optimizer = engine.tables[0], optim.SGD(engine.parameters(), lr=lr, weight_decay=(1 - decay) / lr)
    table.insert(0, torch.arange(10))
    dense = table.export(0)["embedding"]

    def catch_up(blocks: Blocks, count: Tensor, rows: Tensor, step: int) -> None:
        rows = rows[: int(count)]
        meta, values = ops.blocks.read_meta(blocks, rows), torch.empty(len(rows), dim)
        ops.blocks.read(blocks, rows, 0, values)
        ops.blocks.write(blocks, rows, 0, values * (decay ** (step - meta[0]))[:, None])
        meta[0] = step
        ops.blocks.write_meta(blocks, rows, meta)

    table.before_read = catch_up
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        ids = torch.randint(0, 10, (3,), generator=generator)
        output = engine({"id": ids})["id"]
        assert_near(output, dense[ids])
        gradient = torch.randn(3, dim, generator=generator)
        output.backward(gradient)
        optimizer.step()
        dense *= decay
        dense.index_add_(0, ids, gradient, alpha=-lr)


def test_the_layout_of_a_checkpoint_is_its_state_without_rows() -> None:
    engine = EmbeddingEngine(
        {
            "a": EmbeddingConfig(dim=4, dtype=torch.bfloat16),
            "b": EmbeddingConfig(dim=4, dtype=torch.bfloat16),
            "c": EmbeddingConfig(dim=2, admission=MinFrequency(2)),
        },
        optimizer=optim.Adam,
    )
    engine({name: torch.tensor([1, 2, 2]) for name in "abc"})
    state, layout = engine.checkpoint_state(), engine.checkpoint_layout()
    assert list(layout.tables) == list(state.tables)
    for name, table in state.tables.items():
        empty = layout.tables[name]
        assert table.columns["ids"].numel() > 0
        assert empty.meta == table.meta
        assert {k: (v.dtype, v.shape[1:]) for k, v in empty.columns.items()} == {
            k: (v.dtype, v.shape[1:]) for k, v in table.columns.items()
        }
        assert all(column.size(0) == 0 for column in (*empty.columns.values(), empty.buckets))
