"""The header of a safetensors file: where each tensor lies, and what the file is of.

As the safetensors library writes it, so that the bytes are the same whoever wrote them: a length of 8 bytes, JSON
without white space, padded with blanks; tensors by their dtype, then by name. What it holds is checked, not believed.
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
"""By torch's name of a dtype, that of the files; in the order in which tensors of a file lie."""

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES}
"""The dtypes that files may hold, by torch's name."""

_ORDER = {name: number for number, name in enumerate(NAMES)}
_TORCH_NAMES = {short: name for name, short in NAMES.items()}


@dataclass(frozen=True)
class Place:
    """One tensor, and where its bytes lie, counted from the end of the header."""

    spec: TensorSpec
    first: int
    stop: int


def places(specs: Mapping[str, TensorSpec]) -> dict[str, Place]:
    """Decide where tensors lie.

    Args:
        specs: Dtype and shape of each, by name.

    Returns:
        Their places, in order.
    """
    found: dict[str, Place] = {}
    at = 0
    for name in sorted(specs, key=lambda name: (_ORDER[specs[name].dtype], name)):
        size = _bytes(specs[name])
        found[name] = Place(specs[name], at, at + size)
        at += size
    return found


def header(found: Mapping[str, Place], tag: Mapping[str, JSON], pages: Sums | None = None) -> bytes:
    """Write a header.

    Args:
        found: As ``places`` gives them.
        tag: What the file is of; the format version is put before it.
        pages: CRC-32 of each page after the header, for a file of which parts are to be read; where the file is longer
            than a chunk, the header then is whole pages long.

    Returns:
        The bytes, with the length at the beginning.
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
    """Return the bytes of all tensors together."""
    return max((place.stop for place in found.values()), default=0)


def views(data: Tensor, found: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return the tensors of a file, as views.

    Args:
        data: uint8, what lies after the header.
        found: Where each lies.

    Returns:
        By name; copied where its bytes lie so that no view can be had.
    """
    return {name: typed(data[place.first : place.stop], place.spec) for name, place in found.items()}


def buffer(data: Tensor) -> memoryview:
    """Return the bytes of a uint8 tensor on the CPU, as its memory."""
    return data.numpy().data


def typed(data: Tensor, spec: TensorSpec) -> Tensor:
    """Bytes (uint8, as many as the tensor has) as the tensor that they are."""
    dtype = DTYPES[spec.dtype]
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(spec.shape)


def parse_header(text: bytes, size: int) -> tuple[Any, dict[str, Place]]:
    """Read a header, believing nothing.

    Args:
        text: What follows the length.
        size: Bytes of the file after the header.

    Returns:
        What the file is of (None if it does not say), and the places of its tensors.

    Raises:
        ValueError: It is no header, or one of another file.
    """
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("its header is no object")
    metadata = document.pop("__metadata__", {})
    about = metadata.get(METADATA_KEY, "null") if isinstance(metadata, dict) else "null"
    found: dict[str, Place] = {}
    for name, item in document.items():
        dtype = _TORCH_NAMES.get(str(item["dtype"]), str(item["dtype"]))
        shape, offsets = item["shape"], item["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)) or len(offsets) != 2:
            raise ValueError(f"the header says no sizes of {name!r}")
        place = Place(TensorSpec(dtype, tuple(shape)), *offsets)
        if dtype in DTYPES and _bytes(place.spec) != place.stop - place.first or not place.first <= place.stop <= size:
            raise ValueError(f"{name!r} lies outside the file, or is not as large as it should be")
        found[name] = place
    try:
        tag = json.loads(about)
    except (ValueError, TypeError, RecursionError):
        tag = about
    return tag, found


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
