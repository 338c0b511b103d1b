"""Build of the native libraries of recis_hybrid.

The libraries do not depend on Python's ABI: they are loaded by ``torch.ops.load_library`` and use torch's stable ABI,
so one build works with every supported Python and every torch from 2.11 on. The CPU library is built once for each
x86-64 level (``librecis_cpu_v2.so``, ``..._v3.so``, ``..._v4.so``; on other machines ``librecis_cpu_generic.so``; on
macOS, the names end in ``.dylib``), and the best one is chosen when the package is loaded. The CUDA library
(``librecis_cuda.so``) is separate and needs only ``nvcc``.

The module ``recis_hybrid._xla``, for lookups inside ``jax.jit``, is built if jaxlib, with the headers of XLA's FFI, and
pybind11 are installed. It uses Python's ABI and needs neither torch nor jax to link; it calls the kernels of the
libraries above through plain functions.

Environment variables: ``RECIS_CUDA=0|1|auto`` (auto: build CUDA if ``nvcc`` is found and torch is a CUDA build),
``RECIS_CUDA_ARCHS`` (default ``80;90``), ``CXX``, ``NVCC``, ``MAX_JOBS``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
# No -ffast-math, which changes the floating point of the whole process, and no contraction, so that a*b+c rounds
# identically on every CPU level and on CUDA.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
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
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
if sys.platform == "darwin":
    # Python's functions are found when the module is loaded.
    MODULE_LINK_FLAGS = ["-undefined", "dynamic_lookup"]
else:
    MODULE_LINK_FLAGS = []
    # GCC's unroll-and-jam merges the loop over gradients into the loop over elements, and then vectorizes neither.
    CXX_FLAGS.append("-fno-loop-unroll-and-jam")
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",
    "--fmad=false",
    "--extended-lambda",
    "-Xcompiler=-fPIC",
    "-Xcompiler=-fvisibility=hidden",
    "-diag-suppress=20012,20013,20015",
]
# Kernels of csrc/cuda as plain C++: no contraction, as above; warnings are those of the real builds.
EMULATED_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w", "-pthread"]
XLA_MODULE = f"_xla{sysconfig.get_config_var('EXT_SUFFIX')}"
LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


@dataclass(frozen=True)
class Job:
    """The compilation of one source file, or of a header that others include first.

    Attributes:
        source: The source file.
        output: The object file, or the compiled header.
        command: The command line.
        text: What the source is to contain, if the build writes it.
    """

    source: Path
    output: Path
    command: list[str]
    text: str | None = None

    def is_stale(self, newest_header: float) -> bool:
        """Return whether the object is missing, or older than its source or any header."""
        if self.text is not None and not (self.source.exists() and self.source.read_text() == self.text):
            return True
        return not self.output.exists() or self.output.stat().st_mtime <= max(
            newest_header, self.source.stat().st_mtime
        )


@dataclass(frozen=True)
class Library:
    """A shared library, and the jobs whose objects it is linked from.

    Attributes:
        path: The library file.
        header: The compilation of a header that comes before the others.
        jobs: The compilations of its objects.
        linker: The command line, without objects and output.
    """

    path: Path
    header: Job | None
    jobs: list[Job]
    linker: list[str]

    def is_stale(self) -> bool:
        """Return whether the library is missing or older than an object."""
        return not self.path.exists() or self.path.stat().st_mtime < max(
            job.output.stat().st_mtime for job in self.jobs
        )

    def link(self) -> None:
        """Link the library into a new file, because running processes may have the old one mapped."""
        print(f"  link     {self.path.name}", flush=True)
        fresh = self.path.with_suffix(".tmp")
        objects = [str(job.output) for job in self.jobs]
        run([*self.linker[:1], *objects, *self.linker[1:], "-o", str(fresh)])
        fresh.replace(self.path)


def fail(message: str) -> NoReturn:
    """End the build with one sentence instead of a traceback."""
    sys.exit(f"recis_hybrid: {message}")


def torch_paths() -> tuple[Path, Path, bool]:
    """Return torch's include folder, its library folder, and whether it is a CUDA build."""
    try:
        import torch
    except ImportError:
        fail(
            "torch is not installed in this environment; install it, e.g. with `pip install torch==2.13.0`, "
            "and build with `pip install --no-build-isolation -e .`"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        fail(f"torch {torch.__version__} is too old; this library needs torch 2.11 or newer: `pip install -U torch`")
    base = Path(torch.__file__).parent
    return base / "include", base / "lib", torch.version.cuda is not None


def cuda_link_flags(lib: Path, objects: Path, cxx: str) -> list[str]:
    """Return the flags that link libtorch_cuda.

    A CPU build of torch does not have it. An empty library of that name then takes its place, so that the library built
    here records the dependency, which is resolved when it is loaded.

    Args:
        lib: torch's library folder.
        objects: The folder for the empty library.
        cxx: The C++ compiler.
    """
    if not (lib / "libtorch_cuda.so").exists():
        lib = objects / "stub"
        lib.mkdir(parents=True, exist_ok=True)
        empty = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", "/dev/null"]
        run([cxx, *empty, "-o", str(lib / "libtorch_cuda.so")])
    return [f"-L{lib}", "-Xlinker=--no-as-needed", "-ltorch_cuda", "-Xlinker=--as-needed"]


def find_nvcc(torch_has_cuda: bool) -> str | None:
    """Return the path of nvcc if the CUDA library is to be built, else None."""
    choice = os.environ.get("RECIS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        fail(f"RECIS_CUDA must be 0, 1 or auto, got {choice!r}")
    named = os.environ.get("NVCC")
    nvcc = shutil.which(named) if named else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if choice == "1" and nvcc is None:
        fail(
            f"RECIS_CUDA=1 requests the CUDA library, but {named or 'nvcc'} was not found; put nvcc on PATH, "
            "set NVCC, or build with RECIS_CUDA=0"
        )
    return nvcc if choice == "1" or (choice == "auto" and torch_has_cuda) else None


def xla_flags() -> list[str] | None:
    """Return the include flags of ``recis_hybrid._xla``, or None if it cannot be built."""
    try:
        import jaxlib
        import pybind11
    except ImportError as error:
        print(
            f"  skip     recis_hybrid._xla, for lookups inside jax.jit: there is no module {error.name!r}", flush=True
        )
        return None
    headers = [Path(jaxlib.__path__[0]) / "include", pybind11.get_include(), sysconfig.get_path("include")]
    return [flag for header in headers for flag in ("-isystem", str(header))]


def compile_all(headers: list[Job], jobs: list[Job]) -> None:
    """Run compilations in parallel, as many at a time as MAX_JOBS or the CPUs allow; those of headers first."""
    workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
    count = len(headers) + len(jobs)
    print(f"compiling {count} files of the native library, {workers} at a time (MAX_JOBS)", flush=True)

    def compile_one(number: int, job: Job) -> None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        if job.text is not None:
            job.source.write_text(job.text)
        print(f"  {number}/{count} {job.output.parent.name:8} {job.source.relative_to(ROOT)}", flush=True)
        run(job.command)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, range(1, count + 1), headers))
        list(pool.map(compile_one, range(len(headers) + 1, count + 1), jobs))


