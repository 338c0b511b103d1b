"""Two Gloo ranks train a torch and a JAX tower with DDP and FSDP, and agree with one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.programs import on_two_ranks

pytestmark = pytest.mark.jax

PROGRAM = """
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from recis_hybrid import bridge
from tests.support.near import assert_near

line = bridge.init(threads=1)
import jax.numpy as jnp

dist.init_process_group("gloo")
rank = dist.get_rank()
assert f"local rank {rank}" in line, line

class Hybrid(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        random = np.random.default_rng(0)
        weights = {"w": random.normal(size=(6, 4)), "v": random.normal(size=(4, 1))}
        self.below = torch.nn.Linear(5, 6)
        self.jax = bridge.JaxTower(
            lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"],
            {name: value.astype(np.float32) for name, value in weights.items()},
        )
        self.torch = torch.nn.Linear(6, 1)

    def forward(self, x):
        x = self.below(x)
        return self.jax(x) + self.torch(x)

def train(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(8):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

x, y = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), torch.ones(16, 1)
half = slice(8 * rank, 8 * rank + 8)
alone = Hybrid()
start = [parameter.detach().clone() for parameter in alone.parameters()]
train(alone, x, y)
assert not any(torch.allclose(ours, theirs) for ours, theirs in zip(alone.parameters(), start, strict=True))

def compare(parameters):
    for ours, theirs in zip(parameters, alone.parameters(), strict=True):
        assert_near(ours, theirs)

for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
    together = Hybrid()
    train(DistributedDataParallel(together, **options), x[half].clone(), y[half].clone())
    compare(together.parameters())

mesh = init_device_mesh("cpu", (2,))
for reshard in (True, False):
    sharded = Hybrid()
    fully_shard(sharded.jax, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard)
    train(sharded, x[half].clone(), y[half].clone())
    compare([parameter.full_tensor() for parameter in sharded.parameters()])
dist.destroy_process_group()
print("agrees")
"""


@pytest.mark.slow
def test_ddp_in_all_bucket_modes_and_fsdp_agree_with_one_process(tmp_path: Path) -> None:
    done = on_two_ranks(PROGRAM, tmp_path)
    assert done.stdout.count("agrees") == 2, done.stderr[-3000:]
