"""AdamW with the decay of TensorFlow."""

from __future__ import annotations

from recis_hybrid.optim.moments.adam_like import AdamLike


class AdamWTF(AdamLike):
    r"""AdamW as TensorFlow Addons has it, for the rows that have gradients: the decay has no factor η.

    .. math::
        w \leftarrow (1 - \lambda) w,\;
        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{v} + \epsilon}

    with the moments m and v of :class:`Adam`, which also adds ε to the uncorrected square root. While a row has no
    gradient, its moments and weights do not change. t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.
        weight_decay: λ, at most 1. A schedule of η does not change it.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg`` and ``exp_avg_sq``.

    References:
        ``tfa.optimizers.AdamW`` of TensorFlow Addons, and ``SparseAdamWTF`` of RecIS
        (https://github.com/alibaba/RecIS). Loshchilov, Hutter: Decoupled weight decay regularization. ICLR 2019.
    """

    rule_name = "adamw_tf"
