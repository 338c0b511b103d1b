"""Conversions between RaggedTensors and TorchRec's JaggedTensor and KeyedJaggedTensor.

TorchRec is imported when a conversion first needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recis_hybrid.ragged.checks import one_level
from recis_hybrid.ragged.tensor import RaggedTensor


def _jagged_module(where: str) -> Any:
    try:
        from torchrec.sparse import jagged_tensor
    except ImportError as error:
        raise ImportError(
            f"{where}: TorchRec cannot be imported ({error}); install a version for this torch, e.g. "
            f"`pip install --no-deps torchrec`"
        ) from error
    return jagged_tensor


def to_jagged(ragged: RaggedTensor) -> Any:
    """Return rows of one level as a TorchRec JaggedTensor that shares their memory.

    Args:
        ragged: B rows of values.

    Raises:
        ImportError: If TorchRec is not installed.
        ValueError: If rows hold lists.
    """
    one_level("to_jagged", ragged.outer)
    module = _jagged_module("to_jagged")
    return module.JaggedTensor(values=ragged.values, offsets=ragged.offsets, weights=ragged.weights)


def from_jagged(jagged: Any) -> RaggedTensor:
    """Return the rows of a TorchRec JaggedTensor; weights become float32.

    Args:
        jagged: A JaggedTensor.
    """
    weights = jagged.weights_or_none()
    offsets = jagged.offsets().to(torch.int64)
    return RaggedTensor(jagged.values(), offsets, None if weights is None else weights.float())


def to_keyed_jagged(columns: Mapping[str, RaggedTensor]) -> Any:
    """Return columns of ids as one TorchRec KeyedJaggedTensor; waits for a GPU.

    Args:
        columns: RaggedTensors of one level by name, with the same dtype and number of rows, all weighted or none.

    Raises:
        ImportError: If TorchRec is not installed.
        ValueError: If there are no columns, or they differ.
    """
    if not columns:
        raise ValueError("to_keyed_jagged: columns must contain at least one column, got none")
    for column in columns.values():
        one_level("to_keyed_jagged", column.outer)
    rows = {name: column.batch_size for name, column in columns.items()}
    weighted = {name: column.weights is not None for name, column in columns.items()}
    dtypes = {name: column.dtype for name, column in columns.items()}
    for values in (rows, weighted, dtypes):
        if len(set(values.values())) > 1:
            raise ValueError(
                f"to_keyed_jagged: columns must have the same number of rows and dtype, and all weights or none, "
                f"got {values}"
            )
    # Operations on a GPU may leave unused values after the last offset; a slice drops them.
    trimmed = [column[:] for column in columns.values()]
    weights = [column.weights for column in trimmed if column.weights is not None]
    return _jagged_module("to_keyed_jagged").KeyedJaggedTensor(
        keys=list(columns),
        values=torch.cat([column.values for column in trimmed]),
        lengths=torch.cat([column.lengths() for column in columns.values()]),
        weights=torch.cat(weights) if weights else None,
    )


def from_keyed_jagged(keyed: Any) -> dict[str, RaggedTensor]:
    """Return the columns of a TorchRec KeyedJaggedTensor by name.

    Args:
        keyed: A KeyedJaggedTensor.
    """
    return {name: from_jagged(jagged) for name, jagged in keyed.to_dict().items()}
