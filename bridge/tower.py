"""JaxTower: a JAX function as an ordinary `torch.nn.Module`."""

from collections.abc import Callable
from typing import Any, cast

import jax
import torch

from ._autograd import Apply, Caller
from ._parameters import dotted, gather, plant
from ._programs import Forward, Programs
from .dlpack import share


class JaxTower(torch.nn.Module):
    r"""A `torch.nn.Module` that computes a JAX function, and its gradients, by one jitted call each.

    $$y = f(\theta, x_1, \dots, x_n)$$

    The parameters are torch's: ordinary `nn.Parameter`s, under the dotted names of the pytree's keys
    (`{"layers": [{"w": …}]}` gives `layers.0.w`), which torch optimizers, `state_dict` and `.to` treat as any others.
    Forward hands parameters and inputs to one jitted program, backward the residuals and gradients to another, all in
    the same memory. While gradients are off, forward is the plain function.

    Programs are compiled for each signature: structure, shapes and dtypes of the inputs, and which tensors want
    gradients. So a new batch size compiles twice.

    Args:
        f: `f(params, *inputs)`, a pure function of JAX that jit can trace; inputs and outputs are pytrees of arrays.
        params: a pytree of arrays of JAX, numpy or torch, which are copied. Floating ones become parameters, others
            buffers. 64-bit ones need `jax_enable_x64`.
        name: what errors and profiles call the tower; the function's name if it is not given.

    Raises:
        TypeError: if `f` is not callable, or a leaf of `params` is not an array.
        ValueError: if a leaf is of 64 bits while x64 is off, or names collide.

    Example:
        >>> import numpy as np
        >>> def linear(params, x):
        ...     return x @ params["w"] + params["b"]
        >>> tower = JaxTower(linear, {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)})
        >>> [name for name, _ in tower.named_parameters()]
        ['b', 'w']
        >>> tower(torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, f: Callable[..., Any], params: Any, *, name: str | None = None) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"JaxTower: f must be a function f(params, *inputs), got {type(f).__qualname__}")
        self._tower_name = name or str(getattr(f, "__name__", type(f).__name__))
        where = f"JaxTower {self._tower_name!r}"
        self._slots, tree = plant(self, params, where)
        self._caller = Caller(Programs(f, tree, self._tower_name), where)

    @property
    def compilations(self) -> int:
        """How many programs were compiled: each signature's forward, backward and plain forward count one, if used."""
        return self._caller.programs.compilations

    @property
    def copies(self) -> int:
        """How many gradients came in memory that JAX cannot use (expanded, strided, misaligned) and were copied."""
        return self._caller.copies

    def forward(self, *inputs: Any) -> Any:
        """Computes the function.

        Args:
            *inputs: pytrees of tensors, contiguous and starting at multiples of 64 bytes, on the parameters' device.
                Integers and booleans have no gradient; 64-bit tensors need `jax_enable_x64`.

        Returns:
            The function's outputs, a pytree of tensors in memory of their own. Integer and boolean ones have no
            gradient.

        Raises:
            TypeError: if a leaf of the inputs is not a tensor, if the function returns no arrays, or if a gradient is
                wanted and no output is floating.
            ValueError: if a parameter or an input cannot be shared with JAX.
            Exception: whatever the function raises, with a note of the tower's name.
        """
        leaves, inputs_tree = jax.tree.flatten(inputs)
        tensors = gather(self._slots) + leaves
        arrays = self._share(tensors, inputs)
        if torch.is_grad_enabled():
            wanted = tuple([tensor.requires_grad for tensor in tensors])
        else:
            wanted = (False,) * len(tensors)
        kinds = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
        device = tensors[0].device if tensors else None
        caller = self._caller
        try:
            program = caller.programs.forward((inputs_tree, wanted, kinds, device), arrays, inputs_tree, wanted)
        except Exception as error:
            caller.note(error, "forward")
            raise
        self._check_outputs(program)
        if any(wanted):
            outputs = cast(Any, Apply).apply(caller, program, arrays, *tensors)
        else:
            outputs = caller.run("forward", program.run, arrays)
        return jax.tree.unflatten(program.out_tree, outputs)

    def extra_repr(self) -> str:
        """The tower's name, for `repr`."""
        return repr(self._tower_name)

    def _share(self, tensors: list[torch.Tensor], inputs: tuple[Any, ...]) -> list[jax.Array]:
        try:
            return [share(tensor) for tensor in tensors]
        except (TypeError, ValueError):
            # Which of them it was, is only looked up now.
            labels = [f"parameter {name!r}" for name in dotted(self._slots, self)]
            paths, _ = jax.tree_util.tree_flatten_with_path(inputs)
            labels += [f"input{jax.tree_util.keystr(path)}" for path, _ in paths]
            for label, tensor in zip(labels, tensors, strict=True):
                share(tensor, f"{self._caller.where}: {label}")
            raise

    def _check_outputs(self, program: Forward) -> None:
        if not program.outputs:
            raise TypeError(f"{self._caller.where}: the function must return arrays, got {program.out_tree}")
        if any(program.wanted) and not any(output.differentiable for output in program.outputs):
            dtypes = ", ".join(output.dtype.name for output in program.outputs)
            raise TypeError(
                f"{self._caller.where}: gradients need a floating output, got {dtypes}; call the tower under "
                "torch.no_grad(), or let the function return what the loss needs"
            )
