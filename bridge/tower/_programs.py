"""A JAX function as two jitted programs: forward, which also returns the residuals, and backward.

``jax.vjp`` returns a function that holds its residuals. Returned from a jitted call, that function would contain a copy
of every weight and input, because the outputs of an executable never share memory with its inputs. So the trace of
``jax.vjp`` is examined first. Residuals that are inputs or outputs of the function are recorded as such, constants are
kept as constants, and the forward program returns only the remaining residuals.

Legend: a leaf is one tensor of the parameters, inputs or keywords, in that order; the pool of a call is its leaves,
followed by its outputs and its other residuals; the spec of a tensor is its shape and dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import Literal, jaxpr_as_fun

from recis_hybrid.bridge.exchange._array_cache import Spec
from recis_hybrid.bridge.exchange.dlpack import ALIGNMENT, x64_is_on
from recis_hybrid.bridge.tower._keywords import as_key

_STACKED_FROM, _STACKED_BYTES = 4, 16384

Jitted = Callable[..., list[jax.Array]]
Remat = bool | Callable[..., bool] | None


@dataclasses.dataclass(frozen=True)
class Output:
    """Shape and dtype of one output of the function."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def differentiable(self) -> bool:
        """True for a floating-point or complex output, which can have a gradient."""
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))


@dataclasses.dataclass(frozen=True)
class Residual:
    """The source of one residual in backward: the saved tensor at index ``place``, or ``constant`` if it is None."""

    place: int | None = None
    constant: Any = None
    key_impl: Any = None
    """Implementation of a typed PRNG key, of which only the data is saved."""


