"""Quantized embeddings in exports: codes of 8 or 4 bits, with a scale and a minimum for each row.

Legend: n rows, D dim, W bytes of a row's codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.saver.errors import CheckpointError

LEVELS = {"int8": 255, "int4": 15}
"""Greatest code of each dtype."""
_WIDEST = 2.0**127
"""Greatest range of a row; sums of products with codes cannot overflow."""
_PIECE_BYTES = 16 << 20


def quantize(table: str, ids: Tensor, embedding: Tensor, dtype: str) -> dict[str, Tensor]:
    r"""Return embeddings in codes of 8 or 4 bits.

    .. math::
        s = \frac{\max_d x_d - \min_d x_d}{L},\;
        c_d = \mathrm{round} \frac{x_d - \min_d x_d}{s},\;
        \hat x_d = \min_d x_d + s c_d

    with L = 255 for ``int8`` and L = 15 for ``int4``. The error of an element is at most half a step,
    :math:`|\hat x_d - x_d| \le s / 2`, plus the rounding of float32.

    Args:
        table: Name of the table, for messages.
        ids: int64 ``[n]``, for messages.
        embedding: float32, bfloat16 or float16 ``[n, D]``.
        dtype: A key of ``LEVELS``.

    Returns:
        Columns of the export: ``embedding`` uint8 ``[n, W]``, with W = D for ``int8`` and W = ⌈D / 2⌉ for ``int4``,
        whose even elements are in the low four bits; ``scale`` (s) and ``minimum``, float32 ``[n]``.

    Raises:
        CheckpointError: A row has a value that is not finite, or a range above 2^127.

    References:
        Guan et al.: Post-training 4-bit quantization on embedding tables. NeurIPS 2019 workshop on systems for ML.
    """
    n, dim = embedding.shape
    codes = torch.empty(n, dim if dtype == "int8" else -(-dim // 2), dtype=torch.uint8)
    scale, minimum = torch.empty(2, n).unbind()
    step = max(_PIECE_BYTES // (4 * dim), 1)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        values = embedding[rows].float()
        low, high = values.aminmax(dim=1)
        _refuse_ranges(table, ids[rows], low, high, dtype)
        scale[rows], minimum[rows] = (high - low) / LEVELS[dtype], low
        # A row of equal values, or one whose scale is below the smallest float, has codes 0.
        divisor = torch.where(scale[rows] > 0, scale[rows], 1.0)
        steps = ((values - low[:, None]) / divisor[:, None]).round().clamp(max=LEVELS[dtype]).to(torch.uint8)
        codes[rows] = steps if dtype == "int8" else _packed(steps)
    return {"embedding": codes, "scale": scale, "minimum": minimum}


def _packed(codes: Tensor) -> Tensor:
    even, odd = codes[:, 0::2], codes[:, 1::2]
    packed = even.clone()
    packed[:, : odd.shape[1]] |= odd << 4
    return packed


def _refuse_ranges(table: str, ids: Tensor, low: Tensor, high: Tensor, dtype: str) -> None:
    bad = ~(high - low <= _WIDEST)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise CheckpointError(
            f"export: table {table!r}: {dtype} needs finite values within a range of 2^127 in each row, the row of id "
            f"{int(ids[row])} has values from {float(low[row])} to {float(high[row])}. Export it as float32, or erase "
            "the row and save again."
        )
