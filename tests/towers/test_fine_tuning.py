"""Freezing by name and by layer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from recis_hybrid.towers import freeze
from recis_hybrid.towers.fine_tuning import layer_of


def model_of(*names: str) -> nn.Module:
    root = nn.Module()
    for name in names:
        module = root
        for part in name.split("."):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter("weight", nn.Parameter(nn.Linear(1, 1).weight.detach()))
    return root


BERT = ("embeddings.word", "encoder.layer.0.dense", "encoder.layer.1.dense", "encoder.layer.10.dense", "pooler.dense")
EVERYTHING = {f"{name}.weight" for name in BERT}


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (False, set()),
        (True, EVERYTHING),
        (0, {"embeddings.word.weight"}),
        (1, {"embeddings.word.weight", "encoder.layer.0.dense.weight"}),
        (3, EVERYTHING - {"pooler.dense.weight"}),
        ("encoder.layer.1.*", {"encoder.layer.1.dense.weight"}),
        (["*.word.weight", "pooler.?ense.*"], {"embeddings.word.weight", "pooler.dense.weight"}),
        ([], set()),
    ],
)
def test_parameters_are_chosen(which: Any, expected: set[str]) -> None:
    model = model_of(*BERT[:3], "encoder.layer.2.dense", "pooler.dense") if isinstance(which, int) else model_of(*BERT)
    expected = {name.replace("layer.10", "layer.2") if isinstance(which, int) else name for name in expected}
    assert set(freeze(model, which)) == expected == frozen(model)


@pytest.mark.parametrize(
    "names",
    [
        ("embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "norm"),
        ("embeddings.patch_embeddings", "layers.0.mlp.fc1", "layers.1.mlp.fc1", "layernorm"),
        ("vision_model.pre_layrnorm", "vision_model.encoder.layers.0.mlp", "vision_model.encoder.layers.1.mlp", "post"),
        ("embeddings.word_embeddings", "transformer.layer.0.ffn", "transformer.layer.1.ffn", "head"),
    ],
)
def test_layers_of_all_families_are_numbered(names: tuple[str, ...]) -> None:
    assert set(freeze(model_of(*names), 1)) == {f"{name}.weight" for name in names[:2]}
    assert [layer_of(f"{name}.weight") for name in names] == [None, 0, 1, None]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (4, "which must be from 0 to 3, the number of layers of the model, got 4"),
        (-1, "which must be from 0 to 3, .* got -1"),
        ("layer.*", r"the pattern 'layer.\*' matches no parameter; the first names are 'embeddings.word.weight'"),
        (["*", "absent"], "the pattern 'absent' matches no parameter"),
    ],
)
def test_what_matches_nothing_is_refused(which: Any, message: str) -> None:
    model = model_of(*BERT[:3], "encoder.layer.2.dense")
    with pytest.raises(ValueError, match=message):
        freeze(model, which)
    assert not frozen(model)
