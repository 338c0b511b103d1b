"""The command ``export``: checkpoints for serving, and bundles of runs."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.app.config import ConfigError
from recis_hybrid.app.loaded_run import load_run
from recis_hybrid.app.model import ConfigModel, logits_of
from recis_hybrid.publish import PublishError, table_vectors, write_bundle, write_index
from recis_hybrid.publish.index import KINDS, METRICS
from recis_hybrid.saver import CheckpointError, Location, cli as saver_cli
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint, link_to, open_checkpoint
from recis_hybrid.saver.export import EXPORT_DTYPES
from recis_hybrid.saver.storage.resolve import storage_of
from recis_hybrid.saver.storage.step_directory import STEP

_ROWS = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``export``; without ``--bundle`` it is the saver's command.

    Args:
        arguments: Arguments of the command line; None takes those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    args = parser.parse(words[1:])
    for option, only in (("data", "bundle"), ("table", "index"), ("kind", "index"), ("metric", "index")):
        if getattr(args, option) is not None and getattr(args, only) is None:
            parser.error(f"--{option} is for --{only}")
    if args.update and args.bundle is None:
        parser.error("--update is for --bundle")
    if sum(target is not None for target in (args.out, args.bundle, args.index)) != 1:
        parser.error("name one target: OUT, --bundle DIR or --index FILE")
    if args.out is not None:
        return saver_cli.main(words)
    if args.index is not None and args.table is None:
        parser.error("--index needs --table NAME, the table of the items")
    try:
        result = _export_index(args) if args.index is not None else _export_bundle(args)
    except (CheckpointError, ConfigError, PublishError, ImportError, OSError) as error:
        message = {"error": str(error)}
        print(
            json.dumps(message) if args.json else f"recis-hybrid: {error}", file=sys.stdout if args.json else sys.stderr
        )
        return 1
    text = result.pop("text")
    print(json.dumps(result) if args.json else text)
    return 0


def _export_bundle(args: argparse.Namespace) -> dict[str, Any]:
    path = export_bundle(args.path, args.bundle, step=args.step, dtype=args.dtype, data=args.data, update=args.update)
    if not args.update:
        return {"path": str(path), "text": f"{path} is written"}
    step = STEP.fullmatch(path.name)
    assert step is not None
    tables = StoredCheckpoint(path.parent, int(step[1])).manifest.parts["engine"].tables.values()
    rows = sum(table.rows for table in tables)
    removed = sum(0 if table.removed is None else table.removed.rows for table in tables)
    text = f"{path} is written: {rows:,} changed and {removed:,} removed rows"
    return {"path": str(path), "rows": rows, "removed": removed, "text": text}


def _export_index(args: argparse.Namespace) -> dict[str, Any]:
    if args.dtype is not None:
        raise PublishError("an index holds float32; omit --dtype")
    checkpoint = open_checkpoint(args.path, args.step)
    step = checkpoint.manifest.step
    source = {"step": step, "sha256": link_to(checkpoint.root, step).sha256, "table": args.table}
    report = write_index(
        args.index,
        table_vectors(checkpoint, args.table),
        index=KINDS[args.kind or "hnsw"](),
        metric=args.metric or "inner_product",
        source=source,
    )
    parameters = ", ".join(f"{name}={value}" for name, value in report.parameters.items())
    text = (
        f"{args.index} is written: {report.rows:,} items of step {step}, {report.kind} ({parameters or 'exact'}), "
        f"{report.metric}, recall@{report.k} {report.recall:.4f} of {report.queries:,} items as queries"
    )
    return {"path": args.index, **asdict(report), "text": text}


def export_bundle(
    run: str,
    out: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    data: str | None = None,
    update: bool = False,
) -> Location:
    """Write a bundle of a run, or an update of one.

    Args:
        run: The run's folder or URL, or one of its checkpoints ``step_…``.
        out: Directory or URL of the bundle.
        step: Step of the checkpoint; None for the latest.
        dtype: Dtype of the embeddings; None keeps that of each table.
        data: Files from which dtypes and shapes of the columns are read; None for the run's training data.
        update: Whether to write only what has changed since the latest bundle or update in ``out``.

    Returns:
        The folder of the bundle or update.

    Raises:
        CheckpointError: The checkpoint does not exist or is damaged, or the bundle cannot be written.
        ConfigError: The folder is not a run.
        PublishError: The model cannot be a bundle.
        FileNotFoundError: The run or its data do not exist.
    """
    # The rows of an update are read from the checkpoints.
    loaded = load_run(run, step="latest" if step is None else step, device="cpu", tables=not update)
    paths: Any = loaded.config.data.train if data is None else data
    try:
        dataset = loaded.data(paths, batch_size=_ROWS)
        batch = next(iter(dataset), None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Name files with the run's columns by --data") from error
    if batch is None:
        raise PublishError(f"{paths} has no rows; name files with the run's columns by --data")
    model = loaded.model
    assert isinstance(model, ConfigModel)
    digest = link_to(storage_of(loaded.path).root, loaded.step).sha256
    return write_bundle(
        out,
        loaded.step,
        features=loaded.features,
        engine=model.engine,
        tower=_Scores(model),
        inputs=[*model.embedded, *model.numbers],
        batch=batch,
        columns=dataset.columns,
        dtype=dtype,
        source={"run": loaded.path, "step": loaded.step, "sha256": digest},
        update=update,
        checkpoint=open_checkpoint(loaded.path, loaded.step) if update else None,
    )


class _Scores(nn.Module):
    """The part of a model behind its features and tables: embeddings and numbers → probabilities."""

    def __init__(self, model: ConfigModel) -> None:
        super().__init__()
        self.tower, self.bias, self.has_machine = copy.deepcopy(model.tower), model.bias, model.has_machine
        # An exporter cannot trace a compiled module.
        self.tower._compiled_call_impl = None
        self.embeddings = len(model.embedded)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return scores ``[B]``."""
        numbers = [x.float() if x.dim() == 2 else x.float().unsqueeze(1) for x in inputs[self.embeddings :]]
        return torch.sigmoid(logits_of(self, inputs[: self.embeddings], numbers))


def _parser() -> saver_cli.Parser:
    parser = saver_cli.Parser("export", "write ids, embeddings and towers for serving, or a bundle that scores rows")
    parser.add_argument("path", help="directory or URL of a run (its latest checkpoint), or a step_… in it")
    parser.add_argument("out", nargs="?", help="directory or URL to write to, as step_…")
    parser.add_argument("--bundle", metavar="DIR", help="write a bundle to DIR: features, tables and tower of a run")
    parser.add_argument("--update", action="store_true", help="write to DIR what changed since the latest bundle there")
    parser.add_argument("--index", metavar="FILE", help="write the rows of one table to a vector index of faiss")
    parser.add_argument("--table", metavar="NAME", help="table of the items, for --index")
    parser.add_argument("--kind", choices=KINDS, help="kind of index (hnsw)")
    parser.add_argument("--metric", choices=METRICS, help="score of an item (inner_product)")
    parser.add_argument("--data", metavar="FILES", help="files whose columns a bundle reads (default: training data)")
    parser.add_argument("--step", type=int, help="step of the checkpoint, if PATH is a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--dtype",
        choices=EXPORT_DTYPES,
        help="dtype of the embeddings; int8 and int4 scale each row (default: unchanged)",
    )
    return parser
