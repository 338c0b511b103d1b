"""Builds the native libraries of recis_hybrid.

Nothing here has a Python ABI: a library is loaded with ``torch.ops.load_library`` and speaks torch's stable ABI, so
one build serves every supported Python and every torch from 2.11 on. The CPU library is built once per x86-64 level
(``librecis_cpu_v2.so``, ``..._v3.so``, ``..._v4.so``; on other machines ``librecis_cpu_generic.so``) and the best one
is chosen when the package is loaded. The CUDA library (``librecis_cuda.so``) is separate and needs only ``nvcc``.

Environment: ``RECIS_CUDA=0|1|auto`` (auto: build CUDA where ``nvcc`` is found and torch is a CUDA build),
``RECIS_CUDA_ARCHS`` (default ``80;90``), ``CXX``, ``NVCC``, ``MAX_JOBS``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
# No -ffast-math (it changes the whole process) and no contraction: a*b+c rounds alike on every CPU level and on CUDA.
CXX_FLAGS = [
    # GCC's unroll-and-jam mixes the loop over gradients into the loop over elements, and then vectorises neither.
    "-std=c++20",
    "-O3",
    "-fno-loop-unroll-and-jam",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
    "-pthread",
]
LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


def fail(message: str) -> None:
    """End the build with one sentence instead of a trace."""
    sys.exit(f"recis_hybrid: {message}")


def torch_paths() -> tuple[Path, Path, bool]:
    """Return torch's include folder, its library folder, and whether it is a CUDA build."""
    try:
        import torch
    except ImportError:
        fail(
            "torch is not installed in this environment; install it first, e.g. `pip install torch==2.13.0`, "
            "and build with `pip install --no-build-isolation -e .`"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        fail(f"torch {torch.__version__} is too old; this library needs torch 2.11 or newer: `pip install -U torch`")
    base = Path(torch.__file__).parent
    return base / "include", base / "lib", torch.version.cuda is not None


def cuda_link(lib: Path, objects: Path, cxx: str) -> list[str]:
    """Return the flags that link libtorch_cuda.

    A CPU build of torch has none; an empty library of that name then stands in for it, so that what is built names its
    dependency and finds it where it is loaded.
    """
    if not (lib / "libtorch_cuda.so").exists():
        lib = objects / "stub"
        lib.mkdir(parents=True, exist_ok=True)
        run(
            [
                cxx,
                "-shared",
                "-Wl,-soname,libtorch_cuda.so",
                "-x",
                "c++",
                "/dev/null",
                "-o",
                str(lib / "libtorch_cuda.so"),
            ]
        )
    return [f"-L{lib}", "-Xlinker=--no-as-needed", "-ltorch_cuda", "-Xlinker=--as-needed"]


def cuda_wanted(torch_has_cuda: bool) -> str | None:
    """Return the path of nvcc if CUDA files are to be built, else None."""
    choice = os.environ.get("RECIS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        fail(f"RECIS_CUDA must be 0, 1 or auto, got {choice!r}")
    named = os.environ.get("NVCC")
    nvcc = shutil.which(named) if named else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if choice == "1" and nvcc is None:
        fail(
            f"RECIS_CUDA=1 asks for the CUDA library, but {named or 'nvcc'} was not found; put nvcc on PATH, "
            "set NVCC, or build with RECIS_CUDA=0"
        )
    return nvcc if choice == "1" or (choice == "auto" and torch_has_cuda) else None


class BuildNative(build_ext):
    """Compiles csrc/ into shared libraries under recis_hybrid/lib (or the build folder of a wheel)."""

    def run(self) -> None:
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx) is None:
            fail(f"the C++ compiler {cxx!r} was not found; install one (Debian: `apt-get install g++`) or set CXX")
        include, lib, torch_has_cuda = torch_paths()
        target = (ROOT if self.inplace else Path(self.build_lib)) / "recis_hybrid" / "lib"
        target.mkdir(parents=True, exist_ok=True)
        # Ours keeps its own object folder, so that editable installs and in-place builds share objects.
        objects = ROOT / "build" / "native"
        headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), Path(__file__)]
        newest_header = max(header.stat().st_mtime for header in headers)
        # Messages name source files: relative to the root, not by a path of the machine that built them.
        prefix = f"-ffile-prefix-map={ROOT}/="
        common = [f"-I{ROOT / 'csrc'}", "-isystem", str(include), TARGET]
        link = [f"-L{lib}", "-ltorch_cpu", "-lc10"]

        jobs: list[tuple[Path, Path, list[str]]] = []
        libraries: list[tuple[Path, list[Path], list[str]]] = []
        x86 = platform.machine() in ("x86_64", "AMD64")
        for level, flags in (LEVELS if x86 else {"generic": []}).items():
            outputs = []
            for source in sorted(ROOT.glob("csrc/ops/*.cpp")):
                output = objects / f"cpu_{level}" / (source.stem + ".o")
                jobs.append(
                    (source, output, [cxx, *CXX_FLAGS, prefix, *flags, *common, "-c", str(source), "-o", str(output)])
                )
                outputs.append(output)
            libraries.append((target / f"librecis_cpu_{level}.so", outputs, [cxx, "-shared", "-pthread", *link]))

        nvcc = cuda_wanted(torch_has_cuda)
        if nvcc is not None:
            archs = os.environ.get("RECIS_CUDA_ARCHS", "80;90").replace(";", " ").split()
            gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            flags = [
                "-std=c++20",
                "-O3",
                "-DUSE_CUDA",
                "--fmad=false",
                "--extended-lambda",
                "-Xcompiler=-fPIC",
                "-Xcompiler=-fvisibility=hidden",
                f"-Xcompiler={prefix}",
                "-diag-suppress=20012,20013,20015",
                *gencode,
            ]
            outputs = []
            for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
                output = objects / "cuda" / (source.stem + ".o")
                jobs.append((source, output, [nvcc, *flags, *common, "-c", str(source), "-o", str(output)]))
                outputs.append(output)
            # The runtime is linked in, so that the library loads wherever a driver is; torch keeps its own.
            link = [*cuda_link(lib, objects, cxx), *link]
            libraries.append(
                (target / "librecis_cuda.so", outputs, [nvcc, "-shared", "-cudart=static", *gencode, *link])
            )

        def is_stale(job: tuple[Path, Path, list[str]]) -> bool:
            source, output, _ = job
            return (
                self.force
                or not output.exists()
                or output.stat().st_mtime <= max(newest_header, source.stat().st_mtime)
            )

        def compile_one(numbered: tuple[int, tuple[Path, Path, list[str]]]) -> None:
            number, (source, output, command) = numbered
            output.parent.mkdir(parents=True, exist_ok=True)
            print(f"  {number}/{len(stale)} {output.parent.name:8} {source.relative_to(ROOT)}", flush=True)
            run(command)

        stale = [job for job in jobs if is_stale(job)]
        workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        if stale:
            print(f"compiling {len(stale)} files of the native library, {workers} at a time (MAX_JOBS)", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compile_one, enumerate(stale, 1)))
        for library, outputs, command in libraries:
            older = not library.exists() or library.stat().st_mtime < max(o.stat().st_mtime for o in outputs)
            if older or self.force:
                print(f"  link     {library.name}", flush=True)
                # A new file, not the old one rewritten: a process that has it mapped keeps what it has.
                fresh = library.with_suffix(".tmp")
                run([*command[:1], *map(str, outputs), *command[1:], "-o", str(fresh)])
                fresh.replace(library)

    def get_outputs(self) -> list[str]:
        base = Path(self.build_lib) / "recis_hybrid" / "lib"
        return [str(path) for path in base.glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def run(command: list[str]) -> None:
    """Run a compiler; on failure prints what it said and ends."""
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        fail(f"`{' '.join(command)}` failed:\n{said}")
    if said.strip():
        print(said)


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: native code inside, but none of Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # One nominal extension, so that setuptools knows the wheel is not pure; BuildNative builds what it stands for.
    ext_modules=[
        Extension(
            "recis_hybrid.lib.recis",
            sources=[
                str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/ops/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
            ],
            depends=[str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")]],
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
