"""Sums of the gradients of JAX-owned parameters over the ranks of a process group.

The leaves of a pytree are packed into buckets of a fixed layout: leaves of the same dtype are concatenated in the
pytree's order, and a new bucket starts when one would exceed its limit. A jitted program writes the weighted gradients
into the buckets. torch.distributed sums each bucket in place, as a tensor in the same memory, which then becomes a new
JAX array. So nothing is copied between torch and JAX, and every rank adds the same elements in the same order at each
step.

Legend: W ranks.
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

from recis_hybrid.bridge.exchange.dlpack import to_jax, to_torch

_BUCKET_BYTES = 25 << 20
"""The default of DistributedDataParallel."""


class GradientAllReduce:
    """Sum of gradients over ranks, for JAX pytrees as DistributedDataParallel is for torch modules.

    Calling it does everything. A program that computes gradients in one jitted call and applies them in another may
    instead put :meth:`pack` at the end of the first and :meth:`unpack` at the start of the second, with :meth:`sum`
    between them.

    Args:
        params: A pytree of floating-point arrays, or of objects with their shapes and dtypes. This is the layout, which
            must be the same on all ranks.
        group: A torch.distributed group; None for all ranks. Gloo sums on CPUs, NCCL on GPUs.
        bucket_bytes: The maximum size in bytes of a bucket with several leaves.

    Attributes:
        buckets: For each bucket, the indices of its leaves.

    Raises:
        RuntimeError: if torch.distributed is not initialized, or the layouts of the ranks differ.
        TypeError: if a leaf is not floating-point.

    Example:
        Two ranks, each with half of the samples::

            dist.init_process_group("gloo")
            all_reduce = GradientAllReduce(params)
            params = all_reduce.broadcast(params)
            loss, gradients = value_and_grad(params, batch)  # mean over this rank's samples
            gradients = all_reduce(gradients)  # mean over all samples
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
                    f"GradientAllReduce: leaf {jax.tree_util.keystr(path)} must be floating-point, got {leaf.dtype}; "
                    "omit it"
                )
        self._shapes = [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for _, leaf in paths]
        self.buckets = _buckets(self._shapes, bucket_bytes)
        self._agree(repr(([jax.tree_util.keystr(path) for path, _ in paths], self._shapes, self.buckets)))
        self._pack, self._unpack = jax.jit(self.pack), jax.jit(self.unpack)

    def __call__(self, gradients: Any, weight: float | None = None) -> Any:
        """Sum weighted gradients over all ranks. All ranks must call this, with or without gradients.

        Args:
            gradients: A pytree of the structure, shapes and dtypes of ``params``; None on a rank without gradients.
            weight: The weight of this rank's gradients. If the loss is the mean over the rank's own samples, use its
                share of all samples (``EmbeddingEngine.share``). None for 1 / W. With 0 the gradients are ignored,
                even if they are NaN, for example from a mean over no samples.

        Returns:
            A pytree of arrays: the sum over all ranks, the same on each.

        Raises:
            RuntimeError: from the group's backend, if another rank has died or does not participate.
            ValueError: if the structure, shapes or dtypes of the gradients differ from those of ``params``.
        """
        if gradients is None:
            zeros = [jnp.zeros(shape, dtype) for shape, dtype in self._shapes]
            gradients, weight = jax.tree.unflatten(self._tree, zeros), 0.0
        return self._unpack(self.sum(self._pack(gradients, self._weight(weight))))

    def pack(self, gradients: Any, weight: Any) -> list[jax.Array]:
        """Write weighted gradients into buckets; for use inside jit.

        Args:
            gradients: A pytree of the structure, shapes and dtypes of ``params``.
            weight: The weight of the gradients, a scalar.

        Returns:
            The buckets, one-dimensional arrays.

        Raises:
            ValueError: if the structure, shapes or dtypes of the gradients differ from those of ``params``.
        """
        leaves, tree = jax.tree.flatten(gradients)
        shapes = [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]
        if tree != self._tree or shapes != self._shapes:
            raise ValueError(
                f"GradientAllReduce: the gradients must have the layout of the parameters, {self._tree} of "
                f"{self._shapes}, got {tree} of {shapes}"
            )
        weighted = [jnp.where(weight == 0, 0, leaf * weight).astype(leaf.dtype) for leaf in leaves]
        return [jnp.concatenate([weighted[number].reshape(-1) for number in bucket]) for bucket in self.buckets]

    def sum(self, buckets: Sequence[jax.Array]) -> list[jax.Array]:
        """Sum buckets over all ranks in place. The input arrays must not be used afterwards.

        Args:
            buckets: The buckets of :meth:`pack`.

        Returns:
            The sums, arrays in the same memory.

        Raises:
            RuntimeError: from the group's backend, if another rank has died or does not participate.
        """
        tensors = [to_torch(bucket) for bucket in buckets]
        works = [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]
        for work in works:
            if work is not None:
                work.wait()
        return [to_jax(tensor) for tensor in tensors]

    def unpack(self, buckets: Sequence[jax.Array]) -> Any:
        """Read the leaves from buckets; for use inside jit.

        Args:
            buckets: The buckets of :meth:`sum`.

        Returns:
            A pytree of the structure, shapes and dtypes of ``params``.
        """
        leaves: list[Any] = [None] * len(self._shapes)
        for bucket, numbers in zip(buckets, self.buckets, strict=True):
            sizes = [int(np.prod(self._shapes[number][0])) for number in numbers]
            parts = jnp.split(bucket, np.cumsum(sizes)[:-1])
            for number, part in zip(numbers, parts, strict=True):
                leaves[number] = part.reshape(self._shapes[number][0])
        return jax.tree.unflatten(self._tree, leaves)

    def broadcast(self, params: Any) -> Any:
        """Return the parameters of the group's first rank on all ranks, to start training from equal values.

        Args:
            params: A pytree of the structure, shapes and dtypes of the layout.

        Returns:
            A pytree of new arrays.
        """
        tensors = [to_torch(bucket) for bucket in self._pack(params, self._weight(1.0))]
        for tensor in tensors:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return self._unpack([to_jax(tensor) for tensor in tensors])

    def _weight(self, weight: float | None) -> np.float64:
        """Return a weight as a numpy scalar, with 1 / W for None."""
        # JAX narrows float64 to float32 while x64 is off.
        return np.float64(1 / dist.get_world_size(self.group) if weight is None else weight)

    def _agree(self, layout: str) -> None:
        """Raise on all ranks if their layouts differ."""
        device = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:8], "little", signed=True)
        ours = torch.tensor([digest], device=device)
        digests = [torch.empty_like(ours) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(digests, ours, group=self.group)
        rank = dist.get_rank(self.group)
        different = [other for other, theirs in enumerate(digests) if int(theirs) != digest]
        if different:
            raise RuntimeError(
                f"GradientAllReduce: names, shapes and dtypes of the parameters, and bucket_bytes, must be the same on "
                f"all ranks; those of ranks {different} differ from those of rank {rank}"
            )


def _buckets(shapes: Sequence[tuple[tuple[int, ...], Any]], max_bytes: int) -> list[list[int]]:
    """Return the indices of the leaves of each bucket: leaves of one dtype, in order, up to ``max_bytes``."""
    current: dict[Any, tuple[list[int], int]] = {}
    buckets = []
    for number, (shape, dtype) in enumerate(shapes):
        size = int(np.prod(shape)) * dtype.itemsize
        bucket, filled = current.get(dtype, ([], max_bytes))
        if not bucket or filled + size > max_bytes:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(number)
        current[dtype] = (bucket, filled + size)
    return buckets
