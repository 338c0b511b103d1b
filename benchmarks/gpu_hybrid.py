"""The cases of ``benchmarks/gpu.py`` for a training step with tables in torch and a tower in JAX.

The lookups are outside of the jitted function, or inside of it. The peer is the same step in JAX alone: one jitted
program with the table as an array. JAX is imported when a case runs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.gpu_workload import Bench, Measured
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine

TOWER = "hybrid/JAX tower"
INSIDE = "hybrid/inside jit"
FEATURES = 26
DIM = 128
LR = 0.01
TOLERANCE = 1e-2
"""Largest relative difference of losses; JAX may multiply matrices in TF32."""


def hybrid(bench: Bench) -> Iterator[Measured]:
    """Train 26 features of one id a sample and an MLP by SGD.

    The peer is given row numbers, and adds gradients to the rows of its table in place; ours looks up 64-bit ids.
    """
    if reason := _reason_to_skip(bench.device):
        yield from (Measured(case, None, reason) for case in (TOWER, INSIDE))
        return
    work = _Work(bench)
    inside, end = _inside_jit(work)
    steps = {TOWER: _in_torch_and_jax(work), INSIDE: inside, "fused": _in_jax(work)}
    for _ in range(2):  # the second loss depends on the first update
        losses = {name: float(step()) for name, step in steps.items()}
        if any(abs(loss - losses["fused"]) > TOLERANCE * abs(losses["fused"]) for loss in losses.values()):
            raise AssertionError(f"hybrid: losses differ: {losses}; fused is JAX alone")
    calls = bench.sizes.calls
    rates = bench.rates({name: _burst(step, calls) for name, step in steps.items()}, calls=1)
    end()
    times = {name: 1e3 / calls / rate for name, rate in rates.items()}
    widths = "-".join(map(str, (FEATURES * DIM, *bench.sizes.tower)))
    for case in (TOWER, INSIDE):
        yield Measured(
            case,
            times[case] / times["fused"],
            f"{times[case]:.3g} against {times['fused']:.3g} ms; {bench.sizes.tower_rows:,} samples, tower {widths}",
        )


def _reason_to_skip(device: torch.device) -> str:
    if device.type == "emulated":
        return "DLPack does not know the emulated device"
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed here"
    # By default JAX preallocates three quarters of the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if device.type == "cuda" and jax.default_backend() != "gpu":
        return "jax has no GPU backend here"
    return ""


class _Work:
    """Batches, and the first values of the tower's parameters."""

    def __init__(self, bench: Bench) -> None:
        sizes, random = bench.sizes, np.random.default_rng(0)
        self.device, self.ids_each = bench.device, sizes.tower_ids
        widths = (FEATURES * DIM, *sizes.tower)
        self.params = [
            ((random.normal(size=pair) / pair[0] ** 0.5).astype(np.float32), np.zeros(pair[1], np.float32))
            for pair in pairwise(widths)
        ]
        shape = (sizes.batches, FEATURES, sizes.tower_rows)
        first = np.arange(FEATURES)[:, None] * sizes.tower_ids
        self.numbers = torch.from_numpy(random.integers(sizes.tower_ids, size=shape) + first)
        """Numbers of ids, int64 ``[batches, FEATURES, samples]``; feature f has those from ``f * ids_each``."""
        self.ids = [bench.ids(numbers.flatten()).view_as(numbers) for numbers in self.numbers]
        self.labels = torch.from_numpy(random.integers(2, size=(sizes.batches, sizes.tower_rows)).astype(np.float32))
        self.all_ids = bench.ids(torch.arange(FEATURES * sizes.tower_ids)).split(sizes.tower_ids)
        (table,) = self.engine().tables
        self.rows = torch.cat([table.export(member, ids)["embedding"] for member, ids in enumerate(self.all_ids)])
        """First values of the rows by number, float32 ``[FEATURES * ids_each, DIM]``."""

    def engine(self) -> EmbeddingEngine:
        """Return an engine that holds all ids with their first values."""
        configs = {f"feature{f:02d}": EmbeddingConfig(dim=DIM) for f in range(FEATURES)}
        engine = EmbeddingEngine(configs, optimizer=optim.SGD, device=self.device)
        (table,) = engine.tables
        for member, ids in enumerate(self.all_ids):
            table.insert(member, ids)
        return engine


