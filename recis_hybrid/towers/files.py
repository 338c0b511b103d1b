"""Files of pretrained models in the format of Hugging Face, found without network access and read without pickle.

A model is a folder with ``config.json`` and its weights as safetensors, in one file or in shards with an index.
Nothing in it is executed: pickled weights and models that bring their own code are refused.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
PARTS = ("text", "vision")
"""Parts of models of text and images, such as CLIP."""
INSTALL = "run `pip install recis_hybrid[pretrained]`"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model")
_LISTED = 5
"""Number of names that an error message lists."""


@dataclass(frozen=True)
class PretrainedFiles:
    """Configuration and weights of a pretrained model on disk.

    Attributes:
        folder: The folder that contains them.
        config: The parsed ``config.json``.
        shards: The safetensors files of the weights.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Path, ...]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name, read from the headers of the files.

        Raises:
            ValueError: If a file is damaged, two files have a tensor of the same name, or the index lists a tensor
                that its file lacks.
        """
        return {name: shape for name, (_, shape) in self._places.items()}

    def digest(self) -> str:
        """Return the SHA-256 of the present ``config.json`` and weights, as hexadecimal digits.

        A file is read again only if its size or its time of modification has changed.

        Raises:
            OSError: If a file cannot be read.
        """
        total = hashlib.sha256()
        for path in (self.folder / CONFIG, *self.shards):
            status = path.stat()
            total.update(_digest(path, status.st_size, status.st_mtime_ns))
        return total.hexdigest()

    def read(self, names: Mapping[str, str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read tensors into CPU memory of torch's allocator, which JAX can share because it is aligned to 64 bytes.

        Each tensor is copied once, from the memory-mapped file.

        Args:
            names: The names of the tensors in the files, by the keys of the result.
            dtype: Dtype of the results; None for that of the files.

        Raises:
            KeyError: If the files lack a tensor.
            ValueError: If a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for shard in self.shards:
            with _opened(shard) as file:
                for key, name in names.items():
                    if self._places[name][0] == shard:
                        tensor = file.get_tensor(name)
                        found[key] = tensor.to(tensor.dtype if dtype is None else dtype, copy=True)
        return {key: found[key] for key in names}

    def find_equal(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, str]:
        """Return the names of tensors in the files that are equal to given ones, by the keys of those.

        Args:
            tensors: Tensors on the CPU. Those without an equal are left out of the result.
            dtype: Dtype to which the tensors of the files are converted first; None for their own.

        Raises:
            ValueError: If a file is damaged.
        """
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        found: dict[bytes, str] = {}
        for name, shape in self.shapes.items():
            if shape in shapes:
                found.setdefault(_content(self.read({name: name}, dtype)[name]), name)
        contents = {key: _content(tensor) for key, tensor in tensors.items()}
        return {key: found[content] for key, content in contents.items() if content in found}

    def check_tokenizer(self, tokenizer: str | Path | None = None) -> None:
        """Check that a tokenizer belongs to the model: all its ids have a row, and its vocabulary is the model's own.

        Args:
            tokenizer: A ``tokenizer.json``, or a folder that contains one. None for the one beside the weights, if any.

        Raises:
            FileNotFoundError: If there is no tokenizer at the path.
            ValueError: If the tokenizer does not belong to the model, or its file is damaged.
        """
        own = self.folder / TOKENIZER
        path = own if tokenizer is None else Path(tokenizer)
        path = path / TOKENIZER if path.is_dir() else path
        if tokenizer is None and not own.is_file():
            return
        vocabulary = read_vocabulary(path)
        size = vocabulary_size(self.config)
        last = max(vocabulary, key=vocabulary.__getitem__, default=None)
        if last is not None and size is not None and vocabulary[last] >= size:
            raise ValueError(
                f"{path}: token {last!r} has id {vocabulary[last]}, but the model in {self.folder} has a vocab_size of "
                f"{size}; use the tokenizer that was published with the model"
            )
        if path != own and own.is_file():
            _check_same(path, vocabulary, own, read_vocabulary(own))

    @cached_property
    def _places(self) -> dict[str, tuple[Path, tuple[int, ...]]]:
        """File and shape of each tensor by name."""
        places: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for shard in self.shards:
            with _opened(shard) as file:
                for name in file.keys():
                    if name in places:
                        raise ValueError(
                            f"{shard}: tensor {name!r} is also in {places[name][0]}; delete one of the files"
                        )
                    places[name] = (shard, tuple(file.get_slice(name).get_shape()))
        if len(self.shards) > 1 or self.shards[0].name != WEIGHTS:
            for name, file_name in _read_index(self.folder / INDEX).items():
                if places.get(name, (None,))[0] != self.folder / file_name:
                    raise ValueError(
                        f"{self.folder / file_name}: has no tensor {name!r}, which {INDEX} expects there; download the "
                        "files again"
                    )
        return places


@dataclass(frozen=True)
class ReadWeights:
    """The files that a module's parameters were read from (``recis_hybrid.checkpointing.WeightFiles``).

    Checkpoints leave out parameters that are frozen and still equal to those in the files.

    Args:
        files: The files.
        names: The names of the tensors in the files, by the names of the parameters.
        dtype: Dtype of the parameters.
    """

    files: PretrainedFiles
    names: Mapping[str, str]
    dtype: torch.dtype

    @property
    def source(self) -> str:
        """The folder."""
        return str(self.files.folder)

    def digest(self) -> str:
        """Return a digest of the present contents of the files; see :meth:`PretrainedFiles.digest`."""
        return self.files.digest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters as they were read from the files.

        Args:
            names: Names of parameters. Those without a tensor in the files are skipped.

        Raises:
            OSError: If a file is missing.
            ValueError: If a file is damaged, or lacks a tensor that it had.
        """
        present = open_folder(self.files.folder)
        for name in names:
            own = self.names.get(name)
            if own is None:
                continue
            if own not in present.shapes:
                raise ValueError(f"{self.source}: the files no longer have {own!r}; restore them")
            yield name, present.read({name: own}, self.dtype)[name]


