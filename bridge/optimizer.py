"""An optax transformation as a torch optimizer: state and arithmetic are JAX's, one jitted call a step.

The new parameters stay in the memory that JAX made them in, and the `nn.Parameter`s move there: nothing is copied on
the way in or out. So JAX owns what a tower trains from the first step on, while everything that torch does with
parameters (`state_dict`, DDP, clipping, gradient scaling) goes on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast, overload

import jax
import jax.numpy as jnp
import torch
import torch.distributed as dist

from recis_hybrid.bridge.all_reduce import GradientAllReduce
from recis_hybrid.bridge.dlpack import ALIGNMENT, count_copy, share, to_jax, unshare


class GradientTransformation(Protocol):
    """What is used of `optax.GradientTransformation`; optax itself is not needed here."""

    init: Callable[[Any], Any]
    """Parameters → state."""
    update: Callable[..., tuple[Any, Any]]
    """(gradients, state, parameters) → (what to add to the parameters, state)."""


class _Group(dict[str, Any]):
    """A parameter group, which says to those who ask for a learning rate where it is."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(
            f"OptaxOptimizer: has no {key!r} in its parameter group, the transformation holds it; instead of a torch "
            "scheduler give it a schedule: optax.adam(optax.cosine_decay_schedule(1e-3, 10_000))"
        )