def _mlp(params: Any, inputs: list[Any]) -> Any:
    import jax
    import jax.numpy as jnp

    x = jnp.concatenate(inputs, axis=1)
    for number, (w, b) in enumerate(params):
        x = x @ w + b
        if number + 1 < len(params):
            x = jax.nn.relu(x)
    return x[:, 0]


def _in_torch_and_jax(work: _Work) -> Callable[[], Tensor]:
    from recis_hybrid.bridge import JaxTower

    engine, tower = work.engine(), JaxTower(_mlp, work.params).to(work.device)
    optimizers = [engine.make_optimizer(lr=LR), torch.optim.SGD(tower.parameters(), lr=LR)]
    batches = [dict(zip(engine.configs, ids.unbind(), strict=True)) for ids in work.ids]
    turns = cycle(zip(batches, work.labels.to(work.device), strict=True))

    def step() -> Tensor:
        batch, label = next(turns)
        loss = binary_cross_entropy_with_logits(tower(list(engine(batch).values())), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def _inside_jit(work: _Work) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Return the step, and what ends the use of the tables after the last one."""
    import jax
    import jax.numpy as jnp

    from recis_hybrid.bridge import ffi

    engine = work.engine()
    tables = ffi.JitTables(engine, engine.make_optimizer(lr=LR))

    def loss_of(params: Any, token: Any, ids: Any, label: Any) -> Any:
        vectors, _, token = ffi.lookup(tables, dict(zip(engine.configs, ids, strict=True)), None, token)
        logits = _mlp(params, list(vectors.values()))
        return jnp.mean(jax.nn.softplus(logits) - label * logits)

    def train(params: Any, token: Any, ids: Any, label: Any) -> Any:
        loss, (slopes, token) = jax.value_and_grad(loss_of, (0, 1))(params, token, ids, label)
        return jax.tree.map(lambda p, slope: p - LR * slope, params, slopes), token, loss

    jitted = jax.jit(train, donate_argnums=0)
    state = [jax.tree.map(jnp.array, work.params), tables.begin(room=0)]
    pairs = [part.cpu().numpy().view(np.uint32).reshape(*part.shape, 2) for part in work.ids]
    turns = cycle(
        zip([jnp.array(part) for part in pairs], [jnp.array(label.numpy()) for label in work.labels], strict=True)
    )

    def step() -> Any:
        *state[:], loss = jitted(*state, *next(turns))
        return loss

    def end() -> None:
        tables.end(state[1])
        tables.wait()

    return step, end


def _in_jax(work: _Work) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    def loss_of(params: Any, x: Any, label: Any) -> Any:
        logits = _mlp(params, list(x))
        return jnp.mean(jax.nn.softplus(logits) - label * logits)

    def train(table: Any, params: Any, numbers: Any, label: Any) -> Any:
        loss, (slopes, x_slope) = jax.value_and_grad(loss_of, (0, 1))(params, table[numbers], label)
        table = table.at[numbers.reshape(-1)].add(-LR * x_slope.reshape(-1, DIM))
        return table, jax.tree.map(lambda p, slope: p - LR * slope, params, slopes), loss

    jitted = jax.jit(train, donate_argnums=(0, 1))
    state = [jnp.array(work.rows.cpu().numpy()), jax.tree.map(jnp.array, work.params)]
    numbers = [jnp.array(part.numpy().astype(np.int32)) for part in work.numbers]
    turns = cycle(zip(numbers, [jnp.array(label.numpy()) for label in work.labels], strict=True))

    def step() -> Any:
        *state[:], loss = jitted(*state, *next(turns))
        return loss

    return step


def _burst(step: Callable[[], Any], calls: int) -> Callable[[], None]:
    """Return steps that end when the last loss is on the host."""

    def run() -> None:
        for _ in range(calls - 1):
            step()
        float(step())

    return run