def find_pretrained(path_or_name: str | os.PathLike[str], *, download: bool = False) -> PretrainedFiles:
    """Find the files of a pretrained model.

    Args:
        path_or_name: A folder with ``config.json``; the name of an installed package that contains such a folder, which
            is not imported; or a name on the Hugging Face Hub, whose files are in the local cache.
        download: Whether to download a model of the Hub that is not in the cache.

    Returns:
        The files. Tensors are not read yet.

    Raises:
        FileNotFoundError: If there is no such model on this machine, or files are missing.
        ImportError: If a download requires ``huggingface_hub``, which is not installed.
        ValueError: If the configuration is invalid, the model needs code of its own, or its weights are pickled.
    """
    where = f"find_pretrained: {os.fspath(path_or_name)!r}"
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return open_folder(path)
    name = os.fspath(path_or_name)
    if not isinstance(path_or_name, str) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{where} is not a folder; pass the folder that contains {CONFIG}")
    folder = _find_in_package(name) or _find_in_hub(name)
    if folder is not None and (not download or _is_complete(folder)):
        return open_folder(folder)
    if not download:
        raise FileNotFoundError(
            f"{where} is neither a folder nor an installed package with {CONFIG}, and not in the cache of the Hugging "
            "Face Hub; pass a folder, or download=True to download it"
        )
    return open_folder(_download(name, where))


