"""Low-rank adapters in torch and JAX, compared with peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recis_hybrid.saver import CheckpointMismatch, Saver
from recis_hybrid.towers import HfTower, add_lora, hf_tower, load_lora, save_lora
from tests.support.near import assert_near
from tests.support.pretrained import model_of

pytestmark = [pytest.mark.jax, pytest.mark.usefixtures("compiled_fast")]
pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FRAMEWORKS: list[Any] = ["torch", "jax"]
ALLOWED = 1e-5 / torch.finfo(torch.float32).eps
SIZES = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 1, 0, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    model_of(transformers.BertConfig(**SIZES, max_position_embeddings=12)).save_pretrained(path)
    return path


def adapted_by_peft(base: Path, folder: Path, prefix: str = "", **fields: Any) -> Tensor:
    """Save random adapters with peft, and return the hidden states of its own module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.3)
            states = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        model.save_pretrained(folder)
    return states  # type: ignore[no-any-return]


def states(tower: HfTower) -> Tensor:
    with torch.no_grad():
        return tower.eval()(IDS, MASK)  # type: ignore[no-any-return]


def tower_of(base: Path, framework: Any, **options: Any) -> HfTower:
    return hf_tower(base, framework, classes={"batch": [3], "length": [5]}, **options)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], "lora_dropout": 0.1},
        {
            "r": 2,
            "use_rslora": True,
            "target_modules": r".*layer\.\d\.(attention\.output|intermediate)\.dense",
            "rank_pattern": {"layer.1.intermediate.dense": 4},
            "alpha_pattern": {r"layer\.0\.attention.output.dense": 7},
        },
    ],
)
def test_adapters_of_peft_give_its_outputs(base: Path, tmp_path: Path, framework: Any, fields: Any) -> None:
    expected = adapted_by_peft(base, tmp_path, **fields)
    tower = tower_of(base, framework)
    before = {id(parameter) for parameter in tower.parameters()}
    load_lora(tower, tmp_path)
    assert_near(states(tower), expected, ALLOWED)
    adapters = {name for name, parameter in tower.named_parameters() if id(parameter) not in before}
    assert adapters == {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 8
    # Saved again, peft gives the same.
    save_lora(tower, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "again").eval()
        with torch.no_grad():
            assert_near(model(input_ids=IDS, attention_mask=MASK).last_hidden_state, expected, ALLOWED)


def test_new_adapters_are_the_same_in_both_frameworks(base: Path) -> None:
    towers, gradients = {}, {}
    for framework in FRAMEWORKS:
        towers[framework] = tower = tower_of(base, framework)
        unchanged = states(tower)
        torch.manual_seed(5)
        add_lora(tower, ["query", "output.dense"], rank=3, alpha=6)
        assert_near(states(tower), unchanged, ALLOWED)
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        output = tower(IDS, MASK)
        (output * MASK[..., None] * torch.arange(16.0)).sum().backward()
        gradients[framework] = {name: parameter.grad for name, parameter in tower.named_parameters()}
    assert towers["torch"].state_dict().keys() == towers["jax"].state_dict().keys()
    for name, gradient in gradients["torch"].items():
        assert (gradient is None) == ("lora_" not in name), name
        if gradient is not None:
            assert_near(gradients["jax"][name], gradient, 10 * ALLOWED, where=name)
            assert bool(gradient.any()), name


def test_dropout_of_adapters_is_applied_in_train_mode(base: Path) -> None:
    for framework in FRAMEWORKS:
        tower = hf_tower(base, framework, classes={"batch": [3], "length": [5]})
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        add_lora(tower, ["query"], dropout=0.5)
        assert tower.adapters.dropout == 0.5
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
            tower.train()
            assert not torch.equal(tower(IDS, MASK), tower(IDS, MASK))
        assert torch.equal(states(tower), states(tower))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_checkpoints_have_adapters_without_the_base(base: Path, tmp_path: Path, framework: Any) -> None:
    tower = tower_of(base, framework)
    add_lora(tower, ["query"], rank=2)
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    directory = Saver(tmp_path).save(1, {"tower": tower})
    saved = json.loads((directory / "manifest.json").read_text())["parts"]["tower"]["tensors"]  # type: ignore[operator]
    assert sorted(saved) == sorted(name for name, each in tower.named_parameters() if each.requires_grad)
    # A tower of the other framework continues.
    other = tower_of(base, "jax" if framework == "torch" else "torch")
    with pytest.raises(CheckpointMismatch, match="lora_A"):
        Saver(tmp_path).load({"tower": other})
    add_lora(other, ["query"], rank=2)
    Saver(tmp_path).load({"tower": other})
    assert_near(states(other), states(tower), ALLOWED)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_adapters_of_bfloat16_towers_are_float32(base: Path, framework: Any) -> None:
    tower = tower_of(base, framework, dtype=torch.bfloat16)
    before = states(tower)
    assert before.dtype is torch.bfloat16
    add_lora(tower, ["query"])
    assert {each.dtype for each in tower.parameters() if each.requires_grad} == {torch.float32}
    assert states(tower).dtype is torch.bfloat16
    assert torch.equal(states(tower), before)
    tower(IDS, MASK).float().sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported, only 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"modules_to_save": ["head"]}, r"modules_to_save=\['head'\] is not supported"),
        ({"a_later_kind": 3}, "a_later_kind=3 is not supported"),
        ({"r": 4}, "the adapter of 'encoder.layer.0.attention.self.query' has rank 2, but adapter_config.json says 4"),
    ],
)
def test_other_kinds_of_adapters_are_refused(base: Path, tmp_path: Path, change: Any, message: str) -> None:
    tower = tower_of(base, "torch")
    adapted_by_peft(base, tmp_path, r=2, target_modules=["query"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_lora(tower, tmp_path)
    assert tower.adapters is None


def test_tensors_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    tower = tower_of(base, "jax")
    adapted_by_peft(base, tmp_path, r=2, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    for changed, message in (
        ({**tensors, name: torch.zeros(2, 3)}, r"'encoder.layer.0.attention.self.query' must have A \[r, 16\]"),
        (
            {**tensors, name.replace("query", "qury"): torch.zeros(2, 16)},
            "no linear layer .*qury', only such as .*query'",
        ),
        (
            {**tensors, name.replace("lora_A", "lora_embedding_A"): torch.zeros(2, 16)},
            "lora_embedding_A.* not supported",
        ),
        ({key: value for key, value in tensors.items() if key != name}, r"must have A \[r, 16\] and B \[16, r\], got"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            load_lora(tower, tmp_path)
    # The base may have been part of a larger model.
    save_file({key.replace("model.encoder", "model.bert.encoder"): value for key, value in tensors.items()}, file)
    load_lora(tower, tmp_path)
    with pytest.raises(ValueError, match="load_lora: the tower has adapters; build it again"):
        load_lora(tower, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json; pass a folder that peft"):
        load_lora(tower_of(base, "torch"), base)


def test_wrong_arguments_are_refused(base: Path) -> None:
    tower = tower_of(base, "torch")
    for targets, options, message in (
        (["quer"], {}, "the target 'quer' is the name of no linear layer; the nearest are 'query'"),
        (["word_embeddings"], {}, "the target 'word_embeddings' is the name of no linear layer"),
        ("query", {}, "targets must be a sequence of names of layers, got 'query'"),
        (["query"], {"dropout": 1.0}, "dropout must be from 0 to less than 1, got 1.0"),
        (["query"], {"rank": 0}, "rank must be"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(tower, targets, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save_lora: the tower has no adapters"):
        save_lora(tower, base / "adapters")
    with pytest.raises(TypeError, match="add_lora: tower must be a tower, as from hf_tower, got a Linear"):
        add_lora(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
