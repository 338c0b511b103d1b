from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from recis_hybrid.app.config.core_yaml import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # YAML 1.2.2, 10.3.2.
        *[(text, None) for text in ("null", "Null", "NULL", "~", "")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[("012", 12), ("010", 10), ("08", 8), ("+12", 12), ("-7", -7), ("0o14", 12), ("0x1F", 31), ("0xff", 255)],
        *[("1e-3", 0.001), ("1e3", 1000.0), (".5", 0.5), ("5.", 5.0), ("1.5e+3", 1500.0), ("-1.0", -1.0)],
        *[(".inf", math.inf), ("-.INF", -math.inf), ("+.Inf", math.inf)],
        # Strings that YAML 1.1 reads as numbers, booleans or dates, and near misses.
        *[
            (text, text)
            for text in (
                "1_000",
                "1:30",
                "1:30:00",
                "0b11",
                "-0x1F",
                "yes",
                "no",
                "on",
                "off",
                "Yes",
                "NO",
                "y",
                "n",
                "tRUE",
                "2024-01-01",
                "2024-01-01T10:00:00Z",
                "1e",
                "e3",
                ".",
                "+",
                ".Nan",
                "inf",
                "nan",
                "=",
                "<<",
            )
        ],
        *[("'012'", "012"), ('"true"', "true"), ("!!str 012", "012"), ("!!int '12'", 12), ("!!float 1", 1.0)],
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    for document, expected in (
        (f"a: {text}", {"a": value}),
        (f"{{a: {text}, b: [{text}]}}", {"a": value, "b": [value]}),
    ):
        if text or "[" not in document:
            found = read_yaml(document)
            assert repr(found) == repr(expected)  # repr distinguishes 1, 1.0 and True


def test_nan_is_a_number() -> None:
    assert math.isnan(read_yaml("a: .nan")["a"])


def test_keys_are_strings_as_written() -> None:
    written = ["no", "on", "yes", "012", "1:30", "~", "null", "0x1", "1.0", "1e3", "2024-01-01", "true", "=", "1_0"]
    for document in ("\n".join(f"{key}: 1" for key in written), "{" + ", ".join(f"{k}: 1" for k in written) + "}"):
        assert list(read_yaml(document)) == written


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ("a: 1\na: 2", "a"),
        ("{a: 1, 'a': 2}", "a"),
        ("x:\n  - {b: 1, c: {d: 1, d: 1}}", "d"),
        ("x: {<<: {a: 1}, <<: {b: 1}}", "<<"),
        ("no: 1\n'no': 2", "no"),
        ("base: &b {a: 1, a: 2}", "a"),
    ],
)
def test_duplicate_keys_are_refused(document: str, key: str) -> None:
    with pytest.raises(yaml.YAMLError, match=f"the key '{key}' occurs twice") as caught:
        read_yaml(document)
    assert str(caught.value).count("line ") == 2  # both positions


def test_keys_that_differ_in_spelling_are_not_duplicates() -> None:
    assert read_yaml("{a: 1, A: 2, 1: 3, 01: 4, 1.0: 5}") == {"a": 1, "A": 2, "1": 3, "01": 4, "1.0": 5}


def test_explicit_keys_take_precedence_over_merge_keys() -> None:
    document = "d: &d {dim: 8, std: 0.1}\ne: &e {std: 0.2, x: 1}\na: {<<: *d, dim: 4}\nb: {<<: [*d, *e]}\nc: *d"
    assert read_yaml(document) == {
        "d": {"dim": 8, "std": 0.1},
        "e": {"std": 0.2, "x": 1},
        "a": {"dim": 4, "std": 0.1},
        "b": {"dim": 8, "std": 0.1, "x": 1},
        "c": {"dim": 8, "std": 0.1},
    }
    assert read_yaml("'<<': 3") == {"<<": 3}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("%YAML 1.1\n---\na: 1", "files are read as YAML 1.2"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a:\n\tb: 1", "cannot start any token"),
        ("a: &a [*a]", "an anchor contains itself"),
        ("a: &a {b: {c: *a}}", "an anchor contains itself"),
        ("? [a, b]\n: 1", "a key must be a string"),
        ("a: !!timestamp 2024-01-01", "unknown tag .*timestamp'"),
        ("a: !!python/object/apply:os.getcwd []", "unknown tag .*os.getcwd'"),
        ("a: !mine x", "unknown tag '!mine'"),
        ("a: !!int x", "'x' is not an integer"),
        ("a: !!bool maybe", "'maybe' is neither true nor false"),
        ("!!map [a]", "expected a mapping"),
        ("a: " + "9" * 5000, "is not an integer"),
        ("[" * 1200, "nested too deeply"),
        (b"a: \xff", "invalid start byte"),
        ("a: *nowhere", "undefined alias 'nowhere'"),
    ],
)
def test_invalid_documents_are_refused(document: str | bytes, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        read_yaml(document)


@pytest.mark.parametrize("line", ["{c}: &{c} [{ten}]", "{c}: &{c} {{<<: [{ten}]}}"])
def test_nested_aliases_cannot_exhaust_memory(line: str) -> None:
    lines = [
        "a: &a {x: 1}",
        *(line.format(c=c, ten=", ".join([f"*{p}"] * 10)) for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    ]
    with pytest.raises(yaml.YAMLError, match="aliases expand to more than 1,000,000 values"):
        read_yaml("\n".join(lines))


def test_encodings() -> None:
    for raw in ("a: é", "a: é".encode(), "\ufeffa: é".encode(), "a: é".encode("utf-16"), b"a: \xc3\xa9\r\n"):
        assert read_yaml(raw) == {"a": "é"}
    assert read_yaml("%YAML 1.2\n---\na: 1") == {"a": 1}
    assert [read_yaml(text) for text in ("", "# nothing\n", "---\n")] == [None] * 3


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["1e3", "08", "0o7", "~", "1:30", "<<", "=", "no", "2024-01-01", ".5", "-.inf", "null", "", " x", "# c", "1_0"]
    )
)
_PRINTABLE = st.text(st.characters(exclude_categories=["Cs", "Cc"]))


@settings(max_examples=50)
@given(st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(_PRINTABLE, inner), max_leaves=10))
def test_written_values_are_read_back(value: Any) -> None:
    assert read_yaml(write_yaml([value])) == [value]
