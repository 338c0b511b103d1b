"""Architecture rules, as functions from sources to violations."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from tests.support.imports import PACKAGE, Import, Source, aliases, dotted, imports, outside_functions, room_of

# Rooms that every room may import.
SHARED = {"accelerator", "validation"}
# All imports between the rooms of the package; any other import is forbidden. "" is the package's own __init__, which
# imports a room on first use of one of its names.
ROOMS: dict[str, set[str]] = {
    "": {
        "bridge",
        "columnio",
        "embedding",
        "features",
        "metrics",
        "optim",
        "pipelines",
        "publish",
        "ragged",
        "saver",
        "serving",
        "towers",
    },
    "validation": set(),
    "accelerator": set(),
    "ops": set(),
    # XLA's handlers, compiled from csrc/xla.
    "_xla": set(),
    "ragged": set(),
    "checkpointing": {"ops"},
    "distributed": set(),
    # Reads exports on machines that have neither torch nor the native library.
    "serving": set(),
    "columnio": {"ragged", "distributed"},
    "features": {"ops", "ragged"},
    # Tables receive an optimizer as a RecordLayout and an update rule, and return their state to the saver.
    "embedding": {"ops", "ragged", "checkpointing", "distributed"},
    "optim": {"ops", "checkpointing", "distributed", "embedding"},
    "saver": {"ops", "checkpointing", "distributed"},
    "metrics": {"distributed"},
    # The caller builds optimizers and features.
    "pipelines": {"ragged", "distributed", "columnio", "embedding", "saver", "metrics"},
    # Its XLA handlers call the kernels of the native library; engines come as arguments.
    "bridge": {"ops", "_xla"},
    # Pretrained models; imports the bridge only to build towers in JAX.
    "towers": {"ragged", "distributed", "embedding", "bridge"},
    # Writes trained models for serving, which reads them without torch.
    "publish": {"ragged", "distributed", "checkpointing", "columnio", "features", "embedding", "saver"},
    # The command line and training from a configuration; nothing imports it.
    "app": {
        "ragged",
        "distributed",
        "columnio",
        "features",
        "embedding",
        "optim",
        "saver",
        "metrics",
        "pipelines",
        "publish",
    },
}
# All imports between the sub-packages of a room, direct or through modules of the room itself; any other import is
# forbidden.
PACKAGES: dict[str, dict[str, set[str]]] = {
    "columnio": {
        "convert": set(),
        "formats": {"convert"},
        "files": {"convert", "formats"},
        "read": {"files", "convert"},
    },
    "features": {"ops": set(), "program": set()},
    "embedding": {
        "table": set(),
        "admission": {"table"},
        "planner": {"admission", "table"},
        "distributed": {"planner", "table"},
        "checkpoint": {"distributed", "planner", "table"},
    },
    "optim": {"moments": set()},
    "saver": {
        "runtime": set(),
        "format": {"runtime"},
        "storage": {"format", "runtime"},
        "parts": {"format", "runtime"},
        "checkpoint": {"parts", "storage", "format", "runtime"},
        "actions": {"checkpoint", "parts", "storage", "format", "runtime"},
    },
    "pipelines": {"steps": set(), "callbacks": {"steps"}, "data": {"steps"}},
    "app": {"config": set()},
    "serving": {"features": set(), "updates": {"features"}, "server": {"features", "updates"}},
    "bridge": {
        "exchange": set(),
        "tower": {"exchange"},
        "pretrained": set(),
        "jax_led": {"exchange"},
        "ffi": {"exchange"},
    },
}
# A folder with more modules than this must be divided into sub-packages.
MODULES_IN_A_FOLDER = 15
# Third-party packages that a room may import in addition to torch.
OUTSIDE: dict[str, set[str]] = {
    "ragged": {"numpy", "pyarrow", "torchrec"},
    "features": {"numpy", "tokenizers"},
    "columnio": {"fsspec", "numpy", "pyarrow", "safetensors"},
    "saver": {"fsspec", "numpy", "pyarrow", "safetensors"},
    "pipelines": {"mlflow", "numpy", "pyarrow", "tqdm", "wandb"},
    "app": {"numpy", "pyarrow", "yaml"},
    "publish": {"faiss", "numpy", "onnxruntime", "onnxscript", "safetensors"},
    "serving": {
        "fsspec",
        "jax",
        "numpy",
        "onnxruntime",
        "orjson",
        "prometheus_client",
        "pyarrow",
        "redis",
        "starlette",
        "uvicorn",
    },
    "bridge": {"numpy", "jax", "jaxlib", "flax", "equinox", "orbax", "safetensors"},
    "towers": {"huggingface_hub", "peft", "pyarrow", "safetensors", "tqdm", "transformers"},
}
OUTSIDE_OF_OTHERS = {"numpy"}

# Modules and functions that can execute the data they read.
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_NAMES = {"torch.load", "torch.save", "torch.jit.load", "torch.package", "torch.hub.load", "eval", "exec"}

# Includes forbidden in the C++ and CUDA files of a folder, and the reason.
UNSTABLE = r"ATen/|c10/|torch/(?!csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/)"
INCLUDES: dict[str, tuple[str, str]] = {
    "core": (r"torch/|ATen/|c10/|pybind11|xla/|Python\.h|ops/|cpu/|cuda/(?!atomic|std/)", "core knows no framework"),
    "cpu": (UNSTABLE + r"|pybind11|xla/|Python\.h", "only torch's stable ABI may be used"),
    "cuda": (UNSTABLE + r"|pybind11|xla/|Python\.h", "only torch's stable ABI may be used"),
    "ops": (UNSTABLE + r"|pybind11|xla/|Python\.h", "only torch's stable ABI may be used"),
    "test/emulated": (r"pybind11|Python\.h", "one build serves every Python"),
    "test": (r"torch/|ATen/|c10/|pybind11|xla/|Python\.h", "the sanitizers' programs need no framework"),
    "xla": (r"torch/|ATen/|c10/", "XLA's handlers need no torch"),
}


def inner_room(item: Import) -> str | None:
    """Return the room that an import reaches, or None for one outside the package."""
    if item.target.split(".")[0] != PACKAGE:
        return None
    # `from recis_hybrid import ops` imports a room, like `import recis_hybrid.ops`.
    if item.target == PACKAGE and item.name in ROOMS:
        return item.name
    return room_of(item.target)


def import_violations(source: Source) -> Iterator[str]:
    """Yield the imports that ROOMS, SHARED and OUTSIDE disallow."""
    room = source.room
    if room not in ROOMS:
        yield f"{source.path}: the room {room!r} is not in ROOMS; add it with its imports"
        return
    for item in imports(source):
        where = f"{source.path}:{item.line}"
        reached = inner_room(item)
        if reached is None:
            top = item.target.split(".")[0]
            allowed = OUTSIDE.get(room, OUTSIDE_OF_OTHERS) | {"torch"} | sys.stdlib_module_names
            if top not in allowed:
                yield f"{where}: {room or PACKAGE} may not import {top}"
        elif reached != room and reached not in ROOMS[room] | SHARED:
            yield f"{where}: {room or PACKAGE} may not import {PACKAGE}{'.' + reached if reached else ''}"


def import_cycles(sources: Iterable[Source]) -> list[list[str]]:
    """Return the groups of modules that import each other, including imports for type checkers, each group sorted.

    A module that imports a name from a package depends on the package's ``__init__``, or on the submodule of that name.

    References:
        R. Tarjan: Depth-first search and linear graph algorithms. SIAM Journal on Computing, 1972.
    """
    edges = _edges(sources)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            start = stack.index(module)
            found.append(sorted(stack[start:]))
            del stack[start:]

    for module in edges:
        if module not in index:
            visit(module)
    return sorted(group for group in found if len(group) > 1)


def _edges(sources: Iterable[Source]) -> dict[str, set[str]]:
    """Map each module to the modules that it imports, among the sources."""
    by_name = {source.module: source for source in sources}
    edges: dict[str, set[str]] = {}
    for module, source in by_name.items():
        targets = {f"{item.target}.{item.name}": item.target for item in imports(source)}
        reached = {full if full in by_name else target for full, target in targets.items()}
        edges[module] = {name for name in reached if name in by_name and name != module}
    return edges


def package_violations(sources: Iterable[Source]) -> Iterator[str]:
    """Yield the imports between sub-packages of a room that PACKAGES disallows."""
    sources = list(sources)
    for source in sources:
        package = _package_of(source.module, source.is_package)
        if package is not None and package not in PACKAGES.get(source.room, {}):
            yield f"{source.path}: the sub-package {source.room}.{package} is not in PACKAGES; add it with its imports"
    for place, room, package, reached in _package_imports(sources):
        if reached not in PACKAGES[room][package]:
            yield f"{place}: {room}.{package} may not import {room}.{reached}"


def unused_rules(sources: Iterable[Source]) -> Iterator[str]:
    """Yield the entries of ROOMS and PACKAGES that no import uses."""
    sources = list(sources)
    rooms = {(source.room, inner_room(item)) for source in sources for item in imports(source)}
    packages = {(room, package, reached) for _, room, package, reached in _package_imports(sources)}
    for room, allowed in ROOMS.items():
        for reached in sorted(allowed):
            if (room, reached) not in rooms:
                yield f"ROOMS: {room or PACKAGE} does not import {reached}; remove the entry"
    for room, table in PACKAGES.items():
        for package, allowed in table.items():
            for reached in sorted(allowed):
                if (room, package, reached) not in packages:
                    yield f"PACKAGES: {room}.{package} does not import {room}.{reached}; remove the entry"


def _package_imports(sources: Iterable[Source]) -> list[tuple[str, str, str, str]]:
    """Return the imports by which a sub-package reaches another one of its room.

    Besides its own imports, these are the imports of the modules of the room that it imports.

    Returns:
        Place of the import, room, importing sub-package, imported sub-package.
    """
    by_name = {source.module: source for source in sources}
    edges = _edges(by_name.values())
    found: dict[tuple[str, str, str, str], None] = {}
    for source in by_name.values():
        room, package = source.room, _package_of(source.module, source.is_package)
        if package is None or package not in PACKAGES.get(room, {}):
            continue
        modules = [source.module]
        for module in modules:
            for item in imports(by_name[module]):
                parts = [*item.target.split("."), *([item.name] if item.name else [])]
                reached = parts[2] if parts[:2] == [PACKAGE, room] and len(parts) > 2 else None
                if reached in PACKAGES[room] and reached != package:
                    found[f"{by_name[module].path}:{item.line}", room, package, reached] = None
            for target in sorted(edges[module]):
                other = by_name[target]
                is_room_module = other.room == room and not other.is_package and _package_of(target, False) is None
                if is_room_module and target not in modules:
                    modules.append(target)
    return list(found)


def _package_of(module: str, is_package: bool) -> str | None:
    """Return the sub-package of its room that contains a module, or None."""
    parts = module.split(".")
    return parts[2] if len(parts) > 3 or (len(parts) == 3 and is_package) else None


def folder_violations(sources: Iterable[Source]) -> Iterator[str]:
    """Yield the folders with too many modules, and the sub-packages whose docstring does not introduce them.

    The docstring of a sub-package's ``__init__`` has two sentences: its purpose, and which packages may import it.
    """
    modules: Counter[str] = Counter()
    for source in sources:
        folder = source.path.rpartition("/")[0]
        if not source.is_package:
            modules[folder] += 1
        elif source.module.count(".") >= 2 and not _has_two_sentences(ast.get_docstring(source.tree) or ""):
            yield f"{source.path}: state the package's purpose and who may import it in a docstring of two sentences"
    for folder, count in modules.items():
        if count > MODULES_IN_A_FOLDER:
            yield f"{folder}: has {count} modules, more than {MODULES_IN_A_FOLDER}; group them in sub-packages"


def _has_two_sentences(text: str) -> bool:
    return len(re.findall(r"\.(?=\s|$)", text)) >= 2


def name_violations(source: Source) -> Iterator[str]:
    """Yield re-exports that are not explicit, and uses of private names of other rooms."""
    for item in imports(source):
        where = f"{source.path}:{item.line}"
        reached = inner_room(item)
        if reached is None:
            continue
        if item.name == "*":
            yield f"{where}: a star import hides which names are public; import them by name"
        if reached != source.room:
            below = item.target.split(".")[1:] + ([item.name] if item.name else [])
            private = [part for part in below if part.startswith("_") and part != reached]
            if private:
                yield f"{where}: {private[0]} is private to {PACKAGE}.{reached}; use what its __init__ re-exports"
        elif source.is_package and item.name and not item.name.startswith("_") and item.alias != item.name:
            yield f"{where}: re-export a public name with `import {item.name} as {item.name}`"


def unsafe_violations(source: Source) -> Iterator[str]:
    """Yield calls and imports that could execute the data they read."""
    known = aliases(source)
    for item in imports(source):
        if item.target.split(".")[0] in UNSAFE_MODULES or item.name in UNSAFE_MODULES:
            yield f"{source.path}:{item.line}: {item.target} can execute the data it reads"
        elif f"{item.target}.{item.name}" in UNSAFE_NAMES or item.target in UNSAFE_NAMES:
            yield f"{source.path}:{item.line}: {item.target}.{item.name} can execute the data it reads"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute | ast.Name) and dotted(node, known) in UNSAFE_NAMES:
            yield f"{source.path}:{node.lineno}: {dotted(node, known)} can execute the data it reads"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{source.path}:{node.value.lineno}: allow_pickle can execute the data it reads"


def environment_violations(source: Source) -> Iterator[str]:
    """Yield the reads of environment variables during import."""
    known = aliases(source)
    for node in outside_functions(source.tree):
        if isinstance(node, ast.Attribute | ast.Name) and dotted(node, known) in ("os.environ", "os.getenv"):
            yield f"{source.path}:{node.lineno}: reads the environment at import; read it on first use"


def include_violations(path: str, text: str) -> Iterator[str]:
    """Yield the forbidden includes of a file below csrc/."""
    folder = next((name for name in INCLUDES if path.startswith(f"csrc/{name}/")), None)
    if folder is None:
        yield f"{path}: its folder is not in INCLUDES; add it with its forbidden includes"
        return
    forbidden, why = INCLUDES[folder]
    for number, line in enumerate(text.splitlines(), 1):
        included = re.match(r'\s*#\s*include\s*[<"]([^>"]+)', line)
        if included and re.match(forbidden, included[1]):
            yield f"{path}:{number}: includes {included[1]}; {why}"
