from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from recis_hybrid import ops
from tests.support import emulated

CODE = """
import hashlib, torch
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
generator = torch.Generator().manual_seed(0)
engine = EmbeddingEngine(
    {n: EmbeddingConfig(dim=d, initializer=Normal(0, 1)) for n, d in (("a", 64), ("b", 10), ("c", 32))},
    optimizer=optim.Adam,
)
optimizer = optim.Adam(engine.parameters(), lr=0.1)
digest = hashlib.sha256()
for _ in range(5):
    outputs = engine({n: torch.randint(-9, 9, (50, 3), generator=generator) for n in "abc"})
    # Integers, because torch's normal numbers differ between levels.
    gradients = [torch.randint(-99, 99, value.shape, generator=generator) / 8 for value in outputs.values()]
    torch.autograd.backward(list(outputs.values()), gradients)
    optimizer.step()
    for value in outputs.values():
        digest.update(value.detach().numpy().tobytes())
loaded = [line.split("/")[-1].strip() for line in open("/proc/self/maps") if "librecis_cpu" in line]
print(loaded[0], digest.hexdigest())
"""


def run(root: Path, capability: str | None, code: str = CODE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="x86 levels only")
def test_training_is_bitwise_equal_on_all_levels_of_this_processor(root: Path) -> None:
    levels = {"default": "librecis_cpu_v2.so", "avx2": "librecis_cpu_v3.so"}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        levels["avx512"] = "librecis_cpu_v4.so"
    digests = set()
    with ThreadPoolExecutor() as pool:  # most of the time of a process is the import of torch
        runs = list(pool.map(lambda capability: run(root, capability), levels))
    for library, done in zip(levels.values(), runs, strict=True):
        assert done.returncode == 0, done.stderr
        loaded, digest = done.stdout.split()
        assert loaded == library
        digests.add(digest)
    assert len(digests) == 1


def test_the_error_for_a_missing_library_names_the_remedy(root: Path) -> None:
    code = (
        "from pathlib import Path\nimport torch\nload = torch.ops.load_library\n"
        "def missing(path):\n    load(path + '.gone')\n"
        "torch.ops.load_library = missing\nimport recis_hybrid.ops"
    )
    done = run(root, None, code)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the native library librecis_cpu_")
    assert "pip install --no-build-isolation -e ." in last


def test_the_error_for_a_cuda_library_that_does_not_load_names_causes_and_remedies(root: Path) -> None:
    code = (
        "import torch\nload = torch.ops.load_library\ntorch.version.cuda = '13.0'\n"
        "def broken(path):\n"
        "    if 'cuda' in path:\n        raise OSError('undefined symbol: aoti_torch_get_current_cuda_stream')\n"
        "    load(path)\n"
        "torch.ops.load_library = broken\n"
        "from pathlib import Path\nexists = Path.exists\n"
        "Path.exists = lambda path, **more: path.name == 'librecis_cuda.so' or exists(path, **more)\n"
        "import recis_hybrid.ops"
    )
    done = run(root, None, code)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the CUDA library librecis_cuda.so of recis_hybrid could not be loaded from ")
    assert "undefined symbol: aoti_torch_get_current_cuda_stream" in last
    assert f"built against another torch than {torch.__version__} (CUDA 13.0)" in last
    assert "RECIS_CUDA=1 pip install --no-build-isolation -e ." in last
    assert "nvidia-smi" in last
    assert "update the driver" in last


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("error", "remedy"), [(35, "update the driver"), (209, "RECIS_CUDA_ARCHS set to the GPU's compute capability")]
)
def test_errors_of_the_installation_name_the_remedy(error: int, remedy: str) -> None:
    ids = torch.arange(4, device="emulated")
    emulated.fail_launch(error)
    with pytest.raises(RuntimeError, match=f"CUDA: an error .*{remedy}"):
        ops.hash.hash_ids(ids)
    assert ops.hash.hash_ids(ids).tolist() == ops.hash.hash_ids(ids.cpu()).tolist()