@dataclasses.dataclass(frozen=True, eq=False)
class Backward:
    """The backward program for one signature and one set of outputs that have a gradient.

    Small gradients of one spec are returned as one stacked array, because converting each of them takes longer than
    computing it.

    Attributes:
        run: The jitted call, from saved tensors and gradients of outputs to stacked gradients, followed by single
            ones.
        stacks: The number of stacks.
        order: For each leaf that needs a gradient, its index among the gradients after the stacks are split.
    """

    run: Jitted
    stacks: int
    order: tuple[int, ...]

    def split(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of the leaves that need one, in order, from the results of the program."""
        if not self.stacks:
            return list(results)
        # .data detaches the parts from the stack, so that a write to one does not bump the version of the others.
        parts = [part.data for stack in results[: self.stacks] for part in stack.unbind()]
        return list(operator.itemgetter(*self.order)([*parts, *results[self.stacks :]]))


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """The forward program of one signature.

    Attributes:
        run: The jitted call, from leaves to outputs followed by the new residuals.
        specs: The spec of each leaf.
        outputs: The outputs of the function.
        out_tree: The structure of the outputs.
        needs_grad: For each leaf, whether it needs a gradient.
        saved: The indices in the pool of the tensors to save for backward.
        residuals: The leaves of the function returned by ``jax.vjp``.
        vjp_tree: The structure of that function.
        x64: Whether ``jax_enable_x64`` was on.
        backwards: The backward programs; the key says which outputs have a gradient, and whether results may share
            memory.
    """

    run: Jitted
    specs: tuple[Spec, ...]
    outputs: tuple[Output, ...]
    out_tree: jax.tree_util.PyTreeDef
    needs_grad: tuple[bool, ...]
    saved: tuple[int, ...]
    residuals: tuple[Residual, ...]
    vjp_tree: jax.tree_util.PyTreeDef | None
    x64: bool
    backwards: dict[tuple[tuple[bool, ...], bool], Backward] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def trailing_constants(self) -> int | None:
        """The number of leaves without a gradient if they are all at the end, else None."""
        count = self.needs_grad.count(True)
        return len(self.needs_grad) - count if all(self.needs_grad[:count]) else None


class Programs:
    """The programs of one JAX function, traced on first use and cached.

    Args:
        f: The function, ``f(params, *inputs, **keywords, **static)``.
        params_tree: The structure of its first argument.
        name: The name of the programs in profiles.
        state_tree: The structure of its mutable state, or None; with state it returns ``(outputs, state)``.
        remat: Whether backward recomputes residuals: True for all, or a policy of ``jax.checkpoint_policies``.

    Attributes:
        compilations: The number of programs traced and compiled.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        params_tree: jax.tree_util.PyTreeDef,
        name: str,
        state_tree: jax.tree_util.PyTreeDef | None = None,
        remat: Remat = None,
    ) -> None:
        self.f = f
        self.params_tree = params_tree
        self.state_tree = state_tree
        self.remat = remat
        self.name = "".join(letter if letter.isalnum() else "_" for letter in name)
        self.compilations = 0
        self._forwards: dict[Hashable, Forward] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        """Return the same object, because a copied module computes the same function and shares compiled programs."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the compiled programs, which belong to this process."""
        return self.__dict__ | {"_forwards": {}, "compilations": 0}

    def forward(
        self,
        signature: Hashable,
        arrays: Sequence[jax.Array],
        specs: Sequence[Spec],
        inputs_tree: jax.tree_util.PyTreeDef,
        needs_grad: tuple[bool, ...],
        static: Mapping[str, Any],
    ) -> Forward:
        """Return the forward program of a signature, which is traced on the first call.

        Args:
            signature: Everything that the program depends on besides the function: structure, shapes, dtypes, device,
                and which leaves need gradients.
            arrays: The leaves; only their shapes and dtypes are used.
            specs: The spec of each leaf.
            inputs_tree: The structure of ``(inputs, keywords)``.
            needs_grad: For each leaf, whether it needs a gradient; if none does, there is no backward.
            static: Keyword arguments that are not arrays.
        """
        x64 = x64_is_on()
        known = self._forwards.get((x64, signature))
        if known is None:
            # If several threads trace one signature concurrently, all use the program of the first.
            traced = self._trace(arrays, specs, inputs_tree, needs_grad, static, x64)
            known = self._forwards.setdefault((x64, signature), traced)
        return known

    def backward(self, forward: Forward, has_gradient: tuple[bool, ...], *, stacked: bool) -> Backward:
        """Return the backward program of a forward program, which is traced on the first call.

        It maps the saved tensors, followed by the gradients of outputs, to the gradients of leaves.

        Args:
            forward: The forward program.
            has_gradient: For each output, whether it has a gradient; otherwise its gradient is zero.
            stacked: True if gradients may share a buffer.
        """
        known = forward.backwards.get((has_gradient, stacked))
        if known is None:
            groups = _groups(forward) if stacked else []
            pullback = self._pullback(forward, has_gradient)

            def backward(*arguments: Any) -> list[Any]:
                gradients = pullback(*arguments)
                grouped = {place for group in groups for place in group}
                stacks = [jnp.stack([gradients[place] for place in group]) for group in groups]
                return stacks + [each for place, each in enumerate(gradients) if place not in grouped]

            places = [place for group in groups for place in group]
            places += sorted(set(range(forward.needs_grad.count(True))) - set(places))
            order = tuple(places.index(place) for place in range(len(places)))
            program = Backward(self._jit("backward", backward), len(groups), order)
            known = forward.backwards.setdefault((has_gradient, stacked), program)
        return known

    def function(self, inputs_tree: jax.tree_util.PyTreeDef, static: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the function from leaves (parameters, inputs, keywords) to outputs, or ``(outputs, state)``.

        Args:
            inputs_tree: The structure of ``(inputs, keywords)``.
            static: Keyword arguments that are not arrays.
        """

        def apply(*leaves: Any) -> Any:
            params = jax.tree.unflatten(self.params_tree, leaves[: self.params_tree.num_leaves])
            inputs, keywords = jax.tree.unflatten(inputs_tree, leaves[self.params_tree.num_leaves :])
            if keywords.get("key") is not None:
                keywords["key"] = as_key(keywords["key"])
            outputs = self.f(params, *inputs, **keywords, **static)
            return outputs if self.state_tree is None else _with_state(outputs, keywords["state"])

        if not self.remat:
            return apply
        return jax.checkpoint(apply, policy=None if self.remat is True else self.remat)

    def _trace(
        self,
        arrays: Sequence[jax.Array],
        specs: Sequence[Spec],
        inputs_tree: jax.tree_util.PyTreeDef,
        needs_grad: tuple[bool, ...],
        static: Mapping[str, Any],
        x64: bool,
    ) -> Forward:
        """Trace the function, and determine the results of its forward program."""
        apply = self.function(inputs_tree, static)

        def with_residuals(*leaves: Any) -> tuple[Any, Any]:
            if not any(needs_grad):
                return apply(*leaves), None

            def of_differentiable(*chosen: Any) -> Any:
                source = iter(chosen)
                return apply(*(next(source) if needs else leaf for leaf, needs in zip(leaves, needs_grad, strict=True)))

            return jax.vjp(of_differentiable, *itertools.compress(leaves, needs_grad))

        closed, (out_shapes, vjp_shape) = jax.make_jaxpr(with_residuals, return_shape=True)(*arrays)
        shapes, out_tree = jax.tree.flatten(out_shapes)
        outputs = tuple(Output(tuple(each.shape), each.dtype) for each in shapes)
        vjp_leaves, vjp_tree = jax.tree.flatten(vjp_shape)

        pool: dict[Any, int] = {}
        for place, variable in enumerate([*closed.invars, *closed.outvars[: len(outputs)]]):
            if not isinstance(variable, Literal):
                pool.setdefault(variable, place)
        constants = dict(zip(closed.constvars, closed.consts, strict=True))
        returned = list(range(len(outputs)))
        saved: list[int] = []
        residuals = []
        for position, variable in enumerate(closed.outvars[len(outputs) :], start=len(outputs)):
            dtype = vjp_leaves[position - len(outputs)].dtype
            impl = jax.random.key_impl(jnp.empty(0, dtype)) if jnp.issubdtype(dtype, jax.dtypes.prng_key) else None
            if isinstance(variable, Literal):
                residuals.append(Residual(constant=np.asarray(variable.val, dtype)))
            elif variable in constants:
                residuals.append(Residual(constant=constants[variable]))
            else:
                if variable not in pool:
                    pool[variable] = len(arrays) + len(returned)
                    returned.append(position)
                if pool[variable] not in saved:
                    saved.append(pool[variable])
                residuals.append(Residual(place=saved.index(pool[variable]), key_impl=impl))

        evaluate = jaxpr_as_fun(closed)

        def forward(*leaves: Any) -> list[Any]:
            values = evaluate(*leaves)
            return [_data(values[position]) for position in returned]

        return Forward(
            run=self._jit("forward", forward),
            specs=tuple(specs),
            outputs=outputs,
            out_tree=out_tree,
            needs_grad=needs_grad,
            saved=tuple(saved),
            residuals=tuple(residuals),
            vjp_tree=vjp_tree if any(needs_grad) else None,
            x64=x64,
        )

    def _pullback(self, forward: Forward, has_gradient: tuple[bool, ...]) -> Callable[..., list[Any]]:
        """Return the function from saved tensors and gradients of outputs to gradients of leaves."""

        def backward(*arguments: Any) -> list[Any]:
            saved, gradients = arguments[: len(forward.saved)], iter(arguments[len(forward.saved) :])
            pullback = jax.tree.unflatten(forward.vjp_tree, [_find(residual, saved) for residual in forward.residuals])
            cotangents = [
                _conjugate(next(gradients)) if has else _zero(output)
                for output, has in zip(forward.outputs, has_gradient, strict=True)
            ]
            return [_conjugate(each) for each in pullback(jax.tree.unflatten(forward.out_tree, cotangents))]

        return backward

    def _jit(self, kind: str, function: Callable[..., list[Any]]) -> Jitted:
        """Jit a function under the tower's name, and count its compilations."""

        def counted(*arguments: Any) -> list[Any]:
            self.compilations += 1  # runs only when jit traces, once for each program
            return function(*arguments)

        counted.__name__ = counted.__qualname__ = f"{self.name}_{kind}"
        return jax.jit(counted)


def _with_state(returned: Any, before: Any) -> tuple[Any, Any]:
    """Check the result of a function with state, and stop gradients from one step's state to the next."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            f"a function with state must return (outputs, state), got {type(returned).__qualname__}; return the state "
            "even if it is unchanged"
        )
    describe = functools.partial(jax.tree.map, lambda leaf: (jnp.shape(leaf), str(jnp.result_type(leaf))))
    if describe(returned[1]) != describe(before):
        raise TypeError(
            f"the state must keep its structure, shapes and dtypes, {describe(before)}, got {describe(returned[1])}; "
            "return a state like the one received"
        )
    return returned[0], jax.tree.map(jax.lax.stop_gradient, returned[1])


def _groups(forward: Forward) -> list[list[int]]:
    """Return groups of gradients to stack, as indices into the gradients of leaves."""
    by_spec: dict[Spec, list[int]] = {}
    for place, spec in enumerate(itertools.compress(forward.specs, forward.needs_grad)):
        shape, dtype = spec
        size = math.prod(shape) * dtype.itemsize  # under torch.compile shapes are plain tuples
        # Each gradient must start at an address that JAX accepts, for example in an optimizer.
        if 0 < size <= _STACKED_BYTES and size % ALIGNMENT == 0:
            by_spec.setdefault(spec, []).append(place)
    return [places for places in by_spec.values() if len(places) >= _STACKED_FROM]


def _data(value: Any) -> Any:
    """Return the data of a typed PRNG key, which DLPack does not support, and any other value unchanged."""
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def _find(residual: Residual, saved: Sequence[Any]) -> Any:
    """Return the value of a residual."""
    if residual.place is None:
        return residual.constant
    value = saved[residual.place]
    return value if residual.key_impl is None else jax.random.wrap_key_data(value, impl=residual.key_impl)


def _zero(output: Output) -> Any:
    """Return the zero gradient of an output."""
    if output.differentiable:
        return jnp.zeros(output.shape, output.dtype)
    return np.zeros(output.shape, jax.dtypes.float0)


def _conjugate(value: Any) -> Any:
    """Convert a gradient between the complex conventions of torch and JAX."""
    # The gradient of a real loss at x + iy is dx + i·dy in torch, and dx - i·dy in JAX.
    return jnp.conj(value) if jnp.iscomplexobj(value) else value
