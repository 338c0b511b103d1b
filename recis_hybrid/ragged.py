"""RaggedTensor, rows of unequal length in two tensors, and Batch, what every stage takes and gives.

Letters: B rows of a batch, N values over all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch


@dataclass(frozen=True, eq=False, repr=False)
class RaggedTensor:
    """Rows of unequal length: row i is `values[offsets[i]:offsets[i + 1]]`.

    A column of strings is one too: `values` holds the bytes of all strings as uint8, and a row is a string.

    The constructor checks shapes, dtypes and devices always, and the content of `offsets` where they lie on the CPU:
    looking at offsets on a GPU would make the host wait for it. `validate()` looks there too. Two RaggedTensors compare
    by identity, as `==` on tensors would be neither one bool nor cheap.

    Args:
        values: [N] or [N, ...], any dtype; the rows one after another.
        offsets: [B + 1] int64 on the device of `values`; starts with 0, never decreases and ends with N.
        weights: [N] float32 on the device of `values`, a weight for each value; None where all count alike.

    Raises:
        TypeError: An argument is no tensor, or its dtype is not the one above.
        ValueError: A shape, a device or (on the CPU) the content of the offsets breaks the rules above.

    Example:
        >>> clicks = RaggedTensor.from_lists([[7, 8], [], [9]])
        >>> clicks
        RaggedTensor(batch_size=3, values=int64[3], weights=None, device=cpu)
        >>> clicks.offsets
        tensor([0, 2, 2, 3])
        >>> clicks.to_lists()
        [[7, 8], [], [9]]
    """

    values: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._validate_form()
        # A trace has no content to look at, and a tensor of another class (fake, functional) may have none.
        if self.offsets.is_cpu and type(self.offsets) is torch.Tensor and not torch.compiler.is_compiling():
            self._validate_content(self.offsets)

    @classmethod
    def from_lists(
        cls,
        rows: Iterable[Sequence[float]],
        *,
        dtype: torch.dtype | None = None,
        weights: Iterable[Sequence[float]] | None = None,
    ) -> RaggedTensor:
        """Builds a RaggedTensor on the CPU from a sequence of numbers for each row.

        Args:
            rows: B sequences of numbers.
            dtype: Of the values; None takes what torch infers from the numbers, and int64 where there are none.
            weights: B sequences as long as those of `rows`.

        Returns:
            The RaggedTensor of B rows.

        Raises:
            ValueError: The weights of a row are not as many as its values.
        """
        rows = [list(row) for row in rows]
        flat = [value for row in rows for value in row]
        values = torch.tensor(flat, dtype=torch.int64 if dtype is None and not flat else dtype)
        flat_weights = None
        if weights is not None:
            weights = [list(row) for row in weights]
            if [len(row) for row in weights] != [len(row) for row in rows]:
                raise ValueError(
                    f"RaggedTensor.from_lists: each row needs as many weights as values, got rows of "
                    f"{[len(row) for row in rows]} values and {[len(row) for row in weights]} weights"
                )
            flat_weights = torch.tensor([weight for row in weights for weight in row], dtype=torch.float32)
        return cls(values, _offsets_of([len(row) for row in rows]), flat_weights)

    @classmethod
    def from_strings(cls, strings: Iterable[str | bytes]) -> RaggedTensor:
        r"""Builds a column of strings on the CPU; `str` is encoded as UTF-8.

        Args:
            strings: B strings.

        Returns:
            The RaggedTensor of B rows with uint8 values.

        Example:
            >>> RaggedTensor.from_strings(["ab", b"", "é"]).to_strings()
            [b'ab', b'', b'\xc3\xa9']
        """
        encoded = [string.encode() if isinstance(string, str) else bytes(string) for string in strings]
        # A bytearray is writable, which torch wants of memory that it shares.
        joined = bytearray(b"".join(encoded))
        values = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        return cls(values, _offsets_of([len(string) for string in encoded]))

    @property
    def batch_size(self) -> int:
        """The number of rows, B."""
        return self.offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Where all of its tensors lie."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def lengths(self) -> torch.Tensor:
        """Returns the number of values of each row, [B] int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> RaggedTensor:
        """Returns the same rows on `device`: itself where they are there already.

        Args:
            device: Where to.
            non_blocking: As in `torch.Tensor.to`.
        """
        values = self.values.to(device, non_blocking=non_blocking)
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        weights = None if self.weights is None else self.weights.to(device, non_blocking=non_blocking)
        if values is self.values and offsets is self.offsets and weights is self.weights:
            return self
        # Past the checks: a copy is as valid as its original, and a non-blocking one may still be on its way.
        moved = object.__new__(RaggedTensor)
        for name, tensor in (("values", values), ("offsets", offsets), ("weights", weights)):
            object.__setattr__(moved, name, tensor)
        return moved

    def to_lists(self) -> list[list[float]]:
        """Returns the values of each row as a list; waits for a GPU to deliver them."""
        values, offsets = self.values.tolist(), self.offsets.tolist()
        return [values[start:stop] for start, stop in zip(offsets, offsets[1:], strict=False)]

    def to_strings(self) -> list[bytes]:
        """Returns each row of a column of strings as bytes; waits for a GPU to deliver them.

        Raises:
            TypeError: The values are not uint8 [N].
        """
        if self.dtype != torch.uint8 or self.values.dim() != 1:
            raise TypeError(f"RaggedTensor.to_strings: a string column has uint8[N] values, this one is {self!r}")
        joined, offsets = self.values.cpu().numpy().tobytes(), self.offsets.tolist()
        return [joined[start:stop] for start, stop in zip(offsets, offsets[1:], strict=False)]

    def validate(self) -> RaggedTensor:
        """Checks everything, the content of the offsets on a GPU too (and then waits for it).

        Returns:
            Itself.

        Raises:
            TypeError: As the constructor.
            ValueError: As the constructor.
        """
        self._validate_form()
        self._validate_content(self.offsets.cpu())
        return self

    def __len__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        return (
            f"RaggedTensor(batch_size={self.batch_size}, values={_describe(self.values)}, "
            f"weights={None if self.weights is None else _describe(self.weights)}, device={self.device})"
        )

    def _validate_form(self) -> None:
        for name in ("values", "offsets", "weights"):
            tensor = getattr(self, name)
            if not (isinstance(tensor, torch.Tensor) or (name == "weights" and tensor is None)):
                raise TypeError(f"RaggedTensor: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if self.values.dim() == 0:
            raise ValueError("RaggedTensor: values must be [N] or [N, ...], got a tensor without dimensions")
        if self.offsets.dtype != torch.int64:
            raise TypeError(
                f"RaggedTensor: offsets must be int64, got {self.offsets.dtype}; convert with .to(torch.int64)"
            )
        if self.offsets.dim() != 1 or self.offsets.shape[0] == 0:
            raise ValueError(
                f"RaggedTensor: offsets must be [B + 1] with at least one entry, got {_describe(self.offsets)}; "
                f"a batch of no rows has the offsets [0]"
            )
        if self.offsets.device != self.values.device:
            raise ValueError(
                f"RaggedTensor: offsets must lie beside the values, got {self.offsets.device} and {self.values.device}"
            )
        if self.weights is None:
            return
        if self.weights.dtype != torch.float32:
            raise TypeError(f"RaggedTensor: weights must be float32, got {self.weights.dtype}; convert with .float()")
        if self.weights.shape != self.values.shape[:1]:
            raise ValueError(
                f"RaggedTensor: weights must be [N] with N = {self.values.shape[0]}, got {_describe(self.weights)}"
            )
        if self.weights.device != self.values.device:
            raise ValueError(
                f"RaggedTensor: weights must lie beside the values, got {self.weights.device} and {self.values.device}"
            )

    def _validate_content(self, offsets: torch.Tensor) -> None:
        # numpy's view of the same memory: a tenth of the time of three torch calls, and a reader builds many of these.
        array = offsets.numpy()
        if array[0] != 0:
            raise ValueError(
                f"RaggedTensor: offsets must start with 0, got {int(array[0])}; "
                f"a slice of offsets needs its first entry subtracted"
            )
        if (array[1:] < array[:-1]).any():
            row = int(np.flatnonzero(array[1:] < array[:-1])[0])
            raise ValueError(
                f"RaggedTensor: offsets must not decrease, got {int(array[row])} and then {int(array[row + 1])} "
                f"at row {row}"
            )
        if array[-1] != self.values.shape[0]:
            raise ValueError(
                f"RaggedTensor: offsets must end with the number of values, {self.values.shape[0]}, "
                f"got {int(array[-1])}"
            )


Batch: TypeAlias = dict[str, torch.Tensor | RaggedTensor]
"""Columns by name, all with the same number of rows B: a [B, ...] tensor or a RaggedTensor of B rows each."""


def batch_size(batch: Mapping[str, torch.Tensor | RaggedTensor]) -> int:
    """Returns the number of rows that all columns of a batch have.

    Args:
        batch: Columns by name.

    Raises:
        ValueError: The batch has no columns, or they disagree.

    Example:
        >>> batch_size({"user": torch.tensor([1, 2]), "clicks": RaggedTensor.from_lists([[7, 8], []])})
        2
    """
    sizes = {
        name: column.batch_size if isinstance(column, RaggedTensor) else column.shape[0]
        for name, column in batch.items()
    }
    if len(set(sizes.values())) != 1:
        raise ValueError(f"batch: its columns must have one number of rows, got {sizes or 'no columns'}")
    return next(iter(sizes.values()))


def batch_to(
    batch: Mapping[str, torch.Tensor | RaggedTensor],
    device: torch.device | str | int,
    *,
    non_blocking: bool = False,
) -> Batch:
    """Returns the batch with all of its columns on `device`; columns that are there already are not copied.

    Args:
        batch: Columns by name.
        device: Where to.
        non_blocking: As in `torch.Tensor.to`.
    """
    return {name: column.to(device, non_blocking=non_blocking) for name, column in batch.items()}


def _offsets_of(lengths: list[int]) -> torch.Tensor:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
