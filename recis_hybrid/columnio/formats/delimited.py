"""CSV files, as one piece: a row cannot be found without reading all rows before it. Imports pyarrow."""

from __future__ import annotations

import codecs
import decimal
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.csv as pc

from recis_hybrid.columnio.convert.numbers import TOO_LARGE
from recis_hybrid.columnio.formats.protocol import Contents
from recis_hybrid.columnio.formats.text import (
    BLOCK_SIZES,
    is_row_too_long,
    mixed_types_error,
    needs_uint64,
    remedy,
    skip_rows,
)
from recis_hybrid.columnio.options import CsvOptions

NAME, PIECE = "CSV", "block"

_NO_VALUE = re.compile(r"In CSV column #(\d+): .*CSV conversion error to (.+?): invalid value '(.*)'", re.DOTALL)
_NO_TEXT = re.compile(r"In CSV column #(\d+): .*invalid UTF8 data", re.DOTALL)
_ROW = re.compile(r"Row #(\d+)")
_BOOLEANS = {"true": "1", "false": "0"}
# Default nulls of columns of numbers.
_NULLS = tuple(pc.ConvertOptions().null_values)


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See ``Format``."""
    # CSV has no lists; a spec of lists is rejected once the type of the column is known.
    types = {name: arrow_type for name, arrow_type in types.items() if not pa.types.is_nested(arrow_type)}
    texts, block = set[str](), 0
    while True:
        try:
            with _Reader(file, _as_text(types, texts), block=block) as reader:
                schema, first = reader.schema, list(islice(reader, 1))
            # Without a row the types of the columns are unknown.
            if not first or not first[0].num_rows:
                return Contents(None, [])
            for name in texts:
                parse_numbers(file, name, first[0].column(name), types[name], 0)
                schema = _with_type(schema, name, types[name])
            for name in schema.names:
                # Bytes that are not UTF-8 are rejected when they are read.
                if schema.names.count(name) == 1 and pa.types.is_binary(schema.field(name).type):
                    schema = _with_type(schema, name, pa.string())
            return Contents(_with_large_integers(file, schema, types, block), [None])
        except UnicodeDecodeError as error:
            raise _encoding_error(file, None, error) from error
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                return Contents(None, [])
            if is_row_too_long(error) and block + 1 < len(BLOCK_SIZES):
                block += 1
                continue
            names = _names(file, block)
            if (mismatch := _mismatch(error)) is None:
                raise _parse_error(file, names, error) from error
            column, type_name, value = names[mismatch[0]], *mismatch[1:]
            if type_name == "int64" and needs_uint64(value):
                # Ids keep their 64 bits, signed or not.
                types[column] = pa.uint64()
            elif column in types and column not in texts and _may_be_number(type_name, value):
                texts.add(column)
            else:
                raise _value_error(file, names, error) from error


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See ``Format``."""
    # The types of the first block are used for all blocks; inference could find another type in a later block.
    types = {name: contents.schema.field(name).type for name in columns}
    texts, block, done = set[str](), 0, 0
    while True:
        try:
            with _Reader(file, _as_text(types, texts), columns, threads, block) as reader:
                # After a failure, restart the scan with other types, and skip the rows that were already yielded.
                for batch in skip_rows(reader, done):
                    for name in texts:
                        array = parse_numbers(file, name, batch.column(name), types[name], done)
                        batch = batch.set_column(batch.schema.get_field_index(name), name, array)
                    done += batch.num_rows
                    yield batch
            return
        except UnicodeDecodeError as error:
            raise _encoding_error(file, None, error) from error
        except pa.ArrowInvalid as error:
            names = contents.schema.names
            if is_row_too_long(error) and block + 1 < len(BLOCK_SIZES):
                block += 1
            elif (mismatch := _mismatch(error)) is not None:
                column = names[mismatch[0]]
                if column in texts or not _may_be_number(mismatch[1], mismatch[2]):
                    raise _value_error(file, names, _located(file, types, columns, block, error)) from error
                texts.add(column)
            else:
                raise _parse_error(file, names, _located(file, types, columns, block, error)) from error


def parse_numbers(file: Any, name: str, texts: Any, arrow_type: Any, first: int) -> Any:
    """Convert strings to numbers; ``1.0`` may be an integer, and true and false are 1 and 0.

    Args:
        file: The file, for messages.
        name: Name of the column.
        texts: The strings.
        arrow_type: Type of the numbers.
        first: Number of the first row, for messages.

    Raises:
        ValueError: A string is not a number of that type.
    """
    options = file.csv or CsvOptions()
    texts = compute.utf8_trim_whitespace(texts)
    is_null = compute.is_in(texts, pa.array(_nulls_of(file), texts.type))
    texts = compute.if_else(is_null, pa.scalar(None, texts.type), texts)
    try:
        return compute.replace_substring_regex(texts, r"\.0*$", "").cast(arrow_type)
    except pa.ArrowInvalid:
        # Some are written differently: parse each distinct string.
        encoded = texts.dictionary_encode()
    values = []
    for text in encoded.dictionary.to_pylist():
        try:
            values.append(_number(text, arrow_type))
        except (ValueError, ArithmeticError, pa.ArrowInvalid):
            row = first + compute.index(texts, pa.scalar(text, texts.type)).as_py()
            raise mixed_types_error(
                file,
                name,
                f"has the value {text!r} in row {row + (options.column_names is None) + 1}, which is not {arrow_type}",
                remedy(str(arrow_type), text),
            ) from None
    return pa.array(values, arrow_type).take(encoded.indices)


