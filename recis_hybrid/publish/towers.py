"""Towers of bundles: torch modules as ONNX files, JAX towers as artifacts of jax.export with their parameters."""

from __future__ import annotations

import inspect
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from recis_hybrid.publish.features import PublishError

_INSTALL = "Install it with: pip install 'recis_hybrid[onnx]'"
_DIFFERENCE = 1e-5
JOINED = "joined"  # as in serving/towers.py
_FLOAT, _GRAPHS = 1, (5, 10)  # onnx.TensorProto.FLOAT; onnx.AttributeProto.GRAPH and GRAPHS


class WrittenTower(NamedTuple):
    """A tower in the form of a bundle."""

    kind: str
    """``onnx`` or ``jax``."""
    tensors: dict[str, Tensor]
    """``model``, the file or artifact as uint8, and for JAX ``params.NAME``."""
    outputs: list[Tensor]
    """The tower's outputs for the example inputs."""


def written_tower(tower: nn.Module, inputs: Sequence[Tensor]) -> WrittenTower:
    """Return a tower in the form of a bundle.

    Args:
        tower: A torch module or a JaxTower: inputs → a tensor, or a tuple of tensors, each with the batch first.
        inputs: Example inputs, ``[B, ...]`` each, of at least two rows.

    Raises:
        PublishError: A package is not installed, or the tower cannot be exported.
    """
    # A JAX tower exists only if the bridge has been imported.
    bridge = sys.modules.get("recis_hybrid.bridge")
    if bridge is not None and isinstance(tower, bridge.JaxTower):
        return _jax_of(tower, inputs)
    if bridge is not None and any(isinstance(module, bridge.JaxTower) for module in tower.modules()):
        raise PublishError(
            f"the tower {type(tower).__name__} contains a JaxTower, which ONNX cannot. Pass the JaxTower itself, with "
            f"the other operations in its function"
        )
    data, outputs = _onnx_of(tower, inputs)
    return WrittenTower("onnx", {"model": _as_tensor(data)}, outputs)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _jax_of(tower: Any, inputs: Sequence[Tensor]) -> WrittenTower:
    outputs = [each.detach() for each in _listed(_evaluated(tower, inputs))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tower"
        try:
            tower.export(path, *inputs, platforms=["cpu"])
        except Exception as error:  # the function may raise anything
            reason = str(error).strip().split("\n")[0]
            raise PublishError(f"the tower {tower._tower_name} cannot be exported by jax.export: {reason}") from error
        data = (path / "program.jax_export").read_bytes()
        parameters = safetensors.torch.load_file(path / "params.safetensors")
    return WrittenTower(
        "jax", {"model": _as_tensor(data), **{f"params.{k}": v for k, v in parameters.items()}}, outputs
    )


def _evaluated(tower: nn.Module, inputs: Sequence[Tensor]) -> Any:
    was_training = tower.training
    try:
        return tower.eval()(*inputs)
    finally:
        tower.train(was_training)


def _onnx_of(tower: nn.Module, inputs: Sequence[Tensor]) -> tuple[bytes, list[Tensor]]:
    """Return a tower as an ONNX file with a dynamic batch dimension, checked against the tower.

    Args:
        tower: Inputs → a tensor, or a tuple of tensors, each with the batch first.
        inputs: Example inputs, ``[B, ...]`` each, of at least two rows.

    Returns:
        The file, and the tower's outputs for the example.

    Raises:
        PublishError: onnxscript or onnxruntime is not installed, the tower cannot be exported, or the scores of the
            file differ from the tower's.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PublishError(f"the tower needs {error.name} to be exported. {_INSTALL}") from error
    was_training = tower.training
    tower.eval()
    try:
        with torch.no_grad(), _quiet():
            expected = _listed(tower(*inputs))
            batch = torch.export.Dim("batch", min=1)
            program = torch.onnx.export(
                tower,
                tuple(inputs),
                dynamo=True,
                dynamic_shapes=_dynamic(tower, inputs, batch),
                input_names=[f"input{number}" for number in range(len(inputs))],
                verbose=False,
            )
    except Exception as error:  # torch.export raises many types
        reason = str(error).strip().split("\n")[0]
        raise PublishError(
            f"the tower {type(tower).__name__} cannot be exported to ONNX: {reason}. Use operations on tensors whose "
            f"shapes depend on the batch dimension only"
        ) from error
    finally:
        tower.train(was_training)
    assert program is not None
    model = program.model_proto
    arrays = [each.numpy() for each in inputs]
    if _join_inputs(model.graph):
        arrays = [np.concatenate(arrays, axis=1)]
    data: bytes = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, dict(zip(names, arrays, strict=True)))
    for mine, theirs in zip(expected, found, strict=True):
        _compare(tower, mine.numpy(), theirs)
    return data, expected


def _join_inputs(graph: Any) -> bool:
    """Replace the inputs of an ONNX graph by one, ``JOINED``, if the graph does no more than to concatenate them.

    Most towers begin so, and onnxruntime takes 0.5 µs for each input.

    Returns:
        Whether the graph has been changed.
    """
    names = [each.name for each in graph.input]
    readers = [node for node in graph.node if not set(names).isdisjoint(node.input)]
    if len(names) < 2 or len(readers) != 1 or list(readers[0].input) != names:
        return False
    (join,) = readers
    attributes = {each.name: each.i for each in join.attribute}
    tensors = [each.type.tensor_type for each in graph.input]
    if (
        (join.op_type, join.domain) != ("Concat", "")
        or attributes.get("axis") not in (1, -1)
        or any(each.elem_type != _FLOAT or len(each.shape.dim) != 2 for each in tensors)
        or set(names) & {each.name for each in graph.output}
        or join.output[0] in {each.name for each in graph.output}
        or any(each.type in _GRAPHS for node in graph.node for each in node.attribute)  # may read inputs, too
    ):
        return False
    first = graph.input[0]
    first.type.tensor_type.shape.dim[1].dim_value = sum(each.shape.dim[1].dim_value for each in tensors)
    first.name = JOINED
    del graph.input[1:]
    for node in graph.node:
        for number, name in enumerate(node.input):
            if name == join.output[0]:
                node.input[number] = JOINED
    graph.node.remove(join)
    return True


def _compare(tower: nn.Module, mine: Any, theirs: Any) -> None:
    if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=_DIFFERENCE, atol=_DIFFERENCE, equal_nan=True):
        worst = float(np.abs(mine - theirs).max()) if mine.shape == theirs.shape else theirs.shape
        raise PublishError(
            f"the tower {type(tower).__name__} computes other numbers in ONNX, by {worst}. It may depend on random "
            f"numbers or on state: make it a function of its inputs in evaluation mode"
        )


def _dynamic(tower: nn.Module, inputs: Sequence[Tensor], batch: Any) -> Any:
    """Return the dynamic shapes of positional inputs; those of ``*inputs`` are one nested tuple."""
    shapes = tuple({0: batch} for _ in inputs)
    kinds = [each.kind for each in inspect.signature(tower.forward).parameters.values()]
    return (shapes,) if kinds == [inspect.Parameter.VAR_POSITIONAL] else shapes


def _listed(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which logs at each step."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
