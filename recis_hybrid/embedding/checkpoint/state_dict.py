"""Tables in a model's ``state_dict``: their rows on request, otherwise a placeholder key.

Keys of an engine ``engine``: ``engine.tables``, int64 ``[4]``, has the tables' steps, this process's rows, and the seed
of first values in two words. With rows there are also, for each member table ``user``, ``engine.tables.user.ids``,
``engine.tables.user.embedding``, the other columns of :meth:`HashTable.export`, ``engine.tables.user.step``, and the
state of admission as ``engine.tables.user.admission.ids`` and ``.count``.

Letters: n rows, R rows of all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.embedding.checkpoint.load import TablesLoader
from recis_hybrid.embedding.distributed.exchange import Exchange
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.record_layout import META

RowsInStateDict: TypeAlias = Literal["embedding", "record"]

_KEY = "tables"
_SEED_BITS = 62
_REMEDY = (
    "load them with Saver before the state_dict, build the engine with rows_in_state_dict='record' before it is saved, "
    "or load only the rest with strict=False"
)


def refuse_rows_in_state_dict(value: object) -> None:
    """Raise ValueError unless a value is valid for ``rows_in_state_dict``."""
    if value is not None and value not in get_args(RowsInStateDict):
        raise ValueError(
            f"EmbeddingEngine: rows_in_state_dict must be one of {[None, *get_args(RowsInStateDict)]}, got {value!r}"
        )


def belongs_to_tables(key: str, prefix: str) -> bool:
    """Return whether a key of a state_dict belongs to the tables of the engine with this prefix."""
    return key == f"{prefix}{_KEY}" or key.startswith((f"{prefix}{_KEY}.", f"{prefix}anchor"))


def warn_of_rows_left_out() -> None:
    """Warn that a state_dict has no rows."""
    warnings.warn(
        "EmbeddingEngine: the rows of embedding tables are not in the state_dict; save them with "
        "recis_hybrid.saver.Saver, or build the engine with rows_in_state_dict='embedding' or 'record'",
        stacklevel=2,
    )


def save_key(tables: Sequence[HashTable], destination: MutableMapping[str, Any], prefix: str) -> None:
    """Write the placeholder key of tables.

    Args:
        tables: This rank's tables.
        destination: The state_dict; written.
        prefix: Prefix of the engine's keys.
    """
    seed = tables[0].store.seed
    words = [_step(tables), _rows(tables), seed >> _SEED_BITS, seed & ((1 << _SEED_BITS) - 1)]
    destination[f"{prefix}{_KEY}"] = torch.tensor(words, device="cpu")


def save_rows(
    tables: Sequence[HashTable],
    state: PartState,
    rows: RowsInStateDict,
    destination: MutableMapping[str, Any],
    prefix: str,
    exchange: Exchange | None,
) -> None:
    """Write rows; collective if ranks share the tables, and each rank writes all rows.

    Args:
        tables: This rank's tables.
        state: The rows that this rank would save in a checkpoint.
        rows: ``embedding``, ids and embeddings; ``record``, also optimizer state, metadata, and the state of admission.
        destination: The state_dict; written.
        prefix: Prefix of the engine's keys.
        exchange: Collectives of the ranks that share the tables; None for one process.
    """
    save_key(tables, destination, prefix)
    for table in tables:
        for member in table.members:
            destination[f"{prefix}{_KEY}.{member.name}.step"] = torch.tensor(table.step, device="cpu")
    for name, each in state.tables.items():
        if rows == "embedding" and name.endswith(COUNTS):
            continue
        columns = {c: v for c, v in each.columns.items() if rows == "record" or c in ("ids", "embedding")}
        if exchange is not None:
            columns = _of_all_ranks(columns, exchange)
        for column, values in columns.items():
            # Copied: safetensors refuses tensors that share memory, and torch.save writes all of it.
            shares = values.untyped_storage().nbytes() != values.nbytes
            destination[f"{prefix}{_KEY}.{name}.{column}"] = values.clone() if shares else values


def load_rows(
    tables: Sequence[HashTable],
    state_dict: Mapping[str, Any],
    prefix: str,
    buckets_of: Any,
    missing_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load rows from a state_dict; report missing keys if it has none and the tables are at another step.

    Args:
        tables: This rank's tables.
        state_dict: Result of :func:`save_rows` or :func:`save_key`, or a state_dict without keys of tables.
        prefix: Prefix of the engine's keys.
        buckets_of: Returns, for the name of a table in the state, the buckets that this rank loads; None for all.
        missing_keys: As in ``nn.Module``: fails a strict load.
        error_msgs: As in ``nn.Module``: fails every load.
    """
    key = f"{prefix}{_KEY}"
    found = {name[len(key) + 1 :]: value for name, value in state_dict.items() if name.startswith(f"{key}.")}
    if found:
        try:
            _load(tables, found, state_dict.get(key), buckets_of)
        except (KeyError, TypeError, ValueError) as error:
            text = error.args[0] if isinstance(error, KeyError) else error
            error_msgs.append(f"the rows of {key!r} do not fit the tables: {text}")
        return
    header = state_dict.get(key)
    if isinstance(header, Tensor) and header.shape == (4,):
        step, rows, *_ = header.tolist()
        if rows and not _rows(tables) and not _step(tables):
            missing_keys.append(
                f"{key} (its {rows} rows are not in the state_dict, and the tables are empty; {_REMEDY})"
            )
        elif step != _step(tables):
            missing_keys.append(
                f"{key} (the state_dict was taken after step {step}, without rows, and the tables are at step "
                f"{_step(tables)}; {_REMEDY})"
            )
    elif not _rows(tables) and not _step(tables):
        missing_keys.append(f"{key} (rows are not in the state_dict, and the tables are empty; {_REMEDY})")


