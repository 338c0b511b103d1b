"""Outputs of models, and their labels. Letters: B rows, K outputs a row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recis_hybrid.pipelines.arguments import described
from recis_hybrid.ragged import Batch

_LOGITS = "logits"
# Losses of torch, as functions and as modules.
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
    """Return the bool column ``mask``, ``[B]``, of the rows that count; None without one.

    A column of that name of another dtype, or with more than a value a row, is a feature of the user's own.
    """
    mask = batch.get("mask")
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        return None
    return one_a_row(mask) if one_a_row(mask).dim() == 1 else None


def one_a_row(values: Tensor) -> Tensor:
    """Return ``[B]`` for ``[B]`` and ``[B, 1]``, and anything else as it is."""
    return values[:, 0] if values.dim() == 2 and values.shape[1] == 1 else values


def kept(value: Any, mask: Tensor | None) -> Any:
    """Return a tensor, or the tensors of a tuple, list, dict or dataclass, without padding rows."""
    if mask is None:
        return value
    rows = len(mask)
    return _mapped(value, lambda tensor: tensor[mask] if tensor.dim() > 0 and len(tensor) == rows else tensor)


def in_float32(value: Any) -> Any:
    """Return outputs of lower precision, also within a tuple, list, dict or dataclass, as float32."""
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
        # The outputs of Hugging Face models are dictionaries and dataclasses, which are made by keywords.
        return type(value)(**fields) if dataclasses.is_dataclass(value) else fields
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _mapped(getattr(value, name), function) for name in names})
    return value


def own_loss(returned: Any) -> tuple[Tensor, Any]:
    """Return the loss and outputs of a model that computes its own loss.

    Args:
        returned: The loss alone; ``(loss, outputs, ...)``; a mapping, or an object with attributes, that has ``loss``
            and, if the step is to be evaluated, ``logits``, or one more output.

    Returns:
        The loss, and the outputs; None if there are none.

    Raises:
        TypeError: There is no loss in it.
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
            f"TorchStep: without a loss function the model must return its loss, as loss, (loss, outputs), or a dict "
            f"or object with 'loss' and 'logits', got {_what(returned)}"
            + ("" if loss is None else f" with {described(loss)} for the loss")
        )
    return loss, outputs


def main_output(outputs: Any) -> Tensor | None:
    """Return the tensor that labels and metrics refer to; None if ambiguous.

    That is the outputs themselves; their ``logits``, by key or attribute; the first tensor of a tuple or list; or the
    one tensor that a dict has.
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
    """Return the scores that metrics take.

    Args:
        outputs: What the model returned.
        link: Makes scores of them. None: the main output as it is for losses of numbers and probabilities
            (``mse_loss``, ``binary_cross_entropy`` and the like), else its sigmoid.
        loss: Of the objective.
        where: For messages.

    Raises:
        TypeError: It is not clear which output that is, or ``link`` returns no tensor.
    """
    if link is None or link is torch.sigmoid:
        main = main_output(outputs)
        if main is None:
            raise TypeError(
                f"{where}: which output metrics are of is not clear from {_what(outputs)}; call it 'logits', or say "
                f"how scores are made by Objective(link=lambda outputs: ...)"
            )
        return one_a_row(main if link is None and _is_of_numbers(loss) else torch.sigmoid(main))
    scores = link(outputs)
    if not isinstance(scores, Tensor):
        raise TypeError(f"{where}: Objective(link=) must return a tensor of scores, [B], got {described(scores)}")
    return one_a_row(scores)


def aligned(outputs: Any, labels: Tensor) -> Tensor:
    """Return labels in the shape and dtype that losses expect for the outputs; nothing is broadcast.

    ======================  =====================================  ==========================
    outputs                 labels                                 become
    ======================  =====================================  ==========================
    ``[B]`` or ``[B, 1]``   ``[B]`` or ``[B, 1]``, any dtype       the outputs' shape and dtype
    ``[B, K]``              ``[B, K]``, any dtype                  the outputs' dtype
    ``[B, K]``              ``[B]`` or ``[B, 1]``, integer, bool   classes, int64 ``[B]``
    anything else           any                                    integers as they are, bool and float as float32
    ======================  =====================================  ==========================

    Args:
        outputs: What the model returned.
        labels: The column.
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
    whole = not labels.is_floating_point() and not labels.is_complex()
    for output in candidates:
        flat = one_a_row(labels)
        if whole and flat.dim() == output.dim() - 1:
            return flat.to(output.device, torch.int64)
    device = candidates[0].device if candidates else labels.device
    dtype = torch.float32 if labels.is_floating_point() or labels.dtype is torch.bool else labels.dtype
    return labels.to(device, dtype)


