"""Options of ``ColumnDataset``: reading of files, sharing of rows, and the dialect of CSV files."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from recis_hybrid.validation import check_choice, check_flag, check_integer

Uneven: TypeAlias = Literal["wrap", "drop", "pad"] | None
"""Values of ``ShardOptions.uneven``."""


@dataclass(frozen=True, kw_only=True)
class CsvOptions:
    r"""Dialect of CSV files, for ``ReadOptions(csv=...)``.

    With these options, files with an unknown suffix are read as CSV. A row with a wrong number of fields is then an
    error in the options (a ValueError), not damage that ``on_bad_file="skip"`` skips.

    Raises:
        TypeError: ``column_names`` or ``null_values`` is a single string.
        ValueError: ``delimiter``, ``quote``, ``escape`` or ``comment`` is invalid, two of them are equal, a column name
            occurs twice, or the encoding is unknown.

    Example:
        >>> CsvOptions(delimiter="|", column_names=["user", "item"]).delimiter
        '|'
    """

    delimiter: str | None = None
    """Character between fields; None means a tab for ``.tsv`` files and a comma for others."""
    quote: str | None = '"'
    """Character around fields that contain delimiters or line breaks; None treats quotes as ordinary characters."""
    escape: str | None = None
    """Character that precedes a literal delimiter or quote, such as a backslash; None means that a quote inside a
    quoted field is doubled."""
    column_names: Sequence[str] | None = None
    """Column names of files without a header; None takes them from the first line."""
    comment: str | None = None
    """Prefix of lines to ignore, such as ``"#"``; None keeps all lines."""
    encoding: str = "utf-8"
    """Encoding, by a name that Python knows: ``"latin-1"``, ``"utf-16"``. A byte order mark is ignored."""
    null_values: Sequence[str] | None = None
    r"""Spellings of null, also in string columns: ``["", "NA", r"\N"]``. None treats empty fields and the usual
    spellings (``NA``, ``NULL``, ``nan``, ...) as nulls in columns of numbers and dates, and reads strings unchanged."""

    def __post_init__(self) -> None:
        characters = {"delimiter": self.delimiter, "quote": self.quote, "escape": self.escape}
        for name, value in characters.items():
            if value is not None and (not isinstance(value, str) or len(value) != 1 or not value.isascii()):
                raise ValueError(f"CsvOptions: {name} must be one ASCII character or None, got {value!r}")
            if value is not None and value in "\r\n":
                raise ValueError(f"CsvOptions: {name} must not be a line break, got {value!r}")
        used = [value for value in characters.values() if value is not None]
        if len(set(used)) < len(used):
            raise ValueError(f"CsvOptions: delimiter, quote and escape must differ, got {characters}")
        for name in ("column_names", "null_values"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise TypeError(f"CsvOptions: {name} must be a sequence of strings, got a str; write [{values!r}]")
        if self.column_names is not None and len(set(self.column_names)) < max(len(self.column_names), 1):
            raise ValueError(f"CsvOptions: column_names must be unique and at least one, got {self.column_names}")
        if self.comment is not None and (not self.comment or "\n" in self.comment or "\r" in self.comment):
            raise ValueError(f"CsvOptions: comment must be a prefix of a line, got {self.comment!r}")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ValueError(
                f'CsvOptions: encoding must be one that Python knows, such as "latin-1", got {self.encoding!r}'
            ) from error


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options for reading the files of a ``ColumnDataset``: location, threads, memory, and damaged files.

    Of the options for threads, prefetching and memory, only ``shuffle_buffer`` changes the order of the rows.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.

    Example:
        >>> ReadOptions(num_threads=4, prefetch=8).on_bad_file
        'raise'
    """

    num_threads: int = 1
    """Number of threads that each decode one piece (row group, stripe, ...), and of further threads that run
    ``transforms`` or pin memory. If there are fewer pieces than threads, or ``prefetch`` is 0, Arrow decodes columns in
    its own threads, whose number ``pyarrow.set_cpu_count`` sets."""
    prefetch: int = 2
    """Batches prefetched by threads; 0 reads in the consumer's thread. Memory holds at most this many batches,
    the decoded rows they are cut from (``num_threads`` + 3 times ``decoded_rows``), the blocks of ``shuffle_buffer``,
    and, for each decoding thread, pyarrow's buffers of a row group, or a whole stripe, record batch or text file."""
    decoded_rows: int = 65_536
    """Rows decoded at a time, rounded up to whole batches. Fewer rows take less memory (more so with small row groups)
    and more time per row. The order of rows and the reading position do not depend on it."""
    shuffle_buffer: int = 262_144
    """Consecutive rows that are permuted together when shuffling; two such blocks are in memory at a time."""
    pin_memory: bool = False
    """Copy batches to pinned memory, from which a GPU copies without blocking the host."""
    on_bad_file: Literal["raise", "skip"] = "raise"
    """``"skip"`` skips files that are damaged, missing, or changed since they were opened, and reports each by a
    RuntimeWarning and in ``ColumnDataset.skipped``. Rows lost during a pass make batches shorter, or even empty, so
    that the other rows keep their positions and all ranks keep their numbers of batches."""
    filesystem: Any = None
    """File system of the paths, from ``pyarrow.fs`` or fsspec; None means the local one, or that of a URL."""
    partitions: bool = True
    """Read folders named ``key=value`` as a column ``key`` of their files."""
    csv: CsvOptions | None = None
    """Dialect of CSV files; None means the usual one."""

    def __post_init__(self) -> None:
        for name, low in (("num_threads", 1), ("prefetch", 0), ("decoded_rows", 1), ("shuffle_buffer", 1)):
            check_integer("ReadOptions", name, getattr(self, name), low)
        check_flag("ReadOptions", "pin_memory", self.pin_memory)
        check_flag("ReadOptions", "partitions", self.partitions)
        check_choice("ReadOptions", "on_bad_file", self.on_bad_file, ("raise", "skip"))
        if not isinstance(self.csv, CsvOptions | None):
            raise TypeError(f"ReadOptions: csv must be a CsvOptions, got {self.csv!r}")


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """The share of the rows that a process reads, and the handling of an incomplete last turn.

    Raises:
        TypeError: The rank or the world size is not an integer.
        ValueError: Only one of rank and world size is given, they are out of range, or ``uneven`` is unknown.

    Example:
        >>> ShardOptions(rank=1, world_size=4, uneven="pad").rank
        1
    """

    rank: int | None = None
    """Rank of this process among those that share the data; None means the rank in torch.distributed, or 0 in a single
    process. With an explicit rank, ranks do not check that they opened the same data."""
    world_size: int | None = None
    """Number of processes that share the data; None as for ``rank``."""
    uneven: Uneven = None
    """Handling of the last turn of an epoch if its rows do not fill a batch for every rank. All ranks get the same
    number of batches in any case.

    - None: every row is read once, in short batches of about equal size. If a rank would get no row, the previous turn
      is divided as well. (Empty batches occur only if ``batch_size`` is 1 or there are fewer rows than ranks.)
    - ``"wrap"``: batches are filled with rows from the start of the epoch.
    - ``"pad"``: like ``"wrap"``, with a bool column ``mask`` [B] that is False for the added rows.
    - ``"drop"``: the turn is dropped unless every rank gets a batch in it.
    """

    def __post_init__(self) -> None:
        check_choice("ShardOptions", "uneven", self.uneven, (None, "wrap", "drop", "pad"))
        if self.rank is None and self.world_size is None:
            return
        if self.rank is None or self.world_size is None:
            raise ValueError(
                f"ShardOptions: rank and world_size must be given together, got {self.rank} and {self.world_size}; "
                f"omit both to use those of torch.distributed"
            )
        check_integer("ShardOptions", "rank", self.rank, 0)
        check_integer("ShardOptions", "world_size", self.world_size, 1)
        if self.rank >= self.world_size:
            raise ValueError(
                f"ShardOptions: rank must be less than world_size, got {self.rank} of {self.world_size}; ranks count "
                f"from 0"
            )
