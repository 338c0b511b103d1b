"""LAMB with a row as the layer."""

from __future__ import annotations

from recis_hybrid.optim.moments.adam_like import AdamLike


class LAMB(AdamLike):
    r"""LAMB for the rows that have gradients; the trust ratio is that of the row.

    .. math::
        r = \frac{1}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda w,\;
        w \leftarrow w - \eta \frac{\|w\|}{\|r\|} r

    with the moments m and v of :class:`Adam`. The ratio is 1 if either norm is 0. While a row has no gradient, its
    moments and weights do not change. t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.
        weight_decay: λ.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg`` and ``exp_avg_sq``.

    References:
        You et al.: Large batch optimization for deep learning: training BERT in 76 minutes. ICLR 2020. Equivalent to
        LAMB of FBGEMM.
    """

    rule_name = "lamb"
    needs_whole_rows = True
