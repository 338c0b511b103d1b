"""The bridge, compared with fused JAX, torch, and the public DLPack functions.

    python -m benchmarks.bridge [--quick] [--threads 2] [--cases mlp]

- ``mlp/B1024``, ``mlp/B4096``: forward and backward of an MLP 1024 → 1024 → 512 → 1 in a ``JaxTower``; peers: one
  jitted ``jax.value_and_grad``, torch, and torch-jax-interop if ``make bench-peers`` has installed it.
- ``leaves100``: the same with 100 small parameters, without torch.
- ``import``, ``export``: one tensor to JAX and one array to torch; peers: the public functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import harness
from benchmarks.peers.worker import ENVIRONMENTS, installed
from recis_hybrid.bridge import JaxTower, to_jax, to_torch

CPU = torch.device("cpu")


def mlp(params: dict[str, Any], x: Any) -> Any:
    x = jax.nn.relu(x @ params["w0"] + params["b0"])
    x = jax.nn.relu(x @ params["w1"] + params["b1"])
    return x @ params["w2"] + params["b2"]


def mlp_in_torch(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(torch.addmm(params["b0"], x, params["w0"]))
    x = torch.relu(torch.addmm(params["b1"], x, params["w1"]))
    return torch.addmm(params["b2"], x, params["w2"])


def mlp_parameters() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    widths = [1024, 1024, 512, 1]
    params = {}
    for n, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
        params[f"w{n}"] = (random.normal(size=(fan_in, fan_out)) / fan_in**0.5).astype(np.float32)
        params[f"b{n}"] = np.zeros(fan_out, np.float32)
    return params


def train(module: Callable[[torch.Tensor], torch.Tensor], params: list[torch.Tensor], x: torch.Tensor) -> None:
    torch.autograd.grad(module(x).square().mean(), params)


def fused(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(lambda params, x: jnp.square(f(params, x)).mean()))


def report(case: str, metric: str, rate: dict[str, float], peers: dict[str, str]) -> None:
    """Print a line for each peer, in milliseconds per step or microseconds per tensor."""
    unit, factor = ("us", 1e6) if metric == "tensor" else ("ms", 1e3)
    for name, peer in peers.items():
        peer_rate = rate.get(name)
        harness.Result(
            "bridge",
            case,
            metric,
            unit,
            round(factor / rate["ours"], 3),
            peer_rate and round(factor / peer_rate, 3),
            peer,
            peer_rate and round(rate["ours"] / peer_rate, 3),
        ).print()


def interop(f: Callable[..., Any], params: Any, x: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Return the step of torch-jax-interop, if it is installed."""
    if not installed("interop"):
        return {}
    if (site := str(ENVIRONMENTS / "interop" / "site")) not in sys.path:
        sys.path.append(site)
    from torch_jax_interop import WrappedJaxFunction

    module = WrappedJaxFunction(jax.jit(f), jax.tree.map(jnp.asarray, params))
    parameters = list(module.parameters())
    return {"interop": lambda: train(module, parameters, x)}


def mlp_case(batch: int, rounds: int) -> None:
    params, x = mlp_parameters(), torch.randn(batch, 1024)
    tower = JaxTower(mlp, params)
    parameters = list(tower.parameters())
    own = {name: torch.from_numpy(value).clone().requires_grad_() for name, value in params.items()}
    step, arrays, x_array = fused(mlp), jax.tree.map(jnp.asarray, params), jnp.asarray(x.numpy())
    steps: dict[str, Callable[[], None]] = {
        "ours": lambda: train(tower, parameters, x),
        "jax": lambda: _drop(jax.block_until_ready(step(arrays, x_array))),
        "torch": lambda: train(lambda x: mlp_in_torch(own, x), list(own.values()), x),
        **interop(mlp, params, x),
    }
    # Bursts, because torch's threads keep spinning for a while and slow the step that follows.
    rate = harness.rates(steps, 1, rounds, CPU, burst=3)
    peers = {"jax": "fused jax.value_and_grad", "torch": "torch", "interop": "torch-jax-interop"}
    report(f"mlp/B{batch}", "forward + backward", rate, peers)


def leaves_case(rounds: int) -> None:
    def total(params: list[Any], x: Any) -> Any:
        return sum((x * leaf for leaf in params), x)

    params, x = [np.full(16, 0.1, np.float32)] * 100, torch.randn(16)
    tower, step = JaxTower(total, params), fused(total)
    parameters = list(tower.parameters())
    arrays, x_array = jax.tree.map(jnp.asarray, params), jnp.asarray(x.numpy())
    steps: dict[str, Callable[[], None]] = {
        "ours": lambda: train(tower, parameters, x),
        "jax": lambda: _drop(jax.block_until_ready(step(arrays, x_array))),
        **interop(total, params, x),
    }
    rate = harness.rates(steps, 1, 4 * rounds, CPU, burst=10)
    peers = {"jax": "fused jax.value_and_grad", "interop": "torch-jax-interop"}
    report("leaves100", "forward + backward", rate, peers)


def conversion_case(case: str, rounds: int) -> None:
    tensor = torch.zeros(64, 64)
    array = to_jax(tensor)
    count = 1000

    def repeat(call: Callable[[], object]) -> Callable[[], None]:
        def step() -> None:
            for _ in range(count):
                call()

        return step

    steps = {
        "import": {
            "ours": repeat(lambda: to_jax(tensor)),
            "peer": repeat(lambda: jax.dlpack.from_dlpack(tensor, copy=False)),
        },
        "export": {"ours": repeat(lambda: to_torch(array)), "peer": repeat(lambda: torch.from_dlpack(array))},
    }[case]
    peer = {"import": "jax.dlpack.from_dlpack", "export": "torch.from_dlpack"}[case]
    report(case, "tensor", harness.rates(steps, count, rounds, CPU), {"peer": peer})


def _drop(_: object) -> None:
    return None


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(threads=2)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("these cases run on the CPU only; omit --device cuda")
    torch.set_num_threads(args.threads)
    rounds = 7 if args.quick else 25
    cases: dict[str, Callable[[], None]] = {
        "mlp/B1024": lambda: mlp_case(1024, rounds),
        "mlp/B4096": lambda: mlp_case(4096, rounds),
        "leaves100": lambda: leaves_case(rounds),
        "import": lambda: conversion_case("import", rounds),
        "export": lambda: conversion_case("export", rounds),
    }
    for name, run in cases.items():
        if args.cases in name:
            harness.progress(f"{name}, {args.threads} thread(s)")
            run()


if __name__ == "__main__":
    main()
