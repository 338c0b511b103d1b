"""Makes a checkpoint of what RecIS (github.com/alibaba/RecIS) has saved.

Its folder holds safetensors files and ``index``, JSON: ``file_index`` numbers the files, ``block_index`` says which has
each block. A block of a hash table is named ``<table>.<slot>/part_<rank>_<ranks>``, the slot being ``id``,
``embedding`` or one of the optimizer's (``sparse_adamw_tf_exp_avg``); one of a dense tensor ``<name>^ ``, with a blank
at the end. That is how its release 1.1 writes. Beside them lie two pickles, which are never opened: ``model.pt`` holds
the towers, ``extra.pt`` the dense optimizer.

Coalesced tables of RecIS keep the low 52 bits of an id, the others of the 64 bits say which table it is of. The steps
of a sparse optimizer are a dense tensor of the index (``sparse_adamw_tf_step``), one for all of its tables.

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
# What a sparse optimizer keeps for all of its tables: the steps done, and the products of its betas over them.
_COUNTER = re.compile(r"sparse_\w+_(step|beta1|beta2)")
_ID_BITS = 52
_PICKLE, _TOWERS = "model.pt", "model.safetensors"
_MOST_BYTES = 2**30


@dataclass
class _Read:
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

    Optimizer state is named as torch.optim does where a slot's name ends so (``sparse_adamw_tf_exp_avg`` becomes
    ``exp_avg``); other slots are left out. The steps that the sparse optimizer has done become the steps of the tables,
    from which an optimizer that is built over them counts on, and rows count as met in the last of them.

    Towers are in ``model.pt``, a pickle. Convert it, where it is trusted, to ``model.safetensors`` in the same folder,
    from which they are taken; the error that asks for it has the command. The dense optimizer (``extra.pt``) is left
    out.

    Args:
        source: The folder that RecIS wrote.
        to: The directory or URL that takes the checkpoint; made if it is not there.
        step: Of the checkpoint.
        slots: Names of slots there, and of optimizer state here; more than is found by name.
        adam_step: Steps that the sparse optimizer has done; None for those that are saved.
        tables_only: Whether to leave towers out.

    Returns:
        Directory of the checkpoint. ``Saver(to).load_some`` takes tables and tensors from it, with ``strict=False``
        where the optimizer differs.

    Raises:
        CorruptCheckpoint: A file is damaged or missing, blocks of ranks are missing, or an id comes twice.
        CheckpointError: There is no such folder, towers are in a pickle alone, no table has a slot of ``slots``, or the
            checkpoint is there already.

    Warns:
        UserWarning: Ids of a table were cut to 52 bits, so that features need ``Mod(2**52)`` behind their hash; moments
            of Adam come without the steps that they are of; slots are left out.
    """
    if adam_step is not None and (type(adam_step) is not int or not 0 <= adam_step < 1 << 40):
        raise CheckpointError(f"import_recis: adam_step must be an integer from 0 to 2**40 - 1, got {adam_step!r}.")
    found = _read(source)
    if not tables_only:
        _read_towers(source, found)
    there = sorted({slot for table in found.tables.values() for slot in table})
    unknown = sorted(set(slots or {}) - set(there))
    if unknown:
        raise CheckpointError(f"{source}: slots: no table has {unknown}, the tables have {there}. Name one of these.")
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
    for note in _notes(tables, done, [slot for slot in there if not any(s == slot for s, _ in _wanted(there, names))]):
        warnings.warn(note, stacklevel=2)
    return place


