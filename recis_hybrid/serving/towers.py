"""Towers of bundles: ONNX files, run by onnxruntime, and artifacts of jax.export, run by JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import ServingError

Array = npt.NDArray[Any]
Tower: TypeAlias = Callable[[Sequence[Array]], Sequence[Array]]
"""A function from the arrays of a tower's inputs to those of its outputs; threads may share it."""
_INSTALL = "Install it with: pip install 'recis_hybrid[serve]'"


def load_tower(where: str, kind: str, data: bytes, threads: int) -> Tower:
    """Return a tower that is ready to run.

    Args:
        where: The bundle, for messages.
        kind: ``onnx`` or ``jax``.
        data: The ONNX file, or the serialized artifact of jax.export.
        threads: Threads of one run of an ONNX tower.

    Raises:
        ServingError: The runtime is not installed, or refuses the tower.
    """
    if kind == "onnx":
        return _onnx(where, data, threads)
    if kind == "jax":
        return _jax(where, data)
    raise ServingError(
        f"{where}: unknown kind of tower {kind!r}. The bundle was written by a newer version; update recis_hybrid."
    )


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

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        outputs: Sequence[Array] = session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    return run


def _jax(where: str, data: bytes) -> Tower:
    try:
        import jax
        from jax import export
    except ImportError as error:
        raise ServingError(
            f"{where}: its tower needs JAX, which cannot be imported. Install it with: pip install 'recis_hybrid[jax]'"
        ) from error
    try:
        exported = export.deserialize(bytearray(data))
    except Exception as error:  # any type: the artifact comes from another version, or is damaged
        raise ServingError(f"{where}: JAX {jax.__version__} refuses the tower: {error}. Export it again.") from error
    call = jax.jit(exported.call)

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        return [np.asarray(output) for output in call(*inputs)]

    return run
