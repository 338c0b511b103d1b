"""Vision encoders, compared with transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from tests.support.pretrained import assert_agrees, few, model_of, weights_of

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")
from recis_hybrid.bridge.pretrained import encoder  # noqa: E402


def pixels(config: Any, batch: int = 2) -> torch.Tensor:
    height, width = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    return torch.randn(batch, config.num_channels, height, width, generator=torch.Generator().manual_seed(2))


@st.composite
def vits(draw: Any) -> Any:
    heads = draw(st.integers(1, 3))
    return transformers.ViTConfig(
        hidden_size=heads * draw(st.integers(5, 8)),
        num_attention_heads=heads,
        num_hidden_layers=draw(st.integers(1, 2)),
        intermediate_size=draw(st.integers(1, 9)),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "quick_gelu", "relu", "silu"])),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 0.1])),
        image_size=draw(st.one_of(st.integers(5, 9), st.lists(st.integers(5, 9), min_size=2, max_size=2))),
        patch_size=draw(st.one_of(st.integers(2, 5), st.lists(st.integers(2, 5), min_size=2, max_size=2))),
        num_channels=draw(st.integers(1, 3)),
        qkv_bias=draw(st.booleans()),
        pooler_output_size=draw(st.none() | st.integers(1, 5)),
        pooler_act=draw(st.sampled_from(["tanh", "gelu"])),
    )


@few(4)
@given(vits())
def test_vit_agrees_with_transformers(config: Any) -> None:
    assert_agrees(model_of(config), {"pixel_values": pixels(config)})


def small_vit(**fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "hidden_size": 6,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 5,
        "image_size": 4,
        "patch_size": 2,
        "num_channels": 1,
    }
    return transformers.ViTConfig(**(defaults | fields))


def test_vit_matches_the_file_of_a_classifier(tmp_path: Any) -> None:
    from safetensors.numpy import load_file

    classifier = transformers.ViTForImageClassification(small_vit())
    classifier.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    found = encoder(classifier.config.to_dict()).match({name: array.shape for name, array in arrays.items()})
    # The file has the names of transformers 4.
    assert found["layers.0.attention.q_proj.weight"] == "vit.encoder.layer.0.attention.attention.query.weight"
    expected = {name: tensor.numpy() for name, tensor in classifier.vit.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all((arrays[found[name]] == expected[name]).all() for name in found)


def test_vit_without_a_pooler() -> None:
    model = model_of(small_vit())
    vit = encoder(model.config.to_dict())
    weights = {name: array for name, array in weights_of(model).items() if name not in vit.optional}
    assert vit.match({name: array.shape for name, array in weights.items()}).keys() == weights.keys()
    structs = jax.eval_shape(vit.forward, weights, pixels(model.config).numpy())
    assert structs.last_hidden_state.shape == (2, 5, 6)
    assert structs.pooler_output is None


def test_pixels_of_another_size_are_refused() -> None:
    model = model_of(small_vit())
    with pytest.raises(ValueError, match=r"must have shape \[batch, 1, 4, 4\], got \[2, 1, 4, 6\]; resize"):
        encoder(model.config.to_dict()).forward(weights_of(model), torch.zeros(2, 1, 4, 6).numpy())
