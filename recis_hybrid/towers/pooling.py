"""Pooling of hidden states to one vector per row.

B batch, T tokens, D width of the hidden states.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["cls", "mean", "last", "pooler"]
"""Names of the ways to pool; "pooler" is the model's own output, the others are computed by :func:`pool`."""


def pool(hidden: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """Pool the hidden states of each row.

    Args:
        hidden: ``[B, T, D]``, floating-point.
        mask: ``[B, T]``, nonzero for tokens and zero for padding on either side; None without padding.
        how: "cls" for the first token, "mean" for the mean of the tokens, or "last" for the last token. A row without
            tokens has a mean of zeros, and no first or last token: the result is that of padding.

    Returns:
        ``[B, D]``, in the dtype of ``hidden``.

    Raises:
        ValueError: If ``how`` is another name.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> [pool(hidden, torch.tensor([[1, 1, 0]]), how).item() for how in ("cls", "mean", "last")]
        [1.0, 2.0, 3.0]
    """
    if how not in ("cls", "mean", "last"):
        raise ValueError(f"pool: how must be 'cls', 'mean' or 'last', got {how!r}")
    if mask is None:
        return hidden.mean(1) if how == "mean" else hidden[:, 0 if how == "cls" else -1]
    is_token = mask != 0
    if how == "mean":
        chosen = is_token.unsqueeze(-1).to(hidden.dtype)
        return (hidden * chosen).sum(1) / chosen.sum(1).clamp(min=1)
    numbers = is_token.to(torch.int32)
    # argmax returns the first of equal values.
    first = numbers.argmax(1) if how == "cls" else mask.shape[1] - 1 - numbers.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first]
