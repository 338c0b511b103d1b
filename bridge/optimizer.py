"""An optax transformation as a torch optimizer. State and arithmetic are JAX's, with one jitted call per step.

The updated parameters stay in the memory that JAX allocated, and torch's parameters are pointed to it, so nothing is
copied. From the first step on JAX owns the parameters' memory, while everything that torch does with parameters
(``state_dict``, DDP, clipping, gradient scaling) works as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast, overload

import jax
import jax.numpy as jnp
import torch
import torch.distributed as dist

from recis_hybrid.bridge.all_reduce import GradientAllReduce
from recis_hybrid.bridge.exchange.dlpack import ALIGNMENT, count_copy, share, to_jax, unshare


class GradientTransformation(Protocol):
    """The part of ``optax.GradientTransformation`` in use; optax itself is not required."""

    init: Callable[[Any], Any]
    """A function from parameters to the state."""
    update: Callable[..., tuple[Any, Any]]
    """A function from (gradients, state, parameters) to (updates to add to the parameters, state)."""


class _Group(dict[str, Any]):
    """A parameter group without options, with a helpful error for missing ones."""

    def __missing__(self, key: str) -> Any:
        """Raise KeyError for an option, such as the learning rate that torch's schedulers read."""
        raise KeyError(
            f"OptaxOptimizer: the parameter group has no {key!r}, which belongs to the transformation; use an optax "
            "schedule instead of torch's: optax.adam(optax.cosine_decay_schedule(1e-3, 10_000))"
        )


