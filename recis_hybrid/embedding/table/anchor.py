"""Anchor: a table's place in autograd and in optimizers."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recis_hybrid.embedding.compilation import outside_graphs, prepare

if TYPE_CHECKING:
    from recis_hybrid.embedding.table.hash_table import HashTable


def refused_copy() -> TypeError:
    """Return the error for whoever copies or pickles a table: records lie at addresses that a copy would share."""
    return TypeError(
        "an embedding table cannot be copied or pickled; save it with Saver and load it into a new engine, or build "
        "the engine with rows_in_state_dict='record', take the model's state_dict() and load it into a new one; to "
        "average weights, copy the towers alone, as AveragedModel(model.tower)"
    )


@outside_graphs("grad")
class Anchor(nn.Parameter):
    """A parameter of one element that means nothing, and a ``grad`` that stands for all row gradients of its table.

    ``grad`` has their L2 norm (and in a second element, too small to count, a mark), float64 ``[2]``, computed when it
    is read; None if there are none. Whatever multiplies it in place multiplies the row gradients, and non-finite
    gradients make it non-finite: so ``torch.nn.utils.clip_grad_norm_`` and ``torch.amp.GradScaler`` work on tables as
    on dense parameters. Norms other than that of 2 it cannot tell, and ``clip_grad_value_`` leaves tables alone.
    Setting it to None, as ``zero_grad`` does, forgets the gradients.
    """

    table: HashTable

    def __new__(cls, table: HashTable) -> Anchor:
        """Make the anchor of a table."""
        _watch_steps()
        prepare()
        anchor = super().__new__(cls, torch.zeros(1, device=table.device), requires_grad=not table.read_only)
        anchor.table = table
        return anchor

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchor:
        raise refused_copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refused_copy()

    @property
    def grad(self) -> Tensor | None:
        """The norm of the table's row gradients; see the class."""
        reduced = self.table.pending.reduced(self.table.layout.dim)
        return None if reduced is None else reduced.shown

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("the gradient of an embedding table cannot be set; scale what is there, or set it to None")
        self.table.pending.clear()


@cache
def _watch_steps() -> None:
    """Has every optimizer's step looked at first: torch.optim takes an anchor as it takes any parameter."""
    register_optimizer_step_pre_hook(_refuse_step)


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if hasattr(optimizer, "update_of"):
        return
    # By type: isinstance of a Parameter takes twenty times as long, and this comes before every step.
    if not any(type(parameter) is Anchor for group in optimizer.param_groups for parameter in group["params"]):
        return
    kind = type(optimizer)
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} cannot update embedding tables, and was given their parameters: give "
        f"engine.parameters() to an optimizer of recis_hybrid.optim, and embedding.dense_parameters(model) to this one"
    )
