"""Clipping of each row's gradient; ``torch.nn.utils.clip_grad_norm_`` clips the global norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from recis_hybrid.embedding import Anchor, exchange_gradients
from recis_hybrid.validation import check_number, describe_value


@torch.no_grad()
def clip_row_norm_(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scale the summed gradient of each row down to a norm of at most ``max_norm``.

    Call it between backward and the optimizer's step; if gradients are scaled, unscale them first.

    Args:
        parameters: ``engine.parameters()``, or the parameters of a whole model; all but tables are ignored.
        max_norm: Maximum L2 norm of a row's gradient.

    Raises:
        ValueError: If ``max_norm`` is not positive, or rows of a table are split by column over ranks, so that no rank
            has the gradient of a whole row.

    Example:
        >>> from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)})
        >>> engine({"item": torch.tensor([1, 1, 2])})["item"].sum().backward()
        >>> clip_row_norm_(engine.parameters(), max_norm=1.0)
        >>> round(float(engine.tables[0].anchor.grad.norm()), 4)  # two rows of norm 1
        1.4142
    """
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(f"clip_row_norm_: parameters must be engine.parameters(), got {describe_value(parameters)}")
    check_number("clip_row_norm_", "max_norm", max_norm)
    if not max_norm > 0:
        raise ValueError(f"clip_row_norm_: max_norm must be above 0, got {max_norm}")
    anchors = [parameter for parameter in parameters if isinstance(parameter, Anchor)]
    for anchor in anchors:
        if anchor.table.layout.whole_dim is not None:
            names = ", ".join(member.name for member in anchor.table.members)
            raise ValueError(
                f"clip_row_norm_: rows of the table {names} are split by column over ranks, so that no rank has "
                f"the gradient of a whole row; use another sharding, or torch.nn.utils.clip_grad_norm_"
            )
    with exchange_gradients(anchors):
        for anchor in anchors:
            anchor.table.clip_row_gradients(max_norm)
