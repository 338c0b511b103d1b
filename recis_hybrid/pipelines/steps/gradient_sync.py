"""GradientSync: keep replicated parameters bitwise equal on all ranks.

What DistributedDataParallel does for a module that is wrapped in it, for all that is not: gradients are averaged in one
collective for each dtype, after backward. Letters: W ranks, P parameters.
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
    """Averages the gradients of dense parameters over all ranks, and broadcasts rank 0's buffers.

    Parameters that DistributedDataParallel or FSDP look after are left to them, and embedding tables, which exchange
    gradients themselves.

    Args:
        modules: Whose parameters and buffers are meant.
        optimizers: What they update is meant, too, where it belongs to no module.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._modules = list(modules)
        self._optimizers = list(optimizers)
        self._parameters: dict[str, nn.Parameter] | None = None
        self._sums: list[Tensor] = []
        # For each bucket and parameter, whether this rank has a gradient.
        self._has: list[list[bool]] = []

    def broadcast(self) -> None:
        """Copy rank 0's parameters and buffers to all ranks; collective.

        Raises:
            ValueError: The ranks have parameters or buffers of other names, shapes or dtypes, or optimizers with other
                hyperparameters.
        """
        self._parameters = self._named_parameters()
        tensors = {**self._parameters, **self._named_buffers()}
        described = [(name, list(t.shape), str(t.dtype), t.device.type) for name, t in tensors.items()]
        _refuse_other(
            "towers have parameters or buffers of other names, shapes or dtypes; build the model alike", described
        )
        _refuse_other(
            "optimizers have other hyperparameters, so that towers would drift apart; give the same",
            [_hyperparameters(optimizer) for optimizer in self._optimizers],
        )
        _broadcast([tensor.detach() for tensor in tensors.values()])

    def clear(self) -> None:
        """Discard gradients of an unfinished step."""
        self._sums, self._has = [], []

    def add(self, share: float) -> None:
        """Take this rank's gradients out of the parameters, for :meth:`finish` to put their mean back.

        Args:
            share: What they count: this rank's share of the samples. Where it is 0 they do not count, whatever they
                are.

        Raises:
            ValueError: A gradient is sparse.
        """
        for number, bucket in enumerate(self._buckets()):
            values, has = [], []
            for name, parameter in bucket:
                gradient = parameter.grad
                if gradient is not None and gradient.layout is not torch.strided:
                    raise ValueError(
                        f"TorchStep: the gradient of {name} is sparse, and {distributed.world_size()} ranks average "
                        f"dense ones; use an EmbeddingEngine for its ids, or build it with sparse=False"
                    )
                has.append(gradient is not None)
                values.append(parameter.new_zeros(parameter.shape) if gradient is None else gradient.detach())
                parameter.grad = None
            # At the end, for each parameter whether there is a gradient.
            flat = torch.cat([_flat(value) for value in values])
            flat = torch.zeros_like(flat) if share == 0 else flat.mul_(share)
            flat = torch.cat([flat, torch.tensor(has, dtype=flat.dtype).to(flat.device, non_blocking=True)])
            if number < len(self._sums):
                self._sums[number] += flat
                self._has[number] = [one or other for one, other in zip(self._has[number], has, strict=True)]
            else:
                self._sums.append(flat)
                self._has.append(has)

    def finish(self) -> None:
        """Set each parameter's gradient to the sum over ranks, None if no rank has one; collective.

        Buffers become rank 0's.
        """
        works = []
        for number, flat in enumerate(self._sums):
            self._sums[number] = flat = distributed.sendable(flat)
            works.append(dist.all_reduce(flat, async_op=True))
        for work in works:
            work.wait()
        for bucket, flat, mine in zip(self._buckets(), self._sums, self._has, strict=True):
            parameters = [parameter for _, parameter in bucket]
            flat = flat.to(parameters[0].device)
            sizes = [_flat(parameter.detach()).numel() for parameter in parameters]
            *gradients, has = flat.split([*sizes, len(bucket)])
            # The device is waited for only where this rank lacks one.
            there = mine if all(mine) else has.tolist()
            for parameter, gradient, exists in zip(parameters, gradients, there, strict=True):
                if exists:
                    parameter.grad = _like(gradient, parameter)
        self.clear()
        if buffers := list(self._named_buffers().values()):
            _broadcast(buffers)

    def _buckets(self) -> list[list[tuple[str, nn.Parameter]]]:
        """Return the parameters that may have gradients, by dtype and device, in the same order on all ranks."""
        found: dict[tuple[torch.dtype, torch.device], list[tuple[str, nn.Parameter]]] = {}
        if self._parameters is None:
            self._parameters = self._named_parameters()
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                found.setdefault((parameter.dtype, parameter.device), []).append((name, parameter))
        return list(found.values())

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        given = [pair for module in self._modules for pair in module.named_parameters()]
        given += [
            (f"{type(optimizer).__name__}.param_groups[{number}][{place}]", parameter)
            for optimizer in self._optimizers
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        ]
        known = self._cared_for()
        result: dict[str, nn.Parameter] = {}
        for name, parameter in given:
            if id(parameter) not in known and not isinstance(parameter, Anchor):
                known.add(id(parameter))
                result[name if name not in result else f"{name} ({len(result)})"] = parameter
        return result

    def _named_buffers(self) -> dict[str, Tensor]:
        known: set[int] = set()
        for wrapped in self._wrapped():
            known |= {id(buffer) for buffer in wrapped.buffers()}
        result: dict[str, Tensor] = {}
        for module in self._modules:
            for name, buffer in module.named_buffers():
                if id(buffer) not in known and not _is_dtensor(buffer):
                    known.add(id(buffer))
                    result[name if name not in result else f"{name} ({len(result)})"] = buffer
        return result

    def _cared_for(self) -> set[int]:
        """Return the parameters that other wrappers synchronise."""
        known: set[int] = set()
        for wrapped in self._wrapped():
            ignored = getattr(wrapped, "parameters_to_ignore", ())
            known |= {
                id(parameter)
                for name, parameter in getattr(wrapped, "module", wrapped).named_parameters()
                if name not in ignored
            }
        for optimizer in self._optimizers:
            # As bridge.OptaxOptimizer(group=...) does.
            if getattr(optimizer, "averages_gradients", False):
                known |= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        known |= {id(p) for module in self._modules for p in module.parameters() if _is_dtensor(p)}
        return known

    def _wrapped(self) -> Iterator[nn.Module]:
        for module in self._modules:
            for each in module.modules():
                if isinstance(each, DistributedDataParallel) or type(each).__name__ == "FullyShardedDataParallel":
                    yield each


