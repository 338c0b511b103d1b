"""The header of a safetensors file: the places of its tensors, and a tag that identifies the file.

Headers have the same bytes as those of the safetensors library: a length of 8 bytes, then JSON without white space,
padded with blanks; tensors are sorted by dtype, then by name. Nothing in a header is trusted when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.checkpointing import JSON
from recis_hybrid.saver.format.checksums import CHUNK_BYTES, PAGE_BYTES, Sums
from recis_hybrid.saver.format.manifest import FORMAT_VERSION, TensorSpec

METADATA_KEY = "recis_hybrid"
LONGEST_HEADER = 100_000_000  # the library's own limit

NAMES = {
    **{"uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64"},
    **{"float32": "F32", "uint32": "U32", "int32": "I32"},
    **{"bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}
"""Names of dtypes in files by torch's names, in the order in which files store tensors."""

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES}
"""Dtypes that files may hold, by torch's name."""

_ORDER = {name: number for number, name in enumerate(NAMES)}
_TORCH_NAMES = {short: name for name, short in NAMES.items()}


@dataclass(frozen=True)
class Place:
    """A tensor, and the place of its bytes, counted from the end of the header."""

    spec: TensorSpec
    first: int
    stop: int


def places(specs: Mapping[str, TensorSpec]) -> dict[str, Place]:
    """Compute the places of tensors.

    Args:
        specs: Dtype and shape of each tensor, by name.

    Returns:
        Their places by name, in order.
    """
    found: dict[str, Place] = {}
    at = 0
    for name in sorted(specs, key=lambda name: (_ORDER[specs[name].dtype], name)):
        size = _bytes(specs[name])
        found[name] = Place(specs[name], at, at + size)
        at += size
    return found


def header(found: Mapping[str, Place], tag: Mapping[str, JSON], pages: Sums | None = None) -> bytes:
    """Return the bytes of a header, starting with its length.

    Args:
        found: Result of :func:`places`.
        tag: Identifies the file; the format version is prepended.
        pages: CRC-32 of each page after the header, for a file that is read in parts. If the file is longer than a
            chunk, the header is padded to whole pages.
    """
    about: dict[str, JSON] = {"format_version": FORMAT_VERSION, **tag}
    if pages is not None:
        about["pages"] = pages.astype(">u4").tobytes().hex()
    document: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(about, separators=(",", ":"))}}
    for name, place in found.items():
        document[name] = {
            "dtype": NAMES[place.spec.dtype],
            "shape": place.spec.shape,
            "data_offsets": [place.first, place.stop],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    size = 8 + len(text)
    size += -size % 8
    if pages is not None and size + data_bytes(found) > CHUNK_BYTES:
        size += -size % PAGE_BYTES
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8, b" ")


def data_bytes(found: Mapping[str, Place]) -> int:
    """Return the bytes of all tensors in total."""
    return max((place.stop for place in found.values()), default=0)


def views(data: Tensor, found: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return the tensors of a file as views; misaligned ones are copied.

    Args:
        data: uint8, the bytes after the header.
        found: Places of the tensors.

    Returns:
        Tensors by name.
    """
    return {name: typed(data[place.first : place.stop], place.spec) for name, place in found.items()}


def buffer(data: Tensor) -> memoryview:
    """Return the memory of a uint8 tensor on the CPU."""
    return data.numpy().data


def typed(data: Tensor, spec: TensorSpec) -> Tensor:
    """Return bytes (uint8, of the size of the tensor) as a tensor; copied if misaligned."""
    dtype = DTYPES[spec.dtype]
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(spec.shape)


def parse_header(text: bytes, size: int) -> tuple[Any, dict[str, Place]]:
    """Parse a header without trusting it.

    Args:
        text: The header after its length.
        size: Bytes of the file after the header.

    Returns:
        The tag of the file, None if there is none; and the places of its tensors.

    Raises:
        ValueError: The header is not valid, or belongs to another file.
    """
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("its header is not an object")
    metadata = document.pop("__metadata__", {})
    about = metadata.get(METADATA_KEY, "null") if isinstance(metadata, dict) else "null"
    found: dict[str, Place] = {}
    for name, item in document.items():
        dtype = _TORCH_NAMES.get(str(item["dtype"]), str(item["dtype"]))
        shape, offsets = item["shape"], item["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)) or len(offsets) != 2:
            raise ValueError(f"the header has no valid sizes of {name!r}")
        place = Place(TensorSpec(dtype, tuple(shape)), *offsets)
        if dtype in DTYPES and _bytes(place.spec) != place.stop - place.first or not place.first <= place.stop <= size:
            raise ValueError(f"{name!r} is outside the file, or has the wrong size")
        found[name] = place
    try:
        tag = json.loads(about)
    except (ValueError, TypeError, RecursionError):
        tag = about
    return tag, found


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
