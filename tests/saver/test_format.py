"""Pins the format: docs/format.md, the schema and the bytes on disk agree."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recis_hybrid.saver import CheckpointError, Saver
from recis_hybrid.saver.actions import write as writing
from recis_hybrid.saver.format.manifest import Link, dump_manifest
from recis_hybrid.saver.format.manifest_reader import parse_manifest
from tests.saver.fakes import HIGHEST, LOWEST, example_shelf, sealed
from tests.saver.schema import faults


@pytest.fixture(scope="module")
def documented(root: Path) -> str:
    """Return the manifest that docs/format.md shows."""
    return (root / "docs" / "format.md").read_text().split("```json\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def schema(root: Path) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((root / "docs" / "manifest.schema.json").read_text())
    return schema


@pytest.fixture
def checkpoint(tmp_path: Path, documented: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the checkpoint that docs/format.md shows, written on the documented day."""
    monkeypatch.setattr(writing, "_about", lambda: json.loads(documented)["meta"])
    return Saver(tmp_path).save(123, {"engine": example_shelf(), "note": {"epoch": 1}})


def safetensors_file(header: str, *data: bytes) -> bytes:
    """Return the bytes of a file: length of the header, the header padded to 8 bytes, then the data."""
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def bfloat16(*values: float) -> bytes:
    return b"".join(struct.pack("<f", value)[2:] for value in values)  # values must be exact in bfloat16


def test_the_names_of_the_files(checkpoint: Path) -> None:
    found = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    assert found == [
        "dense/engine.safetensors",
        "manifest.json",
        "sparse/engine/user%2Fcountry/00000-65535.safetensors",
    ]


def test_every_byte_of_a_sparse_file(checkpoint: Path) -> None:
    data = (
        struct.pack("<4q", 0, 1, 3, 5),
        struct.pack("<5q", -1, 0, 5, LOWEST, HIGHEST),
        struct.pack("<10f", 0.0, -0.0, 1, 10, 2, 20, 3, 30, 4, 40),
        struct.pack("<3i", 0, 7, 65535),
        bfloat16(0.0, 0.125, 0.25, 0.375, 0.5),
    )
    tag = (
        '{\\"format_version\\":1,\\"part\\":\\"engine\\",\\"table\\":\\"user/country\\",\\"buckets\\":[0,65535],'
        f'\\"pages\\":\\"{zlib.crc32(b"".join(data)):08x}\\"}}'
    )
    header = (
        f'{{"__metadata__":{{"recis_hybrid":"{tag}"}},'
        '"bucket_offsets":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},'
        '"ids":{"dtype":"I64","shape":[5],"data_offsets":[32,72]},'
        '"embedding":{"dtype":"F32","shape":[5,2],"data_offsets":[72,112]},'
        '"buckets":{"dtype":"I32","shape":[3],"data_offsets":[112,124]},'
        '"exp_avg":{"dtype":"BF16","shape":[5,1],"data_offsets":[124,134]}}'
    )
    expected = safetensors_file(header, *data)
    assert (checkpoint / "sparse" / "engine" / "user%2Fcountry" / "00000-65535.safetensors").read_bytes() == expected


def test_every_byte_of_a_dense_file(checkpoint: Path) -> None:
    tag = '{\\"format_version\\":1,\\"part\\":\\"engine\\"}'
    header = (
        f'{{"__metadata__":{{"recis_hybrid":"{tag}"}},"counts":{{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}}}'
    )
    expected = safetensors_file(header, struct.pack("<2i", 3, 1))
    assert (checkpoint / "dense" / "engine.safetensors").read_bytes() == expected


def test_every_byte_of_the_manifest(checkpoint: Path, documented: str) -> None:
    assert (checkpoint / "manifest.json").read_text() == documented
    body = documented.encode()[: documented.rindex(',\n "crc32"')]
    assert json.loads(documented)["crc32"] == f"{zlib.crc32(body):08x}"
    file = json.loads(documented)["parts"]["engine"]["file"]
    data = (checkpoint / file["path"]).read_bytes()
    assert file == {"path": file["path"], "size": len(data), "crc32": [f"{zlib.crc32(data):08x}"]}


def test_plain_safetensors_reads_it(checkpoint: Path) -> None:
    rows = load_file(checkpoint / "sparse" / "engine" / "user%2Fcountry" / "00000-65535.safetensors")
    assert rows["ids"].tolist() == [-1, 0, 5, LOWEST, HIGHEST]
    assert rows["embedding"][:, 0].tolist() == [0, 1, 2, 3, 4]
    buckets = rows["buckets"].repeat_interleave(rows["bucket_offsets"].diff())
    assert buckets.tolist() == [0, 7, 7, 65535, 65535]


