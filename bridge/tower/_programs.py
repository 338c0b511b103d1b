"""A JAX function as two jitted programs: forward, which also returns what backward needs, and backward.

`jax.vjp` gives a function that holds its residuals. Returned from a jitted call as it is, that function would carry a
copy of every weight and input, because an output of an executable never shares memory with its inputs. So the trace
of `jax.vjp` is looked at first: a residual that is an input or an output of the function is remembered as such, a
constant is kept as a constant, and the forward program returns only the others.

Legend: a leaf is one tensor of the parameters or inputs, in their order; the pool of a call is its leaves, then its
outputs, then its other residuals.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import Literal, jaxpr_as_fun

from recis_hybrid.bridge.dlpack import ALIGNMENT, x64_is_on
from recis_hybrid.bridge.exchange._array_cache import Kind
from recis_hybrid.bridge.tower._keywords import as_key

_STACKED_FROM, _STACKED_BYTES = 4, 16384

Jitted = Callable[..., list[jax.Array]]
Remat = bool | Callable[..., bool] | None


@dataclasses.dataclass(frozen=True)
class Output:
    """What is known of one output of the function: all but its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def differentiable(self) -> bool:
        """Whether a gradient can come back to it."""
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))


@dataclasses.dataclass(frozen=True)
class Residual:
    """Where backward finds one residual: at `place` of what was saved, or, if there is none, in `constant`."""

    place: int | None = None
    constant: Any = None
    key_impl: Any = None  # of a typed PRNG key, which crosses as its data


