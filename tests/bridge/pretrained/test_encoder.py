"""Configurations and checkpoints of encoders: matching, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
from recis_hybrid.bridge.pretrained import encoder  # noqa: E402

VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 6,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 5,
}


def shapes_of(vit: Any) -> dict[str, tuple[int, ...]]:
    return {**vit.weights, **vit.optional}


@pytest.mark.parametrize("name", [None, "t5", 3])
def test_an_unknown_model_type_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=rf"model_type {name!r} is not implemented in JAX, only .*vit"):
        encoder({"model_type": name})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "xielu"}, r"'vit': hidden_act 'xielu' is not implemented, only gelu, .*tanh; use transformers"),
        ({"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\] is not implemented"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, got True"),
        ({"hidden_size": 7}, "hidden_size 7 must be a multiple of num_attention_heads 2"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps must be a number of at least 0, got '1e-5'"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps must be a number of at least 0, got -1.0"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be a number from 0 to less than 1, got 1.0"),
        ({"qkv_bias": "no"}, "qkv_bias must be true or false, got 'no'"),
        ({"patch_size": [2, 2, 2]}, r"patch_size must be a positive integer or two of them, got \[2, 2, 2\]"),
        ({"is_decoder": True}, "is_decoder=True is not implemented, only False"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not implemented"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads=\{'0': \[1\]\} is not implemented"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not implemented, only None"),
    ],
)
def test_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(VIT | fields)


def test_fields_that_are_null_have_their_default() -> None:
    assert encoder(VIT | {"hidden_act": None, "image_size": None}).weights == encoder(VIT).weights


@pytest.mark.parametrize("name", ["bert", "clip_text_model", "clip_vision_model", "qwen3", "vit"])
def test_a_batch_may_be_empty(name: str) -> None:
    own = encoder(VIT | {"model_type": name, "num_key_value_heads": 1})
    weights = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes_of(own).items()}
    is_image = own.inputs == ("pixel_values",)
    inputs = jax.ShapeDtypeStruct((0, 3, 224, 224), "float32") if is_image else jax.ShapeDtypeStruct((0, 4), "int32")
    assert jax.eval_shape(own.forward, weights, inputs).last_hidden_state.shape[::2] == (0, 6)


def test_heads_and_buffers_are_ignored() -> None:
    vit = encoder(VIT)
    others = {"embeddings.position_ids": (1, 9), "embeddings.mask_token": (1, 1, 6), "classifier.weight": (2, 6)}
    assert vit.match(shapes_of(vit) | others) == {name: name for name in shapes_of(vit)}


def test_a_prefix_and_early_names_are_found() -> None:
    vit = encoder(VIT)
    names = {f"vit.{name}": shape for name, shape in vit.weights.items()}
    assert vit.match(names) == {name: f"vit.{name}" for name in vit.weights}


def test_missing_parameters_are_named() -> None:
    vit = encoder(VIT)
    shapes = {name: shape for name, shape in shapes_of(vit).items() if "mlp" not in name}
    with pytest.raises(ValueError, match=r"'vit': the checkpoint lacks 'layers.0.mlp.fc1.weight', .* all of its files"):
        vit.match(shapes)


def test_half_a_pooler_is_refused() -> None:
    vit = encoder(VIT)
    shapes = shapes_of(vit)
    del shapes["pooler.dense.bias"]
    with pytest.raises(ValueError, match="lacks 'pooler.dense.bias'"):
        vit.match(shapes)


def test_another_shape_is_refused() -> None:
    vit = encoder(VIT)
    shapes = {f"vit.{name}": shape for name, shape in shapes_of(vit).items()} | {"vit.layernorm.bias": (7,)}
    with pytest.raises(ValueError, match=r"'vit.layernorm.bias' must have shape \[6\] by config.json, got \[7\]"):
        vit.match(shapes)


@pytest.mark.parametrize("name", ["layers.1.mlp.fc1.weight", "encoder.layer.0.attention.attention.relative_position"])
def test_parameters_without_a_place_are_refused(name: str) -> None:
    vit = encoder(VIT)
    with pytest.raises(ValueError, match=f"has parameters that config.json does not provide for: '{name}'"):
        vit.match(shapes_of(vit) | {name: (5, 6)})


def test_another_model_is_refused() -> None:
    names = {f"decoder.{number}.weight": (1,) for number in range(7)}
    with pytest.raises(
        ValueError, match="has none of its parameters, such as .*; it has 'decoder.0.weight', .* 2 more"
    ):
        encoder(VIT).match(names)
