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
FAMILIES = ["Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"]
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
    if family == "Phi3":
        defaults["pad_token_id"] = 0
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
    with pytest.raises(ValueError, match="7 tokens are more than 6, beyond which .* truncate the inputs"):
        decoder.forward(weights_of(model), text(length=7)["input_ids"].numpy())


WINDOWS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 3},
    "Phi3": {"sliding_window": 3},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1, "num_hidden_layers": 2},
    "Qwen3": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("family", WINDOWS)
def test_sliding_windows_agree_with_transformers(family: str, is_causal: bool) -> None:
    config = config_of(family, **WINDOWS[family])
    config.is_causal = is_causal
    assert_agrees(model_of(config), text("left"))


def test_a_window_limits_attention() -> None:
    def last(window: int | None) -> Any:
        config = config_of("Mistral", sliding_window=window)
        ids = text()["input_ids"]
        changed = torch.cat([(ids[:, :1] + 1) % VOCABULARY, ids[:, 1:]], 1)
        model = model_of(config)
        forward = jax.jit(encoder(config.to_dict()).forward)
        return [forward(weights_of(model), each.int().numpy()).last_hidden_state[:, -1] for each in (ids, changed)]

    assert (last(5)[0] == last(5)[1]).all()
    assert (last(6)[0] != last(6)[1]).any()
    assert (last(None)[0] != last(None)[1]).any()


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"sliding_window": 2}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}),
    ],
)
def test_layers_without_windows_agree_with_transformers(family: str, fields: dict[str, Any]) -> None:
    assert_agrees(model_of(config_of(family, **fields)), text())


@pytest.mark.parametrize("length", [5, 6])
def test_phi3_with_long_and_partial_rotary_embeddings_agrees_with_transformers(length: int) -> None:
    config = config_of(
        "Phi3",
        hidden_size=16,
        original_max_position_embeddings=5,
        partial_rotary_factor=0.5,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 9.0]},
    )
    assert_agrees(model_of(config), text(length=length))
    decoder = encoder(config.to_dict())
    assert (decoder.threshold, decoder.max_length) == (5, 64)
    with pytest.raises(ValueError, match="'phi3': 65 tokens are more than 64, beyond which this rope_type is not"):
        jax.eval_shape(decoder.forward, decoder.weights, text(length=65)["input_ids"].numpy())


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
        ({"sliding_window": 0, "use_sliding_window": True}, "sliding_window must be positive or null, got 0"),
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
