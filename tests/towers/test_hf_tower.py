"""Towers of a small random BERT in torch and JAX."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.saver import Saver
from recis_hybrid.towers import HfTower, hf_tower
from tests.support.near import assert_near
from tests.support.pretrained import model_of

pytestmark = [pytest.mark.jax, pytest.mark.usefixtures("compiled_once", "compiled_fast")]
jax = pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")

FRAMEWORKS: list[Any] = ["torch", "jax"]
POOLS: list[Any] = ["cls", "mean", "last", "pooler", None]
FIELDS: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
# A few thousand roundings: two layers of sums.
ALLOWED = 1024


def bert(**fields: Any) -> Any:
    return model_of(transformers.BertConfig(**(FIELDS | fields)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(path)
    return path


@pytest.fixture
def weights(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights, beside a copy of the configuration in ``tmp_path``."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors")


def batch(rows: int = 5, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 13, (rows, length), generator=generator)
    lengths = torch.arange(rows)[:, None] % length + 1
    mask = (torch.arange(length) < lengths).long()
    return ids * mask, mask


def gradients(tower: HfTower, *inputs: torch.Tensor) -> dict[str, torch.Tensor | None]:
    output = tower(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    if output.dim() == 3:
        weights = weights * inputs[1][..., None]  # the states of padding mean nothing
    tower.zero_grad()
    (output * weights).sum().backward()
    return {name: parameter.grad for name, parameter in tower.named_parameters()}


@pytest.fixture(scope="module")
def shared() -> tuple[Any, HfTower]:
    """A model of transformers, and a tower in JAX over its parameters, whose programs several tests use."""
    model = bert()
    return model, hf_tower(model, "jax")


@pytest.mark.parametrize("pool", POOLS)
def test_both_frameworks_agree_on_the_same_parameters(pool: Any, shared: tuple[Any, HfTower]) -> None:
    model, tower = shared
    if pool == "pooler":
        ours = hf_tower(model, "jax", pool=pool)
    else:
        ours = HfTower(tower.model, tower.config, "jax", pool, None)
    theirs = hf_tower(model, pool=pool)
    own = dict(model.named_parameters())
    assert all(parameter.requires_grad for parameter in own.values())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for each in (ours, theirs):
        assert all(parameter is own[name.removeprefix("model.")] for name, parameter in each.named_parameters())
    ids, mask = batch()
    got, expected = ours(ids, mask), theirs(ids, mask)
    if pool is None:
        got, expected = got * mask[..., None], expected * mask[..., None]
    assert_near(got, expected, ALLOWED)
    expected_gradients = gradients(theirs, ids, mask)
    scale = max(float(each.abs().max()) for each in expected_gradients.values() if each is not None)
    for name, gradient in gradients(ours, ids, mask).items():
        wanted = expected_gradients[name]
        if wanted is None:  # an unused parameter
            assert pool != "pooler"
            assert "pooler" in name
            wanted = torch.zeros_like(own[name.removeprefix("model.")])
        assert_near(gradient, wanted, ALLOWED, terms=torch.tensor(scale), where=name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_files_and_modules_give_the_same_tower(folder: Path, framework: Any) -> None:
    tower = hf_tower(folder, framework, pool="mean")
    assert not tower.training
    assert tower.files is not None
    assert tower.files.folder == folder
    frozen = {name for name, parameter in tower.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.pooler.dense.weight", "model.pooler.dense.bias"}
    assert all(parameter.requires_grad for parameter in hf_tower(folder, framework, pool="pooler").parameters())
    for name, tensor in hf_tower(bert(), framework, pool="mean").state_dict().items():
        assert torch.equal(tower.state_dict()[name], tensor)
        assert tower.state_dict()[name].data_ptr() % 64 == 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bfloat16_is_near_float32(folder: Path, framework: Any) -> None:
    ids, mask = batch()
    tower = hf_tower(folder, framework, pool="mean", dtype=torch.bfloat16)
    assert all(each.dtype == torch.bfloat16 and each.data_ptr() % 64 == 0 for each in tower.parameters())
    got = tower(ids, mask)
    assert got.dtype == torch.bfloat16
    assert_near(got, hf_tower(folder, pool="mean")(ids, mask))


def test_a_state_dict_of_one_framework_loads_into_the_other(folder: Path) -> None:
    ours, theirs = hf_tower(folder, "jax"), hf_tower(bert(), "torch")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.5)
    ours.load_state_dict(theirs.state_dict())
    ids, mask = batch()
    assert_near(ours(ids, mask) * mask[..., None], theirs(ids, mask) * mask[..., None], ALLOWED)


def test_weights_of_a_larger_model_are_found_by_both(tmp_path: Path) -> None:
    """A masked language model has no pooler, and the prefix "bert." and a head that a tower does not need."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**FIELDS)).eval()
    model.save_pretrained(tmp_path)
    theirs, ours = (hf_tower(tmp_path, framework, pool="mean") for framework in FRAMEWORKS)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert "model.pooler.dense.weight" not in ours.state_dict()
    ids, mask = batch()
    assert_near(ours(ids, mask), theirs(ids, mask), ALLOWED)
    assert_near(hf_tower(model, "jax", pool="mean")(ids, mask), theirs(ids, mask), ALLOWED)
    for framework in FRAMEWORKS:
        with pytest.raises(ValueError, match="no pooled output"):
            hf_tower(tmp_path, framework, pool="pooler")(ids, mask)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_sharded_weights(folder: Path, tmp_path: Path, framework: Any) -> None:
    bert().save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = hf_tower(folder, framework).state_dict()
    for name, tensor in hf_tower(tmp_path, framework).state_dict().items():
        assert torch.equal(tensor, expected.pop(name))
    assert not expected


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_ragged_ids_are_padded(folder: Path, framework: Any) -> None:
    tower = hf_tower(folder, framework, pool="mean")
    ids, mask = batch()
    ragged = RaggedTensor.from_padded(ids, mask.sum(1))
    assert torch.equal(tower(ragged), tower(ids[:, : int(mask.sum(1).max())], mask[:, : int(mask.sum(1).max())]))
    with pytest.raises(ValueError, match="pass no attention_mask with a RaggedTensor"):
        tower(ragged, mask)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_padding_has_no_effect(folder: Path, framework: Any) -> None:
    tower = hf_tower(folder, framework, pool="mean")
    ids, mask = batch()
    expected = tower(ids, mask)
    wider = [torch.nn.functional.pad(each, (0, 3)) for each in (ids, mask)]
    assert_near(tower(*wider), expected, ALLOWED)
    assert_near(tower(ids[:2], mask[:2]), expected[:2], ALLOWED)
    assert_near(tower(ids[4:], mask[4:]), tower(ids[4:, :5]), ALLOWED)  # without padding, and without a mask


