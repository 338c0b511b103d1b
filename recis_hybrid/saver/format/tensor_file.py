"""Writes safetensors files, with a tag in the header that identifies them, and reads those of complete tensors."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import JSON
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.checksums import CHUNK_BYTES, chunk_sums, page_sums
from recis_hybrid.saver.format.file_io import check_size, open_file, read_chunk
from recis_hybrid.saver.format.header import (
    DTYPES as DTYPES,
    LONGEST_HEADER,
    Place,
    buffer,
    data_bytes,
    header,
    parse_header,
    places,
    views,
)
from recis_hybrid.saver.format.location import Location, RemotePath
from recis_hybrid.saver.format.manifest import FORMAT_VERSION, TensorSpec


def part_tag(part: str) -> dict[str, JSON]:
    """Return the header entry that identifies a dense file."""
    return {"part": part}


def check_tensor(where: str, name: str, tensor: object) -> None:
    """Check that a tensor can be saved.

    Args:
        where: Owner of the tensor, for the message.
        name: Name of the tensor.
        tensor: The tensor.

    Raises:
        CheckpointError: The value is not a dense tensor, or safetensors does not support its name or dtype.
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
            "Make it dense, or initialize it, before saving."
        )
    if DTYPES.get(TensorSpec.of(tensor).dtype) != tensor.dtype:
        raise CheckpointError(
            f"{where}: tensor {name!r} must have a dtype of {sorted(DTYPES)}, got {tensor.dtype}. Convert it."
        )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in the order of its elements; copied unless contiguous on the CPU."""
    # Resolve lazy conjugation and negation, because files hold raw memory.
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return buffer(plain.view(-1).view(torch.uint8))


@dataclass(frozen=True)
class WrittenFile:
    """A file that has been written, but perhaps not synced."""

    size: int
    """Bytes."""
    crc32: tuple[str, ...]
    """CRC-32 of each chunk of 4 MiB, 8 hexadecimal digits each."""
    sync: Callable[[], None]
    """Syncs the file to disk. Call once, in any thread."""


def write_tensors(path: Location, tensors: Mapping[str, Tensor], tag: Mapping[str, JSON]) -> WrittenFile:
    """Write tensors to a new file, one after the other.

    Args:
        path: Path of the file.
        tensors: Tensors by name.
        tag: Identifies the file; the format version is prepended.

    Returns:
        The file, which may not be on the disk yet.
    """
    found = places({name: TensorSpec.of(tensor) for name, tensor in tensors.items()})
    sums = ChunkSums()
    head = memoryview(header(found, tag))
    sync = write_file(path, sums.add(chain([head], (tensor_bytes(tensors[name]) for name in found))))
    return WrittenFile(sums.size, sums.sums, sync)


def write_assembled(
    path: Location,
    specs: Mapping[str, TensorSpec],
    tag: Mapping[str, JSON],
    assemble: Callable[[dict[str, Tensor]], None],
) -> WrittenFile:
    """Assemble tensors in memory and write them to a new file, which can be read in parts.

    The memory is reused for the next file, and checksums need only one pass over its bytes. The header contains those
    of the pages.

    Args:
        path: Path of the file.
        specs: Dtype and shape of each tensor, by name.
        tag: Identifies the file; the format version is prepended.
        assemble: Called once to write the tensors.

    Returns:
        The file, which may not be on the disk yet.
    """
    found = places(specs)
    data = ops.memory.empty_bytes(data_bytes(found), torch.device("cpu"))
    assemble(views(data, found))
    pages = page_sums(data)
    head = header(found, tag, pages)
    size = len(head) + data.numel()
    sync = write_file(path, [memoryview(head), buffer(data)])
    return WrittenFile(size, chunk_sums(head, pages, size), sync)


def write_file(path: Location, pieces: Iterable[memoryview]) -> Callable[[], None]:
    """Write a new file.

    Args:
        path: Path of the file.
        pieces: Contents of the file.

    Returns:
        A function that syncs the file to disk. Call it once, in any thread.
    """
    if isinstance(path, RemotePath):
        with path.open("wb") as remote:
            for piece in pieces:
                remote.write(piece)
        return lambda: None
    file = open(path, "xb", buffering=0)  # noqa: SIM115
    try:
        for piece in pieces:
            while piece:
                piece = piece[file.write(piece) or 0 :]
    except BaseException:
        file.close()
        raise

    def sync() -> None:
        with file:
            os.fsync(file.fileno())

    return sync


class ChunkSums:
    """CRC-32 of each chunk of 4 MiB of a stream of bytes, as 8 hexadecimal digits.

    The last chunk may be shorter.
    """

    def __init__(self) -> None:
        self.size = 0
        """Bytes so far."""
        self._whole: list[int] = []
        self._open = 0

    def add(self, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """Yield pieces, split at the ends of chunks, and update the checksums."""
        for piece in pieces:
            while piece:
                part = piece[: CHUNK_BYTES - self.size % CHUNK_BYTES]
                self._open = zlib.crc32(part, self._open)
                self.size += len(part)
                if self.size % CHUNK_BYTES == 0:
                    self._whole.append(self._open)
                    self._open = 0
                yield part
                piece = piece[len(part) :]

    @property
    def sums(self) -> tuple[str, ...]:
        """Checksums of all chunks so far."""
        rest = [self._open] if self.size % CHUNK_BYTES else []
        return tuple(f"{each:08x}" for each in self._whole + rest)


def read_tensors(
    path: Location, where: str, size: int, sums: tuple[str, ...], specs: dict[str, TensorSpec], tag: dict[str, JSON]
) -> dict[str, Tensor]:
    """Read a file in one pass; each chunk is verified before its contents are used.

    Args:
        path: Path of the file.
        where: Part of the file, for messages.
        size: Bytes of the file, from the manifest.
        sums: CRC-32 of each chunk.
        specs: Dtype and shape of every expected tensor.
        tag: Expected tag.

    Returns:
        New tensors on the CPU by name, starting at multiples of 64 bytes.

    Raises:
        CorruptCheckpoint: A checksum differs, or the file does not hold the expected tensors.
    """
    tensors: dict[str, Tensor] = {}
    left: list[tuple[Place, Tensor]] = []
    head, at = b"", 0
    with open_file(path) as file:
        check_size(path, where, size, file)
        chunk = torch.empty(min(CHUNK_BYTES, size), dtype=torch.uint8)
        for number, expected in enumerate(sums):
            data = chunk[: min(CHUNK_BYTES, size - number * CHUNK_BYTES)]
            read_chunk(file, path, where, number, expected, data)
            if not tensors and not left:
                head += data.numpy().tobytes()
                length = int.from_bytes(head[:8], "little") + 8
                if length > len(head) and length <= min(size, LONGEST_HEADER):
                    continue
                found = _header(path, where, head, length, size)
                check_contents(path, where, found[0], {n: place.spec for n, place in found[1].items()}, tag, specs)
                tensors = {name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype]) for name, spec in specs.items()}
                flat = {name: tensor.view(-1).view(torch.uint8) for name, tensor in tensors.items()}
                left = sorted(((place, flat[name]) for name, place in found[1].items()), key=lambda item: item[0].first)
                data = torch.frombuffer(bytearray(head[length:]), dtype=torch.uint8) if head[length:] else data[:0]
            end = at + data.numel()
            for place, target in left:
                first, stop = max(place.first, at), min(place.stop, end)
                if first < stop:
                    target[first - place.first : stop - place.first] = data[first - at : stop - at]
            left = [item for item in left if item[0].stop > end] or left[-1:]
            at = end
    return tensors


def _header(path: object, where: str, head: bytes, length: int, size: int) -> tuple[Any, dict[str, Place]]:
    try:
        if not 8 < length <= len(head):
            raise ValueError("its header is longer than the file")
        return parse_header(head[8:length], size - length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} ({where}): must be a safetensors file, but {error}. {OTHER_STEP}") from error


class TensorFile:
    """A safetensors file open for reading."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def names(self) -> list[str]:
        """Return the names of all tensors, in order."""
        return sorted(self._handle.keys())

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory.

        The library's tensors are views of the mapped file, 24 bytes past a multiple of 64: no framework could adopt
        them without a copy, and they would change with the file.

        Args:
            name: Name of the tensor.

        Returns:
            A new tensor on the CPU, starting at a multiple of 64 bytes.
        """
        mapped = self._handle.get_tensor(name)
        return torch.empty_like(mapped).copy_(mapped)


def check_contents(
    path: object,
    where: str,
    found_tag: Any,
    found: dict[str, TensorSpec],
    tag: dict[str, JSON],
    specs: dict[str, TensorSpec],
) -> None:
    """Compare the contents of a file with the expected ones.

    Args:
        path: Path of the file.
        where: Part and table of the file, for the message.
        found_tag: Tag of the file.
        found: Dtype and shape of its tensors.
        tag: Expected tag.
        specs: Dtype and shape of every expected tensor.

    Raises:
        CorruptCheckpoint: They differ.
    """
    expected_tag = {"format_version": FORMAT_VERSION, **tag}
    if isinstance(found_tag, dict) and "pages" in found_tag:
        found_tag = {key: value for key, value in found_tag.items() if key != "pages"}
    if found_tag != expected_tag:
        rule = f"its metadata must be {expected_tag}, is {found_tag}"
    elif found != specs:
        rule = f"must hold {_listed(specs)}, holds {_listed(found)}"
    else:
        return
    raise CorruptCheckpoint(f"{path} ({where}): {rule}. {OTHER_STEP}")


@contextmanager
def open_tensors(path: Path, where: str) -> Iterator[TensorFile]:
    """Open a file for reading.

    Args:
        path: Path of the file.
        where: Origin of the file, for messages.

    Yields:
        The open file.

    Raises:
        CorruptCheckpoint: The file is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            yield TensorFile(handle)
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path} ({where}): must be a safetensors file, but {error}. {OTHER_STEP}") from error


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(specs: dict[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec}" for name, spec in sorted(specs.items()))
