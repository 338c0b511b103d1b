"""The import graph, public names and side effects of imports. The checkers are tested on faulty sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import architecture as rules
from tests.support.imports import Import, Source, imports, parse, read_package


@pytest.fixture(scope="module")
def package(root: Path) -> list[Source]:
    return read_package(root)


def test_the_whole_package_is_read(package: list[Source], root: Path) -> None:
    modules = {source.module for source in package}
    assert {"recis_hybrid", "recis_hybrid.ops", "recis_hybrid.embedding", "recis_hybrid.bridge"} <= modules
    assert (root / "recis_hybrid" / "bridge").is_symlink()
    assert (root / "recis_hybrid" / "bridge").resolve() == root / "bridge"


def test_imports_between_rooms_are_allowed(package: list[Source]) -> None:
    assert [fault for source in package for fault in rules.import_violations(source)] == []


def test_there_are_no_import_cycles(package: list[Source]) -> None:
    assert list(rules.import_cycles(package)) == []


def test_imports_between_sub_packages_are_allowed(package: list[Source]) -> None:
    assert list(rules.package_violations(package)) == []


def test_every_rule_is_used(package: list[Source]) -> None:
    assert list(rules.unused_rules(package)) == []


@pytest.mark.parametrize("table", [rules.ROOMS, *rules.PACKAGES.values()])
def test_rules_form_an_order(table: dict[str, set[str]]) -> None:
    names = [name for name in table if name]
    assert all(table[name] <= set(names[:number]) for number, name in enumerate(names))


def test_folders(package: list[Source]) -> None:
    assert list(rules.folder_violations(package)) == []


def test_public_names(package: list[Source]) -> None:
    assert [fault for source in package for fault in rules.name_violations(source)] == []


def test_data_is_never_executed(package: list[Source]) -> None:
    assert [fault for source in package for fault in rules.unsafe_violations(source)] == []


def test_no_environment_at_import(package: list[Source]) -> None:
    assert [fault for source in package for fault in rules.environment_violations(source)] == []


def test_includes(root: Path) -> None:
    files = [path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert files
    faults = [rules.include_violations(str(path.relative_to(root)), path.read_text()) for path in files]
    assert [fault for found in faults for fault in found] == []


def run_python(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False)


def test_import_is_silent_and_light(root: Path) -> None:
    code = (
        "import sys; import recis_hybrid; heavy = {'jax', 'jaxlib', 'pyarrow', 'torch', 'recis_hybrid.bridge'}; "
        "heavy &= set(sys.modules); assert not heavy, heavy"
    )
    done = run_python(code, root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_room_imports_jax(package: list[Source], root: Path) -> None:
    modules = sorted(source.module for source in package if source.room != "bridge")
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; "
        "heavy = {'jax', 'jaxlib', 'recis_hybrid.bridge'} & set(sys.modules); assert not heavy, heavy"
    )
    done = run_python(code, root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_kind_of_import_is_found() -> None:
    text = """
import torch as t
from . import a
from ._b import c as c
from recis_hybrid.ops import gather
def later():
    import jax.numpy
    importlib.import_module("pyarrow.dataset")
if TYPE_CHECKING:
    from .sub.d import e
