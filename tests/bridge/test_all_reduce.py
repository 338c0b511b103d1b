"""Two Gloo ranks train JAX-owned parameters with unequal batches, and agree with one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.programs import on_two_ranks

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy

PROGRAM = '''
import jax
import numpy as np
import optax
import torch
import torch.distributed as dist
from recis_hybrid import bridge, optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from tests.support.near import assert_near

bridge.init(threads=1)
import jax.numpy as jnp

dist.init_process_group("gloo")
rank = dist.get_rank()
random = np.random.default_rng(0)
ids, labels = torch.arange(16) % 5, torch.from_numpy(random.normal(size=16).astype(np.float32))
CUTS = {"uneven": [0, 5, 16], "one has none": [0, 16, 16]}


def params():
    random = np.random.default_rng(1)
    return {
        "layers": [{"w": jnp.asarray(random.normal(size=(8, 6)), jnp.float32), "b": jnp.zeros(6)}],
        "head": jnp.asarray(random.normal(size=6), jnp.float32),
    }


def mlp(params, x):
    layer = params["layers"][0]
    return jnp.tanh(x @ layer["w"] + layer["b"]) @ params["head"]


def led_by_jax(group, begin, end, fused):
    """Train tables and parameters in a JAX-led loop, on the mean over the samples of all ranks."""
    several = dist.get_world_size(group) > 1
    config = EmbeddingConfig(dim=8, initializer=Normal(0, 0.5))
    engine = EmbeddingEngine({"id": config}, optimizer=optim.Adagrad.spec(initial_accumulator_value=0.1), group=group)
    sparse = optim.Adagrad(engine.parameters(), lr=0.1)
    weights, optimizer = params(), optax.adagrad(0.1)
    if several:
        reduce = bridge.GradientAllReduce(weights, group, bucket_bytes=100)
        assert reduce.buckets == [[0, 1], [2]], reduce.buckets  # by name: head, then the layer's b and w
        weights = reduce.broadcast(jax.tree.map(lambda leaf: leaf * (rank == 0), weights))
    state = optimizer.init(weights)

    @jax.jit
    def gradients_of(weights, x, y, weight):
        def loss(weights, x):
            return jnp.mean(jnp.square(mlp(weights, x) - y))

        ours, of_x = jax.grad(loss, argnums=(0, 1))(weights, x)
        return (reduce.pack(ours, weight) if fused else ours), of_x

    @jax.jit
    def apply(weights, state, ours):
        changes, state = optimizer.update(reduce.unpack(ours) if fused else ours, state, weights)
        return optax.apply_updates(weights, changes), state

    before = bridge.copies()
    for step in range(12):
        values, context = engine.lookup({"id": ids[begin:end] + step})
        x, y = bridge.to_jax(values["id"]), jnp.asarray(labels[begin:end].numpy())
        ours, of_x = gradients_of(weights, x, y, np.float32(engine.share))
        if several:
            ours = reduce.sum(ours) if fused else reduce(ours, engine.share)
        weights, state = apply(weights, state, ours)
        engine.apply_gradients(context, {"id": bridge.to_torch(of_x)}, sparse)
    assert bridge.copies() == before
    return weights


def led_by_torch(group, begin, end):
    """Train a JaxTower with an OptaxOptimizer that sums the gradients of all ranks."""
    several = dist.get_world_size(group) > 1
    tower = bridge.JaxTower(mlp, params())
    if several and rank == 1:
        for parameter in tower.parameters():
            parameter.data.zero_()  # training must start from rank 0's parameters
    share = (end - begin) / 16
    more = {"group": group, "share": lambda: share} if several else {}
    optimizer = bridge.OptaxOptimizer(tower.named_parameters(), optax.sgd(0.1, momentum=0.9), **more)
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32))[begin:end].clone()
    before = bridge.copies()
    for step in range(8):
        optimizer.zero_grad()
        if end > begin:
            (tower(x) - labels[begin:end]).square().mean().backward()
        optimizer.step()
    assert bridge.copies() == before
    return {name: bridge.to_jax(parameter.detach()) for name, parameter in tower.named_parameters()}


alone = [dist.new_group([each]) for each in range(2)][rank]
pair = dist.group.WORLD
expected, expected_towers = led_by_jax(alone, 0, 16, False), led_by_torch(alone, 0, 16)
assert not np.allclose(expected["head"], params()["head"])
for name, cuts in CUTS.items():
    got = led_by_jax(pair, cuts[rank], cuts[rank + 1], name == "uneven")
    assert_near(got, expected, where=name)
    got = led_by_torch(pair, cuts[rank], cuts[rank + 1])
    assert_near(got, expected_towers, where=name)

# A rank without gradients; narrow dtypes; the same bits on both ranks.
mixed = {"a": jnp.arange(3.0) + rank, "b": jnp.ones((2, 2), jnp.bfloat16), "c": jnp.float32(4.0)}
reduce = bridge.GradientAllReduce(mixed)
assert reduce.buckets == [[0, 2], [1]], reduce.buckets
mean = reduce(mixed)
assert mean["a"].tolist() == [0.5, 1.5, 2.5] and mean["b"].dtype == jnp.bfloat16 and mean["c"] == 4
assert reduce(mixed if rank == 0 else None, 1.0)["a"].tolist() == [0, 1, 2]
assert reduce(jax.tree.map(lambda leaf: leaf * jnp.nan, mixed) if rank else mixed, 1.0 - rank)["c"] == 4
for wrong in ({"a": mixed["a"]}, {**mixed, "a": jnp.ones(4)}):
    try:
        reduce(wrong)
        raise AssertionError("no error")
    except ValueError as error:
        assert "must have the layout of the parameters" in str(error)
try:
    bridge.GradientAllReduce({"w": jnp.ones(2 + rank)})
    raise AssertionError("no error")
except RuntimeError as error:
    assert f"those of ranks [{1 - rank}] differ from those of rank {rank}" in str(error)
dist.destroy_process_group()
print("agrees")
'''


@pytest.mark.slow
def test_unequal_batches_on_two_ranks_agree_with_one_process(tmp_path: Path) -> None:
    done = on_two_ranks(PROGRAM, tmp_path)
    assert done.stdout.count("agrees") == 2, done.stderr[-3000:]


def test_buckets_hold_leaves_of_one_dtype_up_to_their_limit() -> None:
    from recis_hybrid.bridge.all_reduce import _buckets

    f32, bf16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    shapes = [((3,), f32), ((10,), bf16), ((), f32), ((100,), f32), ((1,), f32), ((2, 5), bf16), ((0,), f32)]
    assert _buckets(shapes, 16) == [[0, 2], [1], [3], [4, 6], [5]]
    assert _buckets(shapes, 1 << 20) == [[0, 2, 3, 4, 6], [1, 5]]
    assert _buckets([], 16) == []


def test_bad_input() -> None:
    from recis_hybrid.bridge import GradientAllReduce

    with pytest.raises(RuntimeError, match="GradientAllReduce: call torch.distributed.init_process_group first"):
        GradientAllReduce({"w": jnp.ones(2)})