def unscaled_together(
    scaler: torch.amp.GradScaler, optimizers: Sequence[torch.optim.Optimizer], has_gradients: Sequence[bool]
) -> list[bool]:
    """Unscale gradients, and skip the update on all ranks if any overflows; collective.

    Ranks have other rows of a table, so that only some see an overflow; left alone, their scales would drift apart.

    Args:
        scaler: The same on all ranks; ``scaler.step`` may be called afterwards for what is returned as True.
        optimizers: Of the model.
        has_gradients: For each, whether it has gradients on this rank.

    Returns:
        For each, whether it has gradients on some rank.
    """
    founds = []
    for optimizer in optimizers:
        state = scaler._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.READY:
            scaler.unscale_(optimizer)
        founds.append(state["found_inf_per_device"])
    overflows = [max((float(each) for each in found.values()), default=0.0) for found in founds]
    flags = distributed.sendable(torch.tensor([list(map(float, has_gradients)), overflows]))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    has, overflows = flags.tolist()
    for optimizer, found, overflow in zip(optimizers, founds, overflows, strict=True):
        device = optimizer.param_groups[0]["params"][0].device
        found.update({each: torch.full((1,), overflow, device=each) for each in found or [device]})
    return [there > 0 for there in has]


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _like(flat: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a gradient in its own memory, with the parameter's layout: JAX takes aligned memory without a copy."""
    gradient = torch.empty_like(parameter)
    shape = torch.view_as_real(gradient).shape if gradient.is_complex() else gradient.shape
    (torch.view_as_real(gradient) if gradient.is_complex() else gradient).copy_(flat.view(shape))
    return gradient


def _is_dtensor(tensor: Tensor) -> bool:
    # Nothing is one where its module was not loaded, which takes long.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def _broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with rank 0's bytes, in one collective for each device."""
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
            # Of a memory of its own, since it may not start at a multiple of its width.
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _hyperparameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the numbers of an optimizer's parameter groups."""
    groups = [
        {key: repr(value) for key, value in group.items() if key != "params" and isinstance(value, _NUMBERS)}
        for group in optimizer.param_groups
    ]
    return [type(optimizer).__name__, groups]


_NUMBERS = (bool, int, float, tuple, Tensor, type(None))


def _refuse_other(what: str, described: Sequence[Any]) -> None:
    """Raise ValueError if the ranks' descriptions differ."""
    digest = int.from_bytes(hashlib.sha256(repr(described).encode()).digest()[:7], "little")
    told = distributed.sendable(torch.tensor([digest, -digest]))
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    if told.tolist() != [digest, -digest]:
        shown = repr(list(described))
        raise ValueError(
            f"TorchStep: the ranks' {what} on all ranks. Rank {distributed.rank()} has "
            f"{shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}"
        )


_SHOWN = 400
"""Characters of a message."""
