"""The code that nvcc makes of csrc/cuda: accesses to memory, and registers and stack of each kernel.

``python -m tests.support.ptx`` writes the table with which tests compare.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "ops" / "cuda_kernels.txt"
FOLDER = ROOT / "build" / "ptx"
SOURCES = ("cache", "gather", "id_map", "update")
ARCH = 90
_ACCESS = re.compile(r"\b(ld|st)\.(\S+) ")
_SIZE = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        loads: Sizes in bytes of the loads from global memory.
        stores: Sizes in bytes of the stores to global memory.
        elements: Sizes in bytes of the elements of all these accesses.
        registers: Registers of a thread.
        stack: Bytes of a thread's stack.
        spills: Bytes of registers that are spilled.
    """

    loads: list[int]
    stores: list[int]
    elements: set[int]
    registers: int
    stack: int
    spills: int


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    found = subprocess.run([ROOT / "scripts" / "find_nvcc.sh"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def reason_to_skip() -> str:
    """Return why the code cannot be read on this machine; empty if it can."""
    if find_nvcc() is None:
        return "nvcc is not here"
    missing = [tool for tool in ("ptxas", "c++filt") if _find(tool) is None]
    return f"{missing[0]} is not here" if missing else ""


def version() -> str:
    """Return the version of nvcc, on which registers depend."""
    text = subprocess.run([find_nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    assert match is not None, text
    return match[1]


def kernels() -> dict[str, Kernel]:
    """Return the kernels of ``SOURCES`` by name; compile what is older than its sources."""
    include = Path(torch.__file__).parent / "include"
    flags = [*_constant("NVCC_FLAGS"), _constant("TARGET"), f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
        parts = list(pool.map(lambda source: _compile(source, flags), SOURCES))
    return {name: kernel for part in parts for name, kernel in part.items()}


def read_table() -> tuple[str, dict[str, tuple[int, int]]]:
    """Return the version of nvcc that the table names, and registers and stack of each kernel."""
    first, *lines = TABLE.read_text().splitlines()
    rows = [line.split(maxsplit=2) for line in lines if not line.startswith("#")]
    return first.split()[-1], {name: (int(registers), int(stack)) for registers, stack, name in rows}


def write_table() -> None:
    """Write the table from the present code."""
    rows = [f"{kernel.registers:3} {kernel.stack:5}  {name}" for name, kernel in sorted(kernels().items())]
    head = [f"# nvcc {version()}", "# registers, bytes of stack and kernel; from `python -m tests.support.ptx`"]
    TABLE.write_text("\n".join(head + rows) + "\n")


def _find(tool: str) -> str | None:
    nvcc = find_nvcc()
    beside = shutil.which(tool, path=str(Path(nvcc).parent)) if nvcc else None
    return beside or shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")


def _constant(name: str) -> Any:
    """Return a constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def _compile(source: str, flags: list[str]) -> dict[str, Kernel]:
    ptx, log = FOLDER / f"{source}.ptx", FOLDER / f"{source}.log"
    read = [*ROOT.glob("csrc/c*/**/*.*"), *ROOT.glob("csrc/ops/*.h"), ROOT / "setup.py"]
    if not log.exists() or log.stat().st_mtime <= max(path.stat().st_mtime for path in read):
        FOLDER.mkdir(parents=True, exist_ok=True)
        _run([find_nvcc(), *flags, "-ptx", f"-arch=compute_{ARCH}", f"csrc/cuda/{source}.cu", "-o", str(ptx)])
        log.write_text(_run([_find("ptxas"), "-v", f"-arch=sm_{ARCH}", str(ptx), "-o", os.devnull]))
    return _read(ptx.read_text(), log.read_text())


def _run(command: list[Any]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _read(ptx: str, log: str) -> dict[str, Kernel]:
    code = {match[1]: match[0] for match in re.finditer(r"\.entry (\w+)\(.*?\n\}\n", ptx, re.DOTALL)}
    resources = re.finditer(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    found = {}
    for match in resources:
        accesses: dict[str, list[int]] = {"ld": [], "st": []}
        elements = set()
        for kind, how in _ACCESS.findall(code[match[1]]):
            parts = how.split(".")
            if {"param", "local", "shared"} & {part.split("::")[0] for part in parts}:
                continue
            size = _SIZE[parts[-1][1:]]
            count = next((int(part[1:]) for part in parts if part in ("v2", "v4")), 1)
            accesses[kind].append(size * count)
            elements.add(size)
        spills = int(match[3]) + int(match[4])
        found[match[1]] = Kernel(accesses["ld"], accesses["st"], elements, int(match[5]), int(match[2]), spills)
    names = subprocess.run(
        [_find("c++filt") or "c++filt"], input="\n".join(found), capture_output=True, text=True, check=True
    )
    return dict(zip(map(_short, names.stdout.splitlines()), found.values(), strict=True))


def _short(name: str) -> str:
    """Return the name of a functor, ``Kernel<...>``, from that of the kernel that runs it."""
    match = re.search(r"_kernel<(.*)>\(", name.replace("recis::", ""))
    assert match is not None, name
    return re.sub(r"\(anonymous namespace\)::", "", match[1]).strip()


if __name__ == "__main__":
    write_table()
