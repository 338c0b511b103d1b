"""JaxTower: a JAX function as an ordinary ``torch.nn.Module``."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import torch

from recis_hybrid.bridge.exchange._array_cache import ArrayCache
from recis_hybrid.bridge.exchange.dlpack import share
from recis_hybrid.bridge.tower import _export
from recis_hybrid.bridge.tower._autograd import Apply, Runner
from recis_hybrid.bridge.tower._keywords import draw_key, keyword_names, static_signature
from recis_hybrid.bridge.tower._operator import eager, is_tracing, nonstrict, register_call, structs, tower_forward
from recis_hybrid.bridge.tower._padding import Dims, Padding
from recis_hybrid.bridge.tower._parameters import Slot, dotted_names, gather, register_leaves
from recis_hybrid.bridge.tower._programs import Forward, Programs, Remat

_LISTED_LEAVES = 20
"""The number of leaves that ``repr`` lists."""

_next_number = itertools.count()
_towers: weakref.WeakValueDictionary[int, JaxTower] = weakref.WeakValueDictionary()
_requires_grad = operator.attrgetter("requires_grad")
_functorch_is_active = cast(Any, torch._C)._are_functorch_transforms_active


class JaxTower(torch.nn.Module):
    r"""A ``torch.nn.Module`` that computes a JAX function and its gradients, with one jitted call each.

    $$y = f(\theta, x_1, \dots, x_n)$$

    The parameters are ordinary parameters of the module, under the dotted names of the pytree's keys
    (``{"layers": [{"w": …}]}`` becomes ``layers.0.w``), which torch optimizers, ``state_dict`` and ``.to`` treat like
    any others. Forward passes parameters and inputs to one jitted program, and backward passes residuals and gradients
    to another, all in shared memory. With gradients disabled, forward is the plain function. A parameter that ``f``
    does not use gets a gradient of zeros, not None, so weight decay still changes it. Second derivatives are refused.

    If ``f`` has one of these keyword-only parameters, the tower passes it:

    - ``key``: a PRNG key for dropout, drawn from torch's generator (``torch.manual_seed``) in each call; None in eval
      mode.
    - ``train``: bool, the module's mode.
    - ``masks``: a dictionary from the names of ``classes`` to bool arrays ``(size,)``, True where the input is not
      padding.
    - ``state``: the mutable state, if the tower has one; ``f`` then returns ``(outputs, state)``. In train mode the new
      state is stored in buffers. No gradient flows through it from one call to the next.

    Programs are compiled for each signature: structure, shapes and dtypes of the inputs, static keywords, mode, and
    which tensors need gradients. A new batch size therefore triggers two compilations, unless ``classes`` bounds the
    sizes.

    Args:
        f: ``f(params, *inputs, **keywords)``, a pure JAX function that jit can trace; inputs and outputs are pytrees of
            arrays. Keywords passed to a call are static.
        params: A pytree of JAX, numpy or torch arrays, which are copied. Floating-point arrays become parameters,
            others buffers. 64-bit arrays need ``jax_enable_x64``.
        copy: False to use torch tensors of ``params`` themselves. Parameters then belong to several modules, as in
            ``JaxTower(f, dict(module.named_parameters()), copy=False)``, and an update of one updates all.
        state: A pytree of arrays that ``f`` updates (batch statistics), copied to buffers.
        dims: For each positional input, the names of its leading dimensions, None for those never padded:
            ``[("batch",), ("batch", "length")]``. A name stands for one size in all inputs.
        classes: The sizes to which inputs are padded with zeros, by name; None for powers of two of at least 8. The
            axes of outputs that have a padded size are trimmed; an axis that depends on one in another way is an error.
        remat: True to recompute residuals in backward instead of saving them, or a policy of
            ``jax.checkpoint_policies`` that selects the residuals to save.
        name: The tower's name in errors and profiles; by default the function's name.

    Raises:
        TypeError: if ``f`` is not callable, or a leaf of ``params`` is not an array.
        ValueError: if a leaf is 64-bit while x64 is off, names collide, or ``dims`` and ``classes`` disagree.

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

    def __init__(
        self,
        f: Callable[..., Any],
        params: Any,
        *,
        copy: bool = True,
        state: Any = None,
        dims: Dims | None = None,
        classes: Mapping[str, Sequence[int] | None] | None = None,
        remat: Remat = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"JaxTower: f must be a function f(params, *inputs), got {type(f).__qualname__}")
        self._tower_name = name or str(getattr(f, "__name__", type(f).__name__))
        where = f"JaxTower {self._tower_name!r}"
        self._state_slots: tuple[Slot, ...] = ()
        self._state_tree: jax.tree_util.PyTreeDef | None = None
        with torch.inference_mode(False):  # parameters created in inference mode could never be trained
            self._slots, tree = register_leaves(self, params, where, copy=copy)
            if state is not None:
                self._state_slots, self._state_tree = register_leaves(self, state, where, "state")
        self._padding = None if dims is None and classes is None else Padding(dims or (), classes or {}, where)
        self._keyword_names = keyword_names(f)
        if "masks" in self._keyword_names and self._padding is None:
            raise ValueError(f"{where}: the function takes masks, which require dims and classes; pass both")
        programs = Programs(f, tree, self._tower_name, self._state_tree, remat)
        self._runner = Runner(programs, where, dotted_names(self._slots, self))
        self._array_cache = ArrayCache()
        self._wrap_for_dynamo()
        self._number = next(_next_number)
        _towers[self._number] = self
        self._axes: dict[int, tuple[tuple[str | None, ...], ...]] = {}
        self.to_checkpoint: Callable[[Any, Any], Any] | None = None
        """Function from the pytrees of parameters and state to the pytree of Orbax checkpoints; None: parameters."""

    def __getstate__(self) -> dict[str, Any]:
        """Exclude wrappers and axes, which belong to this process."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_traced_compute", "_eager_compute", "_axes")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy under a new number, because it is another tower to torch.compile."""
        cast(Any, super()).__setstate__(state)
        self._axes = {}
        self._wrap_for_dynamo()
        self._number = next(_next_number)
        _towers[self._number] = self

    def _wrap_for_dynamo(self) -> None:
        """Wrap the computation for Dynamo, which cannot construct the wrappers while it traces."""
        self._traced_compute = nonstrict(_try_compute) if self._state_tree is None else None
        self._eager_compute = eager(_compute)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the parameters, and drop the array views of their old memory."""
        self._array_cache.clear()  # otherwise it would keep the old memory alive until the next call
        return cast(Any, super())._apply(*args, **kwargs)

    @property
    def compilations(self) -> int:
        """The number of compiled programs: up to three per signature, forward, backward and plain forward."""
        return self._runner.programs.compilations

    @property
    def copies(self) -> int:
        """The number of gradients copied because JAX cannot use their memory (expanded, strided, misaligned)."""
        return self._runner.copies

    def forward(self, *inputs: Any, **static: Any) -> Any:
        """Compute the function.

        Args:
            *inputs: Pytrees of tensors, contiguous and aligned to 64 bytes, on the parameters' device. Integers and
                booleans have no gradient; 64-bit tensors need ``jax_enable_x64``.
            **static: Hashable values for keywords of the function; each new value triggers a compilation.

        Returns:
            The function's outputs, a pytree of new tensors. Integer and boolean ones have no gradient.

        Raises:
            TypeError: if a leaf of the inputs is not a tensor, a keyword is a tensor or cannot be hashed, the function
                returns no arrays, or gradients are needed and no output is floating-point.
            ValueError: if a parameter or an input cannot be shared with JAX, or a size exceeds its classes.
            RuntimeError: under a transformation of ``torch.func``.
            Exception: any exception of the function, with a note of the tower's name.
        """
        if torch.compiler.is_compiling():
            arguments = (self._number, gather(self._slots), inputs, static, self.training)
            if self._traced_compute is not None:
                failure, outputs = self._traced_compute(*arguments)
                if not failure:
                    return outputs
                # Under fullgraph=True this is an error with this text. Otherwise the eager call below raises.
                torch._dynamo.graph_break(msg=next(iter(failure)))
            return self._eager_compute(*arguments)
        runner = self._runner
        if _functorch_is_active():
            raise RuntimeError(
                f"{runner.where}: torch.func cannot transform a JAX function; use jax.vmap or jax.grad inside the tower"
            )
        return self._compute(gather(self._slots), inputs, static, self.training)

    def _compute(
        self, parameters: list[torch.Tensor], inputs: tuple[Any, ...], static: dict[str, Any], training: bool
    ) -> Any:
        """Compute the function; see :meth:`forward`.

        Args:
            parameters: The tensors of the parameters' slots.
            inputs: The positional arguments of the call.
            static: The keyword arguments of the call.
            training: The module's mode.
        """
        runner = self._runner
        sizes: dict[str, int] = {}
        padded: dict[str, int] = {}
        if self._padding is not None:
            inputs, sizes, padded = self._padding.pad(inputs)
        keywords = self._make_keywords(static, training, sizes, padded, parameters[0].device if parameters else None)
        leaves, inputs_tree = jax.tree.flatten((inputs, keywords))
        tensors = parameters + leaves
        compiling = is_tracing()
        arrays, specs = _structs(tensors) if compiling else self._share(tensors, inputs, keywords)
        if torch.is_grad_enabled():
            needs_grad = tuple(map(_requires_grad, tensors))
        else:
            needs_grad = (False,) * len(tensors)
        device = tensors[0].device if tensors else None
        signature = (
            inputs_tree,
            needs_grad,
            tuple(specs),
            device,
            static_signature(static, runner.where) if static else (),
        )
        try:
            program = runner.programs.forward(signature, arrays, specs, inputs_tree, needs_grad, static)
        except Exception as error:
            if isinstance(error, TypeError) and "missing" in str(error):
                error.add_note(
                    f"{runner.where}: pass keywords of the function to the call, as in tower(x, training=True); the "
                    "tower itself passes only key, train, masks and state"
                )
            runner.note(error, "forward")
            raise
        self._check_outputs(program)
        if compiling:
            outputs = tower_forward(register_call(runner, program, arrays), tensors)[: len(program.outputs)]
        elif any(needs_grad):
            outputs = cast(Any, Apply).apply(runner, self._array_cache, program, arrays, *tensors)[:-1]
        else:
            outputs = runner.run("forward", program.run, arrays)
        if self._padding is not None:
            axes = self._axes.get(id(program))
            if axes is None:
                axes = self._axes[id(program)] = self._name_axes(arrays, inputs_tree, static, padded)
            outputs = self._padding.trim(outputs, axes, sizes)
        if self._state_tree is None:
            return jax.tree.unflatten(program.out_tree, outputs)
        if training:
            self._store_state(outputs[len(outputs) - len(self._state_slots) :])
        return jax.tree.unflatten(program.out_tree, outputs)[0]

    def export(
        self,
        path: str | Path,
        *inputs: Any,
        dims: Dims | None = None,
        platforms: Sequence[str] | None = None,
        **static: Any,
    ) -> None:
        """Export the tower in eval mode for a server that has JAX but neither torch nor this package.

        The folder contains ``program.jax_export``, the function ``(params, *inputs)`` serialized by ``jax.export``, and
        ``params.safetensors``, the parameters and the state by dotted name, so that new weights need no new program.

        Args:
            path: The folder to create.
            *inputs: Example inputs, of which only shapes and dtypes are used.
            dims: For each input, the names of its leading dimensions that may vary on the server, None for a fixed
                one. By default those of the constructor, or "batch" for the first dimension of each input.
            platforms: The platforms to compile for, from "cpu", "cuda", "rocm" and "tpu"; by default JAX's default
                backend.
            **static: Keywords of the function, fixed in the export.

        Raises:
            FileExistsError: if the folder exists.
            ImportError: if ``flatbuffers``, which ``jax.export`` requires, is not installed.
            TypeError: if a leaf of the inputs is not a tensor, or a keyword is one.
            ValueError: if JAX lacks an input's dtype, or ``dims`` does not fit the inputs.
            Exception: any exception of the function, with a note of the tower's name; JAX's
                ``InconclusiveDimensionOperation`` if the function depends on the value of a dynamic size.

        Example:
            Serving with only JAX::

                exported = jax.export.deserialize(Path("tower/program.jax_export").read_bytes())
                params = safetensors.flax.load_file("tower/params.safetensors")
                scores = jax.jit(exported.call)(params, x)

        References:
            https://docs.jax.dev/en/latest/export/export.html
        """
        runner = self._runner
        where = f"{runner.where}: export"
        static_signature(static, where)
        if "train" in self._keyword_names:
            static.setdefault("train", False)
        if dims is None and self._padding is not None:
            dims = self._padding.dims
        structs, symbols = _export.describe(inputs, dims, where)
        slots = (*self._slots, *self._state_slots)
        names = dotted_names(slots, self)

        def served(named: dict[str, Any], *inputs: Any) -> Any:
            leaves = [named[name] for name in names]
            keywords: dict[str, Any] = {}
            if "key" in self._keyword_names:
                keywords["key"] = None
            if "masks" in self._keyword_names:
                keywords["masks"] = _export.masks(symbols)
            if self._state_tree is not None:
                keywords["state"] = jax.tree.unflatten(self._state_tree, leaves[len(self._slots) :])
            params = jax.tree.unflatten(runner.programs.params_tree, leaves[: len(self._slots)])
            outputs = runner.programs.f(params, *inputs, **keywords, **static)
            return outputs if self._state_tree is None else outputs[0]

        served.__name__ = self._tower_name
        named = dict(zip(names, gather(slots), strict=True))
        try:
            _export.write(Path(path), served, named, structs, platforms, where)
        except Exception as error:
            runner.note(error, "export")
            raise

    def __repr__(self) -> str:
        """Return the tower's name, its number of parameters, and each leaf's name, dtype and shape."""
        slots = (*self._slots, *self._state_slots)
        lines = []
        for name, tensor in zip(dotted_names(slots, self), gather(slots), strict=True):
            kind = "" if isinstance(tensor, torch.nn.Parameter) else ", buffer"
            lines.append(f"  {name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{kind}")
        if len(lines) > _LISTED_LEAVES:
            lines[_LISTED_LEAVES:] = [f"  … and {len(lines) - _LISTED_LEAVES} more"]
        count = sum(parameter.numel() for parameter in self.parameters())
        return "\n".join([f"JaxTower({self._tower_name}: {count:,} parameters", *lines, ")"])

    def _make_keywords(
        self,
        static: dict[str, Any],
        training: bool,
        sizes: dict[str, int],
        padded: dict[str, int],
        device: torch.device | None,
    ) -> dict[str, Any]:
        """Return the keywords that the tower passes to the function, and add the mode to ``static``."""
        keywords: dict[str, Any] = {}
        if "train" in self._keyword_names:
            static.setdefault("train", training)
        if "key" in self._keyword_names:
            keywords["key"] = draw_key().to(device) if training else None
        if "masks" in self._keyword_names and self._padding is not None:
            keywords["masks"] = self._padding.masks(sizes, padded, device)
        if self._state_tree is not None:
            state = gather(self._state_slots)
            if training:
                # Backward may read the old state after the buffers have been updated.
                state = [tensor.clone() for tensor in state]
            keywords["state"] = jax.tree.unflatten(self._state_tree, state)
        return keywords

    def _store_state(self, state: Sequence[torch.Tensor]) -> None:
        """Write the new state to the buffers."""
        # In place, like torch's batch norm, because DDP keeps references to the buffers that it broadcasts.
        with torch.no_grad():
            for buffer, tensor in zip(gather(self._state_slots), state, strict=True):
                buffer.copy_(tensor)

    def _name_axes(
        self,
        arrays: list[jax.Array],
        inputs_tree: jax.tree_util.PyTreeDef,
        static: dict[str, Any],
        padded: dict[str, int],
    ) -> tuple[tuple[str | None, ...], ...]:
        """Return the padded axes of the outputs; see :meth:`Padding.name_axes`."""
        padding = cast(Padding, self._padding)
        inputs, keywords = jax.tree.unflatten(inputs_tree, arrays[len(self._slots) :])
        function = self._runner.programs.function(inputs_tree, static)

        def shapes(sizes: dict[str, int]) -> Any:
            leaves = jax.tree.leaves(padding.structs(inputs, keywords, sizes))
            outputs = jax.eval_shape(function, *arrays[: len(self._slots)], *leaves)
            return {"output": outputs} if self._state_tree is None else {"output": outputs[0], "state": outputs[1]}

        return padding.name_axes(shapes, padded)

    def _share(self, tensors: list[torch.Tensor], inputs: Any, keywords: Any) -> tuple[list[Any], list[Any]]:
        """Return the array views of all tensors, and their specs."""
        try:
            arrays, specs = self._array_cache.share(tensors[: len(self._slots)])
            others = tensors[len(self._slots) :]
            return (
                arrays + [share(tensor) for tensor in others],
                specs + [(tensor.shape, tensor.dtype) for tensor in others],
            )
        except (TypeError, ValueError):
            # Find the tensor that failed.
            labels = [f"parameter {name!r}" for name in self._runner.names]
            for kind, tree in (("input", inputs), ("keyword", keywords)):
                paths, _ = jax.tree_util.tree_flatten_with_path(tree)
                labels += [f"{kind}{jax.tree_util.keystr(path)}" for path, _ in paths]
            for label, tensor in zip(labels, tensors, strict=True):
                share(tensor, f"{self._runner.where}: {label}")
            raise

    def _check_outputs(self, program: Forward) -> None:
        """Raise TypeError if the function returned no arrays, or gradients are needed but no output can have one."""
        outputs = program.outputs[: len(program.outputs) - len(self._state_slots)]
        if not outputs:
            raise TypeError(f"{self._runner.where}: the function must return arrays, got {program.out_tree}")
        if any(program.needs_grad) and not any(output.differentiable for output in outputs):
            dtypes = ", ".join(output.dtype.name for output in outputs)
            raise TypeError(
                f"{self._runner.where}: gradients need a floating-point output, got {dtypes}; call the tower under "
                "torch.no_grad(), or return the output that the loss is computed from"
            )


def _structs(tensors: list[torch.Tensor]) -> tuple[list[Any], list[Any]]:
    """Return the shapes and dtypes of fake tensors, whose sizes are symbols under torch.compile, and their specs."""
    shapes: list[Any] = structs(tensors)
    return shapes, [(each.shape, tensor.dtype) for each, tensor in zip(shapes, tensors, strict=True)]


def _try_compute(number: int, *arguments: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Run :func:`_compute`, and return its exception, as the only key of a dictionary, and its outputs.

    Dynamo passes only tensors and strings, and would replace the message of an exception with one about its type.
    """
    try:
        return {}, _compute(number, *arguments)
    except Exception as error:
        notes = [note for note in getattr(error, "__notes__", ()) if "JaxTower" in note]
        return {"; ".join([f"{type(error).__name__}: {error}", *notes]): torch.empty(0)}, ()


def _compute(
    number: int, parameters: list[torch.Tensor], inputs: tuple[Any, ...], static: dict[str, Any], training: bool
) -> Any:
    """Compute the tower of a number. torch.compile passes numbers and tensors, but not modules."""
    return _towers[number]._compute(parameters, inputs, static, training)
