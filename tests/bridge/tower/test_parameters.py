"""Parameters of towers: names, copies, access."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower  # noqa: E402
from tests.support.near import assert_near  # noqa: E402


def nothing(params: Any, x: Any) -> Any:
    return x


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def test_names_are_paths_and_keys_with_dots_nest() -> None:
    params = {"encoder.layer.0.weight": ones(2), "encoder": {"bias": ones(2)}, "type": [ones(2), (ones(2),)]}
    names = {name for name, _ in JaxTower(nothing, params).named_parameters()}
    assert names == {"encoder.layer.0.weight", "encoder.bias", "type.0", "type.1.0"}
    assert list(JaxTower(nothing, ones(2)).state_dict()) == ["param"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a.b": ones(2), "a": {"b": ones(2)}}, "two leaves of params are named 'a.b'"),
        ({"a": ones(2), "a.b": ones(2)}, "'a.b' is nested below 'a'"),
        ({"": ones(2)}, "must not have empty parts"),
        ({"a": 1.0}, r"params\['a'\]: expected a JAX, numpy or torch array, got float"),
        ({"a": np.array(["x"])}, r"params\['a'\]: torch lacks the dtype"),
        ({"a": np.ones(2)}, r"params\['a'\]: has dtype float64, which JAX supports only with x64 on"),
    ],
)
def test_leaves_that_cannot_be_parameters_are_refused(params: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        JaxTower(nothing, params, name="ranker")


def test_arrays_of_all_libraries_become_aligned_copies() -> None:
    misaligned = np.arange(33, dtype=np.float32)[1:]
    own = torch.ones(2)
    params = {
        "jax": jnp.arange(3.0),
        "bfloat16": np.arange(3).astype(jnp.bfloat16),
        "swapped": np.arange(3, dtype=">f4"),
        "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "misaligned": misaligned,
        "torch": own,
        "scalar": np.float32(2.0),
        "count": np.arange(3, dtype=np.int32),
    }
    tower = JaxTower(nothing, params)
    tensors = tower.state_dict()
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in tensors.values())
    for name in ("jax", "bfloat16", "swapped", "count"):
        assert tensors[name].tolist() == [0, 1, 2]
    assert tensors["bfloat16"].dtype == torch.bfloat16
    assert tensors["strided"].tolist() == params["strided"].tolist()
    misaligned[:] = 0
    own.zero_()
    assert float(tensors["misaligned"].sum()) == sum(range(33))
    assert float(tensors["torch"].sum()) == 2
    assert [name for name, _ in tower.named_buffers()] == ["count"]


def test_parameters_may_be_shared_with_another_module() -> None:
    layer = torch.nn.Linear(3, 2)
    tower = JaxTower(
        lambda params, x: x @ params["weight"].T + params["bias"], dict(layer.named_parameters()), copy=False
    )
    assert tower.weight is layer.weight
    assert tower.bias is layer.bias
    x = torch.rand(4, 3)
    for _ in range(2):
        assert_near(tower(x), layer(x))
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        tower(x).square().sum().backward()
        assert_near([layer.weight.grad, layer.bias.grad], list(expected))
        torch.optim.SGD(tower.parameters(), lr=0.1).step()
        tower.zero_grad()
    assert tower.copies == 0


def test_without_copies_tensors_are_used_and_other_arrays_copied() -> None:
    own, count, array = torch.ones(3), torch.zeros(3, dtype=torch.int32), ones(3)
    tower = JaxTower(lambda params, x: x * params["own"], {"own": own, "count": count, "array": array}, copy=False)
    assert tower.own.data_ptr() == own.data_ptr()
    assert tower.count is count
    array[:] = 0
    own.fill_(2)
    assert tower.array.tolist() == [1, 1, 1]
    assert tower(torch.ones(3)).tolist() == [2, 2, 2]


def test_tensors_that_cannot_be_shared_are_named() -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": torch.ones(9)[1:]}, copy=False)
    with pytest.raises(ValueError, match="parameter 'w'.* 4 bytes past a multiple of 64"):
        tower(torch.ones(8))


def test_frozen_parameters_have_no_gradients() -> None:
    def two_layers(params: Any, x: Any) -> Any:
        return (x @ params["first"]) @ params["second"]

    tower = JaxTower(two_layers, {"first": ones(4, 4), "second": ones(4, 4)})
    tower.first.requires_grad_(False)
    tower(torch.ones(2, 4)).sum().backward()
    assert tower.first.grad is None
    assert tower.second.grad is not None
    # The program computes no gradient of the frozen layer: it has two inputs, the saved output of the first layer and
    # the gradient of the output, and one product.
    (program,) = tower._runner.programs._forwards.values()
    (backward,) = program.backwards.values()
    text = str(jax.make_jaxpr(backward.run)(ones(2, 4), ones(2, 4)))
    assert text.count("dot_general[") == 1
    tower.second.requires_grad_(False)
    assert not tower(torch.ones(2, 4)).requires_grad


def test_replaced_parameters_are_used() -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": ones(4)})
    x = torch.rand(4)
    assert torch.equal(torch.func.functional_call(tower, {"w": torch.full((4,), 3.0)}, (x,)), x * 3)
    tower.bfloat16()
    assert tower(x.bfloat16()).dtype == torch.bfloat16
    tower.double()
    with pytest.raises(ValueError, match="parameter 'w'.*x64"):
        tower(x)
