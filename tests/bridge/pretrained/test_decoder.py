"""Decoders, compared with transformers."""

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

VOCABULARY = 11
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3"]
PADDINGS = {
    "none": None,
    "right": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
}


def config_of(family: str, **fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "intermediate_size": 7,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    if family == "Qwen3":
        defaults["head_dim"] = 6
    return getattr(transformers, f"{family}Config")(**(defaults | fields))


def text(padding: str = "none", length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(3))
    mask = PADDINGS[padding]
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": torch.tensor(mask)}


@st.composite
def llamas(draw: Any, family: str) -> Any:
    key_heads = draw(st.integers(1, 2))
    heads = key_heads * draw(st.integers(1, 3))
    biases = {"Llama": ["attention_bias", "mlp_bias"], "Qwen3": ["attention_bias"]}.get(family, [])
    fields = {name: draw(st.booleans()) for name in biases}
    if family == "Qwen3" or draw(st.booleans()):
        fields["head_dim"] = 2 * draw(st.integers(1, 4))
    return config_of(
        family,
        hidden_size=heads * 2 * draw(st.integers(3, 4)),
        intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        hidden_act=draw(st.sampled_from(["silu", "gelu_pytorch_tanh", "relu"])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        pad_token_id=draw(st.sampled_from([None, 0, VOCABULARY - 1])),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 1e4, 1e6]))},
        **fields,
    )


@pytest.mark.parametrize("family", FAMILIES)
@few(3)
@given(data=st.data())
def test_decoders_agree_with_transformers(family: str, data: Any) -> None:
    config = data.draw(llamas(family))
    config.is_causal = data.draw(st.booleans())
    assert_agrees(model_of(config), text(data.draw(st.sampled_from(sorted(PADDINGS)))))


def test_a_scaled_rotary_embedding_agrees_with_transformers() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert_agrees(model_of(config_of("Qwen2", rope_parameters=scaling)), text())


def test_a_dynamic_rotary_embedding_is_that_of_transformers_up_to_its_length() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = model_of(config_of("Llama", rope_parameters=scaling, max_position_embeddings=6))
    assert_agrees(model, text())
    decoder = encoder(model.config.to_dict())
    assert decoder.max_length == 6
    with pytest.raises(ValueError, match="7 tokens are more than max_position_embeddings 6, .* truncate the inputs"):
        decoder.forward(weights_of(model), text(length=7)["input_ids"].numpy())


SLIDING = {
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 2},
    "Qwen3": {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"]},
}


@pytest.mark.parametrize("family", SLIDING)
def test_texts_longer_than_a_sliding_window_are_refused(family: str) -> None:
    model = model_of(config_of(family, **SLIDING[family]))
    decoder = encoder(model.config.to_dict())
    weights = weights_of(model)
    assert decoder.max_length == 5
    with pytest.raises(ValueError, match="6 tokens are more than sliding_window 5, beyond .* truncate the inputs"):
        decoder.forward(weights, text(length=6)["input_ids"].numpy())
    assert jax.eval_shape(decoder.forward, weights, text(length=5)["input_ids"].numpy())


def test_short_texts_in_a_sliding_window_agree_with_transformers() -> None:
    assert_agrees(model_of(config_of("Mistral", sliding_window=6)), text("left"))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"sliding_window": 2}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}),
    ],
)
def test_windows_without_layers_allow_any_length(family: str, fields: dict[str, Any]) -> None:
    model = model_of(config_of(family, **fields))
    decoder = encoder(model.config.to_dict())
    assert jax.eval_shape(decoder.forward, weights_of(model), text(length=9)["input_ids"].numpy())


def test_defaults_are_those_of_transformers() -> None:
    for family in FAMILIES:
        config = getattr(transformers, f"{family}Config")()
        model_type = {"model_type": config.model_type}
        assert encoder(model_type).weights == encoder(config.to_dict()).weights


SMALL = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"hidden_size": 10}, "hidden_size 10 must be a multiple of num_attention_heads 4"),
        ({"head_dim": 3}, "rotary embeddings need an even head size, got 3"),
        ({"layer_types": ["chunked_attention"]}, r"layer_types must be 1 of .* got \['chunked_attention'\]"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types must be 1 of full_attention and sliding_attention, got"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has sliding_attention without use_sliding_window"),
        ({"sliding_window": "5", "use_sliding_window": True}, "sliding_window must be an integer or null, got '5'"),
        ({"is_causal": "no"}, "is_causal must be true or false, got 'no'"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'qwen2': rope_type 'proportional' is not implemented"),
    ],
)
def test_fields_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(SMALL | fields)


def test_attention_is_chosen_by_argument_or_configuration() -> None:
    def program(config: dict[str, Any], **options: Any) -> str:
        decoder = encoder(SMALL | config, **options)
        weights = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in decoder.weights.items()}
        return str(jax.make_jaxpr(decoder.forward)(weights, jax.ShapeDtypeStruct((2, 3), "int32")))

    causal, full = program({}), program({"is_causal": False})
    assert causal != full
    assert program({"is_causal": False}, attention="causal") == causal
    assert program({}, attention="full") == full


@pytest.mark.parametrize(("name", "attention"), [("qwen2", "prefix"), ("vit", "full"), ("vit", "causal")])
def test_other_attention_is_refused(name: str, attention: Any) -> None:
    with pytest.raises(ValueError, match=f"'{name}': attention must be omitted, or 'causal' or 'full' for llama, .*;"):
        encoder({"model_type": name}, attention=attention)
