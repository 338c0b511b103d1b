"""Outputs of models and their labels. Letters: B rows, K outputs per row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recis_hybrid.ragged import Batch
from recis_hybrid.validation import describe_value

_LOGITS = "logits"
# torch's losses, as functions and modules.
_OF_LOGITS = (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss)
_OF_PROBABILITIES = (F.binary_cross_entropy, nn.BCELoss)
_OF_NUMBERS = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
)
_BINARY = (*_OF_LOGITS, *_OF_PROBABILITIES)
_ELEMENTWISE = (*_BINARY, *_OF_NUMBERS)


def row_mask(batch: Batch) -> Tensor | None:
    """Return the column ``mask``, bool ``[B]``, which is False for padding rows; None if there is none.

    A column ``mask`` of another dtype, or with several values per row, is a feature.
    """
    mask = batch.get("mask")
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        return None
    return squeeze_column(mask) if squeeze_column(mask).dim() == 1 else None


def squeeze_column(values: Tensor) -> Tensor:
    """Return ``[B, 1]`` as ``[B]``, and any other tensor unchanged."""
    return values[:, 0] if values.dim() == 2 and values.shape[1] == 1 else values


def without_padding(value: Any, mask: Tensor | None) -> Any:
    """Return a tensor, or the tensors of a tuple, list, dict or dataclass, without padding rows."""
    if mask is None:
        return value
    rows = len(mask)
    return _mapped(value, lambda tensor: tensor[mask] if tensor.dim() > 0 and len(tensor) == rows else tensor)


def in_float32(value: Any) -> Any:
    """Return a tensor, or the tensors of a tuple, list, dict or dataclass, with half precision cast to float32."""
    return _mapped(value, lambda tensor: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(each, function) for each in value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_mapped(each, function) for each in value)
    if isinstance(value, Mapping):
        fields = {name: _mapped(each, function) for name, each in value.items()}
        # Outputs of Hugging Face models are both mappings and dataclasses, so they are built from keywords.
        return type(value)(**fields) if dataclasses.is_dataclass(value) else fields
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _mapped(getattr(value, name), function) for name in names})
    return value


def own_loss(returned: Any) -> tuple[Tensor, Any]:
    """Return the loss and outputs of a model that computes its own loss.

    Args:
        returned: The loss; ``(loss, outputs, ...)``; or a mapping or object with ``loss`` and, for evaluations,
            ``logits`` or one other output.

    Returns:
        The loss, and the outputs or None.

    Raises:
        TypeError: The value contains no loss.
    """
    outputs: Any = None
    if isinstance(returned, tuple | list) and not hasattr(returned, "loss"):
        loss = returned[0] if returned else None
        outputs = None if len(returned) < 2 else returned[1] if len(returned) == 2 else tuple(returned[1:])
    elif isinstance(returned, Mapping):
        loss = returned.get("loss")
        others = {name: value for name, value in returned.items() if name != "loss" and value is not None}
        outputs = others.get(_LOGITS, next(iter(others.values())) if len(others) == 1 else others or None)
    elif isinstance(returned, Tensor):
        loss = returned
    else:
        loss, outputs = getattr(returned, "loss", None), getattr(returned, _LOGITS, None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"TorchStep: without a loss function the model must return its loss: loss, (loss, outputs), or a dict "
            f"or object with 'loss' and 'logits', got {_describe(returned)}"
            + ("" if loss is None else f" with {describe_value(loss)} as the loss")
        )
    return loss, outputs


def main_output(outputs: Any) -> Tensor | None:
    """Return the output that labels and metrics refer to; None if it is ambiguous.

    This is the output itself if it is a tensor, its ``logits`` (key or attribute), the first tensor of a tuple or list,
    or the only tensor of a dict.
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = outputs.get(_LOGITS) if isinstance(outputs, Mapping) else getattr(outputs, _LOGITS, None)
    if isinstance(named, Tensor):
        return named
    if isinstance(outputs, tuple | list):
        return next((each for each in outputs if isinstance(each, Tensor)), None)
    tensors = [each for each in outputs.values() if isinstance(each, Tensor)] if isinstance(outputs, Mapping) else []
    return tensors[0] if len(tensors) == 1 else None


def scores_of(outputs: Any, link: Callable[[Any], Any] | None, loss: Callable[..., Any] | None, where: str) -> Tensor:
    """Return the scores for metrics, ``[B]``.

    Args:
        outputs: Outputs of the model.
        link: Function from the outputs to scores. None: the main output for regression losses and losses of
            probabilities (``mse_loss``, ``binary_cross_entropy``); its sigmoid for all others.
        loss: Loss of the objective.
        where: The caller, for messages.

    Raises:
        TypeError: The main output is ambiguous, or ``link`` does not return a tensor.
    """
    if link is None or link is torch.sigmoid:
        main = main_output(outputs)
        if main is None:
            raise TypeError(
                f"{where}: metrics need one output, but the model returns {_describe(outputs)}; name it 'logits', "
                f"or compute the scores with Objective(link=lambda outputs: ...)"
            )
        return squeeze_column(main if link is None and _is_of_numbers(loss) else torch.sigmoid(main))
    scores = link(outputs)
    if not isinstance(scores, Tensor):
        raise TypeError(f"{where}: Objective(link=) must return a tensor of scores, [B], got {describe_value(scores)}")
    return squeeze_column(scores)


