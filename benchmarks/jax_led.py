"""Training steps led by JAX: beside the same step led by torch, and beside keras-rs.

    python -m benchmarks.jax_led [--quick] [--cases keras_rs]

- ``torch_led/65k``, ``torch_led/4k``: lookup, an MLP in JAX with its gradients, Adam for the MLP and Adagrad for the
  tables of 26 features of dim 16; ours is a ``JaxStep``, the peers are a ``TorchStep`` with the same tower as a
  ``JaxTower`` and an ``OptaxOptimizer``, and one with the tower in torch and torch's Adam.
- ``keras_rs/65k``, ``keras_rs/4k``: lookups with given gradients and Adagrad, d16, with JAX arrays in and out; the peer
  is keras-rs's DistributedEmbedding on JAX's CPU backend, if ``make bench-peers`` has installed it. Its tables have
  100,000 rows a feature and take row indices; it updates all rows. ``keras_rs/65k/2M`` and ``keras_rs/4k/2M`` have 4
  features of 2,000,000 rows (not with ``--quick``).
- ``jit_lookup/65k``, ``jit_lookup/4k``: a training lookup inside jit, d16; the peers are its bare kernel, timed inside
  other calls like it, and the lookup of an engine in torch. ``jit_lookup/empty``: a lookup of no ids inside jit; the
  peer is an empty jitted function.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks import harness, workload
from benchmarks.peers.worker import Worker, installed
from recis_hybrid import ops, optim
from recis_hybrid.bridge import JaxTower, OptaxOptimizer, ffi, init
from recis_hybrid.bridge.jax_led import JaxStep, JaxTables
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.pipelines import TorchStep

CPU = torch.device("cpu")
DIM = 16
LR = 0.05
WIDTH = 64
BARE, EAGER, EMPTY = "bare kernel", "EmbeddingEngine.lookup", "empty jitted function"
KERAS_RS = "keras-rs DistributedEmbedding"


def engine_of(work: workload.Workload) -> EmbeddingEngine:
    """Return an engine whose tables have all ids of the workload."""
    configs = {workload.name(f): EmbeddingConfig(dim=DIM) for f in range(len(work.ids))}
    engine = EmbeddingEngine(configs, optimizer=optim.Adagrad)
    engine.lookup({workload.name(f): ids for f, ids in enumerate(work.ids)})
    return engine


def parameters() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    wide = workload.FEATURES * DIM
    return {
        "w0": random.normal(0, wide**-0.5, (wide, WIDTH)).astype(np.float32),
        "w1": random.normal(0, WIDTH**-0.5, (WIDTH, 1)).astype(np.float32),
    }


def tower(params: Any, vectors: Any) -> Any:
    x = jnp.concatenate([vectors[workload.name(f)] for f in range(workload.FEATURES)], 1)
    return (jax.nn.relu(x @ params["w0"]) @ params["w1"])[:, 0]


class TorchTower(torch.nn.Module):
    """The tower in torch."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in parameters().items():
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(value).clone()))

    def forward(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        x = torch.cat([vectors[workload.name(f)] for f in range(workload.FEATURES)], 1)
        return (torch.relu(x @ self.w0) @ self.w1)[:, 0]


class TorchLed(torch.nn.Module):
    """The engine, and the tower as a module."""

    def __init__(self, engine: EmbeddingEngine, tower: torch.nn.Module) -> None:
        super().__init__()
        self.engine = engine
        self.tower = tower

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        features = {name: column for name, column in batch.items() if name != "label"}
        output: torch.Tensor = self.tower(self.engine(features))
        return output


def steps_of(work: workload.Workload) -> dict[str, Callable[[], None]]:
    """Return the JAX-led and the torch-led steps; each has its own tables and cycles through the batches."""
    labels = torch.arange(work.gradients[0].size(0)).remainder(2).float()
    batches = [{**work.batch(number), "label": labels} for number in range(workload.BATCHES)]
    engine = engine_of(work)
    tables = JaxTables(engine, engine.make_optimizer(lr=LR))
    params = {name: jnp.asarray(value) for name, value in parameters().items()}
    ours = JaxStep(tower, params, optax.sigmoid_binary_cross_entropy, optax.adam(1e-3), tables)
    in_jax, in_torch = JaxTower(tower, parameters()), TorchTower()
    peers = {
        "TorchStep with JaxTower": (in_jax, OptaxOptimizer(in_jax.named_parameters(), optax.adam(1e-3))),
        "TorchStep with a torch tower": (in_torch, torch.optim.Adam(in_torch.parameters(), 1e-3)),
    }
    steps = {"ours": over(batches, ours)}
    for name, (module, dense) in peers.items():
        model = TorchLed(engine_of(work), module)
        optimizers = {"dense": dense, "sparse": model.engine.make_optimizer(lr=LR)}
        steps[name] = over(batches, TorchStep(model, torch.nn.functional.binary_cross_entropy_with_logits, optimizers))
    return steps


def over(batches: list[Any], call: Callable[[Any], object]) -> Callable[[], None]:
    """Return a function that calls another with the next batch."""
    turn = -1

    def step() -> None:
        nonlocal turn
        turn += 1
        call(batches[turn % len(batches)])

    return step


def lookups_of(work: workload.Workload) -> Callable[[], None]:
    """Return a step of lookups and updates with given gradients."""
    engine = engine_of(work)
    tables = JaxTables(engine, engine.make_optimizer(lr=LR))
    given = {workload.name(f): jnp.asarray(value.numpy()) for f, value in enumerate(work.gradients)}
    # As for the peer, gradients are computed from the vectors inside jit.
    differentiate = jax.jit(jax.grad(lambda vectors: sum((vectors[name] * given[name]).sum() for name in given)))
    batches = [work.batch(number) for number in range(workload.BATCHES)]

    def step(batch: Any) -> None:
        vectors, ctx = tables.lookup(batch)
        tables.apply_gradients(ctx, differentiate(vectors))

    return over(batches, step)


_Kernel = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 4)


