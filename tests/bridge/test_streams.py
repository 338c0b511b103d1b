"""Streams and lifetime: each side waits for work queued by the other, and memory lives until both release it.

On the CPU nothing is queued, and the tests check that the same programs are correct.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.devices import on_dlpack_devices
from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower, copies, to_jax, to_torch  # noqa: E402

SIZE = 1 << 20
CYCLES = 400_000_000
"""About a fifth of a second on a GPU, long enough for the host to run ahead."""


@pytest.fixture(autouse=True)
def jax_has_the_device(request: pytest.FixtureRequest) -> None:
    """Skip if JAX has no GPU plugin; fail if it has one that does not work."""
    if request.node.callspec.params["device"] == "cpu":
        return
    try:
        jax.local_devices(backend="gpu")
    except RuntimeError:
        if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            raise
        pytest.skip("JAX is installed without its plugin for GPUs (pip install 'jax[cuda12]')")


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Run the body on a new stream, which first waits for the current one; then wait for the new stream."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def busy(device: str) -> None:
    """Delay work that is queued on the current stream later."""
    if device != "cpu":
        torch.cuda._sleep(CYCLES)


def overwrite(device: str) -> list[torch.Tensor]:
    """Allocate freed memory and write to it, on the current stream."""
    return [torch.full((SIZE,), -1.0, device=device) for _ in range(16)]


@jax.jit
def slowly(x: jax.Array) -> jax.Array:
    """Return x + 2000, shape ``(SIZE,)``, in a loop that the compiler cannot fold."""
    return jax.lax.fori_loop(0, 2000, lambda _, value: value + 1, x)


@on_dlpack_devices
def test_memory_is_shared_both_ways(device: str) -> None:
    tensor = torch.rand(64, 16, device=device)
    before = copies()
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.device == tensor.device
    ones = jnp.ones(SIZE) if device == "cpu" else jax.device_put(jnp.ones(SIZE), jax.local_devices(backend="gpu")[0])
    assert to_torch(ones).data_ptr() == ones.unsafe_buffer_pointer()
    assert copies() == before


@on_dlpack_devices
def test_jax_waits_for_the_stream_that_computes_a_tensor(device: str) -> None:
    with side_stream(device):
        tensor = torch.zeros(SIZE, device=device)
        busy(device)
        tensor.fill_(3)
        array = to_jax(tensor)
        total = float(array.sum())  # on JAX's stream, while torch's is still busy
    assert total == 3 * SIZE


@on_dlpack_devices
def test_torch_waits_for_the_program_that_computes_an_array(device: str) -> None:
    start = to_jax(torch.zeros(SIZE, device=device))
    slowly(start).block_until_ready()  # compile
    with side_stream(device):
        got = to_torch(slowly(start)).clone()  # on the side stream, while JAX's is still busy
    assert torch.equal(got, torch.full_like(got, 2000))


@on_dlpack_devices
def test_a_tensor_may_be_dropped_while_jax_reads_it(device: str) -> None:
    slowly(to_jax(torch.zeros(SIZE, device=device))).block_until_ready()
    for _ in range(4):
        with side_stream(device):
            array = to_jax(torch.full((SIZE,), 3.0, device=device))  # drops the only reference to the tensor
            result = slowly(array)
            del array  # while the program is running
            scratch = overwrite(device)
        scratch += overwrite(device)
        assert float(result.min()) == float(result.max()) == 2003
        del scratch


@on_dlpack_devices
def test_an_array_may_be_dropped_while_torch_reads_it(device: str) -> None:
    start = to_jax(torch.ones(SIZE, device=device))
    slowly(start).block_until_ready()
    for _ in range(4):
        with side_stream(device):
            tensor = to_torch(slowly(start))  # drops the only reference to the array
            busy(device)
            total = tensor.sum(dtype=torch.float64)
            del tensor
            others = [slowly(start + number) for number in range(4)]
        assert float(total) == 2001 * SIZE
        del others


def mlp(params: Any, x: Any) -> Any:
    # By default, GPUs multiply float32 with reduced precision.
    hidden = jnp.tanh(jnp.matmul(x, params["w1"], precision="highest") + params["b1"])
    return jnp.matmul(hidden, params["w2"], precision="highest")


def tower_of_two_layers() -> JaxTower:
    random = np.random.default_rng(0)
    shapes = {"w1": (32, 64), "b1": (64,), "w2": (64, 3)}
    params = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return JaxTower(mlp, params, name="ranker")


@on_dlpack_devices
def test_a_tower_on_a_side_stream_agrees_with_the_cpu(device: str) -> None:
    twin, tower = tower_of_two_layers(), tower_of_two_layers().to(device)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(256, 3, generator=torch.Generator().manual_seed(1))
    # The tolerances allow for a GPU's matrix units, which may round more coarsely than float32 before summing.
    for _ in range(3):  # the first iteration compiles, which hides missing synchronization
        for module in (twin, tower):
            module.zero_grad()
        own = x.clone().requires_grad_()
        expected = twin(own)
        expected.backward(weight)
        with side_stream(device):
            late = torch.zeros_like(x, device=device)
            sent, gradient = x.to(device), weight.to(device)
            busy(device)
            tower_input = late.copy_(sent).requires_grad_()
            y = tower(tower_input)
            busy(device)
            y.backward(gradient * 1)  # also computed late
        assert_near(y, expected, 128)
        assert own.grad is not None
        assert tower_input.grad is not None
        assert_near(tower_input.grad, own.grad, 1024)
        for (name, mine), theirs in zip(tower.named_parameters(), twin.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert_near(mine.grad, theirs.grad, 1024, where=name)
    assert tower.copies == 0
    assert tower.compilations == 2


@on_dlpack_devices
def test_inputs_and_parameters_may_be_overwritten_after_a_tower_returns(device: str) -> None:
    def count(params: Any, x: Any) -> Any:
        return slowly(x) + params["w"]

    tower = JaxTower(count, {"w": np.ones(SIZE, np.float32)}).to(device)
    (w,) = tower.parameters()
    with torch.no_grad():
        tower(torch.zeros(SIZE, device=device))
        for _ in range(3):
            with side_stream(device):
                x = torch.full((SIZE,), 5.0, device=device)
                y = tower(x)
                x.fill_(-100)
                w.fill_(7)
                del x
                scratch = overwrite(device)
            assert torch.equal(y, torch.full_like(y, 2006))
            del scratch
            w.fill_(1)


@on_dlpack_devices
def test_training_of_towers_and_torch_modules_agrees_with_the_cpu(device: str) -> None:
    weights = []
    for where in ("cpu", device):
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), tower_of_two_layers(), torch.nn.Linear(3, 1))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        model.to(where)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(10):
            x = torch.randn(64, 8, generator=generator)
            optimizer.zero_grad()
            (model(x.to(where)) - x.sum(1, keepdim=True).to(where)).square().mean().backward()
            optimizer.step()
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert_near(*weights, 2**13)
