"""Gradients of parameters that JAX owns, summed over the ranks of a process group.

The leaves of a pytree lie in buckets of a fixed layout: those of one dtype end to end, in the pytree's order, a new
bucket where one would grow beyond its limit. A program compiled by JAX writes the buckets, weighted already. Each is
one tensor for torch.distributed, in the same memory, which is summed in place and goes back to JAX as a new array. So
nothing is copied at the border, and every rank adds the same elements in the same order at each step.

Letters: W ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.distributed as dist

from recis_hybrid.bridge.dlpack import to_jax, to_torch

_BUCKET_BYTES = 25 << 20
"""As DistributedDataParallel's."""


class GradientAllReduce:
    """Sums gradients over ranks: for pytrees of JAX what DistributedDataParallel does for modules of torch.

    Calling it does all of it. A program that computes gradients in one jitted call and applies them in another may put
    :meth:`pack` at the end of the first and :meth:`unpack` at the start of the second, with :meth:`sum` between them.

    Args:
        params: a pytree of floating arrays, or of whatever has their shapes and dtypes: the layout, the same on all
            ranks.
        group: of torch.distributed; None for all ranks. Gloo sums on CPUs, NCCL on GPUs.
        bucket_bytes: the most bytes of a bucket that holds several leaves.

    Raises:
        RuntimeError: if torch.distributed is not initialised, or the ranks have other layouts.
        TypeError: if a leaf is not floating.

    Example:
        Two ranks, each with half of the samples::

            dist.init_process_group("gloo")
            all_reduce = GradientAllReduce(params)
            params = all_reduce.broadcast(params)
            loss, gradients = value_and_grad(params, batch)  # of the mean over the rank's samples
            gradients = all_reduce(gradients)  # of the mean over all
    """

    def __init__(
        self, params: Any, group: dist.ProcessGroup | None = None, *, bucket_bytes: int = _BUCKET_BYTES
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("GradientAllReduce: call torch.distributed.init_process_group first")
        self.group = group
        paths, tree = jax.tree_util.tree_flatten_with_path(params)
        self._tree: Any = tree
        for path, leaf in paths:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"GradientAllReduce: the leaf {jax.tree_util.keystr(path)} is {leaf.dtype}, and gradients are "
                    "floating; leave it out"
                )
        self._shapes = [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for _, leaf in paths]
        self.buckets = _buckets(self._shapes, bucket_bytes)
        """For each bucket, the numbers of its leaves."""
        self._agree(repr(([jax.tree_util.keystr(path) for path, _ in paths], self._shapes, self.buckets)))
        self._pack, self._unpack = jax.jit(self.pack), jax.jit(self.unpack)

    def __call__(self, gradients: Any, weight: float | None = None) -> Any:
        """Sum weighted gradients; all ranks call it together, with gradients or not.

        Args:
            gradients: a pytree as `params`; None on a rank that has none.
            weight: what this rank's gradients are multiplied by: its share of the samples, where they are those of a
                mean over its own (`EmbeddingEngine.share`). None for 1 / W. Where it is 0 the gradients do not count,
                whatever they are: the mean over no samples is not a number.

        Returns:
            A pytree of arrays: the sum over all ranks, the same on each.

        Raises:
            RuntimeError: if another rank has died or does not take part, from the group's backend.
            ValueError: if the gradients have another structure, or other shapes or dtypes.
        """
        if gradients is None:
            zeros = [jnp.zeros(shape, dtype) for shape, dtype in self._shapes]
            gradients, weight = jax.tree.unflatten(self._tree, zeros), 0.0
        return self._unpack(self.sum(self._pack(gradients, self._weight(weight))))

    def pack(self, gradients: Any, weight: Any) -> list[jax.Array]:
        """Write weighted gradients into buckets; for use inside jit.

        Args:
            gradients: a pytree as `params`.
            weight: a scalar, as in a call.

        Returns:
            The buckets, one dimension each.

        Raises:
            ValueError: if the gradients have another structure, or other shapes or dtypes.
        """
        leaves, tree = jax.tree.flatten(gradients)
        shapes = [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]
        if tree != self._tree or shapes != self._shapes:
            raise ValueError(
                f"GradientAllReduce: the gradients must be laid out as the parameters: {self._tree} of {self._shapes}, "
                f"got {tree} of {shapes}"
            )
        weighted = [jnp.where(weight == 0, 0, leaf * weight).astype(leaf.dtype) for leaf in leaves]
        return [jnp.concatenate([weighted[number].reshape(-1) for number in bucket]) for bucket in self.buckets]

    def sum(self, buckets: Sequence[jax.Array]) -> list[jax.Array]:
        """Sum buckets over all ranks, in their memory: the arrays must not be used any more.

        Args:
            buckets: from :meth:`pack`.

        Returns:
            Arrays in the same memory.

        Raises:
            RuntimeError: if another rank has died or does not take part, from the group's backend.
        """
        tensors = [to_torch(bucket) for bucket in buckets]
        works = [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]
        for work in works:
            if work is not None:
                work.wait()
        return [to_jax(tensor) for tensor in tensors]

    def unpack(self, buckets: Sequence[jax.Array]) -> Any:
        """Take buckets apart; for use inside jit.

        Args:
            buckets: from :meth:`sum`.

        Returns:
            A pytree as `params`.
        """
        leaves: list[Any] = [None] * len(self._shapes)
        for bucket, numbers in zip(buckets, self.buckets, strict=True):
            sizes = [int(np.prod(self._shapes[number][0])) for number in numbers]
            parts = jnp.split(bucket, np.cumsum(sizes)[:-1])
            for number, part in zip(numbers, parts, strict=True):
                leaves[number] = part.reshape(self._shapes[number][0])
        return jax.tree.unflatten(self._tree, leaves)

    def broadcast(self, params: Any) -> Any:
        """Return the parameters of the group's first rank, on all: where training starts.

        Args:
            params: a pytree as the one that the layout is of.

        Returns:
            A pytree of arrays, in memory of their own.
        """
        tensors = [to_torch(bucket) for bucket in self._pack(params, self._weight(1.0))]
        for tensor in tensors:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return self._unpack([to_jax(tensor) for tensor in tensors])

    def _weight(self, weight: float | None) -> np.float64:  # which JAX narrows where x64 is off
        return np.float64(1 / dist.get_world_size(self.group) if weight is None else weight)

    def _agree(self, layout: str) -> None:
        device = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:8], "little", signed=True)
        ours = torch.tensor([digest], device=device)
        told = [torch.empty_like(ours) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(told, ours, group=self.group)
        rank = dist.get_rank(self.group)
        differ = [other for other, said in enumerate(told) if int(said) != digest]
        if differ:
            raise RuntimeError(
                f"GradientAllReduce: rank {rank}: the ranks {differ} have parameters of other names, shapes or dtypes, "
                "or another bucket_bytes; make them alike on all ranks"
            )


def _buckets(shapes: Sequence[tuple[tuple[int, ...], Any]], most: int) -> list[list[int]]:
    """Return the numbers of the leaves of each bucket: of one dtype, in order, until the next is too many."""
    open_of: dict[Any, tuple[list[int], int]] = {}
    buckets = []
    for number, (shape, dtype) in enumerate(shapes):
        size = int(np.prod(shape)) * dtype.itemsize
        bucket, filled = open_of.get(dtype, ([], most))
        if not bucket or filled + size > most:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(number)
        open_of[dtype] = (bucket, filled + size)
    return buckets
