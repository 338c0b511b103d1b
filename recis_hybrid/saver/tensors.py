"""Writes and reads one safetensors file, with what it is of in its header.

The library writes several metadata keys in random order, so ours is one key that holds JSON: equal tensors give equal
bytes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.manifest import FORMAT_VERSION, TensorSpec
from recis_hybrid.saver.protocol import JSON

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
"""The dtypes that files may hold, by torch's name."""

METADATA_KEY = "recis_hybrid"


def check_tensor(where: str, name: str, tensor: object) -> None:
    """Check that a tensor can be saved.

    Args:
        where: what the tensor belongs to, for the message.
        name: its name.
        tensor: the tensor.

    Raises:
        CheckpointError: it is no dense tensor, or its name or dtype is one that safetensors does not take.
    """
    if not isinstance(name, str) or name in ("", "__metadata__") or not _is_unicode(name):
        raise CheckpointError(
            f"{where}: a tensor's name must be a string of valid Unicode, not empty and not '__metadata__', got "
            f"{name!r}. Rename it."
        )
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{where}: {name!r} must be a tensor, got {type(tensor).__name__}. Put JSON into `meta`.")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{where}: tensor {name!r} must be dense and have memory, got layout {tensor.layout} on {tensor.device}. "
            "Make it dense, or initialise it, before saving."
        )
    if DTYPES.get(TensorSpec.of(tensor).dtype) != tensor.dtype:
        raise CheckpointError(
            f"{where}: tensor {name!r} must have a dtype of {sorted(DTYPES)}, got {tensor.dtype}. Convert it."
        )


def write_tensors(path: Path, tensors: dict[str, Tensor], tag: dict[str, JSON]) -> None:
    """Write tensors to a new file.

    Args:
        path: the file.
        tensors: tensors by name; no two share memory.
        tag: what the file is of; the format version is put before it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **tag}, separators=(",", ":"))
    # A lazy conjugate or negative is resolved: the library writes the memory as it lies.
    plain = {name: t.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, t in tensors.items()}
    try:
        save_file(plain, path, metadata={METADATA_KEY: text})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: could not be written ({error}). Is the disk full, or not writable?") from error


class TensorFile:
    """A safetensors file open for reading."""

    def __init__(self, path: Path, where: str, handle: Any) -> None:
        self._path = path
        self._where = where
        self._handle = handle

    def check(self, specs: dict[str, TensorSpec], tag: dict[str, JSON]) -> None:
        """Compare the header with what the file must hold.

        Args:
            specs: dtype and shape of every tensor.
            tag: what the file is of.

        Raises:
            CorruptCheckpoint: a tensor is missing, unknown, or of another dtype or shape, or the file is of
                something else.
        """
        expected_tag = {"format_version": FORMAT_VERSION, **tag}
        text = (self._handle.metadata() or {}).get(METADATA_KEY, "null")
        try:
            found_tag = json.loads(text)
        except (ValueError, RecursionError):
            found_tag = text
        if found_tag != expected_tag:
            self._fail(f"its metadata must be {expected_tag}, is {found_tag}")
        found = {name: self._spec(name) for name in self._handle.keys()}
        if found != specs:
            self._fail(f"must hold {_listed(specs)}, holds {_listed(found)}")

    def names(self) -> list[str]:
        """The names of all tensors, in order."""
        return sorted(self._handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by the header.

        Args:
            name: its name.

        Returns:
            The shape; empty if the file has no such tensor.
        """
        return self._spec(name).shape if name in self._handle.keys() else ()

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory of its own.

        The library's tensors are views of the mapped file, 24 bytes past a multiple of 64: no framework could take
        them over without a copy, and they would change with the file.

        Args:
            name: its name.

        Returns:
            A new tensor on the CPU, starting at a multiple of 64 bytes.
        """
        mapped = self._handle.get_tensor(name)
        return torch.empty_like(mapped).copy_(mapped)

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor into given memory.

        Args:
            name: its name.
            out: a tensor of its dtype and shape, overwritten.
        """
        out.copy_(self._handle.get_tensor(name))

    def _spec(self, name: str) -> TensorSpec:
        part = self._handle.get_slice(name)
        return TensorSpec(_TORCH_NAMES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))

    def _fail(self, rule: str) -> None:
        raise CorruptCheckpoint(f"{self._path} ({self._where}): {rule}. {OTHER_STEP}")


@contextmanager
def open_tensors(path: Path, where: str) -> Iterator[TensorFile]:
    """Open a file for reading.

    Args:
        path: the file.
        where: what it is of, for messages.

    Yields:
        The open file.

    Raises:
        CorruptCheckpoint: it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            yield TensorFile(path, where, handle)
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path} ({where}): must be a safetensors file, but {error}. {OTHER_STEP}") from error


_TORCH_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(specs: dict[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in sorted(specs.items()))