@dataclasses.dataclass(frozen=True, eq=False)
class Backward:
    """The backward program of one signature, and of one choice of outputs that have a gradient.

    Small gradients of one shape and dtype come as one array: to make an array of each, and a tensor of that, takes
    longer than to compute it.

    Attributes:
        run: the jitted call, what was saved and gradients of outputs → stacks of gradients, then single ones.
        stacks: how many stacks there are.
        order: for each wanted leaf, where its gradient is once the stacks are taken apart.
    """

    run: Jitted
    stacks: int
    order: tuple[int, ...]

    def apart(self, made: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients of the wanted leaves, in their order, of what the program made."""
        if not self.stacks:
            return list(made)
        # By .data, no views of the stack: what is written to one gradient is no change of the others.
        parts = [part.data for stack in made[: self.stacks] for part in stack.unbind()]
        return list(operator.itemgetter(*self.order)([*parts, *made[self.stacks :]]))


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """The forward program of one signature.

    Attributes:
        run: the jitted call, leaves → outputs followed by the new residuals.
        kinds: for each leaf, its shape and dtype.
        outputs: one entry for each output.
        out_tree: the structure of the outputs.
        wanted: for each leaf, whether it gets a gradient.
        saved: the places in the pool that backward needs.
        residuals: the leaves of `jax.vjp`'s function, by places in what was saved.
        vjp_tree: the structure of `jax.vjp`'s function.
        x64: whether `jax_enable_x64` was on.
        backwards: the backward programs, by which outputs have a gradient, and whether results may share memory.
        unwanted: how many leaves come after those that get a gradient; None where others lie between.
    """

    run: Jitted
    kinds: tuple[Kind, ...]
    outputs: tuple[Output, ...]
    out_tree: jax.tree_util.PyTreeDef
    wanted: tuple[bool, ...]
    saved: tuple[int, ...]
    residuals: tuple[Residual, ...]
    vjp_tree: jax.tree_util.PyTreeDef | None
    x64: bool
    backwards: dict[tuple[tuple[bool, ...], bool], Backward] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def unwanted(self) -> int | None:
        count = self.wanted.count(True)
        return len(self.wanted) - count if all(self.wanted[:count]) else None


class Programs:
    """The programs of one JAX function, made when first needed and kept.

    Args:
        f: the function, `f(params, *inputs, **supplied, **static)`.
        params_tree: the structure of its first argument.
        name: what the programs are called in profiles.
        state_tree: the structure of its mutable state, if it has one; it then returns `(outputs, state)`.
        remat: whether backward computes the residuals again: True for all, a policy of `jax.checkpoint_policies` for
            those that it names.

    Attributes:
        compilations: how many programs have been traced, and so compiled.
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
        # A copy of a module computes the same function, so it shares what has been compiled.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled is of this process; another one compiles for itself.
        return self.__dict__ | {"_forwards": {}, "compilations": 0}

    def forward(
        self,
        signature: Hashable,
        arrays: Sequence[jax.Array],
        kinds: Sequence[Kind],
        inputs_tree: jax.tree_util.PyTreeDef,
        wanted: tuple[bool, ...],
        static: Mapping[str, Any],
    ) -> Forward:
        """The forward program of a signature.

        Args:
            signature: all that the program depends on besides the function: structure, shapes, dtypes, device, which
                leaves want gradients.
            arrays: the leaves, of which only shapes and dtypes are looked at.
            kinds: for each leaf, its shape and dtype as torch has them.
            inputs_tree: the structure of the tuple of inputs and of what is supplied by keyword: `(inputs, supplied)`.
            wanted: for each leaf, whether it gets a gradient; if none does, backward is impossible.
            static: keyword arguments that are no arrays.

        Returns:
            The program, made by tracing the function if this is the signature's first call.
        """
        x64 = x64_is_on()
        known = self._forwards.get((x64, signature))
        if known is None:
            # Of threads that trace one signature at once, all go on with the first one's program.
            traced = self._trace(arrays, kinds, inputs_tree, wanted, static, x64)
            known = self._forwards.setdefault((x64, signature), traced)
        return known

    def backward(self, forward: Forward, given: tuple[bool, ...], *, stacked: bool) -> Backward:
        """The backward program: (what was saved, then the gradients that are given) → gradients of wanted leaves.

        Args:
            forward: the forward program that went before.
            given: for each output, whether it has a gradient; one that has none counts as zero.
            stacked: whether gradients may lie in one buffer.

        Returns:
            The program.
        """
        known = forward.backwards.get((given, stacked))
        if known is None:
            groups = _groups(forward) if stacked else []
            pullback = self._pullback(forward, given)

            def backward(*arguments: Any) -> list[Any]:
                made = pullback(*arguments)
                inside = {place for group in groups for place in group}
                stacks = [jnp.stack([made[place] for place in group]) for group in groups]
                return stacks + [each for place, each in enumerate(made) if place not in inside]

            laid = [place for group in groups for place in group]
            laid += sorted(set(range(forward.wanted.count(True))) - set(laid))
            order = tuple(laid.index(place) for place in range(len(laid)))
            made = Backward(self._jit("backward", backward), len(groups), order)
            known = forward.backwards.setdefault((given, stacked), made)
        return known

    def function(self, inputs_tree: jax.tree_util.PyTreeDef, static: Mapping[str, Any]) -> Callable[..., Any]:
        """The function of leaves: (parameters, inputs, supplied) → outputs, or (outputs, state)."""

        def apply(*leaves: Any) -> Any:
            params = jax.tree.unflatten(self.params_tree, leaves[: self.params_tree.num_leaves])
            inputs, supplied = jax.tree.unflatten(inputs_tree, leaves[self.params_tree.num_leaves :])
            if supplied.get("key") is not None:
                supplied["key"] = as_key(supplied["key"])
            outputs = self.f(params, *inputs, **supplied, **static)
            return outputs if self.state_tree is None else _with_state(outputs, supplied["state"])

        if not self.remat:
            return apply
        return jax.checkpoint(apply, policy=None if self.remat is True else self.remat)

    def _trace(
        self,
        arrays: Sequence[jax.Array],
        kinds: Sequence[Kind],
        inputs_tree: jax.tree_util.PyTreeDef,
        wanted: tuple[bool, ...],
        static: Mapping[str, Any],
        x64: bool,
    ) -> Forward:
        apply = self.function(inputs_tree, static)

        def with_residuals(*leaves: Any) -> tuple[Any, Any]:
            if not any(wanted):
                return apply(*leaves), None

            def of_wanted(*chosen: Any) -> Any:
                source = iter(chosen)
                return apply(*(next(source) if want else leaf for leaf, want in zip(leaves, wanted, strict=True)))

            return jax.vjp(of_wanted, *(leaf for leaf, want in zip(leaves, wanted, strict=True) if want))

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
            return [_plain(values[position]) for position in returned]

        return Forward(
            run=self._jit("forward", forward),
            kinds=tuple(kinds),
            outputs=outputs,
            out_tree=out_tree,
            wanted=wanted,
            saved=tuple(saved),
            residuals=tuple(residuals),
            vjp_tree=vjp_tree if any(wanted) else None,
            x64=x64,
        )

    def _pullback(self, forward: Forward, given: tuple[bool, ...]) -> Callable[..., list[Any]]:
        def backward(*arguments: Any) -> list[Any]:
            saved, gradients = arguments[: len(forward.saved)], iter(arguments[len(forward.saved) :])
            pullback = jax.tree.unflatten(forward.vjp_tree, [_find(residual, saved) for residual in forward.residuals])
            cotangents = [
                _conjugate(next(gradients)) if is_given else _zero(output)
                for output, is_given in zip(forward.outputs, given, strict=True)
            ]
            return [_conjugate(each) for each in pullback(jax.tree.unflatten(forward.out_tree, cotangents))]

        return backward

    def _jit(self, kind: str, function: Callable[..., list[Any]]) -> Jitted:
        def counted(*arguments: Any) -> list[Any]:
            self.compilations += 1  # runs when jit traces, once for each program
            return function(*arguments)

        counted.__name__ = counted.__qualname__ = f"{self.name}_{kind}"
        return jax.jit(counted)


def _with_state(returned: Any, before: Any) -> tuple[Any, Any]:
    """What a function with state returned, checked; no gradient goes from one step's state to the next."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            f"a function with state must return (outputs, state), got {type(returned).__qualname__}; return the state "
            "as it came where it does not change"
        )
    describe = functools.partial(jax.tree.map, lambda leaf: (jnp.shape(leaf), str(jnp.result_type(leaf))))
    if describe(returned[1]) != describe(before):
        raise TypeError(
            f"the state that came back, {describe(returned[1])}, is not like the one that went in, {describe(before)}; "
            "return a state of the same structure, shapes and dtypes"
        )
    return returned[0], jax.tree.map(jax.lax.stop_gradient, returned[1])


def _groups(forward: Forward) -> list[list[int]]:
    """The gradients that are to be stacked, by their places among those of the wanted leaves."""
    by_kind: dict[Kind, list[int]] = {}
    for place, kind in enumerate(kind for kind, want in zip(forward.kinds, forward.wanted, strict=True) if want):
        shape, dtype = kind
        size = math.prod(shape) * dtype.itemsize  # under torch.compile shapes are plain tuples
        # Each is to begin where JAX can use it again.
        if 0 < size <= _STACKED_BYTES and size % ALIGNMENT == 0:
            by_kind.setdefault(kind, []).append(place)
    return [places for places in by_kind.values() if len(places) >= _STACKED_FROM]


def _plain(value: Any) -> Any:
    """The data of a typed PRNG key, which DLPack does not know; anything else as it is."""
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def _find(residual: Residual, saved: Sequence[Any]) -> Any:
    if residual.place is None:
        return residual.constant
    value = saved[residual.place]
    return value if residual.key_impl is None else jax.random.wrap_key_data(value, impl=residual.key_impl)


def _zero(output: Output) -> Any:
    if output.differentiable:
        return jnp.zeros(output.shape, output.dtype)
    return np.zeros(output.shape, jax.dtypes.float0)


def _conjugate(value: Any) -> Any:
    # The gradient of a real loss at x + iy is dx + i·dy to torch, dx - i·dy to JAX.
    return jnp.conj(value) if jnp.iscomplexobj(value) else value