class BuildNative(build_ext):
    """Compilation of csrc/ into shared libraries under recis_hybrid/lib, or in the build folder of a wheel."""

    def run(self) -> None:
        """Compile what is stale and link the libraries."""
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx) is None:
            fail(f"the C++ compiler {cxx!r} was not found; install one (Debian: `apt-get install g++`) or set CXX")
        include, lib, torch_has_cuda = torch_paths()
        target = (ROOT if self.inplace else Path(self.build_lib)) / "recis_hybrid" / "lib"
        target.mkdir(parents=True, exist_ok=True)
        # One object folder for editable installs and in-place builds.
        objects = ROOT / "build" / "native"
        # Messages contain names of source files. They are relative to the root, without paths of the build machine.
        prefix = f"-ffile-prefix-map={ROOT}/="
        common = [f"-I{ROOT / 'csrc'}", "-isystem", str(include), TARGET]
        torch_link = [f"-L{lib}", "-ltorch_cpu", "-lc10"]

        libraries = []
        is_x86 = platform.machine() in ("x86_64", "AMD64")
        for level, flags in (LEVELS if is_x86 else {"generic": []}).items():
            folder, command = objects / f"cpu_{level}", [cxx, *CXX_FLAGS, prefix, *flags, *common]
            header, command = compiled_first(folder, ["core/glibc.h", "ops/common.h", "ops/device.h"], command)
            jobs = jobs_of("csrc/ops/*.cpp", folder, command)
            linker = [cxx, "-shared", "-pthread", *torch_link]
            libraries.append(Library(target / f"librecis_cpu_{level}{SUFFIX}", header, jobs, linker))

        includes = xla_flags()
        if includes is not None:
            command = [cxx, *CXX_FLAGS, prefix, f"-I{ROOT / 'csrc'}", *includes, "-include", "core/glibc.h"]
            # One object folder for each Python, of which each has its own ABI.
            jobs = jobs_of("csrc/xla/*.cpp", objects / f"xla-{sys.implementation.cache_tag}", command)
            linker = [cxx, "-shared", "-pthread", *MODULE_LINK_FLAGS]
            libraries.append(Library(target.parent / XLA_MODULE, None, jobs, linker))

        nvcc = find_nvcc(torch_has_cuda)
        if nvcc is not None:
            archs = os.environ.get("RECIS_CUDA_ARCHS", "80;90").replace(";", " ").split()
            gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            command = [nvcc, *NVCC_FLAGS, f"-Xcompiler={prefix}", *gencode, *common, "-include", "core/glibc.h"]
            jobs = jobs_of("csrc/cuda/*.cu", objects / "cuda", command)
            # The CUDA runtime is linked statically, so that the library loads wherever there is a driver.
            linker = [nvcc, "-shared", "-cudart=static", *gencode, *cuda_link_flags(lib, objects, cxx), *torch_link]
            libraries.append(Library(target / "librecis_cuda.so", None, jobs, linker))
        self.build(libraries)

    def build(self, libraries: Iterable[Library]) -> None:
        """Compile the stale headers and objects of libraries, and link them."""
        headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), Path(__file__)]
        newest_header = max(header.stat().st_mtime for header in headers)

        def stale(jobs: Iterable[Job]) -> list[Job]:
            return [job for job in jobs if self.force or job.is_stale(newest_header)]

        jobs = stale(job for library in libraries for job in library.jobs)
        if jobs:
            compile_all(stale(library.header for library in libraries if library.header is not None), jobs)
        for library in libraries:
            if self.force or library.is_stale():
                library.link()

    def get_outputs(self) -> list[str]:
        """Return the libraries that were built, for setuptools' record of files."""
        base = Path(self.build_lib) / "recis_hybrid"
        return [str(path) for path in [*base.glob(f"lib/*{SUFFIX}"), *base.glob(XLA_MODULE)]]

    def get_output_mapping(self) -> dict[str, str]:
        """Return an empty mapping: an editable install needs no copies, because it is built in place."""
        return {}


