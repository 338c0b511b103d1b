"""CSV: line breaks in values, delimiters, encodings, comments, nulls, compression, bad rows, some for JSON too."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from recis_hybrid.columnio import BadFileError, Column, ColumnDataset, CsvOptions, Dense, ReadOptions, Text
from recis_hybrid.columnio.files.paths import find_files
from recis_hybrid.columnio.formats.delimited import _Text
from recis_hybrid.ragged import RaggedTensor
from tests.support.columns import dense

# More than pyarrow reads at a time.
BLOCK = 1 << 20


def strings(data: ColumnDataset, name: str = "text") -> list[Any]:
    found = []
    for batch in data:
        column = batch[name]
        assert isinstance(column, RaggedTensor)
        found += column.validate().to_strings(decode=False)
    return found


def numbers(data: ColumnDataset, name: str = "x") -> list[Any]:
    return list(chain.from_iterable(dense(batch, name).tolist() for batch in data))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bad", ["raise", "skip"])
@pytest.mark.parametrize("threads", [1, 2])
def test_line_breaks_in_values_beyond_the_first_block(tmp_path: Path, end: str, bad: Any, threads: int) -> None:
    # Rows of all lengths, so that some value spans the end of every block.
    texts = [f"{'y' * (row % 7)}{end}{'z' * (row % 11)}{end}{row}" for row in range(3 * BLOCK // 25)]
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator=end)
    writer.writerow(["x", "text"])
    writer.writerows(enumerate(texts))
    path = tmp_path / "a.csv"
    path.write_bytes(sink.getvalue().encode())
    assert path.stat().st_size > 2 * BLOCK
    data = ColumnDataset(
        path, {"x": None, "text": Text()}, 8192, read=ReadOptions(on_bad_file=bad, num_threads=threads)
    )
    assert numbers(data) == list(range(len(texts)))
    assert strings(data) == [text.encode() for text in texts]
    assert data.skipped == []


@pytest.mark.parametrize("sizes", [[1], [2], [3], [5, 1], [7]])
def test_no_read_splits_a_line_break(sizes: list[int]) -> None:
    raw = b'a,b\r\n"x\r\ny",1\r\r\n\n"\r\n"\r\n'
    text = _Text(io.BytesIO(raw), CsvOptions())
    pieces = []
    while piece := text.read(sizes[len(pieces) % len(sizes)] + 1):
        pieces.append(piece)
    assert b"".join(pieces) == raw
    assert not any(one.endswith(b"\r") and two.startswith(b"\n") for one, two in zip(pieces, pieces[1:], strict=False))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_row_longer_than_a_block(tmp_path: Path, suffix: str) -> None:
    long = "a" * (3 * BLOCK)
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text(f'x,text\n1,b\n2,"{long}"\n3,c\n')
    else:
        path.write_text(
            "".join(json.dumps({"x": x, "text": text}) + "\n" for x, text in ((1, "b"), (2, long), (3, "c")))
        )
    data = ColumnDataset(path, {"x": None, "text": Text()}, 10)
    assert numbers(data) == [1, 2, 3]
    assert [len(text) for text in strings(data)] == [1, len(long), 1]
    # Beyond the first block as well, where rows must not be read twice.
    lines = [(row, "z" * 100) for row in range(2 * BLOCK // 100)]
    rows = [*lines, (-1, long), (-2, "c")]
    if suffix == ".csv":
        path.write_text("x,text\n" + "".join(f"{x},{text}\n" for x, text in rows))
    else:
        path.write_text("".join(json.dumps({"x": x, "text": text}) + "\n" for x, text in rows))
    assert numbers(ColumnDataset(path, ["x"], 4096)) == [x for x, _ in rows]


@pytest.mark.parametrize(
    ("text", "options", "want"),
    [
        ("x;text\n1;a,b\n", CsvOptions(delimiter=";"), [b"a,b"]),
        ("x|text\n1|'a|b'\n", CsvOptions(delimiter="|", quote="'"), [b"a|b"]),
        ('x,text\n1,"a"b\n', CsvOptions(quote=None), [b'"a"b']),
        ('x,text\n1,"a\\"b"\n', CsvOptions(escape="\\"), [b'a"b']),
        ('x,text\n1,"a""b"\n', CsvOptions(), [b'a"b']),
        ("1,a\n2,b\n", CsvOptions(column_names=["x", "text"]), [b"a", b"b"]),
        ("# made by hand\nx,text\n# more\n1,a\n2,#b\n#end", CsvOptions(comment="#"), [b"a", b"#b"]),
        ('//x\nx,text\n1,"a\n//b"\n//"\n2,c\n', CsvOptions(comment="//"), [b"a\n//b", b"c"]),
        ("x,text\n1,NA\n2,\n3,-\n", CsvOptions(null_values=["NA", "-"]), [b"?", b"", b"?"]),
        ("x,text\n1,NA\n2,\n", CsvOptions(), [b"NA", b""]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_dialects(tmp_path: Path, text: str, options: CsvOptions, want: list[bytes], end: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.replace("\n", end).encode())
    data = ColumnDataset(tmp_path, {"x": None, "text": Text(default="?")}, 10, read=ReadOptions(csv=options))
    assert strings(data) == [value.replace(b"\n", end.encode()) for value in want]
    assert numbers(data) == list(range(1, len(want) + 1))


def test_comments_beyond_the_first_block(tmp_path: Path) -> None:
    lines = [f'{row},"q\n# {row}"' if row % 3 else f"# {row}" for row in range(BLOCK // 10)]
    (tmp_path / "a.csv").write_text("x,text\n" + "\n".join(lines) + "\n")
    data_rows = [row for row in range(len(lines)) if row % 3]
    data = ColumnDataset(tmp_path, {"x": None, "text": Text()}, 8192, read=ReadOptions(csv=CsvOptions(comment="#")))
    assert numbers(data) == data_rows
    assert strings(data) == [f"q\n# {row}".encode() for row in data_rows]


def test_spellings_of_nulls_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n\\N\n-\n")
    data = ColumnDataset(
        tmp_path, {"x": Dense(torch.int64, default=0)}, 10, read=ReadOptions(csv=CsvOptions(null_values=["\\N", "-"]))
    )
    assert numbers(data) == [1, 0, 0]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "utf-16", "utf-16-le", "utf-8-sig", "utf-32", "shift-jis"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    word = {"latin-1": "Ü", "cp1251": "ж", "shift-jis": "日"}.get(encoding, "日")
    texts = [f"{word}{row}" for row in range(BLOCK // 8)]
    text = f"x,text{word}\n" + "".join(f"{row},{value}\n" for row, value in enumerate(texts))
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    specs: dict[str, Column | None] = {"x": None, f"text{word}": Text()}
    options = [CsvOptions(encoding=encoding)]
    if encoding in ("utf-16", "utf-8-sig", "utf-32"):
        # The byte order mark determines the encoding.
        options.append(CsvOptions())
    for each in options:
        data = ColumnDataset(tmp_path, specs, 8192, read=ReadOptions(csv=each))
        assert strings(data, f"text{word}") == [value.encode() for value in texts]
        assert numbers(data) == list(range(len(texts)))


@pytest.mark.parametrize("bad", ["raise", "skip"])
@pytest.mark.parametrize("first", [0, 2 * BLOCK // 4])
def test_another_encoding_is_not_damage(tmp_path: Path, bad: Any, first: int) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,x\n" + b"a,1\n" * first + "é,2\n".encode("latin-1"))
    for specs in ({"text": Text()}, {"text": None}):
        with pytest.raises(
            ValueError, match=r"'text' of .*a\.csv is not text in utf-8 .*CsvOptions\(encoding="
        ) as caught:
            list(ColumnDataset(tmp_path, specs, 8192, read=ReadOptions(on_bad_file=bad)))
        assert not isinstance(caught.value, BadFileError)
    assert (
        strings(ColumnDataset(tmp_path, ["text"], 8192, read=ReadOptions(csv=CsvOptions(encoding="latin-1"))))[-1]
        == "é".encode()
    )
    with pytest.raises(ValueError, match=r"a\.csv is not text in shift-jis .*encoding="):
        list(
            ColumnDataset(
                tmp_path, ["text"], 8192, read=ReadOptions(on_bad_file=bad, csv=CsvOptions(encoding="shift-jis"))
            )
        )


# Bad rows


def test_a_row_of_wrong_length_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = BLOCK // 2
    path.write_text("x,y\n" + "1,2\n" * rows + "3\n")
    good = tmp_path / "b.csv"
    good.write_text("x,y\n5,6\n")
    message = rf"Row #{rows + 2}: Expected 2 columns, got 1: 3; set delimiter, quote"
    with pytest.raises(BadFileError, match=rf"a\.csv .*{message}"):
        list(ColumnDataset([path, good], ["x"], 8192, read=ReadOptions(num_threads=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert numbers(ColumnDataset([path, good], ["x"], 8192, read=ReadOptions(on_bad_file="skip")))[-1] == 5
    # With options, the options may be wrong, so nothing is skipped.
    for bad in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"cannot be read by CsvOptions\(.*Expected 2 columns, got 1") as caught:
            list(ColumnDataset([path, good], ["x"], 8192, read=ReadOptions(on_bad_file=bad, csv=CsvOptions())))  # type: ignore[arg-type]
        assert not isinstance(caught.value, BadFileError)


def test_a_quote_that_is_never_closed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('x,y\n1,2\n"3,4\n' + "5,6\n" * 100)
    with pytest.raises(BadFileError, match=r"a\.csv .*Row #3: Expected 2 columns, got 1"):
        ColumnDataset(tmp_path, ["x"], 10)
    assert numbers(ColumnDataset(tmp_path, {"y": None}, 200, read=ReadOptions(csv=CsvOptions(quote=None))), "y") == [
        2,
        4,
        *[6] * 100,
    ]


def test_a_value_of_another_type_is_named_with_its_row(tmp_path: Path) -> None:
    rows = 1_000_000
    (tmp_path / "a.csv").write_text("x\n" + "1\n" * rows + "one\n")
    for spec in (None, Dense(torch.int64), Dense(torch.float32)):
        with pytest.raises(ValueError, match=rf"'x' of .*a\.csv has the value 'one' in row {rows + 2}, which is no"):
            list(ColumnDataset(tmp_path, {"x": spec}, 65_536, read=ReadOptions(num_threads=2)))


# Numbers as text


@pytest.mark.parametrize("first", [0, BLOCK])
def test_integers_written_as_floats(tmp_path: Path, first: int) -> None:
    values = ["1.0", "2", "", "3.000", "4.", "5e2", " 6.0 ", "9007199254740993.0", "-7.0"]
    want = [1, 2, -1, 3, 4, 500, 6, 9007199254740993, -7]
    (tmp_path / "a.csv").write_text("x,y\n" + "0,0\n" * first + "".join(f"{value},1\n" for value in values))
    data = ColumnDataset(tmp_path, {"x": Dense(torch.int64, default=-1), "y": None}, 65_536)
    assert numbers(data) == [0] * first + want
    assert numbers(data, "y") == [0] * first + [1] * len(want)
    (tmp_path / "a.csv").write_text("x\n" + "0\n" * first + "1.0\n2.5\n")
    for bad in ("raise", "skip"):
        with pytest.raises(ValueError, match=rf"has the value '2\.5' in row {first + 3}, which is not int64"):
            list(ColumnDataset(tmp_path, {"x": Dense(torch.int64)}, 65_536, read=ReadOptions(on_bad_file=bad)))  # type: ignore[arg-type]


def test_large_ids_beside_nulls_keep_their_bits(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"x,y\n{2**64 - 1},0\n,1\nNA,2\n{2**53 + 1},3\n")
    assert numbers(ColumnDataset(tmp_path, {"x": Dense(default=0)}, 10)) == [-1, 0, 0, 2**53 + 1]


@pytest.mark.parametrize("value", ["1e30", "1e999999999", "inf", "1_000", "1_0.0", "1.0.0", "."])
def test_values_that_are_not_64_bit_integers_are_rejected(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.csv").write_text(f"x,y\n1,0\n{value},1\n")
    with pytest.raises(ValueError, match=rf"has the value '{value}' in row 3, which is not int64") as caught:
        list(ColumnDataset(tmp_path, {"x": Dense(torch.int64)}, 10))
    assert not isinstance(caught.value, BadFileError)


def test_json_integers_written_as_floats(tmp_path: Path) -> None:
    first = BLOCK // 8
    lines = ['{"x": 0, "l": [1]}'] * first + ['{"x": 1.0, "l": [2.0, 3]}', '{"x": 9007199254740993, "l": []}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    specs: dict[str, Column | None] = {"x": Dense(torch.int64)}
    assert numbers(ColumnDataset(tmp_path, specs, 65_536)) == [0] * first + [1, 9007199254740993]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"x": 2.5, "l": []}']) + "\n")
    with pytest.raises(ValueError, match=r"has the value '2\.5', which is not int64"):
        list(ColumnDataset(tmp_path, specs, 65_536))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, None])
def test_boolean_labels(tmp_path: Path, suffix: str, dtype: Any) -> None:
    lines = ["x", "true", "false"] if suffix == ".csv" else ['{"x": true}', '{"x": false}']
    (tmp_path / f"a{suffix}").write_text("\n".join(lines) + "\n")
    (batch,) = ColumnDataset(tmp_path, {"x": Dense(dtype)}, 10)
    assert torch.equal(dense(batch, "x"), torch.tensor([1, 0]).to(dtype or torch.bool))


# Names of files


PACKED = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.compress(raw[:9]) + gzip.compress(raw[9:]),
    ".bz2": lambda raw: bz2.compress(raw[:9]) + bz2.compress(raw[9:]),
    ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", sorted(PACKED))
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson"])
@pytest.mark.parametrize("upper", [False, True])
def test_text_files_of_any_name_are_read_in_folders(tmp_path: Path, packed: str, suffix: str, upper: bool) -> None:
    raw = {".csv": b"x,y\n1,2\n3,4\n", ".tsv": b"x\ty\n1\t2\n3\t4\n"}.get(
        suffix, b'{"x": 1, "y": 2}\n{"x": 3, "y": 4}\n'
    )
    name = f"part-0{suffix}{packed}"
    (tmp_path / (name.upper() if upper else name)).write_bytes(PACKED[packed](raw))
    assert len(find_files(tmp_path)) == 1
    data = ColumnDataset(tmp_path, ["y", "x"], 10)
    assert numbers(data) == [1, 3]
    assert numbers(data, "y") == [2, 4]


def test_with_options_an_unknown_suffix_is_csv(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t2\n3\t4\n")
    data = ColumnDataset(
        tmp_path / "u.data", ["y"], 10, read=ReadOptions(csv=CsvOptions(delimiter="\t", column_names=["x", "y"]))
    )
    assert numbers(data, "y") == [2, 4]


def test_invalid_options_are_rejected() -> None:
    for options, message in (
        ({"delimiter": ",,"}, "delimiter must be one ASCII character"),
        ({"quote": ""}, "quote must be one ASCII character"),
        ({"delimiter": "\n"}, "delimiter must not be a line break"),
        ({"delimiter": '"'}, "delimiter, quote and escape must differ"),
        ({"comment": ""}, "comment must be a prefix of a line"),
        ({"encoding": "latin-99"}, "encoding must be one that Python knows"),
        ({"column_names": []}, "column_names must be unique and at least one"),
        ({"column_names": ["a", "a"]}, "column_names must be unique and at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            CsvOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"csv must be a CsvOptions, got \{'delimiter': ';'\}"):
        ColumnDataset("a.csv", ["x"], 10, read=ReadOptions(csv={"delimiter": ";"}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"null_values must be a sequence of strings, got a str; write \['NA'\]"):
        CsvOptions(null_values="NA")
