"""JaxTower: a JAX function as an ordinary `torch.nn.Module`."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import torch

from recis_hybrid.bridge.dlpack import share
from recis_hybrid.bridge.exchange._array_cache import Imports
from recis_hybrid.bridge.tower import _export
from recis_hybrid.bridge.tower._autograd import Apply, Caller
from recis_hybrid.bridge.tower._keywords import draw_key, keywords, static_signature
from recis_hybrid.bridge.tower._operator import eager, nonstrict, number_of, structs, tower_forward, traced
from recis_hybrid.bridge.tower._padding import Dims, Padding
from recis_hybrid.bridge.tower._parameters import Slot, dotted, gather, plant
from recis_hybrid.bridge.tower._programs import Forward, Programs, Remat

_next_number = itertools.count()
_towers: weakref.WeakValueDictionary[int, JaxTower] = weakref.WeakValueDictionary()
_requires_grad = operator.attrgetter("requires_grad")
_functorch_is_active = cast(Any, torch._C)._are_functorch_transforms_active


class JaxTower(torch.nn.Module):
    r"""A `torch.nn.Module` that computes a JAX function, and its gradients, by one jitted call each.

    $$y = f(\theta, x_1, \dots, x_n)$$

    The parameters are torch's: ordinary `nn.Parameter`s, under the dotted names of the pytree's keys
    (`{"layers": [{"w": …}]}` gives `layers.0.w`), which torch optimizers, `state_dict` and `.to` treat as any others.
    Forward hands parameters and inputs to one jitted program, backward the residuals and gradients to another, all in
    the same memory. While gradients are off, forward is the plain function. A parameter that `f` does not use has a
    gradient of zeros, not None, so that an optimizer's weight decay still moves it. Second derivatives are refused.

    What `f` names as keyword-only parameters, the tower supplies:

    - `key`: a PRNG key for dropout, drawn from torch's generator (`torch.manual_seed`) at each call; None in eval mode.
    - `train`: bool, the module's mode.
    - `masks`: by the names of `classes`, (size,) bool arrays, True where the input is not padding.
    - `state`: the mutable state, if the tower has one; `f` then returns `(outputs, state)`. In train mode it is kept,
      in buffers. No gradient goes through it from one call to the next.

    Programs are compiled for each signature: structure, shapes and dtypes of the inputs, static keywords, mode, and
    which tensors want gradients. So a new batch size compiles twice, unless `classes` bounds the sizes.

    Args:
        f: `f(params, *inputs, **keywords)`, a pure function of JAX that jit can trace; inputs and outputs are pytrees
            of arrays. Keywords given to a call are static.
        params: a pytree of arrays of JAX, numpy or torch, which are copied. Floating ones become parameters, others
            buffers. 64-bit ones need `jax_enable_x64`.
        state: a pytree of arrays that `f` changes (batch statistics), copied into buffers.
        dims: for each positional input, the names of its leading dimensions, None for what is never padded:
            `[("batch",), ("batch", "length")]`. A name stands for one size in all inputs.
        classes: by name, the sizes that inputs are padded to, with zeros; None for powers of two from 8 on. Outputs are
            cut back: those of their axes that have a padded size. An axis that depends on one otherwise is an error.
        remat: True if backward shall compute again what it needs of forward, or a policy of
            `jax.checkpoint_policies` that says what is saved.
        name: what errors and profiles call the tower; the function's name if it is not given.

    Raises:
        TypeError: if `f` is not callable, or a leaf of `params` is not an array.
        ValueError: if a leaf is of 64 bits while x64 is off, names collide, or dims and classes disagree.

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
        with torch.inference_mode(False):  # parameters that are made in it could never be trained
            self._slots, tree = plant(self, params, where)
            if state is not None:
                self._state_slots, self._state_tree = plant(self, state, where, "state")
        self._padding = None if dims is None and classes is None else Padding(dims or (), classes or {}, where)
        self._supplies = keywords(f)
        if "masks" in self._supplies and self._padding is None:
            raise ValueError(f"{where}: the function takes masks, which need dims and classes; pass both")
        programs = Programs(f, tree, self._tower_name, self._state_tree, remat)
        self._caller = Caller(programs, where, dotted(self._slots, self))
        self._imports = Imports()
        self._meet_dynamo()
        self._number = next(_next_number)
        _towers[self._number] = self
        self._axes: dict[int, tuple[tuple[str | None, ...], ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Of this process and of no use elsewhere; a copy makes its own.
        return {name: value for name, value in self.__dict__.items() if name not in ("_whole", "_apart", "_axes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        self._axes = {}
        self._meet_dynamo()
        self._number = next(_next_number)  # a copy has parameters, mode and life of its own
        _towers[self._number] = self

    def _meet_dynamo(self) -> None:
        """Make the two ways on which dynamo computes the tower, which it must find ready made."""
        self._whole = nonstrict(_try_compute) if self._state_tree is None else None
        self._apart = eager(_compute)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._imports.clear()  # or what `.to` leaves behind would live on until the next call
        return cast(Any, super())._apply(*args, **kwargs)

    @property
    def compilations(self) -> int:
        """How many programs were compiled: each signature's forward, backward and plain forward count one, if used."""
        return self._caller.programs.compilations

    @property
    def copies(self) -> int:
        """How many gradients came in memory that JAX cannot use (expanded, strided, misaligned) and were copied."""
        return self._caller.copies

    def forward(self, *inputs: Any, **static: Any) -> Any:
        """Compute the function.

        Args:
            *inputs: pytrees of tensors, contiguous and starting at multiples of 64 bytes, on the parameters' device.
                Integers and booleans have no gradient; 64-bit tensors need `jax_enable_x64`.
            **static: hashable values for keywords of the function; each new one compiles anew.

        Returns:
            The function's outputs, a pytree of tensors in memory of their own. Integer and boolean ones have no
            gradient.

        Raises:
            TypeError: if a leaf of the inputs is not a tensor, a keyword is a tensor or cannot be hashed, if the
                function returns no arrays, or if a gradient is wanted and no output is floating.
            ValueError: if a parameter or an input cannot be shared with JAX, or a size is beyond its classes.
            RuntimeError: under a transformation of `torch.func`.
            Exception: whatever the function raises, with a note of the tower's name.
        """
        if torch.compiler.is_compiling():
            arguments = (self._number, gather(self._slots), inputs, static, self.training)
            if self._whole is not None:
                failure, outputs = self._whole(*arguments)
                if not failure:
                    return outputs
                # Under fullgraph=True an error with this text; else what failed is called again, and raises.
                torch._dynamo.graph_break(msg=next(iter(failure)))
            return self._apart(*arguments)
        caller = self._caller
        if _functorch_is_active():
            raise RuntimeError(
                f"{caller.where}: torch.func cannot look into a JAX function; transform it by jax.vmap or jax.grad "
                "inside the tower"
            )
        return self._compute(gather(self._slots), inputs, static, self.training)

    def _compute(
        self, parameters: list[torch.Tensor], inputs: tuple[Any, ...], static: dict[str, Any], training: bool
    ) -> Any:
        caller = self._caller
        found: dict[str, int] = {}
        padded: dict[str, int] = {}
        if self._padding is not None:
            inputs, found, padded = self._padding.pad(inputs)
        supplied = self._supply(static, training, found, padded, parameters[0].device if parameters else None)
        leaves, inputs_tree = jax.tree.flatten((inputs, supplied))
        tensors = parameters + leaves
        compiling = traced()
        arrays, kinds = _structs(tensors) if compiling else self._share(tensors, inputs, supplied)
        if torch.is_grad_enabled():
            wanted = tuple(map(_requires_grad, tensors))
        else:
            wanted = (False,) * len(tensors)
        device = tensors[0].device if tensors else None
        signature = (
            inputs_tree,
            wanted,
            tuple(kinds),
            device,
            static_signature(static, caller.where) if static else (),
        )
        try:
            program = caller.programs.forward(signature, arrays, kinds, inputs_tree, wanted, static)
        except Exception as error:
            if isinstance(error, TypeError) and "missing" in str(error):
                error.add_note(
                    f"{caller.where}: a keyword of the function is passed to the call, as tower(x, training=True); "
                    "what the tower supplies by itself is named key, train, masks and state"
                )
            caller.note(error, "forward")
            raise
        self._check_outputs(program)
        if compiling:
            outputs = tower_forward(number_of(caller, program, arrays), tensors)[: len(program.outputs)]
        elif any(wanted):
            outputs = cast(Any, Apply).apply(caller, self._imports, program, arrays, *tensors)[:-1]
        else:
            outputs = caller.run("forward", program.run, arrays)
        if self._padding is not None:
            axes = self._axes.get(id(program))
            if axes is None:
                axes = self._axes[id(program)] = self._name_axes(arrays, inputs_tree, static, padded)
            outputs = self._padding.cut(outputs, axes, found)
        if self._state_tree is None:
            return jax.tree.unflatten(program.out_tree, outputs)
        if training:
            self._keep(outputs[len(outputs) - len(self._state_slots) :])
        return jax.tree.unflatten(program.out_tree, outputs)[0]

    def export(
        self,
        path: str | Path,
        *inputs: Any,
        dims: Dims | None = None,
        platforms: Sequence[str] | None = None,
        **static: Any,
    ) -> None:
        """Write the tower, in eval mode, for a server that has JAX and neither torch nor this package.

        The folder holds `program.jax_export`, the function `(params, *inputs)` as `jax.export` writes it, and
        `params.safetensors`, the parameters and the state by their dotted names, so that new weights need no new
        program.

        Args:
            path: a folder that is not there yet.
            *inputs: examples of the inputs, of which shapes and dtypes count.
            dims: for each input, the names of its leading dimensions that may have any size when it is served, None
                for a fixed one; without it those that the tower was made with, or else the first of each, "batch".
            platforms: what to compile for, of "cpu", "cuda", "rocm" and "tpu"; without it JAX's default backend.
            **static: keywords of the function, fixed from here on.

        Raises:
            FileExistsError: if the folder is there.
            ImportError: if `flatbuffers`, which `jax.export` writes with, is not installed.
            TypeError: if a leaf of the inputs is not a tensor, or a keyword is one.
            ValueError: if an input's dtype cannot be held, or `dims` does not fit the inputs.
            Exception: whatever the function raises, with a note of the tower's name; JAX's
                `InconclusiveDimensionOperation` where it depends on the value of a size that may vary.

        Example:
            Served by JAX alone::

                exported = jax.export.deserialize(Path("tower/program.jax_export").read_bytes())
                params = safetensors.flax.load_file("tower/params.safetensors")
                scores = jax.jit(exported.call)(params, x)

        References:
            https://docs.jax.dev/en/latest/export/export.html
        """
        caller = self._caller
        where = f"{caller.where}: export"
        static_signature(static, where)
        if "train" in self._supplies:
            static.setdefault("train", False)
        if dims is None and self._padding is not None:
            dims = self._padding.dims
        structs, symbols = _export.describe(inputs, dims, where)
        slots = (*self._slots, *self._state_slots)
        names = dotted(slots, self)

        def served(named: dict[str, Any], *inputs: Any) -> Any:
            leaves = [named[name] for name in names]
            supplied: dict[str, Any] = {}
            if "key" in self._supplies:
                supplied["key"] = None
            if "masks" in self._supplies:
                supplied["masks"] = _export.masks(symbols)
            if self._state_tree is not None:
                supplied["state"] = jax.tree.unflatten(self._state_tree, leaves[len(self._slots) :])
            params = jax.tree.unflatten(caller.programs.params_tree, leaves[: len(self._slots)])
            outputs = caller.programs.f(params, *inputs, **supplied, **static)
            return outputs if self._state_tree is None else outputs[0]

        served.__name__ = self._tower_name
        named = dict(zip(names, gather(slots), strict=True))
        try:
            _export.write(Path(path), served, named, structs, platforms, where)
        except Exception as error:
            caller.note(error, "export")
            raise

    def extra_repr(self) -> str:
        """The tower's name, for `repr`."""
        return repr(self._tower_name)

    def _supply(
        self,
        static: dict[str, Any],
        training: bool,
        found: dict[str, int],
        padded: dict[str, int],
        device: torch.device | None,
    ) -> dict[str, Any]:
        """What the function wants by keyword: tensors are returned, static values added to `static`."""
        supplied: dict[str, Any] = {}
        if "train" in self._supplies:
            static.setdefault("train", training)
        if "key" in self._supplies:
            supplied["key"] = draw_key().to(device) if training else None
        if "masks" in self._supplies and self._padding is not None:
            supplied["masks"] = self._padding.masks(found, padded, device)
        if self._state_tree is not None:
            state = gather(self._state_slots)
            if training:
                # Backward may read what went in, after the buffers have been written to.
                state = [tensor.clone() for tensor in state]
            supplied["state"] = jax.tree.unflatten(self._state_tree, state)
        return supplied

    def _keep(self, state: Sequence[torch.Tensor]) -> None:
        # In place, as torch's own batch norm does: DDP holds on to the buffers that it broadcasts.
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
        padding = cast(Padding, self._padding)
        inputs, supplied = jax.tree.unflatten(inputs_tree, arrays[len(self._slots) :])
        function = self._caller.programs.function(inputs_tree, static)

        def shapes(sizes: dict[str, int]) -> Any:
            leaves = jax.tree.leaves(padding.structs(inputs, supplied, sizes))
            outputs = jax.eval_shape(function, *arrays[: len(self._slots)], *leaves)
            return {"output": outputs} if self._state_tree is None else {"output": outputs[0], "state": outputs[1]}

        return padding.name_axes(shapes, padded)

    def _share(self, tensors: list[torch.Tensor], inputs: Any, supplied: Any) -> tuple[list[Any], list[Any]]:
        """The arrays over all tensors, and what they are."""
        try:
            arrays, kinds = self._imports.share(tensors[: len(self._slots)])
            others = tensors[len(self._slots) :]
            return (
                arrays + [share(tensor) for tensor in others],
                kinds + [(tensor.shape, tensor.dtype) for tensor in others],
            )
        except (TypeError, ValueError):
            # Which of them it was, is only looked up now.
            labels = [f"parameter {name!r}" for name in self._caller.names]
            for kind, tree in (("input", inputs), ("supplied", supplied)):
                paths, _ = jax.tree_util.tree_flatten_with_path(tree)
                labels += [f"{kind}{jax.tree_util.keystr(path)}" for path, _ in paths]
            for label, tensor in zip(labels, tensors, strict=True):
                share(tensor, f"{self._caller.where}: {label}")
            raise

    def _check_outputs(self, program: Forward) -> None:
        outputs = program.outputs[: len(program.outputs) - len(self._state_slots)]
        if not outputs:
            raise TypeError(f"{self._caller.where}: the function must return arrays, got {program.out_tree}")
        if any(program.wanted) and not any(output.differentiable for output in outputs):
            dtypes = ", ".join(output.dtype.name for output in outputs)
            raise TypeError(
                f"{self._caller.where}: gradients need a floating output, got {dtypes}; call the tower under "
                "torch.no_grad(), or let the function return what the loss needs"
            )


def _structs(tensors: list[torch.Tensor]) -> tuple[list[Any], list[Any]]:
    """As `JaxTower._share`, for torch.compile, under which sizes are symbols in the tensors."""
    shapes: list[Any] = structs(tensors)
    return shapes, [(each.shape, tensor.dtype) for each, tensor in zip(shapes, tensors, strict=True)]


def _try_compute(number: int, *arguments: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """As `_compute`, and what it raises as the one key of a dictionary: what passes this border is of basic types.

    Dynamo would say of any error only that the output is of no type that it knows.
    """
    try:
        return {}, _compute(number, *arguments)
    except Exception as error:
        notes = [note for note in getattr(error, "__notes__", ()) if "JaxTower" in note]
        return {"; ".join([f"{type(error).__name__}: {error}", *notes]): torch.empty(0)}, ()


def _compute(
    number: int, parameters: list[torch.Tensor], inputs: tuple[Any, ...], static: dict[str, Any], training: bool
) -> Any:
    """A tower's forward for torch.compile, which takes numbers and tensors but no modules across this border."""
    return _towers[number]._compute(parameters, inputs, static, training)