class OptaxOptimizer(torch.optim.Optimizer):
    """A torch optimizer that updates parameters with an optax transformation, in JAX.

    The transformation receives a dictionary from the parameters' dotted names to arrays, so that ``optax.masked`` and
    ``optax.multi_transform`` can select by name. Learning rates, schedules and clipping belong to the transformation;
    torch's schedulers do not apply. A parameter without a gradient gets a gradient of zeros, whereas torch's optimizers
    skip it, so weight decay and momentum still change it, unless it is frozen with ``requires_grad_(False)``.

    Args:
        named_parameters: The result of ``module.named_parameters()``, for a :class:`JaxTower` or any torch module.
            Parameters must be on one device, contiguous and aligned to 64 bytes.
        transformation: An optax transformation, or any object with its ``init`` and ``update``.
        group: The group of ranks that train the parameters together. They start from the first rank's parameters, and
            each step sums the gradients of all ranks with a :class:`GradientAllReduce`, so all ranks must step
            together, with or without gradients. None uses the local gradients, which DDP may have summed.
        share: A function called in each step that returns the weight of this rank's gradients, such as
            ``lambda: engine.share``, the rank's share of the samples in an ``EmbeddingEngine``. By default all ranks
            have the same weight.

    Raises:
        TypeError: if parameters have no names, or one is not floating-point.
        ValueError: if there are no parameters, two have the same name, one cannot be shared with JAX, or ``share`` is
            passed without ``group``.

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
        pairs = list(named_parameters)
        for each in pairs:
            if not isinstance(each, tuple) or len(each) != 2 or not isinstance(each[0], str):
                raise TypeError(
                    f"OptaxOptimizer: parameters must be (name, parameter) pairs, got {type(each).__qualname__}; pass "
                    "module.named_parameters()"
                )
            if not each[1].is_floating_point():
                raise TypeError(f"OptaxOptimizer: {each[0]!r} must be floating-point, got {each[1].dtype}; omit it")
        self._named = dict(pairs)
        if not pairs or len(self._named) < len(pairs):
            raise ValueError(
                f"OptaxOptimizer: there must be parameters, with distinct names, got {[name for name, _ in pairs]}"
            )
        if share is not None and group is None:
            raise ValueError("OptaxOptimizer: share needs the ranks of a group; also pass group")
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

        self._update = jax.jit(update, donate_argnums=2)  # the state is donated: only this optimizer refers to it

    @property
    def averages_gradients(self) -> bool:
        """True if :meth:`step` averages the gradients over ranks."""
        return self._all_reduce is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise NotImplementedError for every group after that of the constructor.

        Args:
            param_group: Parameters and options, as in torch's optimizers.

        Raises:
            NotImplementedError: always, because the transformation's state belongs to the parameters of the
                constructor.
        """
        if self._is_complete:
            raise NotImplementedError(
                "OptaxOptimizer: add_param_group is not supported, because the transformation's state belongs to the "
                "parameters of the constructor; construct an OptaxOptimizer over all parameters, and select by name "
                "with optax.multi_transform"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters. If no parameter has a gradient and there is no group, do nothing.

        Args:
            closure: A function that reevaluates the model and returns the loss.

        Returns:
            The loss of the closure, if there is one.

        Raises:
            ValueError: if a parameter can no longer be shared with JAX.
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
            self._replace({name: updated[name] for name, each in self._named.items() if each.requires_grad})
        return loss

    def _replace(self, updated: dict[str, jax.Array]) -> None:
        """Point the parameters to the memory of updated arrays."""
        # The conversion waits for the program to finish, so torch may write to the gradients again.
        with torch.inference_mode(False):
            tensors = unshare(list(updated.values()))
        for name, tensor in zip(updated, tensors, strict=True):
            parameter = self._named[name]
            parameter.data = tensor
            # Like an in-place update: a backward pass that still needs the old value raises.
            torch.autograd.graph.increment_version(parameter)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the leaves of the transformation's state as tensors, by parameter.

        A leaf is named by its path in the state (``jax.tree_util.keystr``), in which ``[*]`` stands for the parameter's
        name: ``[0].mu[*]``. Leaves that belong to no single parameter, such as ``[0].count``, are in the state of each.
        """
        leaves = unshare([jnp.asarray(leaf) for leaf in jax.tree.leaves(self._state)])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for (name, index), leaf in zip(self._places(), leaves, strict=True):
            for number in self._indices(index):
                state.setdefault(number, {})[name] = leaf.clone()
        state = dict(sorted(state.items()))
        return {"state": state, "param_groups": [{"params": list(range(len(self._named)))}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the transformation's state with copies of saved leaves.

        If a leaf that belongs to no single parameter differs between the parameters, because only some were loaded, the
        loaded one is taken: the first that differs from the current state.

        Args:
            state_dict: The result of :meth:`state_dict` for the same transformation and parameters, also of earlier
                versions, which numbered the leaves.

        Raises:
            ValueError: if names, shapes or dtypes of the leaves differ; nothing is changed.
        """
        leaves, tree = jax.tree.flatten(self._state)
        state = cast(dict[int, dict[str, torch.Tensor]], state_dict["state"])
        places = self._places()
        numbered = {f"leaf{number}" for number in range(len(leaves))}
        if leaves and list(state) == [0] and state[0].keys() == numbered:
            found = [[state[0][f"leaf{number}"]] for number in range(len(leaves))]
        else:
            own = {(index, name) for name, place in places for index in self._indices(place)}
            saved = {(index, name) for index, values in state.items() for name in values}
            if own != saved:
                names = list(self._named)
                listed = [f"{names[index] if index < len(names) else index}: {name}" for index, name in own ^ saved]
                raise ValueError(
                    f"OptaxOptimizer: the saved state belongs to another transformation or to other parameters: only "
                    f"one of them has {sorted(listed)}"
                )
            found = [[state[index][name] for index in self._indices(place)] for name, place in places]
        for (name, _), leaf, candidates in zip(places, leaves, found, strict=True):
            for each in candidates:
                form = (tuple(each.shape), str(each.dtype).removeprefix("torch."))
                if form != (leaf.shape, leaf.dtype.name):
                    raise ValueError(
                        f"OptaxOptimizer: the saved state belongs to another transformation or to other parameters: "
                        f"{name}: expected {(leaf.shape, leaf.dtype.name)}, got {form}"
                    )
        (device,) = {parameter.device for parameter in self._named.values()}
        chosen = [_loaded(leaf, candidates) for leaf, candidates in zip(leaves, found, strict=True)]
        self._state = jax.tree.unflatten(tree, [to_jax(each.to(device), copy=True) for each in chosen])

    def _places(self) -> list[tuple[str, int | None]]:
        """Return, for each leaf of the state, its name and the index of its parameter; None: of all."""
        index_of = {name: index for index, name in enumerate(self._named)}
        places: list[tuple[str, int | None]] = []
        for path, _ in jax.tree_util.tree_flatten_with_path(self._state)[0]:
            of = [at for at, key in enumerate(path) if getattr(key, "key", None) in index_of]
            if not of:
                places.append((jax.tree_util.keystr(path), None))
                continue
            before, after = (jax.tree_util.keystr(part) for part in (path[: of[-1]], path[of[-1] + 1 :]))
            places.append((f"{before}[*]{after}", index_of[cast(Any, path[of[-1]]).key]))
        return places

    def _indices(self, place: int | None) -> list[int]:
        return list(range(len(self._named))) if place is None else [place]

    def _arrays(self) -> dict[str, jax.Array]:
        """Return the array views of the parameters, by name."""
        return {
            name: share(parameter.detach(), f"OptaxOptimizer: parameter {name!r}")
            for name, parameter in self._named.items()
        }

    def _gradient(self, name: str, parameter: torch.nn.Parameter) -> jax.Array:
        """Return the array view of a parameter's gradient: a copy if it cannot be shared, zeros if there is none."""
        gradient = parameter.grad
        if gradient is None:
            if name not in self._zeros:
                self._zeros[name] = to_jax(torch.zeros_like(parameter))
            return self._zeros[name]
        if not gradient.is_contiguous() or gradient.data_ptr() % ALIGNMENT:  # for example in a DDP bucket
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            count_copy()
        return share(gradient, f"OptaxOptimizer: the gradient of {name!r}")


def _loaded(leaf: jax.Array, candidates: list[torch.Tensor]) -> torch.Tensor:
    """Return the first candidate that differs from a leaf, or any if none does."""
    if len(candidates) > 1:
        current = unshare([leaf])[0]
        return next((each for each in candidates if not torch.equal(each.to(current.device), current)), candidates[0])
    return candidates[0]
