"""Towers inside torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower, copies  # noqa: E402
from recis_hybrid.bridge.tower import _operator  # noqa: E402


def scaled(params: Any, x: Any) -> Any:
    return {"y": jnp.tanh(x["x"] @ params["w"]), "count": (x["x"] > 0).sum(dtype=jnp.int32)}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below = torch.nn.Linear(5, 8)
        self.tower = JaxTower(scaled, {"w": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower({"x": torch.relu(self.below(x))})
        return out["y"].square().sum() * 2, out["count"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_with_a_tower_has_one_graph_and_equal_results(backend: str) -> None:
    model = Model()
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    for size in (4, 4, 7):
        x = torch.randn(size, 5)
        (loss, count), (expected, expected_count) = compiled(x), twin(x)
        assert_near(loss, expected)
        assert int(count) == int(expected_count)
        loss.backward()
        expected.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert_near(ours.grad, theirs.grad)


def test_opcheck() -> None:
    tower = JaxTower(lambda params, x: jnp.exp(x @ params["w"]), {"w": np.ones((3, 2), np.float32)})
    x = torch.rand(4, 3, requires_grad=True)
    tensors = [*tower.parameters(), x]
    tower(x)
    (program,) = tower._runner.programs._forwards.values()
    number = _operator.register_call(tower._runner, program, _operator.structs(tensors))
    torch.library.opcheck(_operator.tower_forward, (number, tensors))


def test_exceptions_of_the_function_name_the_tower_and_the_cause() -> None:
    tower = JaxTower(lambda params, x: x @ params["w"], {"w": np.ones((3, 3), np.float32)}, name="ranker")
    model = torch.nn.Sequential(torch.nn.Identity(), tower, torch.nn.Linear(3, 1))
    cause = r"dot_general requires contracting dimensions to have the same shape, got \(2,\) and \(3,\)"
    with pytest.raises(RuntimeError, match=rf"(?s)TypeError: {cause}.*raised in the forward of JaxTower 'ranker'"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.ones(2, 2))
    with pytest.raises(TypeError, match=cause) as caught:
        torch.compile(model, backend="aot_eager")(torch.ones(2, 2))
    assert "raised in the forward of JaxTower 'ranker'" in caught.value.__notes__
    # Errors of the bridge itself contain the name.
    with pytest.raises(RuntimeError, match="JaxTower 'ranker': the function must return arrays"):
        torch.compile(JaxTower(lambda params, x: None, {}, name="ranker"), fullgraph=True, backend="eager")(
            torch.ones(2)
        )
    fine: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert fine(torch.ones(2, 3)).shape == (2, 1)


def test_double_backward_of_the_operator_is_refused() -> None:
    tower = JaxTower(lambda params, x: jnp.sin(x) * params["w"], {"w": np.ones(3, np.float32)}, name="ranker")
    compiled: Any = torch.compile(tower, fullgraph=True, backend="eager")
    x = torch.rand(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    assert_near(gradient, x.cos())
    with pytest.raises(RuntimeError, match=r"ranker.*double backward"):
        torch.autograd.grad(gradient.sum(), x, allow_unused=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_tower_with_state_runs_between_graphs_and_is_refused_in_one() -> None:
    tower = JaxTower(lambda params, x, *, state: (x, state + 1), {}, state=np.ones(2, np.float32))
    with pytest.raises(Exception, match="a JaxTower with mutable state runs between graphs"):
        torch.compile(tower, fullgraph=True, backend="aot_eager")(torch.ones(2))
    assert torch.compile(tower, backend="aot_eager")(torch.ones(2)).tolist() == [1, 1]
    assert tower.state_dict()["param"].tolist() == [2, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_copies_in_a_compiled_graph_are_counted() -> None:
    tower = JaxTower(lambda params, x: x + 1, {})
    compiled: Any = torch.compile(tower, fullgraph=True, backend="aot_eager")
    aligned = torch.zeros(32)
    for x, copied in ((aligned[:16], 0), (aligned[1:17], 1)):
        before, of_tower = copies(), tower.copies
        assert torch.equal(compiled(x), x + 1)
        assert (copies() - before, tower.copies - of_tower) == (copied, copied)
