"""Converts checkpoints of RecIS (github.com/alibaba/RecIS).

A folder of RecIS 1.1 has safetensors files and ``index``, a JSON file: ``file_index`` numbers the files, and
``block_index`` maps each block to its file. Blocks of hash tables are named ``<table>.<slot>/part_<rank>_<ranks>``,
where the slot is ``id``, ``embedding`` or one of the optimizer's (``sparse_adamw_tf_exp_avg``). Blocks of dense tensors
are named ``<name>^ ``, with a trailing blank. The folder also has two pickles, which are never opened: ``model.pt``
with the towers and ``extra.pt`` with the dense optimizer.

Coalesced tables of RecIS keep the low 52 bits of an id; the other bits identify the table. The step of a sparse
optimizer is a dense tensor of the index (``sparse_adamw_tf_step``), one for all of its tables.

Letters: n rows of a table, D dim.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import JSON, PartState, TableState
from recis_hybrid.saver.actions.write import CapturedPart, Target, publish
from recis_hybrid.saver.errors import CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.file_io import is_safe_path
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.tensor_file import open_tensors

_BLOCK = re.compile(r"(?P<table>.+)\.(?P<slot>[^./]+)/part_(?P<part>\d+)_(?P<parts>\d+)", re.DOTALL)
_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum")
# State of a sparse optimizer for all of its tables: the number of steps, and the powers of its betas.
_COUNTER = re.compile(r"sparse_\w+_(step|beta1|beta2)")
_ID_BITS = 52
_PICKLE, _TOWERS = "model.pt", "model.safetensors"
_MOST_BYTES = 2**30


@dataclass
class _Contents:
    """Contents of the files: blocks of tables by table, slot and rank, and dense tensors."""

    tables: dict[str, dict[str, dict[int, Tensor]]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)


def import_recis(
    source: Path,
    to: Target,
    step: int = 0,
    *,
    slots: Mapping[str, str] | None = None,
    adam_step: int | None = None,
    tables_only: bool = False,
) -> Location:
    """Convert a checkpoint of RecIS: tables become the part ``engine``, towers the part ``model``.

    Optimizer state is named as in torch.optim if a slot's name ends that way (``sparse_adamw_tf_exp_avg`` becomes
    ``exp_avg``). Other slots are skipped. The step of the sparse optimizer becomes the step of the tables, from which
    an optimizer built over them continues. All rows count as looked up in that step.

    Towers are in ``model.pt``, a pickle. If you trust it, convert it to ``model.safetensors`` in the same folder, from
    which the towers are imported; the error message has the command. The dense optimizer (``extra.pt``) is not
    imported.

    Args:
        source: Folder that RecIS wrote.
        to: Directory or URL of the new checkpoint; created if missing.
        step: Step of the new checkpoint.
        slots: Names of optimizer states by slot of RecIS, in addition to those recognized by name.
        adam_step: Number of steps of the sparse optimizer; None uses the saved number.
        tables_only: Whether to skip towers.

    Returns:
        Directory of the checkpoint. ``Saver(to).load_some`` loads tables and tensors from it, with ``strict=False`` if
        the optimizer differs.

    Raises:
        CorruptCheckpoint: A file is damaged or missing, blocks of some ranks are missing, or an id is duplicated.
        CheckpointError: The folder does not exist, towers are only in a pickle, no table has a slot of ``slots``, or
            the checkpoint exists already.

    Warns:
        UserWarning: Ids of a table were truncated to 52 bits, so that features need ``Mod(2**52)`` after their hash;
            moments of Adam have no step; or slots were skipped.
    """
    if adam_step is not None and (type(adam_step) is not int or not 0 <= adam_step < 1 << 40):
        raise CheckpointError(f"import_recis: adam_step must be an integer from 0 to 2**40 - 1, got {adam_step!r}.")
    found = _read(source)
    if not tables_only:
        _read_towers(source, found)
    present = sorted({slot for table in found.tables.values() for slot in table})
    unknown = sorted(set(slots or {}) - set(present))
    if unknown:
        raise CheckpointError(f"{source}: slots: no table has {unknown}, the tables have {present}. Name one of these.")
    names = {**{name: name for name in ("id", "embedding")}, **(slots or {})}
    counters = {name: found.dense.pop(name) for name in list(found.dense) if _COUNTER.fullmatch(name)}
    done = adam_step if adam_step is not None else _steps(source, counters)
    tables = {name: _table(source, name, found, names, done or 0) for name in sorted(found.tables)}
    meta: dict[str, JSON] = {"seed": 0, "steps": dict.fromkeys(tables, done or 0)}
    engine, model = PartState(tables=tables, meta=meta), PartState(tensors=found.dense, meta={"extra": {}})
    parts = {"engine": CapturedPart("saveable", lambda: engine), "model": CapturedPart("module", lambda: model)}
    if tables_only:
        del parts["model"]
    place = publish(to, step, parts)
    used = {slot for slot, _ in _columns(present, names)}
    for note in _notes(tables, done, [slot for slot in present if slot not in used]):
        warnings.warn(note, stacklevel=2)
    return place


def _read_towers(source: Path, found: _Contents) -> None:
    """Read dense tensors from ``model.safetensors``.

    Raises:
        CheckpointError: They are only in the pickle.
    """
    if (source / _TOWERS).is_file():
        with open_tensors(source / _TOWERS, "RecIS") as opened:
            for name in opened.names():
                if name in found.dense:
                    raise CorruptCheckpoint(f"{source}: {name!r} is in the index and in {_TOWERS}. Take it out of one.")
                found.dense[name] = opened.read(name)
    elif (source / _PICKLE).is_file():
        code = (
            "import torch, safetensors.torch as s; "
            "d = torch.load('model.pt', map_location='cpu', weights_only=True); "
            "s.save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, 'model.safetensors')"
        )
        raise CheckpointError(
            f"{source / _PICKLE}: holds the towers as a pickle, which is never opened, because it can run code. If you "
            f'trust it, convert it with\n  cd {shlex.quote(str(source))} && python -c "{code}"\n'
            "and import again, or skip the towers with tables_only=True (--tables-only)."
        )


def _steps(source: Path, counters: Mapping[str, Tensor]) -> int | None:
    """Return the step of the sparse optimizers; None if unknown."""
    steps = {name: tensor for name, tensor in counters.items() if name.endswith("_step")}
    found: list[int] = []
    for name, tensor in steps.items():
        value = tensor.item() if tensor.numel() == 1 else None
        if value is None or value != int(value) or not 0 <= value < 1 << 40:
            raise CorruptCheckpoint(
                f"{source}: {name!r} must be one integer from 0 to 2**40 - 1, got {tensor.flatten()[:3].tolist()} of "
                f"shape {list(tensor.shape)}. Copy it again, or pass adam_step."
            )
        found.append(int(value))
    return max(found, default=None)


def _notes(tables: Mapping[str, TableState], done: int | None, skipped: list[str]) -> Iterator[str]:
    """Yield warnings for the user of the checkpoint."""
    hashed: list[str] = []
    narrow: list[str] = []
    for name, table in tables.items():
        ids = table.columns["ids"]
        if ids.numel() and int(ids.min()) >= 0 and int(ids.max()) < 1 << _ID_BITS:
            (hashed if int(ids.max()) >= 1 << 32 else narrow).append(name)
    if hashed:
        yield (
            f"import_recis: the ids of the tables {hashed} fit in 52 bits: RecIS keeps id & (2**52 - 1) in coalesced "
            "tables. Features must do the same, or their ids are not in the tables: put Mod(2**52) last, after the "
            "hash, as in ops=[Hash('farm'), Mod(2**52)]."
        )
    if narrow and hashed:
        yield (
            f"import_recis: the ids of the tables {narrow} are below 2**32. If features produce ids below 0 or "
            "from 2**52 on, put Mod(2**52) there, too."
        )
    moments = [name for name, table in tables.items() if "exp_avg" in table.columns]
    if moments and done is None:
        yield (
            f"import_recis: the tables {moments} have moments of Adam, but their number of steps is not saved: bias "
            "correction starts at step 0, as if they were new. Pass the steps as adam_step (--adam-step)."
        )
    if skipped:
        yield f"import_recis: slots {skipped} are skipped. Name those that are optimizer state with `slots`."


def _read(source: Path) -> _Contents:
    found = _Contents()
    for file, names in _index(source).items():
        with open_tensors(file, "RecIS") as opened:
            stored = {_stripped(name): name for name in opened.names()}
            for name in sorted(names):
                if _stripped(name) not in stored:
                    raise CorruptCheckpoint(f"{file}: must hold the block {name!r}, as the index says. Copy it again.")
                _collect(source, _stripped(name), opened.read(stored[_stripped(name)]), found)
    return found


def _stripped(name: str) -> str:
    return name.rstrip(" ")


def _collect(source: Path, name: str, tensor: Tensor, found: _Contents) -> None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        found.dense[name.removesuffix("^")] = tensor
        return
    table, rank, ranks = match["table"], int(match["part"]), int(match["parts"])
    if found.ranks.setdefault(table, ranks) != ranks:
        raise CorruptCheckpoint(f"{source}: table {table!r} has blocks of {found.ranks[table]} and of {ranks} ranks.")
    found.tables.setdefault(table, {}).setdefault(match["slot"], {})[rank] = tensor


def _index(source: Path) -> dict[Path, list[str]]:
    path = source / "index"
    if not path.is_file():
        raise CheckpointError(f"{source}: holds no file 'index'. Name the folder that RecIS saved to.")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        index: dict[str, Any] = json.loads(path.read_bytes())
        files: dict[int, Path] = {}
        for name, number in index["file_index"].items():
            if not is_safe_path(name):
                raise ValueError(f"it leads to {name!r}")
            if not (source / name).is_file():
                raise ValueError(f"{name} is missing")
            files[number] = source / name
        found: dict[Path, list[str]] = {}
        for block, number in index["block_index"].items():
            found.setdefault(files[number], []).append(block)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{path}: must be JSON whose file_index and block_index name the file of each block, but {error!r}. Copy "
            "the folder again."
        ) from error
    return found


def _table(source: Path, name: str, found: _Contents, names: Mapping[str, str], done: int) -> TableState:
    """Assemble a table from the slots of all ranks. Its rows count as seen in step ``done``."""
    where, ranks = f"{source}: table {name!r}", found.ranks[name]
    columns: dict[str, Tensor] = {}
    for slot, state in _columns(found.tables[name], names):
        blocks = found.tables[name][slot]
        if sorted(blocks) != list(range(ranks)):
            raise CorruptCheckpoint(f"{where}, slot {slot!r}: must have blocks of {ranks} ranks, has {sorted(blocks)}.")
        try:
            column = torch.cat([blocks[rank] for rank in range(ranks)])
        except (RuntimeError, TypeError) as error:
            raise CorruptCheckpoint(f"{where}, slot {slot!r}: blocks cannot be concatenated: {error}.") from error
        columns["ids" if slot == "id" else state] = column if slot == "id" else column.reshape(column.size(0), -1)
    ids = columns.get("ids")
    if ids is None or "embedding" not in columns or ids.dtype != torch.int64 or ids.dim() != 1:
        raise CorruptCheckpoint(
            f"{where}: must have slots 'id', int64 [n], and 'embedding', has {list(found.tables[name])}."
        )
    if any(column.size(0) != ids.numel() for column in columns.values()):
        sizes = {column: values.size(0) for column, values in columns.items()}
        raise CorruptCheckpoint(f"{where}: slots must have as many rows as there are ids, have {sizes}.")
    embedding = columns["embedding"]
    state_meta: list[JSON] = [[column, values.size(1), _dtype(values)] for column, values in list(columns.items())[2:]]
    meta: dict[str, JSON] = {"dim": embedding.size(1), "dtype": _dtype(embedding), "optimizer_state": state_meta}
    seen = torch.full((ids.numel(),), done, dtype=torch.int64)
    columns |= {"updated_step": seen, "seen_step": seen.clone(), "frequency": torch.zeros_like(seen)}
    return TableState(columns, ops.id_map.bucket_of(ids), meta)


def _columns(slots: Collection[str], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield slots and the names of their columns: ids, embedding, then optimizer state."""
    yield from ((slot, slot) for slot in ("id", "embedding") if slot in slots)
    for slot in sorted(slots):
        state = names.get(slot) or next((s for s in _STATE if slot == s or slot.endswith(f"_{s}")), None)
        if state is not None and slot not in ("id", "embedding"):
            yield slot, state


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
