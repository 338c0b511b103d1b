"""Common uses of modules in training programs, for a tower and an equivalent torch module."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower, to_jax, to_torch  # noqa: E402

WEIGHT = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)


def make() -> tuple[JaxTower, torch.nn.Module]:
    """Return a tower and a torch module that computes the same function."""
    linear = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(WEIGHT.T))
    twin = torch.nn.Sequential(linear, torch.nn.Tanh())
    return JaxTower(lambda params, x: jnp.tanh(x @ params["w"]), {"w": WEIGHT}), twin


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    (weight,) = module.parameters()
    return weight.detach() if weight.shape == (4, 2) else weight.detach().t()


def test_an_exponential_average_of_the_weights() -> None:
    averages = []
    for model in make():
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        x = torch.linspace(-1, 1, 32).view(8, 4)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            ema.update_parameters(model)
        assert not torch.equal(weight_of(ema.module), weight_of(model))
        averages.append((weight_of(ema.module), ema(x).detach()))
    assert_near(averages[0], averages[1])


def test_gradients_accumulate() -> None:
    x = torch.randn(8, 4)
    for model in make():
        (weight,) = model.parameters()
        model(x).sum().backward()
        assert weight.grad is not None
        whole = weight.grad.clone()
        weight.grad = None
        for part in x.split(4):
            model(part.clone()).sum().backward()
        assert_near(weight.grad, whole)


def test_repeated_backward_passes_and_missing_gradients() -> None:
    tower = JaxTower(lambda params, x: (x * params["w"], x + params["b"]), {"w": np.ones(4, "f"), "b": np.ones(4, "f")})
    x = torch.rand(4, requires_grad=True)
    product, total = tower(x)
    product.sum().backward(retain_graph=True)
    assert x.grad is not None
    assert x.grad.tolist() == [1.0] * 4
    assert torch.equal(tower.b.grad, torch.zeros(4))  # type: ignore[arg-type, union-attr]
    (product.sum() + total.sum()).backward()
    assert x.grad.tolist() == [3.0] * 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_under_autocast(reentrant: bool) -> None:
    results = []
    for model in make():
        x = torch.linspace(-1, 1, 32).view(8, 4).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(model, x.float(), use_reentrant=reentrant)
        y.float().square().sum().backward()
        assert x.grad is not None
        results.append((y.detach().float(), x.grad))
        if isinstance(model, JaxTower):
            assert y.dtype == torch.float32  # a tower computes in the dtypes of its inputs
    # bfloat16 rounds inputs, weights, products and their functions.
    weight = torch.from_numpy(WEIGHT).abs()
    terms = x.detach().abs() @ weight
    allowed = 4 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    for got, expected, each in zip(*results, (terms, 2 * terms @ weight.T), strict=True):
        assert_near(got, expected, allowed, terms=each)


def test_autocast_below_a_tower_passes_it_bfloat16() -> None:
    tower = JaxTower(lambda params, x: (x @ params["w"].astype(x.dtype)).astype(jnp.float32), {"w": WEIGHT})
    below = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tower(below(torch.rand(8, 4)))
    y.sum().backward()
    assert y.dtype == torch.float32
    assert below.weight.grad is not None
    assert below.weight.grad.dtype == torch.float32
    assert next(tower.parameters()).grad is not None


def test_several_threads_may_call_one_tower() -> None:
    tower, twin = make()
    inputs = [torch.randn(8, 4) for _ in range(16)]
    outputs: dict[int, Any] = {}

    def serve(number: int) -> None:
        with torch.no_grad():
            outputs[number] = tower(inputs[number])

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(inputs):
        assert_near(outputs[number], twin(x).detach())


def test_inputs_may_be_overwritten_and_dropped_after_a_tower_returns() -> None:
    # Large enough that JAX would still be computing if the call did not wait.
    tower = JaxTower(lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"], {"w": np.eye(512, dtype=np.float32)})
    expected = torch.tanh(torch.full((2048, 512), 0.5))
    with torch.no_grad():
        for _ in range(3):
            x = torch.full((2048, 512), 0.5)
            y = tower(x)
            x.fill_(torch.nan)
            del x
            scratch = torch.full((2048, 512), torch.nan)
            assert_near(y, expected)
            del scratch


def test_memory_stays_alive_while_a_program_reads_it() -> None:
    @jax.jit
    def slow(x: Any) -> Any:
        return jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ x) + x, x)

    expected = to_torch(slow(to_jax(torch.full((256, 256), 0.01)))).clone()
    for _ in range(4):
        tensor = torch.full((256, 256), 0.01)
        array = to_jax(tensor)
        result = slow(array)
        del tensor, array
        scratch = [torch.full((256, 256), torch.nan) for _ in range(8)]
        assert_near(to_torch(result), expected)
        del scratch
