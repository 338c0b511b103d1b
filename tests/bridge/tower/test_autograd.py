"""Autograd of towers: gradients, residuals, memory, and refused transformations."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower  # noqa: E402
from recis_hybrid.bridge.tower import _autograd  # noqa: E402


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def test_outputs_and_gradients_have_their_own_memory() -> None:
    tower = JaxTower(lambda params, x: (x, x + params["b"], x + params["b"], params["b"]), {"b": ones(16)})
    x = torch.rand(4, 16, requires_grad=True)
    outputs = tower(x)
    assert len({tensor.data_ptr() for tensor in (*outputs, x, *tower.parameters())}) == 6
    sum(output.sum() for output in outputs).backward()
    (bias,) = tower.parameters()
    assert x.grad is not None
    assert bias.grad is not None
    assert torch.equal(x.grad, torch.full((4, 16), 3.0))
    assert torch.equal(bias.grad, torch.full((16,), 9.0))

    tower = JaxTower(lambda params, x: x + params["b"], {"b": ones(4, 16)})
    x, gradient = torch.rand(4, 16, requires_grad=True), torch.rand(4, 16)
    tower(x).backward(gradient)
    (bias,) = tower.parameters()
    assert x.grad is not None
    assert bias.grad is not None
    assert len({tensor.data_ptr() for tensor in (x.grad, bias.grad, gradient)}) == 3


def test_gradients_are_shared_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, left = [], []
    share, unshare = _autograd.share, _autograd.unshare

    def entering(tensor: torch.Tensor, where: str) -> Any:
        array = share(tensor, where)
        entered.append((tensor.data_ptr(), array.unsafe_buffer_pointer()))
        return array

    def leaving(arrays: Any) -> Any:
        left.extend(array.unsafe_buffer_pointer() for array in arrays)
        return unshare(arrays)

    tower = JaxTower(lambda params, x: jnp.tanh(x @ params["w"]), {"w": ones(16, 16)})
    x, gradient = torch.rand(8, 16, requires_grad=True), torch.rand(8, 16)
    y = tower(x)
    monkeypatch.setattr(_autograd, "share", entering)
    monkeypatch.setattr(_autograd, "unshare", leaving)
    y.backward(gradient)
    (w,) = tower.parameters()
    assert x.grad is not None
    assert w.grad is not None
    assert all(tensor == array for tensor, array in entered)
    assert {gradient.data_ptr(), x.data_ptr()} <= {pointer for pointer, _ in entered}
    assert tower._array_cache.share([w])[0][0].unsafe_buffer_pointer() == w.data_ptr()
    assert {x.grad.data_ptr(), w.grad.data_ptr()} == set(left)
    assert tower.copies == 0


@pytest.mark.parametrize("x_requires_grad", [False, True])
def test_small_gradients_of_one_shape_share_a_buffer_and_are_independent(x_requires_grad: bool) -> None:
    random = np.random.default_rng(0)
    # Six of 64 bytes and five of 256 are stacked; the others are too few, not a multiple of 64 bytes, or too large.
    shapes = {"a": [(16,)] * 6, "b": [(4, 16)] * 5, "c": [(32,)] * 3, "d": [(3,)] * 5, "e": [(5, 1024)] * 4}
    params = {
        f"{kind}{number}": random.normal(size=shape).astype(np.float32)
        for number in range(6)
        for kind, of_kind in shapes.items()
        for shape in of_kind[number : number + 1]
    }

    def total(params: dict[str, Any], x: Any) -> Any:
        return sum((number * jnp.sin(x * leaf).sum() for number, leaf in enumerate(params.values())), start=x)

    tower = JaxTower(total, params)
    tower.get_parameter("a2").requires_grad_(False)
    x = torch.tensor(0.5, requires_grad=x_requires_grad)
    tower(x).backward()
    expected = jax.grad(lambda params: total(params, 0.5))(params)
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    assert gradients.pop("a2") is None
    for name, gradient in gradients.items():
        assert gradient is not None
        assert_near(gradient, torch.from_numpy(np.array(expected[name])))
        assert gradient.shape == params[name].shape
        assert gradient.data_ptr() % 64 == 0
        # A write to one changes neither the others nor the versions that autograd checks.
        assert not gradient._is_view()
        versions = {other: each._version for other, each in gradients.items() if each is not None}
        before = {other: each.clone() for other, each in gradients.items() if each is not None}
        gradient.add_(1)
        assert {n: e._version for n, e in gradients.items() if e is not None} == versions | {name: versions[name] + 1}
        assert all(torch.equal(e, before[n]) for n, e in gradients.items() if e is not None and n != name)
    storages = {name: e.untyped_storage().data_ptr() for name, e in gradients.items() if e is not None}
    assert len({storages[name] for name in storages if name[0] == "a"}) == 1
    assert len({storages[name] for name in storages if name[0] == "b"}) == 1
    assert len(set(storages.values())) == 2 + 3 + 5 + 4


def test_residuals_that_are_parameters_inputs_or_outputs_are_not_returned_again() -> None:
    tower = JaxTower(lambda params, x: jnp.exp(x @ params["w"]), {"w": ones(4, 4)})
    y = tower(torch.rand(8, 4, requires_grad=True))
    (program,) = tower._runner.programs._forwards.values()
    assert len(y.grad_fn.saved_tensors) == 4  # an empty anchor, w, x, y
    arrays, _ = tower._share([*tower.parameters(), torch.rand(8, 4)], (), {})
    assert len(program.run(*arrays)) == 1  # only y


def test_several_outputs_with_and_without_gradients_pass_gradcheck() -> None:
    def f(params: Any, x: Any) -> Any:
        return jnp.sin(x) * params["w"], {"count": (x > 0).sum(), "square": params["w"] ** 2 + x.sum()}

    with jax.enable_x64(True):
        tower = JaxTower(f, {"w": np.array([0.5, -1.0, 2.0])})
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        both = lambda x, *_: (lambda out: (out[0], out[1]["square"]))(tower(x))  # noqa: E731
        assert torch.autograd.gradcheck(both, (x, *tower.parameters()))


def test_complex_gradients_follow_torch() -> None:
    with jax.enable_x64(True):
        tower = JaxTower(lambda params, z: (jnp.sin(z) * params["w"]) ** 2, {"w": np.array([1 + 2j, 0.5 - 1j])})
        z = torch.randn(2, dtype=torch.complex128, requires_grad=True)
        assert torch.autograd.gradcheck(lambda z, *_: tower(z), (z, *tower.parameters()))


def test_random_keys_may_be_residuals() -> None:
    def dropped(params: Any, x: Any, data: Any) -> Any:
        key = jax.random.split(jax.random.wrap_key_data(data))[0]
        return jax.checkpoint(lambda x: jnp.sin(x * params["w"]) * jax.random.bernoulli(key, 0.5, x.shape))(x)

    tower = JaxTower(dropped, {"w": ones(64)})
    x = torch.rand(64, requires_grad=True)
    y = tower(x, torch.tensor([0, 7], dtype=torch.uint32))
    y.backward(torch.ones(64))
    assert_near(x.grad, torch.where(y != 0, x.cos(), 0.0).detach())


def cubes() -> tuple[JaxTower, torch.nn.Parameter, torch.Tensor]:
    """Return a tower, its parameter and an input; backward saves the cube of the input, not the input."""
    tower = JaxTower(lambda params, x: (x**3) * params["w"], {"w": ones(3)}, name="ranker")
    return tower, next(tower.parameters()), torch.rand(3, requires_grad=True)


def by_backward(first: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    first.square().sum().backward()


def beside_a_first_derivative(first: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    torch.autograd.grad(first.square().sum() + (x * w).sum(), [x, w])


def by_the_input(first: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    torch.autograd.grad(first.sum(), x, allow_unused=True)


def by_the_parameter(first: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    torch.autograd.grad(first.sum(), w, allow_unused=True)


def into_chosen_leaves(first: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    (first.square().sum() + w.sum()).backward(inputs=[w])


@pytest.mark.parametrize(
    "differentiate", [by_backward, beside_a_first_derivative, by_the_input, by_the_parameter, into_chosen_leaves]
)
def test_double_backward_is_refused(differentiate: Callable[..., None]) -> None:
    tower, w, x = cubes()
    for leaf in (x, w):
        (first,) = torch.autograd.grad(tower(x * 2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"ranker.*double backward"):
            differentiate(first, x, w)


def test_double_backward_with_respect_to_the_incoming_gradient_is_refused() -> None:
    tower, _, x = cubes()
    gradient = torch.rand(3, requires_grad=True)
    (first,) = torch.autograd.grad(tower(x), x, gradient, create_graph=True)
    with pytest.raises(RuntimeError, match=r"ranker.*double backward"):
        torch.autograd.grad(first.sum(), gradient, allow_unused=True)


@pytest.mark.parametrize("name", ["jvp", "hvp", "vhp", "hessian"])
def test_products_with_second_derivatives_are_refused(name: str) -> None:
    tower, _, x = cubes()
    function = tower if name == "jvp" else lambda x: tower(x).sum()
    products = () if name == "hessian" else (torch.ones(3),)
    with pytest.raises(RuntimeError, match=r"ranker.*double backward"):
        getattr(torch.autograd.functional, name)(function, x.detach(), *products)


def test_create_graph_without_a_second_derivative_works() -> None:
    tower, w, x = cubes()
    first = torch.autograd.grad(tower(x).sum(), [x, w], create_graph=True)
    assert_near(first, ((3 * x**2).detach(), (x**3).detach()))
    (first[0].detach() * x).sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # within torch: make_dual
def test_batched_gradients_and_forward_mode_are_refused() -> None:
    tower, _, x = cubes()
    with pytest.raises(RuntimeError, match=r"ranker.*is_grads_batched"):
        torch.autograd.grad(tower(x), x, torch.eye(3), is_grads_batched=True)
    with pytest.raises(RuntimeError, match=r"ranker.*vectorize=True"):
        torch.autograd.functional.jacobian(tower, torch.ones(3), vectorize=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"ranker.*jax.jvp"):
        tower(torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3)))
    jacobian = torch.autograd.functional.jacobian(tower, torch.ones(3))
    assert torch.equal(jacobian, 3 * torch.eye(3))


@pytest.mark.parametrize(
    ("other", "now"),
    [(torch.ones(1, 3), r"\(1, 3\), torch.float32"), (torch.ones(3).bfloat16(), r"\(3,\), torch.bfloat16")],
)
def test_a_parameter_that_changes_shape_or_dtype_before_backward_is_refused(other: torch.Tensor, now: str) -> None:
    tower, w, x = cubes()
    y = tower(x)
    w.data = other
    with pytest.raises(RuntimeError, match=rf"ranker.*parameter 'w' was \(3,\), torch.float32 in forward and is {now}"):
        y.sum().backward()


def test_an_input_that_changes_shape_or_dtype_before_backward_is_refused() -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": ones(3)}, name="ranker")
    x = torch.rand(3)
    y = tower(x)
    x.data = torch.rand(1, 3)
    with pytest.raises(RuntimeError, match=r"ranker.*an input was \(3,\)"):
        y.sum().backward()


def test_threads_that_trace_one_signature_concurrently_use_one_program() -> None:
    barrier = threading.Barrier(2)

    def meet(params: Any, x: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(5)  # both threads are tracing; later traces find the barrier broken
        barrier.abort()
        return jnp.sin(x) * params["w"]

    tower = JaxTower(meet, {"w": ones(3)})
    gradients = []

    def train() -> None:
        x = torch.ones(3, requires_grad=True)
        gradients.append(torch.autograd.grad(tower(x), x, torch.ones(3))[0])

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (program,) = tower._runner.programs._forwards.values()
    assert len(program.backwards) == 1
    assert tower.compilations == 2
    assert_near(gradients, [torch.ones(3).cos()] * 2)


def test_a_write_to_a_parameter_between_forward_and_backward_raises() -> None:
    tower = JaxTower(lambda params, x: x @ params["w"], {"w": ones(3, 3)})
    y = tower(torch.rand(2, 3, requires_grad=True))
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_exceptions_in_backward_name_the_tower() -> None:
    @jax.custom_vjp
    def bad(x: Any) -> Any:
        return x * 2

    def refuse(residual: Any, gradient: Any) -> Any:
        raise KeyError("inner")

    bad.defvjp(lambda x: (x * 2, None), refuse)
    tower = JaxTower(lambda params, x: bad(x * params["w"]), {"w": ones(3)}, name="ranker")
    with pytest.raises(KeyError, match="inner") as caught:
        tower(torch.ones(3)).sum().backward()
    assert "raised in the backward of JaxTower 'ranker'" in caught.value.__notes__


def test_backward_in_another_thread_keeps_x64() -> None:
    with jax.enable_x64(True):
        tower = JaxTower(lambda params, x: x * params["w"], {"w": np.ones(3)})
        x = torch.rand(3, dtype=torch.float64, requires_grad=True)
        y = tower(x)
        thread = threading.Thread(target=lambda: y.backward(torch.ones(3, dtype=torch.float64)))
        thread.start()
        thread.join()
    assert x.grad is not None
    assert x.grad.dtype == torch.float64


def test_checkpointing_frozen_parameters_and_copies_of_the_module() -> None:
    tower = JaxTower(lambda params, x: jnp.tanh(x @ params["w"]), {"w": np.eye(3, dtype=np.float32)})
    x = torch.rand(2, 3, requires_grad=True)
    checkpoint(tower, x, use_reentrant=False).sum().backward()
    with_checkpoint, x.grad = x.grad, None
    tower(x).sum().backward()
    assert torch.equal(x.grad, with_checkpoint)

    (w,) = tower.parameters()
    w.requires_grad_(False)
    w.grad = None
    tower(x).sum().backward()
    assert w.grad is None

    twin = copy.deepcopy(tower)
    with torch.no_grad():
        next(twin.parameters()).zero_()
        assert float(twin(x).sum()) == 0
        assert float(tower(x).sum()) > 0


def test_strides_of_flat_dimensions_compile_once() -> None:
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    tower = JaxTower(lambda params, x: x * params["w"], {"w": ones(8, 1)})
    with torch.no_grad():
        tower(torch.rand(8, 1))
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            tower(torch.empty_strided((8, 1), (1, 8)).fill_(1))
            tower(torch.rand(1, 8).t())
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_a_function_without_outputs_is_refused() -> None:
    with pytest.raises(TypeError, match="must return arrays"):
        JaxTower(lambda params, x: None, {"w": ones(2)})(torch.ones(2))
