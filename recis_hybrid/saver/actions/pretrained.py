"""Loads safetensors files in the layout of the Hugging Face Hub into torch modules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from recis_hybrid.saver.actions.load_partial import live_tensors, prepare_tensors
from recis_hybrid.saver.actions.selection import Loaded, Selection
from recis_hybrid.saver.errors import CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.file_io import is_safe_path
from recis_hybrid.saver.format.tensor_file import open_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_BYTES = 2**30


@torch.inference_mode(False)
def load_pretrained(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Loaded:
    """Load tensors into a module's parameters and buffers of the same names.

    All tensors are read and compared before anything is changed. Values are converted to the module's dtypes.

    Args:
        module: Module to load into, such as a tower.
        path: A safetensors file, or a folder with ``model.safetensors`` or with ``model.safetensors.index.json`` and
            the files that it names.
        only: Patterns (``*``, ``?``, ``[...]``) of the names to load; None for all.
        exclude: Patterns of names to skip.
        rename: Maps names in the files to names in the module, with ``*``: ``{"bert.*": "encoder.*"}``.
        strict: Whether every selected name must exist on both sides with the same shape.

    Returns:
        Names that were loaded, and those that were not.

    Raises:
        CorruptCheckpoint: A file is damaged or missing, or the index is invalid.
        CheckpointMismatch: Strict, and something selected does not fit.
        CheckpointError: The file does not exist, or a pattern matches no name.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> tensors = {"old.weight": torch.ones(1, 2), "old.bias": torch.zeros(1), "head.bias": torch.zeros(9)}
        >>> save_file(tensors, f"{folder}/model.safetensors")
        >>> load_pretrained(torch.nn.Linear(2, 1), folder, exclude="head.*", rename={"old.*": "*"}).loaded
        ['bias', 'weight']
    """
    selection, root = Selection(only, exclude, rename), Path(path)
    tensors: dict[str, Tensor] = {}
    saved: list[str] = []
    for file, names in _files(root).items():
        with open_tensors(file, "pretrained") as opened:
            found = opened.names()
            if names is not None and not names <= set(found):
                missing = sorted(names - set(found))
                raise CorruptCheckpoint(f"{file}: must hold {missing}, as the index says. Get it again.")
            listed = found if names is None else sorted(names)
            saved += listed
            for name in listed:
                if selection.live_names([name]):
                    tensors[name] = opened.read(name)
    selection.refuse_unmatched(str(root), saved, live_tensors(module))
    result = Loaded(None)
    copy = prepare_tensors("", module, tensors, selection, result)
    if strict:
        result.refuse(str(root))
    copy()
    return result


def _files(path: Path) -> dict[Path, set[str] | None]:
    """Return the names to read from each file; None for all."""
    if path.is_file():
        return {path: None}
    if (path / INDEX).is_file():
        return _indexed(path)
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    raise CheckpointError(f"{path}: must be a safetensors file, or a folder with {SINGLE} or {INDEX}. Name one.")


def _indexed(path: Path) -> dict[Path, set[str] | None]:
    try:
        if (path / INDEX).stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        weights = json.loads((path / INDEX).read_bytes())["weight_map"]
        found: dict[Path, set[str] | None] = {}
        for name, file in weights.items():
            if not is_safe_path(file):
                raise ValueError(f"it leads to {file!r}")
            if not (path / file).is_file():
                raise ValueError(f"{file} is missing")
            names = found.setdefault(path / file, set())
            assert names is not None
            names.add(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{path / INDEX}: weight_map must name the file beside it for each tensor, but {error}. Get it again."
        ) from error
    return found
