"""A tower inside `torch.compile`: its programs as two operators that the compiler need not look into.

Dynamo traces torch, not JAX. So a tower's forward is called as a whole (`nonstrict_trace`) on tensors without values;
that finds the program for their shapes, gives it a number, and puts one operator with that number into the graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import torch

from recis_hybrid.bridge.tower._autograd import Caller, twice, under_x64
from recis_hybrid.bridge.tower._programs import Forward


@dataclasses.dataclass(frozen=True)
class Call:
    """What an operator's number stands for: a program, and shapes and dtypes of its leaves and results."""

    caller: Caller
    program: Forward
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]


_calls: list[Call] = []  # kept for good, as the graphs that torch compiles are
_numbers: dict[int, int] = {}  # by the program's id


def structs(tensors: Sequence[torch.Tensor]) -> list[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of tensors, as JAX takes them for tracing; symbolic sizes are specialised."""
    return [
        cast(Any, jax.ShapeDtypeStruct)(tuple(int(size) for size in tensor.shape), _name(tensor.dtype))
        for tensor in tensors
    ]


def number_of(caller: Caller, program: Forward, leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
    """The number under which the operators find a program."""
    number = _numbers.get(id(program))
    if number is None:
        with under_x64(program.x64):
            results = jax.eval_shape(program.run, *leaves)
        number = _numbers[id(program)] = len(_calls)
        _calls.append(Call(caller, program, tuple(leaves), tuple(results)))
    return number


@torch.library.custom_op("recis_bridge::tower_forward", mutates_args=())
def tower_forward(number: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run a forward program: leaves → outputs and the residuals that are neither leaves nor outputs."""
    call = _calls[number]
    with under_x64(call.program.x64):
        return call.caller.run("forward", call.program.run, _arrays(call.caller, tensors, "input"))


@torch.library.custom_op("recis_bridge::tower_backward", mutates_args=())
def tower_backward(
    number: int, given: list[bool], saved: list[torch.Tensor], gradients: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Run a backward program: what was saved, and the gradients that there are → gradients of wanted leaves."""
    call = _calls[number]
    with under_x64(call.program.x64):
        arrays = _arrays(call.caller, saved, "saved tensor")
        arrays += _arrays(call.caller, gradients, "gradient of an output")
        # Results of an operator must not share memory.
        backward = call.caller.programs.backward(call.program, tuple(given), stacked=False)
        return call.caller.run("backward", backward.run, arrays)


@tower_forward.register_fake
def _(number: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [_empty(struct, tensors) for struct in _calls[number].results]


@tower_backward.register_fake
def _(number: int, given: list[bool], saved: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    call = _calls[number]
    wanted = zip(call.leaves, call.program.wanted, strict=True)
    return [_empty(struct, gradients) for struct, want in wanted if want]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    number, tensors = inputs
    pool = [*tensors, *output]
    ctx.number = number
    ctx.save_for_backward(*[pool[place] for place in _calls[number].program.saved])


def _backward(ctx: Any, gradients: list[torch.Tensor | None]) -> tuple[None, list[torch.Tensor | None]]:
    program = _calls[ctx.number].program
    known = zip(gradients[: len(program.outputs)], program.outputs, strict=True)
    chosen = [gradient if output.differentiable else None for gradient, output in known]
    present = [gradient for gradient in chosen if gradient is not None]
    results: list[torch.Tensor] = []
    if present:
        given = [gradient is not None for gradient in chosen]
        results = tower_backward(ctx.number, given, list(ctx.saved_tensors), present)
    taken = iter(results)
    return None, [next(taken, None) if want else None for want in program.wanted]


def _keep_number(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.number = inputs[0]


def _refuse(ctx: Any, gradients: list[torch.Tensor | None]) -> None:
    raise twice(_calls[ctx.number].caller.where)


tower_forward.register_autograd(_backward, setup_context=_save)
tower_backward.register_autograd(_refuse, setup_context=_keep_number)


def traced() -> bool:
    """Return whether torch.compile or torch.export is tracing, also where Dynamo calls a function as a whole."""
    # Before torch 2.13, is_compiling() is true in code that Dynamo reads, and not in what it calls.
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


@functools.cache
def nonstrict(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that dynamo calls and does not look into; this loads torch's compiler, as any torch optimizer does."""
    from torch._dynamo import nonstrict_trace

    return nonstrict_trace(cast(Any, function))


@functools.cache
def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that dynamo leaves out of its graphs, and refuses under `fullgraph=True`."""
    reason = "a JaxTower with mutable state runs between graphs, because operators cannot write to its buffers"
    return cast(Callable[..., Any], torch.compiler.disable(function, reason=reason))


def _arrays(caller: Caller, tensors: list[torch.Tensor], what: str) -> list[jax.Array]:
    return [caller.share_or_copy(tensor, what) for tensor in tensors]


def _empty(struct: jax.ShapeDtypeStruct, beside: list[torch.Tensor]) -> torch.Tensor:
    device = beside[0].device if beside else None
    return torch.empty(struct.shape, dtype=getattr(torch, struct.dtype.name), device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
