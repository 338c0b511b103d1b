"""GradientSync: keeps replicated parameters bitwise equal on all ranks.

The counterpart of DistributedDataParallel for unwrapped modules: gradients are averaged after backward, in one
collective per dtype and device.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import distributed
from recis_hybrid.embedding import Anchor


class GradientSync:
    """Averages the gradients of dense parameters over all ranks and broadcasts rank 0's buffers.

    Parameters that DistributedDataParallel or FSDP synchronizes are excluded, and so are embedding tables, which
    exchange their gradients themselves.

    Args:
        modules: Modules with the parameters and buffers.
        optimizers: Optimizers of the parameters; their hyperparameters must be equal on all ranks.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._modules = list(modules)
        self._optimizers = list(optimizers)
        self._parameters: dict[str, nn.Parameter] | None = None
        # DistributedDataParallel ignores parameters that were frozen when it was constructed, for ever.
        self._frozen_in_ddp = {
            name: parameter
            for wrapper in self._wrappers()
            if isinstance(wrapper, DistributedDataParallel)
            for name, parameter in wrapper.module.named_parameters()
            if not parameter.requires_grad and not isinstance(parameter, Anchor)
        }
        self._sums: list[Tensor] = []
        # For each bucket and parameter, whether this rank has a gradient.
        self._has_gradient: list[list[bool]] = []

    def broadcast(self) -> None:
        """Copy rank 0's parameters and buffers to all ranks; collective.

        Raises:
            ValueError: Names, shapes or dtypes of parameters or buffers, or hyperparameters of optimizers, differ
                between ranks.
        """
        self._parameters = self._named_parameters()
        tensors = {**self._parameters, **self._named_buffers()}
        _check_equal(
            "the parameters or buffers of towers differ between ranks in names, shapes or dtypes; build the same "
            "model on all ranks",
            [(name, list(t.shape), str(t.dtype), t.device.type) for name, t in tensors.items()],
        )
        _check_equal(
            "the hyperparameters of optimizers differ between ranks, and towers would diverge; build the same "
            "optimizers on all ranks",
            [_hyperparameters(optimizer) for optimizer in self._optimizers],
        )
        _broadcast([tensor.detach() for tensor in tensors.values()])

    def clear(self) -> None:
        """Discard gradients of an unfinished step."""
        self._sums, self._has_gradient = [], []

    def add(self, share: float) -> None:
        """Move this rank's gradients out of the parameters; :meth:`finish` writes their mean back.

        Args:
            share: Weight of the gradients: this rank's share of the samples. With 0, even NaN and infinite gradients
                are ignored.

        Raises:
            ValueError: A gradient is sparse, or DistributedDataParallel would not average it.
        """
        if unfrozen := [name for name, parameter in self._frozen_in_ddp.items() if parameter.requires_grad]:
            raise ValueError(
                f"TorchStep: {len(unfrozen)} parameters, such as {unfrozen[0]!r}, were unfrozen inside "
                f"DistributedDataParallel, which would not average their gradients; do not wrap the module, because "
                f"the step averages gradients itself, or wrap it after unfreezing"
            )
        for number, bucket in enumerate(self._buckets()):
            values, has_gradient = [], []
            for name, parameter in bucket:
                gradient = parameter.grad
                if gradient is not None and gradient.layout is not torch.strided:
                    raise ValueError(
                        f"TorchStep: the gradient of {name} is sparse, but {distributed.world_size()} ranks can only "
                        f"average dense ones; use an EmbeddingEngine for its ids, or build it with sparse=False"
                    )
                has_gradient.append(gradient is not None)
                values.append(parameter.new_zeros(parameter.shape) if gradient is None else gradient.detach())
                parameter.grad = None
            flat = torch.cat([_flat(value) for value in values])
            flat = torch.zeros_like(flat) if share == 0 else flat.mul_(share)
            # One flag per parameter follows the gradients: whether the parameter has one.
            flags = torch.tensor(has_gradient, dtype=flat.dtype).to(flat.device, non_blocking=True)
            flat = torch.cat([flat, flags])
            if number < len(self._sums):
                self._sums[number] += flat
                earlier = self._has_gradient[number]
                self._has_gradient[number] = [a or b for a, b in zip(earlier, has_gradient, strict=True)]
            else:
                self._sums.append(flat)
                self._has_gradient.append(has_gradient)

    def finish(self) -> None:
        """Set each parameter's gradient to the sum over ranks, or to None if no rank has one; collective.

        Buffers are overwritten with those of rank 0.
        """
        works = []
        for number, flat in enumerate(self._sums):
            self._sums[number] = flat = distributed.sendable(flat)
            works.append(dist.all_reduce(flat, async_op=True))
        for work in works:
            work.wait()
        for bucket, flat, has_gradient in zip(self._buckets(), self._sums, self._has_gradient, strict=True):
            parameters = [parameter for _, parameter in bucket]
            flat = flat.to(parameters[0].device)
            sizes = [_flat(parameter.detach()).numel() for parameter in parameters]
            *gradients, flags = flat.split([*sizes, len(bucket)])
            # Reading the flags synchronizes the device. Avoid it if this rank has all gradients.
            any_rank_has = has_gradient if all(has_gradient) else flags.tolist()
            for parameter, gradient, exists in zip(parameters, gradients, any_rank_has, strict=True):
                if exists:
                    parameter.grad = _like(gradient, parameter)
        self.clear()
        if buffers := list(self._named_buffers().values()):
            _broadcast(buffers)

    def _buckets(self) -> list[list[tuple[str, nn.Parameter]]]:
        """Return the parameters that may have gradients by dtype and device, in the same order on all ranks."""
        found: dict[tuple[torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
        if self._parameters is None:
            self._parameters = self._named_parameters()
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                found.setdefault((parameter.dtype, parameter.device), []).append((name, parameter))
        return list(found.values())

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        excluded = self._synchronized_elsewhere()
        result: dict[str, nn.Parameter] = {}
        for name, parameter in (pair for module in self._modules for pair in module.named_parameters()):
            if id(parameter) not in excluded and not isinstance(parameter, Anchor):
                excluded.add(id(parameter))
                result[name if name not in result else f"{name} ({len(result)})"] = parameter
        return result

    def _named_buffers(self) -> dict[str, Tensor]:
        excluded: set[int] = set()
        for wrapper in self._wrappers():
            excluded |= {id(buffer) for buffer in wrapper.buffers()}
        result: dict[str, Tensor] = {}
        for module in self._modules:
            for name, buffer in module.named_buffers():
                if id(buffer) not in excluded and not _is_dtensor(buffer):
                    excluded.add(id(buffer))
                    result[name if name not in result else f"{name} ({len(result)})"] = buffer
        return result

    def _synchronized_elsewhere(self) -> set[int]:
        """Return the ``id()`` of the parameters that wrappers or optimizers synchronize."""
        found: set[int] = set()
        for wrapper in self._wrappers():
            ignored = getattr(wrapper, "parameters_to_ignore", ())
            found |= {
                id(parameter)
                for name, parameter in getattr(wrapper, "module", wrapper).named_parameters()
                if name not in ignored
            }
        for optimizer in self._optimizers:
            # True for bridge.OptaxOptimizer(group=...).
            if getattr(optimizer, "averages_gradients", False):
                found |= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found |= {id(p) for module in self._modules for p in module.parameters() if _is_dtensor(p)}
        return found

    def _wrappers(self) -> Iterator[nn.Module]:
        for module in self._modules:
            for each in module.modules():
                if isinstance(each, DistributedDataParallel) or type(each).__name__ == "FullyShardedDataParallel":
                    yield each


def unscale_together(
    scaler: torch.amp.GradScaler, optimizers: Sequence[torch.optim.Optimizer], has_gradients: Sequence[bool]
) -> list[bool]:
    """Unscale gradients, and skip the update on all ranks if a gradient overflows on any; collective.

    Ranks own different rows of a table, so an overflow may occur on only some of them. Without this function, their
    loss scales would diverge.

    Args:
        scaler: Gradient scaler, with the same state on all ranks. Call ``scaler.step`` afterwards for optimizers with
            gradients.
        optimizers: The model's optimizers.
        has_gradients: For each optimizer, whether it has gradients on this rank.

    Returns:
        For each optimizer, whether it has gradients on any rank.
    """
    overflow_flags = []
    for optimizer in optimizers:
        state = scaler._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.READY:
            scaler.unscale_(optimizer)
        overflow_flags.append(state["found_inf_per_device"])
    overflows = [max((float(flag) for flag in flags.values()), default=0.0) for flags in overflow_flags]
    maxima = distributed.sendable(torch.tensor([list(map(float, has_gradients)), overflows]))
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    any_rank_has, overflows = maxima.tolist()
    for optimizer, flags, overflow in zip(optimizers, overflow_flags, overflows, strict=True):
        device = optimizer.param_groups[0]["params"][0].device
        flags.update({each: torch.full((1,), overflow, device=each) for each in flags or [device]})
    return [flag > 0 for flag in any_rank_has]


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _like(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """Copy a gradient into memory with the parameter's layout: JAX imports only aligned memory without a copy."""
    gradient = torch.empty_like(parameter)
    shape = torch.view_as_real(gradient).shape if gradient.is_complex() else gradient.shape
    (torch.view_as_real(gradient) if gradient.is_complex() else gradient).copy_(flat.view(shape))
    return gradient


def _is_dtensor(tensor: Tensor) -> bool:
    # Importing the module is slow, and unless it has been imported, no DTensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def _broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with rank 0's, in one collective per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    for device, group in by_device.items():
        flat = distributed.sendable(torch.cat([_bytes(tensor) for tensor in group]))
        dist.broadcast(flat, src=0)
        if distributed.rank() == 0:
            continue
        parts = flat.to(device).split([tensor.numel() * tensor.element_size() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            # The clone aligns the part, which may not start at a multiple of the item size.
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _hyperparameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the class and hyperparameters of an optimizer, in a form that ranks can compare."""
    groups = [
        {key: repr(value) for key, value in group.items() if key != "params" and isinstance(value, _NUMBERS)}
        for group in optimizer.param_groups
    ]
    return [type(optimizer).__name__, groups]


_NUMBERS = (bool, int, float, tuple, Tensor, type(None))


def _check_equal(fault: str, description: Sequence[Any]) -> None:
    """Raise ValueError if the ranks' descriptions differ; collective."""
    digest = int.from_bytes(hashlib.sha256(repr(description).encode()).digest()[:7], "little")
    extremes = distributed.sendable(torch.tensor([digest, -digest]))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes.tolist() != [digest, -digest]:
        text = repr(list(description))
        text = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."
        raise ValueError(f"TorchStep: {fault}. Rank {distributed.rank()} has {text}")


_MOST_CHARACTERS = 400
"""Maximum length of a description in a message."""
