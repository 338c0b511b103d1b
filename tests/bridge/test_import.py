"""Import of the bridge: under one name, with a clear error without JAX, and without starting a backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


def test_a_second_copy_is_refused(root: Path) -> None:
    done = run(root, "import bridge")
    assert done.returncode != 0
    assert "use `import recis_hybrid.bridge`" in done.stderr


def test_the_error_without_jax_says_what_to_install(root: Path) -> None:
    done = run(root, "import sys; sys.modules['jax'] = None\nimport recis_hybrid.bridge")
    assert done.returncode != 0
    assert "pip install recis_hybrid[jax]" in done.stderr


def test_importing_the_bridge_starts_no_backend(root: Path) -> None:
    code = "import recis_hybrid.bridge, jax; from jax._src import xla_bridge as b; print(b.backends_are_initialized())"
    assert run(root, code).stdout.strip() == "False"


@pytest.mark.jax
@pytest.mark.parametrize("order", ["torch, jax", "jax, torch"])
def test_torch_and_jax_work_in_either_order_of_import(root: Path, order: str) -> None:
    # Both also compute before the other is imported, so that each has loaded its libraries and started its threads.
    first, second = order.split(", ")
    compute = {
        "torch": "torch.ones(64, 64) @ torch.ones(64, 64)",
        "jax": "jax.numpy.ones((64, 64)) @ jax.numpy.ones(64)",
    }
    code = f"""
import {first}
{compute[first]}
import {second}
{compute[second]}
from recis_hybrid.bridge import JaxTower, to_jax, to_torch
tensor = torch.arange(32.0)
assert to_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
tower = JaxTower(lambda params, x: jax.numpy.tanh(x @ params["w"]), {{"w": torch.full((3, 2), 0.5)}})
x = torch.rand(4, 3, requires_grad=True)
y = tower(x)
y.sum().backward()
expected = torch.tanh(x @ torch.full((3, 2), 0.5))
torch.testing.assert_close(y, expected)
torch.testing.assert_close(x.grad, torch.autograd.grad(expected.sum(), x)[0])
print("works")
"""
    done = run(root, code)
    assert done.stdout.strip() == "works", done.stderr
