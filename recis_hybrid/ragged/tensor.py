"""RaggedTensor: rows of unequal length.

Letters: B rows of a batch, N values over all rows, M lists at the innermost level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recis_hybrid.ragged import build, checks, dense, take


@dataclass(frozen=True, eq=False, repr=False)
class RaggedTensor:
    """Rows of unequal length: row i is ``values[offsets[i]:offsets[i + 1]]``.

    A column of strings is a RaggedTensor whose ``values`` hold the bytes of all strings as uint8; a row is a string.

    Rows may hold lists, and these may hold further lists. Then ``offsets`` belongs to the innermost lists and ``outer``
    to the levels above: list j of the innermost level is ``values[offsets[j]:offsets[j + 1]]``, and row i of two levels
    consists of the lists ``outer[0][i]`` to ``outer[0][i + 1]``. Rows of strings have two levels.

    The constructor always checks shapes, dtypes and devices. It checks the content of offsets on the CPU only, since
    reading them from a GPU would make the host wait; :meth:`validate` does that on request. RaggedTensors compare by
    identity.

    Args:
        values: ``[N]`` or ``[N, ...]``, any dtype: the concatenated rows.
        offsets: int64 ``[M + 1]`` on the device of ``values``; starts with 0, never decreases and ends with N. M equals
            B unless there are levels above.
        weights: float32 ``[N]`` on the device of ``values``, a weight for each value; None means equal weights. Lists
            of strings (uint8 with levels above) have a weight for each string, ``[M]``.
        outer: Offsets of the levels above, int64, the outermost (``[B + 1]``) first; each ends with the number of lists
            of the next level.

    Raises:
        TypeError: If an argument is not a tensor or has another dtype.
        ValueError: If a shape, a device or, on the CPU, the content of offsets breaks these rules.

    Example:
        >>> clicks = RaggedTensor.from_lists([[7, 8], [], [9]])
        >>> clicks
        RaggedTensor(batch_size=3, values=int64[3], weights=None, device=cpu)
        >>> clicks.offsets
        tensor([0, 2, 2, 3])
        >>> clicks.to_lists()
        [[7, 8], [], [9]]
        >>> sessions = RaggedTensor.from_lists([[[7, 8], []], [[9]]])
        >>> sessions.outer[0], sessions.offsets
        (tensor([0, 2, 3]), tensor([0, 2, 2, 3]))
    """

    values: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None = None
    outer: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        if type(self.outer) is not tuple:
            object.__setattr__(self, "outer", tuple(self.outer))
        checks.check_form(self.values, self.offsets, self.weights, self.outer)
        # A trace, or a tensor of another class (fake, functional), has no content to check.
        if self.offsets.is_cpu and type(self.offsets) is torch.Tensor and not torch.compiler.is_compiling():
            checks.check_content(self.values.shape[0], self.offsets, self.outer)

    @classmethod
    def unchecked(
        cls,
        values: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None = None,
        outer: tuple[torch.Tensor, ...] = (),
    ) -> RaggedTensor:
        """Return a RaggedTensor of tensors that are known to be consistent, without checking them.

        Checks cost more than a small transformation of a valid RaggedTensor, and a GPU may still be computing the
        tensors.
        """
        if torch.compiler.is_compiling():
            return cls(values, offsets, weights, outer)
        result = object.__new__(cls)
        # A frozen dataclass rejects assignments.
        result.__dict__.update(values=values, offsets=offsets, weights=weights, outer=outer)
        return result

    @classmethod
    def from_lists(
        cls,
        rows: Iterable[Sequence[Any]],
        *,
        dtype: torch.dtype | None = None,
        weights: Iterable[Sequence[Any]] | None = None,
    ) -> RaggedTensor:
        """Build a RaggedTensor on the CPU from nested lists.

        Args:
            rows: B sequences of numbers, or of sequences nested to the same depth everywhere.
            dtype: Dtype of the values; None infers it as torch does, int64 if there are no values.
            weights: A weight for each value, nested like ``rows``.

        Returns:
            A RaggedTensor of B rows.

        Raises:
            ValueError: If a row has more or fewer weights than values, or depths differ.
        """
        return cls(*build.from_lists(rows, dtype, weights))

    @classmethod
    def from_strings(cls, strings: Iterable[str | bytes | Sequence[Any]]) -> RaggedTensor:
        """Build a column of strings, or of lists of strings, on the CPU; ``str`` is encoded as UTF-8.

        Args:
            strings: B strings, or B sequences of strings.

        Returns:
            A RaggedTensor of B rows with uint8 values.

        Example:
            >>> RaggedTensor.from_strings(["ab", b"", "é"]).to_strings()
            ['ab', '', 'é']
            >>> RaggedTensor.from_strings([["a", "b"], []]).to_strings(decode=False)
            [[b'a', b'b'], []]
        """
        return cls(*build.from_strings(strings))

    @classmethod
    def from_padded(
        cls, padded: torch.Tensor, lengths: torch.Tensor | None = None, *, padding: float | None = None
    ) -> RaggedTensor:
        """Build rows of one level from a dense tensor, dropping the padding.

        Args:
            padded: ``[B, L]`` or ``[B, L, ...]``.
            lengths: Integers ``[B]``: the number of values of each row, from its start.
            padding: The padding value, instead of ``lengths``; it is dropped from the end of each row.

        Raises:
            ValueError: If neither or both of ``lengths`` and ``padding`` are given, or a length is not from 0 to L.

        Example:
            >>> RaggedTensor.from_padded(torch.tensor([[7, 8], [9, 0]]), padding=0).to_lists()
            [[7, 8], [9]]
        """
        return cls(*dense.from_padded(padded, lengths, padding))

    @classmethod
    def from_nested(cls, nested: torch.Tensor) -> RaggedTensor:
        """Build rows of one level from a nested tensor of the jagged layout, sharing its memory if it is packed.

        Args:
            nested: ``torch.nested.nested_tensor(..., layout=torch.jagged)``, ragged in its second dimension.

        Raises:
            TypeError: If the tensor is not nested or has another layout.
        """
        return cls(*dense.from_nested(nested))

    @classmethod
    def concat(cls, parts: Sequence[RaggedTensor]) -> RaggedTensor:
        """Concatenate the rows of several RaggedTensors; waits for a GPU.

        Args:
            parts: At least one; all with the same levels, dtype and device, and all weighted or none.

        Raises:
            ValueError: If there are no parts, or they differ.

        Example:
            >>> RaggedTensor.concat([RaggedTensor.from_lists([[1]]), RaggedTensor.from_lists([[2, 3], []])]).to_lists()
            [[1], [2, 3], []]
        """
        return cls(*take.concat([(one.values, one.offsets, one.weights, one.outer) for one in parts]))

    @property
    def batch_size(self) -> int:
        """The number of rows, B."""
        return (self.outer[0] if self.outer else self.offsets).shape[0] - 1

    @property
    def levels(self) -> int:
        """The nesting depth of lists: 1 if rows hold values."""
        return 1 + len(self.outer)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def lengths(self) -> torch.Tensor:
        """Return the number of values (or of lists, if rows hold lists) of each row, int64 ``[B]``."""
        offsets = self.outer[0] if self.outer else self.offsets
        return offsets[1:] - offsets[:-1]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> RaggedTensor:
        """Return the same rows on ``device``; ``self`` if they are already there.

        Operations on a GPU may leave unused values after the last row. A copy to the CPU drops them, unless
        ``non_blocking`` is True, because the number of values in use is known only after the copy.

        Args:
            device: Target device.
            non_blocking: See ``torch.Tensor.to``.
        """
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        arrived = moved.values.is_cpu and not self.values.is_cpu and not non_blocking
        # A trace, or a tensor of another class (fake, functional), has no numbers to read.
        readable = arrived and type(moved.offsets) is torch.Tensor and not torch.compiler.is_compiling()
        return moved._in_use() if readable else moved

    def pin_memory(self) -> RaggedTensor:
        """Return the same rows in pinned memory, from which a GPU can copy asynchronously."""
        return self._each(lambda tensor: tensor.pin_memory())

    def is_pinned(self) -> bool:
        """Return whether all tensors are in pinned memory."""
        return all(tensor.is_pinned() for tensor in self._tensors())

    def to_lists(self) -> list[list[Any]]:
        """Return each row as a list of its values, nested if rows hold lists; waits for a GPU."""
        return build.listed(self.values.tolist(), [*self.outer, self.offsets])

    def to_strings(self, *, decode: bool = True) -> list[Any]:
        """Return each row of a column of strings as a string, or as a list of strings; waits for a GPU.

        Args:
            decode: Whether to return ``str``, decoded as UTF-8; False returns the ``bytes``.

        Raises:
            TypeError: If the values are not uint8 ``[N]``.
            ValueError: If a string is not UTF-8; the message names its row.
        """
        if self.dtype != torch.uint8 or self.values.dim() != 1:
            raise TypeError(f"RaggedTensor.to_strings: values must be uint8[N], the bytes of strings, got {self!r}")
        strings: list[Any] = build.listed(self.values.cpu().numpy().tobytes(), [self.offsets])
        if decode:
            remedy = ", or get bytes with to_strings(decode=False)"
            strings = list(build.decoded("RaggedTensor.to_strings", strings, self.outer, remedy))
        return build.listed(strings, self.outer)

    def to_padded(self, length: int | None = None, *, padding: float = 0, side: str = "right") -> torch.Tensor:
        """Return rows of one level as a dense tensor.

        Args:
            length: L; None for the length of the longest row, for which the host waits for a GPU.
            padding: Value that fills short rows.
            side: ``"right"`` to pad after the values, ``"left"`` before them.

        Returns:
            ``[B, L, ...]`` in the dtype of the values, without weights. To pad these as well, call ``to_padded`` of
            ``RaggedTensor(r.weights, r.offsets)``.

        Raises:
            ValueError: If a row is longer than ``length``, rows hold lists, or ``side`` is neither. On a GPU, where the
                host would have to wait for the lengths, longer rows are cut instead: ``"right"`` keeps their first
                values, ``"left"`` their last.
        """
        return dense.to_padded(self.values, self.offsets, self.outer, length, padding, side)

    def to_nested(self) -> torch.Tensor:
        """Return rows of one level as a nested tensor of the jagged layout that shares their memory.

        Raises:
            ValueError: If rows hold lists, or there are weights, which a nested tensor cannot hold.
        """
        return dense.to_nested(self.values, self.offsets, self.weights, self.outer)

    def validate(self) -> RaggedTensor:
        """Check all rules, including the content of offsets; waits for a GPU.

        On a GPU, unused values may follow the last offset; operations that shorten rows may leave some.

        Returns:
            ``self``.

        Raises:
            TypeError: See the constructor.
            ValueError: See the constructor.
        """
        checks.check_form(self.values, self.offsets, self.weights, self.outer)
        outer = tuple(level.cpu() for level in self.outer)
        checks.check_content(self.values.shape[0], self.offsets.cpu(), outer, tail=not self.values.is_cpu)
        return self

    def __getitem__(self, which: Any) -> Any:
        """Return rows, or items of rows.

        The first index selects rows. Further indices, as in ``r[1:3, :2]``, select within each row, one for each level
        of lists and then for each dimension of the values; they wait for a GPU. ``...`` stands for full slices.

        Args:
            which: An integer returns a row: a view of its values, or a RaggedTensor of its lists (without weights if
                these are strings). A slice, a list or tensor of integers, or a bool mask ``[B]`` returns a RaggedTensor
                of these rows; a slice of step 1 shares the values. Within rows, a slice selects the items that each
                list has, and an integer selects one item that every list must have.

        Raises:
            IndexError: If there is no such row or item, there are more indices than levels and dimensions, or a list or
                mask is not the first index.
            TypeError: If an index is of another type: None, a bool, a string, or numbers that are not integers.
            ValueError: If the step of a slice is 0.

        Example:
            >>> clicks = RaggedTensor.from_lists([[7, 8, 9], [], [5]])
            >>> clicks[:, :2].to_lists(), clicks[::-1, -1:].to_lists(), clicks[0, ::2].tolist(), clicks[[0, 2], 0]
            ([[7, 8], [], [5]], [[5], [], [9]], [7, 9], tensor([7, 5]))
        """
        result = take.rows((self.values, self.offsets, self.weights, self.outer), which)
        return result if isinstance(result, torch.Tensor) else RaggedTensor(*result)

    def __len__(self) -> int:
        return self.batch_size

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        levels = f"levels={self.levels}, " if self.outer else ""
        return (
            f"RaggedTensor(batch_size={self.batch_size}, {levels}values={checks.describe(self.values)}, "
            f"weights={None if self.weights is None else checks.describe(self.weights)}, device={self.device})"
        )

    def _in_use(self) -> RaggedTensor:
        """Return the same rows without the unused values after the last one."""
        outer, count = [], len(self)
        for level in self.outer:
            outer.append(level[: count + 1])
            count = int(level[count])
        used = int(self.offsets[count])
        weights = self.weights
        if weights is not None:
            weights = weights[: count if self.outer and self.dtype == torch.uint8 else used]
        return RaggedTensor.unchecked(self.values[:used], self.offsets[: count + 1], weights, tuple(outer))

    def _tensors(self) -> list[torch.Tensor]:
        weights = [] if self.weights is None else [self.weights]
        return [self.values, self.offsets, *weights, *self.outer]

    def _each(self, move: Any) -> RaggedTensor:
        """Return the same rows with every tensor moved; ``self`` if none moved."""
        values, offsets, outer = move(self.values), move(self.offsets), tuple(move(level) for level in self.outer)
        weights = None if self.weights is None else move(self.weights)
        before, after = (self.values, self.offsets, self.weights, *self.outer), (values, offsets, weights, *outer)
        if all(one is other for one, other in zip(before, after, strict=True)):
            return self
        # A copy is as valid as its original, and a non-blocking one may not have finished.
        return RaggedTensor.unchecked(values, offsets, weights, outer)
