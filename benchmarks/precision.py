"""AUC of narrow embeddings beside float32, and sizes of quantized exports.

DeepFM on Frappe (``examples/frappe.py``) is trained with rows in float32, bfloat16 and float16, which updates round
stochastically, while optimizer state stays float32. Then the embeddings of the float32 model are replaced by those of
its int8 and int4 exports, as ``recis_hybrid.serving`` reads them, without training. Prints one JSON line a figure: the
test AUC (for trained rows that of the best epoch, for exports that of the last), and the bytes of a row in an export.

    python -m benchmarks.precision --data FOLDER [--seeds 0 1] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness import Result, progress
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.metrics import AUC
from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.export import export
from recis_hybrid.serving import Reader

ROWS, DIMS = 100_000, (16, 64, 128)
EXPORTS = ("bfloat16", "int8", "int4")


def example() -> ModuleType:
    """Return the example as a module."""
    path = Path(__file__).resolve().parents[1] / "examples" / "frappe.py"
    spec = importlib.util.spec_from_file_location("frappe", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["frappe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def auc_of(trained: Any, batches: Any) -> float:
    """Return the test AUC of a model as it is."""
    auc = AUC()
    for batch in batches:
        (scores,) = trained.step.score(batch).values()
        auc.update(scores, batch["label"])
    return float(auc.compute())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/, valid/ and test/, as of examples/frappe.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the runs (0)")
    parser.add_argument("--quick", action="store_true", help="one epoch of each run: under a minute on two cores")
    args = parser.parse_args()
    for seed in args.seeds:
        for result in accuracy(args.data, seed, epochs=1 if args.quick else 100):
            result.print()
    for dim in DIMS:
        for result in sizes(dim):
            result.print()


def accuracy(data: str, seed: int, epochs: int) -> Iterator[Result]:
    """Yield the AUC of each dtype for one seed, beside that of float32."""
    frappe = example()
    settings = argparse.Namespace(data=data, model="deepfm", tower="torch", epochs=epochs, batch_size=4096, seed=seed)
    settings.run, settings.resume, settings.quiet = "", False, True
    peer = 0.0
    for dtype in ("float32", "bfloat16", "float16"):
        settings.dtype = dtype
        trained = frappe.run(settings, frappe.datasets(settings), baseline=False)
        figures = trained.figures
        progress(f"seed {seed}, {dtype}: {figures.epochs} epochs, AUC {figures.auc:.5f}, {figures.seconds:.0f} s")
        peer = peer or figures.auc
        yield _auc(f"trained in {dtype}, seed {seed}", figures.auc, peer)
        if dtype == "float32":
            test = list(frappe.datasets(settings)["test"])
            whole = auc_of(trained, test)
            for exported, auc in quantized_aucs(trained, test).items():
                yield _auc(f"{exported} export, seed {seed}", auc, whole)


def quantized_aucs(trained: Any, test: Any) -> dict[str, float]:
    """Return the AUC with the embeddings of each export; the model ends with those of the last."""
    engine, found = trained.lookup, {}
    names = [member.name for table in engine.tables for member in table.members]
    with tempfile.TemporaryDirectory() as folder:
        Saver(f"{folder}/run").save(1, {"engine": engine})
        for dtype in EXPORTS:
            reader = Reader(export(StoredCheckpoint(Path(folder, "run"), 1), f"{folder}/{dtype}", dtype))
            for name in names:
                ids = engine.tables[0].ids(names.index(name))
                engine.load_rows(name, ids, torch.from_numpy(reader.lookup(name, ids.numpy())))
            found[dtype] = auc_of(trained, test)
    return found


def _auc(case: str, ours: float, peer: float) -> Result:
    return Result("precision", case, "auc", "", ours, peer, "float32", ours / peer)


def sizes(dim: int) -> list[Result]:
    """Return the bytes of a row in each export, beside float32: ids, embeddings and the index of buckets."""
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=dim)}, group=False)
    engine({"id": torch.arange(ROWS)})
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        Saver(f"{folder}/run").save(1, {"engine": engine})
        for dtype in ("float32", *EXPORTS):
            path = Path(str(export(StoredCheckpoint(Path(folder, "run"), 1), f"{folder}/{dtype}", dtype)))
            found[dtype] = sum(file.stat().st_size for file in path.rglob("*.safetensors")) / ROWS
    whole = found["float32"]
    return [
        Result(
            "precision",
            f"{dtype} export, d{dim}",
            "size",
            "B/row",
            found[dtype],
            whole,
            "float32",
            whole / found[dtype],
        )
        for dtype in EXPORTS
    ]


if __name__ == "__main__":
    main()
