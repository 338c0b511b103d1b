"""JaxTower, compared with the same function in torch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.near import OF_ADAM, assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower  # noqa: E402


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def twin(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def terms_of_gradient(params: dict[str, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
    """Return the magnitude of the terms of the gradient of ``x``: the derivative of tanh, 1 - tanh², cancels."""
    return gradient.abs() @ params["w2"].detach().abs().T @ params["w1"].detach().abs().T


def parameters(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"w1": (6, 5), "b1": (5,), "w2": (5, 2)}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def test_a_tower_constructed_in_inference_mode_can_be_trained() -> None:
    def counting(params: Any, x: Any, *, state: Any) -> Any:
        return mlp(params, x), {"calls": state["calls"] + 1}

    x = torch.ones(3, 6)
    with torch.inference_mode():
        tower = JaxTower(counting, parameters(), state={"calls": np.zeros((), np.float32)})
        tower(x)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    before = tower(x).square().sum()
    before.backward()
    optimizer.step()
    with torch.inference_mode():
        assert tower(x).square().sum() < before
    tower(x).sum().backward()
    assert float(tower.calls) == 4


def test_gradients_equal_those_of_the_torch_twin_in_float64() -> None:
    with jax.enable_x64(True):
        tower = JaxTower(mlp, parameters(np.float64))
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        named = {name: p.detach().clone().requires_grad_() for name, p in tower.named_parameters()}
        ours, theirs = tower(x), twin(named, x.detach().requires_grad_())
        assert_near(ours, theirs)
        weight = torch.randn(7, 2, dtype=torch.float64)
        x2 = x.detach().clone().requires_grad_()
        (ours * weight).sum().backward()
        (twin(named, x2) * weight).sum().backward()
        assert_near(x.grad, x2.grad, terms=terms_of_gradient(named, weight))
        for name, parameter in tower.named_parameters():
            assert_near(parameter.grad, named[name].grad)


def test_gradcheck() -> None:
    with jax.enable_x64(True):
        tower = JaxTower(mlp, parameters(np.float64))
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: tower(x), (x, *tower.parameters()), fast_mode=False)


def test_jax_reads_inputs_and_parameters_in_place() -> None:
    seen: dict[str, int] = {}

    def f(params: Any, x: Any) -> Any:
        return x * params["w"]

    tower = JaxTower(f, {"w": np.ones(16, np.float32)})
    share = tower._share

    def spy(tensors: Any, *rest: Any) -> Any:
        arrays, specs = share(tensors, *rest)
        for number, (tensor, array) in enumerate(zip(tensors, arrays, strict=True)):
            seen[f"{number}"] = array.unsafe_buffer_pointer() - tensor.data_ptr()
        return arrays, specs

    tower._share = spy  # type: ignore[method-assign]
    x = torch.rand(4, 16, requires_grad=True)
    out = tower(x)
    assert seen == {"0": 0, "1": 0}
    gradient = torch.rand(4, 16)
    out.backward(gradient)
    assert tower.copies == 0  # the gradient was shared
    assert_near(x.grad, gradient)
    assert all(p.data_ptr() % 64 == 0 for p in tower.parameters())


def test_outputs_are_in_jax_memory() -> None:
    tower = JaxTower(lambda params, x: x + params["b"], {"b": np.zeros(16, np.float32)})
    with torch.no_grad():
        y = tower(torch.zeros(4, 16))
    assert y.data_ptr() % 64 == 0
    assert not y.requires_grad


def test_an_expanded_gradient_is_copied_and_counted() -> None:
    tower = JaxTower(mlp, parameters())
    x = torch.rand(4, 6, requires_grad=True)
    tower(x).sum().backward()
    assert tower.copies == 1
    reference = {name: p.detach() for name, p in tower.named_parameters()}
    x2 = x.detach().clone().requires_grad_()
    twin(reference, x2).sum().backward()
    assert_near(x.grad, x2.grad, terms=terms_of_gradient(reference, torch.ones(4, 2)))


def test_an_optimizer_trains_a_tower_like_the_twin() -> None:
    tower = JaxTower(mlp, parameters())
    named = {name: nn.Parameter(p.detach().clone()) for name, p in tower.named_parameters()}
    ours, theirs = torch.optim.Adam(tower.parameters(), lr=0.05), torch.optim.Adam(named.values(), lr=0.05)
    x, y = torch.randn(32, 6), torch.randn(32, 2)
    for _ in range(20):
        for optimizer, output in ((ours, tower), (theirs, lambda x: twin(named, x))):
            optimizer.zero_grad()
            (output(x) - y).square().mean().backward()
            optimizer.step()
    for name, parameter in tower.named_parameters():
        assert_near(parameter, named[name], OF_ADAM)


def test_state_dict_round_trip() -> None:
    nested = {"layers": [{"w": np.ones((3, 2), np.float32)}, {"w": np.zeros((2, 1), np.float32)}]}

    def f(params: Any, x: Any) -> Any:
        for layer in params["layers"]:
            x = x @ layer["w"]
        return x

    tower, other = JaxTower(f, nested), JaxTower(f, nested)
    assert list(tower.state_dict()) == ["layers.0.w", "layers.1.w"]
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.uniform_()
    other.load_state_dict(tower.state_dict())
    x = torch.rand(4, 3)
    assert torch.equal(tower(x), other(x))


def pickled(tower: JaxTower) -> JaxTower:
    return cast(JaxTower, pickle.loads(pickle.dumps(tower)))


def saved_by_torch(tower: JaxTower) -> JaxTower:
    torch.save(tower, file := io.BytesIO())
    file.seek(0)
    return cast(JaxTower, torch.load(file, weights_only=False))


def counted(params: Any, x: Any, *, state: Any) -> Any:
    return x * params["w"], state + 1


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_copies_pickles_and_saved_modules_compute_the_same(copied: Callable[[JaxTower], JaxTower]) -> None:
    tower = JaxTower(mlp, parameters(), dims=[("batch",)], classes={"batch": None}, name="ranker")
    x = torch.rand(5, 6)
    expected = tower(x)
    expected.sum().backward()
    twin = copied(tower)
    y = twin(x)
    assert torch.equal(y, expected)
    assert [name for name, _ in twin.named_parameters()] == ["b1", "w1", "w2"]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).any()
    assert torch.equal(tower(x), expected)
    assert not torch.compile(twin, fullgraph=True, backend="eager")(x).any()

    stateful = JaxTower(counted, {"w": np.ones(2, np.float32)}, state=np.zeros(2, np.float32))
    stateful(torch.ones(2))
    again = copied(stateful)
    again(torch.ones(2))
    assert again.state_dict()["param"].tolist() == [2, 2]
    assert stateful.state_dict()["param"].tolist() == [1, 1]


def test_integers_trees_and_unused_outputs() -> None:
    def f(params: Any, inputs: Any, ids: Any) -> Any:
        picked = params["table"][ids] * inputs["scale"]
        return {"sum": picked.sum(1), "ids": ids + 1, "unused": picked * 2}

    tower = JaxTower(f, {"table": np.arange(12, dtype=np.float32).reshape(4, 3)})
    scale = torch.ones(2, 3, requires_grad=True)
    ids = torch.tensor([1, 3], dtype=torch.int32)
    out = tower({"scale": scale}, ids)
    assert out["ids"].tolist() == [2, 4]
    assert not out["ids"].requires_grad
    out["sum"].sum().backward()
    assert scale.grad is not None
    assert scale.grad.tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]


def test_a_shape_compiles_once() -> None:
    tower = JaxTower(mlp, parameters())
    for size in (4, 4, 8, 4, 8):
        tower(torch.rand(size, 6)).sum().backward()
    assert tower.compilations == 4  # forward and backward of two sizes
    with torch.no_grad():
        tower(torch.rand(4, 6))
        tower(torch.rand(4, 6))
    assert tower.compilations == 5


def test_exceptions_of_the_function_are_raised_with_a_note() -> None:
    def f(params: Any, x: Any) -> Any:
        raise ZeroDivisionError("inside")

    tower = JaxTower(f, {"w": np.ones(2, np.float32)}, name="ranker")
    with pytest.raises(ZeroDivisionError, match="inside") as caught:
        tower(torch.ones(2))
    assert any("ranker" in note for note in caught.value.__notes__)


def test_repr_lists_names_dtypes_shapes_and_the_number_of_parameters() -> None:
    params = {"layers": [{"w": np.ones((3, 2), np.float32), "b": np.ones(2, jnp.bfloat16)}], "count": np.int32(1)}
    expected = """JaxTower(mlp: 8 parameters
  count: int32[], buffer
  layers.0.b: bfloat16[2]
  layers.0.w: float32[3, 2]
)"""
    assert repr(JaxTower(mlp, params)) == expected
    many = JaxTower(mlp, [np.ones(1, np.float32)] * 25)
    assert repr(many).splitlines()[-3:] == ["  19: float32[1]", "  … and 5 more", ")"]


def test_bad_input_is_refused() -> None:
    tower = JaxTower(mlp, parameters(), name="ranker")
    with pytest.raises(ValueError, match=r"ranker.*input\[0\].*64"):
        tower(torch.zeros(4 * 6 + 1)[1:].view(4, 6))
    with pytest.raises(TypeError, match="ranker.*gradients need a floating-point output"):
        JaxTower(lambda params, x: x @ params["w1"] > 0, parameters(), name="ranker")(torch.ones(2, 6))
    with pytest.raises(ValueError, match="x64"):
        JaxTower(mlp, parameters(np.float64))
    with pytest.raises(TypeError, match="must be a function"):
        JaxTower(3, {})  # type: ignore[arg-type]