def _nulls_of(file: Any) -> list[str]:
    options = file.csv or CsvOptions()
    return list(_NULLS if options.null_values is None else options.null_values)


def _number(text: str, arrow_type: Any) -> Any:
    text = _BOOLEANS.get(text.lower(), text)
    if "_" in text:
        # Only Python accepts 1_000.
        raise ValueError(text)
    if pa.types.is_floating(arrow_type):
        return float(text)
    whole = decimal.Decimal(text)
    # No type holds more digits, and expanding the exponent could take very long.
    if whole and whole.adjusted() > 20 or whole % 1:
        raise ValueError(text)
    return pa.scalar(int(whole), arrow_type).as_py()


def _may_be_number(type_name: str, value: str) -> bool:
    """Return whether a value may be a number that ``parse_numbers`` reads but pyarrow does not."""
    if type_name in ("float", "double", "halffloat"):
        return value.strip().lower() in _BOOLEANS
    if not type_name.startswith(("int", "uint")):
        return False
    if value.strip().lower() in _BOOLEANS:
        return True
    try:
        # A plain integer was rejected because it does not fit.
        return not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value) and decimal.Decimal(value.strip()).is_finite()
    except ArithmeticError:
        return False


def _as_text(types: Mapping[str, Any], texts: set[str]) -> dict[str, Any]:
    return {name: pa.string() if name in texts else arrow_type for name, arrow_type in types.items()}


def _with_type(schema: Any, name: str, arrow_type: Any) -> Any:
    return schema.set(schema.get_field_index(name), pa.field(name, arrow_type))


def _with_large_integers(file: Any, schema: Any, types: Mapping[str, Any], block: int) -> Any:
    """Return the schema with integer types for columns read as floats only because int64 is too narrow."""
    floats = [
        name
        for name in schema.names
        if name not in types and schema.names.count(name) == 1 and pa.types.is_float64(schema.field(name).type)
    ]
    if not floats:
        return schema
    with _Reader(file, dict.fromkeys(floats, pa.string()), floats, block=block) as reader:
        first = next(iter(reader))
    for name in floats:
        values = first.column(name).drop_null()
        values = values.filter(compute.invert(compute.is_in(values, pa.array(_nulls_of(file), values.type))))
        if len(values) and compute.all(compute.match_substring_regex(values, r"^\s*-?[0-9]+\s*$")).as_py():
            try:
                values.cast(pa.uint64())
                exact = pa.uint64()
            except pa.ArrowInvalid:
                exact = TOO_LARGE
            schema = _with_type(schema, name, exact)
    return schema


def _names(file: Any, block: int) -> list[str]:
    try:
        with _Reader(file, {}, block=block) as reader:
            return list(reader.schema.names)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return []


def _mismatch(error: Exception) -> tuple[int, str, str] | None:
    """Return the number of the column, its type and the value that does not fit; None if the file is damaged."""
    match = _NO_VALUE.search(str(error))
    # Bytes that are not text indicate damage.
    if match is None or not match[3].isprintable() or "\ufffd" in match[3]:
        return None
    return int(match[1]), match[2], match[3]


def _located(file: Any, types: Mapping[str, Any], columns: list[str], block: int, error: Exception) -> Exception:
    """Return the error with its row number, which pyarrow reports only when reading in one thread."""
    if _ROW.search(str(error)) is None:
        try:
            with _Reader(file, types, columns, block=block) as reader:
                for _ in reader:
                    pass
        except pa.ArrowInvalid as located:
            with_row: Exception = located
            return with_row
    return error


def _value_error(file: Any, names: Sequence[str], error: Exception) -> ValueError:
    mismatch = _mismatch(error)
    assert mismatch is not None
    number, type_name, value = mismatch
    row = _ROW.search(str(error))
    problem = f"has the value {value!r}{f' in row {row[1]}' if row else ''}, which is not {type_name}"
    return mixed_types_error(file, names[number], problem, remedy(type_name, value))


