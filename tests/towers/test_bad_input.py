"""Folders and batches that do not work are refused by name in both frameworks, or computed where that has a meaning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recis_hybrid.features import Tokenize
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.towers import embed_corpus, find_pretrained, hf_tower
from tests.support.pretrained import model_of

pytestmark = [pytest.mark.jax, pytest.mark.usefixtures("compiled_once")]
pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

FRAMEWORKS: list[Any] = ["torch", "jax"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "shoe", "book"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of eight words and six positions, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=6)
    model_of(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(complete, tmp_path / "model"))


def with_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def without_shard(folder: Path) -> None:
    names = {name: "model-00001-of-00001.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    without_weights(folder)


def other_shape(folder: Path) -> None:
    with_config(folder, intermediate_size=25)


def other_model(folder: Path) -> None:
    save_file({"weight": torch.ones(2, 3)}, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def own_code(folder: Path) -> None:
    with_config(folder, auto_map={"AutoModel": "modeling.Model"})
    (folder / "modeling.py").write_text("raise AssertionError('executed')")


def larger_tokenizer(folder: Path) -> None:
    with_config(folder, vocab_size=len(WORDS) - 1)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (without_weights, FileNotFoundError, "model: has neither model.safetensors nor .* download the weights"),
        (pickled, ValueError, r"weights are pickled \(pytorch_model.bin\), which can execute code; convert"),
        (without_shard, FileNotFoundError, "lacks 1 of the 1 files .*: model-00001-of-00001.safetensors; download"),
        (other_shape, ValueError, r"'encoder.layer.0.intermediate.dense.\w+' must have shape \[25.*\].*, got \[24"),
        (other_model, ValueError, "the (weights lack|checkpoint has none of its parameters, such as) 'embeddings."),
        (truncated, ValueError, "model.safetensors: is not a valid safetensors file .* truncated"),
        (own_code, ValueError, "config.json: auto_map asks for code that comes with the model, which is never run"),
        (larger_tokenizer, ValueError, "token 'book' has id 7, but the model in .* has a vocab_size of 7; use the tok"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_folders_are_refused(folder: Path, framework: Any, damage: Any, error: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(error, match=message):
        hf_tower(folder, framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_titles_are_refused_or_embedded(complete: Path, tmp_path: Path, framework: Any) -> None:
    tower = hf_tower(complete, framework, pool="mean", classes={"batch": [2], "length": [6]})
    tokenize = Tokenize(find_pretrained(complete).folder, 6)
    for texts, error, message in (
        (["red shoe", ""], ValueError, "texts must not be empty, got '' in row 1"),
        (["red shoe", None], TypeError, "texts must be strings of Unicode, got None in row 1"),
        (["red " * 9], ValueError, "at most 6 tokens, got 'red red .*; it has 11; raise max_length"),
        (RaggedTensor.from_strings([b"red \xff"]), ValueError, r"must be UTF-8, got b'red \\xff' in row 0"),
    ):
        with pytest.raises(error, match=message):
            embed_corpus(tower, tokenize, [(range(len(texts)), texts)], tmp_path, progress=False)
    assert len(embed_corpus(tower, tokenize, [([7, 8], ["red shoe", "green"])], tmp_path, progress=False)) == 1
    with pytest.raises(ValueError, match="max_length must be at most 6, because the model in .* has no more positions"):
        Tokenize(complete, 7)(["red"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_batches_without_rows_have_no_embeddings(complete: Path, framework: Any) -> None:
    tower = hf_tower(complete, framework, pool="cls", classes={"batch": [2], "length": [6]})
    ids = torch.tensor([[4, 5], [6, 7]])
    nothing = RaggedTensor(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    for inputs in ((ids[:0],), (nothing,), (ids[:0], ids[:0], ids[:0])):
        output = tower(*inputs)
        assert output.shape == (0, 16)
        output.sum().backward()
    # On several ranks, gradients that are missing on one would keep the others waiting.
    assert all(bool((each.grad == 0).all()) for each in tower.parameters() if each.requires_grad)
    empty = RaggedTensor(torch.tensor([4]), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="row 1 has no tokens to pool; leave it out"):
        tower(empty)
    for inputs in (RaggedTensor(torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)), ids[:, :0]):
        with pytest.raises(ValueError, match="row 0 has no tokens"):
            tower(inputs)
