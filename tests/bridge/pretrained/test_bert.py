"""BERT, RoBERTa and DistilBERT, compared with transformers."""

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
FAMILIES = ["Bert", "Roberta", "DistilBert"]
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
}


def config_of(family: str, **fields: Any) -> Any:
    """Return a small configuration; the fields have the names of BERT."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 5,
        "max_position_embeddings": 12,
    }
    fields = defaults | fields
    if family == "DistilBert":
        names = {"intermediate_size": "hidden_dim", "hidden_act": "activation", "hidden_dropout_prob": "dropout"}
        fields = {names.get(name, name): value for name, value in fields.items()}
    return getattr(transformers, f"{family}Config")(**fields)


@st.composite
def configs(draw: Any, family: str) -> Any:
    heads = draw(st.integers(1, 3))
    fields = {
        "hidden_size": heads * draw(st.integers(4, 8)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "intermediate_size": draw(st.integers(1, 9)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "pad_token_id": draw(st.integers(0, 4)),
    }
    if family != "DistilBert":
        fields["layer_norm_eps"] = draw(st.sampled_from([1e-12, 1e-5, 0.1]))
        fields["type_vocab_size"] = draw(st.integers(1, 3))
    return config_of(family, **fields)


@pytest.mark.parametrize("family", FAMILIES)
@few(3)
@given(data=st.data())
def test_the_family_agrees_with_transformers(family: str, data: Any) -> None:
    config = data.draw(configs(family))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (3, 6), generator=generator)
    inputs = {"input_ids": ids}
    mask = MASKS[data.draw(st.sampled_from(sorted(MASKS)))]
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask)
        # Some of the padding is the padding token, from which RoBERTa's positions depend.
        inputs["input_ids"] = torch.where((inputs["attention_mask"] == 0) & (ids % 2 == 0), config.pad_token_id, ids)
    if family != "DistilBert" and data.draw(st.booleans()):
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, (3, 6), generator=generator)
    assert_agrees(model_of(config), inputs)


def test_sinusoidal_positions_are_not_trained() -> None:
    model = model_of(config_of("DistilBert", sinusoidal_pos_embds=True))
    forward, ids = encoder(model.config.to_dict()).forward, torch.tensor([[1, 2, 3]]).int().numpy()
    gradient = jax.jit(jax.grad(lambda weights: forward(weights, ids).last_hidden_state.var()))(weights_of(model))
    assert not gradient["embeddings.position_embeddings.weight"].any()
    assert gradient["embeddings.word_embeddings.weight"].any()


@pytest.mark.parametrize(("family", "longest"), [("Bert", 12), ("DistilBert", 12), ("Roberta", 9)])
def test_more_tokens_than_positions_are_refused(family: str, longest: int) -> None:
    config = config_of(family, pad_token_id=2)
    found = encoder(config.to_dict())
    weights = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in found.weights.items()}
    ids = [jax.ShapeDtypeStruct((2, length), "int32") for length in (longest, longest + 1)]
    assert found.max_length == longest
    assert jax.eval_shape(found.forward, weights, ids[0]).last_hidden_state.shape == (2, longest, 6)
    message = f"input_ids have {longest + 1} tokens per row, but the model has positions for {longest}; truncate"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(found.forward, weights, ids[1])
    # transformers reads the last of these positions, too.
    model_of(config)(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model_of(config)(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "Bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not",
        ),
        (
            "Roberta",
            {"pad_token_id": None},
            "pad_token_id, from which .* counted, must be from 0 to 10, got N",
        ),
        ("Roberta", {"pad_token_id": 11}, "must be from 0 to 10, got 11"),
        ("DistilBert", {"n_heads": 4}, "hidden_size 6 must be a multiple of n_heads 4"),
        ("DistilBert", {"activation": "xielu"}, "activation 'xielu' is not implemented"),
        ("DistilBert", {"sinusoidal_pos_embds": 1}, "sinusoidal_pos_embds must be true or false"),
    ],
)
def test_fields_are_refused_by_name(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(config_of(family).to_dict() | fields)


@pytest.mark.parametrize(
    ("family", "prefix"), [("Bert", "bert."), ("Roberta", "roberta."), ("DistilBert", "distilbert.")]
)
def test_weights_of_larger_models_are_found(family: str, prefix: str) -> None:
    model = getattr(transformers, f"{family}ForMaskedLM")(config_of(family))
    found = encoder(model.config.to_dict())
    names = found.match({name: tuple(each.shape) for name, each in model.named_parameters()})
    assert names == {name: f"{family.lower()}.{name}" for name in found.weights}  # without a pooler
