"""Adam with L2 regularization."""

from __future__ import annotations

from recis_hybrid.optim.moments.adam_like import AdamLike


class AdamL2(AdamLike):
    r"""Adam with coupled L2; equivalent to ``torch.optim.Adam`` for rows that always have a gradient.

    .. math::
        u = g + \lambda w,\; m \leftarrow m + (1 - \beta_1)(u - m),\; v \leftarrow v + (1 - \beta_2)(u^2 - v),\;
        w \leftarrow w - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    While a row has no gradient, its moments and weights do not change, not even by weight decay. t counts the steps of
    its table.

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
        Kingma, Ba: Adam: a method for stochastic optimization. ICLR 2015.
    """

    rule_name = "adam_l2"
