"""AMSGrad on rows."""

from __future__ import annotations

from recis_hybrid.embedding import StateField
from recis_hybrid.optim.moments.adam_like import MOMENTS, AdamLike


class AMSGrad(AdamLike):
    r"""AMSGrad; equivalent to ``torch.optim.Adam(amsgrad=True)`` for rows that always have a gradient.

    .. math::
        \hat{v} \leftarrow \max(\hat{v}, v),\;
        w \leftarrow w - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{\hat{v} / (1 - \beta_2^t)} + \epsilon}

    with the moments m and v of :class:`AdamL2`. While a row has no gradient, its state and weights do not change, not
    even by weight decay. t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.
        weight_decay: λ, coupled: the gradient is g + λ w.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg``, ``exp_avg_sq`` and
            ``max_exp_avg_sq``.

    References:
        Reddi, Kale, Kumar: On the convergence of Adam and beyond. ICLR 2018.
    """

    rule_name = "amsgrad"

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``."""
        return (*MOMENTS, StateField("max_exp_avg_sq"))