def test_written_manifests_match_the_schema(tmp_path: Path, schema: dict[str, Any], documented: str) -> None:
    assert faults(schema, json.loads(documented)) == []
    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    directory = Saver(tmp_path).save(
        1, {"module": module, "optimizer": optimizer, "none": torch.nn.ReLU(), "note": [1, None]}
    )
    assert faults(schema, json.loads((directory / "manifest.json").read_text())) == []


def members(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every member and item, except those with free contents."""
    if place and place[-1] in ("meta", "tensors", "tables", "parts"):
        inner = list(value.values()) if place[-1] != "meta" else []
        return [place, *(p for k, v in zip(value, inner, strict=False) for p in members(v, (*place, k)))]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(p for key, item in items for p in members(item, (*place, key)))]


def edited(document: Any, place: tuple[Any, ...], new: Any) -> Any:
    result = copy.deepcopy(document)
    if not place:
        return new
    at = result
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return result


def incremental(documented: str) -> str:
    """Return the documented manifest as that of an incremental checkpoint."""
    document = json.loads(documented)
    table = document["parts"]["engine"]["tables"]["user/country"]
    removed = copy.deepcopy(table["ranges"])
    removed[0]["file"]["path"] = "removed/engine/user%2Fcountry/00000-65535.safetensors"
    table["removed"] = {"rows": 5, "ranges": removed}
    document["previous"] = {"step": 120, "sha256": "0123456789abcdef" * 4}
    return json.dumps(document)


def test_an_incremental_manifest_round_trips(schema: dict[str, Any], documented: str) -> None:
    document = json.loads(incremental(documented))
    assert faults(schema, document) == []
    manifest = parse_manifest(sealed(document), Path("manifest.json"))
    assert manifest.previous == Link(120, "0123456789abcdef" * 4)
    removed = manifest.parts["engine"].tables["user/country"].removed
    assert removed is not None
    assert [(r.first_bucket, r.last_bucket, r.rows) for r in removed.ranges] == [(0, 65535, 5)]
    again = json.loads(dump_manifest(manifest))
    assert {**again, "crc32": None} == {**document, "crc32": None}
    assert list(again)[:5] == ["format", "format_version", "step", "world_size", "previous"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.pop("previous"), "must have the members"),
        (lambda d, t: t.pop("removed"), "must have the members"),
        (lambda d, t: d["previous"].update(step=123), "must have a step below the checkpoint's own, got 123"),
        (lambda d, t: d["previous"].update(sha256="0"), "must have a sha256 of 64 hexadecimal digits"),
        (lambda d, t: t["removed"].update(rows=4), "must have ranges of 4 rows in total"),
        (lambda d, t: t["removed"]["ranges"][0]["file"].update(t["ranges"][0]["file"]), "each file must be named once"),
    ],
)
def test_invalid_incremental_manifests_are_refused(documented: str, change: Any, message: str) -> None:
    document = json.loads(incremental(documented))
    change(document, document["parts"]["engine"]["tables"]["user/country"])
    with pytest.raises(CheckpointError, match=message):
        parse_manifest(sealed(document), Path("manifest.json"))


@pytest.mark.parametrize("make", [str, incremental])
def test_the_reader_refuses_what_the_schema_refuses(schema: dict[str, Any], documented: str, make: Any) -> None:
    # Each of these replaces every member of the documented manifest: the reader must refuse what the schema refuses.
    document = json.loads(make(documented))
    strange = [None, True, -1, 0, 1.5, 2**63, "", "../x", "/x", "x", [], [0], {}, {"x": 1}]
    refused = 0
    for place in members(document):
        if place and place[0] == "crc32":
            continue  # sealing replaces it
        for new in strange:
            changed = edited(document, place, new)
            if faults(schema, changed):
                refused += 1
                raw = sealed(changed) if isinstance(changed, dict) else json.dumps(changed).encode()
                with pytest.raises(CheckpointError):
                    parse_manifest(raw, Path("manifest.json"))
    assert refused > 300


def test_the_documented_manifest_is_read(documented: str) -> None:
    manifest = parse_manifest(documented.encode(), Path("manifest.json"))
    assert manifest.step == 123
    assert list(manifest.parts) == ["engine", "note"]
    assert list(manifest.parts["engine"].tables["user/country"].columns) == ["ids", "embedding", "exp_avg"]