def _read_towers(source: Path, found: _Read) -> None:
    """Import dense tensors from ``model.safetensors``.

    Raises:
        CheckpointError: They are in the pickle alone.
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
            f"{source / _PICKLE}: holds the towers as a pickle, which is never opened here, since it can run code. If "
            f'you trust it, convert it by\n  cd {shlex.quote(str(source))} && python -c "{code}"\n'
            "and import again; or leave the towers out with tables_only=True (--tables-only)."
        )


def _steps(source: Path, counters: Mapping[str, Tensor]) -> int | None:
    """Step of the sparse optimizers; None if unknown."""
    steps = {name: tensor for name, tensor in counters.items() if name.endswith("_step")}
    found: list[int] = []
    for name, tensor in steps.items():
        value = tensor.item() if tensor.numel() == 1 else None
        if value is None or value != int(value) or not 0 <= value < 1 << 40:
            raise CorruptCheckpoint(
                f"{source}: {name!r} must be one integer from 0 to 2**40 - 1, is {tensor.flatten()[:3].tolist()} of "
                f"shape {list(tensor.shape)}. Copy it again, or give the steps by adam_step."
            )
        found.append(int(value))
    return max(found, default=None)


def _notes(tables: Mapping[str, TableState], done: int | None, left_out: list[str]) -> Iterator[str]:
    """Note for users of the checkpoint, one text each."""
    hashed: list[str] = []
    narrow: list[str] = []
    for name, table in tables.items():
        ids = table.columns["ids"]
        if ids.numel() and int(ids.min()) >= 0 and int(ids.max()) < 1 << _ID_BITS:
            (hashed if int(ids.max()) >= 1 << 32 else narrow).append(name)
    if hashed:
        yield (
            f"import_recis: the ids of the tables {hashed} lie within 52 bits: RecIS keeps id & (2**52 - 1) of "
            "coalesced tables. Features that read them must do the same, or no id is met again: put Mod(2**52) last, "
            "behind the hash, as in ops=[Hash('farm'), Mod(2**52)]."
        )
    if narrow and hashed:
        yield (
            f"import_recis: the ids of the tables {narrow} are below 2**32. If features give them ids below 0 or from "
            "2**52 on, put Mod(2**52) there, too."
        )
    moments = [name for name, table in tables.items() if "exp_avg" in table.columns]
    if moments and done is None:
        yield (
            f"import_recis: the tables {moments} have moments of Adam, and the steps that they are of are not saved: "
            "its bias correction starts at step 0, as if they were new. Give the steps by adam_step (--adam-step)."
        )
    if left_out:
        yield f"import_recis: slots {left_out} are left out; `slots` names those that are optimizer state."


def _read(source: Path) -> _Read:
    found = _Read()
    for file, names in _index(source).items():
        with open_tensors(file, "RecIS") as opened:
            held = {_plain(name): name for name in opened.names()}
            for name in sorted(names):
                if _plain(name) not in held:
                    raise CorruptCheckpoint(f"{file}: must hold the block {name!r} by the index. Copy it again.")
                _sort(source, _plain(name), opened.read(held[_plain(name)]), found)
    return found


def _plain(name: str) -> str:
    return name.rstrip(" ")


def _sort(source: Path, name: str, tensor: Tensor, found: _Read) -> None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        found.dense[name.removesuffix("^")] = tensor
        return
    table, rank, ranks = match["table"], int(match["part"]), int(match["parts"])
    if found.ranks.setdefault(table, ranks) != ranks:
        raise CorruptCheckpoint(f"{source}: table {table!r} is in blocks of {found.ranks[table]} and of {ranks} ranks.")
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
            f"{path}: must be JSON that says by file_index and block_index which file has each block, but {error!r}. "
            "Copy the folder again."
        ) from error
    return found


def _table(source: Path, name: str, found: _Read, names: Mapping[str, str], done: int) -> TableState:
    """Assemble a table from the slots of all ranks. Its rows count as seen in step ``done``."""
    where, ranks = f"{source}: table {name!r}", found.ranks[name]
    columns: dict[str, Tensor] = {}
    for slot, state in _wanted(found.tables[name], names):
        blocks = found.tables[name][slot]
        if sorted(blocks) != list(range(ranks)):
            raise CorruptCheckpoint(f"{where}, slot {slot!r}: must have blocks of {ranks} ranks, has {sorted(blocks)}.")
        try:
            column = torch.cat([blocks[rank] for rank in range(ranks)])
        except (RuntimeError, TypeError) as error:
            raise CorruptCheckpoint(f"{where}, slot {slot!r}: blocks do not go together: {error}.") from error
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
    met = torch.full((ids.numel(),), done, dtype=torch.int64)
    columns |= {"updated_step": met, "seen_step": met.clone(), "frequency": torch.zeros_like(met)}
    return TableState(columns, ops.id_map.bucket_of(ids), meta)


def _wanted(slots: Collection[str], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Slots with the names of their columns: ids, embedding, then what is optimizer state."""
    yield from ((slot, slot) for slot in ("id", "embedding") if slot in slots)
    for slot in sorted(slots):
        state = names.get(slot) or next((s for s in _STATE if slot == s or slot.endswith(f"_{s}")), None)
        if state is not None and slot not in ("id", "embedding"):
            yield slot, state


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
