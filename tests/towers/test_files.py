"""Files of pretrained models: finding, checking and reading them."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recis_hybrid.checkpointing import WeightFiles
from recis_hybrid.towers import find_pretrained
from recis_hybrid.towers.files import ReadWeights

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.bfloat16)}
INDEX = {"weight_map": {"a.weight": "one.safetensors", "b": "two.safetensors"}}
VOCABULARY = {"[PAD]": 0, "red": 1, "shoe": 2}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write(folder: Path, config: dict[str, Any] | None = None, tensors: Any = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 3} | (config or {})))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, index: Any = INDEX) -> Path:
    write(folder).joinpath("model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, tensor in zip(("one", "two"), TENSORS.items(), strict=True):
        save_file(dict([tensor]), folder / f"{name}.safetensors")
    return folder


def write_tokenizer(path: Path, vocabulary: Any = None, added: dict[str, int] | None = None, **model: Any) -> Path:
    tokens = [{"content": content, "id": number} for content, number in (added or {}).items()]
    document = {"model": {"vocab": VOCABULARY if vocabulary is None else vocabulary, **model}, "added_tokens": tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("make", [write, write_sharded])
def test_tensors_are_read_into_aligned_memory(tmp_path: Path, make: Any) -> None:
    files = find_pretrained(make(tmp_path))
    assert files.config["model_type"] == "bert"
    assert files.shapes == {"a.weight": (2, 3), "b": (5,)}
    read = files.read({"x": "b", "y": "a.weight"})
    assert list(read) == ["x", "y"]
    assert torch.equal(read["x"], TENSORS["b"])
    assert torch.equal(read["y"], TENSORS["a.weight"])
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in read.values())
    assert files.read({"b": "b"}, torch.float64)["b"].dtype == torch.float64
    with pytest.raises(KeyError, match="c"):
        files.read({"c": "c"})


def test_reading_copies_out_of_the_file(tmp_path: Path) -> None:
    read = find_pretrained(write(tmp_path)).read({"b": "b"})
    write(tmp_path, tensors={"b": torch.zeros(5)})
    read["b"] += 1
    assert read["b"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("make", [write, write_sharded])
def test_tensors_are_found_by_their_contents(tmp_path: Path, make: Any) -> None:
    files = find_pretrained(make(tmp_path))
    matrix, numbers = TENSORS["a.weight"], TENSORS["b"]
    given = {"x": matrix.clone(), "y": numbers, "z": numbers.float(), "turned": matrix.T, "other": matrix + 1}
    assert files.find_equal(given) == {"x": "a.weight", "y": "b"}
    assert files.find_equal(given, torch.float32) == {"x": "a.weight", "z": "b"}
    assert files.find_equal({}) == {}


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = write(tmp_path / "model_in_package" / "data")
    (tmp_path / "model_in_package" / "__init__.py").write_text("raise AssertionError('imported')")
    assert find_pretrained("model_in_package").folder == folder
    assert "model_in_package" not in sys.modules
    write(tmp_path / "model_in_package" / "more")
    with pytest.raises(ValueError, match=r"'model_in_package' contains several models: .*data, .*more; pass one"):
        find_pretrained("model_in_package")


def test_the_cache_of_the_hub_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--own--small"
    folder = write(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_pretrained("own/small").folder == folder
    assert find_pretrained("own/small", download=True).folder == folder  # complete, so nothing is downloaded
    with pytest.raises(FileNotFoundError, match="'own/other' is neither a folder nor .* download=True"):
        find_pretrained("own/other")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor .* download"):
        find_pretrained("own/small")


def test_a_download_fetches_neither_code_nor_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    published = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    refused = ["pytorch_model.bin", "modeling_own.py", "onnx/model.onnx", "1_Pooling/config.json", "tf_model.h5"]
    fetched: list[str] = []

    def snapshot_download(name: str, *, local_files_only: bool = False, **patterns: Any) -> str:
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("absent")
        fetched.extend(hub.utils.filter_repo_objects(published + refused, **patterns))
        return str(write(tmp_path / name))

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert find_pretrained("own/small", download=True).folder == tmp_path / "own/small"
    assert fetched == published


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "~/folder", "a/b/c", Path("folder")])
def test_a_path_is_not_looked_up_on_the_hub(name: Any) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder; pass the folder that contains config.json"):
        find_pretrained(name, download=True)


@pytest.mark.parametrize("name", ["json", "not a name", "no_such_model"])
def test_names_of_nothing_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name!r} is neither a folder nor"):
        find_pretrained(name)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("config.json", None, FileNotFoundError, "config.json: there is no such file"),
        ("config.json", "{", ValueError, "config.json: is not JSON"),
        ("config.json", "[]", ValueError, "config.json: must contain a JSON object, got list"),
        ("config.json", "{}", ValueError, "config.json: must have a string model_type, got None"),
        ("config.json", '{"model_type": "a", "auto_map": {"A": "a.A"}}', ValueError, "auto_map asks for code .* never"),
        (
            "model.safetensors",
            None,
            FileNotFoundError,
            "has neither model.safetensors nor .*index.json",
        ),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", ValueError, "Git LFS pointer or truncated"),
        ("tokenizer.json", "{}", ValueError, r"tokenizer.json: is not a tokenizer .*KeyError\('model'\)"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, file: str, content: str | None, error: Any, message: str) -> None:
    path = write(tmp_path) / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=message):
        read_all(tmp_path)


def read_all(folder: Path) -> dict[str, tuple[int, ...]]:
    files = find_pretrained(folder)
    files.check_tokenizer()
    return files.shapes


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors: is not a valid safetensors file .* truncated"):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (write(tmp_path) / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"its weights are pickled \({name}\), which can execute code; convert"):
        find_pretrained(tmp_path)


def test_shards_must_be_complete(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 files that .* lists: two.safetensors; download"):
        find_pretrained(tmp_path)
    save_file({"c": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two.safetensors: has no tensor 'b', which model.*index.json expects there"):
        read_all(tmp_path)
    save_file(TENSORS, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two.safetensors: tensor 'a.weight' is also in .*one.safetensors; delete"):
        read_all(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["one.safetensors"]}, {"weight_map": {}}])
def test_an_index_must_list_files(tmp_path: Path, index: Any) -> None:
    with pytest.raises(ValueError, match=r"index.json: must have an object weight_map"):
        find_pretrained(write_sharded(tmp_path, index))


@pytest.mark.parametrize("name", ["../one.safetensors", "/one.safetensors", "one.bin", 1])
def test_an_index_must_name_files_of_the_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match=r"must name safetensors files of the same folder, got"):
        find_pretrained(write_sharded(tmp_path, {"weight_map": {"a.weight": name}}))


def test_the_digest_is_of_the_present_contents(tmp_path: Path) -> None:
    files = find_pretrained(write(tmp_path / "one"))
    digest = files.digest()
    assert digest == find_pretrained(write(tmp_path / "two")).digest()
    parts = [(tmp_path / "one" / name).read_bytes() for name in ("config.json", "model.safetensors")]
    assert digest == hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    write(tmp_path / "one", config={"layer_norm_eps": 1.0})
    changed = files.digest()
    write(tmp_path / "one", tensors={name: tensor + 1 for name, tensor in TENSORS.items()})
    assert len({digest, changed, files.digest()}) == 3
    assert find_pretrained(write_sharded(tmp_path / "one")).digest() != digest


def test_read_weights_are_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    files = find_pretrained(write(tmp_path))
    weights = ReadWeights(files, {"weight": "a.weight", "other": "b"}, torch.float16)
    assert isinstance(weights, WeightFiles)
    assert (weights.source, weights.digest()) == (str(tmp_path), files.digest())
    ((name, tensor),) = weights.read(["absent", "weight"])
    assert name == "weight"
    assert torch.equal(tensor, TENSORS["a.weight"].half())
    write(tmp_path, tensors={"b": torch.zeros(1)})
    with pytest.raises(ValueError, match="no longer have 'a.weight'; restore them"):
        list(weights.read(["weight"]))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        list(weights.read(["weight"]))


def test_the_models_own_tokenizer_belongs_to_it(tmp_path: Path) -> None:
    files = find_pretrained(write(tmp_path))
    files.check_tokenizer()  # there is none
    own = write_tokenizer(tmp_path / "tokenizer.json")
    files.check_tokenizer()
    files.check_tokenizer(own)
    files.check_tokenizer(tmp_path)
    files.check_tokenizer(write_tokenizer(tmp_path / "copy" / "tokenizer.json", type="BPE").parent)
    # Unigram models list pairs of token and score.
    files.check_tokenizer(write_tokenizer(tmp_path / "unigram.json", [["[PAD]", 0.0], ["red", -1.0], ["shoe", -2.0]]))


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    files = find_pretrained(write(tmp_path))
    with pytest.raises(FileNotFoundError, match="absent.json: there is no such file"):
        files.check_tokenizer(tmp_path / "absent.json")
    larger = write_tokenizer(tmp_path / "larger.json", added={"[NEW]": 3})
    with pytest.raises(ValueError, match=r"token '\[NEW\]' has id 3, but the model in .* has a vocab_size of 3; use"):
        files.check_tokenizer(larger)
    write_tokenizer(tmp_path / "tokenizer.json")
    other = write_tokenizer(tmp_path / "other.json", {"[PAD]": 0, "shoe": 1, "blue": 2})
    with pytest.raises(ValueError, match="other.json: differs from .* in 3 tokens; 'red' has id None here, and 1 th"):
        files.check_tokenizer(other)
    text = find_pretrained(write(tmp_path / "text", {"vocab_size": None, "text_config": {"vocab_size": 2}}))
    with pytest.raises(ValueError, match="token 'shoe' has id 2, but .* vocab_size of 2"):
        text.check_tokenizer(tmp_path / "tokenizer.json")