def _parse_error(file: Any, names: Sequence[str], error: Exception) -> Exception:
    """Return the error for text that cannot be parsed, because of a wrong option or a damaged file."""
    if (match := _NO_TEXT.search(str(error))) is not None:
        return _encoding_error(file, names[int(match[1])] if names else None, error)
    reason = " ".join(str(error).split())
    if is_row_too_long(error):
        reason = f"it has a row of more than {BLOCK_SIZES[-1] >> 20} MiB, or a quote that is never closed"
    advice = "set delimiter, quote, escape, comment and column_names of CsvOptions as the file was written"
    if file.csv is not None:
        return ValueError(f"columnio: {file.path} cannot be read by {file.csv} ({reason}); {advice}")
    damage: Exception = pa.ArrowInvalid(f"{reason}; {advice}")
    return damage


def _encoding_error(file: Any, column: str | None, error: Exception) -> ValueError:
    encoding = (file.csv or CsvOptions()).encoding
    where = "" if column is None else f"column {column!r} of "
    return ValueError(
        f"columnio: {where}{file.path} is not text in {encoding} ({error}); set its encoding, as in "
        f'csv=CsvOptions(encoding="latin-1"), or rewrite the file in UTF-8'
    )


class _Reader:
    """A CSV reader of pyarrow and its open file."""

    def __init__(
        self,
        file: Any,
        types: Mapping[str, Any],
        columns: list[str] | None = None,
        threads: bool = False,
        block: int = 0,
    ) -> None:
        options = file.csv or CsvOptions()
        # A suffix such as .gz may follow.
        tabs = ".tsv" in file.name.lower()[-8:]
        nulls = {} if options.null_values is None else {"null_values": list(options.null_values)}
        self._source = file.stream()
        try:
            self._reader = pc.open_csv(
                _Text(self._source, options),
                read_options=pc.ReadOptions(
                    use_threads=threads, block_size=BLOCK_SIZES[block], column_names=list(options.column_names or [])
                ),
                parse_options=pc.ParseOptions(
                    delimiter=options.delimiter or ("\t" if tabs else ","),
                    quote_char=options.quote or False,
                    escape_char=options.escape or False,
                    newlines_in_values=options.quote is not None or options.escape is not None,
                ),
                # An empty field is a null in a column of numbers; strings have nulls only if null_values is set.
                convert_options=pc.ConvertOptions(
                    column_types=dict(types),
                    include_columns=columns or [],
                    strings_can_be_null=options.null_values is not None,
                    **nulls,
                ),
            )
        except BaseException:
            self._source.close()
            raise

    def __enter__(self) -> Any:
        return self._reader

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._source.close()


class _Text:
    """The bytes of a file in UTF-8 and without comments, for pyarrow.

    No read ends between a carriage return and a line feed: pyarrow treats a line feed at the start of a read as the
    second half of a line break, even within quotes (apache/arrow issue 51368).
    """

    closed = False

    def __init__(self, source: Any, options: CsvOptions) -> None:
        self._source, self._options = source, options
        self._decoder: codecs.IncrementalDecoder | None = None
        self._rest, self._line, self._started, self._ended = b"", b"", False, False
        self._quoted = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes; fewer only at the end of the file, or one less to keep a line break together."""
        count = size if size > 0 else BLOCK_SIZES[0]
        parts, length = [self._rest], len(self._rest)
        while length < count and not self._ended:
            piece = self._source.read(max(count - length, 1))
            self._ended = not piece
            parts.append(self._converted(piece))
            length += len(parts[-1])
        whole = b"".join(parts)
        result, self._rest = whole[:count], whole[count:]
        if len(result) > 1 and result.endswith(b"\r") and not (self._ended and not self._rest):
            result, self._rest = result[:-1], b"\r" + self._rest
        return result

    def _converted(self, piece: bytes) -> bytes:
        if not self._started:
            self._started = True
            self._decoder = _decoder(piece, self._options.encoding)
        if self._decoder is not None:
            piece = self._decoder.decode(piece, final=self._ended).removeprefix("\ufeff").encode()
        return piece if self._options.comment is None else self._without_comments(piece, self._options.comment.encode())

    def _without_comments(self, piece: bytes, comment: bytes) -> bytes:
        quote = (self._options.quote or "").encode()
        lines = (self._line + piece).splitlines(keepends=True)
        # The last line may be incomplete, and so may a line break of two characters.
        self._line = lines.pop() if lines and not self._ended else b""
        remaining = []
        for line in lines:
            if not self._quoted and line.startswith(comment):
                continue
            # A quote inside quotes is doubled, so it does not change the parity.
            self._quoted ^= bool(quote) and line.count(quote) % 2 == 1
            remaining.append(line)
        return b"".join(remaining)


def _decoder(beginning: bytes, encoding: str) -> codecs.IncrementalDecoder | None:
    """Return the decoder of a file by its byte order mark or encoding; None for UTF-8, which pyarrow reads itself."""
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig", "ascii"):
        return codecs.getincrementaldecoder(encoding)()
    for marks, name in (((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32"), ((b"\xff\xfe", b"\xfe\xff"), "utf-16")):
        if beginning.startswith(marks):
            return codecs.getincrementaldecoder(name)()
    return None
