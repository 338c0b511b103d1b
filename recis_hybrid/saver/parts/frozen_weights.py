"""Frozen parameters that a checkpoint leaves out, because they can be read again from the files that they came from.

A part's metadata names the files: ``{"files": [{"module": …, "source": …, "digest": …, "tensors": {name: [dtype,
shape]}}]}``, with names relative to the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.checkpointing import JSON, WeightFiles
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointMismatch, CorruptCheckpoint
from recis_hybrid.saver.format.manifest import TensorSpec
from recis_hybrid.saver.parts.module_names import without_wrappers

KEY = "files"
"""The entry of a part's metadata; absent if nothing is left out."""


def without_frozen(module: nn.Module, entries: dict[str, object]) -> list[JSON]:
    """Remove the parameters that are frozen and equal to those in the files that they came from.

    The values are compared, because a parameter may have been trained before it was frozen.

    Args:
        module: The module.
        entries: Its parameters and buffers by name without wrappers; modified.

    Returns:
        A description of the files and of the parameters that were removed.
    """
    described: list[JSON] = []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    named = zip(without_wrappers(module, list(parameters)), parameters.values(), strict=True)
    all_frozen = {name: parameter for name, parameter in named if not parameter.requires_grad and name in entries}
    for path, files in _files_of(module):
        prefix = f"{path}." if path else ""
        frozen = {
            name.removeprefix(prefix): parameter
            for name, parameter in all_frozen.items()
            if name.startswith(prefix) and name in entries
        }
        removed: dict[str, JSON] = {}
        try:
            for name, saved in files.read(frozen) if frozen else ():
                if _equal(saved, frozen[name]):
                    spec = TensorSpec.of(saved)
                    removed[name] = [spec.dtype, [*spec.shape]]
            digest = files.digest() if removed else ""
        except (OSError, ValueError):  # the files are gone, so the checkpoint must have everything
            continue
        for name in removed:
            del entries[prefix + name]
        if removed:
            described.append({"module": path, "source": files.source, "digest": digest, "tensors": removed})
    return described


def specs_in_files(where: str, meta: Mapping[str, JSON]) -> dict[str, TensorSpec]:
    """Return dtype and shape of the parameters that a checkpoint left out, by name without wrappers.

    Args:
        where: Checkpoint and part, for messages.
        meta: Metadata of the part.

    Raises:
        CorruptCheckpoint: The metadata is malformed.
    """
    return {name: spec for entry in _entries(where, meta) for name, spec in entry.specs.items()}


def read_frozen(where: str, meta: Mapping[str, JSON], module: nn.Module) -> dict[str, Tensor]:
    """Read the parameters that a checkpoint left out from the files of the live module.

    Args:
        where: Checkpoint and part, for messages.
        meta: Metadata of the part.
        module: The live module, which was built from the same files.

    Returns:
        The parameters by name without wrappers.

    Raises:
        CheckpointMismatch: The files are missing or have changed, or the module was built from others.
        CorruptCheckpoint: The metadata is malformed.
    """
    found: dict[str, Tensor] = {}
    for entry in _entries(where, meta):
        files = entry.files_in(module)
        for name, tensor in files.read([name.removeprefix(entry.prefix) for name in entry.specs]):
            if TensorSpec.of(tensor) == entry.specs[entry.prefix + name]:
                found[entry.prefix + name] = tensor
        if missing := [name for name in entry.specs if name not in found]:
            raise CheckpointMismatch(
                f"{where}: {files.source} must have {missing[0]!r} as {entry.specs[missing[0]]}, as it was saved. "
                f"Build the live module with the same options, such as its dtype. Nothing was loaded."
            )
    return found


class _Entry:
    """Parameters that a checkpoint left out, and the files that they came from.

    Args:
        where: Checkpoint and part, for messages.
        document: Their description.

    Raises:
        CorruptCheckpoint: The description is malformed.
    """

    def __init__(self, where: str, document: Any) -> None:
        self._where = where
        try:
            self.module, self.source, self.digest = (str(document[key]) for key in ("module", "source", "digest"))
            self.prefix = f"{self.module}." if self.module else ""
            self.specs = {
                f"{self.prefix}{name}": TensorSpec(str(dtype), tuple(map(int, shape)))
                for name, (dtype, shape) in document["tensors"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CorruptCheckpoint(
                f"{where}: meta.{KEY} must name modules, their files and tensors, got {document!r}. {OTHER_STEP}"
            ) from None

    def files_in(self, module: nn.Module) -> WeightFiles:
        """Return the files of the live module with the same contents; those of the same submodule are preferred.

        Raises:
            CheckpointMismatch: There are none.
        """
        need = (
            f"{self._where}: {len(self.specs)} frozen parameters, such as {next(iter(self.specs))!r}, are not in the "
            f"checkpoint but in the files of {self.source} (digest {self.digest})"
        )
        live = sorted(_files_of(module), key=lambda pair: pair[0] != self.module)
        if not live:
            raise CheckpointMismatch(
                f"{need}, and the live object was not read from files. Build it from these, as with hf_tower, or save "
                f"with Saver(save_frozen=True). Nothing was loaded."
            )
        faults = []
        for _, files in live:
            try:
                digest = files.digest()
            except (OSError, ValueError) as error:
                faults.append(f"{files.source} cannot be read ({error})")
                continue
            if digest == self.digest:
                return files
            faults.append(f"{files.source} has the digest {digest}")
        raise CheckpointMismatch(
            f"{need}, but {'; '.join(faults)}. Restore the files, or build the live object from them. Nothing was "
            f"loaded."
        )


def _entries(where: str, meta: Mapping[str, JSON]) -> list[_Entry]:
    documents = meta.get(KEY, [])
    if not isinstance(documents, list):
        raise CorruptCheckpoint(f"{where}: meta.{KEY} must be a list, got {documents!r}. {OTHER_STEP}")
    return [_Entry(where, document) for document in documents]


def _files_of(module: nn.Module) -> Iterator[tuple[str, WeightFiles]]:
    """Yield the submodules that were read from files, by path without wrappers."""
    found = {path: getattr(each, "weight_files", None) for path, each in module.named_modules()}
    named = {path: files for path, files in found.items() if isinstance(files, WeightFiles)}
    yield from zip(without_wrappers(module, list(named)), named.values(), strict=True)


def _equal(saved: Tensor, live: Tensor) -> bool:
    """Return whether tensors have the same dtype, shape and bits; NaN equals itself, and 0.0 differs from -0.0."""
    if saved.dtype != live.dtype or saved.shape != live.shape or live.layout != torch.strided or live.is_meta:
        return False
    a, b = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (saved.to(live.device), live))
    return torch.equal(a, b)