class BuildEmulated(BuildNative):
    """Compilation of csrc/cuda for the emulated device of the tests, into build/emulated."""

    def run(self) -> None:
        """Compile what is stale and link the library."""
        cxx = os.environ.get("CXX", "g++")
        include, lib, _ = torch_paths()
        folder = ROOT / "build" / "emulated"
        common = ["-I", str(ROOT / "csrc/test/emulated"), "-I", str(ROOT / "csrc/test"), "-I", str(ROOT / "csrc")]
        common += ["-isystem", str(include)]
        header, kernels = compiled_first(folder, ["cuda/runtime.cuh"], [cxx, *EMULATED_FLAGS, *common, TARGET])
        jobs = jobs_of("csrc/cuda/*.cu", folder, [*kernels, "-x", "c++"])
        jobs += jobs_of("csrc/test/emulated/*.cpp", folder, [cxx, *EMULATED_FLAGS, *common])
        linker = [cxx, "-shared", "-pthread", f"-L{lib}", "-ltorch_cpu", "-lc10"]
        self.build([Library(folder / "librecis_emulated.so", header, jobs, linker)])


def compiled_first(folder: Path, headers: list[str], command: list[str]) -> tuple[Job, list[str]]:
    """Return the compilation of headers, and the command that compiles sources which include these headers first.

    Torch and the standard library would take half of the time of most sources. A compiler that cannot use the compiled
    headers reads their text.

    Args:
        folder: The folder for the compiled headers.
        headers: The headers, in order.
        command: The command line of headers and sources.
    """
    first, output = folder / "first.h", folder / "first.h.gch"
    # With other flags, the text differs, and the headers are compiled again.
    text = f"// {' '.join(command)}\n" + "".join(f'#include "{header}"\n' for header in headers)
    job = Job(first, output, [*command, "-x", "c++-header", "-c", str(first), "-o", str(output)], text)
    return job, [*command, "-include", str(first)]


def jobs_of(pattern: str, folder: Path, command: list[str]) -> list[Job]:
    """Return the compilations of the sources that match a pattern into objects in a folder."""
    jobs = []
    for source in sorted(ROOT.glob(pattern)):
        output = folder / (source.stem + ".o")
        jobs.append(Job(source, output, [*command, "-c", str(source), "-o", str(output)]))
    return jobs


def run(command: list[str]) -> None:
    """Run a compiler and print its output; end the build if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        fail(f"`{' '.join(command)}` failed:\n{output}")
    if output.strip():
        print(output)


class PlatformWheel(bdist_wheel):
    """A wheel for one Python if it contains ``recis_hybrid._xla``; else py3-none-<platform>, with no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of the wheel."""
        if xla_flags() is not None:
            return super().get_tag()
        return "py3", "none", super().get_tag()[2]


setup(
    # A nominal extension, which tells setuptools that the wheel is not pure; BuildNative builds the libraries.
    ext_modules=[
        Extension(
            "recis_hybrid.lib.recis",
            sources=[
                str(path.relative_to(ROOT))
                for path in [*ROOT.glob("csrc/ops/*.cpp"), *ROOT.glob("csrc/xla/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
            ],
            depends=[str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")]],
        )
    ],
    cmdclass={"build_ext": BuildNative, "build_emulated": BuildEmulated, "bdist_wheel": PlatformWheel},
)