class _TableKernels(ctypes.Structure):
    """``TableKernels`` of ``csrc/core/table_kernels.h``."""

    _fields_ = (("version", ctypes.c_int64), ("lookup", _Kernel), ("update", _Kernel))


_KernelsFunction = ctypes.CFUNCTYPE(ctypes.c_void_p)


class TimedKernels:
    """The kernels of the CPU's library, with the time of each lookup."""

    def __init__(self) -> None:
        address = ops.table_kernels("cpu")
        assert address is not None
        kernels = _TableKernels.from_address(_KernelsFunction(address)())
        self.seconds = 0.0
        """Time of the last lookup."""

        def lookup(*arguments: int) -> int:
            begin = time.perf_counter()
            outcome: int = kernels.lookup(*arguments)
            self.seconds = time.perf_counter() - begin
            return outcome

        self._timed = _TableKernels(kernels.version, _Kernel(lookup), kernels.update)
        self._function = _KernelsFunction(lambda: ctypes.addressof(self._timed))

    def address(self, device: str) -> int | None:
        """Return the address of the function that returns the kernels, like ``ops.table_kernels``."""
        return ctypes.cast(self._function, ctypes.c_void_p).value


def jit_lookups_of(work: workload.Workload) -> dict[str, Callable[[], float | None]]:
    """Return a training lookup inside jit, its bare kernel, and the lookup of an engine in torch."""
    batches = [work.batch(number) for number in range(workload.BATCHES)]
    words = [
        {name: jnp.asarray(ids.numpy().view(np.uint32).reshape(-1, 2)) for name, ids in batch.items()}
        for batch in batches
    ]

    def jitted() -> Callable[[Any], object]:
        tables = ffi.JitTables(engine_of(work))  # without an optimizer, so that lookups need no update
        look_up = jax.jit(lambda ids, token: ffi.lookup(tables, ids, None, token)[::2])
        token = tables.begin(room=work.step_ids)

        def call(ids: Any) -> None:
            nonlocal token
            vectors, token = look_up(ids, token)
            jax.block_until_ready((vectors, token))

        return call

    timed = TimedKernels()
    with mock.patch.object(ops, "table_kernels", timed.address):
        around = over(words, jitted())

    def bare() -> float:
        around()
        return timed.seconds

    other = engine_of(work)
    (table,) = other.tables

    def eager(batch: Any) -> None:
        other.lookup(batch)
        table.record_lookup()

    return {"ours": over(words, jitted()), BARE: bare, EAGER: over(batches, eager)}


