"""What happens in a call of a tower: arrays in, a program, tensors out, and torch's autograd told about it."""

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import jax
import torch

from ._imports import Imports
from ._programs import Forward, Jitted, Programs
from .dlpack import ALIGNMENT, count_copy, share, unshare, x64_is_on


class Caller:
    """Runs the programs of one tower.

    Args:
        programs: the tower's programs.
        where: what errors begin with.

    Attributes:
        copies: how many gradients, and tensors inside compiled graphs, had to be copied, because they came in memory
            that JAX cannot use.
    """

    def __init__(self, programs: Programs, where: str) -> None:
        self.programs = programs
        self.where = where
        self.copies = 0

    def note(self, error: Exception, kind: str) -> None:
        """Adds the tower's name to what its function, or its program, raised."""
        error.add_note(f"raised in the {kind} of {self.where}")

    def run(self, kind: str, program: Jitted, arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
        """Runs a program and takes its results.

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
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT or tensor.is_neg() or tensor.is_conj():
            tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            self.copies += 1
            count_copy()
        return share(tensor, f"{self.where}: {what}")


# The class below torch.autograd.Function, where torch has it: what `Function.apply` adds to it is for torch.func, which
# a tower refuses, and costs a little for each parameter.
_Function: Any = getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)


class Apply(_Function):  # type: ignore[misc]
    """A program of a tower and its backward, as one node of torch's graph."""

    @staticmethod
    def forward(
        ctx: Any, caller: Caller, imports: Imports, program: Forward, arrays: list[jax.Array], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(P + I leaves) → O outputs; saves what backward needs, and no more, where torch can watch and free it."""
        pool = [*tensors, *caller.run("forward", program.run, arrays)]
        outputs = pool[len(tensors) : len(tensors) + len(program.outputs)]
        ctx.caller, ctx.imports, ctx.program = caller, imports, program
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[pool[place] for place in program.saved])
        ctx.mark_non_differentiable(
            *[tensor for tensor, known in zip(outputs, program.outputs, strict=True) if not known.differentiable]
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """(O gradients, or None for zero) → (P + I gradients, None where none is wanted)."""
        caller, program = cast(Caller, ctx.caller), cast(Forward, ctx.program)
        given = tuple([gradient is not None for gradient in gradients])
        results: list[torch.Tensor] = []
        if any(given):
            # torch may run this in a thread of its own, where a `with jax.enable_x64()` around forward does not reach.
            with under_x64(program.x64):
                parameters = caller.programs.params_tree.num_leaves
                arrays = [
                    ctx.imports.share_one(place, tensor)
                    if place < parameters
                    else share(tensor, f"{caller.where}: saved tensor")
                    for place, tensor in zip(program.saved, ctx.saved_tensors, strict=True)
                ]
                arrays += [
                    caller.share_or_copy(gradient, "gradient of an output")
                    for gradient in gradients
                    if gradient is not None
                ]
                results = caller.run("backward", caller.programs.backward(program, given), arrays)
            if torch.is_grad_enabled():
                results = list(cast(Any, _Once).apply(caller.where, torch.zeros((), requires_grad=True), *results))
        taken = iter(results)
        return (None, None, None, None, *[next(taken, None) if want else None for want in program.wanted])


class _Once(torch.autograd.Function):
    """Passes gradients on under `create_graph=True`, and raises if they are differentiated in turn.

    Without it they would count as constants, and a gradient penalty would have no effect and no error.
    """

    @staticmethod
    def forward(ctx: Any, where: str, anchor: torch.Tensor, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.where = where
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"{ctx.where}: its gradients cannot be differentiated again (double backward); compute what needs second "
            "derivatives inside the JAX function, by jax.grad, and return it as an output"
        )


def under_x64(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which `jax_enable_x64` is as it was when a program was made."""
    return contextlib.nullcontext() if x64_is_on() == wanted else jax.enable_x64(wanted)
