"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid.optim.moments.adam_like import AdamLike


class AdamW(AdamLike):
    r"""AdamW for the rows that have gradients; equivalent to ``torch.optim.AdamW`` for rows that always have one.

    .. math::
        w \leftarrow (1 - \eta \lambda) w,\;
        w \leftarrow w - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with the moments m and v of :class:`Adam`. While a row has no gradient, its moments and weights do not change, not
    even by weight decay. t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.
        weight_decay: λ.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg`` and ``exp_avg_sq``.

    References:
        Loshchilov, Hutter: Decoupled weight decay regularization. ICLR 2019.
    """

    rule_name = "adamw"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        exact: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, exact)