def empty_lookups() -> dict[str, Callable[[], None]]:
    """Return a lookup of no ids inside jit, and an empty jitted function, of one argument each."""
    tables = ffi.JitTables(EmbeddingEngine({"feature": EmbeddingConfig(dim=DIM)}))
    none = np.zeros((0, 2), np.uint32)
    look_up = jax.jit(lambda token: ffi.lookup(tables, {"feature": none}, None, token, train=False)[2])
    nothing = jax.jit(lambda token: token + 1)
    token = tables.begin(room=0)
    other = token + 0

    def ours() -> None:
        nonlocal token
        for _ in range(100):
            token = look_up(token)
        token.block_until_ready()

    def peer() -> None:
        nonlocal other
        for _ in range(100):
            other = nothing(other)
        other.block_until_ready()

    return {"ours": ours, EMPTY: peer}


@contextmanager
def keras_rs(work: workload.Workload, threads: int) -> Iterator[dict[str, Callable[[], float | None]]]:
    """Yield the peer's step, or nothing if it is not installed."""
    if not installed("keras_rs"):
        yield {}
        return
    with Worker("keras_rs", work, "adagrad", lr=LR, device=CPU, threads=threads, clock="wall") as worker:
        worker.wait()
        yield {KERAS_RS: worker.step}


def report(case: str, rate: dict[str, float], peer_name: str) -> None:
    """Print the milliseconds of a step."""
    ours, peer = 1e3 / rate["ours"], 1e3 / rate[peer_name] if peer_name in rate else None
    ratio = None if peer is None else round(peer / ours, 3)
    peer = None if peer is None else round(peer, 3)
    harness.Result("jax_led", case, "step", "ms", round(ours, 3), peer, peer_name, ratio).print()


def main() -> None:
    args = harness.parser(__doc__ or "", devices=("cpu",)).parse_args()
    torch.set_num_threads(args.threads)
    init(threads=args.threads)
    for size, rounds in (("65k", 8 if args.quick else 30), ("4k", 30 if args.quick else 100)):
        if args.cases in (case := f"torch_led/{size}"):
            harness.progress(f"{case}, {args.threads} thread(s)")
            rate = harness.rates(steps_of(workload.make(size, DIM, CPU)), 1, rounds, CPU, burst=3)
            for peer_name in list(rate)[1:]:
                report(case, rate, peer_name)
        tables: dict[str, dict[str, int]] = (
            {"": {}} if args.quick else {"": {}, "/2M": {"features": 4, "ids": 2_000_000}}
        )
        for suffix, shape in tables.items():
            if args.cases in (case := f"keras_rs/{size}{suffix}"):
                harness.progress(f"{case}, {args.threads} thread(s)")
                work = workload.make(size, DIM, CPU, **shape)
                with keras_rs(work, args.threads) as peer:
                    rate = harness.rates({"ours": lookups_of(work), **peer}, 1, rounds, CPU)
                report(case, rate, KERAS_RS)
        if args.cases in (case := f"jit_lookup/{size}"):
            harness.progress(f"{case}, {args.threads} thread(s)")
            rate = harness.rates(jit_lookups_of(workload.make(size, DIM, CPU)), 1, rounds, CPU, burst=3)
            for peer_name in (BARE, EAGER):
                report(case, rate, peer_name)
    if args.cases in (case := "jit_lookup/empty"):
        harness.progress(case)
        report(case, harness.rates(empty_lookups(), 100, 30, CPU), EMPTY)


if __name__ == "__main__":
    main()
