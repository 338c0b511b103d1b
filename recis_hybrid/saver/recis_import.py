"""Makes a checkpoint of what RecIS (github.com/alibaba/RecIS) has saved.

Its folder holds safetensors files and `index`, JSON: `file_index` numbers the files, `block_index` says which has each
block. A block of a hash table is named `<table>.<slot>/part_<rank>_<ranks>`, the slot being `id`, `embedding` or one of
the optimizer's (`sparse_adamw_tf_exp_avg`); one of a dense tensor `<name>^ `, with a blank at the end. That is how its
release 1.1 writes.

Letters: n rows of a table, D dim.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.saver.compact import Target, publish
from recis_hybrid.saver.errors import CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.files import Location, is_safe_path
from recis_hybrid.saver.protocol import JSON, PartState, TableState
from recis_hybrid.saver.tensors import open_tensors

_BLOCK = re.compile(r"(?P<table>.+)\.(?P<slot>[^./]+)/part_(?P<part>\d+)_(?P<parts>\d+)", re.DOTALL)
_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum")
_MOST_BYTES = 2**30


@dataclass
class _Read:
    """What the files hold: blocks of tables by table, slot and rank, and dense tensors."""

    tables: dict[str, dict[str, dict[int, Tensor]]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)


def import_recis(source: Path, to: Target, step: int = 0, *, slots: Mapping[str, str] | None = None) -> Location:
    """Write a checkpoint of what RecIS has saved: its tables as the part `engine`, dense tensors as the part `model`.

    Optimizer state is named as torch.optim does where a slot's name ends so (`sparse_adamw_tf_exp_avg` becomes
    `exp_avg`); other slots are left out. Rows have no steps or frequencies of their own: all are 0. Ids come as they
    are written there: RecIS cuts those of coalesced tables to 52 bits. Pickled files (`extra.pt`) are never read.

    Args:
        source: the folder that RecIS wrote.
        to: the directory or URL that takes the checkpoint; made if it is not there.
        step: of the checkpoint.
        slots: names of slots there, and of optimizer state here; more than is found by name.

    Returns:
        Directory of the checkpoint. `Saver(to).load_some` takes tables and tensors from it, with `strict=False` where
        the optimizer differs.

    Raises:
        CorruptCheckpoint: a file is damaged or missing, blocks of ranks are missing, or an id comes twice.
        CheckpointError: there is no such folder, or the checkpoint is there already.
    """
    found = _read(source)
    names = {**{name: name for name in ("id", "embedding")}, **(slots or {})}
    tables = {name: _table(source, name, found, names) for name in sorted(found.tables)}
    meta: dict[str, JSON] = {"seed": 0, "steps": dict.fromkeys(tables, 0)}
    engine, model = PartState(tables=tables, meta=meta), PartState(tensors=found.dense, meta={"extra": {}})
    return publish(to, step, [("engine", "saveable", lambda: engine), ("model", "module", lambda: model)])


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


def _table(source: Path, name: str, found: _Read, names: Mapping[str, str]) -> TableState:
    """Put a table together: of each slot that is wanted the blocks of all ranks."""
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
    none = torch.zeros(ids.numel(), dtype=torch.int64)
    columns |= {"updated_step": none, "seen_step": none.clone(), "frequency": none.clone()}
    return TableState(columns, ops.id_map.bucket_of(ids), meta)


def _wanted(slots: Mapping[str, object], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Slots with the names of their columns: ids, embedding, then what is optimizer state."""
    yield from ((slot, slot) for slot in ("id", "embedding") if slot in slots)
    for slot in sorted(slots):
        state = names.get(slot) or next((s for s in _STATE if slot == s or slot.endswith(f"_{s}")), None)
        if state is not None and slot not in ("id", "embedding"):
            yield slot, state


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
