"""Calls of a tower's programs, and their node in torch's autograd graph."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import jax
import torch

from recis_hybrid.bridge.exchange._array_cache import ArrayCache
from recis_hybrid.bridge.exchange.dlpack import ALIGNMENT, count_copy, share, unshare, x64_is_on
from recis_hybrid.bridge.tower._programs import Forward, Jitted, Programs


class Runner:
    """Calls of the programs of one tower.

    Args:
        programs: The tower's programs.
        where: The prefix of error messages.
        names: The parameters' dotted names.

    Attributes:
        copies: The number of gradients, and of tensors inside compiled graphs, that were copied because JAX could not
            use their memory.
    """

    def __init__(self, programs: Programs, where: str, names: Sequence[str]) -> None:
        self.programs = programs
        self.where = where
        self.names = tuple(names)
        self.copies = 0

    def note(self, error: Exception, kind: str) -> None:
        """Add the tower's name to an exception of its function or program.

        Args:
            error: The exception.
            kind: "forward", "backward" or "export".
        """
        error.add_note(f"raised in the {kind} of {self.where}")

    def run(self, kind: str, program: Jitted, arrays: Sequence[jax.Array]) -> list[torch.Tensor]:
        """Run a program and return its results as tensors in their memory.

        The conversion waits for the program to finish (on a GPU, it makes torch's stream wait), so torch may write to
        the arguments afterwards. ``arrays`` keeps the arguments alive until then.

        Args:
            kind: "forward" or "backward", for notes on exceptions.
            program: The jitted call.
            arrays: Its arguments.
        """
        try:
            return unshare(program(*arrays))
        except Exception as error:
            self.note(error, kind)
            raise

    def share_or_copy(self, tensor: torch.Tensor, what: str) -> jax.Array:
        """Return the array view of a tensor, or of a copy if JAX cannot use its memory. Copies are counted.

        For tensors whose layout the user does not control: gradients (that of ``y.sum()`` is expanded), and tensors
        between the operators of a compiled graph.

        Args:
            tensor: The tensor.
            what: Its name in error messages.

        Raises:
            RuntimeError: under a batching transformation of torch.
        """
        try:
            pointer = tensor.data_ptr()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.where}: {what} is batched (by is_grads_batched=True, jacobian(vectorize=True) or vmap), which "
                "does not work through a JAX function; pass gradients one by one, or use jax.jacobian inside the tower"
            ) from error
        if not tensor.is_contiguous() or pointer % ALIGNMENT or tensor.is_neg() or tensor.is_conj():
            tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            self.copies += 1
            count_copy()
        return share(tensor, f"{self.where}: {what}")

    def share_saved(self, program: Forward, cache: ArrayCache, place: int, tensor: torch.Tensor) -> jax.Array:
        """Return the array view of a saved tensor.

        Args:
            program: The forward program.
            cache: The array views of parameters.
            place: The tensor's index in the pool.
            tensor: The saved tensor.

        Raises:
            RuntimeError: if its shape or dtype has changed since forward (``tensor.data = …``), which torch does not
                detect.
        """
        if place >= len(program.specs):
            return share(tensor, f"{self.where}: saved tensor")
        if place < len(self.names):
            array, spec = cache.share_one(place, tensor)
        else:
            array, spec = share(tensor, f"{self.where}: saved tensor"), (tensor.shape, tensor.dtype)
        if spec != program.specs[place]:
            what = f"parameter {self.names[place]!r}" if place < len(self.names) else "an input"
            (shape, dtype), (new_shape, new_dtype) = program.specs[place], spec
            raise RuntimeError(
                f"{self.where}: {what} was {tuple(shape)}, {dtype} in forward and is {tuple(new_shape)}, {new_dtype} "
                "in backward; replace its memory before forward or after backward"
            )
        return array


# The base class of torch.autograd.Function, if torch has it. Function.apply adds support for torch.func, which costs
# time for each parameter and which towers refuse anyway.
_Function: Any = getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)


class Apply(_Function):  # type: ignore[misc]
    """A program of a tower and its backward, as one node of torch's autograd graph."""

    @staticmethod
    def forward(
        ctx: Any, runner: Runner, cache: ArrayCache, program: Forward, arrays: list[jax.Array], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Run the forward program and save the residuals with torch, which checks and frees them.

        Args:
            ctx: The node.
            runner: The calls of the tower's programs.
            cache: The array views of parameters.
            program: The forward program.
            arrays: The array views of the leaves.
            *tensors: The leaves.

        Returns:
            The outputs, and an empty tensor, the anchor of :class:`_OnceDifferentiable`.
        """
        pool = [*tensors, *runner.run("forward", program.run, arrays)]
        outputs = pool[len(tensors) : len(tensors) + len(program.outputs)]
        anchor = torch.empty(0)
        ctx.runner, ctx.cache, ctx.program = runner, cache, program
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(anchor, *[pool[place] for place in program.saved])
        ctx.mark_non_differentiable(
            *[tensor for tensor, known in zip(outputs, program.outputs, strict=True) if not known.differentiable]
        )
        return (*outputs, anchor)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raise RuntimeError: forward-mode differentiation is not supported."""
        raise RuntimeError(
            f"{ctx.runner.where}: forward-mode differentiation (torch.autograd.forward_ad) does not work through "
            "a JAX function; use jax.jvp inside the tower"
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Run the backward program.

        Args:
            ctx: The node.
            *gradients: The gradients of the outputs, None for zero, and that of the anchor.

        Returns:
            The gradients of the leaves, None for those that need none, after four None for the other arguments.
        """
        runner, program = cast(Runner, ctx.runner), cast(Forward, ctx.program)
        gradients = gradients[:-1]
        has_gradient = tuple([gradient is not None for gradient in gradients])
        results: list[torch.Tensor] = []
        if any(has_gradient):
            anchor, *saved = ctx.saved_tensors
            # torch may run this in another thread, where a `with jax.enable_x64()` around forward has no effect.
            with x64_context(program.x64):
                arrays = [
                    runner.share_saved(program, ctx.cache, place, tensor)
                    for place, tensor in zip(program.saved, saved, strict=True)
                ]
                arrays += [
                    runner.share_or_copy(gradient, "gradient of an output")
                    for gradient in gradients
                    if gradient is not None
                ]
                backward = runner.programs.backward(program, has_gradient, stacked=True)
                results = backward.split(runner.run("backward", backward.run, arrays))
            if torch.is_grad_enabled():
                # The results depend on the gradients and, through the anchor, an output of this node, on its leaves.
                sources = [anchor, *[gradient for gradient in gradients if gradient is not None]]
                results = list(cast(Any, _OnceDifferentiable).apply(runner.where, len(sources), *sources, *results))
        if results and program.trailing_constants is not None:
            return (None, None, None, None, *results, *(None,) * program.trailing_constants)
        remaining = iter(results)
        return (None, None, None, None, *[next(remaining, None) if needs else None for needs in program.needs_grad])


class _OnceDifferentiable(torch.autograd.Function):
    """Identity on gradients under ``create_graph=True`` that raises if they are differentiated again.

    Without it the gradients would count as constants, and a gradient penalty would silently have no effect. torch skips
    nodes that do not lead to the tensors with respect to which it differentiates, so this node depends on everything
    that the gradients depend on.
    """

    @staticmethod
    def forward(ctx: Any, where: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors after the first ``count``, which are the sources."""
        ctx.where = where
        return tuple(gradient.view_as(gradient) for gradient in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
        """Raise RuntimeError: second derivatives are not supported."""
        raise double_backward_error(ctx.where)


def double_backward_error(where: str) -> RuntimeError:
    """Return the error for a second differentiation."""
    return RuntimeError(
        f"{where}: its gradients cannot be differentiated again (double backward); compute second derivatives inside "
        "the JAX function with jax.grad, and return the result as an output"
    )


def x64_context(enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which ``jax_enable_x64`` has the value that it had when a program was traced."""
    return contextlib.nullcontext() if x64_is_on() == enabled else jax.enable_x64(enabled)
