"""The program of the guide in which JAX sums gradients over processes: it agrees with one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.programs import on_two_ranks

pytestmark = pytest.mark.jax
pytest.importorskip("jax")
pytest.importorskip("optax")

CHECK = """
from tests.support.near import OF_ADAM, assert_near

moved = jnp.ones((3, 2))
(shard,) = to_global(moved).addressable_shards
assert shard.data.unsafe_buffer_pointer() == moved.unsafe_buffer_pointer()

# The same training in one process.
alone = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adagrad.spec(initial_accumulator_value=0.1), group=False)
tables = jax_led.JaxTables(alone, alone.make_optimizer(lr=0.1))
random = np.random.default_rng(0)
weights = {"w": jnp.array(random.normal(0, 0.3, (8, 1)), "f")}
state = tx.init(weights)
for expected in losses:
    user, item = random.integers(0, 30, (2, 32))
    vectors, ctx = tables.lookup({"user": user, "item": item})
    labels = ((user + item) % 2).astype(np.float32)
    loss, (ours, gradients) = jax.value_and_grad(loss_of, argnums=(0, 1))(weights, vectors, labels)
    changes, state = tx.update(ours, state, weights)
    weights = optax.apply_updates(weights, changes)
    tables.apply_gradients(ctx, gradients)
    assert_near(expected, float(loss), OF_ADAM)
assert_near(np.asarray(params["w"].addressable_shards[0].data), np.asarray(weights["w"]), OF_ADAM)
rows = [
    dict(zip(columns["ids"].tolist(), columns["embedding"].tolist()))
    for columns in (table.export(member) for table in engine.tables for member in range(len(table.members)))
]
gathered = [None, None]
dist.all_gather_object(gathered, rows)
for number, columns in enumerate(
    table.export(member) for table in alone.tables for member in range(len(table.members))
):
    assert not gathered[0][number].keys() & gathered[1][number].keys()
    merged = gathered[0][number] | gathered[1][number]
    assert merged.keys() == set(columns["ids"].tolist())
    assert_near(torch.tensor([merged[key] for key in columns["ids"].tolist()]), columns["embedding"], OF_ADAM)
dist.destroy_process_group()
print("agrees")
"""


def test_gradients_summed_by_jax_agree_with_one_process(root: Path, tmp_path: Path) -> None:
    guide = (root / "docs" / "jax_led.md").read_text()
    (program,) = re.findall(r"^```\{code-block\} python\n:name: mesh\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    shutdown = "jax.distributed.shutdown()\n"
    assert program.endswith(shutdown)
    done = on_two_ranks(f"import torch\n{program.removesuffix(shutdown)}{CHECK}{shutdown}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == 2  # torch and JAX print lines about Gloo, too
