"""Freezing by name and by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.towers import freeze, param_groups, select
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
        (
            "layer.*",
            r"the pattern 'layer.\*' matches no parameter; the nearest names are 'encoder.layer.\d.dense.weight'",
        ),
        (["*", "absent"], "the pattern 'absent' matches no parameter"),
    ],
)
def test_what_matches_nothing_is_refused(which: Any, message: str) -> None:
    model = model_of(*BERT[:3], "encoder.layer.2.dense")
    with pytest.raises(ValueError, match=message):
        freeze(model, which)
    assert not frozen(model)


def test_selected_parameters_are_those_of_freeze() -> None:
    model = model_of(*BERT)
    top = select(model, "encoder.layer.10.*")
    assert top == {"encoder.layer.10.dense.weight": model.get_parameter("encoder.layer.10.dense.weight")}
    assert select(model, False) == {}
    assert not frozen(model)


def rates(groups: list[dict[str, Any]], default: float = 1.0) -> dict[str, float]:
    return {name: group.get("lr", default) for group in groups for name in group["names"]}


def test_groups_have_the_options_of_the_first_pattern() -> None:
    model = model_of("tower.embeddings.word", "tower.norm", "head.dense", "head.norm")
    options = {"*.norm.*": {"weight_decay": 0.0}, "tower.*": {"lr": 0.25, "weight_decay": 0.5}}
    first, second, third = param_groups(model, options)
    assert first["names"] == ["tower.norm.weight", "head.norm.weight"]
    assert (second["names"], third["names"]) == (["tower.embeddings.word.weight"], ["head.dense.weight"])
    for group in (first, second, third):
        assert [id(each) for each in group["params"]] == [id(model.get_parameter(name)) for name in group["names"]]
    optimizer = torch.optim.AdamW([first, second, third], lr=0.125)
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(0.125, 0.0), (0.25, 0.5), (0.125, 0.01)]


def test_learning_rates_decay_by_layer() -> None:
    # Two towers of different heights, and modules outside them with similar names.
    names = ("a.model.embeddings.word", "a.model.encoder.layer.0.x", "a.model.encoder.layer.1.x", "a.model.pooler")
    names += ("b.embed_tokens", "b.layers.0.x", "b.layers.1.x", "b.layers.2.x", "b.norm", "embedder", "head")
    found = rates(param_groups(model_of(*names), {"[ab].*": {"lr": 8.0}, "embedder.*": {"lr": 2.0}}, layer_decay=0.5))
    expected = [1.0, 2.0, 4.0, 8.0, 0.5, 1.0, 2.0, 4.0, 8.0, 2.0, 1.0]
    assert found == {f"{name}.weight": rate for name, rate in zip(names, expected, strict=True)}


def test_the_layers_of_a_bare_model_decay() -> None:
    groups = param_groups(model_of(*BERT[:3], "pooler.dense"), {"*": {"lr": 8.0}}, layer_decay=0.5)
    assert [(group["lr"], group["names"]) for group in groups] == [
        (1.0, ["embeddings.word.weight"]),
        (2.0, ["encoder.layer.0.dense.weight"]),
        (4.0, ["encoder.layer.1.dense.weight"]),
        (8.0, ["pooler.dense.weight"]),
    ]


def test_tables_are_in_no_group_and_frozen_parameters_are() -> None:
    model = model_of("tower.layer.0.x")
    model.engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.SGD)
    freeze(model, "tower.*")
    assert [group["names"] for group in param_groups(model, {})] == [["tower.layer.0.x.weight"]]


@pytest.mark.parametrize(
    ("options", "decay", "message"),
    [
        (
            {"towr.*": {}},
            None,
            r"param_groups: the pattern 'towr.\*' matches no parameter; the nearest names are 'tower",
        ),
        ({"*": {}, "tower.*": {}}, None, r"earlier patterns match all parameters of 'tower.\*'; put it before '\*'"),
        ({"*": {"weight_decay": 1}}, 0.5, r"layer_decay needs a learning rate; add 'lr' to the options of '\*'"),
        ({"*": {"lr": 1}}, 0.0, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"*": {"lr": 1}}, 1.5, "layer_decay must be above 0 and at most 1, got 1.5"),
    ],
)
def test_groups_that_cannot_be_are_refused(options: Any, decay: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(model_of("tower.layer.0.x", "head"), options, layer_decay=decay)