class OptaxOptimizer(torch.optim.Optimizer):
    """Updates parameters by an optax transformation, in JAX.

    The transformation sees one dictionary, from the parameters' dotted names to arrays, so that `optax.masked` and
    `optax.multi_transform` can choose by name. Learning rates, schedules and clipping are the transformation's, so
    that torch's schedulers do not work on it. A parameter without a gradient has one of zeros, where torch's optimizers
    leave it alone: weight decay and momentum still move it; freeze it by `optax.multi_transform`, or leave it out
    and set `requires_grad_(False)`.

    Args:
        named_parameters: as `module.named_parameters()` gives them, of a `JaxTower` or of any torch module; on one
            device, contiguous, starting at multiples of 64 bytes.
        transformation: of optax, or whatever has its `init` and `update`.
        group: of ranks that train the parameters together: they start as the first rank's, and each step takes the
            gradients of all ranks, by a `GradientAllReduce`. All of them step together, then, with gradients or not.
            None: gradients are this rank's, or DDP has summed them.
        share: what a rank's gradients are multiplied by, asked in each step: `lambda: engine.share`, the share of the
            samples that an `EmbeddingEngine` has counted. Without it ranks count alike.

    Raises:
        TypeError: if the parameters come without names, or one is not floating.
        ValueError: if there is none, two have one name, one cannot be shared with JAX, or a share comes without group.

    Example:
        >>> import numpy as np, optax
        >>> from recis_hybrid.bridge import JaxTower
        >>> tower = JaxTower(lambda params, x: x @ params["w"], {"w": np.ones((3, 1), np.float32)})
        >>> optimizer = OptaxOptimizer(tower.named_parameters(), optax.adamw(0.1))
        >>> tower(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> bool((tower.w < 1).all())
        True
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        transformation: GradientTransformation,
        *,
        group: dist.ProcessGroup | None = None,
        share: Callable[[], float] | None = None,
    ) -> None:
        given = list(named_parameters)
        for each in given:
            if not isinstance(each, tuple) or len(each) != 2 or not isinstance(each[0], str):
                raise TypeError(
                    f"OptaxOptimizer: takes named parameters, got a {type(each).__qualname__}; pass "
                    "module.named_parameters()"
                )
            if not each[1].is_floating_point():
                raise TypeError(f"OptaxOptimizer: {each[0]!r} must be floating, got {each[1].dtype}; leave it out")
        self._named = dict(given)
        if not given or len(self._named) < len(given):
            raise ValueError(f"OptaxOptimizer: takes parameters of distinct names, got {[name for name, _ in given]}")
        if share is not None and group is None:
            raise ValueError("OptaxOptimizer: a share is of the ranks of a group; pass group, too")
        self._is_complete = False
        super().__init__([_Group(params=list(self._named.values()))], {})
        self._is_complete = True
        self._zeros: dict[str, jax.Array] = {}
        self._share = share
        self._all_reduce: GradientAllReduce | None = None
        if group is not None:
            self._all_reduce = GradientAllReduce(self._arrays(), group)
            self._replace(self._all_reduce.broadcast(self._arrays()))
        self._state = jax.jit(transformation.init)(self._arrays())

        def update(params: Any, gradients: Any, state: Any) -> tuple[Any, Any]:
            changes, state = transformation.update(gradients, state, params)
            return jax.tree.map(lambda p, change: (p + change).astype(p.dtype), params, changes), state

        self._update = jax.jit(update, donate_argnums=2)  # nobody else ever sees the state

    @property
    def averages_gradients(self) -> bool:
        """Whether `step` itself averages the gradients over ranks."""
        return self._all_reduce is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses all groups but the one that it is made with.

        Args:
            param_group: parameters and options, as torch's optimizers take them.

        Raises:
            NotImplementedError: always, because the transformation's state is of the parameters that there were.
        """
        if self._is_complete:
            raise NotImplementedError(
                "OptaxOptimizer: add_param_group is not supported, the transformation's state is of the parameters "
                "that it was made with; make a new OptaxOptimizer over all of them, and choose by name with "
                "optax.multi_transform"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters; without one gradient, it does nothing, unless there are several ranks.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            ValueError: if a parameter cannot be shared with JAX any more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = None
        if any(parameter.grad is not None for parameter in self._named.values()):
            gradients = {name: self._gradient(name, parameter) for name, parameter in self._named.items()}
        if self._all_reduce is not None:
            gradients = self._all_reduce(gradients, None if self._share is None else self._share())
        if gradients is not None:
            updated, self._state = self._update(self._arrays(), gradients, self._state)
            self._replace(updated)
        return loss

    def _replace(self, updated: dict[str, jax.Array]) -> None:
        # Taking them waits for the whole program, so that torch may write to the gradients again.
        with torch.inference_mode(False):
            tensors = unshare([updated[name] for name in self._named])
        for parameter, tensor in zip(self._named.values(), tensors, strict=True):
            parameter.data = tensor
            # As an update in place would: a backward pass that still needs the old value says so.
            torch.autograd.graph.increment_version(parameter)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the transformation's state: the leaves of its pytree, in their order, as tensors."""
        leaves = unshare([jnp.asarray(leaf) for leaf in jax.tree.leaves(self._state)])
        state = {f"leaf{number}": leaf.clone() for number, leaf in enumerate(leaves)}
        return {"state": {0: state} if state else {}, "param_groups": [{"params": list(range(len(self._named)))}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over copies of what :meth:`state_dict` returned.

        Args:
            state_dict: of the same transformation, over the same parameters.

        Raises:
            ValueError: if it is of another one; nothing is changed.
        """
        leaves, tree = jax.tree.flatten(self._state)
        loaded = cast(dict[str, torch.Tensor], state_dict["state"].get(0, {}))
        own = {f"leaf{number}": (leaf.shape, leaf.dtype.name) for number, leaf in enumerate(leaves)}
        theirs = {name: (tuple(leaf.shape), str(leaf.dtype).removeprefix("torch.")) for name, leaf in loaded.items()}
        if own != theirs:
            raise ValueError(
                f"OptaxOptimizer: the state is of another transformation or other parameters: it has {theirs}, this "
                f"one {own}"
            )
        (device,) = {parameter.device for parameter in self._named.values()}
        self._state = jax.tree.unflatten(tree, [to_jax(loaded[name].to(device), copy=True) for name in own])

    def _arrays(self) -> dict[str, jax.Array]:
        return {
            name: share(parameter.detach(), f"OptaxOptimizer: parameter {name!r}")
            for name, parameter in self._named.items()
        }

    def _gradient(self, name: str, parameter: torch.nn.Parameter) -> jax.Array:
        gradient = parameter.grad
        if gradient is None:
            if name not in self._zeros:
                self._zeros[name] = to_jax(torch.zeros_like(parameter))
            return self._zeros[name]
        if not gradient.is_contiguous() or gradient.data_ptr() % ALIGNMENT:  # in a bucket of DDP, say
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            count_copy()
        return share(gradient, f"OptaxOptimizer: the gradient of {name!r}")
