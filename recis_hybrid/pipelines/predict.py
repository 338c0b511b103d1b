"""predict: scores of a step on a data set, and files of scores. Letters: B rows of a batch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.pipelines.lockstep import in_lockstep
from recis_hybrid.pipelines.steps.step import Step
from recis_hybrid.ragged import Batch, RaggedTensor, to_arrow

SUFFIXES = (".parquet", ".csv")
"""Suffixes of the files that :func:`write_predictions` writes."""


def predict(
    step: Step,
    data: Iterable[Batch],
    *,
    columns: Sequence[str] = (),
    transforms: Sequence[Callable[[Batch], Batch]] = (),
) -> Iterator[Batch]:
    """Yield a step's scores batch by batch, in the order of the data. Tables insert no rows.

    Padding rows (``ShardOptions(uneven="pad")``) are omitted. All ranks call this together, each with its own batches,
    and consume everything it yields. A rank with fewer batches than others yields empty ones at the end.

    Args:
        step: Makes the predictions. Its model stays in evaluation mode until the next training step.
        data: Batches. A step with a method ``score``, such as TorchStep, needs no labels.
        columns: Columns of the batches to yield too, as they are before the transforms.
        transforms: Applied in order to each batch before the step.

    Yields:
        The columns, and ``score`` ``[B]`` on the model's device; ``score.OBJECTIVE`` if there are several objectives.

    Raises:
        KeyError: A batch lacks one of the columns.
        ValueError: A column has the same name as the scores.
    """
    for batch in in_lockstep(data):
        if missing := [name for name in columns if name not in batch]:
            raise KeyError(f"predict: the batch has no columns {missing}, it has {sorted(batch)}")
        selected = {name: batch[name] for name in columns}
        for transform in transforms:
            batch = transform(batch)
        mask = batch.get("mask")
        if isinstance(mask, Tensor) and mask.dtype is torch.bool and not bool(mask.all()):
            selected = {name: _rows(column, mask) for name, column in selected.items()}
        scores = _scores(step, batch)
        names = {"score" if list(scores) == [""] else f"score.{name}": each for name, each in scores.items()}
        if duplicates := [name for name in names if name in selected]:
            raise ValueError(f"predict: the columns {duplicates} have the names of scores; omit or rename them")
        yield {**selected, **names}


def _scores(step: Step, batch: Batch) -> Mapping[str, Tensor]:
    score: Any = getattr(step, "score", None)
    if score is not None:
        scores: Mapping[str, Tensor] = score(batch)
        return scores
    return {name: predictions.scores for name, predictions in step.predict(batch).items()}


def _rows(column: Tensor | RaggedTensor, mask: Tensor) -> Tensor | RaggedTensor:
    if isinstance(column, Tensor):
        return column[mask.to(column.device)]
    rows: RaggedTensor = column[mask.nonzero().view(-1).to(column.values.device)]
    return rows


def write_predictions(
    path: str | os.PathLike[str], batches: Iterable[Batch], types: Mapping[str, Any] | None = None
) -> int:
    """Write batches to a Parquet or CSV file, in order.

    The file is written under a temporary name and renamed when complete. A failure removes it.

    Args:
        path: A file that does not exist yet. Its suffix selects the format.
        batches: Batches with the same columns.
        types: Arrow types that columns have in the input files. They restore unsigned 64-bit integers, which a batch
            holds as int64, and strings.

    Returns:
        The number of rows written.

    Raises:
        FileExistsError: The file exists.
        FileNotFoundError: Its folder does not exist.
        ValueError: The suffix is neither ``.parquet`` nor ``.csv``, there is no batch, or a column of lists would be
            written as CSV.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    check_output(path)
    out = Path(path)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    writer: Any = None
    rows = 0
    try:
        for batch in batches:
            table = arrow_batch(batch, types or {})
            lists = [field.name for field in table.schema if pa.types.is_nested(field.type)]
            if lists and out.suffix == ".csv":
                raise ValueError(f"{out}: CSV cannot hold lists, but the columns {lists} are lists; write .parquet")
            if writer is None:
                make = parquet.ParquetWriter if out.suffix == ".parquet" else csv.CSVWriter
                writer = make(partial, table.schema)
            writer.write_batch(table)
            rows += table.num_rows
        if writer is None:
            raise ValueError(f"{out}: the data must have at least one batch, got none")
        writer.close()
        os.replace(partial, out)
    except BaseException:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
        raise
    return rows


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise the errors of :func:`write_predictions` for a path that it cannot write."""
    out = Path(path)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: the suffix of a file must be one of {', '.join(SUFFIXES)}, got {out.suffix!r}")
    if out.exists():
        raise FileExistsError(f"{out} already exists; remove it, or choose another name")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; create it first")


def arrow_batch(batch: Batch, types: Mapping[str, Any]) -> Any:
    """Return a batch as an Arrow record batch, with the types that columns have in the input files."""
    import pyarrow as pa

    return pa.RecordBatch.from_pydict({name: _arrow(column, types.get(name)) for name, column in batch.items()})


def _arrow(column: Tensor | RaggedTensor, kind: Any) -> Any:
    """Return a column as an Arrow array, with its type in the input files where that is more specific."""
    import pyarrow as pa

    if isinstance(column, RaggedTensor):
        return _as_in_files(to_arrow(column), kind)
    values = column.detach().cpu()
    values = values.float() if values.dtype is torch.bfloat16 else values
    array = pa.array(values.reshape(-1).contiguous().numpy())
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return _as_in_files(array, kind)


def _as_in_files(array: Any, kind: Any) -> Any:
    """Convert int64 to unsigned integers, and bytes to strings, where the input files have these types."""
    import pyarrow as pa

    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    inner = getattr(kind, "value_type", None)
    if inner is not None and pa.types.is_large_list(array.type):
        return pa.LargeListArray.from_arrays(array.offsets, _as_in_files(array.values, inner))
    if inner is not None and pa.types.is_fixed_size_list(array.type):
        return pa.FixedSizeListArray.from_arrays(_as_in_files(array.values, inner), array.type.list_size)
    if kind is not None and pa.types.is_uint64(kind) and pa.types.is_int64(array.type):
        return array.view(pa.uint64())
    texts = (pa.string(), pa.large_string(), pa.string_view())
    return array.cast(pa.large_string()) if kind in texts else array