def test_jax_compiles_once_for_each_class_of_sizes(folder: Path) -> None:
    tower = hf_tower(folder, "jax", pool="mean", classes={"batch": (6,)})
    for rows, length in ((5, 7), (6, 8), (1, 3)):  # padded to 6 x 8
        tower(*batch(rows, length))
    program: Any = tower.model
    assert program.compilations == 1
    # The largest class is the number of positions, 12, not the next power of two.
    assert_near(tower(*batch(2, 12)), hf_tower(folder, pool="mean")(*batch(2, 12)), ALLOWED)
    assert program.compilations == 2
    with pytest.raises(ValueError, match="'batch' is 7, which exceeds its largest class 6"):
        tower(*batch(7))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((torch.tensor([[13]]),), ValueError, "token ids must be from 0 to 12, got 13; use the tokenizer"),
        ((torch.tensor([[1, -1]]),), ValueError, "token ids must be from 0 to 12, got -1"),
        ((torch.ones(1, 13, dtype=torch.long),), ValueError, "13 tokens per row, but the model has positions for 12"),
        ((torch.ones(1, 2),), TypeError, r"an int32 or int64 tensor \[B, T\], got torch.float32 \[1, 2\]"),
        ((torch.ones(2, dtype=torch.long),), TypeError, r"got torch.int64 \[2\]"),
        (([[1, 2]],), TypeError, "got a list"),
        (
            (torch.ones(2, 3).long(), torch.ones(2, 2)),
            ValueError,
            r"of input_ids, \[2, 3\], got \[2, 2\]",
        ),
        ((torch.ones(2, 3).long(), None, torch.ones(3)), ValueError, r"token_type_ids must have the shape"),
        ((torch.ones(2, 3).long(), torch.tensor([[1, 1, 0], [0, 0, 0]])), ValueError, "row 1 has no tokens to pool"),
    ],
)
def test_bad_inputs_are_refused(folder: Path, framework: Any, inputs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        hf_tower(folder, framework, pool="mean")(*inputs)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer.1.output.dense.bias": None}, "lack.* 'encoder.layer.1.output.dense.bias'"),
        ({"embeddings.LayerNorm.bias": torch.zeros(9)}, r"shape \[16\] by config.json, got \[9\]"),
        ({"encoder.layer.2.output.dense.bias": torch.zeros(16)}, "provide for.* 'encoder.layer.2.output.dense.bias'"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    weights: dict[str, torch.Tensor], tmp_path: Path, framework: Any, change: Any, message: str
) -> None:
    changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        hf_tower(tmp_path, framework)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the .* {shard.name}; download"):
        hf_tower(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"word": 13}}}))
    with pytest.raises(ValueError, match="token 'word' has id 13, but the model .* vocab_size of 13"):
        hf_tower(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"framework": "tensorflow"}, ValueError, "framework must be one of 'torch', 'jax', got 'tensorflow'"),
        ({"pool": "max"}, ValueError, "pool must be one of .*'mean'.*, got 'max'"),
        ({"attention": "full"}, ValueError, "attention='full' is for decoders, llama, .*, but the model is 'bert'"),
        ({"attention": "none"}, ValueError, "attention must be one of 'causal', 'full', None, got 'none'"),
        ({"dtype": torch.int8}, ValueError, "dtype must be a floating-point dtype, .* got torch.int8"),
        ({"dtype": "bfloat16"}, ValueError, "dtype must be a floating-point dtype, .* got 'bfloat16'"),
        ({"freeze": "encoder.*.bais"}, ValueError, "the pattern .* matches no parameter"),
        ({"source": torch.nn.Linear(1, 1)}, TypeError, "a path, a name, or a module of transformers, got a Linear"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        hf_tower(**({"source": folder} | arguments))


def test_unknown_models_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba' is not implemented in JAX, only bert, "):
        hf_tower(tmp_path, "jax")
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    with pytest.raises(ValueError, match="transformers does not know the model_type 'own'; upgrade"):
        hf_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    for framework in FRAMEWORKS:
        with pytest.raises(ValueError, match="'t5' has an encoder and a decoder"):
            hf_tower(tmp_path, framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_frozen_tower_is_constant(folder: Path, framework: Any) -> None:
    tower = hf_tower(folder, framework, pool="mean", freeze=True).train()
    assert tower.training
    ids, mask = batch()
    outputs = [tower(ids, mask) for _ in range(2)]
    assert torch.equal(*outputs)  # no dropout
    assert not outputs[0].requires_grad
    parts = hf_tower(folder, framework, pool="mean", freeze=1).train()
    assert not torch.equal(parts(ids, mask), parts(ids, mask))
    found = gradients(parts, ids, mask)
    assert {name for name, gradient in found.items() if gradient is not None} == {
        name for name in found if "layer.1" in name
    }


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dropout_is_reproducible_and_off_in_evaluation(folder: Path, framework: Any) -> None:
    tower = hf_tower(folder, framework, pool="mean")
    ids, mask = batch()
    plain = tower(ids, mask)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(tower.train()(ids, mask))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(tower.eval()(ids, mask), plain)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies(folder: Path, framework: Any, duplicate: Any) -> None:
    tower = hf_tower(folder, framework, pool="mean")
    other = duplicate(tower)
    ids, mask = batch()
    assert torch.equal(other(ids, mask), tower(ids, mask))
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert not torch.equal(other(ids, mask), tower(ids, mask))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_torch_compile_has_no_graph_breaks(folder: Path, framework: Any) -> None:
    tower = hf_tower(folder, framework, pool="mean", freeze=1)
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    ids, mask = batch()
    expected = gradients(tower, ids, mask)
    assert_near(compiled(ids, mask), tower(ids, mask))
    for name, gradient in gradients(compiled, ids, mask).items():
        wanted = expected[name.removeprefix("_orig_mod.")]
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            assert_near(gradient, wanted, ALLOWED, where=name)


def test_training_agrees() -> None:
    """A few steps of plain SGD, in which rounding is not amplified."""
    towers = [hf_tower(bert(), framework, pool="mean") for framework in FRAMEWORKS]
    ids, mask = batch()
    target = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    losses = []
    for tower in towers:
        optimizer = torch.optim.SGD([each for each in tower.parameters() if each.requires_grad], lr=0.01)
        for _ in range(4):
            loss = (tower(ids, mask) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert_near(*losses, ALLOWED)
    assert_near(towers[0](ids, mask), towers[1](ids, mask), 16 * ALLOWED)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_checkpoint_leaves_out_frozen_weights(folder: Path, tmp_path: Path, framework: Any) -> None:
    def model_in(framework: Any) -> torch.nn.Module:
        tower = hf_tower(folder, framework, pool="mean", freeze=1)
        return torch.nn.ModuleDict({"tower": tower, "head": torch.nn.Linear(16, 1)})

    model = model_in(framework)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    saver = Saver(tmp_path / "run")
    saver.save(1, {"model": model})
    saver.wait()
    (manifest,) = (tmp_path / "run").rglob("manifest.json")
    saved = set(json.loads(manifest.read_text())["parts"]["model"]["tensors"])
    assert saved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for other in FRAMEWORKS:
        restored = model_in(other)
        Saver(tmp_path / "run").load({"model": restored})
        assert all(torch.equal(tensor, restored.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("missing", "works", "fails", "extra"),
    [("transformers", "jax", "torch", "pretrained"), ("jax", "torch", "jax", "jax")],
)
def test_each_framework_works_without_the_package_of_the_other(
    folder: Path, root: Path, missing: str, works: str, fails: str, extra: str
) -> None:
    code = (
        "import sys; sys.modules[sys.argv[2]] = None\n"
        "from recis_hybrid.towers import hf_tower\n"
        "print(len(hf_tower(sys.argv[1], sys.argv[3]).state_dict()))\n"
        "try: hf_tower(sys.argv[1], sys.argv[4])\n"
        "except ImportError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(folder), missing, works, fails]
    count, error = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(count) == len(load_file(folder / "model.safetensors"))
    assert f"pip install recis_hybrid[{extra}]" in error


def small(kind: str, **fields: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return getattr(transformers, f"{kind}Config")(**(sizes | fields))


def assert_frameworks_agree(path: Path, *inputs: torch.Tensor, **options: Any) -> None:
    theirs, ours = (hf_tower(path, framework, **options) for framework in FRAMEWORKS)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_near(ours(*inputs), theirs(*inputs), ALLOWED)
    for tower in (ours, theirs):
        model: Any = tower.model
        own = dict(model.named_parameters())
        for name, tensor in model.weight_files.read(list(own)):
            assert torch.equal(tensor, own.pop(name))
        assert not own


def test_decoders_pool_the_last_token_and_attend_either_way(tmp_path: Path) -> None:
    model_of(small("Llama", num_key_value_heads=1, vocab_size=13)).save_pretrained(tmp_path)
    ids, mask = batch()
    for attention in ("causal", "full"):
        assert_frameworks_agree(tmp_path, ids, mask, pool="last", attention=attention)
    causal, full = (hf_tower(tmp_path, attention=attention)(ids) for attention in ("causal", "full"))
    assert not torch.allclose(causal[:, 0], full[:, 0])
    assert torch.equal(causal, hf_tower(tmp_path)(ids))
    assert hf_tower(tmp_path)._longest is None


def test_texts_are_not_padded_across_the_length_at_which_rotations_change(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 9.0]}
    config = small(
        "Phi3",
        num_key_value_heads=1,
        vocab_size=13,
        pad_token_id=0,
        original_max_position_embeddings=6,
        max_position_embeddings=12,
        partial_rotary_factor=0.5,
        rope_scaling=scaling,
        sliding_window=4,
    )
    model_of(config).save_pretrained(tmp_path)
    ids, mask = batch(length=6)
    for attention in ("causal", "full"):
        assert_frameworks_agree(tmp_path, ids, mask, pool="last", attention=attention)
    assert_frameworks_agree(tmp_path, batch(length=7)[0])
    expected = hf_tower(tmp_path)(ids)
    assert_near(hf_tower(tmp_path, "jax", classes={"length": [8]})(ids), expected, ALLOWED)
    assert_near(hf_tower(tmp_path, "jax", classes={"length": None})(ids), expected, ALLOWED)
    with pytest.raises(ValueError, match="input_ids have 13 tokens per row, but the model has positions for 12"):
        hf_tower(tmp_path, "jax")(batch(length=13)[0])


def test_images(tmp_path: Path) -> None:
    model_of(small("ViT", image_size=8, patch_size=4)).save_pretrained(tmp_path)
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_frameworks_agree(tmp_path, pixels, pool="pooler")
    with pytest.raises(TypeError, match=r"pixel_values must be a float tensor, got torch.int64 \[3, 3, 8, 8\]"):
        hf_tower(tmp_path)(pixels.long())
    with pytest.raises(ValueError, match="part must be None, because the model has no parts, got 'text' for .* 'vit'"):
        hf_tower(tmp_path, part="text")


def clip() -> Any:
    parts = {
        "text_config": small(
            "CLIPText", vocab_size=13, max_position_embeddings=12, bos_token_id=1, eos_token_id=12
        ).to_dict(),
        "vision_config": small("CLIPVision", image_size=8, patch_size=4).to_dict(),
    }
    return model_of(transformers.CLIPConfig(**parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [None, "text", "vision"])
def test_frozen_weights_that_have_other_names_in_files_are_left_out_of_checkpoints(
    tmp_path: Path, part: Any, dtype: torch.dtype
) -> None:
    model = clip() if part else model_of(small("ViT", image_size=8, patch_size=4))
    model.save_pretrained(tmp_path / "files")

    def model_in(framework: Any, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        tower = hf_tower(tmp_path / "files", framework, pool="cls", part=part, freeze=True, dtype=dtype)
        return torch.nn.ModuleDict({"tower": tower, "head": torch.nn.Linear(16, 1)})

    for framework, other in (FRAMEWORKS, FRAMEWORKS[::-1]):
        saved = model_in(framework, 0)
        saver = Saver(tmp_path / framework)
        saver.save(1, {"model": saved})
        saver.wait()
        (manifest,) = (tmp_path / framework).rglob("manifest.json")
        assert set(json.loads(manifest.read_text())["parts"]["model"]["tensors"]) == {"head.weight", "head.bias"}
        restored = model_in(other, 1)
        Saver(tmp_path / framework).load({"model": restored})
        assert all(torch.equal(tensor, restored.state_dict()[name]) for name, tensor in saved.state_dict().items())


def test_parts_of_clip(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path)
    ids, mask = batch()
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_frameworks_agree(tmp_path, pixels, part="vision", pool="cls")
    assert_frameworks_agree(tmp_path, ids, mask, part="text", pool="last")
    frozen = {name for name, each in hf_tower(tmp_path, part="vision").named_parameters() if not each.requires_grad}
    assert frozen == {"model.post_layernorm.weight", "model.post_layernorm.bias"}
    for framework in FRAMEWORKS:
        with pytest.raises(ValueError, match="part must be 'text' or 'vision', got None for model_type 'clip'"):
            hf_tower(tmp_path, framework)
