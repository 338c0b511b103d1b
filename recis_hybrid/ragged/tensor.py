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
    """Rows of unequal length: row i is `values[offsets[i]:offsets[i + 1]]`.

    A column of strings is one too: `values` holds the bytes of all strings as uint8, and a row is a string.

    Rows may hold lists, and these lists again: `offsets` then are those of the innermost lists, and `outer` those of
    the levels above. List j of the innermost level is `values[offsets[j]:offsets[j + 1]]`, and row i of two levels is
    the lists `outer[0][i]` to `outer[0][i + 1]`. Rows of strings have two levels.

    The constructor checks shapes, dtypes and devices always, and the content of offsets where they lie on the CPU:
    looking at offsets on a GPU would make the host wait for it. `validate()` looks there too. Two RaggedTensors compare
    by identity, as `==` on tensors would be neither one bool nor cheap.

    Args:
        values: [N] or [N, ...], any dtype; the rows one after another.
        offsets: [M + 1] int64 on the device of `values`; starts with 0, never decreases and ends with N. M is B unless
            there are levels above.
        weights: [N] float32 on the device of `values`, a weight for each value; None where all count alike. Of lists of
            strings (uint8 with levels above) it is [M], a weight for each string.
        outer: The offsets of the levels above, [B + 1] int64 first; each ends with the number of lists of the next.

    Raises:
        TypeError: An argument is no tensor, or its dtype is not the one above.
        ValueError: A shape, a device or (on the CPU) the content of offsets breaks the rules above.

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
        # A trace has no content to look at, and a tensor of another class (fake, functional) may have none.
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
        """Return a RaggedTensor of tensors that are known to fit together, without checking them.

        Checking costs more than a small transformation, and what is made of a valid RaggedTensor by its rules is valid.
        A GPU may not have made the tensors yet.
        """
        if torch.compiler.is_compiling():
            return cls(values, offsets, weights, outer)
        made = object.__new__(cls)
        # Past the frozen dataclass's own __setattr__.
        made.__dict__.update(values=values, offsets=offsets, weights=weights, outer=outer)
        return made

    @classmethod
    def from_lists(
        cls,
        rows: Iterable[Sequence[Any]],
        *,
        dtype: torch.dtype | None = None,
        weights: Iterable[Sequence[Any]] | None = None,
    ) -> RaggedTensor:
        """Build a RaggedTensor on the CPU from a sequence of numbers for each row, or of sequences of them.

        Args:
            rows: B sequences of numbers, or of sequences as deep everywhere.
            dtype: Of the values; None takes what torch infers from the numbers, and int64 where there are none.
            weights: As many numbers, in sequences of the same lengths.

        Returns:
            The RaggedTensor of B rows.

        Raises:
            ValueError: The weights of a row are not as many as its values, or the depths differ.
        """
        return cls(*build.from_lists(rows, dtype, weights))

    @classmethod
    def from_strings(cls, strings: Iterable[str | bytes | Sequence[Any]]) -> RaggedTensor:
        r"""Build a column of strings, or of lists of strings, on the CPU; `str` is encoded as UTF-8.

        Args:
            strings: B strings, or B sequences of strings.

        Returns:
            The RaggedTensor of B rows with uint8 values.

        Example:
            >>> RaggedTensor.from_strings(["ab", b"", "é"]).to_strings()
            [b'ab', b'', b'\xc3\xa9']
            >>> RaggedTensor.from_strings([["a", "b"], []]).to_strings()
            [[b'a', b'b'], []]
        """
        return cls(*build.from_strings(strings))

    @classmethod
    def from_padded(
        cls, padded: torch.Tensor, lengths: torch.Tensor | None = None, *, padding: float | None = None
    ) -> RaggedTensor:
        """Build one level of rows of the first values of the rows of a dense tensor.

        Args:
            padded: [B, L] or [B, L, ...].
            lengths: [B] integers: how many values of each row count.
            padding: In place of lengths: what stands for none after the last value of a row.

        Raises:
            ValueError: There is not one of lengths and padding, or lengths are not from 0 to L.

        Example:
            >>> RaggedTensor.from_padded(torch.tensor([[7, 8], [9, 0]]), padding=0).to_lists()
            [[7, 8], [9]]
        """
        return cls(*dense.from_padded(padded, lengths, padding))

    @classmethod
    def from_nested(cls, nested: torch.Tensor) -> RaggedTensor:
        """Build one level of rows of a nested tensor of the jagged layout, over its memory if it is packed.

        Args:
            nested: `torch.nested.nested_tensor(..., layout=torch.jagged)`, ragged in its second dimension.

        Raises:
            TypeError: It is no such tensor.
        """
        return cls(*dense.from_nested(nested))

    @classmethod
    def concat(cls, parts: Sequence[RaggedTensor]) -> RaggedTensor:
        """Return the rows of several RaggedTensors one after another; waits for a GPU.

        Args:
            parts: At least one; of the same levels, dtype and device, all weighted or none.

        Raises:
            ValueError: There is none, or they differ.

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
        """How deep lists lie in lists: 1 where rows hold values."""
        return 1 + len(self.outer)

    @property
    def device(self) -> torch.device:
        """Where all of its tensors lie."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def lengths(self) -> torch.Tensor:
        """Return the number of values (or of lists, where rows hold lists) of each row, [B] int64."""
        offsets = self.outer[0] if self.outer else self.offsets
        return offsets[1:] - offsets[:-1]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> RaggedTensor:
        """Return the same rows on `device`: itself where they are there already.

        What an operation on a GPU has left after the last row stays there, unless `non_blocking` is True: how many
        values the rows have is only known when the copy has arrived.

        Args:
            device: Where to.
            non_blocking: As in `torch.Tensor.to`.
        """
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        arrived = moved.values.is_cpu and not self.values.is_cpu and not non_blocking
        # A trace has no numbers to look at, nor has a tensor of another class (fake, functional).
        looks = arrived and type(moved.offsets) is torch.Tensor and not torch.compiler.is_compiling()
        return moved._in_use() if looks else moved

    def pin_memory(self) -> RaggedTensor:
        """Return the same rows in pinned memory, from which a GPU copies without the host waiting."""
        return self._each(lambda tensor: tensor.pin_memory())

    def is_pinned(self) -> bool:
        """Whether all of its tensors lie in pinned memory."""
        return all(tensor.is_pinned() for tensor in self._tensors())

    def to_lists(self) -> list[list[Any]]:
        """Return the values of each row as a list (of lists, where rows hold lists); waits for a GPU."""
        return build.listed(self.values.tolist(), [*self.outer, self.offsets])

    def to_strings(self) -> list[Any]:
        """Return each row of a column of strings as bytes, or as a list of bytes; waits for a GPU to deliver them.

        Raises:
            TypeError: The values are not uint8 [N].
        """
        if self.dtype != torch.uint8 or self.values.dim() != 1:
            raise TypeError(f"RaggedTensor.to_strings: a string column has uint8[N] values, this one is {self!r}")
        return build.listed(self.values.cpu().numpy().tobytes(), [*self.outer, self.offsets])

    def to_padded(self, length: int | None = None, *, padding: float = 0, side: str = "right") -> torch.Tensor:
        """Return one level of rows as a dense tensor.

        Args:
            length: L; None takes the longest row's, for which it waits for a GPU.
            padding: What fills up.
            side: Where it does: "right" after the values, "left" before them.

        Returns:
            [B, L, ...] of the dtype of the values. Weights are left behind: pad `RaggedTensor(r.weights, r.offsets)`.

        Raises:
            ValueError: A row is longer than `length`, there are more levels, or the side is another one.
        """
        return dense.to_padded(self.values, self.offsets, self.outer, length, padding, side)

    def to_nested(self) -> torch.Tensor:
        """Return one level of rows as a nested tensor of the jagged layout, over the same memory.

        Raises:
            ValueError: There are more levels, or weights, which it cannot hold.
        """
        return dense.to_nested(self.values, self.offsets, self.weights, self.outer)

    def validate(self) -> RaggedTensor:
        """Check everything, the content of offsets on a GPU too (and then wait for it).

        On a GPU values may lie after those that the offsets reach: what shortens rows there leaves them.

        Returns:
            Itself.

        Raises:
            TypeError: As the constructor.
            ValueError: As the constructor.
        """
        checks.check_form(self.values, self.offsets, self.weights, self.outer)
        outer = tuple(level.cpu() for level in self.outer)
        checks.check_content(self.values.shape[0], self.offsets.cpu(), outer, tail=not self.values.is_cpu)
        return self

    def __getitem__(self, which: Any) -> Any:
        """Return rows, or with several indices their items.

        Args:
            which: A number gives a row: its values, a view, or a RaggedTensor of its lists, without the weights that
                strings in it have (where the strings are rows themselves, none can). A slice, a tensor or a list
                of numbers, or a bool tensor [B] give a RaggedTensor of those rows; a slice of step 1 views the values.
                Of several, `r[1:3, :2]`, the second is for the items of each row, and so on for the levels of lists and
                then the dimensions of values: a slice takes from each list what it has of it, a number one item, which
                every list must have. `...` stands for all that is left. Indices after the first wait for a GPU.

        Raises:
            IndexError: There is no such row or item, there are more indices than levels and dimensions, or a list of
                numbers is not the first.
            TypeError: An index is none of these: None, a bool, a string, numbers that are no integers.
            ValueError: The step of a slice is 0.

        Example:
            >>> clicks = RaggedTensor.from_lists([[7, 8, 9], [], [5]])
            >>> clicks[:, :2].to_lists(), clicks[::-1, -1:].to_lists(), clicks[0, ::2].tolist(), clicks[[0, 2], 0]
            ([[7, 8], [], [5]], [[5], [], [9]], [7, 9], tensor([7, 5]))
        """
        made = take.rows((self.values, self.offsets, self.weights, self.outer), which)
        return made if isinstance(made, torch.Tensor) else RaggedTensor(*made)

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
        """Return the same rows without what lies after the last one."""
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
        """Return the same rows with every tensor moved; itself where none was."""
        values, offsets, outer = move(self.values), move(self.offsets), tuple(move(level) for level in self.outer)
        weights = None if self.weights is None else move(self.weights)
        before, after = (self.values, self.offsets, self.weights, *self.outer), (values, offsets, weights, *outer)
        if all(one is other for one, other in zip(before, after, strict=True)):
            return self
        # A copy is as valid as its original, and a non-blocking one may still be on its way.
        return RaggedTensor.unchecked(values, offsets, weights, outer)
