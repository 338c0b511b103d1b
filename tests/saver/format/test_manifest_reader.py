from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, Saver
from recis_hybrid.saver.format.manifest_reader import parse_manifest
from tests.saver.fakes import example_shelf, sealed

PATH = Path("run/step_000003/manifest.json")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = Saver(tmp_path_factory.mktemp("run")).save(3, {"engine": example_shelf(), "note": {"epoch": 1}})
    return (directory / "manifest.json").read_bytes()


def test_any_changed_byte_is_found(raw: bytes) -> None:
    draw = random.Random(0)
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << draw.randrange(8)
        with pytest.raises(CheckpointError, match=r"run/step_000003/manifest.json: "):
            parse_manifest(bytes(changed), PATH)


def test_any_truncation_is_found(raw: bytes) -> None:
    for length in range(len(raw)):
        with pytest.raises(CorruptCheckpoint, match="manifest.json: "):
            parse_manifest(raw[:length], PATH)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe\x00", "must be JSON"),
        (b'{"a": 1, "a": 1}', "duplicate members"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 200_000, "must be JSON"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "must be JSON|format"),
        (b"[]", r"the manifest must be an object, got \[\]"),
        (b"null", "the manifest must be an object, got None"),
        (b"{}", "must have a member 'format'"),
    ],
)
def test_other_text_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=f"manifest.json: .*({message})"):
        parse_manifest(text, PATH)


def test_another_format_or_version_is_named(raw: bytes) -> None:
    document = json.loads(raw)
    with pytest.raises(
        CheckpointError, match=r"reads format version 1, the checkpoint has 2\. Load it with the version"
    ):
        parse_manifest(sealed({**document, "format_version": 2}), PATH)
    with pytest.raises(CheckpointError, match=r"format must be 'recis_hybrid.checkpoint', got 'other'"):
        parse_manifest(sealed({**document, "format": "other"}), PATH)


def table(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["parts"]["engine"]["tables"]["user/country"]
    return found


def first_range(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = table(document)["ranges"][0]
    return found


def two_ranges(first: list[int], second: list[int]) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        one = first_range(document)
        other = {**one, "rows": 0, "file": {**one["file"], "path": "sparse/other.safetensors"}}
        table(document)["ranges"] = [{**one, "buckets": first}, {**other, "buckets": second}]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(surprise=1), r"must have the members \["),
        (lambda d: d.update(step=True), "step must be an integer from 0"),
        (lambda d: d.update(world_size=0), "world_size must be an integer from 1"),
        (lambda d: d.update(buckets=1024), "buckets must be 65536, got 1024"),
        (lambda d: d["checksum"].update(algorithm="md5"), "checksum must be"),
        (lambda d: d["parts"]["engine"].update(kind="pickle"), "parts.engine must have a kind"),
        (
            lambda d: d["parts"]["engine"].update(file=None),
            "parts.engine must have a file if and only if",
        ),
        (
            lambda d: d["parts"]["note"]["tensors"].update(x={"dtype": "int8", "shape": []}),
            "if and only if it has",
        ),
        (lambda d: d["parts"]["engine"]["tensors"]["counts"].update(dtype="object"), "counts must have a dtype of"),
        (lambda d: d["parts"]["engine"]["tensors"]["counts"].update(shape=[-1]), "counts.shape must hold integers"),
        (lambda d: d["parts"]["engine"]["file"].update(path="../x"), r"file must have a relative path.*got '\.\./x'"),
        (lambda d: d["parts"]["engine"]["file"].update(path="/etc/passwd"), "file must have a relative path"),
        (lambda d: d["parts"]["engine"]["file"].update(path="a/../../x"), "file must have a relative path"),
        (lambda d: d["parts"]["engine"]["file"].update(size=0), "file.size must be an integer from 1"),
        (lambda d: d["parts"]["engine"]["file"].update(size=4194305), "must have one checksum per 4194304 bytes"),
        (lambda d: d["parts"]["engine"]["file"].update(crc32=["0"]), "checksums of 8 hexadecimal digits"),
        (lambda d: d["parts"]["engine"]["file"].update(first_range(d)["file"]), "each file must be named once"),
        (lambda d: table(d).update(rows=4), r"user/country must have ranges of 4 rows in total, got \[5\]"),
        (lambda d: table(d).update(rows=-5), "user/country.rows must be an integer from 0"),
        (lambda d: table(d)["columns"].pop(0), "must have 'ids', int64 with shape"),
        (lambda d: table(d)["columns"].clear(), "must have 'ids', int64 with shape"),
        (lambda d: table(d)["columns"].append(table(d)["columns"][1]), r"columns\[3\] must have a unique name"),
        (lambda d: table(d)["ranges"].clear(), "from bucket 0 to 65535"),
        (lambda d: first_range(d).update(buckets=[0, 65534]), "from bucket 0 to 65535"),
        (lambda d: first_range(d).update(buckets=[1, 65535]), "from bucket 0 to 65535"),
        (lambda d: first_range(d).update(buckets=[0]), "must have two buckets"),
        (two_ranges([0, 9], [11, 65535]), "from bucket 0 to 65535"),
        (two_ranges([0, 9], [9, 65535]), "from bucket 0 to 65535"),
        (two_ranges([0, 65535], [65536, 65535]), "from bucket 0 to 65535"),
    ],
)
def test_a_wrong_member_is_named(raw: bytes, change: Callable[[dict[str, Any]], object], message: str) -> None:
    document = json.loads(raw)
    change(document)
    with pytest.raises(CorruptCheckpoint, match=f"manifest.json: .*{message}"):
        parse_manifest(sealed(document), PATH)


def test_contiguous_ranges_are_read(raw: bytes) -> None:
    document = json.loads(raw)
    two_ranges([0, 9], [10, 65535])(document)
    ranges = parse_manifest(sealed(document), PATH).parts["engine"].tables["user/country"].ranges
    assert [(item.first_bucket, item.last_bucket, item.rows) for item in ranges] == [(0, 9, 5), (10, 65535, 0)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_other_contents_raise_only_checkpoint_errors(text: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(text, PATH)


@given(data=st.data())
def test_arbitrary_members_raise_only_checkpoint_errors(raw: bytes, data: st.DataObject) -> None:
    document = json.loads(raw)
    at: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else data.draw(st.integers(0, len(at) - 1))
        inner = at[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        at = inner
    at[key] = data.draw(json_values)
    try:
        parse_manifest(sealed(document), PATH)
    except CheckpointError as error:
        assert "manifest.json" in str(error)  # noqa: PT017 - a value that happens to be allowed is no error
