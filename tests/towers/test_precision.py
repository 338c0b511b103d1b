"""Towers in bfloat16: under autocast, as in TorchStep(precision="bfloat16"), and with bfloat16 parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recis_hybrid.pipelines import TorchStep
from recis_hybrid.saver import Saver
from recis_hybrid.towers import HfTower, add_lora, hf_tower
from tests.support.near import assert_near
from tests.support.pretrained import Regression, model_of

pytestmark = [pytest.mark.jax, pytest.mark.usefixtures("compiled_once")]
pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")

FRAMEWORKS: list[Any] = ["torch", "jax"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 13, "max_position_embeddings": 12}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SIZES, **TEXT),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **TEXT, num_key_value_heads=1, head_dim=8),
    "vit": lambda: transformers.ViTConfig(**SIZES, image_size=8, patch_size=4),
}
ROWS, LENGTH = 8, 6
KEY_BIASES = ("key.bias", "k_proj.bias")
BFLOAT16 = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
"""A rounding of bfloat16 in roundings of float32."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, path in found.items():
        model_of(CONFIGS[name]()).save_pretrained(path)
    return found


def tower_of(path: Path, framework: Any, **options: Any) -> HfTower:
    pixels = "vit" in path.name
    classes = {"batch": [ROWS]} if pixels else {"batch": [ROWS], "length": [LENGTH]}
    return hf_tower(path, framework, classes=classes, **options)


def inputs_of(name: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    if name == "vit":
        return torch.randn(ROWS, 3, 8, 8, generator=draw)
    return torch.randint(1, 13, (ROWS, LENGTH), generator=draw)


def output_and_gradients(tower: HfTower, inputs: Tensor, *, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output in evaluation mode, and the gradients of a weighted sum of it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = tower.eval()(inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output.float() * weights).sum().backward()
    # Without the bias of keys, whose gradient is 0 but for rounding.
    named = tower.named_parameters()
    return output.detach(), {n: p.grad for n, p in named if p.grad is not None and not n.endswith(KEY_BIASES)}


def error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the error of all tensors together, relative to their size."""
    parts = [
        (got[name].double() - each.double()).square().sum() / each.double().square().sum()
        for name, each in exact.items()
    ]
    return float(torch.stack(parts).mean().sqrt())


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_is_that_of_torch(folders: dict[str, Path], name: str) -> None:
    inputs = inputs_of(name)
    exact, exact_gradients = output_and_gradients(tower_of(folders[name], "torch", pool="cls"), inputs)
    errors = {}
    for framework in FRAMEWORKS:
        tower = tower_of(folders[name], framework, pool="cls")
        output, gradients = output_and_gradients(tower, inputs, autocast=True)
        assert output.dtype == torch.float32
        assert {each.dtype for each in gradients.values()} == {torch.float32}
        assert_near(output, exact, 4 * BFLOAT16)
        errors[framework] = error({"": output}, {"": exact}), error(gradients, exact_gradients)
    # Products of bfloat16 have such errors, and those of float32 much smaller ones.
    for ours, theirs in zip(errors["jax"], errors["torch"], strict=True):
        assert theirs / 4 < ours < 1.5 * theirs


def test_adapters_and_recomputation_under_autocast(folders: dict[str, Path]) -> None:
    inputs, found = inputs_of("bert"), {}
    for framework in FRAMEWORKS:
        for recompute in (False, True):
            torch.manual_seed(0)
            tower = tower_of(folders["bert"], framework, pool="mean", recompute=recompute)
            add_lora(tower, ["query", "value"], rank=2)
            with torch.no_grad():
                for adapter in (each for name, each in tower.named_parameters() if "lora_B" in name):
                    adapter.normal_(generator=torch.Generator().manual_seed(2))
            found[framework, recompute] = output_and_gradients(tower, inputs, autocast=True)
    for framework in FRAMEWORKS:
        assert_near(found[framework, True], found[framework, False], 4 * BFLOAT16)
    assert_near(found["jax", False][0], found["torch", False][0], 4 * BFLOAT16)
    assert found["jax", False][1].keys() == found["torch", False][1].keys()
    assert error(found["jax", False][1], found["torch", False][1]) < 4 * torch.finfo(torch.bfloat16).eps


def test_compiled_towers_follow_autocast(folders: dict[str, Path]) -> None:
    inputs = inputs_of("bert")
    tower = tower_of(folders["bert"], "jax", pool="mean")
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = tower(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            expected = tower(inputs)
            assert torch.equal(compiled(inputs), expected)
        assert torch.equal(compiled(inputs), plain)
    assert not torch.equal(plain, expected)


def step_of(path: Path, framework: Any, precision: Any, dtype: torch.dtype) -> TorchStep:
    model = Regression(tower_of(path, framework, pool="mean", dtype=dtype))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    return TorchStep(model, nn.functional.mse_loss, [optimizer], precision=precision, clip_grad_norm=1.0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.float32), ("float32", torch.bfloat16)])
def test_training_converges_and_resumes_bitwise(
    folders: dict[str, Path], tmp_path: Path, framework: Any, precision: Any, dtype: torch.dtype
) -> None:
    label = torch.randn(ROWS, generator=torch.Generator().manual_seed(3))
    batches = [{"ids": inputs_of("bert"), "label": label}] * 2

    def losses(step: TorchStep, number: int) -> list[float]:
        found = []
        for _ in range(number):
            torch.manual_seed(step.updates)  # of dropout
            found.append(float(step(*batches)["loss"]))
            trained = [p for p in step.model.parameters() if p.requires_grad]
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
        return found

    step = step_of(folders["bert"], framework, precision, dtype)
    first = losses(step, 6)
    saver = Saver(tmp_path)
    saver.save(step.updates, step.parts())
    saver.wait()
    later = losses(step, 6)
    assert max(later[-2:]) < first[0] / 2

    tower = step.model.tower
    (optimizer,) = step.optimizers.values()
    assert {each.dtype for each in tower.parameters()} == {dtype}
    # As in torch, moments have the dtype of the parameters.
    assert all(optimizer.state[each]["exp_avg"].dtype == dtype for each in tower.parameters() if each.requires_grad)

    restored = step_of(folders["bert"], framework, precision, dtype)
    Saver(tmp_path).load(restored.parts())
    assert losses(restored, 6) == later
    assert all(torch.equal(tensor, restored.model.state_dict()[n]) for n, tensor in step.model.state_dict().items())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bfloat16_parameters_give_outputs_within_their_rounding(folders: dict[str, Path], framework: Any) -> None:
    inputs = inputs_of("bert")
    exact, exact_gradients = output_and_gradients(tower_of(folders["bert"], "torch", pool="cls"), inputs)
    output, gradients = output_and_gradients(
        tower_of(folders["bert"], framework, pool="cls", dtype=torch.bfloat16), inputs
    )
    assert output.dtype == torch.bfloat16
    assert_near(output, exact, 4)
    assert error(gradients, exact_gradients) < 8 * torch.finfo(torch.bfloat16).eps
