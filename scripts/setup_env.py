"""Check that this machine can build and run recis_hybrid; print one sentence, with the remedy, for each problem.

The Makefile runs it with only the standard library:

    python3 scripts/setup_env.py host     before anything is installed: checks Python, venv and the C++ compiler
    python  scripts/setup_env.py torch    inside the environment: checks the installed torch

Exit status 0 without output if there are no problems, else 1. The file uses the syntax of Python 3.6, so that an old
Python can print the sentence about its version.
"""

import os
import shutil
import subprocess
import sys
from typing import Any, List, Optional, Tuple

# The same versions as in pyproject.toml.
PYTHONS = ((3, 11), (3, 14))
TORCHES = ((2, 11), (2, 15))
# Uses the same features as the kernels, so that a compiler that is too old fails here, not in the middle of the build.
CXX_PROBE = """
#include <bit>
#include <concepts>
#include <cstdint>
template <std::unsigned_integral T> constexpr int width(T x) { return std::bit_width(x); }
static_assert(width(std::uint64_t{255}) == 8);
int main() {}
"""


def python_fault(version: Tuple[int, ...]) -> Optional[str]:
    """Return the problem with this version of Python, or None."""
    low, high = PYTHONS
    if low <= tuple(version[:2]) <= high:
        return None
    return (
        "Python {}.{} is not supported: recis_hybrid needs {}.{} to {}.{}; install one of them "
        "(Debian: `apt-get install python3.11 python3.11-venv`) and name it, e.g. `make demo PYTHON=python3.11`."
    ).format(version[0], version[1], low[0], low[1], high[0], high[1])


def venv_fault(version: Tuple[int, ...]) -> Optional[str]:
    """Return the problem that prevents this Python from creating virtual environments, or None."""
    try:
        # Debian ships venv without ensurepip, and `python -m venv` then fails with a page of text.
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return (
            "Python {0}.{1} cannot create virtual environments (no module {2!r}); "
            "install its venv package (Debian: `apt-get install python{0}.{1}-venv`)."
        ).format(version[0], version[1], error.name)
    return None


def compiler_fault(cxx: str) -> Optional[str]:
    """Return the problem with the C++ compiler of this name, or None."""
    path = shutil.which(cxx)
    if path is None:
        return (
            "The C++ compiler {!r} was not found; install g++ 10 or newer (Debian: `apt-get install g++`) "
            "or name another one in the environment variable CXX."
        ).format(cxx)
    command = [path, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(command, input=CXX_PROBE.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        return "The C++ compiler {} cannot be run ({}); set CXX to another one.".format(path, error.strerror)
    if done.returncode == 0:
        return None
    errors = done.stderr.decode(errors="replace").strip().splitlines()
    return (
        "The C++ compiler {} does not compile C++20 ({}); install g++ 10 or newer, or clang 14 or newer, "
        "and set CXX to it."
    ).format(path, errors[0] if errors else "exit status {}".format(done.returncode))


def torch_fault(version: Optional[str]) -> Optional[str]:
    """Return the problem with an installed torch of this version (None: not installed), or None."""
    low, high = TORCHES
    remedy = 'recis_hybrid needs {}.{} to {}.{}; install it first: `pip install "torch>={}.{},<{}.{}"`.'.format(
        low[0], low[1], high[0], high[1], low[0], low[1], high[0], high[1] + 1
    )
    if version is None:
        return "torch is not installed in {}; {}".format(sys.prefix, remedy)
    try:
        major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        return "torch in {} has the version {!r}, which cannot be parsed; {}".format(sys.prefix, version, remedy)
    if (major, minor) < low:
        return "torch {} in {} is too old; {}".format(version, sys.prefix, remedy)
    if (major, minor) > high:
        return "torch {} in {} is newer than the supported versions; {}".format(version, sys.prefix, remedy)
    return None


def installed_torch() -> Optional[str]:
    """Return the version of torch in the current environment, without importing it."""
    import importlib.metadata as metadata

    try:
        version: Any = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    return str(version)


def faults(subject: str) -> List[str]:
    """Return all problems of "host" or "torch", in the order in which to fix them."""
    version = tuple(sys.version_info[:3])
    found = [python_fault(version)]
    if found[0] is None:
        if subject == "host":
            found += [venv_fault(version), compiler_fault(os.environ.get("CXX") or "g++")]
        else:
            found.append(torch_fault(installed_torch()))
    return [fault for fault in found if fault is not None]


def main(arguments: List[str]) -> int:
    """Print the problems and return the exit status."""
    if len(arguments) != 1 or arguments[0] not in ("host", "torch"):
        print("usage: setup_env.py host|torch", file=sys.stderr)
        return 2
    found = faults(arguments[0])
    for fault in found:
        print("recis_hybrid: " + fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
