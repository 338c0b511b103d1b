"""CLIP's encoders, compared with transformers."""

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

SMALL: dict[str, Any] = {
    "hidden_size": 6,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 5,
}
END = 9
IDS = torch.tensor([[1, 4, 2, END, 0, 0], [3, END, END, END, 10, END], [1, 2, 3, 4, 5, END]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def layers(draw: Any) -> dict[str, Any]:
    heads = draw(st.integers(1, 3))
    return {
        "hidden_size": heads * draw(st.integers(5, 8)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "intermediate_size": draw(st.integers(1, 9)),
        "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu", "relu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 0.1])),
    }


@few(3)
@given(st.data())
def test_text_agrees_with_transformers(data: Any) -> None:
    # 2 is the end of early configurations, for which the pooled output is that of the largest id.
    config = transformers.CLIPTextConfig(
        **layers(data.draw),
        vocab_size=11,
        max_position_embeddings=data.draw(st.integers(6, 8)),
        eos_token_id=data.draw(st.sampled_from([2, END])),
        bos_token_id=1,
    )
    inputs = {"input_ids": IDS} | ({"attention_mask": MASK} if data.draw(st.booleans()) else {})
    assert_agrees(model_of(config), inputs)


@few(3)
@given(st.data())
def test_vision_agrees_with_transformers(data: Any) -> None:
    size, channels = data.draw(st.integers(5, 9)), data.draw(st.integers(1, 3))
    config = transformers.CLIPVisionConfig(
        **layers(data.draw), image_size=size, patch_size=data.draw(st.integers(2, 5)), num_channels=channels
    )
    pixels = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))
    assert_agrees(model_of(config), {"pixel_values": pixels})


def test_both_encoders_match_the_file_of_the_whole_model(tmp_path: Any) -> None:
    from safetensors import safe_open

    config = transformers.CLIPConfig(
        text_config=SMALL | {"vocab_size": 11, "bos_token_id": 1, "eos_token_id": END},
        vision_config=SMALL | {"image_size": 4, "patch_size": 2},
        projection_dim=3,
    )
    model_of(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    for part in ("text", "vision"):
        own = encoder(getattr(config, f"{part}_config").to_dict())
        assert own.match(shapes) == {name: f"{part}_model.{name}" for name in own.weights}


def test_the_whole_model_is_refused() -> None:
    with pytest.raises(ValueError, match="'clip': has two encoders; pass its text_config or its vision_config"):
        encoder(transformers.CLIPConfig().to_dict())


def test_long_texts_are_refused() -> None:
    model = model_of(transformers.CLIPTextConfig(**SMALL, vocab_size=11, max_position_embeddings=5))
    own = encoder(model.config.to_dict())
    assert own.max_length == 5
    with pytest.raises(ValueError, match="6 tokens are more than max_position_embeddings 5; truncate the inputs"):
        own.forward(weights_of(model), IDS.numpy())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_causal": False}, "'clip_text_model': is_causal=False is not implemented, only True"),
        ({"eos_token_id": None}, "eos_token_id must be an integer, got null"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id must be an integer or null, got \[2, 3\]"),
    ],
)
def test_fields_of_the_text_encoder_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder({"model_type": "clip_text_model", **SMALL, **fields})


def test_defaults_are_those_of_transformers() -> None:
    for config in (transformers.CLIPTextConfig(), transformers.CLIPVisionConfig(), transformers.ViTConfig()):
        assert encoder({"model_type": config.model_type}).weights == encoder(config.to_dict()).weights
