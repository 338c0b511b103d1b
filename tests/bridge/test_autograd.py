import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower, _autograd  # noqa: E402


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def test_outputs_and_gradients_have_memory_of_their_own() -> None:
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


def test_gradients_cross_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert tower._imports.share([w])[0][0].unsafe_buffer_pointer() == w.data_ptr()
    assert {x.grad.data_ptr(), w.grad.data_ptr()} == set(left)
    assert tower.copies == 0


def test_residuals_that_are_parameters_inputs_or_outputs_are_not_returned() -> None:
    tower = JaxTower(lambda params, x: jnp.exp(x @ params["w"]), {"w": ones(4, 4)})
    y = tower(torch.rand(8, 4, requires_grad=True))
    (program,) = tower._caller.programs._forwards.values()
    assert len(y.grad_fn.saved_tensors) == 3  # w, x, y
    arrays, _ = tower._share([*tower.parameters(), torch.rand(8, 4)], (), {})
    assert len(program.run(*arrays)) == 1  # y, and nothing else


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
    torch.testing.assert_close(x.grad, torch.where(y != 0, x.cos(), 0.0).detach())


def test_double_backward_is_refused_and_not_silently_zero() -> None:
    tower = JaxTower(lambda params, x: jnp.tanh(x) * params["w"], {"w": ones(3)}, name="ranker")
    x = torch.rand(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(tower(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"ranker.*double backward"):
        (gradient.square().sum() + x.sum()).backward()


def test_a_parameter_written_between_forward_and_backward_is_noticed() -> None:
    tower = JaxTower(lambda params, x: x @ params["w"], {"w": ones(3, 3)})
    y = tower(torch.rand(2, 3, requires_grad=True))
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_error_of_the_backward_has_the_towers_name() -> None:
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
    import threading

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
