"""Rotary embeddings, compared with transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")
from recis_hybrid.bridge.pretrained.encoder import Config  # noqa: E402
from recis_hybrid.bridge.pretrained.rope import Rope, rope, rotate  # noqa: E402

LENGTH = 64


def read(fields: dict[str, Any], size: int = 8) -> Rope:
    return rope(Config({"model_type": "llama"} | fields), size, fields.get("max_position_embeddings", LENGTH))


@st.composite
def configurations(draw: Any, size: int) -> dict[str, Any]:
    """Draw fields of a config.json in the form of transformers 4 or 5, for heads of a size."""
    positive = st.floats(1.0, 100.0)
    lengths = st.integers(8, 10_000)
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "longrope", "yarn"]))
    scaling: dict[str, Any] = {} if kind in ("default", "longrope") else {"factor": draw(positive)}
    optional: dict[str, Any] = {}
    if kind == "longrope":
        factors = st.lists(positive, min_size=size // 2, max_size=size // 2)
        scaling = {"short_factor": draw(factors), "long_factor": draw(factors)}
        optional = {
            "original_max_position_embeddings": lengths,
            "attention_factor": st.floats(0.1, 2.0),
            "factor": st.floats(0.5, 100.0),
        }
    if kind == "llama3":
        scaling |= {"low_freq_factor": draw(st.floats(0.1, 2.0)), "high_freq_factor": draw(st.floats(2.5, 9.0))}
        optional = {"original_max_position_embeddings": lengths}
    if kind == "yarn":
        optional = {
            "original_max_position_embeddings": lengths,
            "attention_factor": st.floats(0.1, 2.0),
            "beta_fast": st.floats(8.0, 40.0),
            "beta_slow": st.floats(0.1, 4.0),
            "mscale": st.floats(0.1, 2.0),
            "mscale_all_dim": st.floats(0.1, 2.0),
            "truncate": st.booleans(),
        }
    scaling |= {name: draw(values) for name, values in optional.items() if draw(st.booleans())}
    fields: dict[str, Any] = {"max_position_embeddings": draw(lengths)}
    if draw(st.booleans()):
        fields["original_max_position_embeddings"] = draw(lengths)
    theta = draw(st.none() | st.sampled_from([100.0, 1e4, 1e6]))
    version = draw(st.sampled_from(["4", "4, early", "5"]))
    if version == "5":
        base = {} if theta is None else {"rope_theta": theta}
        return fields | {"rope_parameters": {"rope_type": kind} | base | scaling}
    fields |= {} if theta is None else {"rope_theta": theta}
    name = "rope_type" if version == "4" else "type"
    return fields | {"rope_scaling": None if kind == "default" else {name: kind} | scaling}


@pytest.mark.parametrize("size", [4, 6, 32])
@given(data=st.data())
def test_frequencies_agree_with_transformers(size: int, data: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = data.draw(configurations(size))
    # A copy, because transformers changes the nested dictionary.
    copied = {name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()}
    config = transformers.LlamaConfig(hidden_size=2 * size, num_attention_heads=2, **copied)
    theirs = LlamaRotaryEmbedding(config)
    ours = read(fields, size)
    # Interpolation between scaled and original frequencies cancels.
    original = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    assert_near(ours.frequencies, theirs.inv_freq, terms=original)
    assert ours.scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert (ours.limit is None) == (theirs.rope_type not in ("dynamic", "longrope"))
    if theirs.rope_type == "longrope":
        assert ours.threshold == config.rope_parameters["original_max_position_embeddings"]
        theirs(torch.zeros(1), torch.tensor([[ours.threshold]]))
        assert_near(ours.long_frequencies, theirs.inv_freq, terms=original)


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_partial_rotations_of_short_and_long_texts_agree_with_transformers(share: float, length: int) -> None:
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

    size = 16
    factors = [1.0 + number for number in range(int(size * share) // 2)]
    fields = {
        "rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": factors[::-1]},
        "partial_rotary_factor": share,
        "max_position_embeddings": LENGTH,
        "original_max_position_embeddings": 12,
    }
    config = transformers.Phi3Config(
        hidden_size=size, num_attention_heads=1, num_key_value_heads=1, pad_token_id=0, **fields
    )
    x = torch.randn(2, 3, length, size, generator=torch.Generator().manual_seed(0))
    cos, sin = Phi3RotaryEmbedding(config)(x, torch.arange(length)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = rope(Config({"model_type": "phi3"} | fields), size, LENGTH, is_partial=True)
    got = rotate(x.transpose(1, 2).numpy(), ours.rotations(length, np.float32))
    assert_near(torch.from_numpy(np.array(got)).transpose(1, 2), expected)


def test_rotations_agree_with_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    fields = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": LENGTH}
    config = transformers.LlamaConfig(hidden_size=8, num_attention_heads=1, **fields)
    x = torch.randn(2, 3, LENGTH, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = read({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    got = rotate(x.transpose(1, 2).numpy(), ours.rotations(LENGTH, np.float32))
    assert_near(torch.from_numpy(np.array(got)).transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "ntk"}, "rope_type 'ntk' is not implemented, only default, .*yarn; use transformers'"),
        ({"rope_type": "longrope"}, "rope_type 'longrope' requires long_factor, short_factor in rope_parameters"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4},
            r"short_factor in rope_parameters must be 4 positive numbers, got \[1.0, 1.0, 1.0\]",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.0, 1.0, 0]},
            "long_factor in rope_parameters must be 4 positive numbers, got .*0]",
        ),
        ({"type": "mrope", "mrope_section": [1]}, "rope_type 'mrope' is not implemented"),
        ({"rope_type": ["linear"]}, r"rope_type \['linear'\] is not implemented"),
        ({"rope_type": "linear"}, "rope_type 'linear' requires factor in rope_parameters"),
        ({"rope_type": "llama3", "factor": 2.0}, "requires high_freq_factor, low_freq_factor in rope_parameters"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "low_freq_factor 4.0 must be less than high_freq_factor 1.0",
        ),
        ({"rope_type": "linear", "factor": "2"}, "factor in rope_parameters must be a positive number, got '2'"),
        ({"rope_type": "linear", "factor": 0}, "factor in rope_parameters must be a positive number, got 0"),
        ({"rope_theta": -1.0}, "rope_theta in rope_parameters must be a positive number, got -1.0"),
        ({"rope_type": "default", "factor": 2.0}, "of type 'default' may not have 'factor'; use transformers' own"),
        ({"full_attention": {"rope_type": "default"}}, "may not have 'full_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented, only 1"),
    ],
)
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_parameters_are_refused_by_name(fields: dict[str, Any], message: str, place: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({place: fields})


def test_fields_of_the_configuration_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'llama': rotary embeddings need an even head size, got 7"):
        read({}, 7)
    with pytest.raises(ValueError, match="rope_parameters must be an object, got 'linear'"):
        read({"rope_parameters": "linear"})
    with pytest.raises(ValueError, match="partial_rotary_factor=0.25 is not implemented"):
        read({"partial_rotary_factor": 0.25})
    for share, rotated in ((0.1, 0), (0.4, 3), (1.5, 12)):
        config = Config({"model_type": "phi3", "partial_rotary_factor": share})
        with pytest.raises(ValueError, match=f"even head size, got {rotated} after partial_rotary_factor {share} of 8"):
            rope(config, 8, LENGTH, is_partial=True)