"""
    of_package = list(imports(parse(text, "recis_hybrid/embedding/__init__.py")))
    assert sorted(of_package, key=lambda item: item.line) == [
        Import(2, "torch", None, "t"),
        Import(3, "recis_hybrid.embedding", "a"),
        Import(4, "recis_hybrid.embedding._b", "c", "c"),
        Import(5, "recis_hybrid.ops", "gather"),
        Import(7, "jax.numpy"),
        Import(8, "pyarrow.dataset"),
        Import(10, "recis_hybrid.embedding.sub.d", "e"),
    ]
    of_module = imports(parse("from .x import y\nfrom ..optim import z", "recis_hybrid/embedding/engine.py"))
    assert [item.target for item in of_module] == ["recis_hybrid.embedding.x", "recis_hybrid.optim"]


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("recis_hybrid/ops/x.py", "import recis_hybrid.ragged", "ops may not import recis_hybrid.ragged"),
        ("recis_hybrid/embedding/x.py", "from recis_hybrid import optim", "may not import recis_hybrid.optim"),
        ("recis_hybrid/embedding/x.py", "from ..saver import State", "may not import recis_hybrid.saver"),
        ("recis_hybrid/embedding/x.py", "def f():\n  import recis_hybrid.columnio.x", "recis_hybrid.columnio"),
        ("recis_hybrid/embedding/x.py", "from recis_hybrid import HashTable", "may not import recis_hybrid"),
        ("recis_hybrid/saver/x.py", "import recis_hybrid.pipelines", "may not import recis_hybrid.pipelines"),
        ("recis_hybrid/pipelines/x.py", "from recis_hybrid.bridge import to_jax", "recis_hybrid.bridge"),
        ("recis_hybrid/pipelines/x.py", "import bridge", "pipelines may not import bridge"),
        ("recis_hybrid/features/x.py", "def f():\n  import jax", "features may not import jax"),
        ("recis_hybrid/features/x.py", "import pyarrow.parquet", "features may not import pyarrow"),
        ("recis_hybrid/__init__.py", "from recis_hybrid.app import load_run", "may not import recis_hybrid.app"),
        ("recis_hybrid/bridge/x.py", "from recis_hybrid.embedding import HashTable", "recis_hybrid.embedding"),
        ("recis_hybrid/bridge/x.py", "import pandas", "bridge may not import pandas"),
        ("recis_hybrid/cellar/x.py", "", "the room 'cellar' is not in ROOMS"),
    ],
)
def test_a_forbidden_import_is_found(path: str, text: str, fault: str) -> None:
    (found,) = rules.import_violations(parse(text, path))
    assert found.startswith(path)
    assert fault in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("recis_hybrid/embedding/x.py", "import torch, numpy, dataclasses\nfrom recis_hybrid.ops import gather"),
        ("recis_hybrid/optim/x.py", "from recis_hybrid.embedding import RecordLayout\nfrom .y import z"),
        ("recis_hybrid/pipelines/x.py", "from recis_hybrid import saver, metrics\nimport recis_hybrid.columnio"),
        ("recis_hybrid/columnio/x.py", "import pyarrow.parquet as pq"),
        (
            "recis_hybrid/bridge/x.py",
            "import jax\nfrom jax import numpy\nfrom recis_hybrid import validation\nfrom .y import z",
        ),
    ],
)
def test_an_allowed_import_passes(path: str, text: str) -> None:
    source = parse(text, path)
    assert [*rules.import_violations(source), *rules.name_violations(source)] == []


@pytest.mark.parametrize(
    ("texts", "cycles"),
    [
        ({"a": "from recis_hybrid.ops.b import x", "b": "from recis_hybrid.ops import a"}, [["a", "b"]]),
        ({"a": "from .b import x", "b": "def later():\n  import recis_hybrid.ops.a"}, [["a", "b"]]),
        (
            {"a": "import recis_hybrid.ops.b", "b": "if TYPE_CHECKING:\n  from recis_hybrid.ops.a import x"},
            [["a", "b"]],
        ),
        ({"a": "from .b import x", "b": "from .c import x", "c": "from .a import x"}, [["a", "b", "c"]]),
        ({"__init__": "from .a import x as x", "a": "from recis_hybrid.ops import x"}, [["", "a"]]),
        (
            {"a": "from . import b", "b": "from . import a", "c": "from . import d, a", "d": "from . import c"},
            [["a", "b"], ["c", "d"]],
        ),
        ({"a": "from . import b, c", "b": "from . import d", "c": "from . import d", "d": "import torch"}, []),
        ({"a": "from recis_hybrid.ops.a import x"}, []),
    ],
)
def test_import_cycles_are_found(texts: dict[str, str], cycles: list[list[str]]) -> None:
    sources = [parse(text, f"recis_hybrid/ops/{name}.py") for name, text in texts.items()]
    full = [[f"recis_hybrid.ops.{name}".rstrip(".") for name in cycle] for cycle in cycles]
    assert rules.import_cycles(sources) == full


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        (
            "embedding/table/x.py",
            "from recis_hybrid.embedding.checkpoint.save import y",
            "table may not import embedding.checkpoint",
        ),
        ("embedding/table/__init__.py", "from recis_hybrid.embedding import checkpoint", "embedding.checkpoint"),
        ("pipelines/steps/x.py", "if TYPE_CHECKING:\n  import recis_hybrid.pipelines.callbacks.y", "callbacks"),
        ("saver/attic/x.py", "", "saver.attic is not in PACKAGES"),
        ("metrics/attic/__init__.py", "", "metrics.attic is not in PACKAGES"),
    ],
)
def test_forbidden_imports_between_sub_packages_are_found(path: str, text: str, fault: str) -> None:
    (found,) = rules.package_violations([parse(text, f"recis_hybrid/{path}")])
    assert fault in found


def test_an_indirect_import_of_a_sub_package_is_found() -> None:
    sources = [
        parse("from recis_hybrid.pipelines.x import y", "recis_hybrid/pipelines/steps/a.py"),
        parse("from recis_hybrid.pipelines.z import y", "recis_hybrid/pipelines/x.py"),
        parse("from recis_hybrid.pipelines.data.b import y", "recis_hybrid/pipelines/z.py"),
    ]
    (found,) = rules.package_violations(sources)
    assert found == "recis_hybrid/pipelines/z.py:1: pipelines.steps may not import pipelines.data"


def test_an_unused_rule_is_found(package: list[Source]) -> None:
    without_data = [source for source in package if "/pipelines/data/" not in source.path]
    assert list(rules.unused_rules(without_data)) == [
        "PACKAGES: pipelines.data does not import pipelines.steps; remove the entry"
    ]
    without_metrics = [source for source in package if source.room != "metrics"]
    assert list(rules.unused_rules(without_metrics)) == ["ROOMS: metrics does not import distributed; remove the entry"]


def test_allowed_imports_between_sub_packages_pass() -> None:
    allowed = "from recis_hybrid.embedding.table.y import z\nfrom recis_hybrid.embedding import config, planner"
    inside = parse(allowed, "recis_hybrid/embedding/checkpoint/x.py")
    above = parse("from recis_hybrid.embedding.checkpoint import y", "recis_hybrid/embedding/engine.py")
    assert list(rules.package_violations([inside, above])) == []


def test_full_folders_and_undocumented_packages_are_found() -> None:
    modules = [parse("", f"recis_hybrid/ops/m{number}.py") for number in range(16)]
    room = parse('"""One sentence is enough for a room."""', "recis_hybrid/ops/__init__.py")
    good = parse('"""Files.\n\nThe reader may import it."""', "recis_hybrid/columnio/files/__init__.py")
    short = parse('"""Files of format v1.2 only."""', "recis_hybrid/columnio/read/__init__.py")
    silent = parse("", "recis_hybrid/columnio/convert/__init__.py")
    assert list(rules.folder_violations([*modules[1:], room, good])) == []
    found = list(rules.folder_violations([*modules, short, silent]))
    assert [fault.partition(":")[0] for fault in found] == [short.path, silent.path, "recis_hybrid/ops"]
    assert "has 16 modules" in found[-1]


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("recis_hybrid/ops/__init__.py", "from ._x import gather", "import gather as gather"),
        ("recis_hybrid/ops/__init__.py", "from recis_hybrid.ops._x import gather as take", "import gather as gather"),
        ("recis_hybrid/ops/__init__.py", "from ._x import *", "star import"),
        ("recis_hybrid/optim/x.py", "from recis_hybrid.embedding._blocks import Blocks", "_blocks is private"),
        ("recis_hybrid/optim/x.py", "from recis_hybrid.embedding import _Blocks", "_Blocks is private"),
        ("recis_hybrid/optim/x.py", "import recis_hybrid.embedding._blocks", "_blocks is private"),
    ],
)
def test_implicit_reexports_and_private_names_are_found(path: str, text: str, fault: str) -> None:
    found = list(rules.name_violations(parse(text, path)))
    assert found
    assert fault in found[0]


def test_private_names_are_allowed_within_a_room() -> None:
    inside = parse("from recis_hybrid.ops import _library\nfrom ._x import y as y", "recis_hybrid/ops/__init__.py")
    beside = parse("from ._x import y\nfrom recis_hybrid.ops._z import w", "recis_hybrid/ops/hash.py")
    assert [*rules.name_violations(inside), *rules.name_violations(beside)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n  from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch as t\nload = t.load",
        "from torch import load",
        "from torch import save as write",
        "import torch\ntorch.save({}, 'x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "eval('1')",
        "exec('1')",
    ],
)
def test_executing_data_is_found(text: str) -> None:
    assert list(rules.unsafe_violations(parse(text, "recis_hybrid/saver/x.py")))


def test_harmless_calls_pass() -> None:
    text = "import torch, json\ntorch.ops.load_library('x')\njson.load(f)\nmodel.eval()\nload(1)\nf(allow_pickle=False)"
    assert list(rules.unsafe_violations(parse(text, "recis_hybrid/saver/x.py"))) == []


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("import os\nx = os.environ['A']", 1),
        ("from os import environ\nclass C:\n  x = environ.get('A')", 1),
        ("import os\ndef f(x=os.getenv('A')):\n  return x", 1),
        ("import os\ndef f():\n  return os.environ['A']", 0),
        ("import os\nf = lambda: os.getenv('A')", 0),
    ],
)
def test_reading_the_environment_at_import_is_found(text: str, faults: int) -> None:
    assert len(list(rules.environment_violations(parse(text, "recis_hybrid/ops/x.py")))) == faults


@pytest.mark.parametrize(
    ("path", "line", "faults"),
    [
        ("csrc/core/x.h", "#include <torch/csrc/stable/tensor.h>", 1),
        ("csrc/core/x.h", "#include <cuda/atomic>", 0),
        ("csrc/core/x.h", '#include "cuda/launch.cuh"', 1),
        ("csrc/ops/x.cpp", "#include <torch/extension.h>", 1),
        ("csrc/ops/x.cpp", "# include <ATen/ATen.h>", 1),
        ("csrc/ops/x.cpp", "#include <torch/csrc/stable/library.h>", 0),
        ("csrc/ops/x.cpp", "#include <torch/csrc/inductor/aoti_torch/c/shim.h>", 0),
        ("csrc/cuda/x.cu", "#include <c10/cuda/CUDAStream.h>", 1),
        ("csrc/xla/x.cpp", "#include <pybind11/pybind11.h>", 0),
        ("csrc/cellar/x.cpp", "", 1),
    ],
)
def test_a_forbidden_include_is_found(path: str, line: str, faults: int) -> None:
    assert len(list(rules.include_violations(path, line))) == faults