def open_folder(folder: Path) -> PretrainedFiles:
    """Return the files of a folder, after checking that they are complete and contain no code.

    Raises:
        FileNotFoundError: If ``config.json``, the weights or a shard are missing.
        ValueError: If the configuration is invalid, the model needs code of its own, or its weights are pickled.
    """
    config = _read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{folder / CONFIG}: must have a string model_type, got {config.get('model_type')!r}")
    if config.get("auto_map"):
        raise ValueError(
            f"{folder / CONFIG}: auto_map asks for code that comes with the model, which is never run; use a model "
            "whose architecture is part of transformers"
        )
    if (folder / WEIGHTS).is_file():
        return PretrainedFiles(folder, config, (folder / WEIGHTS,))
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder}: its weights are pickled ({', '.join(pickles[:_LISTED])}), which can execute code; convert "
                f"them to {WEIGHTS} with the model's save_pretrained where you trust them"
            )
        raise FileNotFoundError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; download the weights as safetensors")
    shards = sorted(set(_read_index(folder / INDEX).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: lacks {len(missing)} of the {len(shards)} files that {INDEX} lists: "
            f"{', '.join(missing[:_LISTED])}; download the files again"
        )
    return PretrainedFiles(folder, config, tuple(folder / name for name in shards))


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of token ids that a model has embeddings for, or None if its configuration does not say."""
    text = config.get("text_config")
    size = (text if isinstance(text, Mapping) else config).get("vocab_size")
    return size if isinstance(size, int) else None


def read_vocabulary(path: Path) -> dict[str, int]:
    """Return the ids of all tokens in a ``tokenizer.json``, including added ones.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a tokenizer.
    """
    document = _read_json(path)
    try:
        listed = document["model"]["vocab"]
        # Unigram models list pairs of a token and its score.
        vocabulary = listed if isinstance(listed, dict) else {pair[0]: number for number, pair in enumerate(listed)}
        return {**vocabulary, **{token["content"]: token["id"] for token in document.get("added_tokens") or ()}}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path}: is not a tokenizer of the library tokenizers ({error!r}); download it again"
        ) from None


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, modified: int) -> bytes:
    """Return the SHA-256 of a file of a size and time of modification."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content(tensor: Tensor) -> bytes:
    """Return a hash of dtype, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _check_same(path: Path, vocabulary: Mapping[str, int], own: Path, expected: Mapping[str, int]) -> None:
    """Raise ValueError if two vocabularies differ."""
    different = [token for token in {**expected, **vocabulary} if expected.get(token) != vocabulary.get(token)]
    if different:
        token = different[0]
        raise ValueError(
            f"{path}: differs from {own}, the tokenizer of the model, in {len(different)} tokens; {token!r} has id "
            f"{vocabulary.get(token)} here, and {expected.get(token)} there; use the model's own tokenizer"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; pass the folder of a complete model") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); download it again") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: must contain a JSON object, got {type(document).__name__}; download it again")
    return document


def _read_index(path: Path) -> dict[str, str]:
    """Return the file name of each tensor from the index of a sharded model."""
    names = _read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path}: must have an object weight_map; download it again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: weight_map must name safetensors files of the same folder, got {name!r}")
    return names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, and name it in errors."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: is not a valid safetensors file ({error}); it may be a Git LFS pointer or truncated, download it "
            "again"
        ) from None


def _find_in_package(name: str) -> Path | None:
    """Return the only folder with a configuration in an installed package, or None. The package is not imported."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    for place in (spec and spec.submodule_search_locations) or ():
        folders = [folder for folder in (Path(place), *Path(place).iterdir()) if (folder / CONFIG).is_file()]
        if len(folders) > 1:
            raise ValueError(
                f"find_pretrained: package {name!r} contains several models: {', '.join(map(str, sorted(folders)))}; "
                "pass one of these folders"
            )
        if folders:
            return folders[0]
    return None


def _find_in_hub(name: str) -> Path | None:
    """Return the folder of a model in the local cache of the Hub, or None."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_complete(folder: Path) -> bool:
    try:
        open_folder(folder)
    except FileNotFoundError:
        return False
    return True


def _download(name: str, where: str) -> Path:
    """Download the safetensors and the configuration of a model of the Hub into its cache."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ImportError(f"{where}: a download requires huggingface_hub; {INSTALL}") from error
    # Files in subfolders are variants for other frameworks.
    return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED), ignore_patterns=["*/*"]))
