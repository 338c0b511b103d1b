"""Files of exports: manifests with a CRC-32, and memory-mapped safetensors files."""

from __future__ import annotations

import json
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import ServingError

_FORMAT, _VERSION, _BUCKETS = "recis_hybrid.checkpoint", 1, 65536
_SEAL = re.compile(rb'(.*),\n "crc32": "([0-9a-f]{8})"\n}\n', re.DOTALL)
_STEP = re.compile(r"step_(\d{6,18})")
_PATH = re.compile(r"[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]*(?:/[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]*)*")
_MOST_HEADER, _MOST_MANIFEST = 100_000_000, 2**30
_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "|b1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1"},
}

Array = npt.NDArray[Any]


class Tensor(NamedTuple):
    """A tensor of a mapped file."""

    values: Array
    bfloat16: bool
    """True if the values are bfloat16, stored as unsigned words."""


def step_folder(text: str) -> Path:
    """Return the folder of an export: the given one, or the one of the highest step in it."""
    if "://" in text:
        raise ServingError(f"{text}: must be a directory, because files are memory-mapped. Copy the export to one.")
    path = Path(text)
    if not path.is_dir():
        raise ServingError(f"{path} is not a directory. Pass the output of `recis-hybrid export`.")
    if (path / "manifest.json").is_file():
        return path
    found = [(int(match[1]), entry) for entry in path.iterdir() if (match := _STEP.fullmatch(entry.name))]
    complete = [(step, entry) for step, entry in found if (entry / "manifest.json").is_file()]
    if not complete:
        raise ServingError(f"{path} holds no complete checkpoint. Pass the output of `recis-hybrid export`.")
    return max(complete)[1]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest after checking its CRC-32 and the paths in it."""
    if path.stat().st_size > _MOST_MANIFEST:
        raise ServingError(f"{path}: must have at most {_MOST_MANIFEST} bytes, has {path.stat().st_size}.")
    document = parse_manifest(path, path.read_bytes())
    if "previous" in document:
        raise ServingError(
            f"{path}: contains only the changes since step {document['previous']['step']}. Export it with "
            "`recis-hybrid export`, make it full with `recis-hybrid compact`, or read updates of a bundle with "
            "`recis_hybrid.serving.Follower`."
        )
    return document


def parse_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    """Return the manifest of a checkpoint, incremental or not, after checking its CRC-32 and the paths in it.

    Args:
        path: The file, for messages.
        raw: Its contents.

    Raises:
        ServingError: The manifest is damaged, or of another format version.
    """
    match = _SEAL.fullmatch(raw)
    if match is None or int(match[2], 16) != zlib.crc32(match[1]):
        raise ServingError(f"{path}: is damaged: the CRC-32 at its end does not match its text. Export it again.")
    try:
        document: dict[str, Any] = json.loads(raw)
        if document["format"] != _FORMAT or document["format_version"] != _VERSION:
            found = (document["format"], document["format_version"])
            raise ServingError(f"{path}: format must be {_FORMAT!r}, version {_VERSION}, got {found}. Export it again.")
        if document["buckets"] != _BUCKETS:
            raise ServingError(f"{path}: must have {_BUCKETS} buckets, got {document['buckets']}.")
        for file in files_of(document):
            if not _PATH.fullmatch(file["path"]):
                raise ServingError(f"{path}: a path must lead to a file in this folder, got {file['path']!r}.")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ServingError(f"{path}: is not a manifest: {error!r}. Export it again.") from error
    return document


def files_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the entries of all files in a manifest, those of removed ids included."""
    for part in document["parts"].values():
        if part["file"] is not None:
            yield part["file"]
        for table in part["tables"].values():
            removed = table.get("removed") or {"ranges": []}
            yield from (item["file"] for item in (*table["ranges"], *removed["ranges"]))


def map_tensors(root: Path, file: dict[str, Any]) -> dict[str, Tensor]:
    """Map a safetensors file and return views of its tensors."""
    path = root / file["path"]
    try:
        with open(path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file["size"]:
                raise ServingError(f"{path}: must have {file['size']} bytes according to the manifest, has {size}.")
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(data[:8], "little")
        if not 0 < length <= min(_MOST_HEADER, size - 8):
            raise ServingError(f"{path}: its header cannot have {length} bytes.")
        header = json.loads(data[8 : 8 + length])
        begin = 8 + length
        tensors: dict[str, Tensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            count = 1
            for extent in shape:
                count *= extent
            if (
                not 0 <= first <= last <= size - begin
                or count * dtype.itemsize != last - first
                or min(shape, default=0) < 0
            ):
                raise ServingError(f"{path}: tensor {name!r} of shape {list(shape)} cannot be at {first} to {last}.")
            values = np.frombuffer(data, dtype, count, begin + first).reshape(shape)
            tensors[name] = Tensor(values, entry["dtype"] == "BF16")
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ServingError):
            raise
        raise ServingError(f"{path}: cannot be read: {error!r}. Export it again.") from error
    return tensors


def verify_file(root: Path, file: dict[str, Any]) -> None:
    """Raise ServingError if the checksums of a file differ from those in the manifest."""
    chunk = 4 * 2**20
    with open(root / file["path"], "rb") as opened:
        sums = [f"{zlib.crc32(part):08x}" for part in iter(lambda: opened.read(chunk), b"")]
    if sums != file["crc32"]:
        raise ServingError(f"{root / file['path']}: has changed since it was written: the checksums differ.")


def widened(values: Array, bfloat16: bool) -> Array:
    """Return values as stored, except bfloat16, which becomes float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if bfloat16 else values
