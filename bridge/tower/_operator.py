"""Towers inside ``torch.compile``: their programs as two operators that are opaque to the compiler.

Dynamo traces torch, not JAX, so it calls a tower's forward as a whole (``nonstrict_trace``) on fake tensors. The call
looks up the program for their shapes, registers it under a number, and adds one operator with that number to the graph.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import torch

from recis_hybrid.bridge.tower._autograd import Runner, double_backward_error, x64_context
from recis_hybrid.bridge.tower._programs import Forward


@dataclasses.dataclass(frozen=True)
class Call:
    """A registered program, and the shapes and dtypes of its leaves and results."""

    runner: Runner
    program: Forward
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]


_calls: list[Call] = []  # by number; never removed, because torch's compiled graphs refer to them
_numbers: dict[int, int] = {}  # by the id of the program


def structs(tensors: Sequence[torch.Tensor]) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of tensors for tracing in JAX; symbolic sizes are specialized."""
    return [
        cast(Any, jax.ShapeDtypeStruct)(tuple(int(size) for size in tensor.shape), _name(tensor.dtype))
        for tensor in tensors
    ]


def register_call(runner: Runner, program: Forward, leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Return the number of a program, registering it on the first call."""
    number = _numbers.get(id(program))
    if number is None:
        with x64_context(program.x64):
            results = jax.eval_shape(program.run, *leaves)
        number = _numbers[id(program)] = len(_calls)
        _calls.append(Call(runner, program, tuple(leaves), tuple(results)))
    return number


@torch.library.custom_op("recis_bridge::tower_forward", mutates_args=())
def tower_forward(number: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run a forward program, from leaves to outputs and the residuals that are neither leaves nor outputs."""
    call = _calls[number]
    with x64_context(call.program.x64):
        return call.runner.run("forward", call.program.run, _arrays(call.runner, tensors, "input"))


@torch.library.custom_op("recis_bridge::tower_backward", mutates_args=())
def tower_backward(
    number: int, has_gradient: list[bool], saved: list[torch.Tensor], gradients: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Run a backward program, from saved tensors and gradients of outputs to gradients of leaves."""
    call = _calls[number]
    with x64_context(call.program.x64):
        arrays = _arrays(call.runner, saved, "saved tensor")
        arrays += _arrays(call.runner, gradients, "gradient of an output")
        # Results of an operator must not share memory.
        backward = call.runner.programs.backward(call.program, tuple(has_gradient), stacked=False)
        return call.runner.run("backward", backward.run, arrays)


@tower_forward.register_fake
def _(number: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [_empty(struct, tensors) for struct in _calls[number].results]


@tower_backward.register_fake
def _(
    number: int, has_gradient: list[bool], saved: list[torch.Tensor], gradients: list[torch.Tensor]
) -> list[torch.Tensor]:
    call = _calls[number]
    return [_empty(struct, gradients) for struct in itertools.compress(call.leaves, call.program.needs_grad)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    """Save the tensors that backward needs, and the number of the call."""
    number, tensors = inputs
    pool = [*tensors, *output]
    ctx.number = number
    ctx.save_for_backward(*[pool[place] for place in _calls[number].program.saved])


def _backward(ctx: Any, gradients: list[torch.Tensor | None]) -> tuple[None, list[torch.Tensor | None]]:
    """Return the gradients of the leaves."""
    program = _calls[ctx.number].program
    known = zip(gradients[: len(program.outputs)], program.outputs, strict=True)
    chosen = [gradient if output.differentiable else None for gradient, output in known]
    present = [gradient for gradient in chosen if gradient is not None]
    results: list[torch.Tensor] = []
    if present:
        has_gradient = [gradient is not None for gradient in chosen]
        results = tower_backward(ctx.number, has_gradient, list(ctx.saved_tensors), present)
    remaining = iter(results)
    return None, [next(remaining, None) if needs else None for needs in program.needs_grad]


def _keep_number(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    """Save the number of the call, for the error of a second differentiation."""
    ctx.number = inputs[0]


def _refuse(ctx: Any, gradients: list[torch.Tensor | None]) -> None:
    """Raise RuntimeError: second derivatives are not supported."""
    raise double_backward_error(_calls[ctx.number].runner.where)


tower_forward.register_autograd(_backward, setup_context=_save)
tower_backward.register_autograd(_refuse, setup_context=_keep_number)


def is_tracing() -> bool:
    """Return whether torch.compile or torch.export is tracing, including in functions that Dynamo calls as a whole."""
    # Before torch 2.13, is_compiling() is True in code that Dynamo traces, but not in functions that it calls.
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


@functools.cache
def nonstrict(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that Dynamo calls it as a whole. This loads torch's compiler, like every torch optimizer."""
    from torch._dynamo import nonstrict_trace

    return nonstrict_trace(cast(Any, function))


@functools.cache
def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that Dynamo keeps it out of graphs, and refuses it under ``fullgraph=True``."""
    reason = "a JaxTower with mutable state runs between graphs, because operators cannot write to its buffers"
    return cast(Callable[..., Any], torch.compiler.disable(function, reason=reason))


def _arrays(runner: Runner, tensors: list[torch.Tensor], what: str) -> list[jax.Array]:
    """Return the array views of tensors, or of copies where JAX cannot use their memory."""
    return [runner.share_or_copy(tensor, what) for tensor in tensors]


def _empty(struct: jax.ShapeDtypeStruct, arguments: list[torch.Tensor]) -> torch.Tensor:
    """Return an uninitialized tensor of a result's shape and dtype, on the device of the arguments."""
    device = arguments[0].device if arguments else None
    return torch.empty(struct.shape, dtype=getattr(torch, struct.dtype.name), device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
