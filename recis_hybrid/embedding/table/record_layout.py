"""RecordLayout: the memory layout of one row's record."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from recis_hybrid import ops
from recis_hybrid.embedding.initializers import Initializer, overflow_threshold
from recis_hybrid.validation import check_integer, describe_value

META = ("updated_step", "seen_step", "frequency")
"""Columns of :meth:`HashTable.export` with the metadata of rows, int64 ``[n]`` each."""

META_BITS = {"updated_step": 40, "seen_step": 40, "frequency": 48}
"""Bits of each column in a record."""

MAX_STATE_FIELDS = 8
_ALIGN = 16
META_BYTES = 16
_LINE = 64
_LONG = 256


@dataclass(frozen=True)
class MemberTable:
    """A table as named by the user; one :class:`HashTable` holds one or more of them."""

    name: str
    initializer: Initializer


@dataclass(frozen=True)
class StateField:
    """One tensor of optimizer state, stored in every row."""

    name: str
    """Name as in torch.optim: ``exp_avg``, ``sum``, …"""
    width: int | None = None
    """Number of elements; None: as many as the embedding has."""
    first_value: float = 0.0
    """Initial value."""
    dtype: torch.dtype | None = None
    """Dtype; None: the layout's ``state_dtype``."""
    whole_rows: bool = False
    """True if an update of one element depends on the others of its row."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"StateField: name must be a string, e.g. 'exp_avg', got {self.name!r}")
        where = f"StateField {self.name!r}"
        if not isinstance(self.dtype, torch.dtype | None):
            raise TypeError(f"{where}: dtype must be a torch.dtype, e.g. torch.float32, or None, got {self.dtype!r}")
        if self.width is not None:
            check_integer(where, "width", self.width, low=1)
        if not isinstance(self.first_value, int | float) or not math.isfinite(self.first_value):
            raise ValueError(f"{where}: first_value must be a finite number, got {self.first_value!r}")

    @property
    def splits_by_column(self) -> bool:
        """True if ranks that have some elements of each row can update these elements and their state."""
        return self.width is None and not self.whole_rows


def check_state_fields(where: str, fields: object) -> tuple[StateField, ...]:
    """Return optimizer state fields as a tuple.

    Raises:
        TypeError: If they are not a tuple or list of StateField.
    """
    if not isinstance(fields, tuple | list) or not all(isinstance(field, StateField) for field in fields):
        raise TypeError(
            f"{where} must be a tuple of StateField, e.g. optim.Adam.row_state(), got {describe_value(fields)}"
        )
    return tuple(fields)


@dataclass(frozen=True)
class RecordLayout:
    """Memory layout of a record: embedding, metadata, optimizer state, each part padded to 16 bytes.

    Records of 256 bytes or more are padded to a multiple of 64, so that embeddings start at cache lines.

    The metadata take 16 bytes: the steps of the last update and of the last training lookup, and the frequency.

    Example:
        >>> layout = RecordLayout(dim=10, state=(StateField("exp_avg"), StateField("exp_avg_sq")))
        >>> layout.offset("exp_avg"), layout.record_bytes
        (64, 160)
    """

    dim: int
    """Elements of the embedding."""
    state: tuple[StateField, ...] = ()
    """Optimizer state, in order."""
    dtype: torch.dtype = torch.float32
    """Dtype of the embedding: float32, bfloat16 or float16."""
    state_dtype: torch.dtype = torch.float32
    """Dtype of optimizer state fields that have none: float32, or that of the embedding."""
    first: int = 0
    """If rows are split by column, the first element of the row that is stored here."""
    whole_dim: int | None = None
    """If rows are split by column, the number of elements of the whole row; None: rows are whole."""

    def __post_init__(self) -> None:
        check_integer("RecordLayout", "dim", self.dim, low=1)
        object.__setattr__(self, "state", check_state_fields("RecordLayout: state", self.state))
        if self.dtype not in ops.blocks.ELEMENTS:
            raise ValueError(f"RecordLayout: dtype must be one of {list(ops.blocks.ELEMENTS)}, got {self.dtype}")
        if self.state_dtype not in (torch.float32, self.dtype):
            raise ValueError(
                f"RecordLayout: state_dtype must be torch.float32 or the embedding's {self.dtype}, "
                f"got {self.state_dtype}"
            )
        for field in self.state:
            if field.dtype not in (None, torch.float32, self.dtype):
                raise ValueError(
                    f"RecordLayout: {field.name}: dtype must be torch.float32 or the embedding's {self.dtype}, "
                    f"got {field.dtype}"
                )
            dtype = field.dtype or self.state_dtype
            if abs(field.first_value) >= overflow_threshold(dtype):
                raise ValueError(
                    f"RecordLayout: {field.name}: first_value must fit {dtype}, at most "
                    f"{torch.finfo(dtype).max:g}, got {field.first_value}"
                )
        if len(self.state) > MAX_STATE_FIELDS:
            raise ValueError(
                f"RecordLayout: a row has at most {MAX_STATE_FIELDS} fields of optimizer state, got {len(self.state)}"
            )
        names = [field.name for field in self.state]
        if len(set(names)) != len(names) or "embedding" in names:
            raise ValueError(f"RecordLayout: state names must be distinct and not 'embedding', got {names}")

    def columns(self, first: int, count: int) -> RecordLayout:
        """Return the layout of ``count`` elements of a row, starting at ``first``, and their optimizer state."""
        return replace(self, dim=count, first=first, whole_dim=self.dim)

    @property
    def whole(self) -> RecordLayout:
        """The layout of whole rows; this layout, if rows are not split by column."""
        return self if self.whole_dim is None else replace(self, dim=self.whole_dim, first=0, whole_dim=None)

    def width(self, name: str) -> int:
        """Return the number of elements of a part: ``"embedding"`` or the name of a state field."""
        field = self._field(name)
        return self.dim if field is None or field.width is None else field.width

    def part_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a part."""
        field = self._field(name)
        return self.dtype if field is None else field.dtype or self.state_dtype

    def offset(self, name: str) -> int:
        """Return the byte offset of a part within the record."""
        self._field(name)
        return self._offsets[name]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts, in order."""
        return ("embedding", *(field.name for field in self.state))

    @property
    def meta_offset(self) -> int:
        """The byte offset of the row's metadata."""
        return self._offsets[""]

    @property
    def record_bytes(self) -> int:
        """The size of a record in bytes."""
        return self._offsets["end"]

    @property
    def element(self) -> int:
        """The kernels' number of the embedding's dtype."""
        return ops.blocks.ELEMENTS[self.dtype]

    @property
    def state_element(self) -> int:
        """The kernels' number of the optimizer state's dtype."""
        return ops.blocks.ELEMENTS[self.state_dtype]

    @cached_property
    def state_args(self) -> ops.blocks.StateArgs:
        """The optimizer state in the form kernels expect."""
        dtypes = [self.part_dtype(field.name) for field in self.state]
        return ops.blocks.StateArgs(
            [self.offset(field.name) for field in self.state],
            [self.width(field.name) for field in self.state],
            [dtype.itemsize for dtype in dtypes],
            [_bits(field.first_value, dtype) for field, dtype in zip(self.state, dtypes, strict=True)],
        )

    def _field(self, name: str) -> StateField | None:
        if name == "embedding":
            return None
        field = next((field for field in self.state if field.name == name), None)
        if field is None:
            known = [field.name for field in self.state]
            raise KeyError(f"the record has no optimizer state {name!r}; it has {known}")
        return field

    @cached_property
    def _offsets(self) -> dict[str, int]:
        offsets, at = {"embedding": 0}, _padded(self.dim * self.dtype.itemsize)
        offsets[""] = at
        at += META_BYTES
        for field in self.state:
            offsets[field.name] = at
            at += _padded(self.width(field.name) * self.part_dtype(field.name).itemsize)
        # Long records start at a cache line, so that a vector touches as few lines as possible.
        offsets["end"] = at if at < _LONG else -(-at // _LINE) * _LINE
        return offsets


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _bits(value: float, dtype: torch.dtype) -> int:
    as_integers = torch.int32 if dtype.itemsize == 4 else torch.int16
    return int(torch.tensor([value], dtype=dtype).view(as_integers)) & (1 << 8 * dtype.itemsize) - 1
