"""RaggedTensors and TorchRec's JaggedTensor and KeyedJaggedTensor.

TorchRec is found when it is first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from recis_hybrid.ragged.checks import Parts, one_level

if TYPE_CHECKING:
    from recis_hybrid.ragged.tensor import RaggedTensor


def _sparse() -> Any:
    try:
        from torchrec.sparse import jagged_tensor
    except ImportError as error:
        raise ImportError(
            f"RaggedTensor: TorchRec cannot be imported ({error}); install it beside this torch, e.g. "
            f"`pip install --no-deps torchrec`"
        ) from error
    return jagged_tensor


def to_jagged(
    values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, outer: tuple[torch.Tensor, ...]
) -> Any:
    """See `RaggedTensor.to_jagged`."""
    one_level("to_jagged", outer)
    return _sparse().JaggedTensor(values=values, offsets=offsets, weights=weights)


def from_jagged(jagged: Any) -> Parts:
    """See `RaggedTensor.from_jagged`."""
    weights = jagged.weights_or_none()
    return jagged.values(), jagged.offsets().to(torch.int64), None if weights is None else weights.float(), ()


def to_keyed_jagged(columns: Mapping[str, RaggedTensor]) -> Any:
    """Return columns of ids as a TorchRec KeyedJaggedTensor; waits for a GPU.

    Args:
        columns: RaggedTensors of one level, of one dtype and one number of rows, all weighted or none.

    Raises:
        ImportError: TorchRec is not installed.
        ValueError: There is none, or they differ.
    """
    if not columns:
        raise ValueError("to_keyed_jagged: takes at least one column, got none")
    for column in columns.values():
        one_level("to_keyed_jagged", column.outer)
    rows = {name: column.batch_size for name, column in columns.items()}
    weighted = {name: column.weights is not None for name, column in columns.items()}
    dtypes = {name: column.dtype for name, column in columns.items()}
    for what in (rows, weighted, dtypes):
        if len(set(what.values())) > 1:
            raise ValueError(
                f"to_keyed_jagged: columns must have one number of rows and one dtype, and all weights or none, "
                f"got {what}"
            )
    # What a GPU has made may have more values than its offsets reach; a slice has just those.
    reached = [column[:] for column in columns.values()]
    given = [column.weights for column in reached if column.weights is not None]
    return _sparse().KeyedJaggedTensor(
        keys=list(columns),
        values=torch.cat([column.values for column in reached]),
        lengths=torch.cat([column.lengths() for column in columns.values()]),
        weights=torch.cat(given) if given else None,
    )


def from_keyed_jagged(keyed: Any) -> dict[str, RaggedTensor]:
    """Return the columns of a TorchRec KeyedJaggedTensor by name.

    Args:
        keyed: A KeyedJaggedTensor.
    """
    from recis_hybrid.ragged.tensor import RaggedTensor

    return {name: RaggedTensor(*from_jagged(jagged)) for name, jagged in keyed.to_dict().items()}