def aligned(outputs: Any, labels: Tensor) -> Tensor:
    """Return labels with the shape and dtype that losses expect for the outputs, so that nothing is broadcast.

    ======================  =====================================  ==========================
    outputs                 labels                                 result
    ======================  =====================================  ==========================
    ``[B]`` or ``[B, 1]``   ``[B]`` or ``[B, 1]``, any dtype       the outputs' shape and dtype
    ``[B, K]``              ``[B, K]``, any dtype                  the outputs' dtype
    ``[B, K]``              ``[B]`` or ``[B, 1]``, integer, bool   classes, int64 ``[B]``
    anything else           any                                    integers as they are, bool and float as float32
    ======================  =====================================  ==========================

    Args:
        outputs: Outputs of the model.
        labels: Column of labels.
    """
    main = main_output(outputs)
    if main is not None:
        candidates = [main]
    else:
        candidates = list(_tensors(outputs))
    for output in candidates:
        if _same(output.shape, labels.shape):
            dtype = output.dtype if output.is_floating_point() else torch.float32
            return labels.to(output.device, dtype).reshape(output.shape)
    are_classes = not labels.is_floating_point() and not labels.is_complex()
    for output in candidates:
        flat = squeeze_column(labels)
        if are_classes and flat.dim() == output.dim() - 1:
            return flat.to(output.device, torch.int64)
    device = candidates[0].device if candidates else labels.device
    dtype = torch.float32 if labels.is_floating_point() or labels.dtype is torch.bool else labels.dtype
    return labels.to(device, dtype)


def _same(outputs: torch.Size, labels: torch.Size) -> bool:
    """Return whether two shapes are equal up to a last axis of size 1."""
    return outputs == labels or outputs == (*labels, 1) or labels == (*outputs, 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def check_labels(loss: Callable[..., Any], outputs: Any, labels: Tensor, column: str, *, first: bool) -> None:
    """Check the labels of torch's losses: shapes always, values only if that does not synchronize.

    Args:
        loss: A function or a module.
        outputs: Outputs passed to the loss.
        labels: Result of :func:`aligned`.
        column: Name of the label column.
        first: Whether to check values on a GPU too, which synchronizes.

    Raises:
        ValueError: Shapes would be broadcast, or labels of a binary cross-entropy are outside [0, 1].
    """
    if not _is_one(loss, _ELEMENTWISE) or not isinstance(outputs, Tensor):
        return
    if outputs.shape != labels.shape:
        raise ValueError(
            f"TorchStep: outputs {list(outputs.shape)} and labels {column!r} {labels.dtype} {list(labels.shape)} "
            f"would be broadcast by {_name(loss)}; provide one label per output, or use "
            f"torch.nn.functional.cross_entropy, with classes as integers"
        )
    check_values = first or labels.device.type == "cpu"
    if check_values and labels.numel() and _is_one(loss, _BINARY):
        least, greatest = (float(end) for end in labels.detach().aminmax())
        if least < 0 or greatest > 1:  # both are false for NaN, which LossGuard reports
            raise ValueError(
                f"TorchStep: the labels {column!r} of {_name(loss)} must be in [0, 1], got {least:g} to {greatest:g}; "
                f"map them in a transform, or use another loss"
            )


def checked_loss(loss: Any, column: str | None) -> Tensor:
    """Return a loss as a scalar.

    Raises:
        TypeError: The loss is not a tensor.
        ValueError: The loss has more than one element.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"TorchStep: the loss must be a scalar tensor, got {describe_value(loss)}")
    if loss.numel() != 1:
        labels = "" if column is None else f" of the labels {column!r}"
        raise ValueError(
            f"TorchStep: the loss{labels} must be a scalar, got shape {list(loss.shape)}; take its mean "
            f"(reduction='mean')"
        )
    return loss.reshape(()).float() if loss.dtype in (torch.float16, torch.bfloat16) else loss.reshape(())


def shape_note(outputs: Any, labels: Tensor | None, column: str | None) -> str:
    """Return a note for an error in a loss function: the shapes and dtypes of its arguments."""
    also = f"; labels {column!r} {labels.dtype} {list(labels.shape)}" if labels is not None else ""
    return f"TorchStep: arguments of the loss: outputs {_describe(outputs)}{also}"


def _is_of_numbers(loss: Any) -> bool:
    return _is_one(loss, (*_OF_NUMBERS, *_OF_PROBABILITIES))


def _is_one(loss: Any, kinds: tuple[Any, ...]) -> bool:
    loss = loss.func if isinstance(loss, functools.partial) else loss
    return any(loss is kind or (isinstance(kind, type) and isinstance(loss, kind)) for kind in kinds)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{describe_value(value)} of {list(value)}"
    if isinstance(value, tuple | list):
        return f"{describe_value(value)} of {len(value)}"
    return describe_value(value)


def _name(loss: Any) -> str:
    loss = loss.func if isinstance(loss, functools.partial) else loss
    return str(getattr(loss, "__name__", type(loss).__name__))
