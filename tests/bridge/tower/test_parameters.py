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


def test_replaced_parameters_are_used() -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": ones(4)})
    x = torch.rand(4)
    assert torch.equal(torch.func.functional_call(tower, {"w": torch.full((4,), 3.0)}, (x,)), x * 3)
    tower.bfloat16()
    assert tower(x.bfloat16()).dtype == torch.bfloat16
    tower.double()
    with pytest.raises(ValueError, match="parameter 'w'.*x64"):
        tower(x)
