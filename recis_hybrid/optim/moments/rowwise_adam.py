"""Adam with one second moment per row."""

from __future__ import annotations

import torch

from recis_hybrid.embedding import StateField
from recis_hybrid.optim.moments.adam_like import AdamLike


class RowwiseAdam(AdamLike):
    r"""Adam with one second moment per row, of the mean squared gradient, for the rows that have gradients.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m),\;
        v \leftarrow v + (1 - \beta_2) \Big(\frac{1}{D} \sum_d g_d^2 - v\Big),\;
        w \leftarrow (1 - \eta \lambda) w - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    v is float32 regardless of the table's dtypes. While a row has no gradient, its moments and weights do not change.
    t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.
        weight_decay: λ, decoupled.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg`` and no ``exp_avg_sq`` of one
            element.

    References:
        Kingma, Ba: Adam: a method for stochastic optimization. ICLR 2015. Equivalent to PARTIAL_ROWWISE_ADAM of FBGEMM.
    """

    rule_name = "rowwise_adam"
    needs_whole_rows = True

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``exp_avg``, and one ``exp_avg_sq``."""
        return StateField("exp_avg"), StateField("exp_avg_sq", width=1, dtype=torch.float32)
