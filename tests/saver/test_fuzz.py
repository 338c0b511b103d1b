"""Loads of arbitrary bytes end soon, with a state or an error of the saver."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency
from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, Saver
from recis_hybrid.saver.format.file_io import CHUNK_BYTES
from recis_hybrid.serving import Reader, ServingError
from tests.saver.fakes import edit_manifest, sealed

STRANGE = [None, True, -1, 0, 1, 1.5, 2**62, 2**63, "", "../x", "/x", "float16", "step", [], [0], [-1], {}, {"x": 1}]


def parts() -> dict[str, Any]:
    config = {"a": EmbeddingConfig(dim=2), "b": EmbeddingConfig(dim=2, admission=MinFrequency(2))}
    engine = EmbeddingEngine(config, optimizer=optim.Adam)
    tower = torch.nn.Linear(2, 2)
    adam, sparse = torch.optim.Adam(tower.parameters()), optim.Adam(engine.parameters())
    return {"engine": engine, "tower": tower, "adam": adam, "sparse": sparse}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a full checkpoint and an incremental one based on it."""
    root = tmp_path_factory.mktemp("run")
    live, saver = parts(), Saver(root)
    for step in (1, 2):
        vectors = live["engine"]({"a": torch.arange(step, 40), "b": torch.arange(30 * step)})
        live["tower"](torch.cat(list(vectors.values()))).sum().backward()
        live["adam"].step()
        live["sparse"].step()
        live["engine"].tables[0].erase(0, torch.arange(5 * step))
        saver.save(step, live, delta=True)
    return root


@pytest.fixture
def run(chain: Path, tmp_path: Path) -> Path:
    shutil.copytree(chain, tmp_path / "run")
    return tmp_path / "run"


def attempt(root: Path) -> bool:
    """Return whether it loads; only errors of the saver are caught."""
    for load in (lambda: Saver(root).load(parts()), lambda: serve(root)):
        try:
            load()
        except (CheckpointError, ServingError):
            return False
    return True


def serve(root: Path) -> None:
    reader = Reader(root / "step_000001")
    for table in reader.tables:
        if not table.endswith(".admission"):
            reader.lookup(table, torch.arange(50).numpy())
    reader.dense("tower")


def reseal(directory: Path, path: Path) -> None:
    """Update size and checksums of a changed file in the manifest."""
    data = path.read_bytes()
    sums = [f"{zlib.crc32(data[i : i + CHUNK_BYTES]):08x}" for i in range(0, len(data), CHUNK_BYTES)]
    relative = path.relative_to(directory).as_posix()

    def change(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("path") == relative:
                value.update(size=len(data), crc32=sums)
            for inner in value.values():
                change(inner)
        elif isinstance(value, list):
            for inner in value:
                change(inner)

    edit_manifest(directory, change)


def mutated(draw: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(draw.choice([8, end, len(result)]))
        kind = draw.randrange(5)
        if kind == 0:
            result[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            result[place] = draw.choice(b'0123456789{}[]",:-.eE\xff')
        elif kind == 2:
            del result[place : place + draw.randint(1, 40)]
        elif kind == 3:
            result[place:place] = draw.randbytes(draw.randint(1, 40))
        else:  # replace a number in the header
            text = str(draw.choice([-1, 0, 1, 2**31, 2**63, 2**64, 10**30])).encode()
            result[place : place + len(text)] = text
        if not result:
            result = bytearray(b"x")
    return bytes(result)


def test_false_headers_and_data_with_correct_checksums(chain: Path, tmp_path: Path) -> None:
    assert attempt(chain)
    draw = random.Random(0)
    files = sorted(path.relative_to(chain) for path in chain.rglob("*.safetensors"))
    before, loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for _ in range(100):
        root = tmp_path / "run"
        shutil.copytree(chain, root)
        path = root / draw.choice(files)
        path.write_bytes(mutated(draw, path.read_bytes()))
        directory = root / path.relative_to(root).parts[0]
        reseal(directory, path)
        if directory.name == "step_000001":  # and the link to it
            sha256 = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
            edit_manifest(root / "step_000002", lambda d, s=sha256: d["previous"].update(sha256=s))  # type: ignore[misc]
        loaded += attempt(root)
        shutil.rmtree(root)
    assert 0 < loaded < 90  # a state with other numbers is valid
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(p for key, item in items for p in places(item, (*place, key)))]


# A manifest with missing or empty columns looks like one of another optimizer, which loads with a warning.
@pytest.mark.filterwarnings("ignore:.* is loaded into tables of another kind:UserWarning")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_arbitrary_members_with_a_correct_seal(run: Path, data: st.DataObject) -> None:
    path = run / data.draw(st.sampled_from(["step_000001", "step_000002"])) / "manifest.json"
    original = path.read_bytes()
    document = json.loads(original)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from([p for p in places(document) if p]))
        at = document
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = copy.deepcopy(data.draw(st.sampled_from(STRANGE)))
    path.write_bytes(sealed(document))
    try:
        attempt(run)
    finally:
        path.write_bytes(original)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_as_a_manifest(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    root = tmp_path_factory.mktemp("run")
    (root / "step_000001").mkdir()
    (root / "step_000001" / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointError):
        Saver(root).load({"tower": torch.nn.Linear(1, 1)})
    with pytest.raises(ServingError):
        Reader(root)


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "step_000001").mkdir()
    with open(tmp_path / "step_000001" / "manifest.json", "wb") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(CorruptCheckpoint, match="must have at most 1073741824 bytes"):
        Saver(tmp_path).load({"tower": torch.nn.Linear(1, 1)})
    with pytest.raises(ServingError, match="must have at most 1073741824 bytes"):
        Reader(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["meta"].update(seed="x"), "must have a seed that is an integer, it has 'x'"),
        (lambda d: d["meta"].pop("steps"), "must have the steps of"),
        (lambda d: d["meta"]["steps"].update(a=-1), "must have the steps of"),
    ],
)
def test_a_rejected_state_changes_nothing(run: Path, change: Any, message: str) -> None:
    edit_manifest(run / "step_000002", lambda d: change(d["parts"]["engine"]))
    live = parts()
    live["engine"]({"a": torch.tensor([7]), "b": torch.tensor([7])})
    with pytest.raises(CorruptCheckpoint, match=message):
        Saver(run).load(live)
    assert len(live["engine"].tables[0]) == 1