def _same(outputs: torch.Size, labels: torch.Size) -> bool:
    """Whether two shapes differ by no more than a last axis of one element."""
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


def refuse_unfit(loss: Callable[..., Any], outputs: Any, labels: Tensor, column: str, *, first: bool) -> None:
    """Check labels of torch's own losses: shapes, and values where no synchronisation is needed.

    Args:
        loss: A function, or a module.
        outputs: What the loss is given.
        labels: As :func:`aligned` returned them.
        column: Their name.
        first: Whether to look at values on a device that has to be waited for, too.

    Raises:
        ValueError: Shapes would be broadcast, or labels of a binary cross-entropy are not between 0 and 1.
    """
    if not _is_one(loss, _ELEMENTWISE) or not isinstance(outputs, Tensor):
        return
    if outputs.shape != labels.shape:
        raise ValueError(
            f"TorchStep: the outputs are {list(outputs.shape)} and the labels {column!r} {labels.dtype} "
            f"{list(labels.shape)}, which {_name(loss)} would broadcast; give a label for each output, or take "
            f"torch.nn.functional.cross_entropy, with classes as integers"
        )
    looks = first or labels.device.type == "cpu"
    if looks and labels.numel() and _is_one(loss, _BINARY):
        least, greatest = (float(end) for end in labels.detach().aminmax())
        if least < 0 or greatest > 1:  # neither is true of NaN, which the loss shows
            raise ValueError(
                f"TorchStep: the labels {column!r} of {_name(loss)} must lie in [0, 1], got {least:g} to {greatest:g}; "
                f"map them by a transform, or take another loss"
            )


def checked_loss(loss: Any, column: str | None) -> Tensor:
    """Return a loss as a scalar.

    Raises:
        TypeError: It is no tensor.
        ValueError: It has more elements than one.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"TorchStep: the loss must be a tensor of one number, got {described(loss)}")
    if loss.numel() != 1:
        of = "" if column is None else f" of the labels {column!r}"
        raise ValueError(
            f"TorchStep: the loss{of} must be one number, got shape {list(loss.shape)}; take its mean"
            f" (reduction='mean')"
        )
    return loss.reshape(()).float() if loss.dtype in (torch.float16, torch.bfloat16) else loss.reshape(())


def shape_note(outputs: Any, labels: Tensor | None, column: str | None) -> str:
    """Return the shapes and dtypes of a loss's arguments, for a note on its error."""
    said = f"; labels {column!r} {labels.dtype} {list(labels.shape)}" if labels is not None else ""
    return f"TorchStep: the loss was given outputs {_what(outputs)}{said}"


def _is_of_numbers(loss: Any) -> bool:
    return _is_one(loss, (*_OF_NUMBERS, *_OF_PROBABILITIES))


def _is_one(loss: Any, kinds: tuple[Any, ...]) -> bool:
    loss = loss.func if isinstance(loss, functools.partial) else loss
    return any(loss is kind or (isinstance(kind, type) and isinstance(loss, kind)) for kind in kinds)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{described(value)} of {list(value)}"
    if isinstance(value, tuple | list):
        return f"{described(value)} of {len(value)}"
    return described(value)


def _name(loss: Any) -> str:
    loss = loss.func if isinstance(loss, functools.partial) else loss
    return str(getattr(loss, "__name__", type(loss).__name__))
