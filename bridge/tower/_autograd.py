"""What happens in a call of a tower: arrays in, a program, tensors out, and torch's autograd told about it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import jax
import torch

from recis_hybrid.bridge.dlpack import ALIGNMENT, count_copy, share, unshare, x64_is_on
from recis_hybrid.bridge.exchange._array_cache import Imports
from recis_hybrid.bridge.tower._programs import Forward, Jitted, Programs


class Caller:
    """Runs the programs of one tower.

    Args:
        programs: the tower's programs.
        where: what errors begin with.
        names: the parameters' dotted names.

    Attributes:
        copies: how many gradients, and tensors inside compiled graphs, had to be copied, because they came in memory
            that JAX cannot use.
    """

    def __init__(self, programs: Programs, where: str, names: Sequence[str]) -> None:
        self.programs = programs
        self.where = where
        self.names = tuple(names)
        self.copies = 0

    def note(self, error: Exception, kind: str) -> None:
        """Add the tower's name to what its function, or its program, raised."""
        error.add_note(f"raised in the {kind} of {self.where}")

    def run(self, kind: str, program: Jitted, arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
        """Run a program and take its results.

        Taking a result waits for the whole program, so that torch may write to the arguments again afterwards; on a
        GPU it makes torch's stream wait. Until then `arrays` keeps them alive.
        """
        try:
            return unshare(program(*arrays))
        except Exception as error:
            self.note(error, kind)
            raise

    def share_or_copy(self, tensor: torch.Tensor, what: str) -> jax.Array:
        """Shares a tensor whose layout nobody could choose, and where JAX cannot use it a copy, which is counted.

        Such are gradients (`y.sum().backward()` sends an expanded one), and what lies between a compiler's operators.
        """
        try:
            pointer = tensor.data_ptr()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.where}: {what} stands for others, as under is_grads_batched=True, jacobian(vectorize=True) and "
                "vmap, which cannot look into a JAX function; send one gradient after the other, or use jax.jacobian "
                "inside the tower"
            ) from error
        if not tensor.is_contiguous() or pointer % ALIGNMENT or tensor.is_neg() or tensor.is_conj():
            tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            self.copies += 1
            count_copy()
        return share(tensor, f"{self.where}: {what}")

    def share_saved(self, program: Forward, imports: Imports, place: int, tensor: torch.Tensor) -> jax.Array:
        """Shares what forward saved, if it is still what it was.

        torch notices what was written to, but not that `tensor.data = …` has put another shape or dtype there.
        """
        if place >= len(program.kinds):
            return share(tensor, f"{self.where}: saved tensor")
        if place < len(self.names):
            array, kind = imports.share_one(place, tensor)
        else:
            array, kind = share(tensor, f"{self.where}: saved tensor"), (tensor.shape, tensor.dtype)
        if kind != program.kinds[place]:
            what = f"parameter {self.names[place]!r}" if place < len(self.names) else "an input"
            (shape, dtype), (other, now) = program.kinds[place], kind
            raise RuntimeError(
                f"{self.where}: {what} was {tuple(shape)}, {dtype} in forward and is {tuple(other)}, {now} in "
                "backward; exchange its memory before forward or after backward"
            )
        return array


# The class below torch.autograd.Function, where torch has it: what `Function.apply` adds to it is for torch.func, which
# a tower refuses, and costs a little for each parameter.
_Function: Any = getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)


class Apply(_Function):  # type: ignore[misc]
    """A program of a tower and its backward, as one node of torch's graph."""

    @staticmethod
    def forward(
        ctx: Any, caller: Caller, imports: Imports, program: Forward, arrays: list[jax.Array], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(P + I leaves) → O outputs, and an anchor, an empty one; saves what backward needs, and no more.

        Whatever is saved is saved where torch can watch and free it.
        """
        pool = [*tensors, *caller.run("forward", program.run, arrays)]
        outputs = pool[len(tensors) : len(tensors) + len(program.outputs)]
        anchor = torch.empty(0)
        ctx.caller, ctx.imports, ctx.program = caller, imports, program
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(anchor, *[pool[place] for place in program.saved])
        ctx.mark_non_differentiable(
            *[tensor for tensor, known in zip(outputs, program.outputs, strict=True) if not known.differentiable]
        )
        return (*outputs, anchor)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuses forward-mode differentiation."""
        raise RuntimeError(
            f"{ctx.caller.where}: forward-mode differentiation (torch.autograd.forward_ad) cannot look into a JAX "
            "function; use jax.jvp inside the tower"
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """(O gradients, or None for zero, and the anchor's) → (P + I gradients, None where none is wanted)."""
        caller, program = cast(Caller, ctx.caller), cast(Forward, ctx.program)
        gradients = gradients[:-1]
        given = tuple([gradient is not None for gradient in gradients])
        results: list[torch.Tensor] = []
        if any(given):
            anchor, *saved = ctx.saved_tensors
            # torch may run this in a thread of its own, where a `with jax.enable_x64()` around forward does not reach.
            with under_x64(program.x64):
                arrays = [
                    caller.share_saved(program, ctx.imports, place, tensor)
                    for place, tensor in zip(program.saved, saved, strict=True)
                ]
                arrays += [
                    caller.share_or_copy(gradient, "gradient of an output")
                    for gradient in gradients
                    if gradient is not None
                ]
                backward = caller.programs.backward(program, given, stacked=True)
                results = backward.apart(caller.run("backward", backward.run, arrays))
            if torch.is_grad_enabled():
                # All that the results depend on: the gradients, and by the anchor, an output of this node, its leaves.
                before = [anchor, *[gradient for gradient in gradients if gradient is not None]]
                results = list(cast(Any, _Once).apply(caller.where, len(before), *before, *results))
        if results and program.unwanted is not None:
            return (None, None, None, None, *results, *(None,) * program.unwanted)
        taken = iter(results)
        return (None, None, None, None, *[next(taken, None) if want else None for want in program.wanted])


class _Once(torch.autograd.Function):
    """Passes gradients on under `create_graph=True`, and raises if they are differentiated in turn.

    Without it they would count as constants, and a gradient penalty would have no effect and no error. torch leaves out
    nodes that lie on no way to what it differentiates by, so this one has to depend on all that the gradients do.
    """

    @staticmethod
    def forward(ctx: Any, where: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.where = where
        return tuple(gradient.view_as(gradient) for gradient in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        raise twice(ctx.where)


def twice(where: str) -> RuntimeError:
    """The error of a gradient that is differentiated in turn."""
    return RuntimeError(
        f"{where}: its gradients cannot be differentiated again (double backward); compute what needs second "
        "derivatives inside the JAX function, by jax.grad, and return it as an output"
    )


def under_x64(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which `jax_enable_x64` is as it was when a program was made."""
    return contextlib.nullcontext() if x64_is_on() == wanted else jax.enable_x64(wanted)