def _load(tables: Sequence[HashTable], found: Mapping[str, Tensor], header: Tensor | None, buckets_of: Any) -> None:
    states: dict[str, TableState] = {}
    steps: dict[str, Any] = {}
    columns_of: dict[str, dict[str, Tensor]] = {}
    for key, values in found.items():
        name, _, column = key.rpartition(".")
        if column == "step":
            steps[name] = int(values)
        else:
            columns_of.setdefault(name, {})[column] = values
    for name, columns in columns_of.items():
        ids = columns.get("ids")
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
            raise ValueError(f"table {name!r}: ids must be int64 [n], got {_form(ids)}")
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"table {name!r}: columns must have one length, got {lengths}")
        if 0 < sum(column in columns for column in META) < len(META):
            raise ValueError(f"table {name!r}: all or none of {list(META)} are required, got {sorted(columns)}")
        if ids.unique().numel() < ids.numel():
            raise ValueError(f"table {name!r}: ids must be distinct")
        columns = {"ids": ids, **columns}
        states[name] = TableState(columns, ops.id_map.bucket_of(ids.contiguous()), {})
    seed = tables[0].store.seed if header is None else (int(header[2]) << _SEED_BITS) + int(header[3])
    loader = TablesLoader(tables, PartState(tables=states, meta={"seed": seed, "steps": dict(steps)}))
    if loader.differences:
        raise ValueError("; ".join(loader.differences))
    for name, state in states.items():
        loader.check(name, state.columns)
    loader.begin({name: len(state.buckets) for name, state in states.items()})
    for name, state in states.items():
        columns, buckets = state.columns, buckets_of(name)
        if buckets is not None:
            chosen = (state.buckets >= buckets[0]) & (state.buckets < buckets[1])
            columns = {column: values[chosen] for column, values in columns.items()}
        loader.load(name, columns)
    loader.end()


def _of_all_ranks(columns: Mapping[str, Tensor], exchange: Exchange) -> dict[str, Tensor]:
    """Return columns ``[n, ...]`` of all ranks joined into ``[R, ...]``, in the order of ranks; collective."""
    counts = [n for (n,) in exchange.all([columns["ids"].numel()])]
    together = {}
    for column, values in columns.items():
        parts = []
        for rank, count in enumerate(counts):
            part = values.to(exchange.device).contiguous()
            if rank != exchange.rank:
                part = values.new_empty((count, *values.shape[1:]), device=exchange.device)
            with exchange.wait_context(), exchange.explained("rows"):
                dist.broadcast(part.view(-1).view(torch.uint8), group=exchange.group, group_src=rank)
            parts.append(part.to(values.device))
        together[column] = torch.cat(parts)
    return together


def _step(tables: Sequence[HashTable]) -> int:
    return max(table.step for table in tables)


def _rows(tables: Sequence[HashTable]) -> int:
    return sum(len(table) for table in tables)


def _form(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
