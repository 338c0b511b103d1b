"""CsvOptions: the dialect of CSV files."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class CsvOptions:
    r"""Dialect of CSV files, for `ColumnDataset(csv=)`.

    With options given, files whose names end in nothing that is known are read as CSV, and rows with another number of
    fields are an error of the options (a ValueError), not damage that `on_bad_file="skip"` leaves out.

    Args:
        delimiter: Between fields, one character; None takes a tab for `.tsv` files and a comma for others.
        quote: Around fields that hold delimiters or line breaks, one character; None for files in which quotes are
            characters like any others.
        escape: In front of a character that is meant as such, a backslash for instance; None for no such character,
            where a quote inside a quoted field is written twice.
        column_names: Of files without a header; None takes the first line's.
        comment: What lines begin with that are left out, `"#"` for instance; None for none.
        encoding: Of the text, a name that Python knows: `"latin-1"`, `"utf-16"`. A byte order mark is left out.
        null_values: What is written for a null, of text too: `["", "NA", r"\N"]`. None takes the empty field and the
            usual spellings (`NA`, `NULL`, `nan` and so on) for nulls of numbers and dates, and text as it is.

    Raises:
        TypeError: The names or null values are a single string.
        ValueError: A delimiter, quote, escape or comment is not one character, two of them are equal, a name occurs
            twice, or the encoding is unknown.

    Example:
        >>> CsvOptions(delimiter="|", column_names=["user", "item"]).delimiter
        '|'
    """

    _: KW_ONLY
    delimiter: str | None = None
    quote: str | None = '"'
    escape: str | None = None
    column_names: Sequence[str] | None = None
    comment: str | None = None
    encoding: str = "utf-8"
    null_values: Sequence[str] | None = None

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
            raise ValueError(f"CsvOptions: column_names must be one name or more, each once, got {self.column_names}")
        if self.comment is not None and (not self.comment or "\n" in self.comment or "\r" in self.comment):
            raise ValueError(f"CsvOptions: comment must be what a line begins with, got {self.comment!r}")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ValueError(
                f'CsvOptions: encoding must be one that Python knows, "latin-1" for one, got {self.encoding!r}'
            ) from error
