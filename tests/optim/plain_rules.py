"""The rules of the sparse optimizers in plain torch, on dense float32 tensors of the rows that have gradients.

Each takes rows ``[U, D]``, gradients ``[U, D]``, state by name, hyperparameters, the step from 1, and the steps since
the last update of each row ``[U, 1]``; it changes rows and state in place.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

from torch import Tensor

Rule: TypeAlias = Callable[[Tensor, Tensor, dict[str, Tensor], Any, int, Tensor], None]


def _moments(g: Tensor, state: dict[str, Tensor], of: Any, t: int, second: Tensor | None = None) -> Tensor:
    """Advance the moments and return the corrected quotient."""
    (beta1, beta2), m, v = of.betas, state["exp_avg"], state["exp_avg_sq"]
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * (g * g if second is None else second))
    return (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + of.eps)


def adamw_tf(w: Tensor, g: Tensor, state: dict[str, Tensor], of: Any, t: int, _: Tensor) -> None:
    w.mul_(1 - of.weight_decay)
    correction = (1 - of.betas[1] ** t) ** 0.5
    inside = SimpleNamespace(betas=of.betas, eps=of.eps / correction)
    w -= of.lr * _moments(g, state, inside, t)


def rowwise_adam(w: Tensor, g: Tensor, state: dict[str, Tensor], of: Any, t: int, _: Tensor) -> None:
    step = _moments(g, state, of, t, g.square().mean(1, keepdim=True))
    w -= of.lr * (step + of.weight_decay * w)


def lamb(w: Tensor, g: Tensor, state: dict[str, Tensor], of: Any, t: int, _: Tensor) -> None:
    r = _moments(g, state, of, t) + of.weight_decay * w
    norms = w.norm(dim=1, keepdim=True), r.norm(dim=1, keepdim=True)
    ratio = (norms[0] / norms[1]).where((norms[0] > 0) & (norms[1] > 0), w.new_ones(1))
    w -= of.lr * ratio * r


def lion(w: Tensor, g: Tensor, state: dict[str, Tensor], of: Any, t: int, _: Tensor) -> None:
    (beta1, beta2), m = of.betas, state["exp_avg"]
    w.mul_(1 - of.lr * of.weight_decay).sub_(of.lr * (beta1 * m + (1 - beta1) * g).sign())
    m.mul_(beta2).add_((1 - beta2) * g)


def ftrl(w: Tensor, g: Tensor, state: dict[str, Tensor], of: Any, t: int, _: Tensor) -> None:
    z, n = state["linear"], state["sum"]
    z += g - ((n + g * g).sqrt() - n.sqrt()) / of.lr * w
    n += g * g
    w.copy_(-(z - z.sign() * of.l1) / ((of.beta + n.sqrt()) / of.lr + of.l2))
    w[z.abs() <= of.l1] = 0


def rowwise_adagrad(w: Tensor, g: Tensor, state: dict[str, Tensor], of: Any, t: int, elapsed: Tensor) -> None:
    decay = w.new_full((len(w), 1), of.weight_decay)
    if of.counter_halflife > 0:
        counter = state["row_counter"]
        counter.copy_(1 + 0.5 ** (elapsed / of.counter_halflife) * counter)
        decay *= of.counter_halflife / counter
    if of.weight_decay_mode == "l2":
        g = g + decay * w
    else:
        w *= 1 - of.lr * decay
    state["sum"] += g.square().mean(1, keepdim=True)
    w -= of.lr * g / (state["sum"].sqrt() + of.eps)
