"""Export of towers for servers with only JAX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import JaxTower  # noqa: E402

SERVER = """
import sys
for name in ("torch", "recis_hybrid"):
    sys.modules[name] = None  # importing it raises
from pathlib import Path
import jax, numpy as np, safetensors.flax
folder = Path(sys.argv[1])
exported = jax.export.deserialize((folder / "program.jax_export").read_bytes())
params = safetensors.flax.load_file(folder / "params.safetensors")
assert sorted(params) == ["layers.0.w", "mean"], sorted(params)
serve = jax.jit(exported.call)
for size in (1, 3, 7):
    x = np.load(folder.parent / f"x{size}.npy")
    np.savez(folder.parent / f"y{size}.npz", **serve(params, {"x": x}, np.arange(size, dtype=np.int32)))
"""


def normalized(params: Any, inputs: Any, ids: Any, *, state: Any, key: Any, train: bool) -> Any:
    assert (key is None) is not train
    y = (inputs["x"] - state["mean"]) @ params["layers"][0]["w"]
    return {"y": y.astype(jnp.float32), "ids": ids + 1}, state


def test_a_tower_is_served_with_only_jax_at_any_batch_size(root: Path, tmp_path: Path) -> None:
    weights = {"layers": [{"w": torch.randn(3, 2, dtype=torch.bfloat16)}]}
    tower = JaxTower(normalized, weights, state={"mean": np.ones(3, np.float32)}, name="ranker")
    tower.export(tmp_path / "tower", {"x": torch.rand(5, 3)}, torch.zeros(5, dtype=torch.int32))
    inputs = {size: torch.rand(size, 3) for size in (1, 3, 7)}
    for size, x in inputs.items():
        np.save(tmp_path / f"x{size}.npy", x.numpy())
    subprocess.run([sys.executable, "-c", SERVER, str(tmp_path / "tower")], cwd=root, check=True, timeout=300)
    tower.eval()
    for size, x in inputs.items():
        with torch.no_grad():
            ours = tower({"x": x}, torch.arange(size, dtype=torch.int32))
        served = np.load(tmp_path / f"y{size}.npz")
        assert_near(served["y"], ours["y"].numpy())
        assert served["ids"].tolist() == ours["ids"].tolist()


def test_named_dimensions_vary_and_masks_are_all_true(tmp_path: Path) -> None:
    def f(params: Any, x: Any, *, masks: Any) -> Any:
        mask = masks["length"]
        return (x * mask * params["w"]).sum(1) / mask.sum()

    tower = JaxTower(
        f, {"w": np.float32(2).reshape(())}, dims=[("batch", "length")], classes={"batch": None, "length": None}
    )
    tower.export(tmp_path / "tower", torch.rand(2, 3))
    exported = jax.export.deserialize((tmp_path / "tower" / "program.jax_export").read_bytes())
    x = torch.rand(5, 9)
    y = exported.call({"w": jnp.float32(2)}, x.numpy())
    assert_near(y, tower(x).detach().numpy())


def test_new_weights_work_with_the_same_program(tmp_path: Path) -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": np.ones(2, np.float32)})
    tower.export(tmp_path / "tower", torch.rand(1, 2))
    exported = jax.export.deserialize((tmp_path / "tower" / "program.jax_export").read_bytes())
    assert exported.call({"w": np.full(2, 3.0, np.float32)}, np.ones((4, 2), np.float32)).tolist() == [[3.0, 3.0]] * 4


def test_a_failed_export_raises_and_leaves_nothing(tmp_path: Path) -> None:
    tower = JaxTower(lambda params, x: x * params["w"], {"w": np.ones(2, np.float32)}, name="ranker")
    with pytest.raises(ValueError, match=r"ranker.*export: input\[0\].*int64"):
        tower.export(tmp_path / "tower", torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"ranker.*input\[0\]\['a'\].*expected tensors, got float"):
        tower.export(tmp_path / "tower", {"a": 1.0})
    with pytest.raises(ValueError, match="dims is for 2 inputs, got 1"):
        tower.export(tmp_path / "tower", torch.zeros(1, 2), dims=[None, None])
    with pytest.raises(ValueError, match="must have dimensions"):
        tower.export(tmp_path / "tower", torch.zeros(2), dims=[("batch", "length")])

    def halves(params: Any, x: Any) -> Any:
        return x * 2 if x.shape[0] > 4 else x

    with pytest.raises(jax.errors.InconclusiveDimensionOperation, match="batch") as caught:
        JaxTower(halves, {"w": np.ones(2, np.float32)}, name="halves").export(tmp_path / "tower", torch.zeros(5))
    assert "raised in the export of JaxTower 'halves'" in caught.value.__notes__
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tower").mkdir()
    with pytest.raises(FileExistsError, match="new folder"):
        tower.export(tmp_path / "tower", torch.zeros(1, 2))
