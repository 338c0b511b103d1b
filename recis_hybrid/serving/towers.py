"""Towers of bundles: ONNX files, run by onnxruntime, and artifacts of jax.export, run by JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.files import Tensor

Array = npt.NDArray[Any]
Tower: TypeAlias = Callable[[Sequence[Array]], Sequence[Array]]
"""A function from the arrays of a tower's inputs to those of its outputs; threads may share it."""
JOINED = "joined"
"""Name of an ONNX tower's only input if it takes all inputs concatenated, ``[B, D]``."""
_INSTALL = "Install it with: pip install 'recis_hybrid[serve]'"


def load_tower(where: str, kind: str, tensors: Mapping[str, Tensor], threads: int) -> Tower:
    """Return a tower that is ready to run.

    Args:
        where: The bundle, for messages.
        kind: ``onnx`` or ``jax``.
        tensors: The tensors of the part ``tower``: ``model`` uint8, and the parameters of a JAX tower.
        threads: Threads of one run of an ONNX tower.

    Raises:
        ServingError: The runtime is not installed, or refuses the tower.
    """
    if kind not in ("onnx", "jax"):
        raise ServingError(
            f"{where}: unknown kind of tower {kind!r}. The bundle was written by a newer version; update recis_hybrid."
        )
    if "model" not in tensors or tensors["model"].values.dtype != np.uint8:
        raise ServingError(f"{where}: has no tower. Export it again.")
    data = tensors["model"].values.tobytes()
    if kind == "onnx":
        return _onnx(where, data, threads)
    prefix = "params."
    parameters = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    return _jax(where, data, parameters)


def _onnx(where: str, data: bytes, threads: int) -> Tower:
    try:
        import onnxruntime
    except ImportError as error:
        raise ServingError(f"{where}: its tower needs onnxruntime, which cannot be imported. {_INSTALL}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own types, which have no common base
        raise ServingError(f"{where}: onnxruntime refuses the tower: {error}. Export it again.") from error
    names = [each.name for each in session.get_inputs()]
    output_names = [each.name for each in session.get_outputs()]

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        outputs: Sequence[Array] = session.run(output_names, dict(zip(names, inputs, strict=True)))
        return outputs

    return (lambda inputs: run([np.concatenate(inputs, axis=1)])) if names == [JOINED] else run


def _jax(where: str, data: bytes, parameters: Mapping[str, Tensor]) -> Tower:
    try:
        import jax
        from jax import export
    except ImportError as error:
        raise ServingError(
            f"{where}: its tower needs JAX, which cannot be imported. Install it with: pip install 'recis_hybrid[jax]'"
        ) from error
    cpu = jax.devices("cpu")[0]
    try:
        call = jax.jit(export.deserialize(bytearray(data)).call)
        arrays = {
            name: each.values.view(jax.numpy.bfloat16) if each.bfloat16 else each.values
            for name, each in parameters.items()
        }
        placed = jax.device_put(arrays, cpu)
    except Exception as error:  # any type: the artifact comes from another version, or is damaged
        raise ServingError(f"{where}: JAX {jax.__version__} refuses the tower: {error}. Export it again.") from error

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        # XLA compiles each number of rows, so that there are only powers of two; copies of the last row fill them.
        rows = len(inputs[0])
        padding = (1 << (rows - 1).bit_length()) - rows
        padded = [np.concatenate([each, np.repeat(each[-1:], padding, axis=0)]) if padding else each for each in inputs]
        outputs = jax.tree.leaves(call(placed, *[jax.device_put(each, cpu) for each in padded]))
        return [np.asarray(output)[:rows] for output in outputs]

    return run
