"""Imports and names in Python sources, without executing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "recis_hybrid"


@dataclass(frozen=True)
class Import:
    """One imported name: ``from recis_hybrid.ops import gather as gather`` has the target ``recis_hybrid.ops``.

    Args:
        line: Line of the statement.
        target: Absolute name of the module; ``a.b`` for ``import a.b``.
        name: The name imported from it, or None if the module itself is imported.
        alias: The name after ``as``, or None.
    """

    line: int
    target: str
    name: str | None = None
    alias: str | None = None


@dataclass(frozen=True)
class Source:
    """A source file and the dotted name of its module."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def package(self) -> str:
        """The package that this file's relative imports start from."""
        return self.module if self.is_package else self.module.rpartition(".")[0]

    @property
    def room(self) -> str:
        return room_of(self.module)


def parse(text: str, path: str) -> Source:
    """Return a Source with this text, as if it were at this path below the root of the repository."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return Source(path, ".".join(parts), text, ast.parse(text, path))


def read_package(root: Path) -> list[Source]:
    """Return the sources of the package, including bridge, which is a symbolic link in it."""
    found: list[Source] = []
    folders = [root / PACKAGE]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_dir():
                folders.append(path)
            elif path.suffix == ".py":
                found.append(parse(path.read_text(encoding="utf-8"), str(path.relative_to(root))))
    return found


def room_of(module: str) -> str:
    """Return the room of a module: the first name below the package, "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(source: Source) -> Iterator[Import]:
    """Yield all imports of a file: at the top, inside functions, for type checkers, and through importlib."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield Import(node.lineno, item.name, None, item.asname)
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                above = source.package.split(".")
                above = above[: len(above) - node.level + 1]
                target = ".".join([*above, target] if target else above)
            for item in node.names:
                yield Import(node.lineno, target, item.name, item.asname)
        elif isinstance(node, ast.Call) and dotted(node.func, {}) in ("importlib.import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(node.lineno, first.value)


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """Return "torch.load" for the expression ``t.load`` if ``t`` is an alias of torch; "" for other expressions."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def aliases(source: Source) -> dict[str, str]:
    """Map the local names of imports to their full dotted names."""
    found: dict[str, str] = {}
    for item in imports(source):
        if item.name is not None:
            found[item.alias or item.name] = f"{item.target}.{item.name}"
        elif item.alias is not None:
            found[item.alias] = item.target
    return found


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that are executed on import: all except the bodies of functions."""
    for child in ast.iter_child_nodes(tree):
        yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            # Decorators, defaults and annotations are executed.
            for part in (*child.decorator_list, child.args):
                yield part
                yield from outside_functions(part)
        elif not isinstance(child, ast.Lambda):
            yield from outside_functions(child)
